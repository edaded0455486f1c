//! The projector: from vision features to the decoder's embedding space (Liu et al., arXiv 2304.08485, 2310.03744).

use super::config::ProjectorConfig;
use super::load::Loader;
use crate::error::Result;
use crate::nn::Linear;
use crate::ops::{Epilogue, Ops};
use crate::tensor::Tensor;

/// Linear layers with an activation between them; none of them for an identity.
pub struct Projector {
    layers: Vec<Linear>,
    activation: Epilogue,
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
