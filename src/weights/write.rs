//! Writes a safetensors file tensor by tensor, in any order, so that a model larger than memory can be written as it is made; and small
//! files, each there whole or not at all.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde_json::json;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::checked_len;

/// Where the data of a file begins: at the start of a cache line, as its tensors do as far as their sizes are such.
const ALIGN: usize = 64;

/// A tensor that a file will hold.
#[derive(Clone, Debug)]
pub struct Planned {
    /// Its name in the file.
    pub name: String,
    /// Its dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Its number format.
    pub dtype: DType,
}

impl Planned {
    /// Bytes that it takes.
    ///
    /// # Panics
    /// If they cannot be counted: planned tensors are of models that exist.
    pub fn bytes(&self) -> usize {
        checked_len(&self.shape).and_then(|n| n.checked_mul(self.dtype.size())).expect("planned tensors are of models that exist")
    }
}

/// A file that is being written beside its final name, which it takes when it is whole.
pub struct Writer {
    path: PathBuf,
    temporary: PathBuf,
    file: File,
    /// Place in the file of what is not written yet: first byte and bytes.
    missing: HashMap<String, (u64, usize)>,
}

impl Writer {
    /// Begins the file `path` with these tensors, in this order.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written; [`Error::File`] if two tensors have one name.
    pub fn create(path: &Path, tensors: &[Planned]) -> Result<Self> {
        let mut end = 0;
        let mut infos = Vec::new();
        let mut missing = HashMap::new();
        for tensor in tensors {
            let (Planned { name, shape, dtype }, bytes) = (tensor, tensor.bytes());
            infos
                .push((name.clone(), TensorInfo { dtype: stored(*dtype), shape: shape.clone(), data_offsets: (end, end + bytes) }));
            if missing.insert(name.clone(), (end as u64, bytes)).is_some() {
                return Err(Error::file(path, format!("two tensors would be `{name}`")));
            }
            end += bytes;
        }
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        let header = Metadata::new(Some(metadata), infos).map_err(|e| Error::file(path, e))?;
        let mut header = serde_json::to_string(&header).map_err(|e| Error::file(path, e))?;
        let start = (size_of::<u64>() + header.len()).next_multiple_of(ALIGN);
        header.extend(std::iter::repeat_n(' ', start - size_of::<u64>() - header.len()));
        for (place, _) in missing.values_mut() {
            *place += start as u64;
        }
        let temporary = partial(path);
        let file = File::create(&temporary).map_err(|e| Error::io(&temporary, e))?;
        // From here on, dropping it takes the file away.
        let writer = Self { path: path.to_owned(), temporary, file, missing };
        let io = |e| Error::io(&writer.temporary, e);
        writer.file.write_all_at(&(header.len() as u64).to_le_bytes(), 0).map_err(io)?;
        writer.file.write_all_at(header.as_bytes(), size_of::<u64>() as u64).map_err(io)?;
        writer.file.set_len((start + end) as u64).map_err(io)?;
        Ok(writer)
    }

    /// Writes the tensor `name`.
    ///
    /// # Panics
    /// If it was not planned, was written before, or is not of that size.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let (place, size) = self.missing.remove(name).unwrap_or_else(|| panic!("`{name}` is not to be written, or has been"));
        assert_eq!(bytes.len(), size, "bytes of `{name}`");
        self.file.write_all_at(bytes, place).map_err(|e| Error::io(&self.temporary, e))
    }

    /// Leaves the tensor `name` a hole in the file, which reads as zeros.
    ///
    /// # Panics
    /// If it was not planned, or was written before.
    pub fn leave_zero(&mut self, name: &str) {
        self.missing.remove(name).unwrap_or_else(|| panic!("`{name}` is not to be written, or has been"));
    }

    /// Puts the file in its place, once the disk has it.
    ///
    /// # Panics
    /// If a tensor was not written.
    pub fn finish(self) -> Result<()> {
        assert!(self.missing.is_empty(), "never written: {:?}", self.missing.keys());
        let io = |e| Error::io(&self.path, e);
        self.file.sync_all().map_err(io)?;
        fs::rename(&self.temporary, &self.path).map_err(io)
    }
}

impl Drop for Writer {
    /// Leaves nothing behind of a file that was not finished.
    fn drop(&mut self) {
        match fs::remove_file(&self.temporary) {
            Ok(()) => {}
            // It has its name by now.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => eprintln!("llava-engine: {} stays behind: {e}", self.temporary.display()),
        }
    }
}

/// Writes tensors into `folder` as transformers does: `model.safetensors`, or, where that would be larger than `max_bytes`, several files
/// and their index. `write` is asked for each tensor in turn, by its place in `tensors`, and has to write it. Returns the number of files.
///
/// A tensor larger than `max_bytes` has a file of its own.
///
/// # Errors
/// [`Error::Io`] if they cannot be written; [`Error::File`] if two tensors have one name; what `write` fails with.
pub fn write_shards(
    folder: &Path,
    tensors: &[Planned],
    max_bytes: usize,
    mut write: impl FnMut(usize, &mut Writer) -> Result<()>,
) -> Result<usize> {
    let mut ends = vec![0]; // the place after the last tensor of each file
    let mut filled = 0;
    for (i, tensor) in tensors.iter().enumerate() {
        if filled > 0 && filled + tensor.bytes() > max_bytes {
            ends.push(i);
            filled = 0;
        }
        filled += tensor.bytes();
    }
    ends.push(tensors.len());
    let n_files = ends.len() - 1;
    let mut weight_map = BTreeMap::new();
    for (k, file) in ends.windows(2).enumerate() {
        let name = match n_files {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{n_files:05}.safetensors", k + 1),
        };
        let of_file = &tensors[file[0]..file[1]];
        let mut writer = Writer::create(&folder.join(&name), of_file)?;
        (file[0]..file[1]).try_for_each(|i| write(i, &mut writer))?;
        writer.finish()?;
        for tensor in of_file {
            if weight_map.insert(&tensor.name, name.clone()).is_some() {
                return Err(Error::file(folder, format!("two tensors would be `{}`", tensor.name)));
            }
        }
    }
    if n_files > 1 {
        let total: usize = tensors.iter().map(Planned::bytes).sum();
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        write_whole(&folder.join("model.safetensors.index.json"), format!("{index:#}\n").as_bytes())?;
    }
    Ok(n_files)
}

