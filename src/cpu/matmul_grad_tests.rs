//! Gradients of the linear layer on the twins of instruction sets that a machine may not have. (On those that it has: `tests/ops_backward.rs`.)

use std::sync::Arc;

use super::matmul_grad::{Columns, linear_dw, linear_dx};
use super::pool::Pool;
use super::reference::gradient::Tolerance;
use super::reference::random;
use super::simd::Isa;
use crate::dtype::DType;
use crate::ops::{Update, Weight};
use crate::tensor::Tensor;

#[test]
fn twins() {
    let pool = Pool::new(2);
    for isa in [Isa::Wide, Isa::WideBf16] {
        for (tokens, n, k) in [(1, 1, 1), (3, 17, 33), (15, 40, 64), (300, 29, 130), (33, 270, 45), (40, 300, 1100), (31, 512, 40)]
        {
            for dtype in [DType::F32, DType::Bf16] {
                let what = format!("{tokens}x{n}x{k} in {dtype} on {isa}");
                let w = Tensor::from_slice(&[n, k], &random(n * k, 1)).converted(dtype);
                let w_values = w.to_f32();
                let w = Weight::stacked(vec![Arc::new(w)]).unwrap();
                let (x, dy) = (random(tokens * k, 2), random(tokens * n, 3));
                let (mut dx, mut dw) = (vec![f32::NAN; tokens * k], vec![0.0; n * k]);
                linear_dx(isa, &pool, &mut dx, &dy, n, &w, Update::Set);
                linear_dw(isa, &pool, &mut dw, Columns { data: &dy, stride: n, first: 0 }, &x, k);
                let (mut dx_exact, mut dw_exact) = (vec![0.0; tokens * k], vec![0.0; n * k]);
                for t in 0..tokens {
                    for j in 0..n {
                        for i in 0..k {
                            dx_exact[t * k + i] += f64::from(dy[t * n + j]) * f64::from(w_values[j * k + i]);
                            dw_exact[j * k + i] += f64::from(dy[t * n + j]) * f64::from(x[t * k + i]);
                        }
                    }
                }
                Tolerance::of_sums(n, 0.0).check(&format!("dx of {what}"), &dx, &dx_exact);
                Tolerance::of_sums(tokens, 0.0).check(&format!("dW of {what}"), &dw, &dw_exact);
            }
        }
    }
}
