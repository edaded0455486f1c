//! Which files of a folder hold weights, and reading the small ones beside them.
//!
//! An index names its shards, and those names come from outside: only a plain file name is followed, and only to a file inside the
//! folder. The one exception is the Hugging Face cache, where a snapshot is a folder of links into the `blobs` beside it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Longest JSON file that is read: a tokenizer of 256 000 words takes 30 MB.
const MAX_JSON_BYTES: u64 = 128 << 20;

/// The container that a folder's weights are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `*.safetensors`
    Safetensors,
    /// `*.bin`, written by `torch.save`
    Pickle,
}

/// The weight files of a folder, each once, in order of name.
#[derive(Clone, Debug)]
pub struct WeightFiles {
    /// What they are.
    pub format: Format,
    /// The files.
    pub paths: Vec<PathBuf>,
}

/// Files that training leaves beside a checkpoint and that are no part of it.
const NOT_WEIGHTS: [&str; 8] = [
    "adapter_model.safetensors",
    "adapter_model.bin",
    "non_lora_trainables.bin",
    "mm_projector.bin",
    "training_args.bin",
    "optimizer.bin",
    "scheduler.bin",
    "random_states.bin",
];

/// The weight files of `dir`: safetensors before pickles, those that an index names before those that merely lie there. `None` if
/// there are none.
///
/// # Errors
/// [`Error::File`] if an index is malformed or names a shard that is missing or lies elsewhere, or if the numbers of the shards show
/// that one is missing.
pub fn weight_files(dir: &Path) -> Result<Option<WeightFiles>> {
    let names: Vec<String> = list(dir)?.into_iter().filter(|n| !n.starts_with('.') && !NOT_WEIGHTS.contains(&n.as_str())).collect();
    let formats = [(Format::Safetensors, "model", ".safetensors"), (Format::Pickle, "pytorch_model", ".bin")];
    for (format, stem, extension) in formats {
        let single = format!("{stem}{extension}");
        let index = dir.join(format!("{single}.index.json"));
        let paths = if names.contains(&single) {
            vec![dir.join(single)]
        } else if index.is_file() {
            indexed(dir, &index)?
        } else {
            numbered_or_other(dir, names.iter().filter(|n| n.starts_with(stem) && n.ends_with(extension)).collect())?
        };
        if !paths.is_empty() {
            return Ok(Some(WeightFiles { format, paths }));
        }
    }
    // Names of their own come last: beside a checkpoint lie all kinds of files that happen to hold tensors.
    for (format, _, extension) in formats {
        let paths = numbered_or_other(dir, names.iter().filter(|n| n.ends_with(extension)).collect())?;
        if !paths.is_empty() {
            return Ok(Some(WeightFiles { format, paths }));
        }
    }
    Ok(None)
}

/// Names of what lies in `dir`, sorted; names that are not Unicode are none of ours.
///
/// # Errors
/// [`Error::Io`] if it cannot be listed.
pub fn list(dir: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(dir).and_then(|entries| entries.collect::<Result<Vec<_>, _>>()).map_err(|e| Error::io(dir, e))?;
    let mut names: Vec<String> = entries.into_iter().filter_map(|e| e.file_name().into_string().ok()).collect();
    names.sort();
    Ok(names)
}

/// The JSON object in `path`; `None` if there is no such file.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::File`] if it is not a JSON object of a sane size.
pub fn json(path: &Path) -> Result<Option<Map<String, Value>>> {
    let Some(text) = text(path)? else { return Ok(None) };
    match serde_json::from_str(&text) {
        Ok(Value::Object(object)) => Ok(Some(object)),
        Ok(_) => Err(Error::file(path, "not a JSON object")),
        Err(e) => Err(Error::file(path, format!("not valid JSON: {e}"))),
    }
}

/// The text in `path`; `None` if there is no such file.
///
/// # Errors
/// [`Error::Io`] if it cannot be read or is no UTF-8, [`Error::File`] if it is too large.
pub fn text(path: &Path) -> Result<Option<String>> {
    let io = |e| Error::io(path, e);
    match fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io(e)),
        Ok(m) if !m.is_file() => return Err(Error::file(path, "not a regular file")),
        Ok(_) => {}
    }
    let mut text = String::new();
    fs::File::open(path).map_err(io)?.take(MAX_JSON_BYTES + 1).read_to_string(&mut text).map_err(io)?;
    if text.len() as u64 > MAX_JSON_BYTES {
        return Err(Error::file(path, format!("larger than {} MiB", MAX_JSON_BYTES >> 20)));
    }
    Ok(Some(text))
}

/// The shards that `index` names.
fn indexed(dir: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let object = json(index)?.unwrap_or_default();
    let names = shard_names(&object).map_err(|problem| Error::file(index, problem))?;
    names.into_iter().map(|name| shard(dir, index, &name)).collect()
}

/// The distinct file names in the `weight_map` of an index, each a plain file name.
///
/// # Errors
/// What is wrong with the index.
pub fn shard_names(index: &Map<String, Value>) -> Result<BTreeSet<String>, String> {
    let Some(Value::Object(map)) = index.get("weight_map") else { return Err("has no `weight_map` object".to_owned()) };
    if map.is_empty() {
        return Err("its `weight_map` is empty".to_owned());
    }
    let name = |(tensor, file): (&String, &Value)| match file {
        Value::String(file) if is_file_name(file) => Ok(file.clone()),
        _ => Err(format!(
            "puts tensor `{}` in {file}: a shard is named by a plain file name in the same folder",
            tensor.escape_debug()
        )),
    };
    map.iter().map(name).collect()
}

