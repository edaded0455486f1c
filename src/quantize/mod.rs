//! Makes a checkpoint smaller: reads one in any layout, packs its matrices (`src/ops/packed.rs`), and writes one in the same layout.
//!
//! Tensors are read, packed and written one after the other, so that the model is never in memory. What a layout keeps elsewhere (a vision
//! tower, a base model) comes into the new folder, which stands alone.

pub mod round;

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::cpu::pool::Pool;
use crate::cpu::simd::Isa;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::checkpoint::{Checkpoint, QUANT_METHOD, QUANT_VERSION};
use crate::ops::packed::Format;
use crate::weights::recipe::Recipe;
use crate::weights::write::{Planned, Writer};
use crate::weights::{Source, files};
use round::Loss;

/// The only weight file of a folder that this module writes.
const WEIGHTS: &str = "model.safetensors";
/// Where the configuration of an original checkpoint's vision tower goes.
const TOWER: &str = "vision_tower";
/// Files beside the weights that are taken along if they are there.
const COMPANIONS: [&str; 12] = [
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "vocab.json",
    "LICENSE",
];

/// One tensor that has been written.
#[derive(Clone, Debug)]
pub struct Written {
    /// Its canonical name, without `.weight` if it is packed.
    pub name: String,
    /// How it is packed; none if it was copied.
    pub format: Option<Format>,
    /// What packing changed.
    pub loss: Loss,
    /// Bytes of it that were read.
    pub bytes_read: usize,
    /// Bytes that it takes now.
    pub bytes_written: usize,
}

/// A tensor of the new file and what it is made from.
struct Item {
    /// Canonical name in the checkpoint that is read.
    canonical: String,
    shape: Vec<usize>,
    dtype: DType,
    /// Its name in the new file; if it is packed, without its last part.
    name: String,
    format: Option<Format>,
}

impl Item {
    /// The canonical name without `.weight`.
    fn module(&self) -> &str {
        self.canonical.strip_suffix(".weight").unwrap_or(&self.canonical)
    }

    /// What it is in the new file.
    fn planned(&self) -> Vec<Planned> {
        let planned = |name: String, shape: &[usize], dtype| Planned { name, shape: shape.to_vec(), dtype };
        let Some(format) = self.format else { return vec![planned(self.name.clone(), &self.shape, self.dtype)] };
        let (n, k) = (self.shape[0], self.shape[1]);
        let of = |kind: &str| format!("{}.{kind}", self.name);
        vec![
            planned(of("words"), &format.words_shape(n, k), DType::I32),
            planned(of("scales"), &format.scales_shape(n, k), DType::F16),
        ]
    }
}

/// Writes the checkpoint `model` into the folder `output` with its matrices packed as `recipe` says; `watch` sees each tensor, of
/// how many bytes in all.
///
/// # Errors
/// As [`Checkpoint::open`]; if it is packed already; if `output` is there and not an empty folder, or cannot be written; if a weight is
/// not a finite number.
pub fn quantize(
    model: &Path,
    base: Option<&Path>,
    output: &Path,
    recipe: Recipe,
    n_threads: usize,
    mut watch: impl FnMut(&Written, usize),
) -> Result<()> {
    let checkpoint = Checkpoint::open(model, base)?;
    checkpoint.expect_unpacked()?;
    let items = plan(&checkpoint, recipe)?;
    prepare(output)?;
    let mut planned: Vec<Planned> = items.iter().flat_map(Item::planned).collect();
    // Words first, scales next: their sizes keep all that follows aligned to cache lines.
    planned.sort_by_key(|p| match (p.dtype, p.name.rsplit('.').next()) {
        (DType::I32, _) => 0,
        (_, Some("scales")) => 1,
        (dtype, _) => 6 - dtype.size(),
    });
    let total = items.iter().map(|item| item.shape.iter().product::<usize>() * item.dtype.size()).sum();
    let mut writer = Writer::create(&output.join(WEIGHTS), &planned)?;
    let n_threads = if n_threads == 0 { std::thread::available_parallelism().map_or(1, |n| n.get()) } else { n_threads };
    let (pool, isa) = (Pool::new(n_threads), Isa::from_env()?);
    for item in &items {
        watch(&write(&checkpoint, item, &mut writer, &pool, isa)?, total);
    }
    writer.finish()?;
    companions(model, &checkpoint, output)?;
    // Last, since a folder without it is no checkpoint.
    configuration(model, &checkpoint, recipe, output)
}

