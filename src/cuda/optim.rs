//! Launches of `kernels/loss.cu` and `kernels/optim.cu`: the loss, the norm of gradients, and the optimizer.

use super::Cuda;
use super::driver::{Arg, DevicePtr, Grid};
use super::launch::{Kernel, address, int};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::{AdamW, check, check_grad};
use crate::tensor::Tensor;

/// Threads of a block, in all kernels here.
const THREADS: usize = 256;
/// One f64 for each warp.
const SHARED_BYTES: usize = THREADS / 32 * 8;
/// Elements of a block of `sq_norm_f32`: the same in `kernels/optim.cu`.
const RUN: usize = 65536;

impl Cuda {
    /// [`GradOps::cross_entropy`](crate::ops::GradOps::cross_entropy)
    pub(super) fn cross_entropy(&self, logits: &mut Tensor, loss: &mut Tensor, labels: &[u32], scale: f32) -> Result<()> {
        const OP: &str = "cross_entropy";
        check_grad::cross_entropy(logits, loss, labels)?;
        let [logits_ptr, loss_ptr] = [address(OP, "logits", logits)?, address(OP, "loss", loss)?].map(Arg::Ptr);
        let vocab = int(OP, "vocabulary", logits.row_len())?;
        if labels.is_empty() {
            return Ok(());
        }
        let grid = Grid { blocks: [labels.len(), 1, 1], threads: THREADS, shared_bytes: SHARED_BYTES };
        self.with_ints(labels.iter().map(|&label| label as i32).collect(), |labels| {
            let args = [logits_ptr, loss_ptr, Arg::Ptr(labels), vocab, Arg::Float(scale)];
            // SAFETY: the arguments are the kernel's; logits have a row of `vocab` for each label, which is below that, loss an f32 (just
            // checked).
            unsafe { self.launch(Kernel::CrossEntropy, grid, &args) }
        })
    }

    /// [`GradOps::sq_norm`](crate::ops::GradOps::sq_norm)
    pub(super) fn sq_norm(&self, tensors: &[&Tensor]) -> Result<f64> {
        const OP: &str = "sq_norm";
        for x in tensors {
            check::dtype(OP, "tensor", x, DType::F32)?;
        }
        let n_runs = |x: &Tensor| x.len().div_ceil(RUN);
        let mut sums = vec![0.0f64; tensors.iter().map(|x| n_runs(x)).sum()];
        let memory = self.arena.alloc(sums.len() * 8)?;
        let mut at = 0;
        for x in tensors.iter().filter(|x| !x.is_empty()) {
            let args = [Arg::Ptr(memory.ptr.offset(at * 8)), Arg::Ptr(address(OP, "tensor", x)?), int(OP, "elements", x.len())?];
            let grid = Grid { blocks: [n_runs(x), 1, 1], threads: THREADS, shared_bytes: SHARED_BYTES };
            // SAFETY: the arguments are the kernel's; x has so many f32, and the memory a sum for each run of each tensor.
            unsafe { self.launch(Kernel::SqNorm, grid, &args)? };
            at += n_runs(x);
        }
        self.queue.flush()?;
        // SAFETY: the memory has so many sums, and what writes them is launched.
        unsafe { self.driver.download(bytemuck::cast_slice_mut(&mut sums), memory.ptr)? };
        Ok(sums.iter().sum())
    }

    /// [`GradOps::adamw`](crate::ops::GradOps::adamw)
    pub(super) fn adamw(
        &self,
        [param, m, v]: [&mut Tensor; 3],
        grad: &Tensor,
        rounded: Option<&mut Tensor>,
        options: &AdamW,
    ) -> Result<()> {
        const OP: &str = "adamw";
        check_grad::adamw(param, m, v, grad, rounded.as_deref(), options)?;
        let kind = match rounded.as_ref().map(|rounded| rounded.dtype()) {
            None => 0,
            Some(DType::F32) => 1,
            Some(DType::F16) => 2,
            Some(DType::Bf16) => 3,
            Some(dtype) => return Err(Error::shape(OP, "dtype of rounded", "one of floats", dtype)),
        };
        let mut args = Vec::new();
        for (what, t) in [("param", &*param), ("m", m), ("v", v), ("grad", grad)] {
            args.push(Arg::Ptr(address(OP, what, t)?));
        }
        args.push(Arg::Ptr(rounded.map_or(Ok(DevicePtr(0)), |rounded| address(OP, "rounded", rounded))?));
        args.extend([Arg::Int(kind), int(OP, "elements", param.len())?]);
        let f = options.factors();
        let factors =
            [f.grad_scale, f.decay, f.one_minus_beta1, f.beta2, f.one_minus_beta2, f.sqrt_correction2, f.eps, f.step_size];
        args.extend(factors.map(Arg::Float));
        if param.is_empty() {
            return Ok(());
        }
        let grid = Grid { blocks: [param.len().div_ceil(THREADS), 1, 1], threads: THREADS, shared_bytes: 0 };
        // SAFETY: the arguments are the kernel's; all tensors have so many elements of the dtypes that it takes (just checked).
        unsafe { self.launch(Kernel::AdamW, grid, &args) }
    }
}
