//! The linear layer for many tokens: a blocked matrix product (Goto and van de Geijn, *Anatomy of High-Performance Matrix Multiplication*).
//!
//! x is packed once, by all threads, into panels of [`Simd::MR`] rows, per block of [`STEPS`] steps of k. A task owns a block of rows of W
//! and a block of tokens: for each k block it packs its weights, widened to f32, and meets all its tokens with them, tile by tile. Partial
//! sums wait in scratch memory in the order of tiles; the last k block ends with the epilogue.
//!
//! What lies where while the innermost loops run, with AVX2: a panel of W (16 KiB) and a panel of x (6 KiB) in L1; [`L2_ROWS`] rows of x
//! (96 KiB) and the packed weights (128 KiB) in L2, and as much of the partial sums (320 KiB at 640 tokens) as there is room for.

#![allow(clippy::needless_range_loop)] // lanes, rows and columns are indexed alike, and unrolled

use std::ops::Range;

use half::bf16;

use super::matmul::{Block, Linear, Output};
use super::pool::{Disjoint, Pool};
use super::scratch::{carve, padded, with_scratch};
use super::simd::{Isa, Kernel, MAX_LANES, NV, Simd, Stored};
use super::tile::{pack_column_pairs, pack_columns, pack_lanes, store_tile, tile, with_height};
use crate::dtype::DType;

/// Steps of k in a block: a panel of W is STEPS·NR f32, half of L1 with AVX2.
const STEPS: usize = 256;
/// Rows of x that a panel of W meets before the next one takes its place.
const L2_ROWS: usize = 96;
/// Panels of W in a task: the more, the less often x comes from L3.
const PANELS: usize = 8;
/// The most tokens in a task; as many as a LLaVA prompt has, so that its weights are packed once.
const TOKENS: usize = 768;

/// Sizes of one product, which packing and tasks agree on.
#[derive(Clone, Copy)]
struct Plan {
    /// Whether a step is a pair of bf16.
    dot: bool,
    /// Steps of k.
    steps: usize,
    /// Panels of x.
    x_panels: usize,
    /// Rows of a panel of x, [`Simd::MR`], and of a panel of W, [`Simd::NR`].
    mr: usize,
    nr: usize,
}

impl Plan {
    /// Where panel `panel` of the k block that starts at `step` begins in the packed x; the block is `n_steps` long.
    fn x_panel(&self, step: usize, n_steps: usize, panel: usize) -> usize {
        step * self.x_panels * self.mr + panel * n_steps * self.mr
    }
}

