//! CLIP's vision tower (Radford et al., arXiv 2103.00020; HF `modeling_clip.py`), up to the layer that LLaVA takes features from.

use std::ops::Range;

use super::acts::ClipActs;
use super::config::{Activation, ClipConfig};
use super::load::Loader;
use super::stage::{Ctx, Stage};
use crate::error::{Error, Result};
use crate::nn::{LayerNorm, Linear};
use crate::ops::{Epilogue, Heads, KvSource, Span, Weight};
use crate::tensor::Tensor;

/// The tower. Layers past the selected hidden state are neither loaded nor run.
pub struct Clip {
    patch_size: usize,
    n_patches: usize,
    patch_embedding: Linear,    // [hidden, 3 * patch_size * patch_size]
    class_embedding: Tensor,    // [hidden]
    position_embedding: Tensor, // [1 + n_patches, hidden]
    pre_norm: LayerNorm,
    layers: Vec<Layer>,
}

impl Clip {
    /// The first `n_layers` layers of the tower.
    pub fn load(loader: &Loader<'_>, config: &ClipConfig, n_layers: usize) -> Result<Self> {
        let (hidden, patch) = (config.hidden_size, config.patch_size);
        // The convolution's stride is its width: it is a matrix product over patches.
        let kernel = loader.weights.tensor("clip.patch_embedding.weight", &[hidden, 3, patch, patch])?;
        let kernel = match loader.dtype {
            Some(dtype) if dtype != kernel.dtype() => kernel.converted(dtype),
            _ => kernel,
        };
        let kernel = loader.ops.upload(kernel.reshaped(&[hidden, 3 * patch * patch])?)?;
        Ok(Self {
            patch_size: patch,
            n_patches: config.n_patches(),
            patch_embedding: Linear { weight: Weight::stacked(vec![kernel.into()])?, bias: None },
            class_embedding: loader.vector("clip.class_embedding", &[hidden])?,
            position_embedding: loader.vector("clip.position_embedding.weight", &[1 + config.n_patches(), hidden])?,
            pre_norm: loader.layer_norm("clip.pre_layernorm", hidden, config.layer_norm_eps)?,
            layers: (0..n_layers).map(|i| Layer::load(loader, config, i)).collect::<Result<_>>()?,
        })
    }

    /// Hidden states of the pictures `images` of `pixels` f32 `[n, 3, image_size, image_size]`, left in `acts.x`
    /// `[images · (1 + n_patches), hidden]`.
    pub fn forward(&self, ctx: &mut Ctx<'_>, acts: &mut ClipActs, pixels: &Tensor, images: Range<usize>) -> Result<()> {
        let n_images = images.len();
        for t in [&mut acts.patches, &mut acts.patch_embeddings] {
            t.set_rows(n_images * self.n_patches);
        }
        for t in [&mut acts.x, &mut acts.normed, &mut acts.qkv, &mut acts.attn, &mut acts.mlp] {
            t.set_rows(n_images * (1 + self.n_patches));
        }
        let in_embeddings = |e: Error| e.within("vision embeddings");
        ctx.ops.patchify(&mut acts.patches, pixels, images, self.patch_size).map_err(in_embeddings)?;
        self.patch_embedding.forward(ctx.ops, &mut acts.patch_embeddings, &acts.patches).map_err(in_embeddings)?;
        ctx.observe(Stage::PatchEmbedding, &acts.patch_embeddings)?;
        let (class, positions) = (&self.class_embedding, &self.position_embedding);
        ctx.ops.clip_embed(&mut acts.normed, &acts.patch_embeddings, class, positions).map_err(in_embeddings)?;
        ctx.observe(Stage::ClipEmbeddings, &acts.normed)?;
        self.pre_norm.forward(ctx.ops, &mut acts.x, &acts.normed).map_err(in_embeddings)?;
        ctx.observe(Stage::ClipHidden(0), &acts.x)?;
        let spans = Span::uniform(n_images, 1 + self.n_patches);
        for (i, layer) in self.layers.iter().enumerate() {
            ctx.check_cancelled()?;
            layer.forward(ctx, acts, &spans).map_err(|e| e.within(format_args!("vision layer {i}")))?;
            ctx.observe(Stage::ClipHidden(i + 1), &acts.x)?;
        }
        Ok(())
    }
}

struct Layer {
    heads: Heads,
    norm1: LayerNorm,
    qkv: Linear, // [3 * hidden, hidden]
    out: Linear, // [hidden, hidden]
    norm2: LayerNorm,
    fc1: Linear, // [intermediate, hidden]
    fc2: Linear, // [hidden, intermediate]
    activation: Epilogue,
}

impl Layer {
    fn load(loader: &Loader<'_>, config: &ClipConfig, index: usize) -> Result<Self> {
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let layer = format!("clip.layers.{index}");
        let (attn, mlp) = (format!("{layer}.self_attn"), format!("{layer}.mlp"));
        Ok(Self {
            heads: Heads { n_heads: config.n_heads, n_kv_heads: config.n_heads, head_dim: config.head_dim() },
            norm1: loader.layer_norm(&format!("{layer}.layer_norm1"), hidden, config.layer_norm_eps)?,
            qkv: loader.linear_bias(&attn, &[("q_proj", hidden), ("k_proj", hidden), ("v_proj", hidden)], hidden)?,
            out: loader.linear_bias(&attn, &[("out_proj", hidden)], hidden)?,
            norm2: loader.layer_norm(&format!("{layer}.layer_norm2"), hidden, config.layer_norm_eps)?,
            fc1: loader.linear_bias(&mlp, &[("fc1", intermediate)], hidden)?,
            fc2: loader.linear_bias(&mlp, &[("fc2", hidden)], intermediate)?,
            activation: config.activation.epilogue(),
        })
    }

    /// x += W_o·Attn(W_qkv·LN₁(x)),  then  x += W₂·act(W₁·LN₂(x))
    fn forward(&self, ctx: &mut Ctx<'_>, acts: &mut ClipActs, spans: &[Span<'_>]) -> Result<()> {
        let ops = ctx.ops;
        self.norm1.forward(ops, &mut acts.normed, &acts.x)?;
        self.qkv.forward(ops, &mut acts.qkv, &acts.normed)?;
        ops.attention(&mut acts.attn, &acts.qkv, KvSource::Own, spans, self.heads, false)?;
        self.out.forward_add(ops, &mut acts.x, &acts.attn)?;
        self.norm2.forward(ops, &mut acts.normed, &acts.x)?;
        self.fc1.forward_with(ops, &mut acts.mlp, &acts.normed, self.activation)?;
        self.fc2.forward_add(ops, &mut acts.x, &acts.mlp)
    }
}

impl Activation {
    /// The epilogue of a matrix product that applies it.
    pub(super) fn epilogue(self) -> Epilogue {
        match self {
            Self::QuickGelu => Epilogue::QuickGelu,
            Self::Gelu => Epilogue::Gelu,
        }
    }
}
