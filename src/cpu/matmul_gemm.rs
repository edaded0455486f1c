//! A blocked matrix product C = A·B (Goto and van de Geijn, *Anatomy of High-Performance Matrix Multiplication*): the linear layer for
//! many tokens, and its gradients.
//!
//! ```text
//!                    C               A [rows, steps]   B [steps, n]     B comes from
//! y  = x·Wᵀ          [tokens, n]     x                 Wᵀ               rows of W, transposed (`Linear`)
//! dx = dy·W          [tokens, k]     dy                W                rows of W as they lie (`matmul_grad`)
//! dW = dyᵀ·x         [n, k]          dyᵀ               x                rows of x as they lie (`matmul_grad`)
//! ```
//!
//! A is packed once, by all threads, into panels of [`Simd::MR`] rows, per block of [`STEPS`] steps. A task owns a block of columns of B
//! and a block of rows of A: for each block of steps it packs its columns, widened to f32, and meets all its rows with them, tile by tile.
//! Partial sums wait in scratch memory in the order of tiles; the last block of steps ends with the epilogue.
//!
//! What lies where while the innermost loops run, with AVX2: a panel of B (16 KiB) and a panel of A (6 KiB) in L1; [`L2_ROWS`] rows of A
//! (96 KiB) and the packed columns (128 KiB) in L2, and as much of the partial sums (320 KiB at 640 rows) as there is room for.

#![allow(clippy::needless_range_loop)] // lanes, rows and columns are indexed alike, and unrolled

use std::ops::Range;

use half::bf16;

use super::matmul::{Block, Linear, Output};
use super::pool::{Disjoint, Pool};
use super::scratch::{carve, padded, with_scratch};
use super::simd::{Isa, Kernel, MAX_LANES, NV, Simd, Stored};
use super::tile::{pack_column_pairs, pack_columns, pack_lanes, store_tile, tile, with_height};
use crate::dtype::DType;

/// Steps in a block: a panel of B is STEPS·NR f32, half of L1 with AVX2.
const STEPS: usize = 256;
/// Rows of A that a panel of B meets before the next one takes its place.
const L2_ROWS: usize = 96;
/// Panels of B in a task: the more, the less often A comes from L3.
const PANELS: usize = 8;
/// The most rows of A in a task; as many as a LLaVA prompt has, so that its weights are packed once.
const ROWS: usize = 768;
/// Panels of a transposed A that are packed together: so many places are written in turn, and read is a run of some hundred bytes.
const PACKED_TOGETHER: usize = 16;

/// Sizes of one product, which packing and tasks agree on.
#[derive(Clone, Copy)]
pub struct Plan {
    /// Whether a step is a pair of bf16.
    pub dot: bool,
    /// Steps.
    steps: usize,
    /// Panels of A.
    a_panels: usize,
    /// Rows of a panel of A, [`Simd::MR`], and columns of a panel of B, [`Simd::NR`].
    mr: usize,
    nr: usize,
}

impl Plan {
    /// Where panel `panel` of the block that starts at `step` begins in the packed A; the block is `n_steps` long.
    fn a_panel(&self, step: usize, n_steps: usize, panel: usize) -> usize {
        step * self.a_panels * self.mr + panel * n_steps * self.mr
    }
}

/// The left operand of a product: A `[rows, steps]`.
#[derive(Clone, Copy)]
pub struct Left<'a> {
    pub data: &'a [f32],
    /// Length of a row of `data`, and its first column that is of A.
    pub stride: usize,
    pub first_col: usize,
    pub rows: usize,
    /// The length of all sums.
    pub steps: usize,
    /// Whether rows of `data` are columns of A.
    pub transposed: bool,
}

impl Left<'_> {
    /// Stops unless all of A is inside `data`: kernels rely on it.
    pub fn expect(&self) {
        let (rows, cols) = if self.transposed { (self.steps, self.rows) } else { (self.rows, self.steps) };
        assert!(
            self.first_col + cols <= self.stride && self.data.len() >= rows * self.stride,
            "{} elements are not {rows} rows of {}, with {cols} columns from {} on",
            self.data.len(),
            self.stride,
            self.first_col
        );
    }
}

/// The right operand of a product: B `[steps, n]`.
pub trait Right: Sync {
    /// Whether its elements are bf16, and neighbouring steps neighbours in memory: what dot products of pairs take.
    const HAS_BF16_PAIRS: bool = false;

