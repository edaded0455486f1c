//! [`Profiled`]: stands in front of a device and keeps what each op costs.

mod grad;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::dtype::DType;
use crate::error::Result;
use crate::image::{Preprocess, RgbImage};
use crate::ops::{Draw, Epilogue, Heads, KvLayer, KvSource, Matrix, Ops, Peaks, RopeTable, RowCopy, Span, Weight};
use crate::tensor::Tensor;

/// What one op has cost, over all its calls.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct OpRecord {
    /// Calls.
    pub calls: usize,
    /// Wall-clock time in ms.
    pub ms: f64,
    /// Bytes that the op must move at least: each operand once.
    pub bytes: f64,
    /// Those of them that are weights or cached keys and values: no processor keeps them from step to step, they come from memory.
    pub stored_bytes: f64,
    /// Arithmetic operations, a fused multiply-add counted as two.
    pub flops: f64,
    /// Those of them that are products with packed weights.
    pub packed_flops: f64,
}

/// What one call is, in the units of [`OpRecord`].
#[derive(Clone, Copy, Default)]
struct Work {
    bytes: usize,
    stored_bytes: usize,
    flops: usize,
    packed_flops: usize,
}

impl OpRecord {
    /// Bytes moved in GB/s.
    pub fn gbps(&self) -> f64 {
        self.bytes / self.ms / 1e6
    }

    /// Arithmetic in GFLOP/s.
    pub fn gflops(&self) -> f64 {
        self.flops / self.ms / 1e6
    }

    /// The least time in ms that its arithmetic takes at such peaks, of a model whose dense matrices are stored in `dtype`.
    pub fn arithmetic_ms(&self, peaks: &Peaks, dtype: DType) -> Option<f64> {
        let dense = (self.flops - self.packed_flops) / peaks.limit_gflops(dtype)?;
        Some((dense + self.packed_flops / peaks.limit_packed_gflops(dtype)?) / 1e6)
    }

    /// The sum of all `records`, as one.
    pub fn sum(records: impl IntoIterator<Item = Self>) -> Self {
        records.into_iter().fold(Self::default(), |a, b| a.zip_with(b, |a, b| a + b))
    }

    /// What came to it since `before`.
    pub fn since(self, before: Self) -> Self {
        self.zip_with(before, |a, b| a - b)
    }

    fn zip_with(self, other: Self, f: impl Fn(f64, f64) -> f64) -> Self {
        Self {
            calls: f(self.calls as f64, other.calls as f64) as usize,
            ms: f(self.ms, other.ms),
            bytes: f(self.bytes, other.bytes),
            stored_bytes: f(self.stored_bytes, other.stored_bytes),
            flops: f(self.flops, other.flops),
            packed_flops: f(self.packed_flops, other.packed_flops),
        }
    }
}

