//! Opens a checkpoint in whichever layout it was written: its configuration, its tensors, and where its tokenizer is.
//!
//! The layout is decided by what the files say, never by what a folder is called. Four are known:
//! - **llava-hf**: `text_config` and `vision_config` in `config.json`, everything in one set of safetensors files;
//! - **original** (haotian-liu/LLaVA): `mm_*` keys in `config.json`, decoder and projector in one set of files, and the vision tower
//!   in a CLIP folder of its own or among them;
//! - **projector over a base**: the `mm_projector.bin` of pretraining, whose decoder is a LLaMA elsewhere;
//! - **GGUF**: the decoder in one file, tower and projector in another (`src/model/gguf.rs`).

use std::fmt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::weights::names::Part;
use crate::weights::{Source, Store, StoredDType, files, hub};

use super::config::{ClipConfig, Fit, LlavaConfig, Preprocess, ProjectorConfig};
use super::gguf::{self, Metadata};
use super::keys::Keys;
use super::quantized::{self, Quantization};
pub use super::quantized::{QUANT_METHOD, QUANT_VERSION};
use super::{config_json, preprocess_json};
use crate::weights::blocks::SUPPORTED;
use crate::weights::qweight::Scheme;

/// An opened checkpoint. Its weights are mapped, not read.
#[derive(Debug)]
pub struct Checkpoint {
    /// Shapes and constants.
    pub config: LlavaConfig,
    /// Tensors by canonical name.
    pub weights: Store,
    /// Folder that holds `tokenizer.json` or `tokenizer.model`, unless there is `gguf`.
    pub tokenizer_dir: PathBuf,
    /// Of a GGUF checkpoint, what the language model's file says, its tokenizer among it.
    pub gguf: Option<Metadata>,
    /// The chat template that comes with the checkpoint, a Jinja source.
    pub chat_template: Option<String>,
    /// What was found.
    pub layout: Layout,
    /// Number format of the decoder's matrices; if they are packed, of its embedding; if that is too, of its last norm.
    pub dtype: DType,
    /// The folder that describes the vision tower, if that is not the checkpoint's own; its weights may be inside all the same.
    pub tower_dir: Option<PathBuf>,
    /// The name of the checkpoint that this one was made from, if it was quantized.
    pub quantized_from: Option<String>,
    /// How this program rounded the decoder's matrices, if it did: `rtn`, `gptq`, `awq`.
    pub rounding: Option<String>,
    /// How AutoGPTQ or AutoAWQ packed its matrices, if they did.
    pub scheme: Option<Scheme>,
}

/// Files that belong to a checkpoint and may lie elsewhere.
#[derive(Clone, Copy, Debug, Default)]
pub struct Beside<'a> {
    /// The LLaMA under an `mm_projector.bin`, a folder.
    pub model_base: Option<&'a Path>,
    /// The vision tower and projector of a GGUF model, a file.
    pub mmproj: Option<&'a Path>,
}

impl<'a> From<Option<&'a Path>> for Beside<'a> {
    fn from(model_base: Option<&'a Path>) -> Self {
        Self { model_base, mmproj: None }
    }
}

/// The layout of a checkpoint and where its parts lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layout {
    /// llava-hf.
    Hf {
        /// Weight files.
        n_files: usize,
        /// What they are.
        format: files::Format,
    },
    /// haotian-liu/LLaVA.
    Original {
        /// Weight files, without those of the tower.
        n_files: usize,
        /// What they are.
        format: files::Format,
        /// Folder of the vision tower; `None` if it is among the weights.
        tower: Option<PathBuf>,
    },
    /// A projector of haotian-liu/LLaVA over a LLaMA that lies elsewhere.
    ProjectorOverBase {
        /// Folder of the LLaMA.
        base: PathBuf,
        /// Folder of the vision tower.
        tower: PathBuf,
    },
    /// Files of llama.cpp.
    Gguf {
        /// The language model's.
        text: PathBuf,
        /// That of vision tower and projector.
        mmproj: PathBuf,
    },
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let files = |f: &mut fmt::Formatter<'_>, n: &usize, format: &files::Format| {
            let kind = match format {
                files::Format::Safetensors => "safetensors",
                files::Format::Pickle => "pickle",
            };
            write!(f, "{n} {kind} {}", if *n == 1 { "file" } else { "files" })
        };
        match self {
            Self::Hf { n_files, format } => {
                f.write_str("llava-hf, ")?;
                files(f, n_files, format)
            }
            Self::Original { n_files, format, tower } => {
                f.write_str("original LLaVA, ")?;
                files(f, n_files, format)?;
                match tower {
                    Some(tower) => write!(f, ", vision tower in {}", tower.display()),
                    None => f.write_str(", vision tower inside"),
                }
            }
            Self::ProjectorOverBase { base, tower } => {
                write!(f, "projector of the original LLaVA over {}, vision tower in {}", base.display(), tower.display())
            }
            Self::Gguf { text, mmproj } => {
                write!(f, "GGUF, language model in {}, vision tower and projector in {}", text.display(), mmproj.display())
            }
        }
    }
}

