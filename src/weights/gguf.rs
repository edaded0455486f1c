//! Reader of GGUF files, versions 2 and 3: llama.cpp's metadata and tensors in one file.
//!
//! ```text
//! "GGUF"  version u32  n_tensors u64  n_keys u64
//! n_keys × (key string, type u32, value)            string: length u64, bytes; array: type u32, length u64, elements
//! n_tensors × (name string, n_dims u32, dims u64…, type u32, offset u64)       dims: innermost first
//! filling up to `general.alignment` (32), then the data; offsets count from here
//! ```
//!
//! All of it comes from outside: every length is compared with what is left of the file before anything is made of it, sizes are
//! multiplied with overflow checked, and a tensor that does not lie inside the file is an error. Numbers become those of JSON, so that
//! they are read as the configurations of other layouts are.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;
use serde_json::{Map, Number, Value};

use super::blocks::{BlockType, SUPPORTED};
use super::{Located, Order, StoredDType};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::checked_len;

/// First bytes of such a file.
pub const MAGIC: &[u8] = b"GGUF";
/// Most elements that the arrays of a file may have together: a vocabulary of 256 k has 1.3 M with its merges.
const MAX_ELEMENTS: usize = 1 << 22;
/// Longest name of a key or a tensor, in bytes.
const MAX_NAME: usize = 1 << 10;
/// ggml has no tensors of more dimensions.
const MAX_DIMS: u32 = 4;
/// Arrays of arrays of arrays are taken seriously no more.
const MAX_NESTING: usize = 3;
/// Largest alignment that is taken seriously: a large page.
const MAX_ALIGNMENT: usize = 1 << 21;

/// What a file says before its data.
#[derive(Clone, Debug)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Its keys.
    pub metadata: Map<String, Value>,
    /// Its tensors, in their order in the file.
    pub tensors: Vec<TensorInfo>,
}

/// A tensor of a file.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Its number format.
    pub dtype: StoredDType,
    /// First byte in the file.
    pub offset: usize,
}

/// An opened file: its metadata, and its tensors in its mapping.
pub struct Gguf {
    /// What it says before its data.
    pub header: Header,
    map: Arc<Mmap>,
}

impl Gguf {
    /// Maps a file and reads its header.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be mapped, [`Error::File`] if it is no GGUF file, or one that contradicts itself or its size.
    pub fn open(path: &Path) -> Result<Self> {
        let map = super::map(path)?;
        let header = Header::parse(&map).map_err(|problem| Error::file(path, problem))?;
        Ok(Self { header, map })
    }

    /// Its tensors.
    pub(super) fn located(&self) -> impl Iterator<Item = Located> + '_ {
        self.header.tensors.iter().cloned().map(|TensorInfo { name, shape, dtype, offset }| Located {
            name,
            shape,
            dtype,
            map: self.map.clone(),
            offset,
            order: Order::RowMajor,
        })
    }
}

impl Header {
    /// Reads the header of a file that has these bytes.
    ///
    /// # Errors
    /// In words, without the name of the file.
    pub fn parse(file: &[u8]) -> Result<Self, String> {
        let mut cursor = Cursor { file, at: 0, n_elements: 0 };
        if cursor.take(MAGIC.len()).map_err(|_| "not a GGUF file")? != MAGIC {
            return Err("not a GGUF file".to_owned());
        }
        let version = cursor.u32()?;
        match version {
            2 | 3 => {}
            1 => return Err("a GGUF file of version 1, of August 2023: convert it anew".to_owned()),
            _ if matches!(version.swap_bytes(), 2 | 3) => {
                return Err("a big-endian GGUF file: convert it for little-endian".to_owned());
            }
            _ => return Err(format!("a GGUF file of version {version}: 2 and 3 are known")),
        }
        let (n_tensors, n_keys) = (cursor.u64()?, cursor.u64()?);
        let mut metadata = Map::new();
        for _ in 0..n_keys {
            let key = cursor.name("key")?;
            let kind = cursor.u32()?;
            let value = cursor.value(kind, 0).map_err(|problem| format!("key `{}`: {problem}", key.escape_debug()))?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(format!("has the key `{}` twice", key.escape_debug()));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(value) => value
                .as_u64()
                .and_then(|n| usize::try_from(n).ok())
                .filter(|n| n.is_power_of_two() && *n <= MAX_ALIGNMENT)
                .ok_or_else(|| format!("`general.alignment` is {value}: expected a power of two up to {MAX_ALIGNMENT}"))?,
        };
        let mut tensors: Vec<TensorInfo> = Vec::new();
        let mut names = HashSet::new();
        for _ in 0..n_tensors {
            let name = cursor.name("tensor")?;
            if !names.insert(name.clone()) {
                return Err(format!("has the tensor `{}` twice", name.escape_debug()));
            }
            let tensor = cursor.tensor(&name).map_err(|problem| format!("tensor `{}` {problem}", name.escape_debug()))?;
            tensors.push(tensor);
        }
        let data = cursor.at.next_multiple_of(alignment);
        for tensor in &mut tensors {
            let bytes = checked_len(&tensor.shape).and_then(|n| tensor.dtype.bytes(n));
            let start = data.checked_add(tensor.offset).filter(|_| tensor.offset.is_multiple_of(alignment));
            let inside = |start: &usize| bytes.and_then(|b| b.checked_add(*start)).is_some_and(|end| end <= file.len());
            tensor.offset = start.filter(inside).ok_or_else(|| {
                format!(
                    "tensor `{}` ({}{:?} at {} of the data) is misaligned or not inside the file of {} bytes: is its download complete?",
                    tensor.name.escape_debug(),
                    tensor.dtype,
                    tensor.shape,
                    tensor.offset,
                    file.len()
                )
            })?;
        }
        Ok(Self { version, metadata, tensors })
    }
}

