//! Launches of `kernels/sample.cu`.

use super::Cuda;
use super::driver::{Arg, Grid};
use super::launch::{Kernel, address, int};
use crate::error::Result;
use crate::ops::{Draw, check};
use crate::tensor::Tensor;

/// Threads of a block, which has one row.
const THREADS: usize = 1024;
/// The kernel's `Shared`: two u32 for each digit; a u64, an f32 and an i32 for each warp.
const SHARED_BYTES: usize = 1024 * 8 + THREADS / 32 * (8 + 4 + 4);

impl Cuda {
    /// [`Ops::sample`](crate::ops::Ops::sample)
    pub(super) fn sample(&self, ids: &mut Tensor, logits: &Tensor, seen: &mut Tensor, draws: &[Draw]) -> Result<()> {
        const OP: &str = "sample";
        let vocab = check::sample(ids, logits, seen, draws)?;
        let [ids, logits, seen] =
            [("ids", &*ids), ("logits", logits), ("seen", seen)].map(|(what, tensor)| address(OP, what, tensor).map(Arg::Ptr));
        let (ids, logits, seen, rows, vocab_arg) = (ids?, logits?, seen?, draws.len(), int(OP, "vocabulary", vocab)?);
        int(OP, "rows", rows)?;
        if rows == 0 {
            return Ok(());
        }
        let grid = Grid { blocks: [rows, 1, 1], threads: THREADS, shared_bytes: SHARED_BYTES };
        // What changes from token to token stands in a table, so that the launch stays the same.
        self.with_ints(draws.iter().flat_map(|draw| words(draw, vocab)).collect(), |table| {
            // SAFETY: the arguments are the kernel's; logits has `rows` rows of `vocab`, seen a bit for each, ids one element for each
            // row, the table its words (just checked).
            unsafe { self.launch(Kernel::Sample, grid, &[ids, logits, seen, Arg::Ptr(table), vocab_arg]) }
        })
    }
}

/// A draw as the kernel reads it.
fn words(draw: &Draw, vocab: usize) -> [i32; 8] {
    let top_k = if draw.top_k < vocab { draw.top_k as i32 } else { 0 };
    let (p, r) = (draw.top_p_bits(), draw.random);
    let [scale, penalty] = [draw.scale(), draw.repetition_penalty].map(|x| x.to_bits() as i32);
    [scale, penalty, top_k, draw.min_weight() as i32, p as i32, (p >> 32) as i32, r as i32, (r >> 32) as i32]
}
