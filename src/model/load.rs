//! From a checkpoint's tensors to layers on a device.

use std::sync::Arc;

use crate::dtype::DType;
use crate::error::Result;
use crate::nn::{LayerNorm, Linear, RmsNorm};
use crate::ops::{Matrix, Ops, Packed, Weight};
use crate::tensor::Tensor;
use crate::weights::Source;

/// Takes tensors out of a checkpoint by their canonical names and puts them on a device.
pub struct Loader<'a> {
    /// The device.
    pub ops: &'a dyn Ops,
    /// The checkpoint.
    pub weights: &'a dyn Source,
    /// What matrices are converted to; `None` keeps each as it is stored, mapped and not copied.
    pub dtype: Option<DType>,
}

impl Loader<'_> {
    /// A matrix or table of this shape.
    pub fn matrix(&self, name: &str, shape: &[usize]) -> Result<Arc<Tensor>> {
        let tensor = self.weights.tensor(name, shape)?;
        let tensor = match self.dtype {
            Some(dtype) if dtype != tensor.dtype() => tensor.converted(dtype),
            _ => tensor,
        };
        Ok(Arc::new(self.ops.upload(tensor)?))
    }

    /// A bias, norm weight or small table: widened to f32, in which it costs nothing.
    pub fn vector(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.ops.upload(self.weights.tensor(name, shape)?.converted(DType::F32))
    }

    /// y = x·Wᵀ: the matrices `prefix.{name}.weight`, `[n, k]` each, stacked.
    pub fn linear(&self, prefix: &str, parts: &[(&str, usize)], k: usize) -> Result<Linear> {
        let matrices = parts.iter().map(|(name, n)| self.module(&format!("{prefix}.{name}"), *n, k)).collect::<Result<_>>()?;
        Ok(Linear::new(Weight::of(matrices)?, None))
    }

    /// The matrix `[n, k]` of a module, as it is stored.
    pub fn module(&self, name: &str, n: usize, k: usize) -> Result<Matrix> {
        Ok(match self.weights.packed(name, n, k)? {
            Some(Packed { words, scales, offsets, .. }) => {
                let up = |tensor| self.ops.upload(tensor);
                Matrix::Packed(Arc::new(Packed::new(n, k, up(words)?, up(scales)?, offsets.map(up).transpose()?)?))
            }
            None => Matrix::Dense(self.matrix(&format!("{name}.weight"), &[n, k])?),
        })
    }

    /// y = x·Wᵀ + b: as [`Loader::linear`], with the biases `prefix.{name}.bias`.
    pub fn linear_bias(&self, prefix: &str, parts: &[(&str, usize)], k: usize) -> Result<Linear> {
        let mut bias = Vec::new();
        for (name, n) in parts {
            bias.extend(self.weights.tensor(&format!("{prefix}.{name}.bias"), &[*n])?.to_f32());
        }
        let bias = self.ops.upload(Tensor::from_slice(&[bias.len()], &bias))?;
        Ok(Linear { bias: Some(bias), ..self.linear(prefix, parts, k)? })
    }

    /// The RMS norm `name.weight`.
    pub fn rms_norm(&self, name: &str, hidden_size: usize, eps: f32) -> Result<RmsNorm> {
        Ok(RmsNorm { weight: self.vector(&format!("{name}.weight"), &[hidden_size])?, eps, grad: None })
    }

    /// The layer norm `name.weight`, `name.bias`.
    pub fn layer_norm(&self, name: &str, hidden_size: usize, eps: f32) -> Result<LayerNorm> {
        let weight = self.vector(&format!("{name}.weight"), &[hidden_size])?;
        Ok(LayerNorm { weight, bias: self.vector(&format!("{name}.bias"), &[hidden_size])?, eps, grad: None })
    }
}
