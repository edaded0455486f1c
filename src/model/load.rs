//! From a checkpoint's tensors to layers on a device.

use std::sync::Arc;

use crate::dtype::DType;
use crate::error::Result;
use crate::nn::{LayerNorm, Linear, Lora, RmsNorm, Scratch};
use crate::ops::{Matrix, Ops, Packed, Weight};
use crate::tensor::Tensor;
use crate::weights::{LowRank, Source};

/// Takes tensors out of a checkpoint by their canonical names and puts them on a device.
pub struct Loader<'a> {
    /// The device.
    pub ops: &'a dyn Ops,
    /// The checkpoint.
    pub weights: &'a dyn Source,
    /// What matrices are converted to; `None` keeps each as it is stored, mapped and not copied.
    pub dtype: Option<DType>,
    /// What low-rank additions work in.
    scratch: Scratch,
}

impl<'a> Loader<'a> {
    /// From `weights` to the device `ops`; `dtype` as in the field of that name.
    pub fn new(ops: &'a dyn Ops, weights: &'a dyn Source, dtype: Option<DType>) -> Self {
        Self { ops, weights, dtype, scratch: Scratch::default() }
    }

    /// A matrix or table of this shape.
    pub fn matrix(&self, name: &str, shape: &[usize]) -> Result<Arc<Tensor>> {
        // What learns keeps all its bits, whatever the device computes in.
        let dtype = self.dtype.map(|dtype| if self.weights.learns(name) { DType::F32 } else { dtype });
        Ok(Arc::new(self.place(self.weights.tensor(name, shape)?, dtype)?))
    }

    /// Brings a matrix to the device, converted if it must be.
    fn place(&self, tensor: Tensor, dtype: Option<DType>) -> Result<Tensor> {
        self.ops.upload(match dtype {
            Some(dtype) if dtype != tensor.dtype() => tensor.converted(dtype),
            _ => tensor,
        })
    }

    /// A bias, norm weight or small table: widened to f32, in which it costs nothing.
    pub fn vector(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.ops.upload(self.weights.tensor(name, shape)?.converted(DType::F32))
    }

    /// y = x·Wᵀ: the matrices `prefix.{name}.weight`, `[n, k]` each, stacked.
    pub fn linear(&self, prefix: &str, parts: &[(&str, usize)], k: usize) -> Result<Linear> {
        let names: Vec<_> = parts.iter().map(|(name, _)| format!("{prefix}.{name}")).collect();
        let matrices = names.iter().zip(parts).map(|(name, (_, n))| self.module(name, *n, k)).collect::<Result<_>>()?;
        self.with_lora(Linear::new(Weight::of(matrices)?, None), &names)
    }

    /// The layer, with what is added to its parts, which are the modules `names`.
    pub fn with_lora(&self, mut linear: Linear, names: &[String]) -> Result<Linear> {
        let mut first_col = 0;
        for (part, (name, matrix)) in names.iter().zip(&linear.weight.parts).enumerate() {
            if let Some(low_rank) = self.weights.low_rank(name, matrix.n(), matrix.k())? {
                linear.lora.push(self.lora(part, first_col, low_rank)?);
            }
            first_col += matrix.n();
        }
        Ok(linear)
    }

    /// One that learns is f32 and keeps its scale apart; else that is multiplied into B.
    fn lora(&self, part: usize, first_col: usize, low_rank: LowRank) -> Result<Lora> {
        let scratch = self.scratch.clone();
        match low_rank.learned {
            None => {
                let b = low_rank.scaled_b();
                Lora::new(part, first_col, self.place(low_rank.a, self.dtype)?, self.place(b, self.dtype)?, scratch)
            }
            Some(learned) => {
                let LowRank { a, b, scale, .. } = low_rank;
                let mut lora = Lora::new(part, first_col, self.ops.upload(a)?, self.ops.upload(b)?, scratch)?;
                lora.learn(scale, learned.dropout, learned.seed);
                Ok(lora)
            }
        }
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
