//! [`Hessian`] of a linear layer's output error, and the triangle that GPTQ needs of it.
//!
//! ```text
//! H = Σ x·xᵀ          over the inputs x of the layer: ‖X·(W − Ŵ)ᵀ‖² = Σ over rows e of W − Ŵ of  e·H·eᵀ
//! H + δ·1 = Lᵀ·L      L lower triangular, δ = 1 % of the mean of H's diagonal
//! ```
//!
//! All that is cubic runs as products of the device, on panels of 128 rows of which only the lower triangle is kept: for k = 11008 (the
//! down matrix of a 7B model) H takes 245 MB, and so does L, which takes its place panel by panel. Factoring k = 11008 is k³/3 =
//! 4.4·10¹¹ multiply-adds: a few seconds on a server, half a minute on two cores.

use std::sync::Arc;

use super::Machine;
use super::round::LARGEST_GROUP;
use crate::cpu::pool::Disjoint;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::{Epilogue, Ops, Weight};
use crate::tensor::Tensor;

/// Rows of a panel: no group of a packed matrix leaves one, and a product of such panels is worth a launch.
pub const PANEL: usize = LARGEST_GROUP;
/// δ as a share of the mean of the diagonal, as in the paper.
const DAMPING: f64 = 0.01;
/// Columns of a panel that one task solves for: they stay in L1 with a row of factors.
const SOLVED_COLUMNS: usize = 256;

/// H `[k, k]`, f32, below and on its diagonal.
pub struct Hessian {
    k: usize,
    /// Panel J: `[rows of J, columns up to J's end]`.
    panels: Vec<Tensor>,
}

/// L `[k, k]`, in panels.
pub struct Factor {
    k: usize,
    /// Of panel J: the transpose of its part on the diagonal, `[rows of J, rows of J]`, upper triangular.
    pub diagonal: Vec<Tensor>,
    /// Of panel J: its parts `[rows of J, rows of I]` for I < J.
    pub below: Vec<Vec<Arc<Tensor>>>,
}

/// First row and rows of panel J.
fn panel_rows(k: usize, panel: usize) -> (usize, usize) {
    (panel * PANEL, PANEL.min(k - panel * PANEL))
}

impl Hessian {
    /// Zero.
    pub fn new(k: usize) -> Self {
        let panel = |j| {
            let (first, n) = panel_rows(k, j);
            Tensor::zeros(&[n, first + n], DType::F32)
        };
        Self { k, panels: (0..k.div_ceil(PANEL)).map(panel).collect() }
    }

    /// H += Σ x·xᵀ over the rows of x f32 `[tokens, k]`.
    pub fn add(&mut self, machine: &Machine, x: &Tensor) -> Result<()> {
        let tokens = x.rows();
        if tokens == 0 {
            return Ok(());
        }
        let columns = |j| {
            let (first, n) = panel_rows(self.k, j);
            Arc::new(transposed(x, first, n))
        };
        let columns: Vec<Arc<Tensor>> = (0..self.panels.len()).map(columns).collect();
        for (j, panel) in self.panels.iter_mut().enumerate() {
            let weight = Weight::stacked(columns[..=j].to_vec())?;
            machine.ops.linear(panel, &columns[j], &weight, None, Epilogue::Add)?;
        }
        Ok(())
    }

    /// The mean of the diagonal.
    fn mean_diagonal(&self) -> f64 {
        let of_panel = |(j, panel): (usize, &Tensor)| {
            let (first, n) = panel_rows(self.k, j);
            let values = panel.as_slice::<f32>();
            (0..n).map(|i| f64::from(values[i * (first + n) + first + i])).sum::<f64>()
        };
        self.panels.iter().enumerate().map(of_panel).sum::<f64>() / self.k as f64
    }

