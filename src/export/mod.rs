//! A checkpoint written anew in either layout: llava-hf, which transformers and all that builds on it read, or that of haotian-liu/LLaVA.
//!
//! The model stays what it is: matrices, norms and biases keep their bits, unless another dtype is asked for. What differs between the
//! layouts is the vocabulary. llava-hf has ids for `<image>` and `<pad>`: rows for them are added, as many as make a multiple of 64, each the
//! mean of all rows. (Its own converter draws them at random around that mean.) No row of such a head wins over all others, since its logit is
//! the mean of theirs. The original has no such ids, and its loader cuts the rows off that its tokenizer has no use for; so does this.

mod config;

use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde_json::Value;

use crate::cpu::Cpu;
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::image::{Fit, Preprocess};
use crate::model::Llava;
use crate::model::checkpoint::{Checkpoint, Layout};
use crate::model::config::{ClipConfig, LlavaConfig, ProjectorConfig};
use crate::model::save::{self, TOWER};
use crate::nn::RopeScaling;
use crate::ops::Packed;
use crate::tensor::Tensor;
use crate::text::{self, Tokenizer};
use crate::weights::names::{self, Dialect, Part};
use crate::weights::write::{self, Planned, Writer};
use crate::weights::{Entry, Source, Store, files};

/// What transformers takes for the largest file, in bytes.
pub const SHARD_BYTES: usize = 5_000_000_000;
/// llava-hf's vocabularies have a multiple of so many rows.
const ROWS_MULTIPLE: usize = 64;
/// Where a checkpoint lies until it is whole, within the folder that it will fill.
const STAGE: &str = ".partial";
/// The template of a name that hints at none, as LLaVA's own code has it.
const FALLBACK: &str = "llava_v0";

/// A layout to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// llava-hf.
    Hf,
    /// haotian-liu/LLaVA.
    Original,
}

/// How to write it.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// The layout.
    pub to: Target,
    /// What weights are rounded to; `None` keeps each as it is.
    pub dtype: Option<DType>,
    /// Bytes of tensors that a file may hold, unless it holds one only.
    pub max_shard_bytes: usize,
    /// What the checkpoint is called, which hints at the conversations that it was trained on.
    pub name: &'a str,
    /// Name of the conversation template that llava-hf gets as its chat template; `None` for what the source would be asked by.
    pub template: Option<&'a str>,
}

/// What was written.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Exported {
    /// Tensors.
    pub n_tensors: usize,
    /// Their bytes.
    pub bytes: usize,
    /// Files that they are in.
    pub n_files: usize,
    /// Rows of the vocabulary before.
    pub rows_before: usize,
    /// Rows of the vocabulary now.
    pub rows: usize,
    /// What a user should know.
    pub notes: Vec<String>,
}

/// Writes the checkpoint from the folder `model` into the new folder `output`. What is there under its final name is whole: `config.json`
/// comes last.
///
/// # Errors
/// If the checkpoint is packed, is not whole, or has what the other layout has no word for; if `output` is not empty or cannot be written;
/// if a weight does not fit the dtype.
pub fn export(model: &Path, checkpoint: &Checkpoint, output: &Path, options: &Options) -> Result<Exported> {
    checkpoint.expect_unpacked()?;
    config::check(&checkpoint.config, options.to)?;
    // What loads a model says what is missing or ill-shaped.
    Llava::load(&Cpu::new(1, DType::F32)?, &checkpoint.config, &Shapes(&checkpoint.weights), None)?;
    let is_hf = matches!(checkpoint.layout, Layout::Hf { .. });
    let mut exported = Exported { rows_before: checkpoint.config.text.vocab_size, ..Exported::default() };
    let vocabulary = match options.to {
        Target::Hf => {
            let mut files = text::export::for_hf(&checkpoint.tokenizer_dir, !is_hf)?;
            let template = chat_template(checkpoint, options, &mut exported.notes)?;
            files.extend(template.map(|source| ("chat_template.jinja", source.into_bytes())));
            files
        }
        Target::Original => text::export::for_original(&checkpoint.tokenizer_dir, is_hf, checkpoint.chat_template.as_deref())?,
    };
    // All that a killed export leaves.
    if output.is_dir() && files::list(output)? == [STAGE] {
        let left = output.join(STAGE);
        fs::remove_dir_all(&left).map_err(|e| Error::io(&left, e))?;
    }
    save::new_folder(output)?;
    let stage = Stage::new(output)?;
    let put = |(name, bytes): (&str, Vec<u8>)| write::write_whole(&stage.folder.join(name), &bytes);
    vocabulary.into_iter().try_for_each(put)?;
    // As it is written, so it is read.
    let tokenizer = Tokenizer::open(&stage.folder)?;
    exported.rows = rows(exported.rows_before, tokenizer.n_ids(), options.to, is_hf);
    let mut config = checkpoint.config.clone();
    config.text.vocab_size = exported.rows;
    let plan = Plan::new(checkpoint, &config, options)?;
    plan.write(checkpoint, &stage.folder, options, &mut exported)?;
    let dtype = options.dtype.unwrap_or(checkpoint.dtype);
    for (name, value) in descriptions(&config, &tokenizer, &plan, dtype, options.to) {
        put((name, format!("{value:#}\n").into_bytes()))?;
    }
    let licence = model.join("LICENSE");
    if licence.is_file() {
        write::copy_whole(&licence, &stage.folder.join("LICENSE"))?;
    }
    exported.notes.extend(notes(&config, &plan, output, options.to, is_hf));
    stage.finish(output)?;
    Ok(exported)
}

