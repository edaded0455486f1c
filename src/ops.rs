//! [`Ops`]: everything a device does for the model, as coarse operations on planned buffers.
//!
//! Outputs come first, then inputs, then scalars. Every tensor is contiguous and row-major; `tokens` counts rows of all sequences of
//! a batch, one after the other. Activations have the device's own dtype ([`Ops::activation_dtype`]), weights that of their file.
//! The trait is object-safe, so that decorators such as a profiler stand in front of any device.

pub mod check;
pub mod check_grad;
pub mod dropout;
pub mod grad;
pub mod kv;
pub mod packed;
mod peaks;
pub mod sample;

pub use grad::{Activation, AdamW, GradOps, Rotation, Update};
pub use kv::KvLayer;
pub use packed::Packed;
pub use sample::Draw;

use std::ops::Range;
use std::sync::Arc;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::image::{Preprocess, RgbImage};
use crate::tensor::Tensor;
pub use peaks::{ArithmeticPeak, Operands, Peaks};

/// Rows of one sequence within a batch.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    /// Its first row in the batch's tensors.
    pub first_row: usize,
    /// How many rows it has there.
    pub n_rows: usize,
    /// Tokens of it that are in the cache already: the position of its first row.
    pub past: usize,
    /// Its pages in the KV cache, in order; they hold at least `past + n_rows` tokens. Empty where no cache is used.
    pub pages: &'a [u32],
}

impl Span<'_> {
    /// `n` sequences of `n_rows` rows each, with nothing cached.
    pub fn uniform(n: usize, n_rows: usize) -> Vec<Span<'static>> {
        (0..n).map(|i| Span { first_row: i * n_rows, n_rows, past: 0, pages: &[] }).collect()
    }
}

/// Heads of an attention layer, and where they lie in a row of `qkv`:
/// `n_heads * head_dim` of queries, then `n_kv_heads * head_dim` of keys, then as much of values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; each serves `n_heads / n_kv_heads` query heads.
    pub n_kv_heads: usize,
    /// Width of a head; a multiple of 8.
    pub head_dim: usize,
}

impl Heads {
    /// Width of the queries, and of the attention's output.
    pub fn q_width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Width of the keys, and of the values.
    pub fn kv_width(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// Width of a row of `qkv`.
    pub fn qkv_width(&self) -> usize {
        self.q_width() + 2 * self.kv_width()
    }
}

/// Where attention reads keys and values.
#[derive(Clone, Copy, Debug)]
pub enum KvSource<'a> {
    /// In the same `qkv` rows as the queries: CLIP, and training.
    Own,
    /// In the pages that each [`Span`] names.
    Paged(&'a KvLayer),
}

/// A matrix `[n, k]` as it is stored.
#[derive(Clone, Debug)]
pub enum Matrix {
    /// Floating-point numbers.
    Dense(Arc<Tensor>),
    /// Integers with scales.
    Packed(Arc<Packed>),
}

impl Matrix {
    /// Rows: the width of the result.
    pub fn n(&self) -> usize {
        match self {
            Self::Dense(tensor) => tensor.rows(),
            Self::Packed(packed) => packed.n,
        }
    }

    /// Columns: the width of the input.
    pub fn k(&self) -> usize {
        match self {
            Self::Dense(tensor) => tensor.row_len(),
            Self::Packed(packed) => packed.k,
        }
    }

    /// Bytes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense(tensor) => tensor.bytes(),
            Self::Packed(packed) => packed.bytes(),
        }
    }

    /// Bytes of a row, of those that can be read by themselves.
    pub fn row_bytes(&self) -> usize {
        self.bytes().checked_div(self.n()).unwrap_or(0)
    }

    /// How its elements are stored, in a word: `bf16`, `int4`.
    pub fn storage(&self) -> String {
        match self {
            Self::Dense(tensor) => tensor.dtype().to_string(),
            Self::Packed(packed) => packed.format().to_string(),
        }
    }

    /// Whether one launch can take both.
    fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Dense(a), Self::Dense(b)) => a.dtype() == b.dtype(),
            (Self::Packed(a), Self::Packed(b)) => a.format() == b.format(),
            _ => false,
        }
    }
}

impl From<Tensor> for Matrix {
    fn from(tensor: Tensor) -> Self {
        Self::Dense(Arc::new(tensor))
    }
}

/// The matrix of a linear layer: parts `[n_i, k]` stacked along their rows, so that Q, K and V run as one without being copied together.
#[derive(Clone, Debug)]
pub struct Weight {
    /// The parts, top to bottom; all have the same `k`.
    pub parts: Vec<Matrix>,
    /// Column of the output where the first part's result goes.
    pub first_col: usize,
}

