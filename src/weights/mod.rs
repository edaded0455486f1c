//! Weight files: where each tensor of a checkpoint lies, under one name whatever the file calls it.
//!
//! Files are mapped, not read: opening a checkpoint touches headers only, and a tensor is a view into its file. All of it comes from
//! outside: a header, an index or a pickle is parsed as data, every range is checked against the size of the file before it is used,
//! and nothing is ever executed. The one thing that cannot be checked is the future: if another program truncates a mapped file, the
//! operating system ends this one with SIGBUS. Files are little-endian, as is every machine that this crate runs on.

pub mod files;
pub mod hub;
pub mod names;
pub mod pickle;
pub mod random;
pub mod recipe;
pub mod safetensors;
pub mod torch_zip;
pub mod write;

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::Packed;
use crate::tensor::{Tensor, checked_len};
use names::Part;

/// Number format of a stored tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoredDType {
    /// One that a [`Tensor`] can have.
    Known(DType),
    /// Another one: no matter, until that tensor is asked for.
    Other {
        /// What the file calls it.
        name: String,
        /// Bits of one element.
        bits: usize,
    },
}

impl fmt::Display for StoredDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(dtype) => dtype.fmt(f),
            Self::Other { name, .. } => f.write_str(name),
        }
    }
}

/// A tensor as a reader found it. The reader vouches that all its elements lie inside `map`.
#[derive(Clone)]
pub struct Located {
    name: String,
    shape: Vec<usize>,
    dtype: StoredDType,
    map: Arc<Mmap>,
    /// First element, in bytes from the start of the file.
    offset: usize,
    /// Distance between neighbours in each dimension, in elements; `None` if contiguous and row-major.
    strides: Option<Vec<usize>>,
}

/// One tensor of a checkpoint, to be listed.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The name that [`Store::tensor`] knows it by; `None` if LLaVA has no use for it.
    pub canonical: Option<String>,
    /// Its name in the file.
    pub source: String,
    /// The file.
    pub file: PathBuf,
    /// Its dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Its number format.
    pub dtype: StoredDType,
    /// Bytes its elements take.
    pub bytes: usize,
}

/// Where a model's tensors come from.
pub trait Source {
    /// The tensor of this canonical name, which must have just this shape: a view into its file, or a copy where the file holds it
    /// misaligned or transposed.
    ///
    /// # Errors
    /// [`Error::Tensor`] if it is missing (then the error names every spelling that was looked for), of another shape, or not of
    /// floating-point numbers that weights can have.
    fn tensor(&self, canonical: &str, shape: &[usize]) -> Result<Tensor>;

    /// The matrix `[n, k]` of the module of this canonical name (`llama.lm_head`), if it is stored packed: as the tensors `module.words`,
    /// `module.scales` and perhaps `module.offsets`, in place of `module.weight`.
    ///
    /// # Errors
    /// [`Error::Tensor`] if they are no such matrix.
    fn packed(&self, module: &str, n: usize, k: usize) -> Result<Option<Packed>>;
}

/// The tensors of a checkpoint by canonical name, wherever they lie.
pub struct Store {
    /// What errors call the checkpoint.
    root: PathBuf,
    tensors: Vec<Stored>,
    by_canonical: HashMap<String, usize>,
}

struct Stored {
    canonical: Option<String>,
    file: Arc<Path>,
    located: Located,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tensors of {}", self.tensors.len(), self.root.display())
    }
}

