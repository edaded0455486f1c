//! Launches of `kernels/sample.cu`.

use super::Cuda;
use super::driver::{Arg, Grid};
use super::launch::{Kernel, address, int};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::check;
use crate::tensor::Tensor;

/// Threads of a block, which has one row.
const THREADS: usize = 1024;
/// One f32 and one i32 for each warp.
const SHARED_BYTES: usize = THREADS / 32 * 8;

impl Cuda {
    /// ids\[i\] = the first of the largest logits of row i, −1 if it holds NaN: logits f32 `[rows, vocab]`, ids i32 `[rows]`.
    pub fn argmax(&self, ids: &mut Tensor, logits: &Tensor) -> Result<()> {
        const OP: &str = "argmax";
        let [rows, vocab] = logits.dims2(OP, "logits")?;
        if vocab == 0 {
            return Err(Error::shape(OP, "logits", "at least one token", logits));
        }
        ids.expect(OP, "ids", &[rows])?;
        check::dtype(OP, "logits", logits, DType::F32)?;
        check::dtype(OP, "ids", ids, DType::I32)?;
        let args = [Arg::Ptr(address(OP, "ids", ids)?), Arg::Ptr(address(OP, "logits", logits)?), int(OP, "vocab", vocab)?];
        if rows == 0 {
            return Ok(());
        }
        let grid = Grid { blocks: [rows, 1, 1], threads: THREADS, shared_bytes: SHARED_BYTES };
        // SAFETY: the arguments are the kernel's; logits has `rows` rows of `vocab`, ids one element for each (just checked).
        unsafe { self.launch(Kernel::Argmax, grid, &args) }
    }
}
