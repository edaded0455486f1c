//! [`Param`]: what an optimizer sees of a model.

use crate::error::Result;
use crate::tensor::Tensor;

/// A parameter that is trained.
#[derive(Debug)]
pub struct Param<'a> {
    /// Its name in the canonical layout.
    pub name: &'a str,
    /// f32
    pub value: &'a mut Tensor,
    /// The gradient of the loss by it, f32, as large.
    pub grad: &'a mut Tensor,
}

/// Called with each parameter that is trained, in an order that is always the same.
pub type VisitParams<'a> = &'a mut dyn FnMut(Param<'_>) -> Result<()>;
