//! Weight files: where each tensor of a checkpoint lies, under one name whatever the file calls it.
//!
//! Files are mapped, not read: opening a checkpoint touches headers only, and a tensor is a view into its file. All of it comes from
//! outside: a header, an index or a pickle is parsed as data, every range is checked against the size of the file before it is used,
//! and nothing is ever executed. The one thing that cannot be checked is the future: if another program truncates a mapped file, the
//! operating system ends this one with SIGBUS. Files are little-endian, as is every machine that this crate runs on.

pub mod adapter;
pub mod blocks;
pub mod files;
pub mod gguf;
mod gguf_names;
pub mod hub;
mod located;
pub mod names;
pub mod pickle;
pub mod qweight;
pub mod random;
pub mod recipe;
mod repack;
pub mod safetensors;
pub mod torch_write;
pub mod torch_zip;
pub mod write;

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use memmap2::Mmap;

use crate::cpu::pool::Pool;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::Packed;
use crate::ops::packed::{BLOCK_ROWS, Format, SLAB};
use crate::tensor::Tensor;
use blocks::BlockType;
use gguf::Gguf;
pub use located::{Located, Order};
use names::Part;
use qweight::Scheme;

/// Number format of a stored tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoredDType {
    /// One that a [`Tensor`] can have.
    Known(DType),
    /// Blocks of a GGUF file.
    Blocks(BlockType),
    /// Another one: no matter, until that tensor is asked for.
    Other {
        /// What the file calls it.
        name: String,
        /// Bits of one element.
        bits: usize,
    },
}

impl StoredDType {
    /// Bytes of `n` elements, if they can be counted; of blocks, `n` is a multiple of theirs.
    pub fn bytes(&self, n: usize) -> Option<usize> {
        match self {
            Self::Known(dtype) => n.checked_mul(dtype.size()),
            Self::Blocks(block) => (n / block.weights).checked_mul(block.bytes),
            Self::Other { bits, .. } => usize::try_from(n as u128 * *bits as u128 / 8).ok(),
        }
    }
}

impl fmt::Display for StoredDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(dtype) => dtype.fmt(f),
            Self::Blocks(block) => block.fmt(f),
            Self::Other { name, .. } => f.write_str(name),
        }
    }
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
    /// Weights that it holds: its elements, or what is packed in them; none in the scales and the like of packed matrices.
    pub parameters: usize,
}

impl Entry {
    /// Its number format, if that is one of weights that are not packed.
    ///
    /// # Errors
    /// [`Error::Tensor`] that says which else it is.
    pub fn float_dtype(&self) -> Result<DType> {
        match self.dtype {
            StoredDType::Known(dtype @ (DType::F32 | DType::F16 | DType::Bf16)) => Ok(dtype),
            _ => {
                let problem = format!("is stored as {}: weights are f32, f16 or bf16", self.dtype);
                Err(Error::tensor(&self.source, &self.file, problem))
            }
        }
    }
}

/// Where a model's tensors come from.
pub trait Source {
    /// The tensor of this canonical name, which must have just this shape: a view into its file, or a copy where the file holds it
    /// misaligned, in another order, or packed.
    ///
    /// # Errors
    /// [`Error::Tensor`] if it is missing (then the error names every spelling that was looked for), of another shape, or not of
    /// floating-point numbers that weights can have.
    fn tensor(&self, canonical: &str, shape: &[usize]) -> Result<Tensor>;

    /// The matrix `[n, k]` of the module of this canonical name (`llama.lm_head`), if it is stored packed: as the tensors `module.words`,
    /// `module.scales` and perhaps `module.offsets` in place of `module.weight`, or in another program's way that has an equal here
    /// (`src/weights/qweight.rs`, `src/weights/blocks.rs`).
    ///
    /// # Errors
    /// [`Error::Tensor`] if they are no such matrix.
    fn packed(&self, module: &str, n: usize, k: usize) -> Result<Option<Packed>>;

    /// What is added to the matrix `[n, k]` of the module of this canonical name, if anything is.
    ///
    /// # Errors
    /// [`Error::Tensor`] if its factors do not fit the matrix.
    fn low_rank(&self, _module: &str, _n: usize, _k: usize) -> Result<Option<LowRank>> {
        Ok(None)
    }

    /// Whether the tensor of this canonical name is going to be trained.
    fn learns(&self, _canonical: &str) -> bool {
        false
    }
}

