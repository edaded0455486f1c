//! [`Inputs`]: what is remembered of the inputs of a linear layer while calibration data runs.

use std::sync::Arc;

use super::Machine;
use super::hessian::Hessian;
use super::round::{Loss, ROWS_PER_TASK};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::{Epilogue, Ops, Weight};
use crate::tensor::Tensor;

/// Inputs that are kept as they are, evenly spread: enough to tell one rounding from another, and 11 MB for k = 11008.
const SAMPLED_ROWS: usize = 256;

/// Importance of a column whose inputs are all 0, as a share of the mean.
const LEAST_IMPORTANCE: f64 = 1e-3;

/// Inputs x `[k]` of matrices that share them.
pub struct Inputs {
    n_seen: usize,
    /// Every how many tokens one is sampled.
    stride: usize,
    /// Σ |x|, `[k]`.
    magnitudes: Vec<f64>,
    /// Σ x², `[k]`.
    squares: Vec<f64>,
    sample: Vec<f32>, // [samples, k]
    /// Σ x·xᵀ, if it is wanted.
    pub hessian: Option<Hessian>,
}

impl Inputs {
    /// None yet, of `n_tokens` that will come, of width k.
    pub fn new(k: usize, n_tokens: usize, with_hessian: bool) -> Self {
        let stride = n_tokens.div_ceil(SAMPLED_ROWS).max(1);
        Self {
            n_seen: 0,
            stride,
            magnitudes: vec![0.0; k],
            squares: vec![0.0; k],
            sample: Vec::new(),
            hessian: with_hessian.then(|| Hessian::new(k)),
        }
    }

    /// Takes x f32 `[tokens, k]` in.
    pub fn see(&mut self, machine: &Machine, x: &Tensor) -> Result<()> {
        for row in x.as_slice::<f32>().chunks_exact(self.magnitudes.len()) {
            self.magnitudes.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(x.abs()));
            self.squares.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x).powi(2));
            if self.n_seen.is_multiple_of(self.stride) {
                self.sample.extend(row);
            }
            self.n_seen += 1;
        }
        self.hessian.as_mut().map_or(Ok(()), |hessian| hessian.add(machine, x))
    }

    /// An error that names the column of the first input that is no finite number.
    pub fn check(&self) -> Result<()> {
        match self.magnitudes.iter().position(|sum| !sum.is_finite()) {
            Some(column) => Err(Error::check("calibration", format!("an input in column {column} is no finite number"))),
            None => Ok(()),
        }
    }

    /// mean|x|, `[k]`.
    pub fn mean_magnitudes(&self) -> Vec<f64> {
        self.magnitudes.iter().map(|sum| sum / self.n_seen.max(1) as f64).collect()
    }

    /// mean x² of the inputs x/s, `[k]`: how much the columns of W·diag(s) matter to the output, as far as each by itself does. A little more
    /// than that, so that there is something of every group.
    pub fn importance(&self, scales: &[f32]) -> Vec<f32> {
        let mean = self.squares.iter().sum::<f64>() / self.squares.len() as f64;
        let share = |(x2, s): (&f64, &f32)| ((x2 / mean.max(f64::MIN_POSITIVE) + LEAST_IMPORTANCE) / f64::from(*s).powi(2)) as f32;
        self.squares.iter().zip(scales).map(share).collect()
    }

    /// ‖X·(W − Ŵ)ᵀ‖² over the sampled inputs X, of matrices `[n, k]`; Ŵ is f32.
    pub fn output_error(&self, machine: &Machine, matrix: &Tensor, rounded: &Tensor) -> Result<f64> {
        let mut error = matrix.converted(DType::F32);
        let (k, rounded) = (matrix.row_len(), rounded.as_slice::<f32>());
        machine.pool.for_rows(error.as_mut_slice(), k, ROWS_PER_TASK, |first, rows| {
            rows.iter_mut().zip(&rounded[first * k..]).for_each(|(w, r)| *w -= r);
        });
        self.output_squares(machine, error)
    }

    /// The same, and ‖X·Wᵀ‖².
    pub fn output_loss(&self, machine: &Machine, matrix: &Tensor, rounded: &Tensor) -> Result<Loss> {
        let total = self.output_squares(machine, matrix.converted(DType::F32))?;
        Ok(Loss { error: self.output_error(machine, matrix, rounded)?, total })
    }

    /// ‖X·Wᵀ‖²
    fn output_squares(&self, machine: &Machine, matrix: Tensor) -> Result<f64> {
        let k = self.magnitudes.len();
        let x = Tensor::from_slice(&[self.sample.len() / k, k], &self.sample);
        let mut y = Tensor::zeros(&[x.rows(), matrix.rows()], DType::F32);
        machine.ops.linear(&mut y, &x, &Weight::stacked(vec![Arc::new(matrix)])?, None, Epilogue::Store)?;
        Ok(y.as_slice::<f32>().iter().map(|&y| f64::from(y).powi(2)).sum())
    }
}