/// The JSON files beside the weights.
fn descriptions(config: &LlavaConfig, tokenizer: &Tokenizer, plan: &Plan, dtype: DType, to: Target) -> Vec<(&'static str, Value)> {
    let mut files = vec![("generation_config.json", config::generation(config, tokenizer))];
    match to {
        Target::Hf => files.extend([
            ("preprocessor_config.json", config::preprocessor(&config.preprocess, true)),
            ("processor_config.json", config::processor(config)),
            ("config.json", config::hf(config, tokenizer, dtype)),
        ]),
        Target::Original => {
            if let Some(item) = plan.tower.first() {
                files.extend([
                    ("vision_tower/preprocessor_config.json", config::preprocessor(&config.preprocess, false)),
                    ("vision_tower/config.json", config::tower(&config.vision, item.planned.dtype)),
                ]);
            }
            let (tower, is_inside) = (hub_tower(config).unwrap_or(TOWER), plan.tower.is_empty());
            files.push(("config.json", config::original(config, tokenizer, dtype, tower, is_inside)));
        }
    }
    files
}

/// A checkpoint that is asked for shapes alone: zeros that nobody reads stand for its tensors, since some files have theirs in an order or at
/// places that take copies of them, and all at once might not fit.
struct Shapes<'a>(&'a Store);

impl Source for Shapes<'_> {
    fn tensor(&self, canonical: &str, shape: &[usize]) -> Result<Tensor> {
        match self.0.shape(canonical) == Some(shape) {
            true => Ok(Tensor::zeros(shape, DType::Bf16)),
            false => self.0.tensor(canonical, shape),
        }
    }

    fn packed(&self, _module: &str, _n: usize, _k: usize) -> Result<Option<Packed>> {
        Ok(None)
    }
}

/// Rows of the new vocabulary: those that the tokenizer has ids for. llava-hf's are a multiple of 64 where any are added; in its own layout a
/// vocabulary stays as it is.
fn rows(before: usize, n_ids: usize, to: Target, is_hf: bool) -> usize {
    match to {
        Target::Hf if n_ids > before => n_ids.next_multiple_of(ROWS_MULTIPLE),
        Target::Original if is_hf => before.min(n_ids),
        _ => before,
    }
}

/// The Jinja source for llava-hf: the one that is named, else the checkpoint's own if it knows of pictures, else what the checkpoint's files and
/// name say.
fn chat_template(checkpoint: &Checkpoint, options: &Options, notes: &mut Vec<String>) -> Result<Option<String>> {
    let own = checkpoint.chat_template.as_deref();
    let template = match options.template {
        Some(name) => text::Template::by_name(name)?,
        // One of a language model alone cannot place them.
        None if own.is_some_and(|own| own.contains("image")) => return Ok(own.map(str::to_owned)),
        // What the engine asks such a folder by.
        None if matches!(checkpoint.layout, Layout::Hf { .. }) => text::Template::by_name("hf")?,
        None => text::pick_by_hints(options.name, own),
    };
    let source = template.to_jinja();
    let name = template.name();
    match (&source, options.template) {
        (Some(_), Some(_)) => {}
        (Some(_), None) if name == FALLBACK => notes.push(format!(
            "its chat template is {name}, since its name hints at no other: of a LLaVA-1.5, or of one tuned here, --template v1"
        )),
        (Some(_), None) => notes.push(format!("its chat template is {name}, as its files and name hint (--template NAME for another)")),
        (None, Some(_)) => return Err(Error::usage(format!("the template {name} cannot be written as a chat template"))),
        (None, None) => {
            notes.push(format!("it has no chat template, since {name} cannot be written as one: --template NAME for another, or format prompts yourself"))
        }
    }
    Ok(source)
}