/// A low-rank addition to a matrix `[n, k]`: scale·B·A.
#[derive(Debug)]
pub struct LowRank {
    /// A `[r, k]`.
    pub a: Tensor,
    /// B `[n, r]`.
    pub b: Tensor,
    /// α/r, or what else an adapter says.
    pub scale: f32,
    /// How it learns, if it does.
    pub learned: Option<Learned>,
}

/// What of the input of an addition is dropped while it learns.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Learned {
    /// Share of the elements.
    pub dropout: f32,
    /// Tells the bits of this addition from those of others.
    pub seed: u64,
}

impl LowRank {
    /// B·scale, in B's own dtype.
    pub fn scaled_b(&self) -> Tensor {
        let scaled: Vec<f32> = self.b.to_f32().iter().map(|b| b * self.scale).collect();
        Tensor::from_slice(self.b.shape(), &scaled).converted(self.b.dtype())
    }
}

/// The tensors of a checkpoint by canonical name, wherever they lie.
pub struct Store {
    /// What errors call the checkpoint.
    root: PathBuf,
    tensors: Vec<Stored>,
    by_canonical: HashMap<String, usize>,
    /// How GPTQ or AWQ packed its matrices.
    scheme: Option<Scheme>,
    /// Whether its files are GGUF files, whose names differ from all others'.
    is_gguf: bool,
    /// What other programs packed is packed anew by these.
    pool: OnceLock<Pool>,
    n_threads: usize,
    /// Matrices that were packed and are dense now, and their bytes.
    unpacked: Mutex<(usize, usize)>,
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
        Self {
            root: root.to_owned(),
            tensors: Vec::new(),
            by_canonical: HashMap::new(),
            scheme: None,
            is_gguf: false,
            pool: OnceLock::new(),
            n_threads: 0,
            unpacked: Mutex::default(),
        }
    }

    /// What has been unpacked so far because its packing has no equal here, and what that costs; none if nothing was.
    pub fn unpacked_note(&self) -> Option<String> {
        let (n, bytes) = *self.unpacked.lock().unwrap_or_else(PoisonError::into_inner);
        let matrices = if n == 1 { "matrix" } else { "matrices" };
        let why = "columns in another order (desc_act), groups that are no multiple of 32, or 8 bits with zeros";
        (n > 0).then(|| format!("{n} {matrices} had to be unpacked ({why}) and take {:.1} MB", bytes as f64 / 1e6))
    }

    /// Says how GPTQ or AWQ packed the matrices that come as `qweight`.
    pub fn set_scheme(&mut self, scheme: Scheme) {
        self.scheme = Some(scheme);
    }

    /// Threads that matrices are repacked by; 0, as at first, for as many as the machine has.
    pub fn set_threads(&mut self, n_threads: usize) {
        self.n_threads = n_threads;
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
            let canonical = names::canonical(&located.name);
            self.insert(&file, located, canonical, parts)?;
        }
        Ok(())
    }

    /// As [`Store::add`], of a file whose tensors have the names that `canonical` tells.
    ///
    /// # Errors
    /// As [`Store::add`]; [`Error::Tensor`] with what `canonical` says of a name.
    pub fn add_as(&mut self, file: &Path, canonical: impl Fn(&str) -> Result<Option<String>, String>) -> Result<()> {
        let map = map(file)?;
        let file: Arc<Path> = file.into();
        for located in read(&file, &map)? {
            let name = canonical(&located.name).map_err(|problem| Error::tensor(&located.name, &file, problem))?;
            self.insert(&file, located, name, &[Part::Clip, Part::Projector, Part::Llama])?;
        }
        Ok(())
    }

    /// As [`Store::add`], of a GGUF file that is open; the rows of the decoder's queries and keys are put in our order, for heads of `head_dim`.
    ///
    /// # Errors
    /// [`Error::Tensor`] if it holds a tensor that is there already.
    pub fn add_gguf(&mut self, file: &Path, gguf: &Gguf, parts: &[Part], head_dim: Option<usize>) -> Result<()> {
        let file: Arc<Path> = file.into();
        let mlp_is_swapped = gguf_names::mlp_is_swapped(&gguf.header.tensors);
        self.is_gguf = true;
        for mut located in gguf.located() {
            let canonical = gguf_names::canonical(&located.name, mlp_is_swapped);
            if let Some(head_dim) = head_dim.filter(|_| gguf_names::is_in_rotary_pairs(&located.name)) {
                located.order = Order::RotaryPairs { head_dim };
            }
            self.insert(&file, located, canonical, parts)?;
        }
        Ok(())
    }

    fn insert(&mut self, file: &Arc<Path>, located: Located, canonical: Option<String>, parts: &[Part]) -> Result<()> {
        let canonical = canonical.filter(|c| Part::of(c).is_none_or(|part| parts.contains(&part)));
        if let Some(canonical) = &canonical
            && let Some(twin) = self.by_canonical.insert(canonical.clone(), self.tensors.len())
        {
            let Stored { file: other, located: twin, .. } = &self.tensors[twin];
            let problem = format!("is {canonical}, and so is `{}` in {}: remove one of them", twin.name, other.display());
            return Err(Error::tensor(&located.name, file, problem));
        }
        self.tensors.push(Stored { canonical, file: file.clone(), located });
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

    /// What its file calls the tensor of this canonical name, if there is one.
    pub fn source(&self, canonical: &str) -> Option<&str> {
        self.find(canonical).map(|stored| stored.located.name.as_str())
    }

    /// Number format of the tensor of this canonical name, if there is one.
    pub fn dtype(&self, canonical: &str) -> Option<&StoredDType> {
        self.find(canonical).map(|stored| &stored.located.dtype)
    }

    /// How the matrix of this module is packed, if it is in our way: what the shapes of its tensors say.
    pub fn format(&self, module: &str) -> Option<Format> {
        let shape = |kind: &str| self.shape(&format!("{module}.{kind}"));
        let (&[_, n_slabs, _, bits], &[_, n_groups, _]) = (shape("words")?, shape("scales")?) else { return None };
        let group = n_slabs.checked_mul(SLAB)?.checked_div(n_groups)?;
        Format::new(bits, group, shape("offsets").is_some()).ok()
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
            parameters: self.parameters(canonical.as_deref().unwrap_or_default(), &located.shape),
        })
    }

    /// How many weights a tensor of this canonical name and shape holds.
    fn parameters(&self, canonical: &str, shape: &[usize]) -> usize {
        let n: usize = shape.iter().product();
        match (canonical.rsplit('.').next(), shape) {
            // Up to whole blocks of rows.
            (Some("words"), &[blocks, slabs, ..]) => blocks * BLOCK_ROWS * slabs * SLAB,
            (Some("qweight"), _) => n * self.scheme.map_or(0, |scheme| 32 / scheme.bits),
            (Some("scales" | "offsets" | "qzeros" | "g_idx"), _) => 0,
            _ => n,
        }
    }

    /// The tensor that a file calls `source` and LLaVA has no use for, as it is stored.
    ///
    /// # Errors
    /// [`Error::Tensor`] if it is of no dtype that is known here.
    ///
    /// # Panics
    /// If there is none.
    pub fn unused(&self, source: &str) -> Result<Tensor> {
        let found = self.tensors.iter().find(|stored| stored.canonical.is_none() && stored.located.name == source);
        let Stored { file, located, .. } = found.unwrap_or_else(|| panic!("there is no unused tensor {source}"));
        let StoredDType::Known(dtype) = located.dtype else {
            return Err(Error::tensor(source, &**file, format!("is stored as {}", located.dtype)));
        };
        located.load(dtype).map_err(|problem| Error::tensor(source, &**file, problem))
    }

    fn find(&self, canonical: &str) -> Option<&Stored> {
        self.by_canonical.get(canonical).map(|&i| &self.tensors[i])
    }
}

