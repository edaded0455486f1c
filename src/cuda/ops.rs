//! [`Ops`] for [`Cuda`]: where each op is.

use std::ops::Range;

use super::Cuda;
use crate::dtype::DType;
use crate::error::Result;
use crate::image::{Preprocess, RgbImage};
use crate::ops::{Draw, Epilogue, Heads, KvLayer, KvSource, Matrix, Ops, Peaks, RopeTable, RowCopy, Span, Weight};
use crate::tensor::Tensor;

impl Ops for Cuda {
    fn name(&self) -> String {
        format!("{}, {}", self.driver.name(), self.dtype)
    }

    fn activation_dtype(&self) -> DType {
        self.dtype
    }

    fn weight_dtype(&self) -> Option<DType> {
        Some(self.dtype)
    }

    fn measure_peaks(&self) -> Result<Peaks> {
        self.peaks()
    }

    fn alloc(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        self.zeros(shape, dtype)
    }

    fn upload(&self, tensor: Tensor) -> Result<Tensor> {
        self.to_device(tensor)
    }

    fn to_host(&self, tensor: &Tensor) -> Result<Tensor> {
        self.to_host(tensor)
    }

    fn linear(&self, y: &mut Tensor, x: &Tensor, w: &Weight, bias: Option<&Tensor>, epilogue: Epilogue) -> Result<()> {
        self.linear(y, x, w, bias, epilogue)
    }

    fn rms_norm(&self, y: &mut Tensor, x: &Tensor, w: &Tensor, eps: f32) -> Result<()> {
        self.rms_norm(y, x, w, eps)
    }

    fn layer_norm(&self, y: &mut Tensor, x: &Tensor, w: &Tensor, b: &Tensor, eps: f32) -> Result<()> {
        self.layer_norm(y, x, w, b, eps)
    }

    fn silu_mul(&self, y: &mut Tensor, gate_up: &Tensor) -> Result<()> {
        self.silu_mul(y, gate_up)
    }

    fn embed(&self, y: &mut Tensor, table: &Matrix, ids: &[u32]) -> Result<()> {
        self.embed(y, table, ids)
    }

    fn preprocess(&self, pixels: &mut Tensor, images: &[RgbImage], config: &Preprocess) -> Result<()> {
        self.preprocess(pixels, images, config)
    }

    fn patchify(&self, y: &mut Tensor, pixels: &Tensor, images: Range<usize>, patch_size: usize) -> Result<()> {
        self.patchify(y, pixels, images, patch_size)
    }

    fn clip_embed(&self, y: &mut Tensor, patches: &Tensor, class: &Tensor, positions: &Tensor) -> Result<()> {
        self.clip_embed(y, patches, class, positions)
    }

    fn rope_append(&self, qkv: &mut Tensor, kv: &mut KvLayer, rope: &RopeTable, spans: &[Span<'_>], heads: Heads) -> Result<()> {
        self.rope_append(qkv, kv, rope, spans, heads)
    }

    fn attention(
        &self,
        out: &mut Tensor,
        qkv: &Tensor,
        kv: KvSource<'_>,
        spans: &[Span<'_>],
        heads: Heads,
        causal: bool,
    ) -> Result<()> {
        self.attention(out, qkv, kv, spans, heads, causal)
    }

    fn copy_rows(&self, dst: &mut Tensor, src: &Tensor, copies: &[RowCopy]) -> Result<()> {
        self.copy_rows(dst, src, copies)
    }

    fn sample(&self, ids: &mut Tensor, logits: &Tensor, seen: &mut Tensor, draws: &[Draw]) -> Result<()> {
        self.sample(ids, logits, seen, draws)
    }
}
