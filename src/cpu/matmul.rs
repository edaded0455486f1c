//! The linear layer: y = epilogue(x·Wᵀ + bias), W `[n, k]` in f32, bf16 or f16, sums in f32.
//!
//! Two kernels. Up to [`SKINNY`] tokens, W streams from memory once and its speed is the memory's ([`gemv`](super::matmul_gemv)); above,
//! W is packed block by block and its speed is the arithmetic's ([`gemm`](super::matmul_gemm)).
//!
//! Numerics: within one of the two kernels a row of y depends on its row of x alone, bit for bit, however many rows there are and however
//! many threads; from run to run results are the same. With AVX512-BF16 and bf16 weights, [`gemm`](super::matmul_gemm) rounds x to
//! bf16, as a bf16 model does; elsewhere x stays f32.

use half::{bf16, f16};

use super::matmul_gemm::{self, Left};
use super::matmul_gemv;
use super::pool::{Disjoint, Pool};
use super::simd::{self, Isa, Simd, Stored};
use crate::dtype::DType;
use crate::ops::Epilogue;
use crate::tensor::Tensor;

/// The most tokens that are bound by reading W, and not by arithmetic.
pub const SKINNY: usize = 8;

/// One linear layer at work.
pub(super) struct Linear<'a, E> {
    pub out: Output<'a>,
    /// `[tokens, k]`
    pub x: &'a [f32],
    pub tokens: usize,
    pub k: usize,
    /// Parts `[n_i, k]`.
    pub parts: Vec<&'a [E]>,
}

/// Where its result goes, and how.
pub(super) struct Output<'a> {
    /// Rows of `y_stride`; the result goes to columns `first_col ..`.
    pub y: Disjoint<'a, f32>,
    pub y_stride: usize,
    pub first_col: usize,
    /// `[n]`
    pub bias: Option<&'a [f32]>,
    pub epilogue: Epilogue,
}

/// Rows of one part: the columns of y that a task computes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    pub part: usize,
    /// Its first row within the part.
    pub row: usize,
    pub n_rows: usize,
    /// The same row, counted over all parts.
    pub col: usize,
}

impl<E: Stored> Linear<'_, E> {
    /// Rows of all parts.
    pub fn n(&self) -> usize {
        self.parts.iter().map(|part| part.len() / self.k).sum()
    }

    /// All rows of W in blocks of `size`, which end where a part ends.
    pub fn blocks(&self, size: usize) -> Vec<Block> {
        let mut blocks = Vec::with_capacity(self.n() / size + self.parts.len());
        let mut first = 0;
        for (part, weights) in self.parts.iter().enumerate() {
            let n = weights.len() / self.k;
            blocks.extend((0..n).step_by(size).map(|row| Block { part, row, n_rows: size.min(n - row), col: first + row }));
            first += n;
        }
        blocks
    }
}

impl Output<'_> {
    /// Writes epilogue(r + bias) for `n` ≤ LANES columns from `col` (counted over all parts) on of row `token`.
    ///
    /// # Safety
    /// That of [`Simd`]; no other task writes these elements; `col + n` is at most the width of W.
    #[inline(always)]
    pub unsafe fn finish<S: Simd>(&self, token: usize, col: usize, n: usize, r: S::V) {
        let y = self.y.ptr(token * self.y_stride + self.first_col + col);
        // SAFETY: the columns are inside y and, as far as there is one, inside the bias.
        unsafe {
            let whole = n == S::LANES;
            let load = |p: *const f32| if whole { S::load(p) } else { S::load_part(p, n) };
            let r = self.bias.map_or(r, |bias| S::add(r, load(bias.as_ptr().add(col))));
            let r = match self.epilogue {
                Epilogue::Store => r,
                Epilogue::Add => S::add(r, load(y)),
                Epilogue::QuickGelu => simd::quick_gelu::<S>(r),
                Epilogue::Gelu => simd::gelu::<S>(r),
            };
            if whole { S::store(y, r) } else { S::store_part(y, r, n) }
        }
    }
}

impl<'a> Output<'a> {
    /// To columns from `first_col` on of rows of `y_stride`.
    pub fn new(y: &'a mut [f32], y_stride: usize, first_col: usize, bias: Option<&'a [f32]>, epilogue: Epilogue) -> Self {
        Self { y: Disjoint::new(y), y_stride, first_col, bias, epilogue }
    }

    /// Stops unless there is room for `n` columns of `tokens` rows, and a bias for each: kernels rely on it.
    pub fn expect(&self, tokens: usize, n: usize) {
        assert!(
            self.first_col + n <= self.y_stride && self.y.n_elements() >= tokens * self.y_stride,
            "no room for {tokens} rows of {n}"
        );
        assert!(self.bias.is_none_or(|b| b.len() >= n), "bias is shorter than {n}");
    }
}

/// The product of x `[tokens, k]` and `parts` `[n_i, k]`, all of one floating-point dtype.
///
/// # Panics
/// If an operand is too small for these shapes, or W holds integers.
pub(super) fn linear(isa: Isa, pool: &Pool, out: Output<'_>, x: &[f32], tokens: usize, parts: &[&Tensor]) {
    match parts[0].dtype() {
        DType::F32 => linear_of::<f32>(isa, pool, out, x, tokens, parts),
        DType::Bf16 => linear_of::<bf16>(isa, pool, out, x, tokens, parts),
        DType::F16 => linear_of::<f16>(isa, pool, out, x, tokens, parts),
        DType::I32 | DType::I8 => panic!("weights are not integers"),
    }
}

fn linear_of<E: Stored>(isa: Isa, pool: &Pool, out: Output<'_>, x: &[f32], tokens: usize, parts: &[&Tensor]) {
    let (n, k) = (parts.iter().map(|part| part.rows()).sum(), parts[0].row_len());
    if tokens == 0 || n == 0 {
        return;
    }
    // Kernels rely on these.
    assert!(k > 0 && x.len() >= tokens * k, "x has {} elements, not {tokens} rows of {k}", x.len());
    out.expect(tokens, n);
    let parts = parts.iter().map(|part| part.as_slice::<E>()).collect();
    let op = Linear { out, x, tokens, k, parts };
    if tokens <= SKINNY {
        matmul_gemv::gemv(isa, pool, &op)
    } else {
        let x = Left { data: x, stride: k, first_col: 0, rows: tokens, steps: k, transposed: false };
        matmul_gemm::gemm(isa, pool, &op.out, x, &op)
    }
}
