//! What the tests of this module share.

use rand_pcg::Pcg64;
use rand_pcg::rand_core::{Rng, SeedableRng};

use super::Machine;
use crate::tensor::Tensor;

/// Two threads, so that work is shared out.
pub fn machine() -> Machine {
    Machine::new(2).unwrap()
}

/// Numbers of about a normal distribution, of variance 1.
fn normal(rng: &mut Pcg64) -> f32 {
    (0..12).map(|_| (rng.next_u64() >> 40) as f32 / (1u64 << 24) as f32).sum::<f32>() - 6.0
}

/// Weights `[n, k]`.
pub fn weights(n: usize, k: usize, seed: u64) -> Tensor {
    let mut rng = Pcg64::seed_from_u64(seed);
    let values: Vec<f32> = (0..n * k).map(|_| 0.02 * normal(&mut rng)).collect();
    Tensor::from_slice(&[n, k], &values)
}

/// Inputs `[tokens, k]` that a few hidden causes have in common, and whose columns differ in size by a factor of up to 30, as activations'
/// do.
pub fn correlated(tokens: usize, k: usize, seed: u64) -> Tensor {
    const CAUSES: usize = 12;
    let mut rng = Pcg64::seed_from_u64(seed);
    let mixing: Vec<f32> = (0..CAUSES * k).map(|_| normal(&mut rng)).collect();
    let sizes: Vec<f32> = (0..k).map(|_| (0.8 * normal(&mut rng)).clamp(-1.7, 1.7).exp()).collect();
    let mut x = Vec::with_capacity(tokens * k);
    for _ in 0..tokens {
        let causes: Vec<f32> = (0..CAUSES).map(|_| normal(&mut rng)).collect();
        for j in 0..k {
            let common: f32 = causes.iter().enumerate().map(|(c, z)| z * mixing[c * k + j]).sum();
            x.push(sizes[j] * (common + normal(&mut rng)));
        }
    }
    Tensor::from_slice(&[tokens, k], &x)
}