    /// Columns.
    fn n_cols(&self) -> usize;

    /// All columns in blocks of `size`, except where one must end earlier.
    fn blocks(&self, size: usize) -> Vec<Block> {
        let n = self.n_cols();
        (0..n).step_by(size).map(|col| Block { part: 0, row: col, n_rows: size.min(n - col), col }).collect()
    }

    /// Packs steps `step .. step + n_steps` of the columns of a block, widened to f32, into panels `[n_steps, NR]`. What is beyond the last
    /// column is zero.
    ///
    /// # Safety
    /// That of [`Simd`]; block and steps are those of a product with this operand. With `plan.dot`, [`Self::HAS_BF16_PAIRS`].
    unsafe fn pack<S: Simd>(&self, plan: Plan, block: Block, step: usize, n_steps: usize, out: &mut [f32]);
}

/// C = epilogue(A·B + bias), C being what `out` says.
///
/// # Panics
/// If an operand is smaller than it says.
pub fn gemm<R: Right>(isa: Isa, pool: &Pool, out: &Output<'_>, a: Left<'_>, b: &R) {
    // Kernels rely on these.
    a.expect();
    out.expect(a.rows, b.n_cols());
    let Shape { mr, nr, bf16_dot } = isa.run(ShapeOf);
    let dot = bf16_dot && R::HAS_BF16_PAIRS;
    let plan = Plan { dot, steps: if dot { a.steps.div_ceil(2) } else { a.steps }, a_panels: a.rows.div_ceil(mr), mr, nr };
    with_scratch(plan.steps * plan.a_panels * mr, |packed| {
        let to = Disjoint::new(packed);
        if a.transposed {
            assert!(!dot, "columns of A have no pairs");
            let groups = plan.a_panels.div_ceil(PACKED_TOGETHER);
            pool.run(groups * plan.steps.div_ceil(STEPS), &|i| {
                let first = i % groups * PACKED_TOGETHER;
                let panels = first..plan.a_panels.min(first + PACKED_TOGETHER);
                isa.run(PackTransposed { plan, a, step: i / groups * STEPS, panels, out: &to });
            });
        } else {
            pool.run(plan.a_panels, &|panel| isa.run(PackLeft { plan, a, panel, out: &to }));
        }
        let packed = to.into_inner();

        let row_blocks = a.rows.div_ceil(ROWS);
        let block_panels = plan.a_panels.div_ceil(row_blocks);
        // Fewer panels of B to a task where there would not be three tasks for each thread.
        let wanted = b.n_cols() * row_blocks / (3 * pool.n_threads());
        let blocks = b.blocks((wanted / nr).clamp(1, PANELS) * nr);
        pool.run(blocks.len() * row_blocks, &|i| {
            let first = i % row_blocks * block_panels;
            let panels = first..plan.a_panels.min(first + block_panels);
            Task { plan, out, a: packed, rows: a.rows, b, block: blocks[i / row_blocks], panels }.run(isa);
        });
    });
}

/// A tile of an instruction set.
struct Shape {
    mr: usize,
    nr: usize,
    bf16_dot: bool,
}

/// Asks for it.
struct ShapeOf;

impl Kernel for ShapeOf {
    type Output = Shape;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Shape {
        Shape { mr: S::MR, nr: S::NR, bf16_dot: S::BF16_DOT }
    }
}

/// Packs one panel of A, for all blocks of steps: packed\[step\]\[i\] = A\[panel·MR + i\]\[step\], zero beyond the last row.
struct PackLeft<'a> {
    plan: Plan,
    a: Left<'a>,
    panel: usize,
    out: &'a Disjoint<'a, f32>,
}

