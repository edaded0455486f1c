//! RMSNorm and LayerNorm, forward and backward. Rows are independent: they are shared out among the threads.

use super::pool::{Disjoint, Pool};
use super::scratch::{carve, padded, with_scratch};
use super::sum_rows::{sum_columns, sum_rows};

/// Rows of one task: a few kB, so that a task outweighs handing it out.
const ROWS_PER_TASK: usize = 8;

/// Lanes of the partial sums: fixed, so that a result does not depend on the processor, and enough to fill vector registers.
const LANES: usize = 16;

/// Σ f(x_i) in [`LANES`] interleaved partial sums.
fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut partial = [0.0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail: f32 = chunks.remainder().iter().map(|&v| f(v)).sum();
    for chunk in chunks {
        for (p, &v) in partial.iter_mut().zip(chunk) {
            *p += f(v);
        }
    }
    partial.iter().sum::<f32>() + tail
}

/// Σ a_i·b_i, as [`sum`].
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut partial = [0.0f32; LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a.zip(b) {
        for i in 0..LANES {
            partial[i] += a[i] * b[i];
        }
    }
    partial.iter().sum::<f32>() + tail
}

/// y = x·w / sqrt(mean(x²) + eps), rows of `w.len()` (Zhang & Sennrich, arXiv 1910.07467; HF `LlamaRMSNorm`).
pub fn rms_norm(pool: &Pool, y: &mut [f32], x: &[f32], w: &[f32], eps: f32) {
    let hidden = w.len();
    pool.for_rows(y, hidden, ROWS_PER_TASK, |first, rows| {
        for (y, x) in rows.chunks_exact_mut(hidden).zip(x[first * hidden..].chunks_exact(hidden)) {
            let rstd = 1.0 / (sum(x, |v| v * v) / hidden as f32 + eps).sqrt();
            for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
                *y = x * rstd * w;
            }
        }
    });
}

/// y = (x − mean)·w / sqrt(var + eps) + b, rows of `w.len()`, var biased (Ba et al., arXiv 1607.06450; torch `LayerNorm`).
pub fn layer_norm(pool: &Pool, y: &mut [f32], x: &[f32], w: &[f32], b: &[f32], eps: f32) {
    let hidden = w.len();
    pool.for_rows(y, hidden, ROWS_PER_TASK, |first, rows| {
        for (y, x) in rows.chunks_exact_mut(hidden).zip(x[first * hidden..].chunks_exact(hidden)) {
            let mean = sum(x, |v| v) / hidden as f32;
            // A second pass over a row in cache: E[x²] − mean² would cancel where the mean is large.
            let rstd = 1.0 / (sum(x, |v| (v - mean) * (v - mean)) / hidden as f32 + eps).sqrt();
            for (((y, &x), &w), &b) in y.iter_mut().zip(x).zip(w).zip(b) {
                *y = (x - mean) * rstd * w + b;
            }
        }
    });
}

/// The gradient of [`rms_norm`]: with x̂ = x·rstd and g = dy ⊙ w,
///
/// ```text
/// dx += rstd·(g − x̂·mean(g ⊙ x̂))      dw += Σ_t dy ⊙ x̂
/// ```
pub fn rms_norm_backward(pool: &Pool, dx: &mut [f32], dw: Option<&mut [f32]>, dy: &[f32], x: &[f32], w: &[f32], eps: f32) {
    backward(pool, dx, dw, dy, x, w, eps, false);
}

/// The gradient of [`layer_norm`]: with x̂ = (x − mean)·rstd and g = dy ⊙ w,
///
/// ```text
/// dx += rstd·(g − mean(g) − x̂·mean(g ⊙ x̂))      dw += Σ_t dy ⊙ x̂      db += Σ_t dy
/// ```
pub fn layer_norm_backward(pool: &Pool, dx: &mut [f32], d_wb: Option<[&mut [f32]; 2]>, dy: &[f32], x: &[f32], w: &[f32], eps: f32) {
    let [dw, db] = d_wb.map_or([None, None], |d_wb| d_wb.map(Some));
    backward(pool, dx, dw, dy, x, w, eps, true);
    if let Some(db) = db {
        sum_columns(pool, db, dy, w.len(), 0);
    }
}

/// Both of them, but for db: means are taken off if `centered`, and else left where they are.
#[allow(clippy::too_many_arguments)] // the operands, and which norm it is
fn backward(pool: &Pool, dx: &mut [f32], dw: Option<&mut [f32]>, dy: &[f32], x: &[f32], w: &[f32], eps: f32, centered: bool) {
    let hidden = w.len();
    if hidden == 0 {
        return;
    }
    let (n_rows, inverse) = (x.len() / hidden, 1.0 / hidden as f32);
    let dx = Disjoint::new(dx);
    sum_rows(pool, n_rows, dw.unwrap_or_default(), |rows, dw| {
        with_scratch(2 * padded(hidden), |mut rest| {
            let (g, x_hat) = (carve(&mut rest, hidden), carve(&mut rest, hidden));
            for row in rows {
                let at = row * hidden..(row + 1) * hidden;
                let (dy, x) = (&dy[at.clone()], &x[at]);
                let mean = if centered { sum(x, |v| v) * inverse } else { 0.0 };
                let rstd = 1.0 / (sum(x, |v| (v - mean) * (v - mean)) * inverse + eps).sqrt();
                for i in 0..hidden {
                    (g[i], x_hat[i]) = (dy[i] * w[i], (x[i] - mean) * rstd);
                }
                let mean_g = if centered { sum(g, |v| v) * inverse } else { 0.0 };
                let slope = dot(g, x_hat) * inverse;
                // SAFETY: each row belongs to one block, and each block to one task.
                let dx = unsafe { dx.slice(row * hidden, hidden) };
                for i in 0..hidden {
                    dx[i] += rstd * (g[i] - mean_g - x_hat[i] * slope);
                }
                // Empty where no gradient of w is wanted.
                for ((dw, dy), x_hat) in dw.iter_mut().zip(dy).zip(&*x_hat) {
                    *dw += dy * x_hat;
                }
            }
        });
    });
}
