//! Rules of the house, checked on its sources: what may import what, how long a file may be, that unsafe code argues.

use std::fs;
use std::path::{Path, PathBuf};

/// A file is one thing that a reader can hold. Longer ones are listed here, each with its reason.
const MAX_LINES: usize = 600;
const LONG_FILES: [(&str, &str); 0] = [];

/// What each module of the library may import from the crate; imports go down only.
const LAYERS: [(&str, &[&str]); 23] = [
    ("error", &[]),
    ("dtype", &["error"]),
    ("tensor", &["error", "dtype"]),
    ("image", &["error", "dtype", "tensor"]),
    // Preprocessing is an op: devices run what the module of pictures plans.
    ("ops", &["error", "dtype", "tensor", "image"]),
    ("device", &["error"]),
    ("cpu", &["error", "dtype", "tensor", "image", "ops"]),
    // The simulator shares blocks out among the CPU's threads.
    ("cuda", &["error", "dtype", "tensor", "image", "ops", "cpu"]),
    ("checked", &["error", "dtype", "tensor", "image", "ops"]),
    ("profile", &["error", "dtype", "tensor", "image", "ops"]),
    ("nn", &["error", "dtype", "tensor", "ops"]),
    ("text", &["error"]),
    ("data", &["error", "image"]),
    // Packed matrices are checked where they are read; those of other programs are repacked by the CPU's threads.
    ("weights", &["error", "dtype", "tensor", "ops", "cpu"]),
    ("model", &["error", "dtype", "tensor", "ops", "nn", "image", "weights"]),
    // Tests of the cache need a device.
    ("infer", &["error", "dtype", "tensor", "ops", "nn", "model", "weights", "cpu"]),
    (
        "engine",
        &[
            "error", "dtype", "tensor", "ops", "model", "infer", "cpu", "cuda", "device", "profile", "checked", "image", "text",
            "weights",
        ],
    ),
    ("quantize", &["error", "dtype", "tensor", "ops", "cpu", "device", "image", "data", "weights", "model", "infer", "engine"]),
    ("train", &["error", "dtype", "tensor", "ops", "cpu", "nn", "image", "text", "data", "weights", "model", "infer", "engine"]),
    ("export", &["error", "dtype", "tensor", "ops", "cpu", "nn", "image", "text", "weights", "model"]),
    ("capi", &["error", "dtype", "device", "engine", "image", "infer", "text", "model", "ops"]),
    ("lib", &[]),
    ("main", &[]),
];

fn sources() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut pending = vec![root.join("src"), root.join("tests"), root.join("benches")];
    let mut files = Vec::new();
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                files.push((path.strip_prefix(root).unwrap().to_owned(), text));
            }
        }
    }
    assert!(files.len() > 30);
    files
}

/// The module of `src/` that a file belongs to, if it is part of the library.
fn module(path: &Path) -> Option<String> {
    let mut parts = path.iter();
    if parts.next()? != "src" {
        return None;
    }
    let first = Path::new(parts.next()?).file_stem()?.to_str()?.to_owned();
    (first != "cli").then_some(first)
}

#[test]
fn imports_go_down_only() {
    for (path, text) in sources() {
        let Some(module) = module(&path) else { continue };
        let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == module) else {
            panic!("{}: module `{module}` has no place in the layers", path.display());
        };
        for (number, line) in text.lines().enumerate().filter(|(_, l)| !l.trim_start().starts_with("//")) {
            for import in line.split("crate::").skip(1) {
                let import = import.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap();
                let ok = import == module || allowed.contains(&import);
                assert!(ok, "{}:{}: `{module}` imports `{import}`, which stands above it", path.display(), number + 1);
            }
        }
    }
}

#[test]
fn files_are_of_a_size_to_be_read() {
    for (path, text) in sources() {
        let lines = text.lines().count();
        let reason = LONG_FILES.iter().find(|(file, _)| Path::new(file) == path);
        assert!(lines <= MAX_LINES || reason.is_some(), "{} has {lines} lines, {MAX_LINES} are allowed", path.display());
    }
}

#[test]
fn unsafe_code_argues() {
    for (path, text) in sources().iter().filter(|(p, _)| p.starts_with("src")) {
        let lines: Vec<_> = text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap();
            if code.contains("unsafe {") || code.contains("unsafe impl") {
                let argued = lines[i.saturating_sub(8)..=i].iter().any(|l| l.contains("SAFETY:"));
                assert!(argued, "{}:{}: unsafe without SAFETY", path.display(), i + 1);
            }
        }
    }
}

#[test]
fn nothing_is_unfinished_or_switched_off() {
    // In two parts, so that this file does not find itself.
    let marks = [["todo", "!("], ["unimplemented", "!("], ["FIX", "ME"], ["#[ign", "ore]"]].map(|m| m.concat());
    for (path, text) in sources() {
        for mark in &marks {
            assert!(!text.contains(mark.as_str()), "{}: {mark}", path.display());
        }
    }
}

/// The commands that the README shows must exist.
#[test]
fn the_readme_shows_commands_that_exist() {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let commands: Vec<_> = readme.lines().filter_map(|l| l.trim().strip_prefix("llava-engine ")).collect();
    assert!(!commands.is_empty());
    for command in commands {
        let subcommand = command.split_whitespace().next().unwrap();
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_llava-engine")).args([subcommand, "--help"]).output().unwrap();
        assert!(output.status.success(), "README: llava-engine {command}");
        let help = String::from_utf8(output.stdout).unwrap();
        for flag in command.split_whitespace().filter(|w| w.starts_with("--")) {
            assert!(help.contains(flag.split('=').next().unwrap()), "README: `{subcommand}` has no {flag}");
        }
    }
}
