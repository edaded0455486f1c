//! `config.json` of both layouts, read into one [`LlavaConfig`].
//!
//! Absent keys have the defaults of the HF configuration classes, because `save_pretrained` may leave out what equals them. Whatever
//! changes the numbers a model computes and is not implemented is an error here, never ignored.

use crate::error::{Error, Result};

use super::config::{
    Activation, ClipConfig, FeatureSelect, LlamaConfig, LlavaConfig, Preprocess, Profile, ProjectorConfig, RopeScaling,
};
use super::keys::Keys;

/// Widest layer that is taken seriously; LLaMA 405B has 53 248.
const MAX_WIDTH: usize = 1 << 20;
/// Most layers or heads that are taken seriously.
const MAX_LAYERS: usize = 1 << 10;
/// Largest vocabulary that is taken seriously.
const MAX_VOCAB: usize = 1 << 22;
/// Longest context that is taken seriously.
const MAX_CONTEXT: usize = 1 << 24;

/// Reads `config.json` of a llava-hf checkpoint; `generation` is its `generation_config.json`.
///
/// # Errors
/// [`Error::File`] if a value is malformed or contradicts another, [`Error::Unsupported`] if it asks for what is not implemented.
pub fn hf(keys: &Keys, generation: Option<&Keys>, preprocess: Preprocess) -> Result<LlavaConfig> {
    // LlavaConfig takes ViT-L/14-336 without `vision_config`, but fills the gaps of one from CLIPVisionConfig's defaults.
    let vision_keys = keys.object("vision_config")?;
    let vision = if keys.has("vision_config") { clip(&vision_keys)? } else { ClipConfig::vit_l_14(336) };
    let text_keys = keys.object("text_config")?;
    let mut text = llama(&text_keys, text_keys.str("model_type")?.unwrap_or("llama"))?;
    text.tie_word_embeddings |= keys.bool("tie_word_embeddings")?.unwrap_or(false);
    if keys.bool("multimodal_projector_bias")? == Some(false) {
        return Err(keys.unsupported("multimodal_projector_bias", "projectors without a bias are not supported"));
    }
    let image_token_key = if keys.has("image_token_index") { "image_token_index" } else { "image_token_id" };
    let image_token_index = keys.int(image_token_key, 0..=i64::from(u32::MAX))?.unwrap_or(32000) as u32;
    if image_token_index as usize >= text.vocab_size {
        return Err(keys.error(image_token_key, &format!("an id below `text_config.vocab_size` {}", text.vocab_size)));
    }
    let feature_select = match keys.str("vision_feature_select_strategy")? {
        None | Some("default") => FeatureSelect::Patch,
        Some("full") => FeatureSelect::ClsPatch,
        Some(_) => return Err(keys.error("vision_feature_select_strategy", "default or full")),
    };
    let eos_token_ids = eos_token_ids(&[generation, Some(&text_keys), Some(keys)])?;
    Ok(LlavaConfig {
        n_vision_layers: n_vision_layers(keys, "vision_feature_layer", Some(-2), &vision)?,
        projector: ProjectorConfig::Mlp { n_linear: 2, activation: activation(keys, "projector_hidden_act", Activation::Gelu)? },
        feature_select,
        profile: Profile::Hf,
        preprocess,
        image_token_index: Some(image_token_index),
        eos_token_ids,
        context_tokens: text.max_position_embeddings,
        vision,
        text,
    })
}

/// Reads `config.json` of an original checkpoint, whose tower is described by `vision` and `preprocess` from elsewhere.
///
/// # Errors
/// As [`hf`].
pub fn original(keys: &Keys, generation: Option<&Keys>, vision: ClipConfig, preprocess: Preprocess) -> Result<LlavaConfig> {
    if keys.bool("mm_use_im_start_end")? == Some(true) {
        return Err(keys.unsupported("mm_use_im_start_end", "prompts with <im_start> and <im_end> are not supported"));
    }
    let model_type = match keys.str("model_type")?.unwrap_or("llava") {
        "llava" | "llava_llama" => "llama",
        "llava_mistral" => "mistral",
        other => other,
    };
    let text = llama(keys, model_type)?;
    if keys.count("mm_hidden_size", MAX_WIDTH)?.is_some_and(|n| n != vision.hidden_size) {
        return Err(keys.error("mm_hidden_size", &format!("the width of the vision tower, {}", vision.hidden_size)));
    }
    let feature_select = match keys.str("mm_vision_select_feature")? {
        None | Some("patch") => FeatureSelect::Patch,
        Some("cls_patch") => FeatureSelect::ClsPatch,
        Some(_) => return Err(keys.error("mm_vision_select_feature", "patch or cls_patch")),
    };
    let context_tokens = match keys.count("max_sequence_length", MAX_CONTEXT)? {
        Some(tokens) => tokens,
        None => keys.count("tokenizer_model_max_length", usize::MAX >> 1)?.unwrap_or(MAX_CONTEXT).min(text.max_position_embeddings),
    };
    let projector = original_projector(keys)?;
    if projector == ProjectorConfig::Identity && vision.hidden_size != text.hidden_size {
        return Err(keys.error("mm_projector_type", &format!("a projector from {} to {}", vision.hidden_size, text.hidden_size)));
    }
    Ok(LlavaConfig {
        n_vision_layers: n_vision_layers(keys, "mm_vision_select_layer", None, &vision)?,
        projector,
        feature_select,
        profile: Profile::Original,
        preprocess,
        image_token_index: None,
        eos_token_ids: eos_token_ids(&[generation, Some(keys)])?,
        context_tokens,
        vision,
        text,
    })
}

