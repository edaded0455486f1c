//! CLIP's vision tower (Radford et al., arXiv 2103.00020; HF `modeling_clip.py`), up to the layer that LLaVA takes features from.

use std::ops::Range;

use super::acts::ClipActs;
use super::config::{Activation, ClipConfig};
use super::load::Loader;
use super::stage::{Ctx, Stage};
use super::tape::{Saved, Work, copy, kept_or, place};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::{LayerNorm, Linear, Param, VisitParams};
use crate::ops::grad::{self, GradOps, Update};
use crate::ops::{Epilogue, Heads, KvSource, Span, Weight};
use crate::tensor::Tensor;

/// The tower. Layers past the selected hidden state are neither loaded nor run.
pub struct Clip {
    pub(super) patch_size: usize,
    pub(super) n_patches: usize,
    pub(super) patch_embedding: Linear,    // [hidden, 3 * patch_size * patch_size]
    pub(super) class_embedding: Tensor,    // [hidden]
    pub(super) position_embedding: Tensor, // [1 + n_patches, hidden]
    pub(super) pre_norm: LayerNorm,
    pub(super) layers: Vec<Layer>,
    /// Of class and position embedding, if they are trained.
    pub(super) grad: Option<[Tensor; 2]>,
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
            patch_embedding: Linear::new(Weight::stacked(vec![kernel.into()])?, None),
            class_embedding: loader.vector("clip.class_embedding", &[hidden])?,
            position_embedding: loader.vector("clip.position_embedding.weight", &[1 + config.n_patches(), hidden])?,
            pre_norm: loader.layer_norm("clip.pre_layernorm", hidden, config.layer_norm_eps)?,
            layers: (0..n_layers).map(|i| Layer::load(loader, config, i)).collect::<Result<_>>()?,
            grad: None,
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

impl Clip {
    /// Makes room for gradients of all its parameters.
    pub(super) fn train(&mut self, ops: &dyn GradOps, compute: DType) -> Result<()> {
        self.patch_embedding.train(ops, compute)?;
        let gradient = |of: &Tensor| ops.alloc(of.shape(), DType::F32);
        self.grad = Some([gradient(&self.class_embedding)?, gradient(&self.position_embedding)?]);
        self.pre_norm.train(ops)?;
        self.layers.iter_mut().try_for_each(|layer| layer.train(ops, compute))
    }

    /// Shows the parameters that are trained.
    pub(super) fn visit(&mut self, visit: VisitParams<'_>) -> Result<()> {
        if let Some([class, positions]) = &mut self.grad {
            visit(Param { name: "clip.class_embedding", value: &mut self.class_embedding, grad: class, rounded: None })?;
            let (name, value) = ("clip.position_embedding.weight", &mut self.position_embedding);
            visit(Param { name, value, grad: positions, rounded: None })?;
        }
        self.patch_embedding.visit(&["clip.patch_embedding".to_owned()], visit)?;
        self.pre_norm.visit("clip.pre_layernorm", visit)?;
        self.layers.iter_mut().enumerate().try_for_each(|(i, layer)| layer.visit(i, visit))
    }
}

pub(super) struct Layer {
    pub(super) heads: Heads,
    pub(super) norm1: LayerNorm,
    pub(super) qkv: Linear, // [3 * hidden, hidden]
    pub(super) out: Linear, // [hidden, hidden]
    pub(super) norm2: LayerNorm,
    pub(super) fc1: Linear, // [intermediate, hidden]
    pub(super) fc2: Linear, // [hidden, intermediate]
    pub(super) activation: Epilogue,
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

