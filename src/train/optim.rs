//! [`Optimizer`]: AdamW over the parameters of a model that are trained, each part with a learning rate of its own.

use std::collections::BTreeMap;

use super::config::{Config, Precision};
use super::loss_scale::LossScale;
use crate::error::{Error, Result};
use crate::model::Llava;
use crate::ops::grad::{AdamW, GradOps};
use crate::tensor::Tensor;

/// What is added to the norm of all gradients before they are cut down to size, as PyTorch's `clip_grad_norm_` does.
const NORM_EPS: f64 = 1e-6;

/// AdamW with its moments, and how much each part of the model learns.
pub struct Optimizer {
    moments: BTreeMap<String, Moments>,
    n_steps: u64,
    /// In f16.
    loss_scale: Option<LossScale>,
    lr: f64,
    projector_lr: f64,
    vision_lr: f64,
    weight_decay: f64,
    betas: [f64; 2],
    eps: f64,
    /// 0: gradients are left as they are.
    max_grad_norm: f64,
}

/// Of one parameter, f32, as large.
struct Moments {
    m: Tensor,
    v: Tensor,
}

impl Optimizer {
    /// With the settings of a run, before its first step.
    pub fn new(config: &Config) -> Self {
        Self {
            moments: BTreeMap::new(),
            n_steps: 0,
            loss_scale: (config.dtype == Precision::F16).then(LossScale::default),
            lr: config.lr,
            projector_lr: config.projector_lr.unwrap_or(config.lr),
            vision_lr: config.vision_lr.unwrap_or(config.lr),
            weight_decay: config.weight_decay,
            betas: [config.beta1, config.beta2],
            eps: config.adam_eps,
            max_grad_norm: config.max_grad_norm,
        }
    }

    /// One step along the gradients of `model`, which are zero afterwards; learning rates are `factor` times those of the run
    /// ([`Schedule::factor`](super::schedule::Schedule::factor)). Returns the norm of all gradients before they were cut down.
    ///
    /// In f16 gradients are those of [`Optimizer::loss_scale`] times the loss. Where one of them is not finite, the scale falls, and that is all:
    /// there is no norm then.
    ///
    /// # Errors
    /// If a gradient is not finite, and no scale is to blame: its parameter is named, and none has been changed.
    pub fn step(&mut self, ops: &dyn GradOps, model: &mut Llava, factor: f64) -> Result<Option<f64>> {
        let (mut square, mut not_finite) = (0.0, None);
        model.visit_params(&mut |param| {
            let of_param = ops.sq_norm(&[param.grad])?;
            if !of_param.is_finite() {
                // The last is the nearest to the loss, where gradients come from.
                not_finite = Some(param.name.to_owned());
            }
            square += of_param;
            Ok(())
        })?;
        let is_finite = not_finite.is_none();
        let scale = f64::from(self.loss_scale.map_or(1.0, |scale| scale.value()));
        if let Some(place) = not_finite {
            if scale <= 1.0 {
                return Err(Error::Check {
                    place,
                    problem: "its gradient is not finite: take a lower learning rate, or, in f16, --dtype bf16".to_owned(),
                });
            }
            model.visit_params(&mut |param| ops.clear(param.grad))?;
        }
        if let Some(loss_scale) = &mut self.loss_scale {
            loss_scale.update(is_finite);
        }
        if !is_finite {
            return Ok(None);
        }
        let norm = square.sqrt() / scale;
        let is_cut = self.max_grad_norm > 0.0;
        let grad_scale = if is_cut { (self.max_grad_norm / (norm + NORM_EPS)).min(1.0) } else { 1.0 };
        self.n_steps += 1;
        model.visit_params(&mut |param| {
            let options = AdamW {
                lr: factor * self.lr_of(param.name),
                beta1: self.betas[0],
                beta2: self.betas[1],
                eps: self.eps,
                weight_decay: if decays(param.name) { self.weight_decay } else { 0.0 },
                step: self.n_steps,
                grad_scale: grad_scale / scale,
            };
            if !self.moments.contains_key(param.name) {
                let zeros = || ops.alloc(param.value.shape(), param.value.dtype());
                self.moments.insert(param.name.to_owned(), Moments { m: zeros()?, v: zeros()? });
            }
            let Moments { m, v } = self.moments.get_mut(param.name).expect("it was just made");
            ops.adamw(param.value, m, v, param.grad, param.rounded, &options)?;
            ops.clear(param.grad)
        })?;
        Ok(Some(norm))
    }

    /// First and second moment of the parameter `name`; none before its first step.
    pub fn moments(&self, name: &str) -> Option<[&Tensor; 2]> {
        self.moments.get(name).map(|Moments { m, v }| [m, v])
    }

    /// Gives the parameter `name` its moments.
    pub fn set_moments(&mut self, name: &str, [m, v]: [Tensor; 2]) {
        self.moments.insert(name.to_owned(), Moments { m, v });
    }

    /// Steps that were made.
    pub fn n_steps(&self) -> u64 {
        self.n_steps
    }

    /// Says how many steps were made before.
    pub fn set_n_steps(&mut self, n_steps: u64) {
        self.n_steps = n_steps;
    }

    /// What the loss is to be multiplied by before gradients are made of it, with what it follows from; none if by nothing.
    pub fn loss_scale(&self) -> Option<LossScale> {
        self.loss_scale
    }

    /// Goes on with the scale of a run that was stopped.
    pub fn set_loss_scale(&mut self, loss_scale: Option<LossScale>) {
        self.loss_scale = loss_scale;
    }

    fn lr_of(&self, name: &str) -> f64 {
        match name.split('.').next() {
            Some("projector") => self.projector_lr,
            Some("clip") => self.vision_lr,
            _ => self.lr,
        }
    }
}

/// Whether a parameter decays: all but biases and norms, as in transformers' `Trainer`.
fn decays(name: &str) -> bool {
    !name.ends_with(".bias") && !name.contains("norm")
}
