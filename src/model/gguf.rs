//! GGUF checkpoints: a language model in one file and its vision tower and projector, the "mmproj", in another.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::weights::gguf::{Gguf, MAGIC};
use crate::weights::names::Part;
use crate::weights::{Source, Store, files};

use super::checkpoint::aspect_ratio;
use super::config::{
    Activation, ClipConfig, FeatureSelect, Fit, LlamaConfig, LlavaConfig, Preprocess, Profile, ProjectorConfig, RopeScaling,
};
use super::keys::Keys;
use super::{config_json, preprocess_json};

/// What the keys of HF's `LlamaConfig` are called here.
const LLAMA_KEYS: [(&str, &str); 10] = [
    ("hidden_size", "llama.embedding_length"),
    ("num_hidden_layers", "llama.block_count"),
    ("intermediate_size", "llama.feed_forward_length"),
    ("num_attention_heads", "llama.attention.head_count"),
    ("num_key_value_heads", "llama.attention.head_count_kv"),
    ("head_dim", "llama.attention.key_length"),
    ("rms_norm_eps", "llama.attention.layer_norm_rms_epsilon"),
    ("rope_theta", "llama.rope.freq_base"),
    ("max_position_embeddings", "llama.context_length"),
    ("vocab_size", "llama.vocab_size"),
];
/// Those of them that every file has.
const LLAMA_REQUIRED: [&str; 6] =
    ["hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "rms_norm_eps", "max_position_embeddings"];

/// What the keys of HF's `CLIPVisionConfig` and `CLIPImageProcessor` are called here.
const CLIP_KEYS: [(&str, &str); 12] = [
    ("image_size", "clip.vision.image_size"),
    ("patch_size", "clip.vision.patch_size"),
    ("hidden_size", "clip.vision.embedding_length"),
    ("intermediate_size", "clip.vision.feed_forward_length"),
    ("num_hidden_layers", "clip.vision.block_count"),
    ("num_attention_heads", "clip.vision.attention.head_count"),
    ("layer_norm_eps", "clip.vision.attention.layer_norm_epsilon"),
    ("size", "clip.vision.image_size"),
    ("crop_size", "clip.vision.image_size"),
    ("image_mean", "clip.vision.image_mean"),
    ("image_std", "clip.vision.image_std"),
    ("image_aspect_ratio", "clip.vision.image_aspect_ratio"),
];
/// Those of them that every file has.
const CLIP_REQUIRED: [&str; 7] =
    ["image_size", "patch_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps"];

/// A file's metadata.
#[derive(Clone, Debug)]
pub struct Metadata {
    /// The file.
    pub path: PathBuf,
    /// Its keys.
    pub keys: Map<String, Value>,
}

/// The two files of a checkpoint and what they say.
pub(super) struct Opened {
    pub config: LlavaConfig,
    pub weights: Store,
    /// Of the language model.
    pub metadata: Metadata,
    pub mmproj: PathBuf,
}

/// Whether `path` is a GGUF file, or a folder of such that has no other checkpoint in it.
///
/// # Errors
/// [`Error::Io`] if it cannot be listed.
pub(super) fn is_gguf(path: &Path) -> Result<bool> {
    if path.is_file() {
        return Ok(is_named_gguf(path) || has_magic(path));
    }
    Ok(path.is_dir() && !path.join("config.json").is_file() && !files_of(path)?.is_empty())
}

fn is_named_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// Whether a file begins as GGUF files do: they may lie in a cache under names that say nothing.
fn has_magic(path: &Path) -> bool {
    let mut start = [0; MAGIC.len()];
    let read = std::fs::File::open(path).and_then(|mut file| std::io::Read::read_exact(&mut file, &mut start));
    read.is_ok() && start == MAGIC
}

fn files_of(dir: &Path) -> Result<Vec<PathBuf>> {
    Ok(files::list(dir)?.into_iter().map(|name| dir.join(name)).filter(|path| is_named_gguf(path)).collect())
}

/// Opens the language model in the file or folder `path` with its vision tower in the file `mmproj`; without that, the only one beside it.
///
/// # Errors
/// As `Checkpoint::open`.
pub(super) fn open(path: &Path, mmproj: Option<&Path>) -> Result<Opened> {
    let (text_path, text) = match path.is_file() {
        true => (path.to_owned(), Gguf::open(path)?),
        false => find(path, path, "--model", |architecture| architecture != "clip")?,
    };
    let text_keys = Keys::renamed(&text_path, &text.header.metadata, &LLAMA_KEYS);
    match architecture(&text_keys)? {
        "llama" => {}
        "clip" => {
            let problem = "a vision tower (mmproj): name the language model with --model, and this file with --mmproj";
            return Err(Error::file(&text_path, problem));
        }
        _ => return Err(text_keys.unsupported("general.architecture", "the decoder must be a llama")),
    }
    if text_keys.int("split.count", 0..=i64::MAX)?.is_some_and(|n| n > 1) {
        let problem = "one of several parts of a model: join them with `llama-gguf-split --merge`";
        return Err(Error::file(&text_path, problem));
    }
    let (mmproj_path, tower) = match mmproj {
        Some(mmproj) => (mmproj.to_owned(), Gguf::open(mmproj)?),
        None => find(text_path.parent().unwrap_or(Path::new("")), &text_path, "--mmproj", |architecture| architecture == "clip")?,
    };
    let tower_keys = Keys::renamed(&mmproj_path, &tower.header.metadata, &CLIP_KEYS);
    if architecture(&tower_keys)? != "clip" {
        return Err(tower_keys.unsupported("general.architecture", "the file of a vision tower (--mmproj) says clip"));
    }

    let mut weights = Store::new(&text_path);
    let mut llama = llama(&text_keys)?;
    weights.add_gguf(&text_path, &text, &[Part::Llama], Some(llama.head_dim))?;
    weights.add_gguf(&mmproj_path, &tower, &[Part::Clip, Part::Projector], None)?;
    if let Some([vocab_size, _]) = weights.shape("llama.embed_tokens.weight").filter(|_| !text_keys.has("vocab_size")) {
        llama.vocab_size = *vocab_size;
    }
    llama.tie_word_embeddings = !weights.contains("llama.lm_head.weight");
    if weights.contains("llama.rope_freqs.weight") {
        if llama.rope_scaling != RopeScaling::None {
            return Err(text_keys.unsupported("llama.rope.scaling.type", "there is the tensor `rope_freqs.weight` too"));
        }
        let divisors = weights.tensor("llama.rope_freqs.weight", &[llama.head_dim / 2])?.to_f32();
        if !divisors.iter().all(|x| *x > 0.0 && x.is_finite()) {
            return Err(Error::tensor("rope_freqs.weight", &text_path, "holds other numbers than positive ones"));
        }
        llama.rope_scaling = RopeScaling::Divisors(divisors);
    }
    let (vision, preprocess) = clip(&tower_keys)?;
    let eos = text_keys.int("tokenizer.ggml.eos_token_id", 0..=i64::from(u32::MAX))?.unwrap_or(2) as u32;
    let config = LlavaConfig {
        n_vision_layers: n_vision_layers(&tower_keys, &vision)?,
        projector: projector(&tower_keys, &weights)?,
        feature_select: FeatureSelect::Patch,
        profile: Profile::Original,
        preprocess,
        image_token_index: None,
        eos_token_ids: vec![eos],
        context_tokens: llama.max_position_embeddings,
        vision,
        text: llama,
    };
    let metadata = Metadata { path: text_path, keys: text.header.metadata };
    Ok(Opened { config, weights, metadata, mmproj: mmproj_path })
}

/// The only GGUF file of `dir` whose architecture is `wanted`; another is to be named with `flag`.
fn find(dir: &Path, of: &Path, flag: &str, wanted: impl Fn(&str) -> bool) -> Result<(PathBuf, Gguf)> {
    let mut found = Vec::new();
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    for path in files_of(dir)? {
        let gguf = Gguf::open(&path)?;
        if wanted(architecture(&Keys::new(&path, &gguf.header.metadata))?) {
            found.push((path, gguf));
        }
    }
    let what =
        if flag == "--mmproj" { "vision tower (a GGUF file of the architecture clip, \"mmproj\")" } else { "language model" };
    match found.len() {
        0 => Err(Error::file(of, format!("is without a {what}: name one with {flag} FILE"))),
        1 => Ok(found.remove(0)),
        n => {
            let names: Vec<_> = found.iter().filter_map(|(path, _)| Some(path.file_name()?.to_string_lossy())).collect();
            Err(Error::file(of, format!("{n} files beside it are a {what} ({}): name one with {flag} FILE", names.join(", "))))
        }
    }
}

fn architecture<'a>(keys: &Keys<'a>) -> Result<&'a str> {
    let key = "general.architecture";
    keys.str(key)?.ok_or_else(|| keys.error(key, "the name of an architecture"))
}

