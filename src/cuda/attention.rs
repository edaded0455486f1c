//! Launches of `kernels/attention.cu` and `kernels/attention_decode.cu`.

use super::Cuda;
use crate::error::{Error, Result};
use crate::ops::{Heads, KvSource, Span};
use crate::tensor::Tensor;

impl Cuda {
    /// [`Ops::attention`](crate::ops::Ops::attention)
    pub(super) fn attention(
        &self,
        _out: &mut Tensor,
        _qkv: &Tensor,
        _kv: KvSource<'_>,
        _spans: &[Span<'_>],
        _heads: Heads,
        _causal: bool,
    ) -> Result<()> {
        Err(Error::Unsupported("attention has no kernel yet".into()))
    }
}
