//! AWQ (Lin et al., arXiv 2306.00978): weights that meet large inputs are scaled up before they are rounded, so that they are rounded more
//! finely, and whatever makes those inputs is scaled down by as much.
//!
//! ```text
//! W·x = (W·diag(s))·(x/s),   s_j = mean|x_j|^α, over the root of the largest times the smallest
//! ```
//!
//! α is the one of a grid whose rounding changes W·x least on sampled inputs. The paper's search for the clipping range is that of
//! [`round`](super::round), for the output instead of the weights: an error counts by the mean square of the inputs that it meets.

use super::Machine;
use super::inputs::Inputs;
use super::round::{self, ROWS_PER_TASK};
use crate::cpu::pool::Pool;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::packed::Format;
use crate::tensor::Tensor;

/// Values of α: 0, 1/20, …, 19/20.
const GRID: usize = 20;
/// Inputs that hardly ever are anything but 0 count as this, so that their weights do not vanish.
const SMALLEST: f64 = 1e-4;

/// How a matrix is scaled before it is packed: W' = diag(1/rows)·W·diag(columns).
#[derive(Clone, Debug, Default)]
pub struct Fold {
    /// `[n]`; none for ones.
    pub rows: Option<Vec<f32>>,
    /// `[k]`; none for ones.
    pub columns: Option<Vec<f32>>,
}

impl Fold {
    /// W' of W, f32 `[n, k]`.
    pub fn apply(&self, pool: &Pool, matrix: &Tensor) -> Tensor {
        self.scaled(pool, matrix, |w, row, column| w / row * column)
    }

    /// W of W'.
    pub fn undo(&self, pool: &Pool, matrix: &Tensor) -> Tensor {
        self.scaled(pool, matrix, |w, row, column| w * row / column)
    }

    fn scaled(&self, pool: &Pool, matrix: &Tensor, f: impl Fn(f32, f32, f32) -> f32 + Sync) -> Tensor {
        let mut scaled = matrix.converted(DType::F32);
        let k = matrix.row_len();
        pool.for_rows(scaled.as_mut_slice(), k, ROWS_PER_TASK, |first, rows| {
            for (i, row) in rows.chunks_exact_mut(k).enumerate() {
                let of_row = self.rows.as_ref().map_or(1.0, |rows| rows[first + i]);
                for (j, w) in row.iter_mut().enumerate() {
                    *w = f(*w, of_row, self.columns.as_ref().map_or(1.0, |columns| columns[j]));
                }
            }
        });
        scaled
    }
}

/// s `[k]` for matrices that share these inputs, each with its format.
///
/// # Errors
/// As [`round::pack`]; the inner result is a weight that cannot be packed.
pub fn search(machine: &Machine, matrices: &[(&Tensor, Format)], inputs: &Inputs) -> Result<Result<Vec<f32>, String>> {
    let (pool, magnitudes) = (&machine.pool, inputs.mean_magnitudes());
    let mut best = (f64::INFINITY, Vec::new());
    for step in 0..GRID {
        let scales = scales(&magnitudes, step as f64 / GRID as f64);
        let importance = inputs.importance(&scales);
        let fold = Fold { rows: None, columns: Some(scales) };
        let mut error = 0.0;
        for (matrix, format) in matrices {
            let packed = match round::pack_for(pool, machine.isa, &fold.apply(pool, matrix), *format, &importance) {
                Ok((packed, _)) => packed,
                // As they are, weights that can be packed at all are.
                Err(problem) if step == 0 => return Ok(Err(problem)),
                Err(_) => {
                    error = f64::INFINITY;
                    break;
                }
            };
            error += inputs.output_error(machine, matrix, &fold.undo(pool, &round::dense(pool, &packed)))?;
        }
        if error < best.0 {
            best = (error, fold.columns.unwrap_or_default());
        }
    }
    Ok(Ok(best.1))
}

/// s for one α.
fn scales(magnitudes: &[f64], alpha: f64) -> Vec<f32> {
    let powers: Vec<f64> = magnitudes.iter().map(|m| m.max(SMALLEST).powf(alpha)).collect();
    let (least, most) = powers.iter().fold((f64::INFINITY, 0f64), |(a, b), &x| (a.min(x), b.max(x)));
    powers.iter().map(|p| (p / (least * most).sqrt()) as f32).collect()
}

