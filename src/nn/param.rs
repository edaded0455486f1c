//! [`Param`]: what an optimizer sees of a model, and what a matrix has beside itself while it is trained ([`TrainedMatrix`]).

use std::sync::Arc;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::{Matrix, Ops};
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
    /// What the model computes with, if that is not `value` itself: `value`, rounded to 16 bits.
    pub rounded: Option<&'a mut Tensor>,
}

impl Param<'_> {
    /// Gives it a value, f32, from the host.
    pub fn set(&mut self, ops: &dyn Ops, value: Tensor) -> Result<()> {
        if let Some(rounded) = &mut self.rounded {
            **rounded = ops.upload(value.converted(rounded.dtype()))?;
        }
        *self.value = ops.upload(value)?;
        Ok(())
    }
}

/// Called with each parameter that is trained, in an order that is always the same.
pub type VisitParams<'a> = &'a mut dyn FnMut(Param<'_>) -> Result<()>;

/// What a matrix has beside itself while it is trained.
#[derive(Debug)]
pub struct TrainedMatrix {
    /// Where its gradients add up, f32.
    pub grad: Tensor,
    /// The matrix in f32, of which the one that products read is rounded: 16 bits would lose steps that are small beside a weight
    /// (Micikevicius et al., arXiv 1710.03740, section 3.1). None if products read f32.
    master: Option<Tensor>,
}

impl TrainedMatrix {
    /// From now on `matrix` is trained, and products read it in `compute`. It gets its memory to itself: what is in a file is for reading
    /// only. Nothing of a matrix that comes in f32 is lost.
    ///
    /// # Errors
    /// If it is packed; if it has another owner, so that it cannot be changed.
    pub fn begin(ops: &dyn Ops, matrix: &mut Matrix, compute: DType) -> Result<Self> {
        let storage = matrix.storage();
        let Matrix::Dense(tensor) = matrix else {
            return Err(Error::Unsupported(format!("training a matrix in {storage}: its steps would be lost")));
        };
        let as_dtype = |tensor: &Tensor, dtype| Ok(Arc::new(ops.upload(ops.to_host(tensor)?.converted(dtype))?));
        if tensor.dtype() != DType::F32 || tensor.is_mapped() {
            let own = as_dtype(tensor, DType::F32)?;
            tensor.release(); // nobody reads the file's again before the end
            *tensor = own;
        }
        let grad = ops.alloc(tensor.shape(), DType::F32)?;
        if compute == DType::F32 {
            return Ok(Self { grad, master: None });
        }
        let rounded = as_dtype(tensor, compute)?;
        let master = Arc::into_inner(std::mem::replace(tensor, rounded));
        let master = master.ok_or_else(|| Error::Unsupported("training a matrix that another layer shares".into()))?;
        Ok(Self { grad, master: Some(master) })
    }

    /// Shows `matrix`, which it began with, as the parameter `name`.
    ///
    /// # Errors
    /// Those of `visit`; if the matrix has another owner, so that it cannot be changed.
    pub fn visit(&mut self, name: &str, matrix: &mut Matrix, visit: VisitParams<'_>) -> Result<()> {
        let shared = || Error::Unsupported(format!("training {name}, which another layer shares"));
        let Matrix::Dense(tensor) = matrix else { return Err(shared()) };
        let tensor = Arc::get_mut(tensor).ok_or_else(shared)?;
        let grad = &mut self.grad;
        match &mut self.master {
            Some(master) => visit(Param { name, value: master, grad, rounded: Some(tensor) }),
            None => visit(Param { name, value: tensor, grad, rounded: None }),
        }
    }
}
