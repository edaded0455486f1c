//! Launches of `kernels/activation.cu`, `kernels/embed.cu` and `kernels/rope.cu`.

use std::collections::BTreeMap;
use std::ops::Range;

use super::Cuda;
use super::attention::MAX_HEAD_DIM;
use super::driver::{Arg, Grid};
use super::launch::{Kernel, address, int};
use super::packed::pointers;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::{Heads, KvLayer, Matrix, RopeTable, RowCopy, Span, check};
use crate::tensor::Tensor;

/// Threads of a block, in all kernels here.
pub(super) const THREADS: usize = 128;
/// Bytes that a thread moves at once.
pub(super) const VECTOR_BYTES: usize = 16;

/// `rows` blocks in x, of which there may be 2³¹ − 1, and `parts` in y, of which there may be 65535.
pub(super) fn grid(rows: usize, parts: usize) -> Grid {
    Grid { blocks: [rows, parts, 1], threads: THREADS, shared_bytes: 0 }
}

impl Cuda {
    /// Elements of a 16-byte vector of activations.
    pub(super) fn vector(&self) -> usize {
        VECTOR_BYTES / self.dtype.size()
    }

    /// [`Ops::silu_mul`](crate::ops::Ops::silu_mul)
    pub(super) fn silu_mul(&self, y: &mut Tensor, gate_up: &Tensor) -> Result<()> {
        const OP: &str = "silu_mul";
        check::silu_mul(y, gate_up)?;
        check::dtype(OP, "y", y, self.dtype)?;
        check::dtype(OP, "gate_up", gate_up, self.dtype)?;
        let args = [Arg::Ptr(address(OP, "y", y)?), Arg::Ptr(address(OP, "gate_up", gate_up)?), int(OP, "n", y.row_len())?];
        if y.is_empty() {
            return Ok(());
        }
        let parts = y.row_len().div_ceil(THREADS * self.vector());
        // SAFETY: the arguments are the kernel's; y has `rows` rows of n, gate_up as many of 2n (just checked).
        unsafe { self.launch(Kernel::SiluMul, grid(y.rows(), parts), &args) }
    }

    /// [`Ops::embed`](crate::ops::Ops::embed)
    pub(super) fn embed(&self, y: &mut Tensor, table: &Matrix, ids: &[u32]) -> Result<()> {
        const OP: &str = "embed";
        check::embed(y, table, ids)?;
        check::dtype(OP, "y", y, self.dtype)?;
        int(OP, "rows of table", table.n())?;
        let y_ptr = Arg::Ptr(address(OP, "y", y)?);
        let hidden = int(OP, "hidden", y.row_len())?;
        let (kernel, table_args, group) = match table {
            Matrix::Dense(table) => {
                check::dtype(OP, "table", table, self.dtype)?;
                (Kernel::Embed, vec![Arg::Ptr(address(OP, "table", table)?)], None)
            }
            Matrix::Packed(table) => {
                let kernel = if table.bits == 4 { Kernel::EmbedPacked4 } else { Kernel::EmbedPacked8 };
                (kernel, pointers(OP, table)?.map(Arg::Ptr).into(), Some(int(OP, "group", table.group)?))
            }
        };
        if y.is_empty() {
            return Ok(());
        }
        let words = ids.iter().map(|&id| id as i32).collect();
        self.with_ints(words, |ids| {
            let args = [&[y_ptr], &*table_args, &[Arg::Ptr(ids), hidden]].concat().into_iter().chain(group);
            // SAFETY: the arguments are the kernel's; y has a row of `hidden` for each id, and the table one for each value that an
            // id may have (just checked); `Packed::new` vouches for the tensors of a packed one.
            unsafe { self.launch(kernel, grid(y.rows(), 1), &args.collect::<Vec<_>>()) }
        })
    }

    /// [`Ops::patchify`](crate::ops::Ops::patchify)
    pub(super) fn patchify(&self, y: &mut Tensor, pixels: &Tensor, images: Range<usize>, patch_size: usize) -> Result<()> {
        const OP: &str = "patchify";
        let [height, width] = check::patchify(y, pixels, &images, patch_size)?;
        check::dtype(OP, "y", y, self.dtype)?;
        check::dtype(OP, "pixels", pixels, DType::F32)?;
        // Block numbers and indices within a picture are ints in the kernel.
        int(OP, "rows of y", y.rows())?;
        int(OP, "size of a picture", pixels.row_len())?;
        let first = address(OP, "pixels", pixels)?.offset(images.start * pixels.row_len() * pixels.dtype().size());
        let args = [
            Arg::Ptr(address(OP, "y", y)?),
            Arg::Ptr(first),
            int(OP, "height", height)?,
            int(OP, "width", width)?,
            int(OP, "patch size", patch_size)?,
        ];
        if y.is_empty() {
            return Ok(());
        }
        // SAFETY: the arguments are the kernel's; the pictures are among those of pixels, y has a row of 3·p·p for each of their patches,
        // and p divides both sides (just checked).
        unsafe { self.launch(Kernel::Patchify, grid(y.rows(), 1), &args) }
    }