/// A place in the header.
struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
    /// Elements of all arrays so far.
    n_elements: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(n).filter(|end| *end <= self.file.len());
        let end = end.ok_or_else(|| format!("ends inside its header (at byte {}): is its download complete?", self.at))?;
        let bytes = &self.file[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        Ok(self.take(N)?.try_into().expect("as long as it was asked for"))
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    fn usize(&mut self) -> Result<usize, String> {
        let n = self.u64()?;
        usize::try_from(n).map_err(|_| format!("{n} is too large a number"))
    }

    fn string(&mut self) -> Result<&'a str, String> {
        let n = self.usize()?;
        std::str::from_utf8(self.take(n)?).map_err(|_| "a string that is not UTF-8".to_owned())
    }

    fn name(&mut self, what: &str) -> Result<String, String> {
        let name = self.string()?;
        match name.len() {
            0 => Err(format!("has a {what} without a name")),
            1..=MAX_NAME => Ok(name.to_owned()),
            n => Err(format!("has a {what} with a name of {n} bytes")),
        }
    }

    /// A value of the type that GGUF numbers `kind`. Floating-point numbers that JSON has no word for become null.
    fn value(&mut self, kind: u32, nesting: usize) -> Result<Value, String> {
        let float = |x: f64| Number::from_f64(x).map_or(Value::Null, Value::Number);
        Ok(match kind {
            0 => u8::from_le_bytes(self.array()?).into(),
            1 => i8::from_le_bytes(self.array()?).into(),
            2 => u16::from_le_bytes(self.array()?).into(),
            3 => i16::from_le_bytes(self.array()?).into(),
            4 => self.u32()?.into(),
            5 => i32::from_le_bytes(self.array()?).into(),
            6 => float(f32::from_le_bytes(self.array()?).into()),
            7 => match self.array::<1>()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [n] => return Err(format!("{n} is no truth value")),
            },
            8 => Value::String(self.string()?.to_owned()),
            9 => {
                let (kind, n) = (self.u32()?, self.usize()?);
                if nesting == MAX_NESTING {
                    return Err(format!("arrays in arrays, more than {MAX_NESTING} deep"));
                }
                self.n_elements = self.n_elements.saturating_add(n);
                // The least that an element takes is a byte.
                if n > self.file.len() - self.at || self.n_elements > MAX_ELEMENTS {
                    return Err(format!("an array of {n} elements, more than the file or this program has room for"));
                }
                Value::Array((0..n).map(|_| self.value(kind, nesting + 1)).collect::<Result<_, _>>()?)
            }
            10 => self.u64()?.into(),
            11 => i64::from_le_bytes(self.array()?).into(),
            12 => float(f64::from_le_bytes(self.array()?)),
            _ => return Err(format!("is of the type {kind}, which is unknown")),
        })
    }

    /// What stands behind the name of a tensor; its offset counts from where the data begins.
    fn tensor(&mut self, name: &str) -> Result<TensorInfo, String> {
        let n_dims = self.u32()?;
        if n_dims > MAX_DIMS {
            return Err(format!("has {n_dims} dimensions: at most {MAX_DIMS} are known"));
        }
        let mut shape = (0..n_dims).map(|_| self.usize()).collect::<Result<Vec<_>, _>>()?;
        shape.reverse();
        let number = self.u32()?;
        let known = |dtype| Some(StoredDType::Known(dtype));
        let integers = |name: &str, bits| Some(StoredDType::Other { name: name.to_owned(), bits });
        let dtype = match number {
            0 => known(DType::F32),
            1 => known(DType::F16),
            30 => known(DType::Bf16),
            26 => known(DType::I32),
            24 => integers("i8", 8),
            25 => integers("i16", 16),
            27 => integers("i64", 64),
            28 => integers("f64", 64),
            _ => BlockType::of_ggml(number).map(StoredDType::Blocks),
        };
        let dtype =
            dtype.ok_or_else(|| format!("is of the ggml type {number}, which is unknown: f32, f16, bf16, {SUPPORTED} are read"))?;
        if let StoredDType::Blocks(block) = &dtype
            && !shape.last().is_some_and(|k| k.is_multiple_of(block.weights))
        {
            return Err(format!(
                "has rows of {:?} weights, which are no whole blocks of {block} ({})",
                shape.last(),
                block.weights
            ));
        }
        Ok(TensorInfo { name: name.to_owned(), shape, dtype, offset: self.usize()? })
    }
}
