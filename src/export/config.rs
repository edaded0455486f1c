//! The JSON files of a checkpoint of either layout, as its configuration says.

use serde_json::{Map, Value, json};

use super::Target;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::image::{CLIP_MEAN, CLIP_STD, Fit, Preprocess};
use crate::model::config::{Activation, ClipConfig, FeatureSelect, LlamaConfig, LlavaConfig, ProjectorConfig};
use crate::nn::RopeScaling;
use crate::text::Tokenizer;

/// Whether the layout `to` has words for this configuration.
///
/// # Errors
/// [`Error::Unsupported`] for a projector that its code has not, and for rotary frequencies that a GGUF file gives one by one.
pub fn check(config: &LlavaConfig, to: Target) -> Result<()> {
    let projector = &config.projector;
    let problem = match (to, projector) {
        _ if matches!(config.text.rope_scaling, RopeScaling::Divisors(_)) => "rotary frequencies given one by one".to_owned(),
        (Target::Hf, ProjectorConfig::Mlp { n_linear: 2, .. }) => return Ok(()),
        (Target::Hf, _) => {
            let why = "transformers' LLaVA has two linear layers there; it can stay in the original layout (--to original)";
            format!("a projector `{projector}` in llava-hf: {why}")
        }
        (Target::Original, ProjectorConfig::Mlp { n_linear: 2.., activation: Activation::QuickGelu }) => {
            format!("a projector `{projector}` in the original layout: LLaVA's own code has gelu there")
        }
        (Target::Original, _) => return Ok(()),
    };
    Err(Error::Unsupported(problem))
}

/// `config.json` of llava-hf, for weights of `dtype`.
pub fn hf(config: &LlavaConfig, tokenizer: &Tokenizer, dtype: DType) -> Value {
    let LlavaConfig { projector, text, vision, .. } = config;
    let activation = match *projector {
        ProjectorConfig::Mlp { activation, .. } => activation,
        ProjectorConfig::Identity => unreachable!("checked before"),
    };
    let mut text_config = Map::from_iter([("model_type".to_owned(), json!("llama")), ("torch_dtype".to_owned(), torch(dtype))]);
    text_config.extend(llama(text));
    text_config.extend(special_ids(config, tokenizer));
    json!({
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_seq_length": config.tokens_per_image(),
        "image_token_index": tokenizer.image(),
        "multimodal_projector_bias": true,
        "pad_token_id": tokenizer.pad(),
        "projector_hidden_act": activation_name(activation),
        "text_config": text_config,
        "tie_word_embeddings": text.tie_word_embeddings,
        "torch_dtype": torch(dtype),
        "vision_config": clip(vision, dtype),
        "vision_feature_layer": feature_layer(config),
        "vision_feature_select_strategy": select_strategy(config),
    })
}

/// `config.json` of haotian-liu/LLaVA, for weights of `dtype`; its vision tower is what `tower` names, and among the weights where
/// `is_inside`.
pub fn original(config: &LlavaConfig, tokenizer: &Tokenizer, dtype: DType, tower: &str, is_inside: bool) -> Value {
    let mut map = Map::new();
    map.extend(llama(&config.text));
    map.extend(special_ids(config, tokenizer));
    let Value::Object(rest) = json!({
        "architectures": ["LlavaLlamaForCausalLM"],
        "freeze_mm_mlp_adapter": false,
        "image_aspect_ratio": if config.preprocess.fit == Fit::Pad { "pad" } else { "square" },
        "max_sequence_length": config.context_tokens,
        "mm_hidden_size": config.vision.hidden_size,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": config.projector.to_string(),
        "mm_use_im_patch_token": false,
        "mm_use_im_start_end": false,
        "mm_vision_select_feature": if config.feature_select == FeatureSelect::ClsPatch { "cls_patch" } else { "patch" },
        "mm_vision_select_layer": feature_layer(config),
        "mm_vision_tower": tower,
        "model_type": "llava_llama",
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "torch_dtype": torch(dtype),
        "tune_mm_mlp_adapter": false,
        "unfreeze_mm_vision_tower": is_inside,
        "use_cache": true,
        "use_mm_proj": true,
    }) else {
        unreachable!("an object is written above")
    };
    map.extend(rest);
    Value::Object(map)
}

/// `generation_config.json`.
pub fn generation(config: &LlavaConfig, tokenizer: &Tokenizer) -> Value {
    Value::Object(special_ids(config, tokenizer).collect())
}

/// `config.json` of a vision tower in a folder of its own.
pub fn tower(vision: &ClipConfig, dtype: DType) -> Value {
    let mut value = clip(vision, dtype);
    value["architectures"] = json!(["CLIPVisionModel"]);
    value
}

/// `processor_config.json` of llava-hf.
pub fn processor(config: &LlavaConfig) -> Value {
    json!({
        "image_token": crate::text::IMAGE_MARK,
        "num_additional_image_tokens": 1,
        "patch_size": config.vision.patch_size,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": select_strategy(config),
    })
}