    /// [`Ops::clip_embed`](crate::ops::Ops::clip_embed)
    pub(super) fn clip_embed(&self, y: &mut Tensor, patches: &Tensor, class: &Tensor, positions: &Tensor) -> Result<()> {
        const OP: &str = "clip_embed";
        check::clip_embed(y, patches, class, positions)?;
        let (own, f32) = (self.dtype, DType::F32);
        let mut args = Vec::new();
        for (what, tensor, dtype) in
            [("y", &*y, own), ("patches", patches, own), ("class", class, f32), ("positions", positions, f32)]
        {
            check::dtype(OP, what, tensor, dtype)?;
            args.push(Arg::Ptr(address(OP, what, tensor)?));
        }
        args.extend([int(OP, "positions", positions.rows())?, int(OP, "hidden", y.row_len())?]);
        int(OP, "rows of y", y.rows())?;
        if y.is_empty() {
            return Ok(());
        }
        // SAFETY: the arguments are the kernel's; y has a row of `hidden` for each position of each picture, patches one less for each
        // picture, class one (just checked).
        unsafe { self.launch(Kernel::ClipEmbed, grid(y.rows(), 1), &args) }
    }

    /// [`Ops::rope_append`](crate::ops::Ops::rope_append)
    pub(super) fn rope_append(
        &self,
        qkv: &mut Tensor,
        kv: &mut KvLayer,
        rope: &RopeTable,
        spans: &[Span<'_>],
        heads: Heads,
    ) -> Result<()> {
        const OP: &str = "rope_append";
        check::rope_append(qkv, kv, rope, spans, heads)?;
        let (own, f32) = (self.dtype, DType::F32);
        let kept = if kv.scales.is_some() { DType::I8 } else { own };
        let mut operands = vec![("qkv", &*qkv, own), ("key cache", &kv.k, kept), ("value cache", &kv.v, kept)];
        operands.extend(kv.scales.iter().flatten().map(|scales| ("scales of the cache", scales, f32)));
        operands.extend([("cos", &rope.cos, f32), ("sin", &rope.sin, f32)]);
        let mut args = Vec::new();
        for (what, tensor, dtype) in operands {
            check::dtype(OP, what, tensor, dtype)?;
            args.push(Arg::Ptr(address(OP, what, tensor)?));
        }
        let sizes = [
            int(OP, "n_heads", heads.n_heads)?,
            int(OP, "n_kv_heads", heads.n_kv_heads)?,
            int(OP, "head_dim", heads.head_dim)?,
            int(OP, "page_tokens", kv.page_tokens())?,
        ];
        int(OP, "width of qkv", heads.qkv_width())?;
        if qkv.is_empty() || spans.iter().all(|s| s.n_rows == 0) {
            return Ok(());
        }
        let vectors = (heads.head_dim / 2).div_ceil(self.vector());
        let (kernel, lanes) = match kv.scales {
            None => (Kernel::RopeAppend, vectors),
            Some(_) if heads.head_dim <= MAX_HEAD_DIM => (Kernel::RopeAppendI8, vectors.next_power_of_two()),
            Some(_) => return Err(Error::shape(OP, "head_dim", format!("up to {MAX_HEAD_DIM}"), heads.head_dim)),
        };
        let parts = ((heads.n_heads + 2 * heads.n_kv_heads) * lanes).div_ceil(THREADS);
        self.with_spans(OP, spans, qkv.rows(), |table| {
            args.extend([table.spans, table.row_span, table.pages].map(Arg::Ptr));
            args.extend(sizes);
            // SAFETY: the arguments are the kernel's; the spans' rows are within qkv, their positions within the tables of angles and
            // their pages, and those within the cache (just checked).
            unsafe { self.launch(kernel, grid(qkv.rows(), parts), &args) }
        })
    }

    /// [`Ops::copy_rows`](crate::ops::Ops::copy_rows)
    pub(super) fn copy_rows(&self, dst: &mut Tensor, src: &Tensor, copies: &[RowCopy]) -> Result<()> {
        const OP: &str = "copy_rows";
        check::copy_rows(dst, src, copies)?;
        check::dtype(OP, "dst", dst, self.dtype)?;
        let (dst_ptr, src_ptr) = (address(OP, "dst", dst)?, address(OP, "src", src)?);
        for (what, tensor) in [("rows of dst", &*dst), ("rows of src", src)] {
            int(OP, what, tensor.rows())?;
        }
        let hidden = int(OP, "row length", dst.row_len())?;
        // Rows are copied at the same time: of several copies to one row only the last may be made.
        let rows = |c: &RowCopy| (c.dst..c.dst + c.n_rows).zip(c.src..c.src + c.n_rows);
        let pairs: BTreeMap<usize, usize> = copies.iter().flat_map(rows).collect();
        if pairs.is_empty() || dst.is_empty() {
            return Ok(());
        }
        let words = pairs.iter().flat_map(|(&to, &from)| [to as i32, from as i32]).collect();
        self.with_ints(words, |table| {
            let args = [Arg::Ptr(dst_ptr), Arg::Ptr(src_ptr), Arg::Ptr(table), hidden];
            // SAFETY: the arguments are the kernel's; both tensors have rows of `hidden`, and all that the pairs name (just checked).
            unsafe { self.launch(Kernel::CopyRows, grid(pairs.len(), 1), &args) }
        })
    }
}