impl Kernel for PackLeft<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { plan, a, panel, out } = self;
        let first = panel * S::MR;
        let n_rows = S::MR.min(a.rows - first);
        // Those beyond the last row are not used.
        let start = a.data[first * a.stride + a.first_col..].as_ptr();
        let rows: [_; MAX_LANES] = std::array::from_fn(|i| start.wrapping_add(i * a.stride));
        for step in (0..plan.steps).step_by(STEPS) {
            let n_steps = STEPS.min(plan.steps - step);
            // SAFETY: panels of one block do not overlap, and each task has its own.
            let to = unsafe { out.slice(plan.a_panel(step, n_steps, panel), n_steps * S::MR) };
            if !plan.dot {
                let rows = rows.map(|row| row.wrapping_add(step));
                // SAFETY: the instructions are there, says the caller; each row of A goes on for the steps of this block.
                unsafe { pack_lanes::<S, f32>(to.as_mut_ptr(), &rows[..n_rows], n_steps, S::MR) };
                continue;
            }
            for i in 0..S::MR {
                if i >= n_rows {
                    (0..n_steps).for_each(|j| to[j * S::MR + i] = 0.0);
                    continue;
                }
                let row = &a.data[(first + i) * a.stride + a.first_col..][2 * step..a.steps.min(2 * (step + n_steps))];
                for (j, pair) in row.chunks(2).enumerate() {
                    let [low, high] = [pair[0], *pair.get(1).unwrap_or(&0.0)].map(bf16_bits);
                    to[j * S::MR + i] = f32::from_bits(high << 16 | low);
                }
            }
        }
    }
}

/// As [`PackLeft`] where rows of memory are columns of A: some panels of one block of steps.
struct PackTransposed<'a> {
    plan: Plan,
    a: Left<'a>,
    step: usize,
    panels: Range<usize>,
    out: &'a Disjoint<'a, f32>,
}

impl Kernel for PackTransposed<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { plan, a, step, panels, out } = self;
        let n_steps = STEPS.min(plan.steps - step);
        // SAFETY: panels of one block lie one after the other, and each task has its own.
        let to = unsafe { out.slice(plan.a_panel(step, n_steps, panels.start), panels.len() * n_steps * S::MR) };
        for j in 0..n_steps {
            let row = &a.data[(step + j) * a.stride + a.first_col..][..a.rows];
            for panel in panels.clone() {
                let from = &row[panel * S::MR..];
                let to = &mut to[((panel - panels.start) * n_steps + j) * S::MR..][..S::MR];
                if from.len() >= S::MR {
                    to.copy_from_slice(&from[..S::MR]); // a length that the compiler knows
                } else {
                    to[from.len()..].fill(0.0);
                    to[..from.len()].copy_from_slice(from);
                }
            }
        }
    }
}

/// The bits of x as bf16, rounded to nearest even.
fn bf16_bits(x: f32) -> u32 {
    u32::from(bf16::from_f32(x).to_bits())
}

/// A block of columns of B times panels of A.
struct Task<'a, R> {
    plan: Plan,
    out: &'a Output<'a>,
    /// Packed A.
    a: &'a [f32],
    /// Rows of A.
    rows: usize,
    b: &'a R,
    block: Block,
    panels: Range<usize>,
}

impl<R: Right> Task<'_, R> {
    fn run(&self, isa: Isa) {
        let Self { plan, out, a, rows, b, block, ref panels } = *self;
        let b_panels = block.n_rows.div_ceil(plan.nr);
        let b_len = b_panels * STEPS * plan.nr;
        with_scratch(padded(b_len) + panels.len() * b_panels * plan.mr * plan.nr, |mut rest| {
            let packed = carve(&mut rest, b_len);
            for step in (0..plan.steps).step_by(STEPS) {
                let n_steps = STEPS.min(plan.steps - step);
                isa.run(PackRight { plan, b, block, step, n_steps, out: packed });
                isa.run(Multiply { plan, a, b: packed, sums: rest, out, rows, block, panels: panels.clone(), step, n_steps });
            }
        });
    }
}

/// Packs some steps of the columns of a block.
struct PackRight<'a, R> {
    plan: Plan,
    b: &'a R,
    block: Block,
    step: usize,
    n_steps: usize,
    out: &'a mut [f32],
}

impl<R: Right> Kernel for PackRight<'_, R> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { plan, b, block, step, n_steps, out } = self;
        // SAFETY: the caller's; they are of one product.
        unsafe { b.pack::<S>(plan, block, step, n_steps, out) }
    }
}