/// Parts of one kind, for a device to take together.
#[derive(Debug)]
pub enum Run<'a> {
    /// All of one dtype.
    Dense(Vec<&'a Tensor>),
    /// All of one format.
    Packed(Vec<&'a Packed>),
}

impl Weight {
    /// Dense parts stacked in this order.
    pub fn stacked(parts: Vec<Arc<Tensor>>) -> Result<Self> {
        for part in &parts {
            part.dims2("weight", "part")?;
        }
        Self::of(parts.into_iter().map(Matrix::Dense).collect())
    }

    /// Parts stacked in this order.
    pub fn of(parts: Vec<Matrix>) -> Result<Self> {
        let k = parts.first().ok_or_else(|| Error::shape("weight", "parts", "at least one", 0))?.k();
        match parts.iter().find(|part| part.k() != k) {
            Some(part) => Err(Error::shape("weight", "columns of a part", k, part.k())),
            None => Ok(Self { parts, first_col: 0 }),
        }
    }

    /// Rows of all parts: the width of the result.
    pub fn n(&self) -> usize {
        self.parts.iter().map(Matrix::n).sum()
    }

    /// Width of the input.
    pub fn k(&self) -> usize {
        self.parts[0].k()
    }

    /// Bytes of all parts.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(Matrix::bytes).sum()
    }

    /// A range of the parts; the result goes to the columns that it has in the whole.
    pub fn select(&self, range: std::ops::Range<usize>) -> Self {
        let first_col = self.first_col + self.parts[..range.start].iter().map(Matrix::n).sum::<usize>();
        Self { parts: self.parts[range].to_vec(), first_col }
    }

    /// The parts in runs of one kind, each with its first row in the whole.
    pub fn runs(&self) -> Vec<(usize, Run<'_>)> {
        let mut runs = Vec::new();
        let mut row = 0;
        for alike in self.parts.chunk_by(Matrix::is_like) {
            let dense = alike.iter().filter_map(|part| if let Matrix::Dense(tensor) = part { Some(&**tensor) } else { None });
            let packed = alike.iter().filter_map(|part| if let Matrix::Packed(packed) = part { Some(&**packed) } else { None });
            let run =
                if matches!(alike[0], Matrix::Dense(_)) { Run::Dense(dense.collect()) } else { Run::Packed(packed.collect()) };
            runs.push((row, run));
            row += alike.iter().map(Matrix::n).sum::<usize>();
        }
        runs
    }
}

/// What a matrix product does with its result `r = x·Wᵀ + bias`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epilogue {
    /// y = r
    Store,
    /// y += r: the residual stream.
    Add,
    /// y = r·σ(1.702 r)
    QuickGelu,
    /// y = r·Φ(r), with the exact erf
    Gelu,
}

/// `n_rows` rows copied from row `src` on to row `dst` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowCopy {
    /// First row written.
    pub dst: usize,
    /// First row read.
    pub src: usize,
    /// Rows copied.
    pub n_rows: usize,
}

/// A device's operations. All check their operands and say which one does not fit.
pub trait Ops: Send + Sync {
    /// What it runs on, for `info` and reports.
    fn name(&self) -> String;

    /// The dtype of activations.
    fn activation_dtype(&self) -> DType;

    /// The dtype that matrices and tables must be brought to; none if the device takes them as they are stored.
    fn weight_dtype(&self) -> Option<DType>;

    /// What the device can do at best, measured now, with whatever else runs beside it. Takes up to a second.
    fn measure_peaks(&self) -> Result<Peaks>;

    /// A zeroed buffer on the device.
    fn alloc(&self, shape: &[usize], dtype: DType) -> Result<Tensor>;

    /// Brings a host tensor to the device. On the CPU that is the tensor itself: mapped weights stay where they are.
    fn upload(&self, tensor: Tensor) -> Result<Tensor>;

    /// A copy of a device tensor on the host, in its own dtype.
    fn to_host(&self, tensor: &Tensor) -> Result<Tensor>;

    /// The elements of a device tensor as f32, when all that was asked for before is done.
    fn download(&self, tensor: &Tensor) -> Result<Vec<f32>> {
        Ok(self.to_host(tensor)?.to_f32())
    }

    /// The elements of a device tensor of integers.
    fn download_i32(&self, tensor: &Tensor) -> Result<Vec<i32>> {
        check::dtype("download", "tensor", tensor, DType::I32)?;
        Ok(self.to_host(tensor)?.as_slice().to_vec())
    }

    /// y\[:, c..c+n\] = epilogue(x·Wᵀ + bias), c = `w.first_col`
    ///
    /// x `[tokens, k]`, W `[n, k]`, bias f32 `[n]`, y `[tokens, >= c + n]`; the other columns of y stay as they are.
    /// Reads W once: `n·k` weights and `2·tokens·n·k` FLOPs.
    fn linear(&self, y: &mut Tensor, x: &Tensor, w: &Weight, bias: Option<&Tensor>, epilogue: Epilogue) -> Result<()>;

