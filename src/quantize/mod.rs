//! Makes a checkpoint smaller: reads one in any layout, packs its matrices (`src/ops/packed.rs`), and writes one in the same layout.
//!
//! Tensors are read, packed and written one after the other, so that the model is never in memory. What a layout keeps elsewhere (a vision
//! tower, a base model) comes into the new folder, which stands alone.
//!
//! | file | holds |
//! |---|---|
//! | `round` | RTN: each weight to the nearest, with a search for the scale |
//! | `layers` | the decoder layer by layer, with calibration data running through it |
//! | `inputs`, `hessian` | what is remembered of a layer's inputs |
//! | `gptq`, `awq` | what is made of that |
//! | `evaluate` | what it has cost, on held-out answers |

mod awq;
pub mod evaluate;
mod gptq;
mod hessian;
mod inputs;
mod layers;
pub mod round;
#[cfg(test)]
mod test_support;

use std::fmt;
use std::path::Path;

use serde_json::{Value, json};

use crate::cpu::Cpu;
use crate::cpu::pool::Pool;
use crate::cpu::simd::Isa;
use crate::data::Row;
use crate::device::Device;
use crate::dtype::DType;
use crate::engine::{Engine, EngineOptions, Example};
use crate::error::{Error, Result};
use crate::model::checkpoint::{Checkpoint, QUANT_METHOD, QUANT_VERSION};
use crate::model::save;
use crate::ops::Packed;
use crate::ops::packed::Format;
use crate::tensor::Tensor;
use crate::weights::Source;
use crate::weights::recipe::Recipe;
use crate::weights::write::{Planned, Writer};
use evaluate::Evaluation;
use layers::{Layers, Rounded};
use round::Loss;

/// Every how many rows of calibration data one is held out, to be judged by.
const HOLD_OUT: usize = 4;

/// How the decoder's matrices are rounded; all others are rounded to the nearest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Each weight to the nearest.
    Rtn,
    /// So that later columns make good what rounding earlier ones has done to the output ([`gptq`]).
    Gptq,
    /// With weights scaled up that meet large inputs ([`awq`]).
    Awq,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rtn => "rtn",
            Self::Gptq => "gptq",
            Self::Awq => "awq",
        })
    }
}

/// Data that a model runs on while it is quantized.
#[derive(Clone, Debug)]
pub struct Calibration {
    /// Every fourth is held out, and what quantizing has cost is judged by those.
    pub rows: Vec<Row>,
    /// Conversation template; none for the checkpoint's own.
    pub template: Option<String>,
    /// Whether the result is compared with the model it was made from.
    pub evaluate: bool,
}

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Options {
    /// What is packed how.
    pub recipe: Recipe,
    /// How the decoder's matrices are rounded.
    pub method: Method,
    /// GPTQ and AWQ need it; RTN is judged by it.
    pub calibration: Option<Calibration>,
    /// CPU threads; 0 for as many as the machine has.
    pub n_threads: usize,
}

/// What was done, besides what was written.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Report {
    /// Rows of data that the model was calibrated by.
    pub n_calibration_rows: usize,
    /// Their tokens, image positions among them.
    pub n_calibration_tokens: usize,
    /// What it cost; none if there was no data to tell, or nobody asked.
    pub evaluation: Option<Evaluation>,
}

/// What the work is done with.
struct Machine {
    /// Products, and the model.
    ops: Cpu,
    /// All else.
    pool: Pool,
    isa: Isa,
}

impl Machine {
    fn new(n_threads: usize) -> Result<Self> {
        // Of f32: nothing is rounded that is not to be.
        let ops = Cpu::new(n_threads, DType::F32)?;
        Ok(Self { pool: Pool::new(ops.n_threads()), ops, isa: Isa::from_env()? })
    }
}

