//! Sums over rows, for gradients of what all rows share: biases, norms, positions.

use std::ops::Range;

use super::pool::{Disjoint, Pool};
use super::scratch::with_scratch;

/// Rows whose sums one task makes. Fixed, so that results do not depend on the number of threads.
const ROWS: usize = 16;
/// Sums that one task adds up.
const WIDTH: usize = 1024;

/// sums\[i\] += Σ over all rows of what `of_block(rows, partial)` adds to partial\[i\] for its rows.
///
/// Each block of [`ROWS`] rows has partial sums of its own, which start at zero and are added up in order. `sums` may be empty, where only
/// the rows' own results are wanted.
pub fn sum_rows(pool: &Pool, n_rows: usize, sums: &mut [f32], of_block: impl Fn(Range<usize>, &mut [f32]) + Sync) {
    let width = sums.len();
    with_scratch(n_rows.div_ceil(ROWS) * width, |partials| {
        partials.fill(0.0);
        let out = Disjoint::new(partials);
        pool.run(n_rows.div_ceil(ROWS), &|i| {
            // SAFETY: each task has partial sums of its own.
            of_block(i * ROWS..n_rows.min((i + 1) * ROWS), unsafe { out.slice(i * width, width) });
        });
        let partials = &*out.into_inner();
        if width == 0 {
            return;
        }
        pool.for_rows(sums, 1, WIDTH, |first, sums| {
            for partial in partials.chunks_exact(width) {
                sums.iter_mut().zip(&partial[first..]).for_each(|(sum, p)| *sum += p);
            }
        });
    });
}

/// sums\[i\] += Σ_t rows\[t\]\[first_col + i\], rows of `stride`: the gradient of a bias.
pub fn sum_columns(pool: &Pool, sums: &mut [f32], rows: &[f32], stride: usize, first_col: usize) {
    let n_rows = rows.len() / stride.max(1);
    let width = sums.len();
    sum_rows(pool, n_rows, sums, |block, partial| {
        for row in block {
            let row = &rows[row * stride + first_col..][..width];
            partial.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        }
    });
}