/// Reads the keys of HF's `CLIPVisionConfig`.
///
/// # Errors
/// As [`hf`].
pub fn clip(keys: &Keys) -> Result<ClipConfig> {
    if !matches!(keys.str("model_type")?, None | Some("clip_vision_model" | "clip")) {
        return Err(keys.unsupported("model_type", "the vision tower must be a clip_vision_model"));
    }
    if !matches!(keys.int("num_channels", 1..=1 << 10)?, None | Some(3)) {
        return Err(keys.unsupported("num_channels", "pictures have 3 channels"));
    }
    let width = |key, default| Ok::<_, Error>(keys.count(key, MAX_WIDTH)?.unwrap_or(default));
    let config = ClipConfig {
        image_size: keys.count("image_size", 1 << 14)?.unwrap_or(224),
        patch_size: keys.count("patch_size", 1 << 14)?.unwrap_or(32),
        hidden_size: width("hidden_size", 768)?,
        intermediate_size: width("intermediate_size", 3072)?,
        n_layers: keys.count("num_hidden_layers", MAX_LAYERS)?.unwrap_or(12),
        n_heads: keys.count("num_attention_heads", MAX_LAYERS)?.unwrap_or(12),
        layer_norm_eps: keys.positive("layer_norm_eps")?.unwrap_or(1e-5),
        activation: activation(keys, "hidden_act", Activation::QuickGelu)?,
    };
    if !config.image_size.is_multiple_of(config.patch_size) {
        return Err(keys.error("patch_size", &format!("a divisor of `image_size` {}", config.image_size)));
    }
    if !config.hidden_size.is_multiple_of(config.n_heads) {
        return Err(keys.error("num_attention_heads", &format!("a divisor of `hidden_size` {}", config.hidden_size)));
    }
    if !config.head_dim().is_multiple_of(8) {
        let why = format!("heads must be a multiple of 8 wide, these are {}", config.head_dim());
        return Err(keys.unsupported("num_attention_heads", &why));
    }
    Ok(config)
}

/// Reads the keys of HF's `LlamaConfig`, or of `MistralConfig` where that computes the same.
pub(super) fn llama(keys: &Keys, model_type: &str) -> Result<LlamaConfig> {
    let (intermediate_size, n_kv_heads, max_positions) = match model_type {
        "llama" | "vicuna" => (11008, None, 2048),
        "mistral" => (14336, Some(8), 1 << 17),
        _ => return Err(keys.unsupported("model_type", "the decoder must be a llama, vicuna or mistral")),
    };
    for key in ["attention_bias", "mlp_bias"] {
        if keys.bool(key)? == Some(true) {
            return Err(keys.unsupported(key, "decoders with biases are not supported"));
        }
    }
    if !matches!(keys.str("hidden_act")?, None | Some("silu")) {
        return Err(keys.unsupported("hidden_act", "the decoder's activation must be silu"));
    }
    let hidden_size = keys.count("hidden_size", MAX_WIDTH)?.unwrap_or(4096);
    let n_heads = keys.count("num_attention_heads", MAX_LAYERS)?.unwrap_or(32);
    if !hidden_size.is_multiple_of(n_heads) {
        return Err(keys.error("num_attention_heads", &format!("a divisor of `hidden_size` {hidden_size}")));
    }
    let head_dim = keys.count("head_dim", 1 << 12)?.unwrap_or(hidden_size / n_heads);
    if !head_dim.is_multiple_of(8) {
        let key = if keys.has("head_dim") { "head_dim" } else { "num_attention_heads" };
        return Err(keys.unsupported(key, &format!("heads must be a multiple of 8 wide, these are {head_dim}")));
    }
    let n_kv_heads = keys.count("num_key_value_heads", MAX_LAYERS)?.or(n_kv_heads).unwrap_or(n_heads);
    if !n_heads.is_multiple_of(n_kv_heads) {
        return Err(keys.error("num_key_value_heads", &format!("a divisor of `num_attention_heads` {n_heads}")));
    }
    let max_position_embeddings = keys.count("max_position_embeddings", MAX_CONTEXT)?.unwrap_or(max_positions);
    if model_type == "mistral" && !keys.is_null("sliding_window") {
        let window = keys.count("sliding_window", MAX_CONTEXT)?.unwrap_or(4096);
        if window < max_position_embeddings {
            return Err(keys.unsupported("sliding_window", "sliding-window attention is not supported (null would switch it off)"));
        }
    }
    let (rope_theta, rope_scaling) = rope(keys)?;
    Ok(LlamaConfig {
        vocab_size: keys.count("vocab_size", MAX_VOCAB)?.unwrap_or(32000),
        hidden_size,
        intermediate_size: keys.count("intermediate_size", MAX_WIDTH)?.unwrap_or(intermediate_size),
        n_layers: keys.count("num_hidden_layers", MAX_LAYERS)?.unwrap_or(32),
        n_heads,
        n_kv_heads,
        head_dim,
        rms_norm_eps: keys.positive("rms_norm_eps")?.unwrap_or(1e-6),
        rope_theta,
        rope_scaling,
        max_position_embeddings,
        tie_word_embeddings: keys.bool("tie_word_embeddings")?.unwrap_or(false),
    })
}