    /// L with Lᵀ·L = H + δ·1, from the last panel up: what is left of H above it loses Lᵀ·L of the panel's rows.
    ///
    /// # Errors
    /// If H is not positive: its inputs were not finite, or far too large.
    pub fn factor(mut self, machine: &Machine) -> Result<Factor> {
        let mean = self.mean_diagonal();
        if !mean.is_finite() {
            return Err(Error::check("hessian", "the inputs are not finite numbers"));
        }
        // Without any input all roundings are as good: those of 1.
        let damping = if mean > 0.0 { DAMPING * mean } else { 1.0 };
        let mut factor = Factor { k: self.k, diagonal: Vec::new(), below: Vec::new() };
        for j in (0..self.panels.len()).rev() {
            let mut panel = self.panels.pop().expect("one for each j");
            let (first, n) = panel_rows(self.k, j);
            let width = first + n;
            let diagonal = solve_diagonal(panel.as_slice(), width, first, damping)?;
            solve_below(machine, panel.as_mut_slice(), width, first, &diagonal);
            let parts = |i| panel_rows(self.k, i);
            let below: Vec<Arc<Tensor>> = (0..j).map(|i| Arc::new(cut(&panel, parts(i).0, parts(i).1))).collect();
            let upper: Vec<Arc<Tensor>> = (0..j).map(|i| Arc::new(transposed(&panel, parts(i).0, parts(i).1))).collect();
            for (i, rest) in self.panels.iter_mut().enumerate() {
                let negative: Vec<f32> = upper[i].as_slice::<f32>().iter().map(|l| -l).collect();
                let negative = Tensor::from_slice(upper[i].shape(), &negative);
                let weight = Weight::stacked(upper[..=i].to_vec())?;
                machine.ops.linear(rest, &negative, &weight, None, Epilogue::Add)?;
            }
            factor.diagonal.push(diagonal);
            factor.below.push(below);
        }
        factor.diagonal.reverse();
        factor.below.reverse();
        Ok(factor)
    }
}

impl Factor {
    /// First row and rows of panel J.
    pub fn panel(&self, j: usize) -> (usize, usize) {
        panel_rows(self.k, j)
    }
}

/// The part of L on the diagonal of the panel whose rows of `width` begin with row `first` of H, transposed; in f64, since all that is
/// above it is divided by it.
fn solve_diagonal(panel: &[f32], width: usize, first: usize, damping: f64) -> Result<Tensor> {
    let n = width - first;
    let mut l: Vec<f64> = (0..n * n).map(|i| f64::from(panel[i / n * width + first + i % n])).collect();
    for r in (0..n).rev() {
        l[r * n + r] += damping;
        let (rows, solved) = l.split_at_mut((r + 1) * n);
        let row = &mut rows[r * n..][..r + 1];
        for below in solved.chunks_exact(n) {
            let factor = below[r];
            row.iter_mut().zip(below).for_each(|(x, l)| *x -= factor * l);
        }
        let pivot = row[r];
        let is_positive = pivot > 0.0 && pivot.is_finite();
        if !is_positive {
            return Err(Error::check("hessian", format!("it is not positive at {}: the inputs are too large for f32", first + r)));
        }
        row.iter_mut().for_each(|x| *x /= pivot.sqrt());
    }
    let upper: Vec<f32> = (0..n * n).map(|i| if i / n <= i % n { l[i % n * n + i / n] as f32 } else { 0.0 }).collect();
    Ok(Tensor::from_slice(&[n, n], &upper))
}

/// The part of L left of the diagonal, in place of that of H: row r is what is left of H's after the rows below it, over L's diagonal.
fn solve_below(machine: &Machine, panel: &mut [f32], width: usize, first: usize, diagonal: &Tensor) {
    let n = width - first;
    let upper = diagonal.as_slice::<f32>();
    let panel = Disjoint::new(panel);
    machine.pool.run(first.div_ceil(SOLVED_COLUMNS), &|task| {
        let start = task * SOLVED_COLUMNS;
        let len = SOLVED_COLUMNS.min(first - start);
        for r in (0..n).rev() {
            // SAFETY: a task has columns of its own, and of these this is the only row that is written while others are read.
            let row = unsafe { panel.slice(r * width + start, len) };
            for s in r + 1..n {
                // SAFETY: as above; s is another row.
                let below = unsafe { &*panel.slice(s * width + start, len) };
                let factor = upper[r * n + s];
                row.iter_mut().zip(below).for_each(|(x, l)| *x -= factor * l);
            }
            let inverse = 1.0 / upper[r * n + r];
            row.iter_mut().for_each(|x| *x *= inverse);
        }
    });
}

/// Columns `first..first + n` of a matrix.
fn cut(matrix: &Tensor, first: usize, n: usize) -> Tensor {
    let rows = matrix.as_slice::<f32>().chunks_exact(matrix.row_len());
    let values: Vec<f32> = rows.flat_map(|row| &row[first..first + n]).copied().collect();
    Tensor::from_slice(&[matrix.rows(), n], &values)
}

