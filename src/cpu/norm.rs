//! RMSNorm and LayerNorm. Rows are independent: they are shared out among the threads.

use super::pool::Pool;

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
