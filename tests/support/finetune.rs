//! Runs of `finetune` on a few rows.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use safetensors::SafeTensors;
use serde_json::Value;
use tempfile::TempDir;

use super::{fixture, program};

/// Five rows: three with pictures, one of these of two turns, and two of text alone.
pub fn rows() -> Value {
    let turns = |pairs: &[(&str, &str)]| {
        let turn = |from: &str, value: &str| serde_json::json!({"from": from, "value": value});
        pairs.iter().flat_map(|(q, a)| [turn("human", q), turn("gpt", a)]).collect::<Vec<_>>()
    };
    serde_json::json!([
        {"id": "a", "image": "square.png", "conversations": turns(&[("<image>\nWhat is this?", "A square.")])},
        {"id": "b", "image": "odd.png", "conversations": turns(&[("What is odd?\n<image>", "This."), ("And now?", "That as well.")])},
        {"id": "c", "conversations": turns(&[("How are you?", "Well, and you?")])},
        {"id": "d", "image": "square.png", "conversations": turns(&[("<image>\nDescribe it.", "It has four sides.")])},
        {"id": "e", "conversations": turns(&[("Say yes.", "yes")])},
    ])
}

/// A folder with them.
pub fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("rows.json"), rows().to_string()).unwrap();
    folder
}

pub const MODEL: &str = "checkpoints/hf_gqa_bf16";

/// How a run of the program ended.
pub struct Done {
    pub ok: bool,
    pub stdout: String,
    pub stderr: String,
}

/// Runs `finetune` of the usual model on the rows in `folder`.
pub fn finetune(folder: &Path, output: &str, flags: &[&str]) -> Done {
    finetune_of(&fixture(MODEL), folder, output, flags)
}

/// Runs `finetune` on the rows in `folder`.
pub fn finetune_of(model: &Path, folder: &Path, output: &str, flags: &[&str]) -> Done {
    let output = command(model, folder, output, flags).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Done { ok: output.status.success(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// Such a run, still to be begun.
pub fn command(model: &Path, folder: &Path, output: &str, flags: &[&str]) -> Command {
    let (rows, images) = (folder.join("rows.json"), fixture("images"));
    let paths = [model, &rows, &images, &folder.join(output)].map(|p| p.to_str().unwrap().to_owned());
    let [model, rows, images, output] = &paths;
    let mut args = vec!["finetune", "--model", model, "--data", rows, "--image-folder", images, "--output", output];
    let defaults = [("--dtype", "f32"), ("--batch-size", "3"), ("--accumulation", "2"), ("--lr", "3e-3"), ("--template", "v1")];
    for (flag, value) in defaults.into_iter().filter(|(flag, _)| !flags.contains(flag)) {
        args.extend([flag, value]);
    }
    args.extend(flags);
    program::command(&args)
}

/// What each step was.
pub fn log(folder: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.join("log.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The bytes of each tensor of a folder, by its name.
pub fn tensors(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "safetensors") && path.file_name().unwrap() != "expected.safetensors" {
            let bytes = std::fs::read(path).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            all.extend(file.tensors().into_iter().map(|(name, view)| (name, view.data().to_vec())));
        }
    }
    all
}