/// A model without weights.
#[derive(Clone, Debug)]
pub struct Description {
    /// Shapes and constants.
    pub config: LlavaConfig,
    /// The dtype of weights that is named (`torch_dtype`); f32 if none is.
    pub dtype: DType,
    /// Standard deviation of new weights of decoder and projector: `initializer_range`, 0.02 if that is not there.
    pub text_std: f64,
    /// The same of what in the tower has no rule of its own.
    pub vision_std: f64,
}

/// The files beside the weights that are read more than once.
struct Folder<'a> {
    path: &'a Path,
    names: Vec<String>,
    config_path: PathBuf,
    config: Map<String, Value>,
    generation_path: PathBuf,
    generation: Option<Map<String, Value>>,
}

impl Checkpoint {
    /// Opens the checkpoint in the folder `path`, or the GGUF file there. Of what may lie elsewhere: without a base, the configuration's
    /// `_name_or_path` is taken if that is a folder; without an mmproj, the only one beside the file.
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be read; [`Error::File`] if one is malformed or if the folder holds something else than a LLaVA,
    /// which the error names; [`Error::Unsupported`] for a LLaVA that is not implemented; [`Error::Tensor`] if two tensors claim the
    /// same place or the decoder has none; [`Error::Usage`] for an mmproj to a model that is no GGUF file.
    pub fn open<'a>(path: &Path, beside: impl Into<Beside<'a>>) -> Result<Self> {
        let Beside { model_base: base, mmproj } = beside.into();
        if gguf::is_gguf(path)? {
            return Self::gguf(path, mmproj);
        }
        if mmproj.is_some() {
            return Err(Error::usage(format!("--mmproj belongs to a GGUF file, and {} is none", path.display())));
        }
        let folder = Folder::open(path)?;
        let keys = Keys::new(&folder.config_path, &folder.config);
        let Quantization { source: quantized_from, rounding, scheme } = quantized::read(path, &keys)?;
        let mut weights = Store::new(path);
        if let Some(scheme) = scheme {
            weights.set_scheme(scheme);
        }
        let checkpoint = if is_original(&keys) {
            Self::original(&folder, &keys, base, weights)
        } else if is_hf(&keys)? {
            Self::hf(&folder, &keys, weights)
        } else {
            Err(folder.another(&keys))
        };
        Ok(Self { quantized_from, rounding, scheme, ..checkpoint? })
    }

    /// What a folder in llava-hf's layout says of its model; weights need not be there.
    ///
    /// # Errors
    /// As [`Self::open`]; [`Error::Unsupported`] for another layout.
    pub fn describe(path: &Path) -> Result<Description> {
        let folder = Folder::open(path)?;
        let keys = Keys::new(&folder.config_path, &folder.config);
        if is_original(&keys) || !is_hf(&keys)? {
            let how = "a model is described as llava-hf does: `llava`, with text_config and vision_config";
            return Err(keys.unsupported("model_type", how));
        }
        let range = |part: &str| match keys.has(part) {
            true => keys.object(part)?.positive("initializer_range"),
            false => Ok(None),
        };
        let [text_std, vision_std] = [range("text_config")?, range("vision_config")?].map(|std| std.map_or(0.02, f64::from));
        Ok(Description { config: hf_config(&folder, &keys)?, dtype: named_dtype(&keys)?, text_std, vision_std })
    }

    fn gguf(path: &Path, mmproj: Option<&Path>) -> Result<Self> {
        let gguf::Opened { config, weights, metadata, mmproj } = gguf::open(path, mmproj)?;
        let text = metadata.path.clone();
        let chat_template = metadata.keys.get("tokenizer.chat_template").and_then(Value::as_str).map(str::to_owned);
        Ok(Self {
            dtype: check_decoder(&text, &weights)?,
            config,
            weights,
            tokenizer_dir: text.parent().unwrap_or(Path::new("")).to_owned(),
            gguf: Some(metadata),
            chat_template,
            layout: Layout::Gguf { text, mmproj },
            tower_dir: None,
            quantized_from: None,
            rounding: None,
            scheme: None,
        })
    }

    /// Refuses a checkpoint that is packed: its integers have no room for what is added, and to pack it once more would only lose.
    ///
    /// # Errors
    /// [`Error::File`] that says which it is.
    pub fn expect_unpacked(&self) -> Result<()> {
        let what = match (&self.gguf, &self.scheme) {
            (Some(_), _) => "a GGUF file".to_owned(),
            (None, Some(scheme)) => scheme.to_string(),
            (None, None) => match self.weights.entries().filter_map(|e| e.canonical).find(|name| name.ends_with(".words")) {
                Some(name) => format!("by quantize: {}", name.trim_end_matches(".words")),
                None => return Ok(()),
            },
        };
        Err(Error::file(self.weights.root(), format!("is packed already ({what}): take the checkpoint that it was made from")))
    }

    fn hf(folder: &Folder, keys: &Keys, mut weights: Store) -> Result<Self> {
        let found = files::weight_files(folder.path)?.ok_or_else(|| folder.no_weights())?;
        let config = hf_config(folder, keys)?;
        for file in &found.paths {
            weights.add(file, &[Part::Clip, Part::Projector, Part::Llama])?;
        }
        let layout = Layout::Hf { n_files: found.paths.len(), format: found.format };
        Self::assemble(folder, folder.path, config, weights, layout)
    }

    fn original(folder: &Folder, keys: &Keys, base: Option<&Path>, mut weights: Store) -> Result<Self> {
        let found = files::weight_files(folder.path)?;
        for file in found.iter().flat_map(|found| &found.paths) {
            weights.add(file, &[Part::Clip, Part::Projector, Part::Llama])?;
        }
        // Training leaves `mm_projector.bin` beside whole checkpoints too; then it is a copy of what they hold.
        let projector = folder.path.join("mm_projector.bin");
        if !weights.has_part(Part::Projector) && projector.is_file() {
            weights.add(&projector, &[Part::Projector])?;
        }
        let base = if weights.has_part(Part::Llama) {
            None
        } else {
            let base = find_base(folder, keys, base)?;
            let files = files::weight_files(&base)?.ok_or_else(|| Error::file(&base, "the base model has no weight files"))?;
            for file in &files.paths {
                weights.add(file, &[Part::Llama])?;
            }
            Some(base)
        };
        let is_inside = weights.has_part(Part::Clip);
        let (vision, mut preprocess, tower_dir) = open_tower(folder, keys, &mut weights)?;
        let tower = tower_dir.clone().filter(|_| !is_inside);
        preprocess.fit = aspect_ratio(keys)?;
        let config = config_json::original(keys, folder.generation().as_ref(), vision, preprocess)?;
        if config.projector != ProjectorConfig::Identity && !weights.has_part(Part::Projector) {
            return Err(Error::file(
                folder.path,
                "a LLaMA with the configuration of a LLaVA, but without a projector (mm_projector)",
            ));
        }
        let has_tokenizer = |dir: &Path| ["tokenizer.json", "tokenizer.model"].iter().any(|name| dir.join(name).is_file());
        let tokenizer_dir = base.as_deref().filter(|_| !has_tokenizer(folder.path)).unwrap_or(folder.path).to_owned();
        let layout = match (base, tower, found) {
            (Some(base), Some(tower), _) => Layout::ProjectorOverBase { base, tower },
            (_, tower, Some(found)) => Layout::Original { n_files: found.paths.len(), format: found.format, tower },
            (_, _, None) => return Err(folder.no_weights()),
        };
        Ok(Self { tower_dir, ..Self::assemble(folder, &tokenizer_dir, config, weights, layout)? })
    }

    fn assemble(folder: &Folder, tokenizer_dir: &Path, config: LlavaConfig, weights: Store, layout: Layout) -> Result<Self> {
        let dtype = check_decoder(folder.path, &weights)?;
        let chat_template = chat_template(tokenizer_dir)?;
        let (gguf, tower_dir, quantized_from, rounding, scheme) = (None, None, None, None, None);
        let tokenizer_dir = tokenizer_dir.to_owned();
        Ok(Self { config, weights, tokenizer_dir, gguf, chat_template, layout, dtype, tower_dir, quantized_from, rounding, scheme })
    }
}

