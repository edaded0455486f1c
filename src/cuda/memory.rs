//! Tensors to and from a device.

use super::{Allocation, Cuda};
use crate::cuda::driver::DevicePtr;
use crate::cuda::launch::address;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::{Tensor, checked_len};

impl Cuda {
    /// A tensor on the device with anything in it, and where it is.
    fn reserve(&self, shape: &[usize], dtype: DType) -> Result<(Tensor, DevicePtr)> {
        let bytes = checked_len(shape).and_then(|n| n.checked_mul(dtype.size()));
        let bytes = bytes.ok_or_else(|| Error::shape("alloc", "shape", "a size below 2^64", shape))?;
        let ptr = self.driver.alloc(bytes)?;
        let memory = Allocation { driver: self.driver.clone(), ptr };
        Ok((Tensor::on_device(Box::new(memory), bytes, shape, dtype), ptr))
    }

    /// [`Ops::alloc`](crate::ops::Ops::alloc)
    pub(super) fn zeros(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let (tensor, ptr) = self.reserve(shape, dtype)?;
        // SAFETY: it was just reserved with that many bytes.
        unsafe { self.driver.clear(ptr, tensor.bytes())? };
        Ok(tensor)
    }

    /// [`Ops::upload`](crate::ops::Ops::upload)
    pub(super) fn to_device(&self, tensor: Tensor) -> Result<Tensor> {
        if tensor.device_address().is_some() {
            return Ok(tensor);
        }
        let (copy, ptr) = self.reserve(tensor.shape(), tensor.dtype())?;
        // SAFETY: it was just reserved with that many bytes.
        unsafe { self.driver.upload(ptr, tensor.as_bytes())? };
        Ok(copy)
    }

    /// A copy of a device's tensor on the host, in its own dtype.
    pub(super) fn to_host(&self, tensor: &Tensor) -> Result<Tensor> {
        let ptr = address("download", "tensor", tensor)?;
        let mut copy = Tensor::zeros(tensor.shape(), tensor.dtype());
        // SAFETY: the tensor has that many bytes.
        unsafe { self.driver.download(copy.as_mut_bytes(), ptr)? };
        Ok(copy)
    }
}
