//! `quantization_config` of `config.json`: what a checkpoint was quantized by, and whether there are kernels for it.

use std::path::Path;

use crate::error::{Error, Result};
use crate::weights::files;
use crate::weights::qweight::{Layout, Scheme};

use super::keys::Keys;

/// How `quantization_config` in `config.json` names the packing of this project, and its newest version.
pub const QUANT_METHOD: &str = "llava-engine";
/// See [`QUANT_METHOD`].
pub const QUANT_VERSION: i64 = 1;

/// What a checkpoint was quantized by.
#[derive(Debug, Default)]
pub(super) struct Quantization {
    /// The name of the checkpoint that it was made from, if this program made it.
    pub source: Option<String>,
    /// How the decoder's matrices were rounded, if this program did it.
    pub rounding: Option<String>,
    /// How AutoGPTQ or AutoAWQ packed it.
    pub scheme: Option<Scheme>,
}

/// Reads the key `quantization_config`, or `quantize_config.json` beside, where AutoGPTQ wrote the same before transformers knew of it.
///
/// # Errors
/// [`crate::error::Error::Unsupported`] if there are no kernels for it, [`crate::error::Error::File`] if it is malformed.
pub(super) fn read(folder: &Path, keys: &Keys) -> Result<Quantization> {
    let key = "quantization_config";
    if keys.has(key) {
        return quantization(&keys.object(key)?, None);
    }
    let path = folder.join("quantize_config.json");
    match files::json(&path)? {
        Some(map) => quantization(&Keys::new(&path, &map), Some("gptq")),
        None => Ok(Quantization::default()),
    }
}

fn quantization(keys: &Keys, default: Option<&str>) -> Result<Quantization> {
    let none = Quantization::default();
    match keys.str("quant_method")?.or(default) {
        Some(QUANT_METHOD) => match keys.int("version", 0..=i64::MAX)? {
            Some(1..=QUANT_VERSION) => {
                let text = |key| Ok::<_, Error>(keys.str(key)?.map(str::to_owned));
                Ok(Quantization { source: text("source")?, rounding: text("rounding")?, ..none })
            }
            _ => Err(keys.unsupported("version", "written by a newer version of this program: update it")),
        },
        Some("gptq") => Ok(Quantization { scheme: Some(gptq(keys)?), ..none }),
        Some("awq") => Ok(Quantization { scheme: Some(awq(keys)?), ..none }),
        _ => {
            let why = "gptq and awq are read; otherwise use the checkpoint that it was made from, and `llava-engine quantize`";
            Err(keys.unsupported("quant_method", why))
        }
    }
}

/// `desc_act` and `sym` are not asked: the tensors say it themselves.
fn gptq(keys: &Keys) -> Result<Scheme> {
    let zeros_less_one = match keys.str("checkpoint_format")? {
        None | Some("gptq") => true,
        Some("gptq_v2") => false,
        Some(_) => return Err(keys.unsupported("checkpoint_format", "of GPTQ's formats, gptq and gptq_v2 are read")),
    };
    let bits = keys.count("bits", 16)?.ok_or_else(|| keys.error("bits", "a whole number"))?;
    if bits != 4 && bits != 8 {
        return Err(keys.unsupported("bits", "of GPTQ, 4 and 8 bits are read"));
    }
    Ok(Scheme { layout: Layout::Gptq { zeros_less_one }, bits, group_size: group_size(keys, "group_size")? })
}

/// Keys have the names of transformers, or those that AutoAWQ gave them before.
fn awq(keys: &Keys) -> Result<Scheme> {
    if keys.str("version")?.is_some_and(|version| !version.eq_ignore_ascii_case("gemm")) {
        return Err(keys.unsupported("version", "of AWQ's versions, gemm is read"));
    }
    if keys.bool("zero_point")? == Some(false) {
        return Err(keys.unsupported("zero_point", "AWQ is read with zeros only"));
    }
    let named = |new, old| if keys.has(new) { new } else { old };
    let bits = named("bits", "w_bit");
    match keys.count(bits, 16)? {
        Some(4) => {}
        Some(_) => return Err(keys.unsupported(bits, "of AWQ, 4 bits are read")),
        None => return Err(keys.error("bits", "4")),
    }
    Ok(Scheme { layout: Layout::Awq, bits: 4, group_size: group_size(keys, named("group_size", "q_group_size"))? })
}

/// Columns that share a scale; -1 is all of a row.
fn group_size(keys: &Keys, key: &str) -> Result<Option<usize>> {
    match keys.int(key, -1..=1 << 20)? {
        Some(-1) => Ok(None),
        Some(n @ 1..) => Ok(Some(n as usize)),
        _ => Err(keys.error(key, "-1 or a number of columns")),
    }
}
