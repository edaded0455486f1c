//! Checkpoints between steps: all that a run needs to go on as if it had never stopped.
//!
//! ```text
//! output/checkpoint-120/state.safetensors   f32: param.NAME, m.NAME and v.NAME of each parameter that is trained
//!                       settings.toml       all settings of the run
//!                       manifest.json       [`Place`], and size and SHA-256 of the other two
//! ```
//!
//! A checkpoint is written under another name, to the disk, and gets its own when it is whole: whatever ends a run, what is called
//! `checkpoint-N` can be relied on. What a disk does to it later is found by its hashes, and the one before it serves.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::config::Config;
use super::log;
use super::loss_scale::LossScale;
use super::optim::Optimizer;
use super::sampler::Position;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::Llava;
use crate::ops::Ops;
use crate::tensor::Tensor;
use crate::weights::files;
use crate::weights::write::{Planned, Writer, sync_folder, write_whole};

const STATE: &str = "state.safetensors";
const SETTINGS: &str = "settings.toml";
const MANIFEST: &str = "manifest.json";
const PREFIX: &str = "checkpoint-";
const LOCK: &str = ".lock";
/// Of folders that are being written or taken away.
const UNFINISHED: &str = ".checkpoint-";
/// Of the format.
const VERSION: u32 = 1;

/// Where a run stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// Steps that are done.
    pub step: usize,
    /// Steps of the run.
    pub n_steps: usize,
    /// Where the next batch comes from.
    pub position: Position,
    /// Steps that have moved parameters.
    pub n_updates: u64,
    /// What the loss is multiplied by, in f16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
    /// Rows that were left out: number in the set, and what is wrong with each.
    pub bad_rows: Vec<(usize, String)>,
    /// What the rows of the run are known by: their order depends on all of them.
    pub rows: String,
    /// What the model is known by that the run began with.
    pub model: String,
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    version: u32,
    #[serde(flatten)]
    place: Place,
    files: BTreeMap<String, Whole>,
}

/// What a file must be.
#[derive(PartialEq, Serialize, Deserialize)]
struct Whole {
    bytes: u64,
    sha256: String,
}

impl Whole {
    fn of(path: &Path) -> Result<Self> {
        let hash = || -> io::Result<Self> {
            let mut file = File::open(path)?;
            let mut hasher = Sha256::new();
            let bytes = io::copy(&mut file, &mut HashWriter(&mut hasher))?;
            Ok(Self { bytes, sha256: hex(&hasher.finalize()) })
        };
        hash().map_err(|e| Error::io(path, e))
    }
}

struct HashWriter<'a>(&'a mut Sha256);

impl io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// What many values are known by.
pub fn fingerprint(values: impl IntoIterator<Item = Vec<u8>>) -> String {
    let mut hasher = Sha256::new();
    for value in values {
        hasher.update((value.len() as u64).to_le_bytes());
        hasher.update(value);
    }
    hex(&hasher.finalize())
}

/// Keeps other runs out of an output folder, until it is dropped or its process ends.
pub struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    /// Takes the folder `output`.
    ///
    /// # Errors
    /// If another process has it; if it cannot be written.
    pub fn take(output: &Path) -> Result<Self> {
        let path = output.join(LOCK);
        let file = File::create(&path).map_err(|e| Error::io(&path, e))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { path, _file: file }),
            Err(fs::TryLockError::WouldBlock) => Err(Error::file(output, "another run is writing here")),
            Err(fs::TryLockError::Error(e)) => Err(Error::io(&path, e)),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path); // one that stays is taken again
    }
}

/// Whether a run may begin in the folder `output` that has no checkpoint: it is empty, or a run was here.
///
/// # Errors
/// If it cannot be read.
pub fn is_of_a_run(output: &Path) -> Result<bool> {
    let names = names(output)?;
    Ok(names.iter().any(|name| name == log::ROWS) || names.iter().all(|name| name.starts_with('.')))
}

/// Takes away what a run that was killed had not finished writing, or taking away.
pub fn tidy(output: &Path) -> Result<()> {
    for name in names(output)?.iter().filter(|name| name.starts_with(UNFINISHED)) {
        let path = output.join(name);
        fs::remove_dir_all(&path).map_err(|e| Error::io(&path, e))?;
    }
    Ok(())
}

