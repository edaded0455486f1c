//! Rotary frequencies, and how they are stretched for longer contexts.

use std::f32::consts::PI;

use crate::error::Result;
use crate::ops::{Ops, RopeTable};
use crate::tensor::Tensor;

/// How rotary frequencies are stretched (`rope_scaling`, in transformers 5 `rope_parameters`).
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All positions divided by a factor.
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Llama 3.1's interpolation by wavelength.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f32,
        /// Wavelengths above `original_context / low_freq_factor` are divided.
        low_freq_factor: f32,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f32,
        /// Context of the model before stretching, in tokens.
        original_context: usize,
    },
    /// A divisor for each frequency, as GGUF files keep what another stretching came to.
    Divisors(
        /// `[head_dim / 2]`
        Vec<f32>,
    ),
}

impl RopeScaling {
    /// The frequency in radians per position that stands for `frequency`, which is number `i` (HF `modeling_rope_utils.py`).
    fn stretch(&self, i: usize, frequency: f32) -> f32 {
        match *self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Divisors(ref divisors) => frequency / divisors[i],
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let context = original_context as f32;
                let wavelength = 2.0 * PI / frequency;
                if wavelength < context / high_freq_factor {
                    frequency
                } else if wavelength > context / low_freq_factor {
                    frequency / factor
                } else {
                    let smooth = (context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}

/// cos and sin of position · θ^(−2i/head_dim), stretched, for i < head_dim/2 and `n_positions` positions.
///
/// The angle is rounded to f32 before its cosine is taken, as the reference does.
///
/// # Panics
/// If there are divisors, but not for just head_dim/2 frequencies.
pub fn rope_table(ops: &dyn Ops, n_positions: usize, head_dim: usize, theta: f32, scaling: &RopeScaling) -> Result<RopeTable> {
    let half = head_dim / 2;
    let frequencies: Vec<f32> = (0..half).map(|i| scaling.stretch(i, 1.0 / theta.powf(2.0 * i as f32 / head_dim as f32))).collect();
    let angles = || (0..n_positions).flat_map(|p| frequencies.iter().map(move |&f| p as f32 * f));
    let table = |f: fn(f32) -> f32| ops.upload(Tensor::from_slice(&[n_positions, half], &angles().map(f).collect::<Vec<_>>()));
    Ok(RopeTable { cos: table(f32::cos)?, sin: table(f32::sin)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// llama.cpp's converter writes Llama 3.1's stretching as its divisors.
    #[test]
    fn divisors_say_what_another_stretching_came_to() {
        let llama3 = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 128 };
        let frequencies = [1.0, 0.1, 0.03, 0.01, 0.001f32];
        let divisors: Vec<f32> = frequencies.iter().map(|f| f / llama3.stretch(0, *f)).collect();
        assert!(divisors.windows(2).any(|d| d[0] != d[1]), "{divisors:?}");
        let by_divisors = RopeScaling::Divisors(divisors);
        for (i, f) in frequencies.into_iter().enumerate() {
            assert!((by_divisors.stretch(i, f) / llama3.stretch(i, f) - 1.0).abs() < 1e-6);
        }
    }
}
