//! Launches of `kernels/embed_bwd.cu`, and of `kernels/rope.cu` for training.

use std::collections::BTreeMap;

use super::Cuda;
use super::driver::{Arg, DevicePtr};
use super::launch::{Kernel, address, int};
use super::rows::{THREADS, grid};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{Heads, RopeTable, Rotation, RowCopy, Span, check, check_grad};
use crate::tensor::Tensor;

impl Cuda {
    /// [`GradOps::add_rows`](crate::ops::GradOps::add_rows)
    pub(super) fn add_rows(&self, dst: &mut Tensor, src: &Tensor, copies: &[RowCopy]) -> Result<()> {
        const OP: &str = "add_rows";
        check_grad::add_rows(dst, src, copies)?;
        self.activations(OP, [("dst", dst), ("src", src)])?;
        let rows = |c: &RowCopy| (c.dst..c.dst + c.n_rows).zip(c.src..c.src + c.n_rows);
        // SAFETY: all rows are those of the two tensors (just checked).
        unsafe { self.add_pairs(OP, Kernel::AddRows, dst, src, copies.iter().flat_map(rows)) }
    }

    /// [`GradOps::embed_backward`](crate::ops::GradOps::embed_backward)
    pub(super) fn embed_backward(&self, d_table: &mut Tensor, dy: &Tensor, ids: &[u32]) -> Result<()> {
        const OP: &str = "embed_backward";
        check_grad::embed_backward(d_table, dy, ids)?;
        self.activations(OP, [("dy", dy)])?;
        let pairs = ids.iter().enumerate().map(|(row, &id)| (id as usize, row));
        // SAFETY: d_table has a row for each id, dy as many as there are ids (just checked).
        unsafe { self.add_pairs(OP, Kernel::EmbedBackward, d_table, dy, pairs) }
    }

    /// Adds rows of `src` to rows of `dst` for pairs (to, from), those of one row in their order.
    ///
    /// # Safety
    /// Both tensors have these rows, and the dtypes that the kernel takes.
    unsafe fn add_pairs(
        &self,
        op: &'static str,
        kernel: Kernel,
        dst: &mut Tensor,
        src: &Tensor,
        pairs: impl Iterator<Item = (usize, usize)>,
    ) -> Result<()> {
        let [to, from] = [address(op, "rows added to", dst)?, address(op, "rows added", src)?].map(Arg::Ptr);
        for (what, tensor) in [("rows added to", &*dst), ("rows added", src)] {
            int(op, what, tensor.rows())?;
        }
        let hidden = int(op, "row length", dst.row_len())?;
        let mut groups: BTreeMap<usize, Vec<i32>> = BTreeMap::new();
        for (to, from) in pairs {
            groups.entry(to).or_default().push(from as i32);
        }
        if groups.is_empty() || dst.row_len() == 0 {
            return Ok(());
        }
        let (mut words, mut n) = (Vec::new(), 0);
        for (&row, from) in &groups {
            words.extend([row as i32, n, n + from.len() as i32]);
            n += from.len() as i32;
        }
        let at = words.len() * 4;
        words.extend(groups.values().flatten());
        self.with_ints(words, |table| {
            let args = [to, from, Arg::Ptr(table), Arg::Ptr(table.offset(at)), hidden];
            // SAFETY: the arguments are the kernel's, the rows are there, says the caller, and both tensors have rows of `hidden`.
            unsafe { self.launch(kernel, grid(groups.len(), dst.row_len().div_ceil(THREADS)), &args) }
        })
    }