/// The hub id of OpenAI's tower of just this shape and preprocessing.
fn hub_tower(config: &LlavaConfig) -> Option<&'static str> {
    let known = [(336, "openai/clip-vit-large-patch14-336"), (224, "openai/clip-vit-large-patch14")];
    let (size, id) = known.into_iter().find(|(size, _)| config.vision == ClipConfig::vit_l_14(*size))?;
    (config.preprocess == Preprocess::clip(size, config.preprocess.fit)).then_some(id)
}

/// What a user should know who takes the result elsewhere.
fn notes(config: &LlavaConfig, plan: &Plan, output: &Path, to: Target, was_hf: bool) -> Vec<String> {
    let mut notes = Vec::new();
    match to {
        Target::Hf if config.preprocess.fit == Fit::Pad => {
            let since = "which transformers knows since 2025";
            notes.push(format!("pictures are padded to squares by LlavaImageProcessor, {since}"));
        }
        Target::Hf => {}
        Target::Original => {
            if was_hf && config.preprocess.fit == Fit::Crop {
                let why = "as before; a LLaVA-1.5 learned from padded ones (image_aspect_ratio: pad)";
                notes.push(format!("pictures are cropped (image_aspect_ratio: square), {why}"));
            }
            if !plan.tower.is_empty() {
                notes.push(format!(
                    "LLaVA's own code looks for the tower `{TOWER}` from its working directory: run it in the folder"
                ));
            }
            if config::has_own_head_dim(&config.text) || matches!(config.text.rope_scaling, RopeScaling::Llama3 { .. }) {
                notes.push(
                    "LLaVA's own code, with transformers 4.37, knows neither `head_dim` nor llama3's rotary scaling".to_owned(),
                );
            }
            if !output.file_name().is_some_and(|name| name.to_string_lossy().to_lowercase().contains("llava")) {
                notes.push("LLaVA's own code takes a folder for a LLaVA only if its name has `llava` in it".to_owned());
            }
            if text::pick_by_hints(&output.to_string_lossy(), None).name() == FALLBACK {
                let how = "a LLaVA-1.5, or one tuned here, wants `v1` in its name";
                notes.push(format!("LLaVA's own code will ask a folder of this name as {FALLBACK}: {how}"));
            }
        }
    }
    notes
}

/// The tensors of the new checkpoint, in the order of the old files.
#[derive(Default)]
struct Plan {
    main: Vec<Item>,
    /// Those of a tower in a folder of its own.
    tower: Vec<Item>,
}

impl Plan {
    fn new(checkpoint: &Checkpoint, config: &LlavaConfig, options: &Options) -> Result<Self> {
        let mut plan = Self::default();
        let is_beside = options.to == Target::Original && hub_tower(config).is_none();
        for entry in checkpoint.weights.entries() {
            let Some((name, is_tower)) = new_name(&entry, config, options.to, is_beside) else { continue };
            let dtype = options.dtype.map_or_else(|| entry.float_dtype(), Ok)?;
            let mut shape = entry.shape.clone();
            if matches!(entry.canonical.as_deref(), Some("llama.embed_tokens.weight" | "llama.lm_head.weight")) {
                shape[0] = config.text.vocab_size;
            }
            let of = if is_tower && is_beside { &mut plan.tower } else { &mut plan.main };
            of.push(Item { entry, planned: Planned { name, shape, dtype } });
        }
        Ok(plan)
    }

    fn write(&self, checkpoint: &Checkpoint, output: &Path, options: &Options, exported: &mut Exported) -> Result<()> {
        for (folder, items) in [(output.to_owned(), &self.main), (output.join(TOWER), &self.tower)] {
            if items.is_empty() {
                continue;
            }
            fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, e))?;
            let planned: Vec<Planned> = items.iter().map(|item| item.planned.clone()).collect();
            let write = |i: usize, writer: &mut Writer| items[i].write(checkpoint, writer);
            exported.n_files += write::write_shards(&folder, &planned, options.max_shard_bytes, write)?;
            exported.n_tensors += items.len();
            exported.bytes += planned.iter().map(Planned::bytes).sum::<usize>();
        }
        Ok(())
    }
}

