//! [`LossScale`]: what the loss is multiplied by in f16, so that gradients too small for it do not become zero (Micikevicius et al., arXiv
//! 1710.03740, section 3.2).

use serde::{Deserialize, Serialize};

/// By what scales rise and fall.
const FACTOR: f32 = 2.0;
/// Steps without overflow after which the scale rises.
const INTERVAL: u64 = 2000;

/// A scale that follows the gradients, by the rule of PyTorch's `GradScaler`: it falls with each step whose gradients are not all finite, and
/// rises after many steps without one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    scale: f32,
    /// Steps since it last rose or fell.
    n_good: u64,
}

impl Default for LossScale {
    fn default() -> Self {
        Self { scale: 65536.0, n_good: 0 }
    }
}

impl LossScale {
    /// The factor: a power of two, so that it changes no digit.
    pub fn value(&self) -> f32 {
        self.scale
    }

    /// Says how a step with this scale ended.
    pub fn update(&mut self, is_finite: bool) {
        self.n_good = if is_finite { self.n_good + 1 } else { 0 };
        if !is_finite {
            self.scale /= FACTOR;
        } else if self.n_good == INTERVAL {
            let higher = self.scale * FACTOR;
            self.scale = if higher.is_finite() { higher } else { self.scale };
            self.n_good = 0;
        }
    }
}