impl Store {
    /// An empty store for the checkpoint at `root`.
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), tensors: Vec::new(), by_canonical: HashMap::new() }
    }

    /// Adds the tensors of `file` that belong to one of `parts`; the others are listed but never found.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be mapped, [`Error::File`] if it is not a weight file or malformed, [`Error::Tensor`] if it
    /// holds a tensor that is there already.
    pub fn add(&mut self, file: &Path, parts: &[Part]) -> Result<()> {
        let map = map(file)?;
        let file: Arc<Path> = file.into();
        for located in read(&file, &map)? {
            let canonical = names::canonical(&located.name).filter(|c| Part::of(c).is_none_or(|part| parts.contains(&part)));
            if let Some(canonical) = &canonical
                && let Some(twin) = self.by_canonical.insert(canonical.clone(), self.tensors.len())
            {
                let Stored { file: other, located: twin, .. } = &self.tensors[twin];
                let problem = format!("is {canonical}, and so is `{}` in {}: remove one of them", twin.name, other.display());
                return Err(Error::tensor(&located.name, &file, problem));
            }
            self.tensors.push(Stored { canonical, file: file.clone(), located });
        }
        Ok(())
    }

    /// The checkpoint's folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether there is a tensor of this canonical name.
    pub fn contains(&self, canonical: &str) -> bool {
        self.by_canonical.contains_key(canonical)
    }

    /// Whether there is any tensor of `part`.
    pub fn has_part(&self, part: Part) -> bool {
        self.by_canonical.keys().any(|canonical| Part::of(canonical) == Some(part))
    }

    /// Shape of the tensor of this canonical name, if there is one.
    pub fn shape(&self, canonical: &str) -> Option<&[usize]> {
        self.find(canonical).map(|stored| stored.located.shape.as_slice())
    }

    /// Number format of the tensor of this canonical name, if there is one.
    pub fn dtype(&self, canonical: &str) -> Option<&StoredDType> {
        self.find(canonical).map(|stored| &stored.located.dtype)
    }

    /// Every tensor of its files, in the order of the files and of the data in them.
    pub fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        self.tensors.iter().map(|Stored { canonical, file, located }| Entry {
            canonical: canonical.clone(),
            source: located.name.clone(),
            file: file.to_path_buf(),
            shape: located.shape.clone(),
            dtype: located.dtype.clone(),
            bytes: located.bytes(),
        })
    }

    fn find(&self, canonical: &str) -> Option<&Stored> {
        self.by_canonical.get(canonical).map(|&i| &self.tensors[i])
    }
}

impl Source for Store {
    fn tensor(&self, canonical: &str, shape: &[usize]) -> Result<Tensor> {
        let Some(Stored { file, located, .. }) = self.find(canonical) else {
            let spellings = names::spellings(canonical).into_iter().map(|s| format!("`{s}`")).collect::<Vec<_>>().join(", ");
            return Err(Error::tensor(canonical, &self.root, format!("missing: no file has any of {spellings}")));
        };
        if located.shape != shape {
            let problem = format!("has shape {:?}, but the configuration says {shape:?}", located.shape);
            return Err(Error::tensor(&located.name, file, problem));
        }
        let StoredDType::Known(dtype @ (DType::F32 | DType::F16 | DType::Bf16)) = located.dtype else {
            return Err(Error::tensor(
                &located.name,
                file,
                format!("is stored as {}: weights are f32, f16 or bf16", located.dtype),
            ));
        };
        located.load(dtype).map_err(|problem| Error::tensor(&located.name, file, problem))
    }

    fn packed(&self, module: &str, n: usize, k: usize) -> Result<Option<Packed>> {
        let words_name = format!("{module}.words");
        let Some(words) = self.find(&words_name) else { return Ok(None) };
        let error = |problem: String| Error::tensor(&words.located.name, &words.file, problem);
        if let Some(twin) = self.find(&format!("{module}.weight")) {
            return Err(error(format!("is packed, but there is `{}` too: remove one of them", twin.located.name)));
        }
        let load = |kind: &str| {
            let name = format!("{module}.{kind}");
            let Some(Stored { file, located, .. }) = self.find(&name) else { return Ok(None) };
            let StoredDType::Known(dtype) = located.dtype else {
                return Err(Error::tensor(
                    &located.name,
                    file,
                    format!("is stored as {}, not as a packed matrix is", located.dtype),
                ));
            };
            located.load(dtype).map(Some).map_err(|problem| Error::tensor(&located.name, file, problem))
        };
        let (Some(words), Some(scales)) = (load("words")?, load("scales")?) else {
            return Err(error("is packed, but its scales are missing".to_owned()));
        };
        Packed::new(n, k, words, scales, load("offsets")?).map(Some).map_err(|e| error(e.to_string()))
    }
}

impl Located {
    /// Bytes its elements take. Readers have checked the multiplication.
    fn bytes(&self) -> usize {
        let bits = match &self.dtype {
            StoredDType::Known(dtype) => 8 * dtype.size(),
            StoredDType::Other { bits, .. } => *bits,
        };
        (checked_len(&self.shape).unwrap_or(0) as u128 * bits as u128 / 8) as usize
    }

