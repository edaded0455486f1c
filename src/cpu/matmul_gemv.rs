//! The linear layer for a few tokens: each row of W is read once, in its storage format, and met by all tokens.
//!
//! x is packed first, so that the tokens' vectors lie side by side (rows of a power of two would fall into one set of L1), and a chunk of
//! it stays in L1 while some rows of W pass by. A sum over a row is one vector of partial sums, which grows in the order of k and is
//! reduced at the end, so that a token's result is the same in any company.

#![allow(clippy::needless_range_loop)] // lanes, rows and columns are indexed alike, and unrolled

use super::matmul::{Block, Linear, SKINNY};
use super::pool::Pool;
use super::scratch::with_scratch;
use super::simd::{Isa, Kernel, MAX_LANES, Simd, Stored};

/// Weights of a task in bytes: small enough to share out evenly, large enough that a hand-over (some 100 ns) does not matter.
const TASK_BYTES: usize = 128 << 10;
/// Bytes of x that stay in L1 while the rows of a group pass by: half of it.
const X_BYTES: usize = 16 << 10;

/// y = epilogue(x·Wᵀ + bias) for up to [`SKINNY`] tokens.
pub fn gemv<E: Stored>(isa: Isa, pool: &Pool, op: &Linear<'_, E>) {
    let task_rows = (TASK_BYTES / (op.k * size_of::<E>())).clamp(1, 64).next_multiple_of(MAX_LANES);
    let blocks = op.blocks(task_rows);
    with_scratch(op.tokens * op.k.next_multiple_of(MAX_LANES), |packed| {
        isa.run(PackX { x: op.x, k: op.k, tokens: op.tokens, out: packed });
        let x = &*packed;
        pool.run(blocks.len(), &|i| isa.run(Task { op, x, block: blocks[i] }));
    });
}

/// out\[i / LANES\]\[t\]\[i % LANES\] = x\[t\]\[i\], the last vectors filled up with zeros.
struct PackX<'a> {
    x: &'a [f32],
    k: usize,
    tokens: usize,
    out: &'a mut [f32],
}

impl Kernel for PackX<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { x, k, tokens, out } = self;
        for (t, x) in x.chunks(k).enumerate().take(tokens) {
            for (from, to) in x.chunks(S::LANES).zip(out.chunks_exact_mut(tokens * S::LANES)) {
                let to = &mut to[t * S::LANES..][..S::LANES];
                to[..from.len()].copy_from_slice(from);
                to[from.len()..].fill(0.0);
            }
        }
    }
}

/// Rows of W times all tokens.
struct Task<'a, E> {
    op: &'a Linear<'a, E>,
    /// Packed x.
    x: &'a [f32],
    block: Block,
}

impl<E: Stored> Kernel for Task<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's. Rows at a time: enough sums to hide the latency of a fused multiply-add, and no more than there are
        // registers.
        unsafe {
            match self.op.tokens {
                1 => self.rows::<S, 4, 1>(),
                2 => self.rows::<S, 4, 2>(),
                3 => self.rows::<S, 2, 3>(),
                4 => self.rows::<S, 2, 4>(),
                5 => self.rows::<S, 1, 5>(),
                6 => self.rows::<S, 1, 6>(),
                7 => self.rows::<S, 1, 7>(),
                _ => self.rows::<S, 1, SKINNY>(),
            }
        }
    }
}

/// Partial sums of a row with `T` tokens.
type Sums<S, const T: usize> = [<S as Simd>::V; T];

impl<E: Stored> Task<'_, E> {
    /// The product for `T` tokens, `R` rows at a time, in groups of rows, whose results are written as vectors.
    ///
    /// The `R` rows stand as far apart as they can in the group: each is followed by its next, so that the processor reads `R` streams of
    /// several rows and not one of `R` short ones.
    ///
    /// # Safety
    /// That of [`Simd`]; there are `T` tokens.
    #[inline(always)]
    unsafe fn rows<S: Simd, const R: usize, const T: usize>(&self) {
        let Self { op, x, block } = self;
        let k = op.k;
        let weights = &op.parts[block.part][block.row * k..][..block.n_rows * k];
        // One token is bound by memory alone, and streams must not break off: x may come from L2.
        let chunk = if T == 1 { k.max(1) } else { X_BYTES / size_of::<f32>() / T / S::LANES * S::LANES };
        for group in (0..block.n_rows).step_by(MAX_LANES) {
            let n = MAX_LANES.min(block.n_rows - group);
            // SAFETY: rows and tokens are inside W and x, chunks inside k; columns of y belong to this task alone.
            unsafe {
                let mut sums = [[S::splat(0.0); T]; MAX_LANES];
                for start in (0..k).step_by(chunk) {
                    let len = chunk.min(k - start);
                    let w = weights.as_ptr().add(group * k + start);
                    let x = x.as_ptr().add(start * T);
                    let apart = n / R;
                    for j in 0..apart {
                        add_dots::<S, E, R, T>(&mut sums[j..], apart, len, k, w.add(j * k), x);
                    }
                    for j in apart * R..n {
                        add_dots::<S, E, 1, T>(&mut sums[j..], 1, len, k, w.add(j * k), x);
                    }
                }
                for token in 0..T {
                    let mut row = [0.0; MAX_LANES];
                    for j in 0..n {
                        row[j] = S::reduce_add(sums[j][token]);
                    }
                    for j in (0..n).step_by(S::LANES) {
                        op.out.finish::<S>(token, block.col + group + j, S::LANES.min(n - j), S::load(row.as_ptr().add(j)));
                    }
                }
            }
        }
    }
}

/// sums\[r·apart\]\[t\] += w\[r·apart\]\[i\]·x\[t\]\[i\], vector by vector, for r < `R` and i < `len`: rows of W are `k` long, x is packed.
///
/// # Safety
/// That of [`Simd`]; `sums` has these rows, w and x reach as far as said.
#[inline(always)]
unsafe fn add_dots<S: Simd, E: Stored, const R: usize, const T: usize>(
    sums: &mut [Sums<S, T>],
    apart: usize,
    len: usize,
    k: usize,
    w: *const E,
    x: *const f32,
) {
    // SAFETY: the caller's; vectors end at `len`.
    unsafe {
        let mut acc = [[S::splat(0.0); T]; R];
        for r in 0..R {
            acc[r] = sums[r * apart];
        }
        let whole = len - len % S::LANES;
        for i in (0..whole).step_by(S::LANES) {
            let mut xs = [S::splat(0.0); T];
            for t in 0..T {
                xs[t] = S::load(x.add(i * T + t * S::LANES));
            }
            for r in 0..R {
                let p = w.add(r * apart * k + i);
                // Fewer than four streams do not keep enough lines under way by themselves.
                if R < 4 {
                    S::prefetch(p.wrapping_add(k).cast());
                }
                let weight = E::load::<S>(p);
                for t in 0..T {
                    acc[r][t] = S::fma(weight, xs[t], acc[r][t]);
                }
            }
        }
        if whole < len {
            for r in 0..R {
                let weight = E::load_part::<S>(w.add(r * apart * k + whole), len - whole);
                for t in 0..T {
                    acc[r][t] = S::fma(weight, S::load(x.add(whole * T + t * S::LANES)), acc[r][t]);
                }
            }
        }
        for r in 0..R {
            sums[r * apart] = acc[r];
        }
    }
}