impl Source for Store {
    fn tensor(&self, canonical: &str, shape: &[usize]) -> Result<Tensor> {
        let Some(Stored { file, located, .. }) = self.find(canonical) else {
            return match (canonical.strip_suffix(".weight"), shape) {
                (Some(module), &[n, k]) if self.contains(&format!("{module}.qweight")) => {
                    let dense = self.with_qweight(module, [n, k], |matrix| matrix.dense(self.pool()))?;
                    let mut unpacked = self.unpacked.lock().unwrap_or_else(PoisonError::into_inner);
                    *unpacked = (unpacked.0 + 1, unpacked.1 + dense.bytes());
                    Ok(dense)
                }
                _ => Err(self.missing(canonical)),
            };
        };
        let error = |problem: String| Error::tensor(&located.name, file, problem);
        located.expect(shape).map_err(error)?;
        match located.dtype {
            StoredDType::Known(dtype @ (DType::F32 | DType::F16 | DType::Bf16)) => located.load(dtype),
            StoredDType::Blocks(block) => located.dense(block, self.pool()),
            _ => Err(format!("is stored as {}: weights are f32, f16 or bf16", located.dtype)),
        }
        .map_err(error)
    }

    fn packed(&self, module: &str, n: usize, k: usize) -> Result<Option<Packed>> {
        let of = |kind: &str| self.find(&format!("{module}.{kind}"));
        let weight = of("weight");
        if let Some(Stored { file, located, .. }) = weight
            && let StoredDType::Blocks(block) = located.dtype
        {
            let packed = located.expect(&[n, k]).and_then(|()| located.pack(block, self.pool()));
            return packed.map(Some).map_err(|problem| Error::tensor(&located.name, file, problem));
        }
        let Some(packed) = of("words").or_else(|| of("qweight")) else { return Ok(None) };
        let error = |problem: String| Error::tensor(&packed.located.name, &packed.file, problem);
        if let Some(twin) = weight {
            return Err(error(format!("is packed, but there is `{}` too: remove one of them", twin.located.name)));
        }
        if packed.located.name.ends_with("qweight") {
            return self.with_qweight(module, [n, k], |matrix| matrix.pack(self.pool()));
        }
        let (Some(words), Some(scales)) = (self.integers(module, "words")?, self.integers(module, "scales")?) else {
            return Err(error("is packed, but its scales are missing".to_owned()));
        };
        Packed::new(n, k, words, scales, self.integers(module, "offsets")?).map(Some).map_err(|e| error(e.to_string()))
    }
}