/// `preprocessor_config.json`: of llava-hf, or of a vision tower (`is_hf` false), which knows nothing of padding.
pub fn preprocessor(preprocess: &Preprocess, is_hf: bool) -> Value {
    let pads = is_hf && preprocess.fit == Fit::Pad;
    // The decimals that CLIP's files have, of which an f32 does not keep the last.
    let (mean, std) = match (preprocess.mean, preprocess.std) == (CLIP_MEAN, CLIP_STD) {
        true => (json!([0.48145466, 0.4578275, 0.40821073]), json!([0.26862954, 0.26130258, 0.27577711])),
        false => (json!(preprocess.mean.map(number)), json!(preprocess.std.map(number))),
    };
    let mut value = json!({
        "crop_size": {"height": preprocess.crop_size, "width": preprocess.crop_size},
        "do_center_crop": true,
        "do_convert_rgb": true,
        "do_normalize": true,
        "do_rescale": true,
        "do_resize": true,
        "image_mean": mean,
        "image_processor_type": if pads { "LlavaImageProcessor" } else { "CLIPImageProcessor" },
        "image_std": std,
        "resample": 3,
        "rescale_factor": preprocess.rescale_factor,
        "size": {"shortest_edge": preprocess.shortest_edge},
    });
    if pads {
        value["do_pad"] = true.into();
    }
    if is_hf {
        value["processor_class"] = "LlavaProcessor".into();
    }
    value
}

/// What the decoder is, in keys that both layouts have from LLaMA's configuration.
fn llama(text: &LlamaConfig) -> Map<String, Value> {
    let scaling = match text.rope_scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Divisors(_) => unreachable!("checked before"),
        RopeScaling::Linear { factor } => json!({"type": "linear", "factor": number(factor)}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => json!({
            "rope_type": "llama3", "factor": number(factor), "low_freq_factor": number(low_freq_factor),
            "high_freq_factor": number(high_freq_factor), "original_max_position_embeddings": original_context,
        }),
    };
    let mut map = Map::new();
    for (key, value) in [
        ("hidden_act", json!("silu")),
        ("hidden_size", json!(text.hidden_size)),
        ("intermediate_size", json!(text.intermediate_size)),
        ("max_position_embeddings", json!(text.max_position_embeddings)),
        ("num_attention_heads", json!(text.n_heads)),
        ("num_hidden_layers", json!(text.n_layers)),
        ("num_key_value_heads", json!(text.n_kv_heads)),
        ("rms_norm_eps", number(text.rms_norm_eps)),
        ("rope_scaling", scaling),
        ("rope_theta", number(text.rope_theta)),
        ("tie_word_embeddings", json!(text.tie_word_embeddings)),
        ("vocab_size", json!(text.vocab_size)),
    ] {
        map.insert(key.to_owned(), value);
    }
    if has_own_head_dim(text) {
        map.insert("head_dim".to_owned(), json!(text.head_dim));
    }
    map
}

/// Whether heads are of another width than the hidden size shared out among them.
pub fn has_own_head_dim(text: &LlamaConfig) -> bool {
    text.head_dim * text.n_heads != text.hidden_size
}

fn clip(vision: &ClipConfig, dtype: DType) -> Value {
    json!({
        "hidden_act": activation_name(vision.activation),
        "hidden_size": vision.hidden_size,
        "image_size": vision.image_size,
        "intermediate_size": vision.intermediate_size,
        "layer_norm_eps": number(vision.layer_norm_eps),
        "model_type": "clip_vision_model",
        "num_attention_heads": vision.n_heads,
        "num_channels": 3,
        "num_hidden_layers": vision.n_layers,
        "patch_size": vision.patch_size,
        "torch_dtype": torch(dtype),
    })
}

/// The ids of tokens with a role.
fn special_ids(config: &LlavaConfig, tokenizer: &Tokenizer) -> impl Iterator<Item = (String, Value)> {
    let eos = match config.eos_token_ids.as_slice() {
        [one] => json!(one),
        several => json!(several),
    };
    let ids = [("bos_token_id", json!(tokenizer.bos())), ("eos_token_id", eos), ("pad_token_id", json!(tokenizer.pad()))];
    ids.into_iter().map(|(key, id)| (key.to_owned(), id))
}

/// The hidden state that is selected, counted from the last.
fn feature_layer(config: &LlavaConfig) -> i64 {
    config.n_vision_layers as i64 - config.vision.n_layers as i64 - 1
}

fn select_strategy(config: &LlavaConfig) -> &'static str {
    match config.feature_select {
        FeatureSelect::Patch => "default",
        FeatureSelect::ClsPatch => "full",
    }
}

fn activation_name(activation: Activation) -> &'static str {
    match activation {
        Activation::QuickGelu => "quick_gelu",
        Activation::Gelu => "gelu",
    }
}

/// A dtype as PyTorch calls it.
fn torch(dtype: DType) -> Value {
    json!(match dtype {
        DType::F16 => "float16",
        DType::Bf16 => "bfloat16",
        _ => "float32",
    })
}

/// The decimal fraction that was read as `x`: as an f64, an f32 would be written with digits that nobody gave.
fn number(x: f32) -> Value {
    json!(x.to_string().parse::<f64>().unwrap_or(f64::from(x)))
}