fn require(keys: &Keys, required: &[&str]) -> Result<()> {
    match required.iter().find(|key| !keys.has(key)) {
        Some(key) => Err(keys.error(key, "a number: every such file has one")),
        None => Ok(()),
    }
}

fn llama(keys: &Keys) -> Result<LlamaConfig> {
    require(keys, &LLAMA_REQUIRED)?;
    if keys.int("llama.expert_count", 0..=i64::MAX)?.is_some_and(|n| n > 0) {
        return Err(keys.unsupported("llama.expert_count", "mixtures of experts are not supported"));
    }
    let mut config = config_json::llama(keys, "llama")?;
    for key in ["llama.rope.dimension_count", "llama.attention.value_length"] {
        if keys.int(key, 1..=1 << 20)?.is_some_and(|n| n as usize != config.head_dim) {
            return Err(keys.unsupported(key, &format!("all of a head ({}) is rotated, and values are as wide", config.head_dim)));
        }
    }
    let factor = |key| keys.positive(key)?.ok_or_else(|| keys.error(key, "a positive number"));
    config.rope_scaling = match keys.str("llama.rope.scaling.type")? {
        None if keys.has("llama.rope.scale_linear") => RopeScaling::Linear { factor: factor("llama.rope.scale_linear")? },
        None | Some("none") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear { factor: factor("llama.rope.scaling.factor")? },
        Some(_) => return Err(keys.unsupported("llama.rope.scaling.type", "rotary scaling must be none or linear")),
    };
    Ok(config)
}