impl Store {
    /// The tensor `module.kind` of a packed matrix, if it is there, in whichever format it is.
    fn integers(&self, module: &str, kind: &str) -> Result<Option<Tensor>> {
        let Some(Stored { file, located, .. }) = self.find(&format!("{module}.{kind}")) else { return Ok(None) };
        let StoredDType::Known(dtype) = located.dtype else {
            let problem = format!("is stored as {}, not as a packed matrix is", located.dtype);
            return Err(Error::tensor(&located.name, file, problem));
        };
        located.load(dtype).map(Some).map_err(|problem| Error::tensor(&located.name, file, problem))
    }

    /// What `make` makes of the matrix that GPTQ or AWQ packed as `module`.
    fn with_qweight<T>(&self, module: &str, [n, k]: [usize; 2], make: impl Fn(&qweight::Matrix) -> Result<T, String>) -> Result<T> {
        let name = format!("{module}.qweight");
        let Stored { file, located, .. } = self.find(&name).expect("asked for where it is");
        let error = |problem: String| Error::tensor(&located.name, file, problem);
        let scheme = self.scheme.ok_or_else(|| {
            error("is packed as by GPTQ or AWQ, but config.json has no `quantization_config` that says how".to_owned())
        })?;
        let required =
            |kind: &str| self.integers(module, kind)?.ok_or_else(|| error(format!("is packed, but its {kind} are missing")));
        let stored = qweight::Stored {
            qweight: required("qweight")?,
            qzeros: required("qzeros")?,
            scales: required("scales")?,
            g_idx: self.integers(module, "g_idx")?,
        };
        qweight::Matrix::new(scheme, n, k, stored).and_then(|matrix| make(&matrix)).map_err(error)
    }

    fn pool(&self) -> &Pool {
        self.pool.get_or_init(|| match self.n_threads {
            0 => Pool::new(std::thread::available_parallelism().map_or(1, |n| n.get())),
            n => Pool::new(n),
        })
    }

    fn missing(&self, canonical: &str) -> Error {
        let spellings = match self.is_gguf {
            true => gguf_names::spelling(canonical).into_iter().collect(),
            false => names::spellings(canonical),
        };
        let spellings = spellings.into_iter().map(|s| format!("`{s}`")).collect::<Vec<_>>().join(", ");
        Error::tensor(canonical, &self.root, format!("missing: no file has any of {spellings}"))
    }
}

/// The tensors of a mapped file, whichever of the known formats it has: its first bytes tell, not its name.
fn read(path: &Path, map: &Arc<Mmap>) -> Result<Vec<Located>> {
    let starts_with = |magic: &[u8]| map.starts_with(magic);
    if starts_with(gguf::MAGIC) {
        return Err(Error::file(path, "a GGUF file among other weights: name it with --model"));
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