    /// [`GradOps::clip_embed_backward`](crate::ops::GradOps::clip_embed_backward)
    pub(super) fn clip_embed_backward(
        &self,
        d_patches: &mut Tensor,
        d_class: &mut Tensor,
        d_positions: &mut Tensor,
        dy: &Tensor,
    ) -> Result<()> {
        const OP: &str = "clip_embed_backward";
        check_grad::clip_embed_backward(d_patches, d_class, d_positions, dy)?;
        let [patches, from] = self.activations(OP, [("d_patches", d_patches), ("dy", dy)])?;
        let (class, positions) = (address(OP, "d_class", d_class)?, address(OP, "d_positions", d_positions)?);
        int(OP, "rows of dy", dy.rows())?;
        let (n, hidden) = (d_positions.rows(), d_positions.row_len());
        let sizes = [int(OP, "images", dy.rows() / n)?, int(OP, "positions", n)?, int(OP, "hidden", hidden)?];
        if dy.is_empty() {
            return Ok(());
        }
        let args = [&[patches, Arg::Ptr(class), Arg::Ptr(positions), from], &sizes[..]].concat();
        // SAFETY: the arguments are the kernel's; dy has a row of `hidden` for each position of each picture, d_patches one less for each
        // picture, d_class one (just checked).
        unsafe { self.launch(Kernel::ClipEmbedBackward, grid(n, hidden.div_ceil(THREADS)), &args) }
    }

    /// [`GradOps::rope`](crate::ops::GradOps::rope)
    pub(super) fn rope(
        &self,
        qkv: &mut Tensor,
        rope: &RopeTable,
        spans: &[Span<'_>],
        heads: Heads,
        rotation: Rotation,
    ) -> Result<()> {
        const OP: &str = "rope";
        check_grad::rope(qkv, rope, spans, heads)?;
        check_grad::f32s(OP, [("cos", &rope.cos), ("sin", &rope.sin)])?;
        let [to] = self.activations(OP, [("qkv", qkv)])?;
        let angles = [address(OP, "cos", &rope.cos)?, address(OP, "sin", &rope.sin)?].map(Arg::Ptr);
        int(OP, "width of qkv", heads.qkv_width())?;
        let sizes = [
            int(OP, "n_heads", heads.n_heads)?,
            int(OP, "n_kv_heads", heads.n_kv_heads)?,
            int(OP, "head_dim", heads.head_dim)?,
            Arg::Float(if rotation == Rotation::Forward { 1.0 } else { -1.0 }),
        ];
        if qkv.is_empty() || spans.iter().all(|s| s.n_rows == 0) {
            return Ok(());
        }
        let lanes = (heads.head_dim / 2).div_ceil(self.vector());
        let parts = ((heads.n_heads + heads.n_kv_heads) * lanes).div_ceil(THREADS);
        self.with_spans(OP, spans, qkv.rows(), |table| {
            let args = [&[to], &angles[..], &[table.spans, table.row_span].map(Arg::Ptr), &sizes].concat();
            // SAFETY: the arguments are the kernel's; the spans' rows are within qkv and their positions within the tables of angles (just
            // checked).
            unsafe { self.launch(Kernel::Rope, grid(qkv.rows(), parts), &args) }
        })
    }

    /// Columns `first .. first + n` of rows of f32, rounded to this device's dtype: what calls `f` has them until `f` is done queueing.
    pub(super) fn with_rounded<R>(
        &self,
        op: &'static str,
        x: &Tensor,
        first: usize,
        n: usize,
        f: impl FnOnce(DevicePtr) -> Result<R>,
    ) -> Result<R> {
        let memory = self.arena.alloc(x.rows() * n * self.dtype.size())?;
        let from = address(op, "rows to round", x)?.offset(first * DType::F32.size());
        let args = [Arg::Ptr(memory.ptr), Arg::Ptr(from), int(op, "width of rows", x.row_len())?, int(op, "columns", n)?];
        check::dtype(op, "rows to round", x, DType::F32)?;
        if x.rows() * n > 0 {
            // SAFETY: the arguments are the kernel's; x has these columns, says the caller's check, and the memory room for them.
            unsafe { self.launch(Kernel::RoundRows, grid(x.rows(), n.div_ceil(THREADS)), &args)? };
        }
        f(memory.ptr)
    }
}
