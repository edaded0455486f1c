//! [`Tensor`]: a contiguous buffer with a shape and a dtype.
//!
//! There are no strides and no autograd tape: ops write whole tensors into buffers that were planned before, and a tensor owns its
//! buffer alone, so that no two of them overlap. A shape exists for sizes and for error messages.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::Mmap;

use crate::dtype::{DType, Element};
use crate::error::{Error, Result};

/// Alignment of owned buffers in bytes: a cache line, and the width of the widest vector register.
const ALIGN: usize = 64;

/// Zeroed, 64-byte-aligned memory. Pages that were never written take no memory, so a plan may reserve for the longest prompt.
struct HostBuffer {
    /// What the allocator gave: aligned to [`MALLOC_ALIGN`] only.
    base: NonNull<u8>,
    /// The first aligned byte in it.
    ptr: NonNull<u8>,
    bytes: usize,
}

/// What every allocator aligns to by itself. For more, Rust's zeroes by writing, which takes the memory at once.
const MALLOC_ALIGN: usize = 16;

// SAFETY: the buffer is plain memory that nothing else points to; access goes through `&`/`&mut` of its owner.
unsafe impl Send for HostBuffer {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for HostBuffer {}

impl HostBuffer {
    fn zeroed(bytes: usize) -> Self {
        let layout = Self::layout(bytes);
        // SAFETY: `layout` never has size zero.
        let base = unsafe { alloc_zeroed(layout) };
        let base = NonNull::new(base).unwrap_or_else(|| handle_alloc_error(layout));
        // SAFETY: the layout has `ALIGN` bytes to spare, and the next aligned address is less than that away.
        let ptr = unsafe { base.add(base.align_offset(ALIGN)) };
        Self { base, ptr, bytes }
    }

    fn layout(bytes: usize) -> Layout {
        let padded = bytes.checked_add(ALIGN).expect("a tensor is smaller than the address space");
        Layout::from_size_align(padded, MALLOC_ALIGN).expect("a tensor is smaller than the address space")
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with the same layout, and freed only here.
        unsafe { dealloc(self.base.as_ptr(), Self::layout(self.bytes)) }
    }
}

/// Memory on a device, given back when dropped.
pub trait DeviceMemory: Send + Sync {
    /// Where it begins, in the device's own address space.
    fn address(&self) -> u64;
}

/// Where the elements are.
enum Storage {
    /// Memory of our own.
    Owned(HostBuffer),
    /// A read-only range of a mapped checkpoint file: weights are never copied.
    Mapped { map: Arc<Mmap>, offset: usize, bytes: usize },
    /// Memory of a device, which the host cannot read.
    Device { memory: Box<dyn DeviceMemory>, bytes: usize },
}

/// A contiguous, row-major array of numbers. Its leading dimension may shrink and grow within the capacity it was made with.
pub struct Tensor {
    storage: Storage,
    shape: Vec<usize>,
    dtype: DType,
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{:?}", self.dtype, self.shape)
    }
}

/// Tells the system that a range of a mapped file will not be read again soon, as [`Tensor::release`] does for a tensor's.
pub(crate) fn release_mapped(map: &Mmap, offset: usize, bytes: usize) {
    #[cfg(unix)]
    // SAFETY: the mapping is shared and read-only: a page that is dropped comes back from the file, as it was, when it is read.
    let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, bytes) };
}

/// Number of elements of `shape`; an error if that overflows, as a hostile file may make it.
pub fn checked_len(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))
}

impl Tensor {
    /// A tensor of zeros in memory of its own.
    pub fn zeros(shape: &[usize], dtype: DType) -> Self {
        let bytes = checked_len(shape).and_then(|n| n.checked_mul(dtype.size())).expect("tensor size overflows");
        Self { storage: Storage::Owned(HostBuffer::zeroed(bytes)), shape: shape.to_vec(), dtype }
    }

    /// A copy of `values` in the shape given.
    ///
    /// # Panics
    /// If `shape` does not hold exactly `values.len()` elements.
    pub fn from_slice<T: Element>(shape: &[usize], values: &[T]) -> Self {
        let mut tensor = Self::zeros(shape, T::DTYPE);
        tensor.as_mut_slice::<T>().copy_from_slice(values);
        tensor
    }

