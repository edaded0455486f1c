//! How the learning rate goes over a run: equal to transformers' `get_scheduler`, step for step.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// The course of the learning rate after its warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// It stays.
    Constant,
    /// It falls to 0 on a line.
    Linear,
    /// It falls to 0 on half a wave.
    Cosine,
}

/// A learning rate for each step of a run, as factors of the one that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    decay: Decay,
    n_warmup: usize,
    n_steps: usize,
}

impl Schedule {
    /// A schedule of `n_steps` optimizer steps. It warms up over `warmup_steps` of them, or, if that is 0, over ⌈n_steps · warmup_ratio⌉.
    pub fn new(decay: Decay, n_steps: usize, warmup_steps: usize, warmup_ratio: f64) -> Self {
        let by_ratio = (n_steps as f64 * warmup_ratio).ceil() as usize;
        Self { decay, n_warmup: if warmup_steps > 0 { warmup_steps } else { by_ratio }, n_steps }
    }

    /// Steps of its warm-up.
    pub fn n_warmup(&self) -> usize {
        self.n_warmup
    }

    /// The factor at a step, counted from 0:
    ///
    /// s < w:  s / w
    /// else:   1 (constant) · (n − s) / (n − w) (linear) · (1 + cos(π·(s − w)/(n − w))) / 2 (cosine), never below 0
    ///
    /// with w steps of warm-up and n steps in all. The first step of a warm-up has the factor 0, as in transformers.
    pub fn factor(&self, step: usize) -> f64 {
        let Self { decay, n_warmup, n_steps } = *self;
        if step < n_warmup {
            return step as f64 / n_warmup as f64;
        }
        let n_decay = n_steps.saturating_sub(n_warmup).max(1) as f64;
        let factor = match decay {
            Decay::Constant => 1.0,
            Decay::Linear => n_steps.saturating_sub(step) as f64 / n_decay,
            Decay::Cosine => 0.5 * (1.0 + (PI * ((step - n_warmup) as f64 / n_decay)).cos()),
        };
        factor.max(0.0)
    }
}