/// What a tensor is called in the new checkpoint, and whether it is the tower's; `None` if it has no place there.
fn new_name(entry: &Entry, config: &LlavaConfig, to: Target, is_beside: bool) -> Option<(String, bool)> {
    let (hf, canonical) = match &entry.canonical {
        Some(canonical) => (names::spelling_in_hf_files(canonical), canonical.as_str()),
        // transformers misses the tower's last norm, which LLaVA never comes to.
        None => (format!("vision_tower.vision_model.post_layernorm.{}", names::post_layernorm(&entry.source)?), "clip"),
    };
    let part = if entry.canonical.is_some() { Part::of(canonical)? } else { Part::Clip };
    let is_tower = part == Part::Clip;
    let has_no_place = match part {
        // Zeros, or it would not have been opened.
        Part::Llama => canonical.ends_with(".bias") || (config.text.tie_word_embeddings && canonical.starts_with("llama.lm_head.")),
        _ => false,
    };
    let name = match (to, part) {
        (Target::Hf, _) => hf,
        (Target::Original, Part::Clip) if is_beside => hf.strip_prefix("vision_tower.").unwrap_or(&hf).to_owned(),
        (Target::Original, Part::Clip) => format!("model.vision_tower.{hf}"),
        // A module by itself, where more of them are a list.
        (Target::Original, Part::Projector) if matches!(config.projector, ProjectorConfig::Mlp { n_linear: 1, .. }) => {
            canonical.replace("projector.linear_1", "model.mm_projector")
        }
        (Target::Original, _) => names::spelling(canonical, Dialect::Original),
    };
    (!has_no_place).then_some((name, is_tower))
}

/// A tensor, and what becomes of it.
struct Item {
    entry: Entry,
    planned: Planned,
}

impl Item {
    fn write(&self, checkpoint: &Checkpoint, writer: &mut Writer) -> Result<()> {
        let Self { entry, planned } = self;
        let tensor = match &entry.canonical {
            Some(canonical) => checkpoint.weights.tensor(canonical, &entry.shape)?,
            None => checkpoint.weights.unused(&entry.source)?,
        };
        let converted = (tensor.dtype() != planned.dtype).then(|| tensor.converted(planned.dtype));
        if planned.dtype == DType::F16
            && let Some(converted) = &converted
            && converted.as_slice::<f16>().iter().zip(tensor.to_f32()).any(|(to, from)| !to.is_finite() && from.is_finite())
        {
            let problem = "has numbers beyond 65504, which f16 does not: take bf16 (--dtype bf16)";
            return Err(Error::tensor(&entry.source, &entry.file, problem));
        }
        let values = converted.as_ref().unwrap_or(&tensor);
        match planned.shape.first() {
            Some(&rows) if rows != tensor.rows() && rows > 0 => {
                let mut bytes = values.as_bytes().to_vec();
                if rows > tensor.rows() {
                    let mean = mean_row(&tensor).converted(planned.dtype);
                    (tensor.rows()..rows).for_each(|_| bytes.extend(mean.as_bytes()));
                }
                bytes.truncate(planned.bytes());
                writer.write(&planned.name, &bytes)?;
            }
            _ => writer.write(&planned.name, values.as_bytes())?,
        }
        tensor.release();
        Ok(())
    }
}

/// Mean of the rows of `x` `[rows, k]`: f32 `[k]`, summed in f64.
fn mean_row(x: &Tensor) -> Tensor {
    fn sums<T: Element + Copy + Into<f64>>(x: &Tensor) -> Vec<f64> {
        let mut sums = vec![0.0; x.row_len()];
        for row in x.as_slice::<T>().chunks_exact(x.row_len()) {
            sums.iter_mut().zip(row).for_each(|(sum, &value)| *sum += value.into());
        }
        sums
    }
    let sums = match x.dtype() {
        DType::F16 => sums::<f16>(x),
        DType::Bf16 => sums::<bf16>(x),
        _ => sums::<f32>(x),
    };
    let mean: Vec<f32> = sums.iter().map(|sum| (sum / x.rows() as f64) as f32).collect();
    Tensor::from_slice(&[mean.len()], &mean)
}