    /// A read-only view of `shape` elements that start `offset` bytes into a mapped file.
    ///
    /// Refused if the range leaves the file or if its start is not aligned for `dtype`.
    pub fn mapped(map: Arc<Mmap>, offset: usize, shape: &[usize], dtype: DType) -> Result<Self> {
        let bytes = checked_len(shape).and_then(|n| n.checked_mul(dtype.size()));
        let Some(bytes) = bytes.filter(|&b| offset.checked_add(b).is_some_and(|end| end <= map.len())) else {
            return Err(Error::shape("map", "byte range", format!("within {} bytes of file", map.len()), (offset, shape)));
        };
        if (map.as_ptr() as usize + offset) % dtype.size() != 0 {
            return Err(Error::shape("map", "offset", format!("a multiple of {}", dtype.size()), offset));
        }
        Ok(Self { storage: Storage::Mapped { map, offset, bytes }, shape: shape.to_vec(), dtype })
    }

    /// A tensor in `bytes` of a device's memory.
    ///
    /// # Panics
    /// If `shape` does not fit into them.
    pub fn on_device(memory: Box<dyn DeviceMemory>, bytes: usize, shape: &[usize], dtype: DType) -> Self {
        let needed = checked_len(shape).and_then(|n| n.checked_mul(dtype.size()));
        assert!(needed.is_some_and(|n| n <= bytes), "{dtype}{shape:?} does not fit into {bytes} bytes");
        Self { storage: Storage::Device { memory, bytes }, shape: shape.to_vec(), dtype }
    }

