//! Launches of `kernels/attention_bwd.cu`.

use super::Cuda;
use super::attention::{MAX_HEAD_DIM, THREADS, of_width};
use super::driver::{Arg, Grid};
use super::launch::{Kernel, address, int};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{Heads, Span, check_grad};
use crate::tensor::Tensor;

/// Kernels for the gradient by queries, by the head widths up to which there is one.
const QUERIES: [(usize, Kernel); 5] = [
    (64, Kernel::AttentionQueriesD64),
    (80, Kernel::AttentionQueriesD80),
    (96, Kernel::AttentionQueriesD96),
    (128, Kernel::AttentionQueriesD128),
    (MAX_HEAD_DIM, Kernel::AttentionQueriesD256),
];

/// ... and by keys and values.
const KEYS: [(usize, Kernel); 5] = [
    (64, Kernel::AttentionKeysD64),
    (80, Kernel::AttentionKeysD80),
    (96, Kernel::AttentionKeysD96),
    (128, Kernel::AttentionKeysD128),
    (MAX_HEAD_DIM, Kernel::AttentionKeysD256),
];

/// Own rows of a block, and its shared memory: `MmaTile` and `PlainTile` of `kernels/attention_bwd.cu`.
fn tile(dtype: DType, width: usize) -> (usize, usize) {
    if dtype != DType::F32 && width <= 128 {
        // Two operands of 64 own rows and of twice 32 passing ones, in 16 bits; two numbers of the latter.
        (64, 2 * (64 + 2 * 32) * (width + 8) * 2 + 2 * 2 * 32 * 4)
    } else {
        // Two operands of 16 own rows and of 32 passing ones, in f32.
        (16, 2 * (16 + 32) * (width.next_multiple_of(32) + 4) * 4)
    }
}

impl Cuda {
    /// [`GradOps::attention_backward`](crate::ops::GradOps::attention_backward) of `[out, d_out, lse]`.
    pub(super) fn attention_backward(
        &self,
        d_qkv: &mut Tensor,
        qkv: &Tensor,
        [out, d_out, lse]: [&Tensor; 3],
        spans: &[Span<'_>],
        heads: Heads,
        causal: bool,
    ) -> Result<()> {
        const OP: &str = "attention_backward";
        check_grad::own_attention(OP, &[("d_qkv", d_qkv), ("qkv", qkv)], &[("out", out), ("d_out", d_out)], lse, spans, heads)?;
        let [to, from, out, d_out] = self.activations(OP, [("d_qkv", d_qkv), ("qkv", qkv), ("out", out), ("d_out", d_out)])?;
        let Heads { n_heads, n_kv_heads, head_dim } = heads;
        let (width, queries) = of_width(OP, &QUERIES, heads)?;
        let (_, keys) = of_width(OP, &KEYS, heads)?;
        let n_items = int(OP, "tokens times heads", lse.len())?;
        int(OP, "width of qkv", heads.qkv_width())?;
        let lse_ptr = Arg::Ptr(address(OP, "lse", lse)?);
        let sizes = [int(OP, "heads", n_heads)?, int(OP, "key heads", n_kv_heads)?, int(OP, "head_dim", head_dim)?];
        let n_rows = spans.iter().map(|span| span.n_rows).max().unwrap_or(0);
        if n_rows == 0 {
            return Ok(());
        }
        // Whoever has the memory next comes later: launches are done in order.
        let memory = self.arena.alloc(lse.len() * 4)?;
        let delta = Arg::Ptr(memory.ptr);
        let grid = Grid { blocks: [lse.len().div_ceil(THREADS / 32), 1, 1], threads: THREADS, shared_bytes: 0 };
        // SAFETY: the arguments are the kernel's; out and d_out have a head's width for each number of lse (just checked), and of delta.
        unsafe { self.launch(Kernel::AttentionDelta, grid, &[delta, out, d_out, n_items, sizes[2]])? };
        let scale = 1.0 / (head_dim as f32).sqrt();
        let scales = [scale, std::f32::consts::LOG2_E / (head_dim as f32).sqrt()].map(Arg::Float);
        let (rows, shared_bytes) = tile(self.dtype, width);
        self.with_spans(OP, spans, qkv.rows(), |table| {
            let operands = [to, from, d_out, lse_ptr, delta, Arg::Ptr(table.spans)];
            let args = [&operands, &sizes[..], &[Arg::Int(causal.into())], &scales].concat();
            for (kernel, n_heads) in [(queries, n_heads), (keys, n_kv_heads)] {
                let grid = Grid { blocks: [n_rows.div_ceil(rows), n_heads, spans.len()], threads: THREADS, shared_bytes };
                // SAFETY: the arguments are the kernel's; all tensors have the spans' rows, which no two of them share (just checked).
                unsafe { self.launch(kernel, grid, &args)? };
            }
            Ok(())
        })
    }
}