/// Whether `name` can only mean a file in the folder it is looked for in.
pub(super) fn is_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let plain = matches!((components.next(), components.next()), (Some(Component::Normal(only)), None) if only == name);
    // A name that is plain here may be a path on another system.
    plain && !name.contains(['/', '\\', ':']) && !name.chars().any(char::is_control)
}

/// The shard `name`, which must exist and lie inside `dir` after all links are followed.
fn shard(dir: &Path, index: &Path, name: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    let missing = |e| Error::file(index, format!("names the shard {name}, which cannot be opened: {e}"));
    let home = dir.canonicalize().map_err(|e| Error::io(dir, e))?;
    let target = path.canonicalize().map_err(missing)?;
    // models--org--name/snapshots/<commit>/<file> -> models--org--name/blobs/<hash>
    let blobs = home.parent().filter(|p| p.ends_with("snapshots")).and_then(Path::parent).map(|repo| repo.join("blobs"));
    if target.starts_with(&home) || blobs.is_some_and(|blobs| target.starts_with(blobs)) {
        return Ok(path);
    }
    Err(Error::file(index, format!("names the shard {name}, which is a link out of its folder to {}: refused", target.display())))
}

/// The files `names` of `dir`. Of those numbered `-00001-of-00003` none may be missing.
fn numbered_or_other(dir: &Path, names: Vec<&String>) -> Result<Vec<PathBuf>> {
    let mut sets: BTreeMap<(&str, usize), BTreeSet<usize>> = BTreeMap::new();
    for name in &names {
        if let Some((stem, k, n)) = numbered(name) {
            sets.entry((stem, n)).or_default().insert(k);
        }
    }
    for ((stem, n), found) in sets {
        if let Some(lost) = (1..=n).find(|k| !found.contains(k)) {
            return Err(Error::file(dir, format!("shard {lost} of {n} ({stem}-{lost:05}-of-{n:05}) is missing")));
        }
    }
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

/// Splits `model-00001-of-00003.safetensors` into `model`, 1 and 3.
fn numbered(name: &str) -> Option<(&str, usize, usize)> {
    let (rest, n) = name.split_once('.')?.0.rsplit_once("-of-")?;
    let (stem, k) = rest.rsplit_once('-')?;
    Some((stem, k.parse().ok()?, n.parse::<u16>().ok()?.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(file: &str) -> Map<String, Value> {
        let Value::Object(object) = serde_json::json!({"weight_map": {"lm_head.weight": file}}) else { unreachable!() };
        object
    }

    #[test]
    fn traversal_names_are_refused() {
        let names = [
            "",
            ".",
            "..",
            "/",
            "//",
            "../a",
            "a/../b",
            "/etc/passwd",
            "a/b",
            "./a",
            "a/",
            "a/.",
            "..\\a",
            "C:\\a",
            "C:a",
            "\\\\host\\a",
            "a\0b",
            "a\nb",
            "~/../a",
            "file:///a",
            "....//a",
            "a//b",
            "..;/a",
            "%2e%2e/a",
            "\u{7f}",
            "..\u{0}",
        ];
        for name in names {
            assert!(shard_names(&index(name)).is_err(), "{name:?} was accepted");
        }
        for name in ["model.safetensors", "pytorch_model-00001-of-00002.bin", "...", "a b", "ä"] {
            assert_eq!(shard_names(&index(name)).unwrap().into_iter().collect::<Vec<_>>(), [name]);
        }
    }

    #[test]
    fn an_index_that_is_none_is_refused() {
        for text in
            ["{}", r#"{"weight_map": []}"#, r#"{"weight_map": {}}"#, r#"{"weight_map": {"a": 1}}"#, r#"{"weight_map": null}"#]
        {
            let Ok(Value::Object(object)) = serde_json::from_str(text) else { unreachable!() };
            assert!(shard_names(&object).is_err(), "{text}");
        }
    }

    #[test]
    fn a_missing_shard_is_named() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"] {
            fs::write(dir.path().join(name), b"x").unwrap();
        }
        let error = weight_files(dir.path()).unwrap_err().to_string();
        assert!(error.contains("shard 2 of 3 (model-00002-of-00003) is missing"), "{error}");
        fs::write(dir.path().join("model.safetensors.index.json"), r#"{"weight_map": {"a": "model-00002-of-00003.safetensors"}}"#)
            .unwrap();
        let error = weight_files(dir.path()).unwrap_err().to_string();
        assert!(error.contains("names the shard model-00002-of-00003.safetensors, which cannot be opened"), "{error}");
    }

    #[test]
    #[cfg(unix)]
    fn links_are_followed_inside_the_folder_and_into_the_blobs_of_a_snapshot_only() {
        use std::os::unix::fs::symlink;
        let root = tempfile::tempdir().unwrap();
        let snapshot = root.path().join("models--a--b/snapshots/0123");
        let blobs = root.path().join("models--a--b/blobs");
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(&blobs).unwrap();
        fs::write(root.path().join("secret"), b"x").unwrap();
        fs::write(blobs.join("ffff"), b"x").unwrap();
        fs::write(snapshot.join("model.safetensors.index.json"), r#"{"weight_map": {"a": "shard.safetensors"}}"#).unwrap();
        let shard = snapshot.join("shard.safetensors");
        symlink("../../blobs/ffff", &shard).unwrap();
        assert_eq!(weight_files(&snapshot).unwrap().unwrap().paths, [shard.as_path()]);
        fs::remove_file(&shard).unwrap();
        symlink("../../../secret", &shard).unwrap();
        let error = weight_files(&snapshot).unwrap_err().to_string();
        assert!(error.contains("a link out of its folder"), "{error}");
    }
}