    /// As [`Layer::forward`], from x to y; what the way back needs stays in `s`.
    pub(super) fn forward_saving(
        &self,
        ops: &dyn GradOps,
        x: &Tensor,
        y: &mut Tensor,
        s: &mut Saved,
        w: &mut Work,
        spans: &[Span<'_>],
    ) -> Result<()> {
        let normed = place(&mut s.normed[0], &mut w.normed);
        self.norm1.forward(ops, normed, x)?;
        self.qkv.forward_training(ops, &mut s.qkv, normed, Update::Set)?;
        ops.attention_lse(&mut s.attn, &mut s.lse, &s.qkv, spans, self.heads, false)?;
        copy(ops, &mut s.mid, x)?;
        self.out.forward_training(ops, &mut s.mid, &s.attn, Update::Add)?;
        let normed = place(&mut s.normed[1], &mut w.normed);
        self.norm2.forward(ops, normed, &s.mid)?;
        self.fc1.forward_training(ops, &mut s.mlp_in, normed, Update::Set)?;
        let act = place(&mut s.act, &mut w.act);
        ops.activate(act, &s.mlp_in, by_itself(self.activation))?;
        copy(ops, y, &s.mid)?;
        self.fc2.forward_training(ops, y, act, Update::Add)
    }

    /// d_x, the gradient by y of [`Layer::forward_saving`], becomes that by x; those of parameters that are trained are added to.
    pub(super) fn backward(
        &mut self,
        ops: &dyn GradOps,
        x: &Tensor,
        s: &Saved,
        w: &mut Work,
        d_x: &mut Tensor,
        spans: &[Span<'_>],
    ) -> Result<()> {
        let f = by_itself(self.activation);
        let act = kept_or(&s.act, &mut w.act, |act| ops.activate(act, &s.mlp_in, f))?;
        self.fc2.backward(ops, Some(&mut w.d_act), d_x, act)?;
        ops.activate_backward(&mut w.d_mlp_in, &w.d_act, &s.mlp_in, f)?;
        let normed = kept_or(&s.normed[1], &mut w.normed, |normed| self.norm2.forward(ops, normed, &s.mid))?;
        self.fc1.backward(ops, Some(&mut w.d_normed), &w.d_mlp_in, normed)?;
        self.norm2.backward(ops, d_x, &w.d_normed, &s.mid)?;
        self.out.backward(ops, Some(&mut w.d_attn), d_x, &s.attn)?;
        ops.attention_backward(&mut w.d_qkv, &s.qkv, &s.attn, &w.d_attn, &s.lse, spans, self.heads, false)?;
        let normed = kept_or(&s.normed[0], &mut w.normed, |normed| self.norm1.forward(ops, normed, x))?;
        self.qkv.backward(ops, Some(&mut w.d_normed), &w.d_qkv, normed)?;
        self.norm1.backward(ops, d_x, &w.d_normed, x)
    }

    /// Its linear layers.
    pub(super) fn linears(&mut self) -> [&mut Linear; 4] {
        [&mut self.qkv, &mut self.out, &mut self.fc1, &mut self.fc2]
    }

    /// Makes room for gradients of all its parameters.
    fn train(&mut self, ops: &dyn GradOps, compute: DType) -> Result<()> {
        self.linears().into_iter().try_for_each(|l| l.train(ops, compute))?;
        [&mut self.norm1, &mut self.norm2].into_iter().try_for_each(|norm| norm.train(ops))
    }

    /// Shows the parameters of layer `index` that are trained.
    fn visit(&mut self, index: usize, visit: VisitParams<'_>) -> Result<()> {
        let name = |module: &str| format!("clip.layers.{index}.{module}");
        self.norm1.visit(&name("layer_norm1"), visit)?;
        self.qkv.visit(&["q_proj", "k_proj", "v_proj"].map(|m| name(&format!("self_attn.{m}"))), visit)?;
        self.out.visit(&[name("self_attn.out_proj")], visit)?;
        self.norm2.visit(&name("layer_norm2"), visit)?;
        self.fc1.visit(&[name("mlp.fc1")], visit)?;
        self.fc2.visit(&[name("mlp.fc2")], visit)
    }
}

/// The activation function of an epilogue, by itself.
///
/// # Panics
/// If it has none: layers are loaded with one.
pub(super) fn by_itself(epilogue: Epilogue) -> grad::Activation {
    match epilogue {
        Epilogue::QuickGelu => grad::Activation::QuickGelu,
        Epilogue::Gelu => grad::Activation::Gelu,
        Epilogue::Store | Epilogue::Add => panic!("{epilogue:?} is no activation function"),
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
