//! The CPU backend: activations in f32, weights in whatever their file stores, kernels chosen once by what the processor has.

pub mod attention;
mod attention_blocks;
mod attention_decode;
mod elementwise;
pub mod matmul;
mod matmul_gemm;
mod matmul_gemv;
mod norm;
pub mod pool;
pub mod probe;
mod rope;
mod scratch;
// One contract holds for all wrapped instructions and stands at the trait; coefficients are written as they were fitted.
#[allow(clippy::missing_safety_doc, clippy::excessive_precision)]
pub mod simd;
mod tile;

#[cfg(test)]
mod attention_tests;
#[cfg(test)]
mod matmul_tests;
#[cfg(test)]
#[path = "../../tests/reference/mod.rs"]
mod reference;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::{Epilogue, Heads, KvLayer, KvSource, Ops, RopeTable, RowCopy, Span, Weight};
use crate::tensor::Tensor;
use pool::Pool;
use simd::Isa;

/// The processor, as a device.
pub struct Cpu {
    pool: Pool,
    isa: Isa,
}

impl Cpu {
    /// `n_threads` threads (0: as many as the machine runs at once), computing for weights of `compute`.
    ///
    /// bf16 products, where the processor has them, round activations to bf16; they are used only if `compute` says so.
    pub fn new(n_threads: usize, compute: DType) -> Result<Self> {
        let n_threads = match n_threads {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
            n => n,
        };
        let isa = Isa::from_env()?;
        let isa = if isa == Isa::Avx512Bf16 && compute != DType::Bf16 { Isa::Avx512 } else { isa };
        Ok(Self { pool: Pool::new(n_threads), isa })
    }

    /// Threads that share an op.
    pub fn n_threads(&self) -> usize {
        self.pool.n_threads()
    }
}

/// Refuses a tensor whose dtype the op has no code for.
fn expect_dtype(op: &'static str, what: &str, tensor: &Tensor, dtype: DType) -> Result<()> {
    if tensor.dtype() == dtype { Ok(()) } else { Err(Error::shape(op, format!("dtype of {what}"), dtype, tensor.dtype())) }
}

/// Refuses spans that leave the batch, or whose pages do not hold them.
fn check_spans(op: &'static str, spans: &[Span<'_>], tokens: usize, kv: Option<&KvLayer>) -> Result<()> {
    for span in spans {
        if span.first_row + span.n_rows > tokens {
            return Err(Error::shape(op, "rows of a span", format!("within {tokens}"), span));
        }
        let Some(kv) = kv else { continue };
        if span.pages.len() * kv.page_tokens() < span.past + span.n_rows {
            return Err(Error::shape(
                op,
                "pages of a span",
                format!("at least {} tokens", span.past + span.n_rows),
                span.pages.len(),
            ));
        }
        if let Some(&page) = span.pages.iter().find(|&&p| p as usize >= kv.k.rows()) {
            return Err(Error::shape(op, "page", format!("below {}", kv.k.rows()), page));
        }
    }
    Ok(())
}

fn check_kv(op: &'static str, kv: &KvLayer, heads: Heads) -> Result<()> {
    let expected = [kv.k.rows(), heads.n_kv_heads, kv.k.shape().get(2).copied().unwrap_or(0), heads.head_dim];
    kv.k.expect(op, "key cache", &expected)?;
    kv.v.expect(op, "value cache", &expected)?;
    expect_dtype(op, "value cache", &kv.v, kv.k.dtype())
}

impl Ops for Cpu {
    fn name(&self) -> String {
        format!("cpu ({}, {} threads)", self.isa, self.pool.n_threads())
    }

    fn activation_dtype(&self) -> DType {
        DType::F32
    }

    fn alloc(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        Ok(Tensor::zeros(shape, dtype))
    }

    fn upload(&self, tensor: Tensor) -> Result<Tensor> {
        Ok(tensor)
    }

    fn download(&self, tensor: &Tensor) -> Result<Vec<f32>> {
        Ok(tensor.to_f32())
    }

