//! Normalisation layers.

use crate::error::Result;
use crate::ops::Ops;
use crate::tensor::Tensor;

/// y = x·w / sqrt(mean(x²) + eps)
#[derive(Debug)]
pub struct RmsNorm {
    /// f32 `[hidden]`
    pub weight: Tensor,
    /// Added to the mean square.
    pub eps: f32,
}

impl RmsNorm {
    /// x, y `[tokens, hidden]`
    pub fn forward(&self, ops: &dyn Ops, y: &mut Tensor, x: &Tensor) -> Result<()> {
        ops.rms_norm(y, x, &self.weight, self.eps)
    }
}

/// y = (x − mean)·w / sqrt(var + eps) + b
#[derive(Debug)]
pub struct LayerNorm {
    /// f32 `[hidden]`
    pub weight: Tensor,
    /// f32 `[hidden]`
    pub bias: Tensor,
    /// Added to the variance.
    pub eps: f32,
}

impl LayerNorm {
    /// x, y `[tokens, hidden]`
    pub fn forward(&self, ops: &dyn Ops, y: &mut Tensor, x: &Tensor) -> Result<()> {
        ops.layer_norm(y, x, &self.weight, &self.bias, self.eps)
    }
}
