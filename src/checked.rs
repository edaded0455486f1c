//! [`Checked`]: a device whose every op is looked at when it is done, for finding the first that goes wrong: its results may be compared
//! with those of a reference, and searched for what is no finite number.
//!
//! For the reference, operands are brought to the host before an op runs, and it computes from those. Nothing of it is carried on to the
//! next op, so an op is judged alone. It is slow: weights travel with every op. Errors name the op, and the model adds the layer.

use std::fmt::Display;
use std::ops::Range;
use std::sync::Arc;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::image::{Preprocess, RgbImage};
use crate::ops::{Draw, Epilogue, Heads, KvLayer, KvSource, Matrix, Ops, Peaks, RopeTable, RowCopy, Span, Weight};
use crate::tensor::Tensor;

/// A device that is checked.
pub struct Checked {
    device: Box<dyn Ops>,
    reference: Option<Box<dyn Ops>>,
    finite: bool,
}

impl Checked {
    /// Checks every op of `device`: compares it with that of `reference`, which computes in f32 on the host, if there is one; refuses NaN and
    /// infinity, if all is to be `finite`.
    pub fn new(device: Box<dyn Ops>, reference: Option<Box<dyn Ops>>, finite: bool) -> Self {
        Self { device, reference, finite }
    }

    /// A tensor of the device as f32 on the host.
    fn host(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(Tensor::from_slice(tensor.shape(), &self.device.download(tensor)?))
    }

    fn host_kv(&self, kv: &KvLayer) -> Result<KvLayer> {
        Ok(kv.map(|t| self.device.to_host(t))?.to_f32())
    }

    fn host_weight(&self, w: &Weight) -> Result<Weight> {
        Ok(Weight { parts: w.parts.iter().map(|part| self.host_matrix(part)).collect::<Result<_>>()?, first_col: w.first_col })
    }

    fn host_matrix(&self, matrix: &Matrix) -> Result<Matrix> {
        Ok(match matrix {
            Matrix::Dense(tensor) => self.host(tensor)?.into(),
            Matrix::Packed(packed) => Matrix::Packed(Arc::new(packed.map(|t| self.device.to_host(t))?)),
        })
    }

    /// What `run` makes of a copy of `y` with the reference, if there is one.
    fn expect(&self, y: &Tensor, run: impl FnOnce(&dyn Ops, &mut Tensor) -> Result<()>) -> Result<Option<Tensor>> {
        let Some(reference) = &self.reference else { return Ok(None) };
        let mut expected = self.host(y)?;
        run(&**reference, &mut expected)?;
        Ok(Some(expected))
    }

    /// Looks at a result of `op`.
    fn check(&self, op: &'static str, what: &str, got: &Tensor, expected: Option<Tensor>) -> Result<()> {
        self.check_rows(op, what, got, expected, |_| true)
    }

    /// Looks at a result of `op`, which has written those rows that `is_written` says.
    fn check_rows(
        &self,
        op: &'static str,
        what: &str,
        got: &Tensor,
        expected: Option<Tensor>,
        is_written: impl Fn(usize) -> bool,
    ) -> Result<()> {
        // Launches are made when results are asked for: what goes wrong with them shows here.
        let values = self.device.download(got).map_err(|e| Error::check(op, e))?;
        if self.finite {
            let rows = values.chunks(got.row_len().max(1)).enumerate().filter(|(row, _)| is_written(*row));
            for (row, values) in rows {
                if let Some(column) = values.iter().position(|v| !v.is_finite()) {
                    let (shape, value) = (got.shape(), values[column]);
                    let problem = format!("output {what} {shape:?} has {value} at row {row}, column {column}");
                    return Err(Error::check(op, problem));
                }
            }
        }
        expected.map_or(Ok(()), |expected| self.compare(op, what, got, &values, &expected))
    }

    /// Stops at a result that is off by more than rounding explains: a share of the largest value that depends on the dtype.
    fn compare(&self, op: &'static str, what: &str, got: &Tensor, values: &[f32], expected: &Tensor) -> Result<()> {
        // The operands are the same, rounded as the device holds them; what is left is the rounding of results and the order of sums.
        let allowed = match got.dtype() {
            DType::F32 => 1e-4,
            DType::F16 => 4e-3,
            DType::Bf16 => 3e-2,
            // Of the cache: another rounding of what was nearly the same is a step of its scale off.
            DType::I8 => 1e-2,
            DType::I32 => 0.0,
        };
        let expected = expected.to_f32();
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
        let reference = self.reference.as_ref().map_or_else(String::new, |r| r.name());
        Error::check(
            op,
            format!("{what} {got:?} differs from the reference ({reference}): element {i} is {value}, expected {expected}"),
        )
    }
}

impl Ops for Checked {
    fn name(&self) -> String {
        let against = self.reference.as_ref().map(|r| format!(", checked against {}", r.name())).unwrap_or_default();
        self.device.name() + &against + if self.finite { ", checked for NaN" } else { "" }
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
        let expected = self.expect(y, |reference, expected| {
            let bias_host = bias.map(|b| self.host(b)).transpose()?;
            reference.linear(expected, &self.host(x)?, &self.host_weight(w)?, bias_host.as_ref(), epilogue)
        })?;
        self.device.linear(y, x, w, bias, epilogue)?;
        self.check("linear", "y", y, expected)
    }