/// The dtype that a configuration names: `torch_dtype`, which transformers 5 calls `dtype`.
fn named_dtype(keys: &Keys) -> Result<DType> {
    let key = if keys.has("dtype") { "dtype" } else { "torch_dtype" };
    match keys.str(key)? {
        None | Some("float32") => Ok(DType::F32),
        Some("float16") => Ok(DType::F16),
        Some("bfloat16") => Ok(DType::Bf16),
        Some(_) => Err(keys.unsupported(key, "weights are float32, float16 or bfloat16")),
    }
}

/// The configuration in a folder of llava-hf.
fn hf_config(folder: &Folder, keys: &Keys) -> Result<LlavaConfig> {
    let image_size = match keys.has("vision_config") {
        true => config_json::clip(&keys.object("vision_config")?)?.image_size,
        false => ClipConfig::vit_l_14(336).image_size,
    };
    let preprocess = preprocess(folder.path, image_size)?.ok_or_else(|| {
        Error::file(folder.path, "neither preprocessor_config.json nor an `image_processor` in processor_config.json")
    })?;
    config_json::hf(keys, folder.generation().as_ref(), preprocess)
}

/// Number format of the decoder's matrices, told by the first of them, once nothing is found that would be dropped silently.
fn check_decoder(path: &Path, weights: &Store) -> Result<DType> {
    for entry in weights.entries() {
        if entry.source.contains("lora_") {
            return Err(Error::Unsupported(format!(
                "{}: `{}` is a LoRA adapter: merge it first",
                entry.file.display(),
                entry.source
            )));
        }
        if let Some(name) = entry.canonical.filter(|c| c.starts_with("llama.") && c.ends_with(".bias")) {
            // AutoGPTQ used to write biases of zeros to layers that have none.
            if weights.tensor(&name, &entry.shape)?.to_f32().iter().any(|x| *x != 0.0) {
                let problem = "is a bias: decoders with biases are not supported";
                return Err(Error::tensor(entry.source, entry.file, problem));
            }
        }
    }
    // Packed matrices have none; what stands beside them tells.
    let packed = |module: &str| ["words", "qweight"].iter().any(|kind| weights.contains(&format!("{module}.{kind}")));
    let name = match (packed("llama.layers.0.self_attn.q_proj"), packed("llama.embed_tokens")) {
        (false, _) => "llama.layers.0.self_attn.q_proj.weight",
        (true, false) => "llama.embed_tokens.weight",
        (true, true) => "llama.norm.weight",
    };
    match weights.dtype(name) {
        Some(StoredDType::Known(dtype @ (DType::F32 | DType::F16 | DType::Bf16))) => Ok(*dtype),
        // What such tensors become where they are not kept in integers.
        Some(StoredDType::Blocks(block)) if block.is_supported() => Ok(DType::F16),
        Some(other) => Err(Error::tensor(
            name,
            path,
            format!("is stored as {other}: weights are f32, f16 or bf16, or of GGUF's types {SUPPORTED}"),
        )),
        None if weights.has_part(Part::Clip) => Err(Error::file(path, "a vision tower without a decoder: not a whole LLaVA")),
        None => Err(Error::file(path, "its weight files hold no decoder under any known name")),
    }
}

