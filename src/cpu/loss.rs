//! Cross-entropy and its gradient, in one pass over rows of logits.

use super::pool::{Disjoint, Pool};
use super::simd::{self, Isa, Kernel, Simd};

/// Terms of a sum that are added up in f32; sums of these are in f64.
const RUN: usize = 1024;

/// loss\[r\] = ln Σ exp(logits\[r\]) − logits\[r, labels\[r\]\]; logits\[r\] ← scale·(softmax(logits\[r\]) − onehot(labels\[r\])). Rows of `vocab`.
pub fn cross_entropy(isa: Isa, pool: &Pool, logits: &mut [f32], loss: &mut [f32], labels: &[u32], vocab: usize, scale: f32) {
    let loss = Disjoint::new(loss);
    pool.for_rows(logits, vocab, 1, |r, row| {
        // SAFETY: each row has one task.
        let loss = unsafe { loss.slice(r, 1) };
        loss[0] = isa.run(Row { row, label: labels[r] as usize, scale });
    });
}

/// One row; returns its loss.
struct Row<'a> {
    row: &'a mut [f32],
    label: usize,
    scale: f32,
}

impl Kernel for Row<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        let Self { row, label, scale } = self;
        let at_label = row[label];
        let n = row.len();
        let whole = n - n % S::LANES;
        let p = row.as_mut_ptr();
        // SAFETY: the instructions are there, says the caller; the row has n elements, `whole` of them in whole vectors.
        unsafe {
            let mut max = S::splat(f32::NEG_INFINITY);
            for i in (0..whole).step_by(S::LANES) {
                max = S::max(max, S::load(p.add(i)));
            }
            let mut max = S::reduce_max(max);
            for i in whole..n {
                max = max.max(*p.add(i));
            }
            let mut sum = 0.0f64;
            for start in (0..whole).step_by(RUN) {
                let mut part = S::splat(0.0);
                for i in (start..whole.min(start + RUN)).step_by(S::LANES) {
                    let e = simd::exp::<S>(S::sub(S::load(p.add(i)), S::splat(max)));
                    S::store(p.add(i), e);
                    part = S::add(part, e);
                }
                sum += f64::from(S::reduce_add(part));
            }
            if whole < n {
                let e = simd::exp::<S>(S::sub(S::load_part(p.add(whole), n - whole), S::splat(max)));
                S::store_part(p.add(whole), e, n - whole);
                for i in whole..n {
                    sum += f64::from(*p.add(i));
                }
            }
            let factor = S::splat((f64::from(scale) / sum) as f32);
            for i in (0..whole).step_by(S::LANES) {
                S::store(p.add(i), S::mul(S::load(p.add(i)), factor));
            }
            if whole < n {
                S::store_part(p.add(whole), S::mul(S::load_part(p.add(whole), n - whole), factor), n - whole);
            }
            *p.add(label) -= scale;
            (f64::from(max) - f64::from(at_label) + sum.ln()) as f32
        }
    }
}
