//! Launches of `kernels/activation.cu`, `kernels/embed.cu` and `kernels/rope.cu`.

use super::Cuda;
use crate::error::{Error, Result};
use crate::ops::{Heads, KvLayer, RopeTable, RowCopy, Span};
use crate::tensor::Tensor;

fn missing<T>(op: &str) -> Result<T> {
    Err(Error::Unsupported(format!("{op} has no kernel yet")))
}

impl Cuda {
    /// [`Ops::silu_mul`](crate::ops::Ops::silu_mul)
    pub(super) fn silu_mul(&self, _y: &mut Tensor, _gate_up: &Tensor) -> Result<()> {
        missing("silu_mul")
    }

    /// [`Ops::embed`](crate::ops::Ops::embed)
    pub(super) fn embed(&self, _y: &mut Tensor, _table: &Tensor, _ids: &[u32]) -> Result<()> {
        missing("embed")
    }

    /// [`Ops::patchify`](crate::ops::Ops::patchify)
    pub(super) fn patchify(&self, _y: &mut Tensor, _pixels: &Tensor, _patch_size: usize) -> Result<()> {
        missing("patchify")
    }

    /// [`Ops::clip_embed`](crate::ops::Ops::clip_embed)
    pub(super) fn clip_embed(&self, _y: &mut Tensor, _patches: &Tensor, _class: &Tensor, _positions: &Tensor) -> Result<()> {
        missing("clip_embed")
    }

    /// [`Ops::rope_append`](crate::ops::Ops::rope_append)
    pub(super) fn rope_append(
        &self,
        _qkv: &mut Tensor,
        _kv: &mut KvLayer,
        _rope: &RopeTable,
        _spans: &[Span<'_>],
        _heads: Heads,
    ) -> Result<()> {
        missing("rope_append")
    }

    /// [`Ops::copy_rows`](crate::ops::Ops::copy_rows)
    pub(super) fn copy_rows(&self, _dst: &mut Tensor, _src: &Tensor, _copies: &[RowCopy]) -> Result<()> {
        missing("copy_rows")
    }
}