    fn rms_norm(&self, y: &mut Tensor, x: &Tensor, w: &Tensor, eps: f32) -> Result<()> {
        let expected = self.expect(y, |reference, expected| reference.rms_norm(expected, &self.host(x)?, &self.host(w)?, eps))?;
        self.device.rms_norm(y, x, w, eps)?;
        self.check("rms_norm", "y", y, expected)
    }

    fn layer_norm(&self, y: &mut Tensor, x: &Tensor, w: &Tensor, b: &Tensor, eps: f32) -> Result<()> {
        let expected = self
            .expect(y, |reference, expected| reference.layer_norm(expected, &self.host(x)?, &self.host(w)?, &self.host(b)?, eps))?;
        self.device.layer_norm(y, x, w, b, eps)?;
        self.check("layer_norm", "y", y, expected)
    }

    fn silu_mul(&self, y: &mut Tensor, gate_up: &Tensor) -> Result<()> {
        let expected = self.expect(y, |reference, expected| reference.silu_mul(expected, &self.host(gate_up)?))?;
        self.device.silu_mul(y, gate_up)?;
        self.check("silu_mul", "y", y, expected)
    }

    fn embed(&self, y: &mut Tensor, table: &Matrix, ids: &[u32]) -> Result<()> {
        let expected = self.expect(y, |reference, expected| reference.embed(expected, &self.host_matrix(table)?, ids))?;
        self.device.embed(y, table, ids)?;
        self.check("embed", "y", y, expected)
    }

    fn preprocess(&self, pixels: &mut Tensor, images: &[RgbImage], config: &Preprocess) -> Result<()> {
        let expected = self.expect(pixels, |reference, expected| reference.preprocess(expected, images, config))?;
        self.device.preprocess(pixels, images, config)?;
        self.check("preprocess", "pixels", pixels, expected)
    }

    fn patchify(&self, y: &mut Tensor, pixels: &Tensor, images: Range<usize>, patch_size: usize) -> Result<()> {
        let expected =
            self.expect(y, |reference, expected| reference.patchify(expected, &self.host(pixels)?, images.clone(), patch_size))?;
        self.device.patchify(y, pixels, images, patch_size)?;
        self.check("patchify", "y", y, expected)
    }

    fn clip_embed(&self, y: &mut Tensor, patches: &Tensor, class: &Tensor, positions: &Tensor) -> Result<()> {
        let expected = self.expect(y, |reference, expected| {
            reference.clip_embed(expected, &self.host(patches)?, &self.host(class)?, &self.host(positions)?)
        })?;
        self.device.clip_embed(y, patches, class, positions)?;
        self.check("clip_embed", "y", y, expected)
    }

    fn rope_append(&self, qkv: &mut Tensor, kv: &mut KvLayer, rope: &RopeTable, spans: &[Span<'_>], heads: Heads) -> Result<()> {
        let mut expected_kv = None;
        let expected = self.expect(qkv, |reference, expected| {
            let table = RopeTable { cos: self.host(&rope.cos)?, sin: self.host(&rope.sin)? };
            reference.rope_append(expected, expected_kv.insert(self.host_kv(kv)?), &table, spans, heads)
        })?;
        self.device.rope_append(qkv, kv, rope, spans, heads)?;
        self.check("rope_append", "qkv", qkv, expected)?;
        // Only the reference knows which of the cache is whose: the rest holds what earlier sequences have left.
        if let Some(expected) = expected_kv {
            let got = self.host_kv(kv)?;
            self.compare("rope_append", "key cache", &kv.k, got.k.as_slice(), &expected.k)?;
            self.compare("rope_append", "value cache", &kv.v, got.v.as_slice(), &expected.v)?;
        }
        Ok(())
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
        let expected = self.expect(out, |reference, expected| {
            let layer = match kv {
                KvSource::Own => None,
                KvSource::Paged(layer) => Some(self.host_kv(layer)?),
            };
            let source = layer.as_ref().map_or(KvSource::Own, KvSource::Paged);
            reference.attention(expected, &self.host(qkv)?, source, spans, heads, causal)
        })?;
        self.device.attention(out, qkv, kv, spans, heads, causal)?;
        self.check("attention", "out", out, expected)
    }

    fn copy_rows(&self, dst: &mut Tensor, src: &Tensor, copies: &[RowCopy]) -> Result<()> {
        let expected = self.expect(dst, |reference, expected| reference.copy_rows(expected, &self.host(src)?, copies))?;
        self.device.copy_rows(dst, src, copies)?;
        // Other rows may hold what an earlier pass has left there.
        let is_written = |row| copies.iter().any(|c| (c.dst..c.dst + c.n_rows).contains(&row));
        self.check_rows("copy_rows", "dst", dst, expected, is_written)
    }

    fn sample(&self, ids: &mut Tensor, logits: &Tensor, seen: &mut Tensor, draws: &[Draw]) -> Result<()> {
        let Some(reference) = &self.reference else { return self.device.sample(ids, logits, seen, draws) };
        let (mut expected, mut expected_seen) = (self.device.to_host(ids)?, self.device.to_host(seen)?);
        reference.sample(&mut expected, &self.host(logits)?, &mut expected_seen, draws)?;
        self.device.sample(ids, logits, seen, draws)?;
        self.compare_i32("sample", "ids", ids, &expected)?;
        self.compare_i32("sample", "seen", seen, &expected_seen)
    }
}