    fn load(&self, dtype: DType) -> Result<Tensor, String> {
        match &self.strides {
            Some(strides) => self.gather(strides, dtype),
            None if !(self.map.as_ptr() as usize + self.offset).is_multiple_of(dtype.size()) => self.copy(dtype),
            None => Tensor::mapped(self.map.clone(), self.offset, &self.shape, dtype).map_err(|e| e.to_string()),
        }
    }

    /// Its elements in memory of their own, for a file that does not align them.
    fn copy(&self, dtype: DType) -> Result<Tensor, String> {
        let end = self.offset.checked_add(self.bytes());
        let bytes = end.and_then(|end| self.map.get(self.offset..end)).ok_or("leaves its file")?;
        let mut tensor = Tensor::zeros(&self.shape, dtype);
        bytes_of(&mut tensor).copy_from_slice(bytes);
        Ok(tensor)
    }

    /// Its elements in row-major order, in memory of their own.
    fn gather(&self, strides: &[usize], dtype: DType) -> Result<Tensor, String> {
        let size = dtype.size();
        let mut tensor = Tensor::zeros(&self.shape, dtype);
        let mut at = vec![0usize; self.shape.len()]; // index of the element being copied, one per dimension
        for element in bytes_of(&mut tensor).chunks_exact_mut(size) {
            let start = self.offset + size * at.iter().zip(strides).map(|(i, stride)| i * stride).sum::<usize>();
            element.copy_from_slice(self.map.get(start..start + size).ok_or("leaves its file")?);
            for (i, n) in at.iter_mut().zip(&self.shape).rev() {
                *i += 1;
                if *i < *n {
                    break;
                }
                *i = 0;
            }
        }
        Ok(tensor)
    }
}

fn bytes_of(tensor: &mut Tensor) -> &mut [u8] {
    match tensor.dtype() {
        DType::F32 => bytemuck::cast_slice_mut(tensor.as_mut_slice::<f32>()),
        DType::F16 => bytemuck::cast_slice_mut(tensor.as_mut_slice::<half::f16>()),
        DType::Bf16 => bytemuck::cast_slice_mut(tensor.as_mut_slice::<half::bf16>()),
        DType::I32 => bytemuck::cast_slice_mut(tensor.as_mut_slice::<i32>()),
        DType::I8 => bytemuck::cast_slice_mut(tensor.as_mut_slice::<i8>()),
    }
}

/// The tensors of a mapped file, whichever of the known formats it has: its first bytes tell, not its name.
fn read(path: &Path, map: &Arc<Mmap>) -> Result<Vec<Located>> {
    let starts_with = |magic: &[u8]| map.starts_with(magic);
    if starts_with(b"GGUF") {
        return Err(Error::file(path, "a GGUF file: not supported yet, use the checkpoint it was made from"));
    }
    if starts_with(b"version https://git-lfs") {
        return Err(Error::file(path, "a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"));
    }
    if starts_with(torch_zip::ZIP_MAGIC) {
        return torch_zip::read(path, map);
    }
    if starts_with(torch_zip::LEGACY_MAGIC) {
        return Err(Error::file(
            path,
            "written by torch.save before torch 1.6: convert it once with `python -c \"import torch, sys; \
             torch.save(torch.load(sys.argv[1], weights_only=True), sys.argv[1])\" FILE`",
        ));
    }
    if starts_with(b"\x80") && path.extension().is_some_and(|extension| extension != "safetensors") {
        return Err(Error::file(path, "a bare pickle, not a file of torch.save: refused"));
    }
    safetensors::read(path, map)
}

/// Maps a weight file.
fn map(path: &Path) -> Result<Arc<Mmap>> {
    let io = |e| Error::io(path, e);
    // Asked before opening, because opening a pipe would wait for its other end.
    let metadata = fs::metadata(path).map_err(io)?;
    if !metadata.is_file() {
        return Err(Error::file(path, "not a regular file"));
    }
    if metadata.len() == 0 {
        return Err(Error::file(path, "the file is empty: its download or copy was cut short"));
    }
    let file = File::open(path).map_err(io)?;
    // SAFETY: the mapping is read-only and shared bytes are only ever read as plain numbers, for which every bit pattern is valid.
    // Another process may still write to the file, which this module's documentation says.
    let map = unsafe { Mmap::map(&file) }.map_err(io)?;
    if map.len() as u64 != file.metadata().map_err(io)?.len() {
        return Err(io(io::Error::other("the file changed its size while it was opened")));
    }
    Ok(Arc::new(map))
}
