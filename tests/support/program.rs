//! Runs of the program.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// A run of the program in a folder that has nothing to do with the checkpoints.
pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_llava-engine"));
    command.env_clear().env("HF_HUB_OFFLINE", "1").env("LLAVA_THREADS", "2").current_dir(std::env::temp_dir()).args(args);
    command
}

/// Runs the program there.
pub fn llava(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

/// What a run says that must not fail.
pub fn succeed(args: &[&str]) -> String {
    let output = llava(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Exit code and message of a run that fails.
pub fn fail(args: &[&str]) -> (i32, String) {
    let output = llava(args);
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

/// Quantizes by the program; its report.
pub fn quantize(model: &Path, output: &Path, flags: &[&str]) -> Value {
    let paths = ["quantize", "--json", "--model", model.to_str().unwrap(), "--output", output.to_str().unwrap()];
    serde_json::from_str(&succeed(&[&paths, flags].concat())).unwrap()
}

/// Copies a folder and all that is in it.
pub fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.path().is_dir() { copy_dir(&entry.path(), &to) } else { fs::copy(entry.path(), to).map(|_| ()).unwrap() }
    }
}

/// Makes element [1, 3] of the last tensor whose name ends so a NaN, in a file of f32.
pub fn break_weight(dir: &Path, name: &str) {
    let path = dir.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let (start, k) = {
        let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let tensors = metadata.tensors();
        let info = tensors.iter().filter(|(n, _)| n.ends_with(name)).max_by_key(|(_, info)| info.data_offsets.0).unwrap().1;
        (8 + header + info.data_offsets.0, info.shape[1])
    };
    bytes[start + 4 * (k + 3)..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(path, bytes).unwrap();
}
