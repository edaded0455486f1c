//! Launches of `kernels/gemm.cu` and `kernels/gemv.cu`.

use super::Cuda;
use crate::error::{Error, Result};
use crate::ops::{Epilogue, Weight};
use crate::tensor::Tensor;

impl Cuda {
    /// [`Ops::linear`](crate::ops::Ops::linear)
    pub(super) fn linear(&self, _y: &mut Tensor, _x: &Tensor, _w: &Weight, _bias: Option<&Tensor>, _e: Epilogue) -> Result<()> {
        Err(Error::Unsupported("linear has no kernel yet".into()))
    }
}