/// y = epilogue(x·Wᵀ + bias).
pub fn gemm<E: Stored>(isa: Isa, pool: &Pool, op: &Linear<'_, E>) {
    let Shape { mr, nr, bf16_dot } = isa.run(ShapeOf);
    let dot = bf16_dot && E::DTYPE == DType::Bf16;
    let plan = Plan { dot, steps: if dot { op.k.div_ceil(2) } else { op.k }, x_panels: op.tokens.div_ceil(mr), mr, nr };
    with_scratch(plan.steps * plan.x_panels * mr, |packed| {
        let out = Disjoint::new(packed);
        pool.run(plan.x_panels, &|panel| isa.run(PackX { plan, x: op.x, tokens: op.tokens, k: op.k, panel, out: &out }));
        let packed = out.into_inner();

        let token_blocks = op.tokens.div_ceil(TOKENS);
        let block_panels = plan.x_panels.div_ceil(token_blocks);
        // Fewer panels of W to a task where there would not be three tasks for each thread.
        let wanted = op.n() * token_blocks / (3 * pool.n_threads());
        let blocks = op.blocks((wanted / nr).clamp(1, PANELS) * nr);
        pool.run(blocks.len() * token_blocks, &|i| {
            let first = i % token_blocks * block_panels;
            let panels = first..plan.x_panels.min(first + block_panels);
            Task { plan, op, x: packed, block: blocks[i / token_blocks], panels }.run(isa);
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

/// Packs one panel of x, for all blocks of k: packed\[step\]\[i\] = x\[panel·MR + i\]\[step\], zero beyond the last token.
struct PackX<'a> {
    plan: Plan,
    x: &'a [f32],
    tokens: usize,
    k: usize,
    panel: usize,
    out: &'a Disjoint<'a, f32>,
}

impl Kernel for PackX<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { plan, x, tokens, k, panel, out } = self;
        let first = panel * S::MR;
        let n_rows = S::MR.min(tokens - first);
        // Those beyond the last row are not used.
        let rows: [_; MAX_LANES] = std::array::from_fn(|i| x[first * k..].as_ptr().wrapping_add(i * k));
        for step in (0..plan.steps).step_by(STEPS) {
            let n_steps = STEPS.min(plan.steps - step);
            // SAFETY: panels of one block do not overlap, and each task has its own.
            let to = unsafe { out.slice(plan.x_panel(step, n_steps, panel), n_steps * S::MR) };
            if !plan.dot {
                let rows = rows.map(|row| row.wrapping_add(step));
                // SAFETY: the instructions are there, says the caller; each row of x goes on for the steps of this block.
                unsafe { pack_lanes::<S, f32>(to.as_mut_ptr(), &rows[..n_rows], n_steps, S::MR) };
                continue;
            }
            for i in 0..S::MR {
                if i >= n_rows {
                    (0..n_steps).for_each(|j| to[j * S::MR + i] = 0.0);
                    continue;
                }
                let row = &x[(first + i) * k..][2 * step..k.min(2 * (step + n_steps))];
                for (j, pair) in row.chunks(2).enumerate() {
                    let [low, high] = [pair[0], *pair.get(1).unwrap_or(&0.0)].map(bf16_bits);
                    to[j * S::MR + i] = f32::from_bits(high << 16 | low);
                }
            }
        }
    }
}

/// The bits of x as bf16, rounded to nearest even.
fn bf16_bits(x: f32) -> u32 {
    u32::from(bf16::from_f32(x).to_bits())
}

/// A block of rows of W times panels of x.
struct Task<'a, E> {
    plan: Plan,
    op: &'a Linear<'a, E>,
    /// Packed x.
    x: &'a [f32],
    block: Block,
    panels: Range<usize>,
}

impl<E: Stored> Task<'_, E> {
    fn run(&self, isa: Isa) {
        let Self { plan, op, x, block, ref panels } = *self;
        let w_panels = block.n_rows.div_ceil(plan.nr);
        let w_len = w_panels * STEPS * plan.nr;
        with_scratch(padded(w_len) + panels.len() * w_panels * plan.mr * plan.nr, |mut rest| {
            let w = carve(&mut rest, w_len);
            for step in (0..plan.steps).step_by(STEPS) {
                let n_steps = STEPS.min(plan.steps - step);
                isa.run(PackW { plan, op, block, step, n_steps, out: w });
                let tokens = op.tokens;
                isa.run(Multiply { plan, x, w, sums: rest, out: &op.out, tokens, block, panels: panels.clone(), step, n_steps });
            }
        });
    }
}

/// Packs steps `step .. step + n_steps` of a block's rows, widened to f32, into panels.
struct PackW<'a, E> {
    plan: Plan,
    op: &'a Linear<'a, E>,
    block: Block,
    step: usize,
    n_steps: usize,
    out: &'a mut [f32],
}

impl<E: Stored> Kernel for PackW<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { plan, op, block, step, n_steps, out } = self;
        let k = op.k;
        let first = if plan.dot { 2 * step } else { step };
        let rows = &op.parts[block.part][block.row * k..][..block.n_rows * k];
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

/// Adds the products of one block of k to the partial sums, and finishes them if it is the last.
struct Multiply<'a> {
    plan: Plan,
    /// Packed x.
    x: &'a [f32],
    /// Packed rows of W, for this block of k.
    w: &'a [f32],
    /// Tiles `[panels of x][panels of W][MR, NR]`.
    sums: &'a mut [f32],
    out: &'a Output<'a>,
    tokens: usize,
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
        let w_panels = self.block.n_rows.div_ceil(S::NR);
        let group = (L2_ROWS / S::MR).max(1);
        for first in self.panels.clone().step_by(group) {
            for j in 0..w_panels {
                for i in first..self.panels.end.min(first + group) {
                    let a = self.x[plan.x_panel(step, n_steps, i)..][..n_steps * S::MR].as_ptr();
                    let b = self.w[j * n_steps * S::NR..][..n_steps * S::NR].as_ptr();
                    let at = ((i - self.panels.start) * w_panels + j) * S::MR * S::NR;
                    let sums = self.sums[at..][..S::MR * S::NR].as_mut_ptr();
                    let height = S::MR.min(self.tokens - i * S::MR);
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

    /// Ends a tile with the epilogue: its row 0 is that of `token`, its column 0 that of row `col` of the block.
    ///
    /// # Safety
    /// That of [`Simd`]; `sums` is a tile.
    #[inline(always)]
    unsafe fn finish<S: Simd>(&self, token: usize, height: usize, col: usize, sums: *const f32) {
        let width = S::NR.min(self.block.n_rows - col);
        for i in 0..height {
            for j in (0..width).step_by(S::LANES) {
                // SAFETY: the caller's; this task alone writes the columns of its block.
                unsafe {
                    let r = S::load(sums.add(i * S::NR + j));
                    self.out.finish::<S>(token + i, self.block.col + col + j, S::LANES.min(width - j), r);
                }
            }
        }
    }
}