    fn linear(&self, y: &mut Tensor, x: &Tensor, w: &Weight, bias: Option<&Tensor>, epilogue: Epilogue) -> Result<()> {
        let [tokens, k] = x.dims2("linear", "x")?;
        let [y_rows, y_stride] = y.dims2("linear", "y")?;
        if k != w.k() {
            return Err(Error::shape("linear", "width of x", w.k(), k));
        }
        if y_rows != tokens || y_stride < w.first_col + w.n() {
            return Err(Error::shape("linear", "y", (tokens, w.first_col + w.n()), (y_rows, y_stride)));
        }
        if let Some(bias) = bias {
            bias.expect("linear", "bias", &[w.n()])?;
            expect_dtype("linear", "bias", bias, DType::F32)?;
        }
        expect_dtype("linear", "x", x, DType::F32)?;
        expect_dtype("linear", "y", y, DType::F32)?;
        let bias = bias.map(|b| b.as_slice::<f32>());
        matmul::linear(self.isa, &self.pool, y.as_mut_slice(), y_stride, x.as_slice(), tokens, w, bias, epilogue);
        Ok(())
    }

    fn rms_norm(&self, y: &mut Tensor, x: &Tensor, w: &Tensor, eps: f32) -> Result<()> {
        let [_, hidden] = x.dims2("rms_norm", "x")?;
        y.expect("rms_norm", "y", x.shape())?;
        w.expect("rms_norm", "w", &[hidden])?;
        expect_dtype("rms_norm", "w", w, DType::F32)?;
        norm::rms_norm(&self.pool, y.as_mut_slice(), x.as_slice(), w.as_slice(), eps);
        Ok(())
    }

    fn layer_norm(&self, y: &mut Tensor, x: &Tensor, w: &Tensor, b: &Tensor, eps: f32) -> Result<()> {
        let [_, hidden] = x.dims2("layer_norm", "x")?;
        y.expect("layer_norm", "y", x.shape())?;
        for (what, t) in [("w", w), ("b", b)] {
            t.expect("layer_norm", what, &[hidden])?;
            expect_dtype("layer_norm", what, t, DType::F32)?;
        }
        norm::layer_norm(&self.pool, y.as_mut_slice(), x.as_slice(), w.as_slice(), b.as_slice(), eps);
        Ok(())
    }

    fn silu_mul(&self, y: &mut Tensor, gate_up: &Tensor) -> Result<()> {
        let [tokens, n] = y.dims2("silu_mul", "y")?;
        gate_up.expect("silu_mul", "gate_up", &[tokens, 2 * n])?;
        elementwise::silu_mul(self.isa, &self.pool, y.as_mut_slice(), gate_up.as_slice(), n);
        Ok(())
    }