    /// y = x·w / sqrt(mean(x²) + eps), over rows: x, y `[tokens, hidden]`, w `[hidden]`. Sums in f32 or wider.
    fn rms_norm(&self, y: &mut Tensor, x: &Tensor, w: &Tensor, eps: f32) -> Result<()>;

    /// y = (x − mean(x))·w / sqrt(var(x) + eps) + b, over rows: x, y `[tokens, hidden]`, w, b `[hidden]`.
    fn layer_norm(&self, y: &mut Tensor, x: &Tensor, w: &Tensor, b: &Tensor, eps: f32) -> Result<()>;

    /// y = silu(gate) ⊙ up: gate_up `[tokens, 2·n]` (gate first), y `[tokens, n]`.
    fn silu_mul(&self, y: &mut Tensor, gate_up: &Tensor) -> Result<()>;

    /// y\[i\] = table\[ids\[i\]\]: table `[vocab, hidden]`, y `[ids.len(), hidden]`. Of a packed table, what its integers mean, rounded once.
    fn embed(&self, y: &mut Tensor, table: &Matrix, ids: &[u32]) -> Result<()>;

    /// Resizes, crops or pads, and normalises: host pictures of any size → pixels f32 `[images, 3, crop_size, crop_size]`, the same in
    /// every bit as [`image::preprocess`](crate::image::preprocess) makes them.
    fn preprocess(&self, pixels: &mut Tensor, images: &[RgbImage], config: &Preprocess) -> Result<()>;

    /// Cuts the pictures `images` of pixels f32 `[n, 3, h, w]` into patches: y `[images·(h/p)·(w/p), 3·p·p]`, a patch in (channel, row,
    /// column) order, as the weights of CLIP's convolution lie.
    fn patchify(&self, y: &mut Tensor, pixels: &Tensor, images: Range<usize>, patch_size: usize) -> Result<()>;

    /// CLIP's embeddings: y\[i·(1+p)\] = class + pos\[0\], y\[i·(1+p)+1+j\] = patches\[i·p+j\] + pos\[1+j\].
    ///
    /// patches `[images·p, hidden]`, class `[hidden]`, pos `[1+p, hidden]`, y `[images·(1+p), hidden]`.
    fn clip_embed(&self, y: &mut Tensor, patches: &Tensor, class: &Tensor, positions: &Tensor) -> Result<()>;

    /// Rotates the queries and keys of `qkv` in place and appends keys and values to the cache.
    ///
    /// Row r of a span stands at position `past + r`; pair (i, i + head_dim/2) of each head turns by the angle of `cos`, `sin`
    /// `[positions, head_dim/2]` f32 there (half-split pairs, as in HF checkpoints; Su et al., arXiv 2104.09864).
    fn rope_append(&self, qkv: &mut Tensor, kv: &mut KvLayer, rope: &RopeTable, spans: &[Span<'_>], heads: Heads) -> Result<()>;

    /// out = softmax(q·Kᵀ/√head_dim)·V for each head: q in qkv `[tokens, qkv_width]`, out `[tokens, q_width]`.
    ///
    /// Row r of a span sees the first `past + r + 1` tokens of its sequence if `causal`, else all `past + n_rows`.
    fn attention(
        &self,
        out: &mut Tensor,
        qkv: &Tensor,
        kv: KvSource<'_>,
        spans: &[Span<'_>],
        heads: Heads,
        causal: bool,
    ) -> Result<()>;

    /// Copies rows between tensors of one row length: splices image features, gathers last rows.
    fn copy_rows(&self, dst: &mut Tensor, src: &Tensor, copies: &[RowCopy]) -> Result<()>;

    /// ids\[r\] = the token drawn from row r of `logits` by `draws[r]`, the same on every device ([`sample`]); −1 if the row holds NaN.
    ///
    /// logits f32 `[rows, vocab]`, ids i32 `[rows]`, seen i32 `[rows, ⌈vocab/32⌉]`: bit i % 32 of word i / 32 tells whether token i has
    /// occurred; that of the token drawn is set. Reads logits a few times, more often with top-k and top-p.
    fn sample(&self, ids: &mut Tensor, logits: &Tensor, seen: &mut Tensor, draws: &[Draw]) -> Result<()>;
}

/// Cosines and sines of the rotary embedding, both `[positions, head_dim / 2]` f32.
#[derive(Debug)]
pub struct RopeTable {
    /// cos(position · frequency)
    pub cos: Tensor,
    /// sin(position · frequency)
    pub sin: Tensor,
}
