//! Launches of `kernels/norm.cu`.

use super::Cuda;
use super::driver::{Arg, Grid};
use super::launch::{Kernel, address, int};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::check;
use crate::tensor::Tensor;

/// Threads of a block, which has one row.
const THREADS: usize = 256;
/// One f32 for each warp.
const SHARED_BYTES: usize = THREADS / 32 * 4;

impl Cuda {
    /// [`Ops::rms_norm`](crate::ops::Ops::rms_norm)
    pub(super) fn rms_norm(&self, y: &mut Tensor, x: &Tensor, w: &Tensor, eps: f32) -> Result<()> {
        self.norm("rms_norm", Kernel::RmsNorm, y, x, &[("w", w)], eps)
    }

    /// [`Ops::layer_norm`](crate::ops::Ops::layer_norm)
    pub(super) fn layer_norm(&self, y: &mut Tensor, x: &Tensor, w: &Tensor, b: &Tensor, eps: f32) -> Result<()> {
        self.norm("layer_norm", Kernel::LayerNorm, y, x, &[("w", w), ("b", b)], eps)
    }

    fn norm(
        &self,
        op: &'static str,
        kernel: Kernel,
        y: &mut Tensor,
        x: &Tensor,
        weights: &[(&str, &Tensor)],
        eps: f32,
    ) -> Result<()> {
        check::norm(op, y, x, weights)?;
        check::dtype(op, "x", x, self.dtype)?;
        check::dtype(op, "y", y, self.dtype)?;
        let mut args = vec![Arg::Ptr(address(op, "y", y)?), Arg::Ptr(address(op, "x", x)?)];
        for (what, w) in weights {
            check::dtype(op, what, w, DType::F32)?;
            args.push(Arg::Ptr(address(op, what, w)?));
        }
        args.extend([int(op, "hidden", x.row_len())?, Arg::Float(eps)]);
        if x.rows() == 0 {
            return Ok(());
        }
        let grid = Grid { blocks: [x.rows(), 1, 1], threads: THREADS, shared_bytes: SHARED_BYTES };
        // SAFETY: the arguments are the kernel's; y and x have `rows` rows of `hidden`, the weights one (all just checked).
        unsafe { self.launch(kernel, grid, &args) }
    }
}