/// A norm's weights over s, in the dtype of its file, and the s that this really is.
pub fn fold_into_norm(norm: &Tensor, scales: &[f32]) -> (Tensor, Vec<f32>) {
    let weights = norm.to_f32();
    let over: Vec<f32> = weights.iter().zip(scales).map(|(w, s)| w / s).collect();
    let mut over = Tensor::from_slice(norm.shape(), &over).converted(norm.dtype()).to_f32();
    let mut real = Vec::with_capacity(weights.len());
    for (w, over) in weights.iter().zip(&mut over) {
        // What rounds to zero or beyond all numbers stays as it was.
        if *over == 0.0 || !over.is_finite() {
            *over = *w;
        }
        real.push(if *w == 0.0 { 1.0 } else { w / *over });
    }
    let folded = Tensor::from_slice(norm.shape(), &over);
    (folded.converted(norm.dtype()), real)
}

#[cfg(test)]
mod tests {
    use super::super::round::pack_for;
    use super::super::test_support::{correlated, machine, weights};
    use super::*;
    use half::f16;

    #[test]
    fn folding_is_undone() {
        let (machine, w) = (machine(), weights(20, 64, 1));
        let fold = Fold {
            rows: Some((0..20).map(|i| 0.5 + i as f32).collect()),
            columns: Some((0..64).map(|i| 1.0 / (1.0 + i as f32)).collect()),
        };
        let folded = fold.apply(&machine.pool, &w);
        let (values, scaled) = (w.as_slice::<f32>(), folded.as_slice::<f32>());
        assert!((scaled[3 * 64 + 5] / (values[3 * 64 + 5] / 3.5 / 6.0) - 1.0).abs() < 1e-6);
        let back = fold.undo(&machine.pool, &folded);
        assert!(back.as_slice::<f32>().iter().zip(values).all(|(a, b)| (a - b).abs() <= 1e-6 * b.abs()));
        let same = Fold::default().apply(&machine.pool, &w);
        assert_eq!(same.as_slice::<f32>(), values);
    }

    /// What is divided out of the norm's inputs is multiplied into the matrix exactly, whatever the norm's dtype makes of it.
    #[test]
    fn norms_and_scales_multiply_to_what_they_were() {
        let norm = Tensor::from_slice(&[5], &[1.0f32, 0.3, 0.0, -2.0, 1e-7].map(f16::from_f32));
        let (folded, real) = fold_into_norm(&norm, &[3.0, 0.7, 2.0, 5.5, 1000.0]);
        assert_eq!(folded.dtype(), DType::F16);
        for ((before, after), real) in norm.to_f32().iter().zip(folded.to_f32()).zip(&real) {
            assert!((after * real - before).abs() <= 1e-6 * before.abs(), "{before} became {after} times {real}");
        }
        assert!((real[0] / 3.0 - 1.0).abs() < 1e-3 && real[2] == 1.0 && real[4] == 1.0, "{real:?}");
    }

    /// Where inputs differ in size, the output's error is less than that of plain rounding: 0.82 and 0.87 of it.
    #[test]
    fn large_inputs_get_fine_weights() {
        let machine = machine();
        for (group, bound) in [(32, 0.86), (128, 0.91)] {
            let format = Format::new(4, group, false).unwrap();
            let (w, x) = (weights(96, 384, 7), correlated(1500, 384, 8));
            let mut inputs = Inputs::new(384, x.rows(), false);
            inputs.see(&machine, &x).unwrap();
            let error = |fold: &Fold, importance: &[f32]| {
                let scaled = fold.apply(&machine.pool, &w);
                let packed = pack_for(&machine.pool, machine.isa, &scaled, format, importance).unwrap().0;
                let rounded = fold.undo(&machine.pool, &round::dense(&machine.pool, &packed));
                inputs.output_loss(&machine, &w, &rounded).unwrap().relative()
            };
            let columns = search(&machine, &[(&w, format)], &inputs).unwrap().unwrap();
            let importance = inputs.importance(&columns);
            let awq = error(&Fold { rows: None, columns: Some(columns) }, &importance);
            let rtn = error(&Fold::default(), &[1.0; 384]);
            println!("{format}: {awq} of RTN's {rtn}: {}", awq / rtn);
            assert!(awq < bound * rtn, "{format}: {awq}, plain rounding {rtn}");
        }
    }
}