/// One tensor that has been written.
#[derive(Clone, Debug)]
pub struct Written {
    /// Its canonical name, without `.weight` if it is packed.
    pub name: String,
    /// How it is packed; none if it was copied.
    pub format: Option<Format>,
    /// What packing changed.
    pub loss: Loss,
    /// What it changed of the output for calibration data, where there is some: ‖X·(W − Ŵ)ᵀ‖² and ‖X·Wᵀ‖² over sampled inputs X.
    pub output_loss: Option<Loss>,
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

/// Writes the checkpoint `model` into the folder `output` with its matrices packed as `options` say; `watch` sees each tensor, of
/// how many bytes in all.
///
/// # Errors
/// As [`Checkpoint::open`]; if it is packed already; if `output` is there and not an empty folder, or cannot be written; if a weight is
/// not a finite number; if a row of the calibration data does not fit the model, by its number.
pub fn quantize(
    model: &Path,
    base: Option<&Path>,
    output: &Path,
    options: &Options,
    mut watch: impl FnMut(&Written, usize),
) -> Result<Report> {
    let Options { recipe, method, .. } = *options;
    let needs_data = method != Method::Rtn;
    if needs_data && (options.calibration.is_none() || recipe.decoder.is_none()) {
        return Err(Error::usage(format!("{method} rounds the decoder's matrices to calibration data: it needs both")));
    }
    let checkpoint = Checkpoint::open(model, base)?;
    checkpoint.expect_unpacked()?;
    let items = plan(&checkpoint, recipe)?;
    let mut data = options.calibration.as_ref().map(|calibration| Data::open(model, base, calibration, options)).transpose()?;
    save::new_folder(output)?;
    let mut planned: Vec<Planned> = items.iter().flat_map(Item::planned).collect();
    // Words first, scales next: their sizes keep all that follows aligned to cache lines.
    planned.sort_by_key(|p| match (p.dtype, p.name.rsplit('.').next()) {
        (DType::I32, _) => 0,
        (_, Some("scales")) => 1,
        (dtype, _) => 6 - dtype.size(),
    });
    let total = items.iter().map(|item| item.shape.iter().product::<usize>() * item.dtype.size()).sum();
    let mut writer = Writer::create(&output.join(save::WEIGHTS), &planned)?;
    let machine = Machine::new(options.n_threads)?;
    let mut report = Report::default();
    // With data, the decoder's layers come last, and in their order.
    let by_layer = data.is_some() && recipe.decoder.is_some();
    let in_layers = |item: &&Item| by_layer && item.canonical.starts_with("llama.layers.");
    for item in items.iter().filter(|item| !in_layers(item)) {
        watch(&write(&checkpoint, item, None, &mut writer, &machine)?, total);
    }
    if let Some(data) = data.as_mut().filter(|_| by_layer) {
        let hidden = data.hidden()?;
        (report.n_calibration_rows, report.n_calibration_tokens) = (hidden.len(), hidden.iter().map(Tensor::rows).sum());
        let mut layers = Layers::new(&machine, method, recipe, &checkpoint, hidden)?;
        for index in 0..checkpoint.config.text.n_layers {
            let prefix = format!("llama.layers.{index}.");
            layers.quantize(index, |layer| {
                for item in items.iter().filter(|item| item.canonical.starts_with(&prefix)) {
                    let done = match (layer.matrices.get(item.module()), layer.changed.get(&item.canonical)) {
                        (Some(rounded), _) => Some(Done::Packed(rounded)),
                        (_, Some(tensor)) => Some(Done::Changed(tensor)),
                        _ => None,
                    };
                    watch(&write(&checkpoint, item, done, &mut writer, &machine)?, total);
                }
                Ok(())
            })?;
        }
    }
    writer.finish()?;
    save::companions(model, &checkpoint, output)?;
    save::configuration(model, &checkpoint, output, |config| {
        config.insert("quantization_config".to_owned(), note(model, options));
    })?;
    if let Some(data) = &mut data {
        report.evaluation = data.evaluate(output)?;
    }
    Ok(report)
}

/// Calibration data, and the model as it was.
struct Data<'a> {
    engine: Engine,
    options: EngineOptions,
    calibration: &'a Calibration,
    /// Each row in the model's positions.
    examples: Vec<Example>,
}

impl<'a> Data<'a> {
    fn open(model: &Path, base: Option<&Path>, calibration: &'a Calibration, options: &Options) -> Result<Self> {
        let options = EngineOptions {
            device: Device::Cpu,
            threads: options.n_threads,
            model_base: base.map(Path::to_owned),
            template: calibration.template.clone(),
            ..EngineOptions::default()
        };
        let engine = Engine::open(model, &options)?;
        let examples = calibration.rows.iter().map(|row| evaluate::example_of(&engine, row)).collect::<Result<_>>()?;
        Ok(Self { engine, options, calibration, examples })
    }