/// Columns `first..first + n` of a matrix, as rows.
fn transposed(matrix: &Tensor, first: usize, n: usize) -> Tensor {
    let (rows, width) = (matrix.rows(), matrix.row_len());
    let mut columns = Tensor::zeros(&[n, rows], DType::F32);
    let to = columns.as_mut_slice::<f32>();
    for (i, row) in matrix.as_slice::<f32>().chunks_exact(width).enumerate() {
        for (j, x) in row[first..first + n].iter().enumerate() {
            to[j * rows + i] = *x;
        }
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::super::test_support::{correlated, machine};
    use super::*;

    /// H [k, k] as f64, in full.
    fn full(hessian: &Hessian) -> Vec<f64> {
        let k = hessian.k;
        let mut h = vec![0.0; k * k];
        for (j, panel) in hessian.panels.iter().enumerate() {
            let (first, n) = panel_rows(k, j);
            for (i, row) in panel.as_slice::<f32>().chunks_exact(first + n).enumerate() {
                for (col, &x) in row.iter().enumerate() {
                    (h[(first + i) * k + col], h[col * k + first + i]) = (f64::from(x), f64::from(x));
                }
            }
        }
        h
    }

    #[test]
    fn sums_and_factors_are_those_of_naive_f64() {
        let machine = machine();
        for (k, tokens) in [(32, 40), (128, 7), (160, 300), (416, 500)] {
            let x = correlated(tokens, k, 1);
            let mut hessian = Hessian::new(k);
            let (values, some) = (x.to_f32(), tokens / 3);
            // In two parts, as rows of a data set come.
            for (from, to) in [(0, some), (some, tokens)] {
                hessian.add(&machine, &Tensor::from_slice(&[to - from, k], &values[from * k..to * k])).unwrap();
            }
            let got = full(&hessian);
            let mut expected = vec![0.0; k * k];
            for row in values.chunks_exact(k) {
                for (i, j) in (0..k).flat_map(|i| (0..k).map(move |j| (i, j))) {
                    expected[i * k + j] += f64::from(row[i]) * f64::from(row[j]);
                }
            }
            let mean = (0..k).map(|i| expected[i * k + i]).sum::<f64>() / k as f64;
            let off = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / mean;
            assert!(off(&got, &expected) < 1e-5, "H of {k}: off by {} of its mean diagonal", off(&got, &expected));

            let factor = hessian.factor(&machine).unwrap();
            let mut l = vec![0.0; k * k];
            for (j, (diagonal, below)) in factor.diagonal.iter().zip(&factor.below).enumerate() {
                let (first, n) = factor.panel(j);
                for (r, c) in (0..n).flat_map(|r| (0..=r).map(move |c| (r, c))) {
                    l[(first + r) * k + first + c] = f64::from(diagonal.as_slice::<f32>()[c * n + r]);
                }
                for (i, part) in below.iter().enumerate() {
                    let (first_col, width) = factor.panel(i);
                    for (at, &x) in part.as_slice::<f32>().iter().enumerate() {
                        l[(first + at / width) * k + first_col + at % width] = f64::from(x);
                    }
                }
            }
            let mut product = vec![0.0; k * k];
            for row in l.chunks_exact(k) {
                for (i, j) in (0..k).flat_map(|i| (0..k).map(move |j| (i, j))) {
                    product[i * k + j] += row[i] * row[j];
                }
            }
            (0..k).for_each(|i| expected[i * k + i] += DAMPING * mean);
            let off = off(&product, &expected);
            assert!(off < 1e-4, "Lᵀ·L of {k}: off by {off} of the mean diagonal");
        }
    }

    #[test]
    fn no_inputs_and_inputs_that_are_no_numbers() {
        let machine = machine();
        let factor = Hessian::new(160).factor(&machine).unwrap();
        assert!(factor.diagonal[1].as_slice::<f32>().iter().enumerate().all(|(i, &x)| x == f32::from(u8::from(i / 32 == i % 32))));
        for bad in [f32::NAN, f32::INFINITY, 1e30] {
            let mut hessian = Hessian::new(32);
            let mut values = vec![1.0; 64];
            values[40] = bad;
            hessian.add(&machine, &Tensor::from_slice(&[2, 32], &values)).unwrap();
            assert!(hessian.factor(&machine).is_err_and(|e| e.to_string().contains("inputs")));
        }
    }
}