/// Writes the checkpoint of `place`, and takes away all but the newest `keep`.
///
/// # Errors
/// If it cannot be written: then nothing of it is left, and those before it are as they were.
pub fn write(
    output: &Path,
    keep: usize,
    config: &Config,
    place: Place,
    ops: &dyn Ops,
    model: &mut Llava,
    optimizer: &Optimizer,
) -> Result<()> {
    let folder = output.join(format!("{PREFIX}{}", place.step));
    if open(&folder).is_ok() {
        return Ok(()); // a step is always the same
    }
    let step = place.step;
    let partial = Unfinished(output.join(format!("{UNFINISHED}{}.partial", place.step)));
    fs::create_dir(&partial.0).map_err(|e| Error::io(&partial.0, e))?;
    write_state(&partial.0.join(STATE), ops, model, optimizer)?;
    write_whole(&partial.0.join(SETTINGS), config.to_toml().as_bytes())?;
    let files = [STATE, SETTINGS].map(|name| Ok((name.to_owned(), Whole::of(&partial.0.join(name))?)));
    let files = files.into_iter().collect::<Result<_>>()?;
    let manifest = Manifest { version: VERSION, place, files };
    let path = partial.0.join(MANIFEST);
    write_whole(&path, serde_json::to_string_pretty(&manifest).map_err(|e| Error::file(&path, e))?.as_bytes())?;
    sync_folder(&partial.0)?;
    remove(&folder)?; // broken, or it would do
    fs::rename(&partial.0, &folder).map_err(|e| Error::io(&folder, e))?;
    sync_folder(output)?;
    // Newer ones are broken, or the run would have gone on from there.
    let (older, newer): (Vec<_>, Vec<_>) = steps(output)?.into_iter().partition(|&of| of <= step);
    let gone = older.iter().rev().skip(keep).chain(&newer);
    gone.into_iter().try_for_each(|step| remove(&output.join(format!("{PREFIX}{step}"))))
}

/// A folder that goes when it does not get its name.
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        match fs::remove_dir_all(&self.0) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                eprintln!("llava-engine: {} stays behind: {e}", self.0.display());
            }
            _ => {}
        }
    }
}

/// Takes a checkpoint away, if it is there; a half of one is never called so.
fn remove(folder: &Path) -> Result<()> {
    let Some(name) = folder.file_name().filter(|_| folder.exists()) else { return Ok(()) };
    let gone = folder.with_file_name(format!(".{}.old", name.to_string_lossy()));
    fs::rename(folder, &gone).and_then(|()| fs::remove_dir_all(&gone)).map_err(|e| Error::io(folder, e))
}

