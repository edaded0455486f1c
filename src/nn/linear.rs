//! Linear layers: the one place that knows how a weight is stored.

use std::ops::Range;
use std::sync::Arc;

use super::lora::Lora;
use super::param::{Param, TrainedMatrix, VisitParams};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::grad::{GradOps, Update};
use crate::ops::{Epilogue, Matrix, Ops, Weight};
use crate::tensor::Tensor;

/// y = x·Wᵀ + b, and low-rank additions to that
#[derive(Debug)]
pub struct Linear {
    /// `[n, k]`, possibly in several parts
    pub weight: Weight,
    /// f32 `[n]`
    pub bias: Option<Tensor>,
    /// Where the gradients add up, if it is trained.
    pub grad: Option<LinearGrad>,
    /// Additions to parts of the weight, at most one to each.
    pub lora: Vec<Lora>,
}

/// Gradients of a linear layer, f32.
#[derive(Debug)]
pub struct LinearGrad {
    /// Of each part, `[n_i, k]`, with what it is rounded from.
    pub parts: Vec<TrainedMatrix>,
    /// `[n]`, if there is a bias.
    pub bias: Option<Tensor>,
}

impl Linear {
    /// Of these, not trained, without additions.
    pub fn new(weight: Weight, bias: Option<Tensor>) -> Self {
        Self { weight, bias, grad: None, lora: Vec::new() }
    }

    /// y = x·Wᵀ + b: x `[tokens, k]`, y `[tokens, n]`.
    pub fn forward(&self, ops: &dyn Ops, y: &mut Tensor, x: &Tensor) -> Result<()> {
        self.forward_with(ops, y, x, Epilogue::Store)
    }

    /// y += x·Wᵀ + b
    pub fn forward_add(&self, ops: &dyn Ops, y: &mut Tensor, x: &Tensor) -> Result<()> {
        self.forward_with(ops, y, x, Epilogue::Add)
    }

    /// y = epilogue(x·Wᵀ + b)
    pub fn forward_with(&self, ops: &dyn Ops, y: &mut Tensor, x: &Tensor, epilogue: Epilogue) -> Result<()> {
        match (self.lora.first(), epilogue) {
            // The function comes after the additions.
            (Some(lora), Epilogue::QuickGelu | Epilogue::Gelu) => {
                let mut r = ops.alloc(y.shape(), ops.activation_dtype())?;
                self.forward_with(ops, &mut r, x, Epilogue::Store)?;
                lora.scratch().activate(ops, y, r, epilogue)
            }
            _ => {
                ops.linear(y, x, &self.weight, self.bias.as_ref(), epilogue)?;
                self.lora.iter().try_for_each(|lora| lora.add(ops, y, x))
            }
        }
    }

    /// As [`Linear::forward`] of a layer without a bias, for a range of the parts: the columns of y that are theirs.
    pub fn forward_parts(&self, ops: &dyn Ops, y: &mut Tensor, x: &Tensor, parts: Range<usize>) -> Result<()> {
        ops.linear(y, x, &self.weight.select(parts.clone()), None, Epilogue::Store)?;
        self.lora.iter().filter(|lora| parts.contains(&lora.part)).try_for_each(|lora| lora.add(ops, y, x))
    }

    /// y = x·Wᵀ + b, or y += of it, in a training pass: additions that learn drop of x what the pass drops.
    pub fn forward_training(&self, ops: &dyn GradOps, y: &mut Tensor, x: &Tensor, update: Update) -> Result<()> {
        let epilogue = match update {
            Update::Set => Epilogue::Store,
            Update::Add => Epilogue::Add,
        };
        ops.linear(y, x, &self.weight, self.bias.as_ref(), epilogue)?;
        self.lora.iter().try_for_each(|lora| lora.add_training(ops, y, x))
    }

    /// dx = dy·W, if it is wanted; dW += dyᵀ·x and db += Σ dy, if the layer is trained: dy `[tokens, n]`, x, dx `[tokens, k]`.
    pub fn backward(&mut self, ops: &dyn GradOps, dx: Option<&mut Tensor>, dy: &Tensor, x: &Tensor) -> Result<()> {
        if let Some(grad) = &mut self.grad {
            let mut first_col = self.weight.first_col;
            for TrainedMatrix { grad: dw, .. } in &mut grad.parts {
                ops.linear_dw(dw, dy, first_col, x)?;
                first_col += dw.rows();
            }
            if let Some(db) = &mut grad.bias {
                ops.bias_backward(db, dy, self.weight.first_col)?;
            }
        }
        let mut dx = dx;
        if let Some(dx) = dx.as_deref_mut() {
            ops.linear_dx(dx, dy, &self.weight, Update::Set)?;
        }
        self.lora.iter_mut().try_for_each(|lora| lora.backward(ops, dx.as_deref_mut(), dy, x))
    }

    /// dx = dy·W: dy `[tokens, n]`, dx `[tokens, k]`.
    pub fn input_gradient(&self, ops: &dyn GradOps, dx: &mut Tensor, dy: &Tensor) -> Result<()> {
        ops.linear_dx(dx, dy, &self.weight, Update::Set)?;
        self.lora.iter().try_for_each(|lora| lora.add_input_gradient(ops, dx, &lora.d_hidden(ops, dy)?))
    }

    /// Makes room for gradients: from now on the layer is trained, and products read its matrix in `compute`.
    ///
    /// # Errors
    /// If its matrix is packed.
    pub fn train(&mut self, ops: &dyn Ops, compute: DType) -> Result<()> {
        let parts = self.weight.parts.iter_mut().map(|part| TrainedMatrix::begin(ops, part, compute)).collect::<Result<_>>()?;
        let bias = self.bias.as_ref().map(|b| ops.alloc(b.shape(), DType::F32)).transpose()?;
        self.grad = Some(LinearGrad { parts, bias });
        Ok(())
    }

    /// Makes packed parts dense and f32, so that they can be trained.
    pub fn unpack(&mut self, ops: &dyn Ops) -> Result<()> {
        for part in &mut self.weight.parts {
            if let Matrix::Packed(packed) = part {
                let host = packed.map(|tensor| ops.to_host(tensor))?;
                let dense = Tensor::from_slice(&[host.n, host.k], &host.to_f32());
                *part = Matrix::Dense(Arc::new(ops.upload(dense)?));
            }
        }
        Ok(())
    }

    /// Shows its parameters, those of additions first, if they are trained: part i is module `names[i]`.
    ///
    /// # Errors
    /// Those of `visit`; if a matrix has another owner, so that it cannot be changed.
    pub fn visit(&mut self, names: &[String], visit: VisitParams<'_>) -> Result<()> {
        self.lora.iter_mut().try_for_each(|lora| lora.visit(&names[lora.part], visit))?;
        let Some(grad) = &mut self.grad else { return Ok(()) };
        for ((part, trained), name) in self.weight.parts.iter_mut().zip(&mut grad.parts).zip(names) {
            trained.visit(&format!("{name}.weight"), part, visit)?;
        }
        if let (Some(value), Some(grad)) = (&mut self.bias, &mut grad.bias) {
            // One bias for all parts: Q, K and V of the vision tower have theirs in one tensor.
            visit(Param { name: &format!("{}.bias", names.join("+")), value, grad, rounded: None })?;
        }
        Ok(())
    }
}