/// Writes a small file that is there whole or not at all, on the disk when this returns.
///
/// # Errors
/// [`Error::Io`] if it cannot be written.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = partial(path);
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|e| {
        let _ = fs::remove_file(&temporary); // the first error is the one to tell
        Error::io(path, e)
    })
}

/// Copies a file, which is there whole or not at all.
///
/// # Errors
/// [`Error::Io`] if it cannot be read or written.
pub fn copy_whole(from: &Path, to: &Path) -> Result<()> {
    let temporary = partial(to);
    // Of the content alone: a copy of what may only be read must still be replaceable.
    let copy = || {
        let mut file = File::create(&temporary)?;
        io::copy(&mut File::open(from)?, &mut file)?;
        file.sync_all()?;
        fs::rename(&temporary, to)
    };
    copy().map_err(|e| {
        let _ = fs::remove_file(&temporary);
        Error::io(to, e)
    })
}

/// Waits until the disk knows of the names in a folder.
///
/// # Errors
/// [`Error::Io`] if it says that it cannot.
pub fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|f| f.sync_all()).map_err(|e| Error::io(folder, e))
}

/// What a file is called until it is whole.
pub(super) fn partial(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.partial"))
}

fn stored(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::Bf16 => Dtype::BF16,
        DType::I32 => Dtype::I32,
        DType::I8 => Dtype::I8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    fn planned(name: &str, shape: &[usize], dtype: DType) -> Planned {
        Planned { name: name.to_owned(), shape: shape.to_vec(), dtype }
    }

    #[test]
    fn what_is_written_in_any_order_is_read_back_aligned() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let plan = [planned("a", &[2, 8], DType::I32), planned("b", &[3], DType::F16), planned("empty", &[0, 4], DType::F32)];
        let mut writer = Writer::create(&path, &plan).unwrap();
        writer.write("b", &[9; 6]).unwrap();
        writer.write("empty", &[]).unwrap();
        writer.write("a", &[7; 64]).unwrap();
        assert!(!path.exists());
        writer.finish().unwrap();
        let bytes = fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let a = file.tensor("a").unwrap();
        assert_eq!((a.shape(), a.dtype(), a.data()), (&[2, 8][..], Dtype::I32, &[7; 64][..]));
        assert_eq!((a.data().as_ptr() as usize - bytes.as_ptr() as usize) % ALIGN, 0);
        assert_eq!(file.tensor("b").unwrap().data(), [9; 6]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn shards_hold_every_tensor_once_and_no_more_than_they_may() {
        let plan: Vec<Planned> =
            [8, 3, 20, 1, 9, 0].iter().enumerate().map(|(i, n)| planned(&i.to_string(), &[*n], DType::F16)).collect();
        for (max, expected) in [
            (82, vec![vec!["0", "1", "2", "3", "4", "5"]]),
            (81, vec![vec!["0", "1", "2", "3"], vec!["4", "5"]]),
            (22, vec![vec!["0", "1"], vec!["2"], vec!["3", "4", "5"]]),
            (1, vec![vec!["0"], vec!["1"], vec!["2"], vec!["3"], vec!["4"], vec!["5"]]),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let n_files =
                write_shards(dir.path(), &plan, max, |i, writer| writer.write(&plan[i].name, &vec![i as u8; 2 * plan[i].shape[0]]));
            assert_eq!(n_files.unwrap(), expected.len(), "{max}");
            let files = crate::weights::files::weight_files(dir.path()).unwrap().unwrap().paths;
            let names: Vec<Vec<String>> = files
                .iter()
                .map(|file| {
                    let bytes = fs::read(file).unwrap();
                    let file = SafeTensors::deserialize(&bytes).unwrap();
                    let mut names: Vec<_> = file.names().iter().map(ToString::to_string).collect();
                    names.sort();
                    assert!(names.iter().all(|name| file.tensor(name).unwrap().data().iter().all(|b| b.to_string() == *name)));
                    names
                })
                .collect();
            assert_eq!(names, expected, "{max}");
        }
        let twice = [planned("a", &[1], DType::F32), planned("a", &[1], DType::F32)];
        let dir = tempfile::tempdir().unwrap();
        assert!(write_shards(dir.path(), &twice, 1, |_, writer| writer.write("a", &[0; 4])).is_err());
    }

    #[test]
    fn what_is_not_finished_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        drop(Writer::create(&path, &[planned("a", &[1], DType::F32)]).unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let twice = [planned("a", &[1], DType::F32), planned("a", &[2], DType::F32)];
        assert!(Writer::create(&path, &twice).is_err());
    }
}
