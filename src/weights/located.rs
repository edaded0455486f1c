//! [`Located`]: one tensor in its file, and how it gets from there into a [`Tensor`] or a [`Packed`] matrix.

use std::sync::Arc;

use memmap2::Mmap;

use super::StoredDType;
use super::blocks::BlockType;
use crate::cpu::pool::Pool;
use crate::dtype::DType;
use crate::ops::Packed;
use crate::tensor::{Tensor, checked_len, release_mapped};

/// A tensor as a reader found it. The reader vouches that all its elements lie inside `map`.
#[derive(Clone)]
pub struct Located {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) dtype: StoredDType,
    pub(super) map: Arc<Mmap>,
    /// First element, in bytes from the start of the file.
    pub(super) offset: usize,
    pub(super) order: Order,
}

/// In which order a file holds the elements of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// The last dimension's neighbours are neighbours, without gaps.
    RowMajor,
    /// Distance between neighbours in each dimension, in elements.
    Strided(Vec<usize>),
    /// Row-major, but in each head the rows stand as llama.cpp's rotation pairs them: row 2j + s is row s·head_dim/2 + j of ours (s = 0, 1).
    RotaryPairs {
        /// Rows of a head.
        head_dim: usize,
    },
}

impl Located {
    /// Bytes its elements take. Readers have checked the multiplication.
    pub(super) fn bytes(&self) -> usize {
        checked_len(&self.shape).and_then(|n| self.dtype.bytes(n)).unwrap_or(0)
    }

    /// Checks that it has this shape.
    pub(super) fn expect(&self, shape: &[usize]) -> Result<(), String> {
        match self.shape == shape {
            true => Ok(()),
            false => Err(format!("has shape {:?}, but the configuration says {shape:?}", self.shape)),
        }
    }

    /// Its elements, which are of this dtype: a view where the file holds them in our order and aligned, else a copy.
    pub(super) fn load(&self, dtype: DType) -> Result<Tensor, String> {
        match &self.order {
            Order::Strided(strides) => self.gather(strides, dtype),
            Order::RowMajor if (self.map.as_ptr() as usize + self.offset).is_multiple_of(dtype.size()) => {
                Tensor::mapped(self.map.clone(), self.offset, &self.shape, dtype).map_err(|e| e.to_string())
            }
            Order::RowMajor | Order::RotaryPairs { .. } => self.copy(dtype),
        }
    }

    /// Its weights, which are in blocks of this type, as a dense tensor.
    pub(super) fn dense(&self, block: BlockType, pool: &Pool) -> Result<Tensor, String> {
        let tensor = block.dense(pool, self.stored_bytes()?, self.matrix(), self.stored_row()?)?;
        release_mapped(&self.map, self.offset, self.bytes());
        tensor.reshaped(&self.shape).map_err(|e| e.to_string())
    }

    /// The matrix, which is in blocks of this type, packed as our kernels take it.
    pub(super) fn pack(&self, block: BlockType, pool: &Pool) -> Result<Packed, String> {
        let packed = block.pack(pool, self.stored_bytes()?, self.matrix(), self.stored_row()?)?;
        release_mapped(&self.map, self.offset, self.bytes());
        Ok(packed)
    }

    /// Its rows and their length, all dimensions but the last taken for one.
    fn matrix(&self) -> [usize; 2] {
        let (k, outer) = self.shape.split_last().map_or((1, &[][..]), |(k, outer)| (*k, outer));
        [outer.iter().product(), k]
    }

    fn stored_bytes(&self) -> Result<&[u8], String> {
        let end = self.offset.checked_add(self.bytes());
        end.and_then(|end| self.map.get(self.offset..end)).ok_or_else(|| "leaves its file".to_owned())
    }

    /// Which row of the file a row of ours is.
    fn stored_row(&self) -> Result<impl Fn(usize) -> usize + Sync + use<>, String> {
        let head_dim = match self.order {
            Order::RotaryPairs { head_dim } => head_dim,
            _ => 0,
        };
        let n = self.shape.first().copied().unwrap_or(0);
        if head_dim > 0 && !(head_dim.is_multiple_of(2) && n.is_multiple_of(head_dim)) {
            return Err(format!("has {n} rows, which are not those of heads of {head_dim}"));
        }
        Ok(move |row: usize| match head_dim {
            0 => row,
            _ => {
                let (head, in_head) = (row / head_dim * head_dim, row % head_dim);
                head + in_head % (head_dim / 2) * 2 + in_head / (head_dim / 2)
            }
        })
    }

    /// Its elements in memory of their own, row by row.
    fn copy(&self, dtype: DType) -> Result<Tensor, String> {
        let (bytes, stored_row) = (self.stored_bytes()?, self.stored_row()?);
        let mut tensor = Tensor::zeros(&self.shape, dtype);
        let row_bytes = tensor.row_len() * dtype.size();
        if row_bytes > 0 {
            for (row, to) in tensor.as_mut_bytes().chunks_exact_mut(row_bytes).enumerate() {
                to.copy_from_slice(&bytes[stored_row(row) * row_bytes..][..row_bytes]);
            }
        }
        Ok(tensor)
    }

    /// Its elements in row-major order, in memory of their own.
    fn gather(&self, strides: &[usize], dtype: DType) -> Result<Tensor, String> {
        let size = dtype.size();
        let mut tensor = Tensor::zeros(&self.shape, dtype);
        let mut at = vec![0usize; self.shape.len()]; // index of the element being copied, one per dimension
        for element in tensor.as_mut_bytes().chunks_exact_mut(size) {
            let start = self.offset + size * at.iter().zip(strides).map(|(i, stride)| i * stride).sum::<usize>();
            element.copy_from_slice(self.map.get(start..start + size).ok_or("leaves its file")?);
            for (i, n) in at.iter_mut().zip(&self.shape).rev() {
                *i += 1;
                if *i < *n {
                    break;
                }
                *i = 0;
            }
        }
        Ok(tensor)
    }
}
