//! A checkpoint written anew: in the layout that it was read in, with all that belongs to it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::checkpoint::{Checkpoint, Layout};
use crate::error::{Error, Result};
use crate::tensor::Tensor;
use crate::weights::write::{Planned, Writer, copy_whole, sync_folder, write_whole};
use crate::weights::{Source, StoredDType, files};

/// The only weight file of a folder that is written here.
pub const WEIGHTS: &str = "model.safetensors";
/// Where the configuration of an original checkpoint's vision tower goes.
pub const TOWER: &str = "vision_tower";
/// Files beside the weights that are taken along if they are there.
const COMPANIONS: [&str; 12] = [
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "vocab.json",
    "LICENSE",
];

/// Makes the folder, which must not hold anything that could be mistaken for what is about to be written.
pub fn new_folder(output: &Path) -> Result<()> {
    fs::create_dir_all(output).map_err(|e| Error::io(output, e))?;
    match files::list(output)?.first() {
        Some(name) => Err(Error::file(output, format!("is not empty (it has {name}): name a new folder with --output"))),
        None => Ok(()),
    }
}

/// Copies those files of the folder `model` that say how text and pictures become its input, unless they are there.
pub fn companions_of(model: &Path, output: &Path) -> Result<()> {
    for name in COMPANIONS {
        let (from, to) = (model.join(name), output.join(name));
        if from.is_file() && !to.exists() {
            copy_whole(&from, &to)?;
        }
    }
    Ok(())
}

/// Copies tokenizer and preprocessing of the checkpoint that was opened in the folder `model`.
pub fn companions(model: &Path, checkpoint: &Checkpoint, output: &Path) -> Result<()> {
    companions_of(model, output)?;
    companions_of(&checkpoint.tokenizer_dir, output)?;
    let Some(tower) = &checkpoint.tower_dir else { return Ok(()) };
    let to = output.join(TOWER);
    fs::create_dir_all(&to).map_err(|e| Error::io(&to, e))?;
    companions_of(tower, &to)?;
    copy_whole(&tower.join("config.json"), &to.join("config.json"))
}

/// A checkpoint that is written anew: in its layout and its dtypes, with other values.
pub struct Rewrite<'a> {
    checkpoint: &'a Checkpoint,
    /// What is not written yet, by canonical name.
    missing: BTreeMap<String, Planned>,
    /// What LLaVA has no use for, but others look for.
    unused: Vec<Planned>,
    writer: Writer,
}

impl<'a> Rewrite<'a> {
    /// Begins the weights of `checkpoint` in the folder `output`.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn begin(checkpoint: &'a Checkpoint, output: &Path) -> Result<Self> {
        let (mut missing, mut unused) = (BTreeMap::new(), Vec::new());
        // transformers misses the tower's last norm, which LLaVA never comes to. Beside an original there may be a whole CLIP, text and all.
        let is_hf = matches!(checkpoint.layout, Layout::Hf { .. });
        for entry in checkpoint.weights.entries() {
            let StoredDType::Known(dtype) = entry.dtype else { continue };
            let planned = Planned { name: entry.source, shape: entry.shape, dtype };
            match entry.canonical {
                Some(canonical) => drop(missing.insert(canonical, planned)),
                None if is_hf => unused.push(planned),
                None => {}
            }
        }
        let planned: Vec<_> = missing.values().chain(&unused).cloned().collect();
        Ok(Self { checkpoint, missing, unused, writer: Writer::create(&output.join(WEIGHTS), &planned)? })
    }

    /// Canonical name and shape of each tensor.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        self.missing.iter().map(|(name, planned)| (name.clone(), planned.shape.clone())).collect()
    }

    /// Writes the tensor of this canonical name, rounded to the dtype that it has there.
    ///
    /// # Errors
    /// If it cannot be written.
    ///
    /// # Panics
    /// If the checkpoint has no such tensor.
    pub fn put(&mut self, canonical: &str, tensor: &Tensor) -> Result<()> {
        let planned = self.missing.remove(canonical).unwrap_or_else(|| panic!("the checkpoint has no {canonical}"));
        match tensor.dtype() == planned.dtype {
            true => self.writer.write(&planned.name, tensor.as_bytes()),
            false => self.writer.write(&planned.name, tensor.converted(planned.dtype).as_bytes()),
        }
    }

    /// Writes all other tensors as they were, and what belongs to the checkpoint from the folder `model`, into the folder `output`.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn finish(mut self, model: &Path, output: &Path) -> Result<()> {
        for (canonical, Planned { name, shape, .. }) in &self.missing {
            let tensor = self.checkpoint.weights.tensor(canonical, shape)?;
            self.writer.write(name, tensor.as_bytes())?;
            tensor.release();
        }
        for Planned { name, .. } in &self.unused {
            self.writer.write(name, self.checkpoint.weights.unused(name)?.as_bytes())?;
        }
        self.writer.finish()?;
        companions(model, self.checkpoint, output)?;
        sync_folder(output)?;
        configuration(model, self.checkpoint, output, |_| {})
    }
}

/// Writes `config.json`: the old one, with what `change` makes of it. It comes last: a folder without it is no checkpoint.
pub fn configuration(
    model: &Path,
    checkpoint: &Checkpoint,
    output: &Path,
    change: impl FnOnce(&mut Map<String, Value>),
) -> Result<()> {
    configuration_of(model, output, |config| {
        change(config);
        if checkpoint.tower_dir.is_some() {
            config.insert("mm_vision_tower".to_owned(), json!(TOWER));
        }
    })
}

/// As [`configuration`], of a folder that need not be a checkpoint.
pub fn configuration_of(model: &Path, output: &Path, change: impl FnOnce(&mut Map<String, Value>)) -> Result<()> {
    let path = model.join("config.json");
    let mut config: Map<String, Value> = files::json(&path)?.ok_or_else(|| Error::file(model, "no config.json"))?;
    change(&mut config);
    let to = output.join("config.json");
    let text = serde_json::to_string_pretty(&config).map_err(|e| Error::file(&to, e))?;
    write_whole(&to, (text + "\n").as_bytes())
}