/// Names in the folder `output`; none if there is no such folder.
fn names(output: &Path) -> Result<Vec<String>> {
    match fs::read_dir(output) {
        Ok(entries) => {
            let name = |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
            entries.map(name).collect::<io::Result<_>>().map_err(|e| Error::io(output, e))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(Error::io(output, e)),
    }
}

/// Steps that there are checkpoints of, in rising order.
fn steps(output: &Path) -> Result<Vec<usize>> {
    let mut steps: Vec<_> = names(output)?.iter().filter_map(|name| name.strip_prefix(PREFIX)?.parse().ok()).collect();
    steps.sort_unstable();
    Ok(steps)
}

fn write_state(path: &Path, ops: &dyn Ops, model: &mut Llava, optimizer: &Optimizer) -> Result<()> {
    let mut planned = Vec::new();
    let mut plan = |kind: &str, name: &str, tensor: &Tensor| {
        planned.push(Planned { name: format!("{kind}.{name}"), shape: tensor.shape().to_vec(), dtype: DType::F32 });
    };
    model.visit_params(&mut |param| {
        plan("param", param.name, param.value);
        optimizer.moments(param.name).into_iter().for_each(|[m, v]| {
            plan("m", param.name, m);
            plan("v", param.name, v);
        });
        Ok(())
    })?;
    let mut writer = Writer::create(path, &planned)?;
    let mut write = |kind: &str, name: &str, tensor: &Tensor| {
        writer.write(&format!("{kind}.{name}"), ops.to_host(tensor)?.as_bytes()) //
    };
    model.visit_params(&mut |param| {
        write("param", param.name, param.value)?;
        let Some([m, v]) = optimizer.moments(param.name) else { return Ok(()) };
        write("m", param.name, m)?;
        write("v", param.name, v)
    })?;
    writer.finish()
}

/// A checkpoint that is whole.
pub struct Found {
    /// Where its run stood.
    pub place: Place,
    /// Settings of its run.
    pub config: Config,
    folder: PathBuf,
}

/// The newest checkpoint that is whole; what is wrong with newer ones goes to `note`. None if there is none.
///
/// # Errors
/// If the folder cannot be read; if there are checkpoints, but none of them is whole.
pub fn newest(output: &Path, note: &mut dyn FnMut(&str)) -> Result<Option<Found>> {
    let mut broken = None;
    for step in steps(output)?.into_iter().rev() {
        match open(&output.join(format!("{PREFIX}{step}"))) {
            Ok(found) => return Ok(Some(found)),
            // Not broken: of another version of this program, or out of reach at the moment.
            Err(e @ Error::Unsupported(_)) => return Err(e),
            Err(Error::Io { path, source }) if source.kind() != io::ErrorKind::NotFound => return Err(Error::io(path, source)),
            Err(e) => {
                note(&format!("{e}: looking for an older checkpoint"));
                broken = Some(e);
            }
        }
    }
    broken.map_or(Ok(None), Err)
}

fn open(folder: &Path) -> Result<Found> {
    let path = folder.join(MANIFEST);
    let text = |path: &Path| files::text(path)?.ok_or_else(|| Error::file(path, "is not there"));
    let manifest: Manifest = serde_json::from_str(&text(&path)?).map_err(|e| Error::file(&path, e))?;
    if manifest.version != VERSION {
        let problem = format!("is of version {}, and this program reads version {VERSION}", manifest.version);
        return Err(Error::Unsupported(format!("{}: {problem}", path.display())));
    }
    let Place { step, n_steps, .. } = manifest.place;
    if step > n_steps || folder.file_name().is_none_or(|name| name != format!("{PREFIX}{step}").as_str()) {
        return Err(Error::file(&path, format!("is of step {step} of {n_steps}: not of this folder")));
    }
    for name in [STATE, SETTINGS] {
        let path = folder.join(name);
        if manifest.files.get(name) != Some(&Whole::of(&path)?) {
            return Err(Error::file(&path, "is not what was written: its size or its hash differs from the manifest's"));
        }
    }
    let settings = folder.join(SETTINGS);
    let config = Config::from_toml(&settings, &text(&settings)?)?;
    Ok(Found { place: manifest.place, config, folder: folder.to_owned() })
}

impl Found {
    /// Gives parameters and moments their values.
    ///
    /// # Errors
    /// If they are not those of this run.
    pub fn restore(&self, ops: &dyn Ops, model: &mut Llava, optimizer: &mut Optimizer) -> Result<()> {
        let path = self.folder.join(STATE);
        let file = File::open(&path).map_err(|e| Error::io(&path, e))?;
        // SAFETY: the file is only read, and belongs to this run: nothing writes to a checkpoint that has its name.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(&path, e))?;
        let state = SafeTensors::deserialize(&map).map_err(|e| Error::file(&path, e))?;
        let read = |kind: &str, name: &str, like: &Tensor| {
            let name = format!("{kind}.{name}");
            let view = state.tensor(&name).map_err(|_| Error::file(&path, format!("has no tensor `{name}`")))?;
            if view.shape() != like.shape() || view.dtype() != safetensors::Dtype::F32 {
                let problem =
                    format!("`{name}` is {:?} {:?}, and this run needs F32 {:?}", view.dtype(), view.shape(), like.shape());
                return Err(Error::file(&path, problem));
            }
            Ok(Tensor::from_slice::<f32>(like.shape(), &bytemuck::pod_collect_to_vec(view.data())))
        };
        let mut n_read = 0;
        optimizer.set_n_steps(self.place.n_updates);
        optimizer.set_loss_scale(self.place.loss_scale);
        model.visit_params(&mut |mut param| {
            param.set(ops, read("param", param.name, param.value)?)?;
            n_read += 1;
            if self.place.n_updates > 0 {
                let [m, v] = [read("m", param.name, param.value)?, read("v", param.name, param.value)?];
                let moments = [ops.upload(m)?, ops.upload(v)?];
                optimizer.set_moments(param.name, moments);
                n_read += 2;
            }
            Ok(())
        })?;
        if n_read != state.len() {
            return Err(Error::file(&path, format!("has {} tensors, and this run has {n_read}", state.len())));
        }
        Ok(())
    }
}
