//! Launches of `kernels/activation_bwd.cu`: what training does element by element.

use super::Cuda;
use super::driver::{Arg, DevicePtr, Grid};
use super::launch::{Kernel, address, int};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::dropout::Dropout;
use crate::ops::{Activation, check, check_grad};
use crate::tensor::Tensor;

/// Threads of a block, in all kernels here.
const THREADS: usize = 128;

impl Cuda {
    /// [`GradOps::clear`](crate::ops::GradOps::clear)
    pub(super) fn clear(&self, t: &mut Tensor) -> Result<()> {
        let ptr = address("clear", "t", t)?;
        self.queue.flush()?;
        // SAFETY: the tensor has so many bytes and is borrowed alone; what was to read or write them is launched.
        unsafe { self.driver.clear(ptr, t.bytes()) }
    }

    /// [`GradOps::scale`](crate::ops::GradOps::scale)
    pub(super) fn scale(&self, t: &mut Tensor, factor: f32) -> Result<()> {
        const OP: &str = "scale";
        let kernel = if t.dtype() == DType::F32 { Kernel::ScaleF32 } else { Kernel::Scale };
        if kernel == Kernel::Scale {
            check::dtype(OP, "t", t, self.dtype)?;
        }
        let ptr = Arg::Ptr(address(OP, "t", t)?);
        let args = [ptr, Arg::Float(factor), int(OP, "elements", t.len())?];
        // SAFETY: the arguments are the kernel's; t has so many elements of its dtype.
        unsafe { self.launch_elements(kernel, t, &args) }
    }

    /// [`GradOps::silu_mul_backward`](crate::ops::GradOps::silu_mul_backward)
    pub(super) fn silu_mul_backward(&self, d_gate_up: &mut Tensor, dy: &Tensor, gate_up: &Tensor) -> Result<()> {
        const OP: &str = "silu_mul_backward";
        check_grad::silu_mul_backward(d_gate_up, dy, gate_up)?;
        let mut args = self.activations(OP, [("d_gate_up", d_gate_up), ("dy", dy), ("gate_up", gate_up)])?.to_vec();
        int(OP, "width of gate_up", gate_up.row_len())?;
        args.push(int(OP, "n", dy.row_len())?);
        if dy.is_empty() {
            return Ok(());
        }
        let parts = dy.row_len().div_ceil(THREADS * self.vector());
        let grid = Grid { blocks: [dy.rows(), parts, 1], threads: THREADS, shared_bytes: 0 };
        // SAFETY: the arguments are the kernel's; dy has `rows` rows of n, the others as many of 2n (just checked).
        unsafe { self.launch(Kernel::SiluMulBackward, grid, &args) }
    }

    /// [`GradOps::activate`](crate::ops::GradOps::activate)
    pub(super) fn activate(&self, y: &mut Tensor, x: &Tensor, f: Activation) -> Result<()> {
        check_grad::alike("activate", x, [("y", y)])?;
        let [y_ptr, x_ptr] = self.activations("activate", [("y", y), ("x", x)])?;
        let args = [y_ptr, x_ptr, int("activate", "elements", x.len())?, number(f)];
        // SAFETY: the arguments are the kernel's; x and y are alike (just checked).
        unsafe { self.launch_elements(Kernel::Activate, x, &args) }
    }

    /// [`GradOps::activate_backward`](crate::ops::GradOps::activate_backward)
    pub(super) fn activate_backward(&self, dx: &mut Tensor, dy: &Tensor, x: &Tensor, f: Activation) -> Result<()> {
        const OP: &str = "activate_backward";
        check_grad::alike(OP, x, [("dx", dx), ("dy", dy)])?;
        let [dx_ptr, dy_ptr, x_ptr] = self.activations(OP, [("dx", dx), ("dy", dy), ("x", x)])?;
        let args = [dx_ptr, dy_ptr, x_ptr, int(OP, "elements", x.len())?, number(f)];
        // SAFETY: the arguments are the kernel's; x, dy and dx are alike (just checked).
        unsafe { self.launch_elements(Kernel::ActivateBackward, x, &args) }
    }

    /// [`GradOps::dropout`](crate::ops::GradOps::dropout)
    pub(super) fn dropout(&self, y: &mut Tensor, x: &Tensor, p: f32, key: u64) -> Result<()> {
        check_grad::dropout(y, x, p)?;
        let [y_ptr, x_ptr] = self.activations("dropout", [("y", y), ("x", x)])?;
        let Dropout { threshold, scale, key: [low, high] } = Dropout::new(p, key);
        let [threshold, low, high] = [threshold, low, high].map(|word| Arg::Int(word as i32));
        let args = [y_ptr, x_ptr, threshold, Arg::Float(scale), low, high, int("dropout", "elements", x.len())?];
        // SAFETY: the arguments are the kernel's; x and y are alike (just checked).
        unsafe { self.launch_elements(Kernel::Dropout, x, &args) }
    }

    /// Addresses of tensors of this device's dtype.
    pub(super) fn activations<const N: usize>(&self, op: &'static str, tensors: [(&str, &Tensor); N]) -> Result<[Arg; N]> {
        let mut args = [Arg::Ptr(DevicePtr(0)); N];
        for (arg, (what, tensor)) in args.iter_mut().zip(tensors) {
            check::dtype(op, what, tensor, self.dtype)?;
            *arg = Arg::Ptr(address(op, what, tensor)?);
        }
        Ok(args)
    }

    /// With a thread for each vector of a tensor like `t`.
    ///
    /// # Safety
    /// The arguments are the kernel's, and lead to so much.
    unsafe fn launch_elements(&self, kernel: Kernel, t: &Tensor, args: &[Arg]) -> Result<()> {
        if t.is_empty() {
            return Ok(());
        }
        let blocks = t.bytes().div_ceil(THREADS * super::rows::VECTOR_BYTES);
        // SAFETY: the caller's.
        unsafe { self.launch(kernel, Grid { blocks: [blocks, 1, 1], threads: THREADS, shared_bytes: 0 }, args) }
    }
}

/// `quick` of the kernels.
fn number(f: Activation) -> Arg {
    Arg::Int((f == Activation::QuickGelu).into())
}
