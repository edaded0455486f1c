//! A checkpoint written anew: in the layout that it was read in, with all that belongs to it.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::tensor::Tensor;
use crate::weights::write::{Planned, Writer};
use crate::weights::{Source, StoredDType, files};

/// The only weight file of a folder that is written here.
pub const WEIGHTS: &str = "model.safetensors";
/// Where the configuration of an original checkpoint's vision tower goes.
const TOWER: &str = "vision_tower";
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

/// Copies tokenizer and preprocessing of the checkpoint that was opened in the folder `model`.
pub fn companions(model: &Path, checkpoint: &Checkpoint, output: &Path) -> Result<()> {
    let copy = |from: &Path, to: &Path| -> Result<()> {
        for name in COMPANIONS {
            let (from, to) = (from.join(name), to.join(name));
            if from.is_file() && !to.exists() {
                fs::copy(&from, &to).map_err(|e| Error::io(&to, e))?;
            }
        }
        Ok(())
    };
    copy(model, output)?;
    copy(&checkpoint.tokenizer_dir, output)?;
    let Some(tower) = &checkpoint.tower_dir else { return Ok(()) };
    let to = output.join(TOWER);
    fs::create_dir(&to).map_err(|e| Error::io(&to, e))?;
    copy(tower, &to)?;
    let config = to.join("config.json");
    fs::copy(tower.join("config.json"), &config).map(|_| ()).map_err(|e| Error::io(&config, e))
}

/// Writes the checkpoint from the folder `model` into the folder `output`, in its layout and its dtypes: tensor by tensor what `changed`
/// makes of a canonical name and a shape, or the one that was.
///
/// # Errors
/// Those of `changed`; if the folder cannot be written.
pub fn rewrite(
    model: &Path,
    checkpoint: &Checkpoint,
    output: &Path,
    mut changed: impl FnMut(&str, &[usize]) -> Result<Option<Tensor>>,
) -> Result<()> {
    let weights = &checkpoint.weights;
    let mut tensors = Vec::new();
    for entry in weights.entries() {
        let (Some(canonical), StoredDType::Known(dtype)) = (entry.canonical, entry.dtype) else { continue };
        tensors.push((canonical, Planned { name: entry.source, shape: entry.shape, dtype }));
    }
    let planned: Vec<_> = tensors.iter().map(|(_, planned)| planned.clone()).collect();
    let mut writer = Writer::create(&output.join(WEIGHTS), &planned)?;
    for (canonical, Planned { name, shape, dtype }) in &tensors {
        match changed(canonical, shape)? {
            Some(tensor) => writer.write(name, tensor.converted(*dtype).as_bytes())?,
            None => {
                let tensor = weights.tensor(canonical, shape)?;
                writer.write(name, tensor.as_bytes())?;
                tensor.release();
            }
        }
    }
    writer.finish()?;
    companions(model, checkpoint, output)?;
    configuration(model, checkpoint, output, |_| {})
}

/// Writes `config.json`: the old one, with what `change` makes of it. It comes last: a folder without it is no checkpoint.
pub fn configuration(
    model: &Path,
    checkpoint: &Checkpoint,
    output: &Path,
    change: impl FnOnce(&mut Map<String, Value>),
) -> Result<()> {
    let path = model.join("config.json");
    let mut config: Map<String, Value> = files::json(&path)?.ok_or_else(|| Error::file(model, "no config.json"))?;
    change(&mut config);
    if checkpoint.tower_dir.is_some() {
        config.insert("mm_vision_tower".to_owned(), json!(TOWER));
    }
    let to = output.join("config.json");
    let text = serde_json::to_string_pretty(&config).map_err(|e| Error::file(&to, e))?;
    fs::write(&to, text + "\n").map_err(|e| Error::io(&to, e))
}
