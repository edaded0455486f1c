//! Reads the header of a safetensors file; its data stays where it is.
//!
//! The header comes from outside and may lie: the `safetensors` crate caps its size and proves that the tensors cover the data
//! exactly, without overlap, hole or overflow, so that every range made here lies inside the file.

use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::tensor::{Dtype, SafeTensors};

use super::{Located, Order, StoredDType};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// The tensors of a mapped safetensors file.
///
/// # Errors
/// [`Error::File`] if the header is not one, or if it contradicts itself or the size of the file.
pub fn read(path: &Path, map: &Arc<Mmap>) -> Result<Vec<Located>> {
    let located =
        |(name, offset, shape, dtype): Header| Located { name, shape, dtype, map: map.clone(), offset, order: Order::RowMajor };
    Ok(header(path, map)?.into_iter().map(located).collect())
}

/// Name, first byte in the file, shape and dtype of a tensor.
pub type Header = (String, usize, Vec<usize>, StoredDType);

/// What the header of `file` says about each of its tensors.
///
/// # Errors
/// As [`read`].
pub fn header(path: &Path, file: &[u8]) -> Result<Vec<Header>> {
    let (header_bytes, metadata) =
        SafeTensors::read_metadata(file).map_err(|e| Error::file(path, format!("not a valid safetensors file: {e}")))?;
    let data = size_of::<u64>() + header_bytes;
    let mut tensors: Vec<Header> = metadata
        .tensors()
        .into_iter()
        .map(|(name, info)| (name, data + info.data_offsets.0, info.shape.clone(), stored_dtype(info.dtype)))
        .collect();
    tensors.sort_by(|a, b| (a.1, &a.0).cmp(&(b.1, &b.0)));
    Ok(tensors)
}

fn stored_dtype(dtype: Dtype) -> StoredDType {
    match dtype {
        Dtype::F32 => StoredDType::Known(DType::F32),
        Dtype::F16 => StoredDType::Known(DType::F16),
        Dtype::BF16 => StoredDType::Known(DType::Bf16),
        Dtype::I32 => StoredDType::Known(DType::I32),
        other => StoredDType::Other { name: other.to_string().to_lowercase(), bits: other.bitsize() },
    }
}