/// Whether the configuration is one of the original LLaVA.
fn is_original(keys: &Keys) -> bool {
    ["mm_vision_tower", "mm_projector_type", "mm_hidden_size"].iter().any(|key| keys.has(key))
}

/// Whether the configuration is a llava-hf one. `model_type` alone does not tell: the original LLaVA says `llava` too.
fn is_hf(keys: &Keys) -> Result<bool> {
    let parts = keys.has("text_config") || keys.has("vision_config");
    Ok(match keys.str("model_type")? {
        Some("llava") => true,
        None => parts && (keys.has("projector_hidden_act") || keys.has("vision_feature_layer")),
        Some(_) => false,
    })
}

/// `image_aspect_ratio` of the original: `pad`, or `square` (which is the default) for the tower's own preprocessing.
pub(super) fn aspect_ratio(keys: &Keys) -> Result<Fit> {
    let key = "image_aspect_ratio";
    match keys.str(key)? {
        Some("pad") => Ok(Fit::Pad),
        None | Some("square") => Ok(Fit::Crop),
        Some("anyres" | "anyres_max_9") => Err(keys.unsupported(key, "LLaVA-1.6's tiles are not supported yet: use a LLaVA-1.5")),
        Some(_) => Err(keys.unsupported(key, "pictures are either padded (pad) or cropped (square)")),
    }
}