    /// Its dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Its storage format.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes its elements take.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype.size()
    }

    /// The leading dimension.
    pub fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Elements of one row: the product of all dimensions but the leading one.
    pub fn row_len(&self) -> usize {
        self.shape.iter().skip(1).product()
    }

    /// Tells the system that it will not be read again soon: pages of a mapped file leave this process's memory. Otherwise nothing.
    pub fn release(&self) {
        if let Storage::Mapped { map, offset, bytes } = &self.storage {
            release_mapped(map, *offset, *bytes);
        }
    }

    /// Whether it lies in a mapped file, and not in memory of its own.
    pub fn is_mapped(&self) -> bool {
        matches!(self.storage, Storage::Mapped { .. })
    }

    /// Where it begins in the memory of its device; none if it is the host's.
    pub fn device_address(&self) -> Option<u64> {
        match &self.storage {
            Storage::Device { memory, .. } => Some(memory.address()),
            Storage::Owned(_) | Storage::Mapped { .. } => None,
        }
    }

    /// Sets the leading dimension, within the capacity that the tensor was made with.
    ///
    /// # Panics
    /// If the tensor was not made that large: the buffer plan is wrong.
    pub fn set_rows(&mut self, rows: usize) {
        let capacity = match &self.storage {
            Storage::Owned(buffer) => buffer.bytes,
            Storage::Mapped { bytes, .. } | Storage::Device { bytes, .. } => *bytes,
        };
        let needed = rows * self.row_len() * self.dtype.size();
        assert!(needed <= capacity, "{rows} rows of {self:?} need {needed} bytes, planned were {capacity}");
        self.shape[0] = rows;
    }

    /// The same elements in another shape.
    pub fn reshaped(mut self, shape: &[usize]) -> Result<Self> {
        if checked_len(shape) != Some(self.len()) {
            return Err(Error::shape("reshape", "shape", &self.shape, shape));
        }
        self.shape = shape.to_vec();
        Ok(self)
    }

    /// Its elements.
    ///
    /// # Panics
    /// If `T` is not its dtype: a caller matches on [`Tensor::dtype`] first. If it is on a device: it must be downloaded.
    pub fn as_slice<T: Element>(&self) -> &[T] {
        assert_eq!(self.dtype, T::DTYPE, "{self:?} read as {}", T::DTYPE);
        bytemuck::cast_slice(self.as_bytes())
    }

    /// Its elements, to be written.
    ///
    /// # Panics
    /// If `T` is not its dtype, or if it lies in a mapped file or on a device.
    pub fn as_mut_slice<T: Element>(&mut self) -> &mut [T] {
        assert_eq!(self.dtype, T::DTYPE, "{self:?} written as {}", T::DTYPE);
        bytemuck::cast_slice_mut(self.as_mut_bytes())
    }

    /// Its elements as bytes, to be written.
    ///
    /// # Panics
    /// If it lies in a mapped file or on a device.
    pub fn as_mut_bytes(&mut self) -> &mut [u8] {
        let bytes = self.bytes();
        match &mut self.storage {
            Storage::Owned(buffer) => {
                // SAFETY: the buffer has at least `bytes` bytes (checked wherever the shape changes), all initialised (zeroed when
                // allocated), and `&mut self` is the only way to it.
                unsafe { std::slice::from_raw_parts_mut(buffer.ptr.as_ptr(), bytes) }
            }
            Storage::Mapped { .. } => panic!("{self:?} lies in a mapped file and cannot be written"),
            Storage::Device { .. } => panic!("{self:?} lies on a device: only its ops can write it"),
        }
    }

    /// Its elements as bytes, in the machine's (little-endian) order.
    ///
    /// # Panics
    /// If it is on a device: it must be downloaded.
    pub fn as_bytes(&self) -> &[u8] {
        let bytes = self.bytes();
        match &self.storage {
            // SAFETY: as in `as_mut_slice`; `&self` allows reading only.
            Storage::Owned(buffer) => unsafe { std::slice::from_raw_parts(buffer.ptr.as_ptr(), bytes) },
            Storage::Mapped { map, offset, .. } => &map[*offset..offset + bytes],
            Storage::Device { .. } => panic!("{self:?} lies on a device: download it first"),
        }
    }

    /// Its elements as f32, whatever they are stored as.
    ///
    /// # Panics
    /// If it holds integers, or is on a device.
    pub fn to_f32(&self) -> Vec<f32> {
        match self.dtype {
            DType::F32 => self.as_slice::<f32>().to_vec(),
            DType::F16 => self.as_slice::<half::f16>().iter().map(|x| x.to_f32()).collect(),
            DType::Bf16 => self.as_slice::<half::bf16>().iter().map(|x| x.to_f32()).collect(),
            DType::I32 | DType::I8 => panic!("{self:?} holds integers"),
        }
    }

    /// A copy in another floating-point dtype, rounded to nearest even.
    pub fn converted(&self, dtype: DType) -> Self {
        let values = self.to_f32();
        match dtype {
            DType::F32 => Self::from_slice(&self.shape, &values),
            DType::F16 => Self::from_slice(&self.shape, &values.iter().map(|&x| half::f16::from_f32(x)).collect::<Vec<_>>()),
            DType::Bf16 => Self::from_slice(&self.shape, &values.iter().map(|&x| half::bf16::from_f32(x)).collect::<Vec<_>>()),
            DType::I32 | DType::I8 => panic!("weights are not converted to integers"),
        }
    }

    /// Checks that it has just this shape; `what` names it in the error.
    pub fn expect(&self, op: &'static str, what: &str, shape: &[usize]) -> Result<()> {
        if self.shape == shape { Ok(()) } else { Err(Error::shape(op, what, shape, &self.shape)) }
    }

    /// Its two dimensions, or an error that names it.
    pub fn dims2(&self, op: &'static str, what: &str) -> Result<[usize; 2]> {
        <[usize; 2]>::try_from(self.shape.as_slice()).map_err(|_| Error::shape(op, what, "two dimensions", &self.shape))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_shrink_and_grow_within_capacity() {
        let mut t = Tensor::zeros(&[4, 3], DType::F32);
        t.as_mut_slice::<f32>().copy_from_slice(&(0..12).map(|i| i as f32).collect::<Vec<_>>());
        t.set_rows(2);
        assert_eq!(t.as_slice::<f32>(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        t.set_rows(4);
        assert_eq!(t.as_slice::<f32>()[11], 11.0);
    }

    #[test]
    fn memory_is_taken_when_it_is_written_and_not_before() {
        let resident = || -> usize {
            let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
            statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
        };
        let before = resident();
        let mut t = Tensor::zeros(&[1 << 28], DType::F32); // 1 GiB
        assert_eq!(t.as_bytes().as_ptr() as usize % ALIGN, 0);
        t.as_mut_slice::<f32>()[1 << 27] = 1.0;
        assert!(resident() < before + (256 << 20), "the whole tensor was touched");
    }

    #[test]
    #[should_panic(expected = "planned were 48")]
    fn rows_beyond_capacity_are_refused() {
        Tensor::zeros(&[4, 3], DType::F32).set_rows(5);
    }

    #[test]
    #[should_panic(expected = "read as f32")]
    fn another_dtype_is_refused() {
        Tensor::zeros(&[1], DType::Bf16).as_slice::<f32>();
    }

    #[test]
    fn a_range_outside_the_file_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64).unwrap();
        // SAFETY: a private temporary file that nothing else writes to.
        let map = Arc::new(unsafe { Mmap::map(&file).unwrap() });
        assert!(Tensor::mapped(map.clone(), 0, &[16], DType::F32).is_ok());
        assert!(Tensor::mapped(map.clone(), 4, &[16], DType::F32).is_err());
        assert!(Tensor::mapped(map.clone(), 2, &[1], DType::F32).is_err());
        assert!(Tensor::mapped(map, 0, &[usize::MAX, 4], DType::F32).is_err());
    }
}