    /// Whether the row at this place is held out.
    fn is_held_out(index: usize) -> bool {
        index % HOLD_OUT == HOLD_OUT - 1
    }

    /// The decoder's inputs for each row that is not held out, f32 `[tokens, hidden]`.
    fn hidden(&mut self) -> Result<Vec<Tensor>> {
        let used = self.calibration.rows.iter().zip(&self.examples).enumerate().filter(|(i, _)| !Self::is_held_out(*i));
        used.map(|(_, (row, example))| self.engine.input_embeds(example, &row.load_images()?)).collect()
    }

    /// The model as it was against the one in `output`.
    fn evaluate(&mut self, output: &Path) -> Result<Option<Evaluation>> {
        let rows = self.calibration.rows.iter().enumerate().filter(|(i, _)| Self::is_held_out(*i));
        let held_out: Vec<Row> = rows.map(|(_, row)| row.clone()).collect();
        if held_out.is_empty() || !self.calibration.evaluate {
            return Ok(None);
        }
        // The new folder stands alone.
        let mut quantized = Engine::open(output, &EngineOptions { model_base: None, ..self.options.clone() })?;
        evaluate::evaluate(&mut self.engine, &mut quantized, &held_out).map(Some)
    }
}

/// What goes into the new file, in the order of the old ones, so that each is read from end to end.
fn plan(checkpoint: &Checkpoint, recipe: Recipe) -> Result<Vec<Item>> {
    let mut items = Vec::new();
    for entry in checkpoint.weights.entries() {
        // What LLaVA has no use for is left behind.
        let Some(canonical) = entry.canonical.clone() else { continue };
        let dtype = entry.float_dtype()?;
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

/// What a tensor has become already.
enum Done<'a> {
    Packed(&'a Rounded),
    Changed(&'a Tensor),
}

/// Writes one tensor: what was made of it, or else rounded to the nearest, or as it is.
fn write(checkpoint: &Checkpoint, item: &Item, done: Option<Done<'_>>, writer: &mut Writer, machine: &Machine) -> Result<Written> {
    let tensor = checkpoint.weights.tensor(&item.canonical, &item.shape)?;
    let mut written = Written {
        name: item.module().to_owned(),
        format: item.format,
        loss: Loss::default(),
        output_loss: None,
        bytes_read: tensor.bytes(),
        bytes_written: tensor.bytes(),
    };
    let mut put = |packed: &Packed, written: &mut Written| {
        written.bytes_written = packed.bytes();
        writer.write(&format!("{}.words", item.name), packed.words.as_bytes())?;
        writer.write(&format!("{}.scales", item.name), packed.scales.as_bytes())
    };
    match (done, item.format) {
        (Some(Done::Packed(Rounded { packed, loss, output_loss })), _) => {
            (written.loss, written.output_loss) = (*loss, Some(*output_loss));
            put(packed, &mut written)?;
        }
        (None, Some(format)) => {
            let error = |problem| Error::tensor(&item.name, checkpoint.weights.root(), problem);
            let (packed, loss) = round::pack(&machine.pool, machine.isa, &tensor, format).map_err(error)?;
            written.loss = loss;
            put(&packed, &mut written)?;
        }
        (Some(Done::Changed(changed)), _) => writer.write(&item.name, changed.as_bytes())?,
        (None, None) => writer.write(&item.name, tensor.as_bytes())?,
    }
    tensor.release();
    Ok(written)
}

/// What `config.json` says of how the model was packed.
fn note(model: &Path, options: &Options) -> Value {
    let recipe = options.recipe;
    let format = |format: Option<Format>| format.map(|f| json!({"bits": f.bits, "group_size": f.group}));
    json!({
        "quant_method": QUANT_METHOD,
        "version": QUANT_VERSION,
        "rounding": options.method.to_string(),
        "source": model.file_name().map(|name| name.to_string_lossy()),
        "decoder": format(recipe.decoder),
        "embedding": format(recipe.embedding),
        "head": format(recipe.head),
        "projector": format(recipe.projector),
        "vision": format(recipe.vision),
    })
}