/// A folder within the output, which takes all that is written until it is whole.
struct Stage {
    folder: PathBuf,
}

impl Stage {
    fn new(output: &Path) -> Result<Self> {
        let folder = output.join(STAGE);
        fs::create_dir(&folder).map_err(|e| Error::io(&folder, e))?;
        Ok(Self { folder })
    }

    /// Gives each file its place in `output`, the configuration last.
    fn finish(self, output: &Path) -> Result<()> {
        let mut names = files::list(&self.folder)?;
        names.sort_by_key(|name| name == "config.json");
        for name in names {
            let (from, to) = (self.folder.join(&name), output.join(&name));
            fs::rename(&from, &to).map_err(|e| Error::io(&to, e))?;
        }
        write::sync_folder(output)
    }
}

impl Drop for Stage {
    /// Leaves nothing behind of a checkpoint that was not finished, and of one that was, no empty folder.
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(&self.folder) {
            eprintln!("llava-engine: {} stays behind: {e}", self.folder.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::StoredDType;

    #[test]
    fn the_mean_row_is_that_of_all_rows_in_every_dtype() {
        let x = Tensor::from_slice(&[3, 2], &[1.0f32, -8.0, 2.0, 0.5, 6.0, 1.5]);
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            assert_eq!(mean_row(&x.converted(dtype)).to_f32(), [3.0, -2.0], "{dtype}");
        }
    }

    #[test]
    fn rows_are_added_in_multiples_and_cut_to_the_ids() {
        for (before, n_ids, to, is_hf, expected) in [
            (32000, 32002, Target::Hf, false, 32064),
            (32064, 32002, Target::Hf, false, 32064),
            (32000, 32000, Target::Hf, true, 32000),
            (32064, 32002, Target::Hf, true, 32064),
            (32064, 32000, Target::Original, true, 32000),
            (32001, 32000, Target::Original, false, 32001),
            (320, 328, Target::Original, true, 320),
        ] {
            assert_eq!(rows(before, n_ids, to, is_hf), expected, "{before} {n_ids} {to:?} {is_hf}");
        }
    }

    #[test]
    fn a_tower_of_the_hub_stands_among_the_weights() {
        let config = LlavaConfig::by_name("llava-1.5-7b").unwrap();
        let name = |source: &str, to, is_beside| {
            let (canonical, dtype) = (names::canonical(source), StoredDType::Known(DType::F16));
            let file = PathBuf::new();
            let entry = Entry { canonical, source: source.to_owned(), file, shape: vec![1], dtype, bytes: 2, parameters: 1 };
            new_name(&entry, &config, to, is_beside).map(|(name, _)| name)
        };
        let tower = "model.vision_tower.vision_tower.vision_model.";
        for (source, suffix) in [
            ("vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias", "encoder.layers.3.mlp.fc1.bias"),
            ("model.vision_tower.post_layernorm.weight", "post_layernorm.weight"),
        ] {
            assert_eq!(name(source, Target::Original, false).unwrap(), format!("{tower}{suffix}"));
            assert_eq!(name(source, Target::Original, true).unwrap(), format!("vision_model.{suffix}"));
            assert_eq!(name(source, Target::Hf, false).unwrap(), format!("vision_tower.vision_model.{suffix}"));
        }
        for source in
            ["vision_tower.vision_model.embeddings.position_ids", "model.image_newline", "model.layers.0.self_attn.q_proj.bias"]
        {
            assert_eq!(name(source, Target::Hf, false), None, "{source}");
        }
    }

    #[test]
    fn only_the_towers_that_the_hub_has_go_by_their_names() {
        let mut config = LlavaConfig::by_name("llava-1.5-7b").unwrap();
        assert_eq!(hub_tower(&config), Some("openai/clip-vit-large-patch14-336"));
        config.preprocess.fit = Fit::Pad;
        assert_eq!(hub_tower(&config), Some("openai/clip-vit-large-patch14-336"));
        config.preprocess.mean[0] = 0.5;
        assert_eq!(hub_tower(&config), None);
        config.vision.image_size = 224;
        config.preprocess = Preprocess::clip(224, Fit::Crop);
        assert_eq!(hub_tower(&config), Some("openai/clip-vit-large-patch14"));
        config.vision.n_layers = 23;
        assert_eq!(hub_tower(&config), None);
    }
}