/// What goes into the new file, in the order of the old ones, so that each is read from end to end.
fn plan(checkpoint: &Checkpoint, recipe: Recipe) -> Result<Vec<Item>> {
    let mut items = Vec::new();
    for entry in checkpoint.weights.entries() {
        // What LLaVA has no use for is left behind.
        let Some(canonical) = entry.canonical else { continue };
        if canonical.ends_with(".words") {
            return Err(Error::tensor(
                entry.source,
                entry.file,
                "is packed already: quantize the checkpoint that it was made from",
            ));
        }
        let crate::weights::StoredDType::Known(dtype @ (DType::F32 | DType::F16 | DType::Bf16)) = entry.dtype else {
            return Err(Error::tensor(
                entry.source,
                entry.file,
                format!("is stored as {}: weights are f32, f16 or bf16", entry.dtype),
            ));
        };
        let format = match (canonical.strip_suffix(".weight"), entry.shape.as_slice()) {
            (Some(module), &[_, k]) => recipe.format(module, k),
            _ => None,
        };
        let name = match format {
            Some(_) => entry.source.strip_suffix(".weight").unwrap_or(&entry.source).to_owned(),
            None => entry.source,
        };
        items.push(Item { canonical, shape: entry.shape, dtype, name, format });
    }
    Ok(items)
}

/// Makes the folder, which must not hold anything that could be mistaken for what is about to be written.
fn prepare(output: &Path) -> Result<()> {
    fs::create_dir_all(output).map_err(|e| Error::io(output, e))?;
    match files::list(output)?.first() {
        Some(name) => Err(Error::file(output, format!("is not empty (it has {name}): name a new folder with --output"))),
        None => Ok(()),
    }
}

/// Packs or copies one tensor.
fn write(checkpoint: &Checkpoint, item: &Item, writer: &mut Writer, pool: &Pool, isa: Isa) -> Result<Written> {
    let tensor = checkpoint.weights.tensor(&item.canonical, &item.shape)?;
    let mut written = Written {
        name: item.module().to_owned(),
        format: item.format,
        loss: Loss::default(),
        bytes_read: tensor.bytes(),
        bytes_written: tensor.bytes(),
    };
    if let Some(format) = item.format {
        let error = |problem| Error::tensor(&item.name, checkpoint.weights.root(), problem);
        let (packed, loss) = round::pack(pool, isa, &tensor, format).map_err(error)?;
        (written.loss, written.bytes_written) = (loss, packed.bytes());
        writer.write(&format!("{}.words", item.name), packed.words.as_bytes())?;
        writer.write(&format!("{}.scales", item.name), packed.scales.as_bytes())?;
    } else {
        writer.write(&item.name, tensor.as_bytes())?;
    }
    tensor.release();
    Ok(written)
}

/// Copies tokenizer and preprocessing.
fn companions(model: &Path, checkpoint: &Checkpoint, output: &Path) -> Result<()> {
    let copy = |from: &Path, to: &Path| -> Result<()> {
        for name in COMPANIONS {
            let (from, to) = (from.join(name), to.join(name));
            if from.is_file() && !to.exists() {
                fs::copy(&from, &to).map_err(|e| Error::io(&to, e))?;
            }
        }
        Ok(())
    };
    copy(model, output)?;
    copy(&checkpoint.tokenizer_dir, output)?;
    let Some(tower) = &checkpoint.tower_dir else { return Ok(()) };
    let to = output.join(TOWER);
    fs::create_dir(&to).map_err(|e| Error::io(&to, e))?;
    copy(tower, &to)?;
    let config = to.join("config.json");
    fs::copy(tower.join("config.json"), &config).map(|_| ()).map_err(|e| Error::io(&config, e))
}

/// Writes `config.json`: the old one, with a note of what was done.
fn configuration(model: &Path, checkpoint: &Checkpoint, recipe: Recipe, output: &Path) -> Result<()> {
    let path = model.join("config.json");
    let mut config: Map<String, Value> = files::json(&path)?.ok_or_else(|| Error::file(model, "no config.json"))?;
    let format = |format: Option<Format>| format.map(|f| json!({"bits": f.bits, "group_size": f.group}));
    config.insert(
        "quantization_config".to_owned(),
        json!({
            "quant_method": QUANT_METHOD,
            "version": QUANT_VERSION,
            "rounding": "rtn",
            "source": model.file_name().map(|name| name.to_string_lossy()),
            "decoder": format(recipe.decoder),
            "head": format(recipe.head),
            "projector": format(recipe.projector),
            "vision": format(recipe.vision),
        }),
    );
    if checkpoint.tower_dir.is_some() {
        config.insert("mm_vision_tower".to_owned(), json!(TOWER));
    }
    let to = output.join("config.json");
    let text = serde_json::to_string_pretty(&config).map_err(|e| Error::file(&to, e))?;
    fs::write(&to, text + "\n").map_err(|e| Error::io(&to, e))
}
