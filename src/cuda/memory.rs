//! Memory of a device: taken from the driver once, and handed on from tensor to tensor.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::Cuda;
use super::driver::{DevicePtr, Driver};
use super::launch::address;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::{DeviceMemory, Tensor, checked_len};

/// What a device's tensors lie in. The driver is asked only for sizes that nobody has given back, so that a model that has answered once
/// allocates nothing more; all goes back to the driver when the device and its tensors are gone.
pub(super) struct Arena {
    driver: Arc<dyn Driver>,
    /// Memory not in use, by its size in bytes.
    free: Mutex<HashMap<usize, Vec<DevicePtr>>>,
}

impl Arena {
    pub fn new(driver: Arc<dyn Driver>) -> Arc<Self> {
        Arc::new(Self { driver, free: Mutex::default() })
    }

    /// `bytes` with anything in them. Launches that are queued may still use them: flush before they are written.
    pub fn alloc(self: &Arc<Self>, bytes: usize) -> Result<Allocation> {
        let found = self.free.lock().unwrap_or_else(PoisonError::into_inner).get_mut(&bytes).and_then(Vec::pop);
        let ptr = found.map_or_else(|| self.driver.alloc(bytes), Ok)?;
        Ok(Allocation { arena: self.clone(), ptr, bytes })
    }

    /// Bytes that the driver gave and nobody uses.
    #[cfg(test)]
    pub fn free_bytes(&self) -> usize {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.iter().map(|(bytes, pieces)| bytes * pieces.len()).sum()
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let free = std::mem::take(self.free.get_mut().unwrap_or_else(PoisonError::into_inner));
        for ptr in free.into_values().flatten() {
            // SAFETY: it came from this driver, and every user of it held the arena.
            unsafe { self.driver.free(ptr) };
        }
    }
}

/// A piece of an arena, given back to it when dropped.
pub(super) struct Allocation {
    arena: Arc<Arena>,
    pub ptr: DevicePtr,
    pub bytes: usize,
}

impl DeviceMemory for Allocation {
    fn address(&self) -> u64 {
        self.ptr.0
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let mut free = self.arena.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.entry(self.bytes).or_default().push(self.ptr);
    }
}

impl Cuda {
    /// Memory whose bytes are zero.
    pub(super) fn zeroed(&self, bytes: usize) -> Result<Allocation> {
        let memory = self.arena.alloc(bytes)?;
        self.queue.flush()?;
        // SAFETY: it was just made with that many bytes, and what may have used it before is launched.
        unsafe { self.driver.clear(memory.ptr, bytes)? };
        Ok(memory)
    }

    /// [`Ops::alloc`](crate::ops::Ops::alloc)
    pub(super) fn zeros(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let bytes = checked_len(shape).and_then(|n| n.checked_mul(dtype.size()));
        let bytes = bytes.ok_or_else(|| Error::shape("alloc", "shape", "a size below 2^64", shape))?;
        Ok(Tensor::on_device(Box::new(self.zeroed(bytes)?), bytes, shape, dtype))
    }

    /// [`Ops::upload`](crate::ops::Ops::upload)
    pub(super) fn to_device(&self, tensor: Tensor) -> Result<Tensor> {
        if tensor.device_address().is_some() {
            return Ok(tensor);
        }
        let memory = self.arena.alloc(tensor.bytes())?;
        self.queue.flush()?;
        // SAFETY: as in `zeroed`.
        unsafe { self.driver.upload(memory.ptr, tensor.as_bytes())? };
        Ok(Tensor::on_device(Box::new(memory), tensor.bytes(), tensor.shape(), tensor.dtype()))
    }

    /// A copy of a device's tensor on the host, in its own dtype.
    pub(super) fn to_host(&self, tensor: &Tensor) -> Result<Tensor> {
        let ptr = address("download", "tensor", tensor)?;
        let mut copy = Tensor::zeros(tensor.shape(), tensor.dtype());
        self.queue.flush()?;
        // SAFETY: the tensor has that many bytes, and what writes them is launched.
        unsafe { self.driver.download(copy.as_mut_bytes(), ptr)? };
        Ok(copy)
    }
}
