//! [`Checked`]: a device whose every op is done again by a reference, for finding the first that differs.
//!
//! Operands are brought to the host before an op runs, the reference computes from those, and both results are compared. Nothing of the
//! reference is carried on to the next op, so an op is judged alone. It is slow: weights travel with every op.

use std::fmt::Display;
use std::ops::Range;
use std::sync::Arc;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::image::{Preprocess, RgbImage};
use crate::ops::{Draw, Epilogue, Heads, KvLayer, KvSource, Matrix, Ops, Peaks, RopeTable, RowCopy, Span, Weight};
use crate::tensor::Tensor;

/// A device that is checked against another, which computes in f32 on the host.
pub struct Checked {
    reference: Box<dyn Ops>,
    device: Box<dyn Ops>,
}

impl Checked {
    /// Compares every op of `device` with that of `reference`.
    pub fn new(reference: Box<dyn Ops>, device: Box<dyn Ops>) -> Self {
        Self { reference, device }
    }

    /// A tensor of the device as f32 on the host.
    fn host(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(Tensor::from_slice(tensor.shape(), &self.device.download(tensor)?))
    }

    fn host_kv(&self, kv: &KvLayer) -> Result<KvLayer> {
        Ok(KvLayer { k: self.host(&kv.k)?, v: self.host(&kv.v)? })
    }

    fn host_weight(&self, w: &Weight) -> Result<Weight> {
        let parts = w.parts.iter().map(|part| {
            Ok(match part {
                Matrix::Dense(tensor) => Matrix::Dense(Arc::new(self.host(tensor)?)),
                Matrix::Packed(packed) => Matrix::Packed(Arc::new(packed.map(|t| self.device.to_host(t))?)),
            })
        });
        Ok(Weight { parts: parts.collect::<Result<_>>()?, first_col: w.first_col })
    }

    /// Stops at a result that is off by more than rounding explains: a share of the largest value that depends on the dtype.
    fn compare(&self, op: &'static str, what: &str, got: &Tensor, expected: &Tensor) -> Result<()> {
        // The operands are the same, rounded as the device holds them; what is left is the rounding of results and the order of sums.
        let allowed = match got.dtype() {
            DType::F32 => 1e-4,
            DType::F16 => 4e-3,
            DType::Bf16 => 3e-2,
            DType::I32 => 0.0,
        };
        let (values, expected) = (self.device.download(got)?, expected.to_f32());
        let largest = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
        let limit = allowed * largest.max(1e-3);
        let bad = values.iter().zip(&expected).position(|(g, e)| {
            let off = (g - e).abs();
            off > limit || off.is_nan()
        });
        bad.map_or(Ok(()), |i| Err(self.differs(op, what, got, i, values[i], format!("{} within {limit}", expected[i]))))
    }

    /// Stops at an integer that is another.
    fn compare_i32(&self, op: &'static str, what: &str, got: &Tensor, expected: &Tensor) -> Result<()> {
        let (values, expected) = (self.device.download_i32(got)?, expected.as_slice::<i32>());
        let bad = values.iter().zip(expected).position(|(g, e)| g != e);
        bad.map_or(Ok(()), |i| Err(self.differs(op, what, got, i, values[i], expected[i])))
    }

    /// The error of element `i`.
    fn differs(&self, op: &str, what: &str, got: &Tensor, i: usize, value: impl Display, expected: impl Display) -> Error {
        let reference = self.reference.name();
        Error::device(
            op,
            format!("{what} {got:?} differs from the reference ({reference}): element {i} is {value}, expected {expected}"),
        )
    }
}

impl Ops for Checked {
    fn name(&self) -> String {
        format!("{}, checked against {}", self.device.name(), self.reference.name())
    }

    fn activation_dtype(&self) -> DType {
        self.device.activation_dtype()
    }

    fn weight_dtype(&self) -> Option<DType> {
        self.device.weight_dtype()
    }

    fn measure_peaks(&self) -> Result<Peaks> {
        self.device.measure_peaks()
    }

    fn alloc(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        self.device.alloc(shape, dtype)
    }

    fn upload(&self, tensor: Tensor) -> Result<Tensor> {
        self.device.upload(tensor)
    }

    fn to_host(&self, tensor: &Tensor) -> Result<Tensor> {
        self.device.to_host(tensor)
    }

    fn linear(&self, y: &mut Tensor, x: &Tensor, w: &Weight, bias: Option<&Tensor>, epilogue: Epilogue) -> Result<()> {
        let (mut expected, hx, hw) = (self.host(y)?, self.host(x)?, self.host_weight(w)?);
        let bias_host = bias.map(|b| self.host(b)).transpose()?;
        self.reference.linear(&mut expected, &hx, &hw, bias_host.as_ref(), epilogue)?;
        self.device.linear(y, x, w, bias, epilogue)?;
        self.compare("linear", "y", y, &expected)
    }

