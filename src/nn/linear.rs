//! Linear layers: the one place that knows how a weight is stored.

use crate::error::Result;
use crate::ops::{Epilogue, Ops, Weight};
use crate::tensor::Tensor;

/// y = x·Wᵀ + b
#[derive(Debug)]
pub struct Linear {
    /// `[n, k]`, possibly in several parts
    pub weight: Weight,
    /// f32 `[n]`
    pub bias: Option<Tensor>,
}

impl Linear {
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
        ops.linear(y, x, &self.weight, self.bias.as_ref(), epilogue)
    }
}
