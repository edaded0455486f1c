//! Launches of `kernels/packed.cu`: products with packed integer weights.
//!
//! Few tokens are multiplied with the integers as they stream from memory. For many, where arithmetic takes the time, W is unpacked once
//! into memory of the device's dtype, which all such products share, and multiplied as a dense matrix.

use std::sync::{Mutex, PoisonError};

use super::Cuda;
use super::dense::{GEMV_MAX_TOKENS, GEMV_ROWS, GEMV_SHARED_BYTES, GEMV_THREADS, MAX_PARTS, Maker, Operands};
use super::driver::{Arg, DevicePtr, Grid};
use super::launch::{Kernel, address, int};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::Packed;
use crate::ops::packed::{BLOCK_ROWS, SLAB};
use crate::tensor::Tensor;

const OP: &str = "linear";

/// Memory for the largest matrix that was unpacked yet. Launches are done in order, so all share it.
#[derive(Default)]
pub(super) struct Unpacked(Mutex<Option<Tensor>>);

impl Cuda {
    /// The product with a packed matrix.
    ///
    /// # Safety
    /// The operands are what they say.
    pub(super) unsafe fn packed(&self, maker: Maker, operands: &Operands, w: &Packed) -> Result<()> {
        let &Operands { y, y_dtype, y_stride, x, bias, tokens, k, epilogue } = operands;
        if tokens == 0 || w.n == 0 {
            return Ok(());
        }
        let n = int(OP, "rows of W", w.n)?;
        let offsets = w.offsets.as_ref().map(|offsets| address(OP, "offsets", offsets)).transpose()?;
        let matrix = [
            Arg::Ptr(address(OP, "words", &w.words)?),
            Arg::Ptr(address(OP, "scales", &w.scales)?),
            Arg::Ptr(offsets.unwrap_or(DevicePtr(0))),
            int(OP, "width of x", k)?,
            int(OP, "group", w.group)?,
        ];
        if tokens <= GEMV_MAX_TOKENS {
            let mut args = vec![Arg::Ptr(y), Arg::Ptr(x)];
            args.extend(matrix);
            args.extend([Arg::Ptr(bias.unwrap_or(DevicePtr(0))), int(OP, "tokens", tokens)?, n, int(OP, "width of y", y_stride)?]);
            args.extend([Arg::Int(epilogue as i32), Arg::Int((y_dtype == DType::F32).into())]);
            let kernel = if w.bits == 4 { Kernel::GemvPacked4 } else { Kernel::GemvPacked8 };
            let blocks = [w.n.div_ceil(GEMV_ROWS), 1, 1];
            let grid = Grid { blocks, threads: GEMV_THREADS, shared_bytes: GEMV_SHARED_BYTES };
            // SAFETY: the arguments are the kernel's; the caller vouches for the operands, `Packed::new` for the matrix.
            return unsafe { self.launch(kernel, grid, &args) };
        }
        let mut unpacked = self.unpacked.0.lock().unwrap_or_else(PoisonError::into_inner);
        if unpacked.as_ref().is_none_or(|t| t.len() < w.n * k) {
            *unpacked = None;
            *unpacked = Some(self.zeros(&[w.n * k], self.dtype)?);
        }
        let dense = address(OP, "unpacked W", unpacked.as_ref().expect("it is there, or was just made"))?;
        let kernel = if w.bits == 4 { Kernel::Unpack4 } else { Kernel::Unpack8 };
        let rows_of_slabs = w.n.div_ceil(BLOCK_ROWS) * BLOCK_ROWS * (k / SLAB);
        let grid = Grid { blocks: [rows_of_slabs.div_ceil(GEMV_THREADS), 1, 1], threads: GEMV_THREADS, shared_bytes: 0 };
        let args = [&[Arg::Ptr(dense), n], &matrix[..]].concat();
        let mut matrices = [None; MAX_PARTS];
        matrices[0] = Some((dense, w.n));
        // SAFETY: the arguments are the kernel's, the memory has n rows of k; then, as for the product with a matrix that is dense.
        unsafe {
            self.launch(kernel, grid, &args)?;
            self.dense(maker, operands, matrices)
        }
    }
}