    fn rms_norm(&self, y: &mut Tensor, x: &Tensor, w: &Tensor, eps: f32) -> Result<()> {
        let mut expected = self.host(y)?;
        self.reference.rms_norm(&mut expected, &self.host(x)?, &self.host(w)?, eps)?;
        self.device.rms_norm(y, x, w, eps)?;
        self.compare("rms_norm", "y", y, &expected)
    }

    fn layer_norm(&self, y: &mut Tensor, x: &Tensor, w: &Tensor, b: &Tensor, eps: f32) -> Result<()> {
        let mut expected = self.host(y)?;
        self.reference.layer_norm(&mut expected, &self.host(x)?, &self.host(w)?, &self.host(b)?, eps)?;
        self.device.layer_norm(y, x, w, b, eps)?;
        self.compare("layer_norm", "y", y, &expected)
    }

    fn silu_mul(&self, y: &mut Tensor, gate_up: &Tensor) -> Result<()> {
        let mut expected = self.host(y)?;
        self.reference.silu_mul(&mut expected, &self.host(gate_up)?)?;
        self.device.silu_mul(y, gate_up)?;
        self.compare("silu_mul", "y", y, &expected)
    }

    fn embed(&self, y: &mut Tensor, table: &Tensor, ids: &[u32]) -> Result<()> {
        let mut expected = self.host(y)?;
        self.reference.embed(&mut expected, &self.host(table)?, ids)?;
        self.device.embed(y, table, ids)?;
        self.compare("embed", "y", y, &expected)
    }

    fn preprocess(&self, pixels: &mut Tensor, images: &[RgbImage], config: &Preprocess) -> Result<()> {
        let mut expected = self.host(pixels)?;
        self.reference.preprocess(&mut expected, images, config)?;
        self.device.preprocess(pixels, images, config)?;
        self.compare("preprocess", "pixels", pixels, &expected)
    }

    fn patchify(&self, y: &mut Tensor, pixels: &Tensor, images: Range<usize>, patch_size: usize) -> Result<()> {
        let mut expected = self.host(y)?;
        self.reference.patchify(&mut expected, &self.host(pixels)?, images.clone(), patch_size)?;
        self.device.patchify(y, pixels, images, patch_size)?;
        self.compare("patchify", "y", y, &expected)
    }

    fn clip_embed(&self, y: &mut Tensor, patches: &Tensor, class: &Tensor, positions: &Tensor) -> Result<()> {
        let mut expected = self.host(y)?;
        self.reference.clip_embed(&mut expected, &self.host(patches)?, &self.host(class)?, &self.host(positions)?)?;
        self.device.clip_embed(y, patches, class, positions)?;
        self.compare("clip_embed", "y", y, &expected)
    }

    fn rope_append(&self, qkv: &mut Tensor, kv: &mut KvLayer, rope: &RopeTable, spans: &[Span<'_>], heads: Heads) -> Result<()> {
        let (mut expected, mut expected_kv) = (self.host(qkv)?, self.host_kv(kv)?);
        let table = RopeTable { cos: self.host(&rope.cos)?, sin: self.host(&rope.sin)? };
        self.reference.rope_append(&mut expected, &mut expected_kv, &table, spans, heads)?;
        self.device.rope_append(qkv, kv, rope, spans, heads)?;
        self.compare("rope_append", "qkv", qkv, &expected)?;
        self.compare("rope_append", "key cache", &kv.k, &expected_kv.k)?;
        self.compare("rope_append", "value cache", &kv.v, &expected_kv.v)
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
        let (mut expected, host_qkv) = (self.host(out)?, self.host(qkv)?);
        let layer = match kv {
            KvSource::Own => None,
            KvSource::Paged(layer) => Some(self.host_kv(layer)?),
        };
        let source = layer.as_ref().map_or(KvSource::Own, KvSource::Paged);
        self.reference.attention(&mut expected, &host_qkv, source, spans, heads, causal)?;
        self.device.attention(out, qkv, kv, spans, heads, causal)?;
        self.compare("attention", "out", out, &expected)
    }

    fn copy_rows(&self, dst: &mut Tensor, src: &Tensor, copies: &[RowCopy]) -> Result<()> {
        let mut expected = self.host(dst)?;
        self.reference.copy_rows(&mut expected, &self.host(src)?, copies)?;
        self.device.copy_rows(dst, src, copies)?;
        self.compare("copy_rows", "dst", dst, &expected)
    }

    fn sample(&self, ids: &mut Tensor, logits: &Tensor, seen: &mut Tensor, draws: &[Draw]) -> Result<()> {
        let (mut expected, mut expected_seen) = (self.device.to_host(ids)?, self.device.to_host(seen)?);
        self.reference.sample(&mut expected, &self.host(logits)?, &mut expected_seen, draws)?;
        self.device.sample(ids, logits, seen, draws)?;
        self.compare_i32("sample", "ids", ids, &expected)?;
        self.compare_i32("sample", "seen", seen, &expected_seen)
    }
}