    fn embed(&self, y: &mut Tensor, table: &Tensor, ids: &[u32]) -> Result<()> {
        let [vocab, hidden] = table.dims2("embed", "table")?;
        y.expect("embed", "y", &[ids.len(), hidden])?;
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::shape("embed", "token id", format!("below {vocab}"), id));
        }
        elementwise::embed(y.as_mut_slice(), table, ids);
        Ok(())
    }

    fn patchify(&self, y: &mut Tensor, pixels: &Tensor, patch_size: usize) -> Result<()> {
        let &[images, 3, height, width] = pixels.shape() else {
            return Err(Error::shape("patchify", "pixels", "[images, 3, h, w]", pixels.shape()));
        };
        if patch_size == 0 || height % patch_size != 0 || width % patch_size != 0 {
            return Err(Error::shape("patchify", "pixels", format!("a multiple of {patch_size}"), pixels.shape()));
        }
        let n_patches = (height / patch_size) * (width / patch_size);
        y.expect("patchify", "y", &[images * n_patches, 3 * patch_size * patch_size])?;
        elementwise::patchify(y.as_mut_slice(), pixels.as_slice(), [images, height, width], patch_size);
        Ok(())
    }

    fn clip_embed(&self, y: &mut Tensor, patches: &Tensor, class: &Tensor, positions: &Tensor) -> Result<()> {
        let [n_positions, hidden] = positions.dims2("clip_embed", "positions")?;
        class.expect("clip_embed", "class", &[hidden])?;
        let [rows, width] = patches.dims2("clip_embed", "patches")?;
        if n_positions < 2 || rows % (n_positions - 1) != 0 || width != hidden {
            return Err(Error::shape(
                "clip_embed",
                "patches",
                format!("[images * {}, {hidden}]", n_positions.max(1) - 1),
                (rows, width),
            ));
        }
        y.expect("clip_embed", "y", &[rows / (n_positions - 1) * n_positions, hidden])?;
        expect_dtype("clip_embed", "class", class, DType::F32)?;
        expect_dtype("clip_embed", "positions", positions, DType::F32)?;
        elementwise::clip_embed(y.as_mut_slice(), patches.as_slice(), class.as_slice(), positions.as_slice());
        Ok(())
    }

    fn rope_append(&self, qkv: &mut Tensor, kv: &mut KvLayer, rope: &RopeTable, spans: &[Span<'_>], heads: Heads) -> Result<()> {
        let [tokens, width] = qkv.dims2("rope_append", "qkv")?;
        if width != heads.qkv_width() {
            return Err(Error::shape("rope_append", "width of qkv", heads.qkv_width(), width));
        }
        check_kv("rope_append", kv, heads)?;
        check_spans("rope_append", spans, tokens, Some(kv))?;
        let [positions, half] = rope.cos.dims2("rope_append", "cos")?;
        rope.sin.expect("rope_append", "sin", &[positions, half])?;
        let last = spans.iter().map(|s| s.past + s.n_rows).max().unwrap_or(0);
        if half * 2 != heads.head_dim || positions < last {
            return Err(Error::shape("rope_append", "cos", (last, heads.head_dim / 2), (positions, half)));
        }
        rope::rope_append(&self.pool, qkv.as_mut_slice(), kv, rope, spans, heads);
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
        let [tokens, width] = qkv.dims2("attention", "qkv")?;
        if width != heads.qkv_width() || heads.n_heads % heads.n_kv_heads != 0 {
            return Err(Error::shape("attention", "width of qkv", heads, width));
        }
        out.expect("attention", "out", &[tokens, heads.q_width()])?;
        if let KvSource::Paged(layer) = kv {
            check_kv("attention", layer, heads)?;
            check_spans("attention", spans, tokens, Some(layer))?;
        } else {
            check_spans("attention", spans, tokens, None)?;
        }
        attention::attention(self.isa, &self.pool, out.as_mut_slice(), qkv.as_slice(), kv, spans, heads, causal);
        Ok(())
    }

    fn copy_rows(&self, dst: &mut Tensor, src: &Tensor, copies: &[RowCopy]) -> Result<()> {
        if dst.row_len() != src.row_len() || dst.dtype() != src.dtype() {
            return Err(Error::shape("copy_rows", "rows of src", &*dst, src));
        }
        if let Some(copy) = copies.iter().find(|c| c.dst + c.n_rows > dst.rows() || c.src + c.n_rows > src.rows()) {
            return Err(Error::shape("copy_rows", "rows", format!("within {} and {}", dst.rows(), src.rows()), copy));
        }
        expect_dtype("copy_rows", "dst", dst, DType::F32)?;
        elementwise::copy_rows(dst, src, copies);
        Ok(())
    }
}

/// What this machine can do, measured.
#[derive(Clone, Copy, Debug)]
pub struct Peaks {
    /// Memory read by all threads at once, in GB/s.
    pub read_gbps: f64,
    /// f32 fused multiply-adds on registers by all threads, in GFLOP/s.
    pub gflops: f64,
    /// bf16 dot products on registers by all threads, in GFLOP/s, where the processor has them.
    pub bf16_gflops: Option<f64>,
}

impl Peaks {
    /// Measures with `n_threads` threads (0: as many as the machine runs at once). Takes about a second.
    pub fn measure(n_threads: usize) -> Self {
        let pool = Pool::new(if n_threads == 0 { std::thread::available_parallelism().map_or(1, |n| n.get()) } else { n_threads });
        let isa = Isa::detect();
        Self {
            read_gbps: probe::read_gbps(&pool, 1 << 30),
            gflops: probe::fma_gflops(isa, &pool),
            bf16_gflops: probe::dpbf16_gflops(isa, &pool),
        }
    }
}
