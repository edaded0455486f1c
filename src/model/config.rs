//! What a checkpoint is: the shapes and constants of its three parts, whichever layout they were written in.

/// CLIP vision tower (ViT), as `vision_config` of a llava-hf checkpoint or `config.json` of a CLIP checkpoint gives it.
#[derive(Clone, Debug, PartialEq)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x·σ(1.702x), CLIP's (`quick_gelu`).
    QuickGelu,
    /// x·Φ(x) with the exact erf (`gelu`).
    Gelu,
}

/// LLaMA decoder.
#[derive(Clone, Debug, PartialEq)]
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

/// How rotary frequencies are stretched (`rope_scaling` / `rope_parameters`).
#[derive(Clone, Debug, PartialEq)]
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
}

/// The layers between the vision tower and the decoder.
#[derive(Clone, Debug, PartialEq, Eq)]
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

/// Which of CLIP's tokens become image tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureSelect {
    /// The patches (`patch`, `default`).
    Patch,
    /// Class token and patches (`cls_patch`, `full`).
    ClsPatch,
}

/// Whose conventions a checkpoint follows where llava-hf and the original LLaVA differ: preprocessing, tokenization, template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// llava-hf: shortest edge to the picture size, centre crop; the whole prompt tokenized at once.
    Hf,
    /// haotian-liu/LLaVA: pad to a square where the config says so; the prompt tokenized piece by piece around `<image>`.
    Original,
}

/// How a picture of any shape becomes a square one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AspectRatio {
    /// Shortest edge to the picture size, then centre crop.
    Crop,
    /// Padded to a square with the mean colour first.
    Pad,
}

/// Pixel preprocessing, as `preprocessor_config.json` gives it.
#[derive(Clone, Debug, PartialEq)]
pub struct PreprocessConfig {
    /// Length of the shortest edge after resizing, in pixels.
    pub shortest_edge: usize,
    /// Side of the centre crop in pixels: the picture size of the tower.
    pub crop_size: usize,
    /// Mean of the channels R, G, B after division by 255.
    pub mean: [f32; 3],
    /// Standard deviation of the channels.
    pub std: [f32; 3],
    /// Crop or pad.
    pub aspect_ratio: AspectRatio,
}

/// A whole LLaVA.
#[derive(Clone, Debug, PartialEq)]
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
    pub preprocess: PreprocessConfig,
    /// The id that stands for an image position in this vocabulary; `None` in the original layout, which uses -200 outside it.
    pub image_token_index: Option<u32>,
    /// Ids that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// Longest prompt and answer together, in tokens.
    pub context_tokens: usize,
}

impl LlavaConfig {
    /// Tokens that one picture takes in the prompt.
    pub fn tokens_per_image(&self) -> usize {
        self.vision.n_patches() + usize::from(self.feature_select == FeatureSelect::ClsPatch)
    }
}
