//! Launches of `kernels/norm.cu` and `kernels/norm_bwd.cu`.

use super::Cuda;
use super::driver::{Arg, DevicePtr, Grid};
use super::launch::{Kernel, address, int};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{check, check_grad};
use crate::tensor::Tensor;

/// Threads of a block, which has one row.
const THREADS: usize = 256;
/// One f32 for each warp.
const SHARED_BYTES: usize = THREADS / 32 * 4;
/// Columns of a block of `sum_columns_bwd`.
const COLUMNS: usize = 32;
/// Two f32 for each of its threads.
const COLUMNS_SHARED_BYTES: usize = 2 * THREADS * 4;

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

    /// [`GradOps::rms_norm_backward`](crate::ops::GradOps::rms_norm_backward)
    pub(super) fn rms_norm_backward(
        &self,
        dx: &mut Tensor,
        dw: Option<&mut Tensor>,
        dy: &Tensor,
        x: &Tensor,
        w: &Tensor,
        eps: f32,
    ) -> Result<()> {
        let d_weights: Vec<_> = dw.as_deref().map(|dw| ("dw", dw)).into_iter().collect();
        self.norm_backward("rms_norm_backward", Kernel::RmsNormBackward, dx, &d_weights, [dy, x, w], eps)
    }

    /// [`GradOps::layer_norm_backward`](crate::ops::GradOps::layer_norm_backward)
    pub(super) fn layer_norm_backward(
        &self,
        dx: &mut Tensor,
        d_wb: Option<[&mut Tensor; 2]>,
        dy: &Tensor,
        x: &Tensor,
        w: &Tensor,
        eps: f32,
    ) -> Result<()> {
        let d_weights = d_wb.as_ref().map_or(Vec::new(), |[dw, db]| vec![("dw", &**dw), ("db", &**db)]);
        self.norm_backward("layer_norm_backward", Kernel::LayerNormBackward, dx, &d_weights, [dy, x, w], eps)
    }

    /// `d_weights` are dw and db, as far as they are wanted.
    fn norm_backward(
        &self,
        op: &'static str,
        kernel: Kernel,
        dx: &mut Tensor,
        d_weights: &[(&str, &Tensor)],
        [dy, x, w]: [&Tensor; 3],
        eps: f32,
    ) -> Result<()> {
        check_grad::norm_backward(op, dx, dy, x, &[("w", w)])?;
        check_grad::norm_backward(op, dx, dy, x, d_weights)?;
        let mut args = Vec::new();
        for (what, t) in [("dx", &*dx), ("dy", dy), ("x", x)] {
            check::dtype(op, what, t, self.dtype)?;
            args.push(Arg::Ptr(address(op, what, t)?));
        }
        let mut grads = [DevicePtr(0); 2];
        for (at, (what, t)) in grads.iter_mut().zip(d_weights) {
            *at = address(op, what, t)?;
        }
        int(op, "rows of x", x.rows())?;
        let (dy, x, hidden) = (args[1], args[2], int(op, "hidden", x.row_len())?);
        if dx.is_empty() {
            return Ok(());
        }
        // Whoever has the memory next comes later: launches are done in order.
        let memory = if d_weights.is_empty() { None } else { Some(self.arena.alloc(dx.rows() * 2 * 4)?) };
        let stats = memory.as_ref().map_or(DevicePtr(0), |memory| memory.ptr);
        args.extend([Arg::Ptr(address(op, "w", w)?), Arg::Ptr(stats), hidden, Arg::Float(eps)]);
        let grid = Grid { blocks: [dx.rows(), 1, 1], threads: THREADS, shared_bytes: SHARED_BYTES };
        // SAFETY: the arguments are the kernel's; dx, dy and x have `rows` rows of `hidden`, w one (just checked), stats two numbers for each
        // row, if it is there.
        unsafe { self.launch(kernel, grid, &args)? };
        if d_weights.is_empty() {
            return Ok(());
        }
        // SAFETY: as above, and dw and db have `hidden` (just checked).
        unsafe { self.sum_columns(grads, dy, [x, Arg::Ptr(stats)], [dx.rows(), dx.row_len(), dx.row_len()]) }
    }

    /// [`GradOps::bias_backward`](crate::ops::GradOps::bias_backward)
    pub(super) fn bias_backward(&self, db: &mut Tensor, dy: &Tensor, first_col: usize) -> Result<()> {
        const OP: &str = "bias_backward";
        check_grad::bias_backward(db, dy, first_col)?;
        check::dtype(OP, "dy", dy, self.dtype)?;
        for (what, n) in [("rows of dy", dy.rows()), ("width of dy", dy.row_len())] {
            int(OP, what, n)?;
        }
        let grads = [DevicePtr(0), address(OP, "db", db)?];
        let from = Arg::Ptr(address(OP, "dy", dy)?.offset(first_col * self.dtype.size()));
        if db.is_empty() || dy.rows() == 0 {
            return Ok(());
        }
        // SAFETY: dy has `rows` rows of its width, db an f32 for each of its columns from `first_col` on (just checked).
        unsafe { self.sum_columns(grads, from, [Arg::Ptr(DevicePtr(0)); 2], [dy.rows(), db.len(), dy.row_len()]) }
    }

    /// Adds up `[rows, n]` of dy, whose rows have `stride`, to db and, times the normed x, to dw, where these are not null.
    ///
    /// # Safety
    /// The pointers lead to so much.
    unsafe fn sum_columns(
        &self,
        [dw, db]: [DevicePtr; 2],
        dy: Arg,
        [x, stats]: [Arg; 2],
        [rows, n, stride]: [usize; 3],
    ) -> Result<()> {
        let sizes = [rows, n, stride].map(|n| Arg::Int(n as i32));
        let args = [&[Arg::Ptr(dw), Arg::Ptr(db), dy, x, stats], &sizes[..]].concat();
        let grid = Grid { blocks: [n.div_ceil(COLUMNS), 1, 1], threads: THREADS, shared_bytes: COLUMNS_SHARED_BYTES };
        // SAFETY: the caller's.
        unsafe { self.launch(Kernel::SumColumns, grid, &args) }
    }
}
