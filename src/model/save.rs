//! A checkpoint written anew: in the layout that it was read in, with all that belongs to it.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::weights::files;
use crate::weights::write::{copy_whole, write_whole};

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
                copy_whole(&from, &to)?;
            }
        }
        Ok(())
    };
    copy(model, output)?;
    copy(&checkpoint.tokenizer_dir, output)?;
    let Some(tower) = &checkpoint.tower_dir else { return Ok(()) };
    let to = output.join(TOWER);
    fs::create_dir_all(&to).map_err(|e| Error::io(&to, e))?;
    copy(tower, &to)?;
    copy_whole(&tower.join("config.json"), &to.join("config.json"))
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
    write_whole(&to, (text + "\n").as_bytes())
}
