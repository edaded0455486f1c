//! Finds the tensors of a file that `torch.save` wrote: a zip archive of one pickle and one entry per storage.
//!
//! The entries are stored, not compressed, so a tensor can be a view into the mapped archive. All that is read is the archive's
//! directory and the pickle; offsets and sizes of both are checked against each other and against the file.

use std::collections::{HashMap, HashSet};
use std::io::Cursor;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;
use zip::{CompressionMethod, ZipArchive};

use super::pickle::{self, PickledTensor, StorageType};
use super::{Located, Order, StoredDType};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// First bytes of a zip archive: the header of an entry.
pub const ZIP_MAGIC: &[u8] = b"PK\x03\x04";
/// First bytes of what `torch.save` wrote before version 1.6: a pickle of the number 0x1950a86a20f9469cfc6c.
pub const LEGACY_MAGIC: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";

/// Most entries: one per storage, and a model has a few hundred.
const MAX_ENTRIES: usize = 1 << 20;

/// The tensors of a mapped archive.
///
/// # Errors
/// [`Error::File`] if it is not such an archive, if it contradicts itself, or if its pickle is refused.
pub fn read(path: &Path, map: &Arc<Mmap>) -> Result<Vec<Located>> {
    let located = |(name, offset, tensor): Placed| Located {
        name,
        order: if tensor.is_contiguous() { Order::RowMajor } else { Order::Strided(tensor.strides) },
        shape: tensor.shape,
        dtype: stored_dtype(tensor.dtype),
        map: map.clone(),
        offset,
    };
    let tensors = tensors(map).map_err(|problem| Error::file(path, problem))?;
    Ok(tensors.into_iter().map(located).collect())
}

/// Name of a tensor, where its first element is in the file, and its description.
pub type Placed = (String, usize, PickledTensor);

/// The tensors in the bytes of an archive.
///
/// # Errors
/// What is wrong with it.
pub fn tensors(file: &[u8]) -> Result<Vec<Placed>, String> {
    let entries = entries(file)?;
    let mut pickles = entries.iter().filter_map(|(name, range)| Some((name.strip_suffix("data.pkl")?, range)));
    let (Some((root, pickle)), None) = (pickles.next(), pickles.next()) else {
        return Err("a zip archive, but not one of torch.save: it needs one data.pkl".to_owned());
    };
    // Newer versions of torch say so; older ones ran on little-endian machines only, as we do.
    if let Some(order) = entries.get(&format!("{root}byteorder"))
        && &file[order.clone()] != b"little"
    {
        return Err("it was written on a big-endian machine: convert it to safetensors".to_owned());
    }
    let mut names = HashSet::new();
    let mut placed = Vec::new();
    for (name, tensor) in pickle::state_dict(&file[pickle.clone()]).map_err(|e| e.to_string())? {
        let problem = |problem: &str| format!("tensor `{}`: {problem}", name.escape_debug());
        if !names.insert(name.clone()) {
            return Err(problem("is there twice"));
        }
        let storage =
            entries.get(&format!("{root}data/{}", tensor.storage)).ok_or_else(|| problem("its storage is not in the archive"))?;
        if tensor.storage_len.checked_mul(tensor.dtype.size()) != Some(storage.len()) {
            return Err(problem("its storage has another size than the pickle says"));
        }
        // The pickle has proved that the tensor lies inside its storage, so none of this can overflow.
        placed.push((name, storage.start + tensor.offset * tensor.dtype.size(), tensor));
    }
    if placed.is_empty() {
        return Err("a file of torch.save without tensors".to_owned());
    }
    Ok(placed)
}

/// Where the data of each entry lies.
fn entries(file: &[u8]) -> Result<HashMap<String, Range<usize>>, String> {
    let broken = |e: zip::result::ZipError| format!("not a valid zip archive, or cut short: {e}");
    let mut archive = ZipArchive::new(Cursor::new(file)).map_err(broken)?;
    if archive.len() > MAX_ENTRIES {
        return Err(format!("a zip archive of {} entries: refused", archive.len()));
    }
    // Two entries in the same place would be two tensors that are one, and a directory may name one entry twice.
    if archive.has_duplicate_names() || archive.has_overlapping_entries().map_err(broken)? {
        return Err("a zip archive with overlapping entries: refused".to_owned());
    }
    let mut entries = HashMap::new();
    for i in 0..archive.len() {
        let entry = archive.by_index_raw(i).map_err(broken)?;
        let name = entry.name().map_err(broken)?.into_owned();
        let problem = |problem: &str| format!("entry `{}` of the archive {problem}", name.escape_debug());
        if name.split(['/', '\\']).any(|part| part == "..") || name.starts_with('/') {
            return Err(problem("is named like a path out of it: refused"));
        }
        if entry.compression() != CompressionMethod::Stored || entry.encrypted() || entry.compressed_size() != entry.size() {
            return Err(problem("is compressed or encrypted, which torch.save never does: refused"));
        }
        let start = entry.data_start().and_then(|start| usize::try_from(start).ok());
        let range = start.and_then(|start| Some(start..start.checked_add(usize::try_from(entry.size()).ok()?)?));
        let range = range.filter(|range| range.end <= file.len()).ok_or_else(|| problem("lies outside the file"))?;
        entries.insert(name, range);
    }
    Ok(entries)
}

/// By the names that safetensors has for them.
fn stored_dtype(storage: StorageType) -> StoredDType {
    let name = match storage {
        StorageType::Float => return StoredDType::Known(DType::F32),
        StorageType::Half => return StoredDType::Known(DType::F16),
        StorageType::BFloat16 => return StoredDType::Known(DType::Bf16),
        StorageType::Int => return StoredDType::Known(DType::I32),
        StorageType::Double => "f64",
        StorageType::Long => "i64",
        StorageType::Short => "i16",
        StorageType::Char => "i8",
        StorageType::Byte => "u8",
        StorageType::Bool => "bool",
    };
    StoredDType::Other { name: name.to_owned(), bits: 8 * storage.size() }
}