/// B = Wᵀ: its columns are rows of W.
impl<E: Stored> Right for Linear<'_, E> {
    const HAS_BF16_PAIRS: bool = matches!(E::DTYPE, DType::Bf16);

    fn n_cols(&self) -> usize {
        self.n()
    }

    fn blocks(&self, size: usize) -> Vec<Block> {
        Linear::blocks(self, size)
    }

    #[inline(always)]
    unsafe fn pack<S: Simd>(&self, plan: Plan, block: Block, step: usize, n_steps: usize, out: &mut [f32]) {
        let k = self.k;
        let first = if plan.dot { 2 * step } else { step };
        let rows = &self.parts[block.part][block.row * k..][..block.n_rows * k];
        let mut pointers = [std::ptr::null::<E>(); NV * MAX_LANES];
        for (panel, rows) in out.chunks_exact_mut(n_steps * S::NR).zip(rows.chunks(S::NR * k)) {
            for (pointer, row) in pointers.iter_mut().zip(rows.chunks(k)) {
                *pointer = row[first..].as_ptr();
            }
            let n_rows = rows.len() / k;
            // SAFETY: the instructions are there, says the caller; the rows go on for the steps of this block, and the panel has room for
            // them. With `dot`, E is bf16.
            unsafe {
                if plan.dot {
                    let rows = std::slice::from_raw_parts(pointers.as_ptr().cast::<*const bf16>(), n_rows);
                    pack_column_pairs::<S>(panel.as_mut_ptr(), rows, (2 * n_steps).min(k - first));
                } else {
                    pack_columns::<S, E>(panel.as_mut_ptr(), &pointers[..n_rows], n_steps);
                }
            }
        }
    }
}

/// Adds the products of one block of steps to the partial sums, and finishes them if it is the last.
struct Multiply<'a> {
    plan: Plan,
    /// Packed A.
    a: &'a [f32],
    /// Packed columns of B, for this block of steps.
    b: &'a [f32],
    /// Tiles `[panels of A][panels of B][MR, NR]`; if there is one block of steps, one tile.
    sums: &'a mut [f32],
    out: &'a Output<'a>,
    /// Rows of A.
    rows: usize,
    block: Block,
    panels: Range<usize>,
    step: usize,
    n_steps: usize,
}

impl Kernel for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(mut self) {
        // SAFETY: the caller's.
        unsafe {
            if S::BF16_DOT && self.plan.dot {
                self.multiply::<S, true>();
            } else {
                self.multiply::<S, false>();
            }
        }
    }
}

impl Multiply<'_> {
    /// # Safety
    /// That of [`Simd`].
    #[inline(always)]
    unsafe fn multiply<S: Simd, const DOT: bool>(&mut self) {
        let Self { plan, step, n_steps, .. } = *self;
        let (is_first, is_last) = (step == 0, step + n_steps == plan.steps);
        let b_panels = self.block.n_rows.div_ceil(S::NR);
        let group = (L2_ROWS / S::MR).max(1);
        for first in self.panels.clone().step_by(group) {
            for j in 0..b_panels {
                for i in first..self.panels.end.min(first + group) {
                    let a = self.a[plan.a_panel(step, n_steps, i)..][..n_steps * S::MR].as_ptr();
                    let b = self.b[j * n_steps * S::NR..][..n_steps * S::NR].as_ptr();
                    // Sums of one block do not wait, and one place serves all tiles: it stays in L1.
                    let waiting = if is_first && is_last { 0 } else { (i - self.panels.start) * b_panels + j };
                    let at = waiting * S::MR * S::NR;
                    let sums = self.sums[at..][..S::MR * S::NR].as_mut_ptr();
                    let height = S::MR.min(self.rows - i * S::MR);
                    // SAFETY: these slices are what a tile reads and writes.
                    unsafe {
                        with_height!(height, S, M => {
                            let acc = tile::<S, M, DOT>(n_steps, a, 1, S::MR, n_steps * S::MR, b);
                            store_tile::<S, M>(&acc, sums, S::NR, !is_first);
                        });
                        if is_last {
                            self.finish::<S>(i * S::MR, height, j * S::NR, sums);
                        }
                    }
                }
            }
        }
    }

    /// Ends a tile with the epilogue: its row 0 is row `row` of A, its column 0 column `col` of the block.
    ///
    /// # Safety
    /// That of [`Simd`]; `sums` is a tile.
    #[inline(always)]
    unsafe fn finish<S: Simd>(&self, row: usize, height: usize, col: usize, sums: *const f32) {
        let width = S::NR.min(self.block.n_rows - col);
        for i in 0..height {
            for j in (0..width).step_by(S::LANES) {
                // SAFETY: the caller's; this task alone writes the columns of its block.
                unsafe {
                    let r = S::load(sums.add(i * S::NR + j));
                    self.out.finish::<S>(row + i, self.block.col + col + j, S::LANES.min(width - j), r);
                }
            }
        }
    }
}