/// `rope_theta` with `rope_scaling` as transformers 4 writes them, or `rope_parameters` as 5 does; as in HF, the former wins.
fn rope(keys: &Keys) -> Result<(f32, RopeScaling)> {
    let scaling = keys.object(if keys.has("rope_scaling") { "rope_scaling" } else { "rope_parameters" })?;
    for keys in [keys, &scaling] {
        if keys.positive("partial_rotary_factor")?.is_some_and(|x| x != 1.0) {
            return Err(keys.unsupported("partial_rotary_factor", "all of a head is rotated"));
        }
    }
    let theta = scaling.positive("rope_theta")?.or(keys.positive("rope_theta")?).unwrap_or(1e4);
    let required = |key| scaling.positive(key)?.ok_or_else(|| scaling.error(key, "a positive number"));
    let key = if scaling.has("rope_type") { "rope_type" } else { "type" };
    let scaling = match scaling.str(key)? {
        None | Some("default") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear { factor: required("factor")? },
        Some("llama3") => {
            let (low_freq_factor, high_freq_factor) = (required("low_freq_factor")?, required("high_freq_factor")?);
            if high_freq_factor <= low_freq_factor {
                return Err(scaling.error("high_freq_factor", "more than `low_freq_factor`"));
            }
            let original_context = scaling
                .count("original_max_position_embeddings", MAX_CONTEXT)?
                .ok_or_else(|| scaling.error("original_max_position_embeddings", "a whole number"))?;
            RopeScaling::Llama3 { factor: required("factor")?, low_freq_factor, high_freq_factor, original_context }
        }
        Some(_) => return Err(scaling.unsupported(key, "rotary scaling must be default, linear or llama3")),
    };
    Ok((theta, scaling))
}

/// `mm_projector_type`: `linear` (the default), `mlpNx_gelu` or `identity`.
fn original_projector(keys: &Keys) -> Result<ProjectorConfig> {
    let key = "mm_projector_type";
    let n_linear = match keys.str(key)?.unwrap_or("linear") {
        "identity" => return Ok(ProjectorConfig::Identity),
        "linear" => Some(1),
        other => other.strip_prefix("mlp").and_then(|rest| rest.strip_suffix("x_gelu")).and_then(|n| n.parse::<usize>().ok()),
    };
    match n_linear.filter(|n| (1..=64).contains(n)) {
        Some(n_linear) => Ok(ProjectorConfig::Mlp { n_linear, activation: Activation::Gelu }),
        None => Err(keys.unsupported(key, "the projector must be linear, mlp2x_gelu (or another number) or identity")),
    }
}

/// How many layers give the hidden state at index `key`, where 0 is the embeddings and -1 the output of the last layer.
fn n_vision_layers(keys: &Keys, key: &str, default: Option<i64>, vision: &ClipConfig) -> Result<usize> {
    if keys.value(key).is_some_and(serde_json::Value::is_array) {
        return Err(keys.unsupported(key, "features of several layers are not supported"));
    }
    let n_states = vision.n_layers as i64 + 1;
    let index = keys.int(key, -n_states..=n_states - 1)?.or(default).ok_or_else(|| keys.error(key, "a whole number"))?;
    let index = if index < 0 { index + n_states } else { index };
    // The default may be out of range where a tower has one layer only.
    usize::try_from(index).map_err(|_| keys.error(key, "a layer of the vision tower"))
}

fn activation(keys: &Keys, key: &str, default: Activation) -> Result<Activation> {
    match keys.str(key)? {
        None => Ok(default),
        Some("quick_gelu") => Ok(Activation::QuickGelu),
        Some("gelu") => Ok(Activation::Gelu),
        Some(_) => Err(keys.unsupported(key, "the activation must be gelu or quick_gelu")),
    }
}

/// `eos_token_id`, one or several, of the first of `sources` that has it; LLaMA's `</s>` if none does.
fn eos_token_ids(sources: &[Option<&Keys>]) -> Result<Vec<u32>> {
    let key = "eos_token_id";
    let Some((keys, value)) = sources.iter().flatten().find_map(|keys| Some((keys, keys.value(key)?))) else { return Ok(vec![2]) };
    let ids = match value {
        serde_json::Value::Array(ids) => ids.as_slice(),
        id => std::slice::from_ref(id),
    };
    let ids = ids.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect::<Option<Vec<_>>>();
    ids.filter(|ids| !ids.is_empty()).ok_or_else(|| keys.error(key, "a token id or a list of them"))
}
