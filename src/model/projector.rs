//! The projector: from vision features to the decoder's embedding space (Liu et al., arXiv 2304.08485, 2310.03744).

use super::clip::by_itself;
use super::config::ProjectorConfig;
use super::load::Loader;
use crate::dtype::DType;
use crate::error::Result;
use crate::nn::{Linear, VisitParams};
use crate::ops::grad::{GradOps, Update};
use crate::ops::{Epilogue, Ops};
use crate::tensor::Tensor;

/// Linear layers with an activation between them; none of them for an identity.
pub struct Projector {
    pub(super) layers: Vec<Linear>,
    pub(super) activation: Epilogue,
}

impl Projector {
    /// From features of width `vision_size` to embeddings of width `hidden_size`.
    pub fn load(loader: &Loader<'_>, config: &ProjectorConfig, vision_size: usize, hidden_size: usize) -> Result<Self> {
        let ProjectorConfig::Mlp { n_linear, activation } = *config else {
            return Ok(Self { layers: Vec::new(), activation: Epilogue::Store });
        };
        let layer = |i: usize| {
            let k = if i == 0 { vision_size } else { hidden_size };
            loader.linear_bias("projector", &[(&format!("linear_{}", i + 1), hidden_size)], k)
        };
        Ok(Self { layers: (0..n_linear).map(layer).collect::<Result<_>>()?, activation: activation.epilogue() })
    }

    /// act(…act(features·W₁ᵀ + b₁)…)·Wₙᵀ + bₙ: `[tokens, vision hidden]` → `[tokens, hidden]`.
    pub fn forward(&self, ops: &dyn Ops, features: Tensor) -> Result<Tensor> {
        let mut x = features;
        for (i, layer) in self.layers.iter().enumerate() {
            let mut y = ops.alloc(&[x.rows(), layer.weight.n()], ops.activation_dtype())?;
            let is_last = i + 1 == self.layers.len();
            layer.forward_with(ops, &mut y, &x, if is_last { Epilogue::Store } else { self.activation })?;
            x = y;
        }
        Ok(x)
    }
}

/// What a training pass keeps of the projector.
pub(super) struct ProjectorSaved {
    /// Of each layer, and the last output.
    xs: Vec<Tensor>,
    /// What each activation function was given.
    pre: Vec<Tensor>,
}

impl ProjectorSaved {
    /// The features, `[tokens, hidden]`.
    pub fn features(&self) -> &Tensor {
        self.xs.last().expect("there is an input at least")
    }
}

impl Projector {
    /// As [`Projector::forward`]; what the way back needs is kept.
    pub(super) fn forward_saving(&self, ops: &dyn GradOps, features: Tensor) -> Result<ProjectorSaved> {
        let mut saved = ProjectorSaved { xs: vec![features], pre: Vec::new() };
        for (i, layer) in self.layers.iter().enumerate() {
            let x = &saved.xs[i];
            let alloc = || ops.alloc(&[x.rows(), layer.weight.n()], ops.activation_dtype());
            let mut r = alloc()?;
            layer.forward_training(ops, &mut r, x, Update::Set)?;
            if i + 1 < self.layers.len() {
                let mut y = alloc()?;
                ops.activate(&mut y, &r, by_itself(self.activation))?;
                saved.pre.push(r);
                saved.xs.push(y);
            } else {
                saved.xs.push(r);
            }
        }
        Ok(saved)
    }

    /// The gradient by the vision features, if it is wanted, of that by the projected ones; those of parameters that are trained are
    /// added to.
    pub(super) fn backward(
        &mut self,
        ops: &dyn GradOps,
        saved: &ProjectorSaved,
        dy: Tensor,
        want_dx: bool,
    ) -> Result<Option<Tensor>> {
        let mut dy = dy;
        for (i, layer) in self.layers.iter_mut().enumerate().rev() {
            let x = &saved.xs[i];
            if i == 0 && !want_dx {
                layer.backward(ops, None, &dy, x)?;
                return Ok(None);
            }
            let mut dx = ops.alloc(x.shape(), ops.activation_dtype())?;
            layer.backward(ops, Some(&mut dx), &dy, x)?;
            dy = dx;
            if let Some(pre) = i.checked_sub(1).map(|before| &saved.pre[before]) {
                let mut d_pre = ops.alloc(pre.shape(), ops.activation_dtype())?;
                ops.activate_backward(&mut d_pre, &dy, pre, by_itself(self.activation))?;
                dy = d_pre;
            }
        }
        Ok(want_dx.then_some(dy))
    }

    /// Makes room for gradients of all its parameters.
    pub(super) fn train(&mut self, ops: &dyn GradOps, compute: DType) -> Result<()> {
        self.layers.iter_mut().try_for_each(|layer| layer.train(ops, compute))
    }

    /// Shows the parameters that are trained.
    pub(super) fn visit(&mut self, visit: VisitParams<'_>) -> Result<()> {
        self.layers.iter_mut().enumerate().try_for_each(|(i, layer)| layer.visit(&[format!("projector.linear_{}", i + 1)], visit))
    }
}