/// Costs by op.
#[derive(Debug, Default)]
pub struct Records(Mutex<BTreeMap<&'static str, OpRecord>>);

impl Records {
    fn add(&self, op: &'static str, seconds: f64, work: Work) {
        // Sums stay sums whatever panicked elsewhere.
        let mut records = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let record = records.entry(op).or_default();
        record.calls += 1;
        record.ms += seconds * 1e3;
        record.bytes += work.bytes as f64;
        record.stored_bytes += work.stored_bytes as f64;
        record.flops += work.flops as f64;
        record.packed_flops += work.packed_flops as f64;
    }

    /// The records so far, the costliest first.
    pub fn snapshot(&self) -> Vec<(&'static str, OpRecord)> {
        let records = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut all: Vec<_> = records.iter().map(|(op, record)| (*op, *record)).collect();
        all.sort_by(|a, b| b.1.ms.total_cmp(&a.1.ms));
        all
    }
}

/// A device whose ops are timed; of training, a `Profiled<dyn GradOps>`.
pub struct Profiled<D: ?Sized = dyn Ops> {
    inner: Box<D>,
    records: Arc<Records>,
}

impl<D: Ops + ?Sized> Profiled<D> {
    /// Times the ops of `inner`.
    pub fn new(inner: Box<D>) -> Self {
        Self { inner, records: Arc::default() }
    }

    /// Where the costs are kept.
    pub fn records(&self) -> Arc<Records> {
        self.records.clone()
    }

    fn timed<R>(&self, op: &'static str, work: Work, run: impl FnOnce(&D) -> Result<R>) -> Result<R> {
        let start = Instant::now();
        let result = run(&*self.inner);
        self.records.add(op, start.elapsed().as_secs_f64(), work);
        result
    }
}

/// Pairs of a row and a token that it sees.
fn pairs(spans: &[Span<'_>], causal: bool) -> usize {
    // Row r sees past + r + 1 tokens if causal: the sum of an arithmetic series.
    spans.iter().map(|s| s.n_rows * (s.past + if causal { s.n_rows.div_ceil(2) } else { s.n_rows })).sum()
}

impl<D: Ops + ?Sized> Ops for Profiled<D> {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn activation_dtype(&self) -> DType {
        self.inner.activation_dtype()
    }

    fn weight_dtype(&self) -> Option<DType> {
        self.inner.weight_dtype()
    }

    fn measure_peaks(&self) -> Result<Peaks> {
        self.inner.measure_peaks()
    }

    fn alloc(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        self.inner.alloc(shape, dtype)
    }

    fn upload(&self, tensor: Tensor) -> Result<Tensor> {
        self.inner.upload(tensor)
    }

    fn to_host(&self, tensor: &Tensor) -> Result<Tensor> {
        self.inner.to_host(tensor)
    }

    fn linear(&self, y: &mut Tensor, x: &Tensor, w: &Weight, bias: Option<&Tensor>, epilogue: Epilogue) -> Result<()> {
        let tokens = x.rows();
        let outputs = tokens * w.n() * y.dtype().size() * if epilogue == Epilogue::Add { 2 } else { 1 };
        // One row is bound by memory, many by arithmetic: two lines of the table.
        let op = if tokens == 1 { "linear (1 row)" } else { "linear" };
        let stored_bytes = w.bytes();
        let flops = |n: usize| 2 * tokens * n * w.k();
        let packed_rows = w.parts.iter().filter(|part| matches!(part, Matrix::Packed(_))).map(Matrix::n).sum();
        let bytes = stored_bytes + x.bytes() + outputs;
        let work = Work { bytes, stored_bytes, flops: flops(w.n()), packed_flops: flops(packed_rows) };
        self.timed(op, work, |ops| ops.linear(y, x, w, bias, epilogue))
    }

    fn rms_norm(&self, y: &mut Tensor, x: &Tensor, w: &Tensor, eps: f32) -> Result<()> {
        self.timed("rms_norm", Work { bytes: 2 * x.bytes(), flops: 4 * x.len(), ..Work::default() }, |ops| {
            ops.rms_norm(y, x, w, eps)
        })
    }

    fn layer_norm(&self, y: &mut Tensor, x: &Tensor, w: &Tensor, b: &Tensor, eps: f32) -> Result<()> {
        self.timed("layer_norm", Work { bytes: 2 * x.bytes(), flops: 7 * x.len(), ..Work::default() }, |ops| {
            ops.layer_norm(y, x, w, b, eps)
        })
    }

    fn silu_mul(&self, y: &mut Tensor, gate_up: &Tensor) -> Result<()> {
        self.timed("silu_mul", Work { bytes: gate_up.bytes() + y.bytes(), flops: 5 * y.len(), ..Work::default() }, |ops| {
            ops.silu_mul(y, gate_up)
        })
    }

    fn embed(&self, y: &mut Tensor, table: &Matrix, ids: &[u32]) -> Result<()> {
        let read = ids.len() * table.row_bytes();
        self.timed("embed", Work { bytes: read + y.bytes(), stored_bytes: read, ..Work::default() }, |ops| ops.embed(y, table, ids))
    }

    fn preprocess(&self, pixels: &mut Tensor, images: &[RgbImage], config: &Preprocess) -> Result<()> {
        let read: usize = images.iter().map(|image| image.pixels().len()).sum();
        let work = Work { bytes: read + pixels.bytes(), ..Work::default() };
        self.timed("preprocess", work, |ops| ops.preprocess(pixels, images, config))
    }

    fn patchify(&self, y: &mut Tensor, pixels: &Tensor, images: Range<usize>, patch_size: usize) -> Result<()> {
        let read = images.len() * pixels.row_len() * pixels.dtype().size();
        let work = Work { bytes: read + y.bytes(), ..Work::default() };
        self.timed("patchify", work, |ops| ops.patchify(y, pixels, images, patch_size))
    }

    fn clip_embed(&self, y: &mut Tensor, patches: &Tensor, class: &Tensor, positions: &Tensor) -> Result<()> {
        self.timed("clip_embed", Work { bytes: 2 * patches.bytes(), flops: patches.len(), ..Work::default() }, |ops| {
            ops.clip_embed(y, patches, class, positions)
        })
    }

    fn rope_append(&self, qkv: &mut Tensor, kv: &mut KvLayer, rope: &RopeTable, spans: &[Span<'_>], heads: Heads) -> Result<()> {
        let stored = 2 * qkv.rows() * heads.kv_width() * kv.k.dtype().size();
        let flops = 3 * qkv.rows() * (heads.q_width() + heads.kv_width());
        let work = Work { bytes: 2 * qkv.bytes() + stored, stored_bytes: stored, flops, ..Work::default() };
        self.timed("rope_append", work, |ops| ops.rope_append(qkv, kv, rope, spans, heads))
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
        let kv_size = match kv {
            KvSource::Own => qkv.dtype().size(),
            KvSource::Paged(layer) => layer.k.dtype().size(),
        };
        let context: usize = spans.iter().map(|s| s.past + s.n_rows).sum();
        let kv_bytes = 2 * context * heads.kv_width() * kv_size;
        let (op, stored_bytes) = match kv {
            KvSource::Own => ("attention (own)", 0),
            KvSource::Paged(_) => ("attention (paged)", kv_bytes),
        };
        let flops = 4 * pairs(spans, causal) * heads.q_width();
        let work = Work { bytes: kv_bytes + 2 * out.bytes(), stored_bytes, flops, ..Work::default() };
        self.timed(op, work, |ops| ops.attention(out, qkv, kv, spans, heads, causal))
    }

    fn copy_rows(&self, dst: &mut Tensor, src: &Tensor, copies: &[RowCopy]) -> Result<()> {
        let rows: usize = copies.iter().map(|c| c.n_rows).sum();
        let bytes = 2 * rows * src.row_len() * src.dtype().size();
        self.timed("copy_rows", Work { bytes, ..Work::default() }, |ops| ops.copy_rows(dst, src, copies))
    }

    fn sample(&self, ids: &mut Tensor, logits: &Tensor, seen: &mut Tensor, draws: &[Draw]) -> Result<()> {
        self.timed("sample", Work { bytes: logits.bytes() + seen.bytes(), ..Work::default() }, |ops| {
            ops.sample(ids, logits, seen, draws)
        })
    }
}
