//! The optimizer: norms of gradients, and AdamW in one pass over its buffers.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::pool::{Disjoint, Pool};
use super::simd::{Isa, Kernel, Simd};
use crate::dtype::DType;
use crate::ops::grad::AdamWFactors;
use crate::tensor::Tensor;

/// Elements of a task. Fixed, so that sums do not depend on the number of threads.
const RUN: usize = 16384;
/// Partial sums of a run, which fill vector registers.
const LANES: usize = 16;

/// Σ x², in f64.
pub fn sq_norm(isa: Isa, pool: &Pool, tensors: &[&[f32]]) -> f64 {
    let mut total = 0.0;
    for x in tensors {
        let mut sums = vec![0.0; x.len().div_ceil(RUN)];
        let out = Disjoint::new(&mut sums);
        pool.run(x.len().div_ceil(RUN), &|i| {
            // SAFETY: each task has a sum of its own.
            let sum = unsafe { out.slice(i, 1) };
            sum[0] = isa.run(SumOfSquares(&x[i * RUN..x.len().min((i + 1) * RUN)]));
        });
        total += sums.iter().sum::<f64>();
    }
    total
}

/// Of one run.
struct SumOfSquares<'a>(&'a [f32]);

impl Kernel for SumOfSquares<'_> {
    type Output = f64;

    /// Plain loops, which are compiled for each instruction set.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f64 {
        let mut sums = [0.0f64; LANES];
        let whole = self.0.len() - self.0.len() % LANES;
        for chunk in self.0[..whole].chunks_exact(LANES) {
            for i in 0..LANES {
                sums[i] += f64::from(chunk[i]) * f64::from(chunk[i]);
            }
        }
        for (i, x) in self.0[whole..].iter().enumerate() {
            sums[i] += f64::from(*x) * f64::from(*x);
        }
        sums.iter().sum()
    }
}

/// The step that [`GradOps::adamw`](crate::ops::GradOps::adamw) describes.
///
/// # Panics
/// If the buffers differ in length, or `rounded` holds integers.
pub fn adamw(
    isa: Isa,
    pool: &Pool,
    param: &mut [f32],
    [m, v]: [&mut [f32]; 2],
    grad: &[f32],
    rounded: Option<&mut Tensor>,
    factors: AdamWFactors,
) {
    assert!([m.len(), v.len(), grad.len()] == [param.len(); 3], "buffers of {} parameters", param.len());
    let (m, v) = (Disjoint::new(m), Disjoint::new(v));
    pool.for_rows(param, 1, RUN, |first, param| {
        // SAFETY: tasks have runs of their own.
        let (m, v) = unsafe { (m.slice(first, param.len()), v.slice(first, param.len())) };
        let grad = &grad[first..first + param.len()];
        isa.run(AdamWRun { param, m, v, grad, factors });
    });
    let Some(rounded) = rounded else { return };
    match rounded.dtype() {
        DType::F32 => rounded.as_mut_slice::<f32>().copy_from_slice(param),
        DType::F16 => round(pool, rounded.as_mut_slice::<f16>(), param),
        DType::Bf16 => round(pool, rounded.as_mut_slice::<bf16>(), param),
        DType::I32 | DType::I8 => panic!("weights are not integers"),
    }
}

/// to = from, to nearest.
fn round<H: Send>(pool: &Pool, to: &mut [H], from: &[f32])
where
    [H]: HalfFloatSliceExt,
{
    let n = to.len();
    let to = Disjoint::new(to);
    pool.run(n.div_ceil(RUN), &|i| {
        let run = i * RUN..n.min((i + 1) * RUN);
        // SAFETY: tasks have runs of their own.
        unsafe { to.slice(run.start, run.len()) }.convert_from_f32_slice(&from[run]);
    });
}

/// Some of the parameters.
struct AdamWRun<'a> {
    param: &'a mut [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
    grad: &'a [f32],
    factors: AdamWFactors,
}

impl Kernel for AdamWRun<'_> {
    type Output = ();

    /// A plain loop, which is compiled for each instruction set, to the same bits.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { param, m, v, grad, factors: f } = self;
        let n = param.len();
        let (m, v, grad) = (&mut m[..n], &mut v[..n], &grad[..n]);
        for i in 0..n {
            let g = f.grad_scale * grad[i];
            m[i] += f.one_minus_beta1 * (g - m[i]);
            v[i] = f.beta2 * v[i] + f.one_minus_beta2 * g * g;
            let denominator = v[i].sqrt() / f.sqrt_correction2 + f.eps;
            param[i] = param[i] * f.decay - f.step_size * (m[i] / denominator);
        }
    }
}
