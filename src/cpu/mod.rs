//! The CPU backend: activations in f32, weights in whatever their file stores, kernels chosen once by what the processor has.

pub mod attention;
mod attention_backward;
mod attention_blocks;
mod attention_decode;
mod backward;
mod elementwise;
mod loss;
pub mod matmul;
mod matmul_gemm;
mod matmul_gemv;
mod matmul_grad;
pub mod matmul_packed;
mod norm;
mod optim;
pub mod pool;
pub mod probe;
mod rope;
mod sample;
mod scratch;
// One contract holds for all wrapped instructions and stands at the trait; coefficients are written as they were fitted.
#[allow(clippy::missing_safety_doc, clippy::excessive_precision)]
pub mod simd;
mod sum_rows;
mod tile;

#[cfg(test)]
mod attention_tests;
#[cfg(test)]
mod matmul_grad_tests;
#[cfg(test)]
mod matmul_packed_tests;
#[cfg(test)]
mod matmul_tests;
#[cfg(test)]
#[path = "../../tests/reference/mod.rs"]
mod reference;

use std::ops::Range;

use crate::dtype::DType;
use crate::error::Result;
use crate::image::{Preprocess, RgbImage, preprocess_into};
use crate::ops::{
    ArithmeticPeak, Draw, Epilogue, Heads, KvLayer, KvSource, Matrix, Operands, Ops, Peaks, RopeTable, RowCopy, Run, Span, Weight,
    check,
};
use crate::tensor::Tensor;
use pool::Pool;
use simd::Isa;

/// What the probe of memory reads: far more than caches hold.
const PROBE_BYTES: usize = 1 << 30;

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
        Ok(Self::with_isa(n_threads, isa))
    }

    /// The same with an instruction set that need not be the widest, for tests.
    ///
    /// # Panics
    /// If this machine does not have it.
    pub fn with_isa(n_threads: usize, isa: Isa) -> Self {
        assert!(isa.is_supported(), "this machine has no {isa}");
        Self { pool: Pool::new(n_threads), isa }
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

    /// Of the machine, whatever instruction set the ops were told to use.
    fn measure_peaks(&self) -> Result<Peaks> {
        let isa = Isa::detect();
        let peak = |operands, how: &str, gflops| ArithmeticPeak { operands, how: how.to_owned(), gflops };
        let float = Operands::Float;
        let fma = peak(float(DType::F32), "fused multiply-adds on registers", probe::fma_gflops(isa, &self.pool));
        let int8 = peak(Operands::Int8, "dot products of bytes on registers", probe::int8_gflops(isa, &self.pool));
        let bf16 =
            probe::dpbf16_gflops(isa, &self.pool).map(|gflops| peak(float(DType::Bf16), "dot products on registers", gflops));
        let arithmetic = [fma, int8].into_iter().chain(bf16).collect();
        Ok(Peaks { read_gbps: probe::read_gbps(&self.pool, PROBE_BYTES), arithmetic })
    }

    fn alloc(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        Ok(Tensor::zeros(shape, dtype))
    }

    fn upload(&self, tensor: Tensor) -> Result<Tensor> {
        Ok(tensor)
    }

    fn to_host(&self, tensor: &Tensor) -> Result<Tensor> {
        let mut copy = Tensor::zeros(tensor.shape(), tensor.dtype());
        copy.as_mut_bytes().copy_from_slice(tensor.as_bytes());
        Ok(copy)
    }

    fn linear(&self, y: &mut Tensor, x: &Tensor, w: &Weight, bias: Option<&Tensor>, epilogue: Epilogue) -> Result<()> {
        check::linear(y, x, w, bias)?;
        for (what, t) in [("x", Some(x)), ("y", Some(&*y)), ("bias", bias)] {
            t.map_or(Ok(()), |t| check::dtype("linear", what, t, DType::F32))?;
        }
        let (tokens, y_stride) = (x.rows(), y.row_len());
        let bias = bias.map(|b| b.as_slice::<f32>());
        for (row, run) in w.runs() {
            let bias = bias.map(|b| &b[row..]);
            let first_col = w.first_col + row;
            let out = matmul::Output::new(y.as_mut_slice(), y_stride, first_col, bias, epilogue);
            match run {
                Run::Dense(parts) => matmul::linear(self.isa, &self.pool, out, x.as_slice(), tokens, &parts),
                Run::Packed(parts) => matmul_packed::linear(self.isa, &self.pool, out, x.as_slice(), tokens, &parts),
            }
        }
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

    fn embed(&self, y: &mut Tensor, table: &Matrix, ids: &[u32]) -> Result<()> {
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

    fn sample(&self, ids: &mut Tensor, logits: &Tensor, seen: &mut Tensor, draws: &[Draw]) -> Result<()> {
        check::sample(ids, logits, seen, draws)?;
        sample::sample(ids.as_mut_slice(), logits, seen, draws);
        Ok(())
    }
}
