//! What a checkpoint is: the shapes and constants of its three parts, whichever layout they were written in.

use std::fmt;

pub use crate::image::{Fit, Preprocess};
pub use crate::nn::RopeScaling;
use crate::ops::Heads;
use serde::Serialize;

/// CLIP vision tower (ViT), as `vision_config` of a llava-hf checkpoint or `config.json` of a CLIP checkpoint gives it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClipConfig {
    /// Side of the square input picture in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Width of a token.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Layers in the checkpoint (not all of them are run, see [`LlavaConfig::n_vision_layers`]).
    pub n_layers: usize,
    /// Attention heads.
    pub n_heads: usize,
    /// Epsilon of the layer norms.
    pub layer_norm_eps: f32,
    /// Activation of the MLP.
    pub activation: Activation,
}

impl ClipConfig {
    /// The tower of every released LLaVA, `openai/clip-vit-large-patch14` and, for 336 pixels, `-336`.
    pub fn vit_l_14(image_size: usize) -> Self {
        Self {
            image_size,
            patch_size: 14,
            hidden_size: 1024,
            intermediate_size: 4096,
            n_layers: 24,
            n_heads: 16,
            layer_norm_eps: 1e-5,
            activation: Activation::QuickGelu,
        }
    }

    /// Patches of a picture, without the class token.
    pub fn n_patches(&self) -> usize {
        (self.image_size / self.patch_size).pow(2)
    }

    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.n_heads
    }
}

/// Activation functions that the checkpoints name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Activation {
    /// x·σ(1.702x), CLIP's (`quick_gelu`).
    QuickGelu,
    /// x·Φ(x) with the exact erf (`gelu`).
    Gelu,
}

/// LLaMA decoder.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LlamaConfig {
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of a token.
    pub hidden_size: usize,
    /// Width of the SwiGLU MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; a divisor of `n_heads`.
    pub n_kv_heads: usize,
    /// Width of one head; a multiple of 8.
    pub head_dim: usize,
    /// Epsilon of the RMS norms.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// How the frequencies are stretched for longer contexts.
    pub rope_scaling: RopeScaling,
    /// Longest sequence in tokens.
    pub max_position_embeddings: usize,
    /// Whether the head is the embedding matrix.
    pub tie_word_embeddings: bool,
}

impl LlamaConfig {
    /// Heads of its attention layers.
    pub fn heads(&self) -> Heads {
        Heads { n_heads: self.n_heads, n_kv_heads: self.n_kv_heads, head_dim: self.head_dim }
    }
}

/// The layers between the vision tower and the decoder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum ProjectorConfig {
    /// Features are passed on as they are.
    Identity,
    /// `n_linear` linear layers with an activation between them; `linear` is 1 of them, `mlp2x_gelu` 2.
    Mlp {
        /// Linear layers.
        n_linear: usize,
        /// Activation between them.
        activation: Activation,
    },
}

impl fmt::Display for ProjectorConfig {
    /// As `mm_projector_type` of the original writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Identity => f.write_str("identity"),
            Self::Mlp { n_linear: 1, .. } => f.write_str("linear"),
            Self::Mlp { n_linear, activation: Activation::Gelu } => write!(f, "mlp{n_linear}x_gelu"),
            Self::Mlp { n_linear, activation: Activation::QuickGelu } => write!(f, "mlp{n_linear}x_quick_gelu"),
        }
    }
}

/// Which of CLIP's tokens become image tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum FeatureSelect {
    /// The patches (`patch`, `default`).
    Patch,
    /// Class token and patches (`cls_patch`, `full`).
    ClsPatch,
}

/// Whose conventions a checkpoint follows where llava-hf and the original LLaVA differ: preprocessing, tokenization, template.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Profile {
    /// llava-hf: shortest edge to the picture size, centre crop; the whole prompt tokenized at once.
    Hf,
    /// haotian-liu/LLaVA: pad to a square where the config says so; the prompt tokenized piece by piece around `<image>`.
    Original,
}

/// A whole LLaVA.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LlavaConfig {
    /// Image encoder.
    pub vision: ClipConfig,
    /// Between encoder and decoder.
    pub projector: ProjectorConfig,
    /// Decoder.
    pub text: LlamaConfig,
    /// How many of the vision layers are run: the selected hidden state is the output of this many layers.
    pub n_vision_layers: usize,
    /// Which tokens of that hidden state are used.
    pub feature_select: FeatureSelect,
    /// Conventions of its layout.
    pub profile: Profile,
    /// Preprocessing of pictures.
    pub preprocess: Preprocess,
    /// The id that stands for an image position in this vocabulary; `None` in the original layout, which uses -200 outside it.
    pub image_token_index: Option<u32>,
    /// Ids that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// Longest prompt and answer together, in tokens.
    pub context_tokens: usize,
}

impl LlavaConfig {
    /// Whether a canonical name is that of a layer of the tower that LLaVA does not run, so that it matters to nobody.
    pub fn is_not_run(&self, canonical: &str) -> bool {
        let layer = canonical.strip_prefix("clip.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
        layer.is_some_and(|layer| (self.n_vision_layers..self.vision.n_layers).contains(&layer))
    }

    /// The released models by name: `llava-1.5-7b` and `llava-1.5-13b`; none of another name.
    pub fn by_name(name: &str) -> Option<Self> {
        let (hidden_size, intermediate_size, n_layers, n_heads) = match name {
            "llava-1.5-7b" => (4096, 11008, 32, 32),
            "llava-1.5-13b" => (5120, 13824, 40, 40),
            _ => return None,
        };
        Some(Self {
            vision: ClipConfig::vit_l_14(336),
            projector: ProjectorConfig::Mlp { n_linear: 2, activation: Activation::Gelu },
            text: LlamaConfig {
                vocab_size: 32064,
                hidden_size,
                intermediate_size,
                n_layers,
                n_heads,
                n_kv_heads: n_heads,
                head_dim: 128,
                rms_norm_eps: 1e-5,
                rope_theta: 10_000.0,
                rope_scaling: RopeScaling::None,
                max_position_embeddings: 4096,
                tie_word_embeddings: false,
            },
            n_vision_layers: 23,
            feature_select: FeatureSelect::Patch,
            profile: Profile::Hf,
            preprocess: Preprocess::clip(336, Fit::Crop),
            image_token_index: Some(32000),
            eos_token_ids: vec![2],
            context_tokens: 4096,
        })
    }

    /// Tokens that one picture takes in the prompt.
    pub fn tokens_per_image(&self) -> usize {
        self.vision.n_patches() + usize::from(self.feature_select == FeatureSelect::ClsPatch)
    }
}