/// The folder of the LLaMA under a projector.
fn find_base(folder: &Folder, keys: &Keys, base: Option<&Path>) -> Result<PathBuf> {
    if let Some(base) = base {
        return match base.is_dir() {
            true => Ok(base.to_owned()),
            false => Err(Error::file(base, "the base model is not a folder")),
        };
    }
    let named = keys.str("_name_or_path")?.filter(|name| !name.is_empty());
    let beside = named.map(|name| folder.path.join(name)).filter(|path| path.join("config.json").is_file());
    beside.filter(|path| !same(path, folder.path)).ok_or_else(|| {
        let what = match folder.names.iter().any(|name| name == "mm_projector.bin") {
            true => "a projector without its decoder",
            false => "the configuration of a LLaVA without its weights",
        };
        let named = named.map_or_else(String::new, |name| format!(" (its configuration says {})", name.escape_debug()));
        Error::file(folder.path, format!("{what}: name the folder of the base LLaMA{named} with --model-base"))
    })
}

fn same(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

/// Configuration of the vision tower, and its folder, from which its weights are added unless they are there.
fn open_tower(folder: &Folder, keys: &Keys, weights: &mut Store) -> Result<(ClipConfig, Preprocess, Option<PathBuf>)> {
    for key in ["s2", "mm_resampler_type"] {
        if keys.value(key).is_some_and(|value| *value != Value::Bool(false)) {
            return Err(keys.unsupported(key, "only the plain CLIP tower is supported"));
        }
    }
    let key = "mm_vision_tower";
    let tower = keys.str(key)?.ok_or_else(|| keys.error(key, "the folder or the hub id of the vision tower"))?;
    let inside = weights.has_part(Part::Clip);
    let near = [folder.path.join(tower), folder.path.join("..").join(tower), PathBuf::from(tower)];
    let dir = match near.iter().find(|dir| dir.join("config.json").is_file()) {
        Some(dir) => dir.clone(),
        None => match (hub::cached(tower)?, tower.rsplit('/').next()) {
            (Some(dir), _) => dir,
            // What these two are is known, and their weights are here: nothing is left to look up.
            (None, Some("clip-vit-large-patch14-336")) if inside => return Ok(known_tower(336)),
            (None, Some("clip-vit-large-patch14")) if inside => return Ok(known_tower(224)),
            (None, _) => hub::resolve(tower).map_err(|e| {
                let looked = "is no folder beside the checkpoint or in the working directory, and not on the hub";
                keys.error(key, &format!("the vision tower, but it {looked}: {e}"))
            })?,
        },
    };
    let path = dir.join("config.json");
    let map = files::json(&path)?.ok_or_else(|| Error::file(&dir, "the vision tower has no config.json"))?;
    let tower_keys = Keys::new(&path, &map);
    let vision = match tower_keys.has("vision_config") {
        true => config_json::clip(&tower_keys.object("vision_config")?)?,
        false => config_json::clip(&tower_keys)?,
    };
    let preprocess = preprocess(&dir, vision.image_size)?
        .ok_or_else(|| Error::file(&dir, "the vision tower has no preprocessor_config.json"))?;
    if inside {
        return Ok((vision, preprocess, Some(dir)));
    }
    let found = files::weight_files(&dir)?.ok_or_else(|| Error::file(&dir, "the vision tower has no weight files"))?;
    for file in &found.paths {
        weights.add(file, &[Part::Clip])?;
    }
    Ok((vision, preprocess, Some(dir)))
}

/// OpenAI's ViT-L/14 at this picture size, with its weights in the checkpoint.
fn known_tower(image_size: usize) -> (ClipConfig, Preprocess, Option<PathBuf>) {
    (ClipConfig::vit_l_14(image_size), Preprocess::clip(image_size, Fit::Crop), None)
}

/// The preprocessing that `dir` asks for, if it has one of the two files that can.
fn preprocess(dir: &Path, image_size: usize) -> Result<Option<Preprocess>> {
    let path = dir.join("preprocessor_config.json");
    if let Some(map) = files::json(&path)? {
        return preprocess_json::read(&Keys::new(&path, &map), image_size).map(Some);
    }
    let path = dir.join("processor_config.json");
    let Some(map) = files::json(&path)? else { return Ok(None) };
    let keys = Keys::new(&path, &map);
    match keys.has("image_processor") {
        true => preprocess_json::read(&keys.object("image_processor")?, image_size).map(Some),
        false => Ok(None),
    }
}

/// The chat template of `dir`: a file of its own (in either of two formats), or a key of `tokenizer_config.json`.
fn chat_template(dir: &Path) -> Result<Option<String>> {
    if let Some(template) = files::text(&dir.join("chat_template.jinja"))? {
        return Ok(Some(template));
    }
    for name in ["chat_template.json", "tokenizer_config.json"] {
        let path = dir.join(name);
        let Some(map) = files::json(&path)? else { continue };
        // Several templates are a list of {name, template}; the one for chat is called `default`.
        let template = match map.get("chat_template") {
            Some(Value::Array(list)) => list.iter().find(|t| t["name"] == "default").map(|t| &t["template"]),
            other => other,
        };
        match template {
            None | Some(Value::Null) => {}
            Some(Value::String(template)) => return Ok(Some(template.clone())),
            Some(_) => return Err(Error::file(path, "`chat_template` is not a string")),
        }
    }
    Ok(None)
}

impl<'a> Folder<'a> {
    fn open(path: &'a Path) -> Result<Self> {
        if path.is_file() {
            return Err(Error::file(path, "a file, and no GGUF file: name the folder of a checkpoint"));
        }
        let names = files::list(path)?;
        let config_path = path.join("config.json");
        let has = |name: &str| names.iter().any(|n| n == name);
        let what = if names.is_empty() {
            "an empty folder"
        } else if has("adapter_config.json") {
            "a LoRA adapter: name its base with --model and this folder with --lora"
        } else if has("config.json") {
            ""
        } else if has("mm_projector.bin") {
            "a projector without the config.json that training wrote beside it"
        } else if names.iter().any(|n| n.ends_with(".safetensors") || n.ends_with(".bin")) {
            "weights without config.json: not a whole checkpoint"
        } else {
            "a folder without config.json and without weights: not a checkpoint"
        };
        if !what.is_empty() {
            return Err(Error::file(path, what));
        }
        let config = files::json(&config_path)?.ok_or_else(|| Error::file(path, "no config.json"))?;
        let generation_path = path.join("generation_config.json");
        let generation = files::json(&generation_path)?;
        Ok(Self { path, names, config_path, config, generation_path, generation })
    }

    fn generation(&self) -> Option<Keys<'_>> {
        self.generation.as_ref().map(|map| Keys::new(&self.generation_path, map))
    }

    fn no_weights(&self) -> Error {
        Error::file(self.path, "the configuration of a LLaVA without its weights: no *.safetensors and no *.bin")
    }

    /// What is in a folder that holds no LLaVA.
    fn another(&self, keys: &Keys) -> Error {
        let what = match keys.str("model_type") {
            Err(e) => return e,
            Ok(Some("clip" | "clip_vision_model")) => "a CLIP model: one part of a LLaVA only".to_owned(),
            Ok(Some("llama" | "vicuna")) => "a LLaMA without a projector: not a LLaVA".to_owned(),
            Ok(Some("llava_next")) => "a LLaVA-1.6 (llava_next): not supported yet, use a LLaVA-1.5".to_owned(),
            Ok(Some(other)) => format!("a model of type `{}`: not a LLaVA", other.escape_debug()),
            Ok(None) => "config.json does not say that it is a LLaVA (no `model_type`)".to_owned(),
        };
        Error::file(self.path, what)
    }
}
