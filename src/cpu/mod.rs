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

use std::ops::Range;

use crate::dtype::DType;
use crate::error::Result;
use crate::image::{Preprocess, RgbImage, preprocess_into};
use crate::ops::{Epilogue, Heads, KvLayer, KvSource, Ops, RopeTable, RowCopy, Span, Weight, check};
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

impl Ops for Cpu {
    fn name(&self) -> String {
        format!("cpu ({}, {} threads)", self.isa, self.pool.n_threads())
    }

    fn activation_dtype(&self) -> DType {
        DType::F32
    }

    fn weight_dtype(&self) -> Option<DType> {
        None
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
        check::linear(y, x, w, bias)?;
        for (what, t) in [("x", Some(x)), ("y", Some(&*y)), ("bias", bias)] {
            t.map_or(Ok(()), |t| check::dtype("linear", what, t, DType::F32))?;
        }
        let (tokens, y_stride) = (x.rows(), y.row_len());
        let bias = bias.map(|b| b.as_slice::<f32>());
        matmul::linear(self.isa, &self.pool, y.as_mut_slice(), y_stride, x.as_slice(), tokens, w, bias, epilogue);
        Ok(())
    }

    fn rms_norm(&self, y: &mut Tensor, x: &Tensor, w: &Tensor, eps: f32) -> Result<()> {
        check::norm("rms_norm", y, x, &[("w", w)])?;
        check::dtype("rms_norm", "w", w, DType::F32)?;
        norm::rms_norm(&self.pool, y.as_mut_slice(), x.as_slice(), w.as_slice(), eps);
        Ok(())
    }

    fn layer_norm(&self, y: &mut Tensor, x: &Tensor, w: &Tensor, b: &Tensor, eps: f32) -> Result<()> {
        check::norm("layer_norm", y, x, &[("w", w), ("b", b)])?;
        for (what, t) in [("w", w), ("b", b)] {
            check::dtype("layer_norm", what, t, DType::F32)?;
        }
        norm::layer_norm(&self.pool, y.as_mut_slice(), x.as_slice(), w.as_slice(), b.as_slice(), eps);
        Ok(())
    }

    fn silu_mul(&self, y: &mut Tensor, gate_up: &Tensor) -> Result<()> {
        check::silu_mul(y, gate_up)?;
        let n = y.row_len();
        elementwise::silu_mul(self.isa, &self.pool, y.as_mut_slice(), gate_up.as_slice(), n);
        Ok(())
    }

    fn embed(&self, y: &mut Tensor, table: &Tensor, ids: &[u32]) -> Result<()> {
        check::embed(y, table, ids)?;
        elementwise::embed(y.as_mut_slice(), table, ids);
        Ok(())
    }

    fn preprocess(&self, pixels: &mut Tensor, images: &[RgbImage], config: &Preprocess) -> Result<()> {
        check::preprocess(pixels, images, config)?;
        preprocess_into(pixels.as_mut_slice(), images, config);
        Ok(())
    }

    fn patchify(&self, y: &mut Tensor, pixels: &Tensor, images: Range<usize>, patch_size: usize) -> Result<()> {
        let size = check::patchify(y, pixels, &images, patch_size)?;
        elementwise::patchify(y.as_mut_slice(), pixels.as_slice(), images, size, patch_size);
        Ok(())
    }

    fn clip_embed(&self, y: &mut Tensor, patches: &Tensor, class: &Tensor, positions: &Tensor) -> Result<()> {
        check::clip_embed(y, patches, class, positions)?;
        for (what, t) in [("class", class), ("positions", positions)] {
            check::dtype("clip_embed", what, t, DType::F32)?;
        }
        elementwise::clip_embed(y.as_mut_slice(), patches.as_slice(), class.as_slice(), positions.as_slice());
        Ok(())
    }

    fn rope_append(&self, qkv: &mut Tensor, kv: &mut KvLayer, rope: &RopeTable, spans: &[Span<'_>], heads: Heads) -> Result<()> {
        check::rope_append(qkv, kv, rope, spans, heads)?;
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
        check::attention(out, qkv, kv, spans, heads)?;
        attention::attention(self.isa, &self.pool, out.as_mut_slice(), qkv.as_slice(), kv, spans, heads, causal);
        Ok(())
    }

    fn copy_rows(&self, dst: &mut Tensor, src: &Tensor, copies: &[RowCopy]) -> Result<()> {
        check::copy_rows(dst, src, copies)?;
        check::dtype("copy_rows", "dst", dst, DType::F32)?;
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
    /// Between two measurements.
    pub fn mean(self, other: Self) -> Self {
        Self {
            read_gbps: (self.read_gbps + other.read_gbps) / 2.0,
            gflops: (self.gflops + other.gflops) / 2.0,
            bf16_gflops: self.bf16_gflops.zip(other.bf16_gflops).map(|(a, b)| (a + b) / 2.0),
        }
    }

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
