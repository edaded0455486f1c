//! Gradients of the linear layer, dx = dy·W and dW += dyᵀ·x, through the tiles of its forward ([`matmul_gemm`](super::matmul_gemm)).
//!
//! W is packed into panels as it lies, row by row; where it holds integers, a block of it is dequantized into the panel: there is no second
//! copy of W. All products are in f32.

use half::{bf16, f16};

use super::matmul::{Block, Output};
use super::matmul_gemm::{Left, Plan, Right, gemm};
use super::pool::Pool;
use super::simd::{Isa, Simd, Stored};
use super::tile::pack_rows;
use crate::dtype::DType;
use crate::ops::packed::{BLOCK_ROWS, SLAB};
use crate::ops::{Epilogue, Packed, Run, Update, Weight};
use crate::tensor::Tensor;

/// Rows of B whose pieces are copied to a panel before the next panel's: as many runs of memory are read side by side.
const ROWS_TOGETHER: usize = 16;

/// B as it lies in memory: rows of `parts`, one part below the other.
struct Stacked<'a, E> {
    /// `[steps_i, n]` each.
    parts: Vec<&'a [E]>,
    n: usize,
}

impl<'a, E> Stacked<'a, E> {
    /// Row `step`.
    #[inline(always)]
    fn row(&self, step: usize) -> &'a [E] {
        let mut start = step * self.n;
        for part in &self.parts {
            if start < part.len() {
                return &part[start..start + self.n];
            }
            start -= part.len();
        }
        unreachable!("step {step} is beyond all parts")
    }
}

impl<E: Stored> Right for Stacked<'_, E> {
    fn n_cols(&self) -> usize {
        self.n
    }

    #[inline(always)]
    unsafe fn pack<S: Simd>(&self, _plan: Plan, block: Block, step: usize, n_steps: usize, out: &mut [f32]) {
        let mut rows = [std::ptr::null::<E>(); ROWS_TOGETHER];
        for first in (0..n_steps).step_by(ROWS_TOGETHER) {
            let n_rows = ROWS_TOGETHER.min(n_steps - first);
            for (i, row) in rows[..n_rows].iter_mut().enumerate() {
                *row = self.row(step + first + i)[block.row..].as_ptr();
            }
            for col in (0..block.n_rows).step_by(S::NR) {
                let to = &mut out[col * n_steps + first * S::NR..][..n_rows * S::NR];
                // SAFETY: the instructions are there, says the caller; rows go on for the columns of the block, and there is room for them.
                unsafe { pack_rows::<S, E>(to.as_mut_ptr(), &rows[..n_rows], col, S::NR.min(block.n_rows - col)) };
            }
        }
    }
}

/// B as it lies in memory, in integers.
struct StackedPacked<'a> {
    parts: &'a [&'a Packed],
}

/// Columns that lie in one byte each of a slab of 4 bits: the low half of all, or the high half.
const HALF: usize = SLAB / 2;

impl Right for StackedPacked<'_> {
    fn n_cols(&self) -> usize {
        self.parts[0].k
    }

    /// Dequantizes: w = scale·q + offset.
    #[inline(always)]
    unsafe fn pack<S: Simd>(&self, _plan: Plan, block: Block, step: usize, n_steps: usize, out: &mut [f32]) {
        for i in 0..n_steps {
            let (mut part, mut row) = (0, step + i);
            while row >= self.parts[part].n {
                row -= self.parts[part].n;
                part += 1;
            }
            let w = self.parts[part];
            let bytes = bytemuck::cast_slice::<i32, u8>(w.words.as_slice());
            // A panel is a slab wide, or half of one; columns of the block are a multiple of a slab.
            for col in (0..block.n_rows).step_by(HALF) {
                let at = block.row + col;
                let (scale, offset) = w.scale_offset(row, at);
                let slab = ((row / BLOCK_ROWS * (w.k / SLAB) + at / SLAB) * BLOCK_ROWS + row % BLOCK_ROWS) * 4 * w.bits;
                let is_high = at % SLAB >= HALF;
                let to = &mut out[col / S::NR * S::NR * n_steps + i * S::NR + col % S::NR..][..HALF];
                if w.bits == 8 {
                    let q = &bytes[slab + at % SLAB..][..HALF];
                    for j in 0..HALF {
                        to[j] = scale * f32::from(q[j]) + offset;
                    }
                } else {
                    let q = &bytes[slab..][..HALF];
                    let shift = if is_high { 4 } else { 0 };
                    for j in 0..HALF {
                        to[j] = scale * f32::from(q[j] >> shift & 15) + offset;
                    }
                }
            }
        }
    }
}

/// dx = dy·W, or dx += dy·W: dy `[tokens, stride]`, of which the columns from `w.first_col` on count; dx `[tokens, k]`.
///
/// # Panics
/// If an operand is too small for these shapes, or a dense part holds integers.
pub fn linear_dx(isa: Isa, pool: &Pool, dx: &mut [f32], dy: &[f32], stride: usize, w: &Weight, update: Update) {
    let k = w.k();
    if dx.is_empty() {
        return;
    }
    if w.n() == 0 {
        // Sums of nothing.
        if update == Update::Set {
            dx.fill(0.0);
        }
        return;
    }
    let tokens = dx.len() / k;
    let mut epilogue = match update {
        Update::Set => Epilogue::Store,
        Update::Add => Epilogue::Add,
    };
    for (row, run) in w.runs() {
        let out = Output::new(dx, k, 0, None, epilogue);
        let left = |steps| Left { data: dy, stride, first_col: w.first_col + row, rows: tokens, steps, transposed: false };
        match run {
            Run::Dense(parts) => {
                let left = left(parts.iter().map(|part| part.rows()).sum());
                match parts[0].dtype() {
                    DType::F32 => gemm(isa, pool, &out, left, &stacked::<f32>(&parts)),
                    DType::Bf16 => gemm(isa, pool, &out, left, &stacked::<bf16>(&parts)),
                    DType::F16 => gemm(isa, pool, &out, left, &stacked::<f16>(&parts)),
                    DType::I32 | DType::I8 => panic!("weights are not integers"),
                }
            }
            Run::Packed(parts) => {
                let left = left(parts.iter().map(|part| part.n).sum());
                gemm(isa, pool, &out, left, &StackedPacked { parts: &parts });
            }
        }
        epilogue = Epilogue::Add;
    }
}

fn stacked<'a, E: Stored>(parts: &[&'a Tensor]) -> Stacked<'a, E> {
    Stacked { parts: parts.iter().map(|part| part.as_slice::<E>()).collect(), n: parts[0].row_len() }
}

/// Columns from `first` on, as many as the op says, of rows of `stride`.
pub struct Columns<'a> {
    pub data: &'a [f32],
    pub stride: usize,
    pub first: usize,
}

/// dW += dyᵀ·x: dW `[n, k]`, n columns of dy `[tokens, stride]`, x `[tokens, k]`.
///
/// # Panics
/// If an operand is too small for these shapes.
pub fn linear_dw(isa: Isa, pool: &Pool, dw: &mut [f32], dy: Columns<'_>, x: &[f32], k: usize) {
    if dw.is_empty() || x.is_empty() {
        return;
    }
    let Columns { data, stride, first } = dy;
    let left = Left { data, stride, first_col: first, rows: dw.len() / k, steps: x.len() / k, transposed: true };
    gemm(isa, pool, &Output::new(dw, k, 0, None, Epilogue::Add), left, &Stacked { parts: vec![x], n: k });
}
