//! Normalisation layers.

use super::param::{Param, VisitParams};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::Ops;
use crate::ops::grad::GradOps;
use crate::tensor::Tensor;

/// y = x·w / sqrt(mean(x²) + eps)
#[derive(Debug)]
pub struct RmsNorm {
    /// f32 `[hidden]`
    pub weight: Tensor,
    /// Added to the mean square.
    pub eps: f32,
    /// Where the gradient of the weight adds up, if it is trained.
    pub grad: Option<Tensor>,
}

impl RmsNorm {
    /// x, y `[tokens, hidden]`
    pub fn forward(&self, ops: &dyn Ops, y: &mut Tensor, x: &Tensor) -> Result<()> {
        ops.rms_norm(y, x, &self.weight, self.eps)
    }

    /// dx += the gradient by x; that of the weight too, if it is trained: dx, dy, x `[tokens, hidden]`.
    pub fn backward(&mut self, ops: &dyn GradOps, dx: &mut Tensor, dy: &Tensor, x: &Tensor) -> Result<()> {
        ops.rms_norm_backward(dx, self.grad.as_mut(), dy, x, &self.weight, self.eps)
    }

    /// Makes room for the gradient.
    pub fn train(&mut self, ops: &dyn Ops) -> Result<()> {
        self.grad = Some(ops.alloc(self.weight.shape(), DType::F32)?);
        Ok(())
    }

    /// Shows its weight, if it is trained.
    pub fn visit(&mut self, name: &str, visit: VisitParams<'_>) -> Result<()> {
        let Some(grad) = &mut self.grad else { return Ok(()) };
        visit(Param { name: &format!("{name}.weight"), value: &mut self.weight, grad, rounded: None })
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
    /// Where the gradients of weight and bias add up, if they are trained.
    pub grad: Option<[Tensor; 2]>,
}

impl LayerNorm {
    /// x, y `[tokens, hidden]`
    pub fn forward(&self, ops: &dyn Ops, y: &mut Tensor, x: &Tensor) -> Result<()> {
        ops.layer_norm(y, x, &self.weight, &self.bias, self.eps)
    }

    /// dx += the gradient by x; those of weight and bias too, if they are trained: dx, dy, x `[tokens, hidden]`.
    pub fn backward(&mut self, ops: &dyn GradOps, dx: &mut Tensor, dy: &Tensor, x: &Tensor) -> Result<()> {
        ops.layer_norm_backward(dx, self.grad.as_mut().map(|grad| grad.each_mut()), dy, x, &self.weight, self.eps)
    }

    /// Makes room for the gradients.
    pub fn train(&mut self, ops: &dyn Ops) -> Result<()> {
        let gradient = || ops.alloc(self.weight.shape(), DType::F32);
        self.grad = Some([gradient()?, gradient()?]);
        Ok(())
    }

    /// Shows its weight and bias, if they are trained.
    pub fn visit(&mut self, name: &str, visit: VisitParams<'_>) -> Result<()> {
        let Some([weight, bias]) = &mut self.grad else { return Ok(()) };
        visit(Param { name: &format!("{name}.weight"), value: &mut self.weight, grad: weight, rounded: None })?;
        visit(Param { name: &format!("{name}.bias"), value: &mut self.bias, grad: bias, rounded: None })
    }
}