fn clip(keys: &Keys) -> Result<(ClipConfig, Preprocess)> {
    require(keys, &CLIP_REQUIRED)?;
    for (key, needed) in [("clip.has_vision_encoder", true), ("clip.has_llava_projector", true), ("clip.use_silu", false)] {
        if keys.bool(key)?.is_some_and(|is| is != needed) {
            return Err(keys.unsupported(key, "the file of a vision tower has that and the projector of a LLaVA"));
        }
    }
    let merge = "clip.vision.mm_patch_merge_type";
    if keys.str(merge)?.is_some_and(|merge| merge != "flat") {
        return Err(keys.unsupported(merge, "LLaVA-1.6's tiles are not supported yet: use a LLaVA-1.5"));
    }
    let grid = "clip.vision.image_grid_pinpoints";
    if keys.value(grid).and_then(Value::as_array).is_some_and(|sizes| !sizes.is_empty()) {
        return Err(keys.unsupported(grid, "LLaVA-1.6's tiles are not supported yet: use a LLaVA-1.5"));
    }
    let mut vision = config_json::clip(keys)?;
    if keys.bool("clip.use_gelu")? == Some(true) {
        vision.activation = Activation::Gelu;
    }
    let mut preprocess = preprocess_json::read(keys, vision.image_size)?;
    // Files of LLaVA-1.5, which pads, do not say so.
    preprocess.fit = if keys.has("image_aspect_ratio") { aspect_ratio(keys)? } else { Fit::Pad };
    Ok((vision, preprocess))
}

/// How many layers give the features: converters leave out those behind, so all that there are, unless the file tells one.
fn n_vision_layers(keys: &Keys, vision: &ClipConfig) -> Result<usize> {
    let key = "clip.vision.feature_layer";
    match keys.value(key).map(Value::as_array) {
        None => Ok(vision.n_layers),
        Some(Some(layers)) if layers.len() > 1 => Err(keys.unsupported(key, "features of several layers are not supported")),
        Some(layers) => {
            let layer = layers.and_then(|layers| layers.first()?.as_u64()).and_then(|n| usize::try_from(n).ok());
            let range = 0..=vision.n_layers;
            layer
                .filter(|n| range.contains(n))
                .ok_or_else(|| keys.error(key, &format!("a list of a layer up to {}", vision.n_layers)))
        }
    }
}

/// `mlp`: linear layers `mm.0`, `mm.2`, …, as many as there are, with GELU between them; one alone is LLaVA-1.0's.
fn projector(keys: &Keys, weights: &Store) -> Result<ProjectorConfig> {
    let key = if keys.has("clip.projector_type") { "clip.projector_type" } else { "clip.vision.projector_type" };
    if !matches!(keys.str(key)?, None | Some("mlp")) {
        return Err(keys.unsupported(key, "the projector must be mlp"));
    }
    let is_there = |k: &usize| weights.contains(&format!("projector.linear_{k}.weight"));
    let n_linear = (1..).take_while(is_there).count();
    match n_linear {
        0 => Err(keys.error(key, "a projector, but there is no tensor `mm.0.weight`")),
        _ => Ok(ProjectorConfig::Mlp { n_linear, activation: Activation::Gelu }),
    }
}
