//! `quantize`: makes a checkpoint smaller.

use std::path::{Path, PathBuf};
use std::time::Instant;

use llava_engine::data;
use llava_engine::error::{Error, Result};
use llava_engine::ops::packed::Format;
use llava_engine::quantize::evaluate::Evaluation;
use llava_engine::quantize::round::Loss;
use llava_engine::quantize::{Calibration, Method, Options, Report, Written, quantize};
use llava_engine::weights::hub::resolve;
use llava_engine::weights::recipe::Recipe;
use serde_json::{Value, json};

use super::Outcome;
use super::common;

/// Flags of `quantize`.
#[derive(clap::Args)]
#[command(after_help = "Example:
  llava-engine quantize --model llava-hf/llava-1.5-7b-hf --output llava-7b-int4 --bits 4
  llava-engine quantize --model llava-hf/llava-1.5-7b-hf --output llava-7b-gptq --bits 4 --method gptq \\
    --calibration llava_instruct_80k.json --image-folder coco/train2017
  llava-engine generate --model llava-7b-int4 --image photo.jpg --prompt \"What is in this picture?\"")]
pub struct Args {
    /// Checkpoint folder or Hugging Face hub id; the demo model if absent
    #[arg(long, short, env = "LLAVA_MODEL", alias = "model-path", value_name = "PATH|HF_ID")]
    model: Option<PathBuf>,
    /// Language model that an mm_projector.bin belongs to
    #[arg(long, env = "LLAVA_MODEL_BASE", value_name = "PATH")]
    model_base: Option<PathBuf>,
    /// New folder for the result
    #[arg(long, short, value_name = "DIR")]
    output: PathBuf,
    /// Bits of the matrices of the decoder's layers: 4, 8, or 16 to leave them as they are
    #[arg(long, value_name = "BITS")]
    bits: usize,
    /// Bits of the decoder's embedding, which is its head too where it has none of its own: 4, 8 or 16
    #[arg(long, default_value_t = 8, value_name = "BITS")]
    embedding_bits: usize,
    /// Bits of the decoder's head: 4, 8 or 16
    #[arg(long, default_value_t = 8, value_name = "BITS")]
    head_bits: usize,
    /// Bits of the projector: 4, 8 or 16
    #[arg(long, default_value_t = 8, value_name = "BITS")]
    projector_bits: usize,
    /// Bits of the vision tower: 4, 8 or 16
    #[arg(long, default_value_t = 8, value_name = "BITS")]
    vision_bits: usize,
    /// Weights of a row that share a scale: 32, 64 or 128; fewer where a row is not made of such groups
    #[arg(long, default_value_t = 128, value_name = "N")]
    group_size: usize,
    /// How the decoder's weights are rounded: rtn (each to the nearest), gptq (later columns make good for earlier ones), or awq (finer
    /// where inputs are large); gptq and awq run calibration data through the model, layer by layer
    #[arg(long, default_value = "rtn", value_parser = ["rtn", "gptq", "awq"])]
    method: String,
    /// Conversations to calibrate by, as LLaVA's instruction data (JSON or JSONL); every fourth row is held out, and the report says what
    /// those lose. For gptq and awq the demo model's own rows if absent
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Folder of their pictures; that of the file if absent
    #[arg(long, value_name = "DIR", requires = "calibration")]
    image_folder: Option<PathBuf>,
    /// Rows to take, evenly spread over the file
    #[arg(long, default_value_t = 128, value_name = "N")]
    calibration_rows: usize,
    /// Conversation template of the rows; the checkpoint's own if absent
    #[arg(long, value_name = "NAME")]
    template: Option<String>,
    /// Does not compare the result with the model it was made from
    #[arg(long)]
    no_evaluation: bool,
    /// CPU threads; 0 for as many as the machine has
    #[arg(long, env = "LLAVA_THREADS", default_value_t = 0, value_name = "N")]
    threads: usize,
    /// Prints one JSON document
    #[arg(long)]
    json: bool,
}

impl Args {
    fn recipe(&self) -> Result<Recipe> {
        let format = |bits: usize| match bits {
            16 => Ok(None),
            _ => Format::new(bits, self.group_size, false).map(Some),
        };
        let recipe = Recipe {
            decoder: format(self.bits)?,
            embedding: format(self.embedding_bits)?,
            head: format(self.head_bits)?,
            projector: format(self.projector_bits)?,
            vision: format(self.vision_bits)?,
        };
        if recipe == Recipe::DENSE {
            return Err(Error::usage("all parts left at 16 bits: nothing would be quantized"));
        }
        Ok(recipe)
    }

    fn method(&self) -> Method {
        match self.method.as_str() {
            "gptq" => Method::Gptq,
            "awq" => Method::Awq,
            _ => Method::Rtn,
        }
    }

    fn options(&self) -> Result<Options> {
        let (recipe, method) = (self.recipe()?, self.method());
        if let Some(name) = &self.template {
            llava_engine::text::Template::by_name(name)?;
        }
        let file = match &self.calibration {
            Some(file) => Some(file.clone()),
            None if method == Method::Rtn => None,
            None => Some(common::demo_model()?.join(DEMO_ROWS)),
        };
        let calibration = file.map(|file| {
            let folder = self.image_folder.as_deref().or(file.parent()).unwrap_or_else(|| Path::new("."));
            let rows = data::read(&file, folder, self.calibration_rows)?;
            Ok::<_, Error>(Calibration { rows, template: self.template.clone(), evaluate: !self.no_evaluation })
        });
        Ok(Options { recipe, method, calibration: calibration.transpose()?, n_threads: self.threads })
    }
}

/// Where the demo model has its calibration data.
const DEMO_ROWS: &str = "calibration/rows.json";

/// Quantizes.
pub fn run(args: &Args) -> Result<Outcome> {
    let options = args.options()?;
    let model = args.model.clone().map_or_else(common::demo_model, Ok)?;
    let model = resolve(&model.to_string_lossy())?;
    let start = Instant::now();
    let bar = common::progress("{msg:40} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    let mut all: Vec<Written> = Vec::new();
    if args.calibration.is_none() && args.model.is_some() && options.calibration.is_some() {
        eprintln!("llava-engine: calibrating by pictures of shapes, the demo model's: name rows of your own with --calibration");
    }
    let done = quantize(&model, args.model_base.as_deref(), &args.output, &options, |written, total| {
        bar.set_length(total as u64);
        bar.inc(written.bytes_read as u64);
        bar.set_message(written.name.clone());
        all.push(written.clone());
    })?;
    bar.finish_and_clear();
    report(args, &all, &done, start.elapsed().as_secs_f64())?;
    Ok(Outcome::Done)
}

fn report(args: &Args, all: &[Written], done: &Report, seconds: f64) -> Result<()> {
    let bytes = |f: fn(&Written) -> usize| all.iter().map(f).sum::<usize>();
    let (read, written) = (bytes(|w| w.bytes_read), bytes(|w| w.bytes_written));
    if args.json {
        let tensor = |w: &Written| {
            json!({
                "name": w.name, "storage": w.format.map(|f| f.to_string()), "relative_error": w.format.map(|_| w.loss.relative()),
                "relative_output_error": w.output_loss.map(|loss| loss.relative()), "bytes_read": w.bytes_read, "bytes_written": w.bytes_written,
            })
        };
        return common::put_json(&json!({
            "output": args.output.to_string_lossy(), "method": args.method, "seconds": seconds,
            "bytes_read": read, "bytes_written": written,
            "calibration": {"rows": done.n_calibration_rows, "tokens": done.n_calibration_tokens},
            "evaluation": done.evaluation.as_ref().map(evaluation_json), "tensors": all.iter().map(tensor).collect::<Vec<_>>(),
        }));
    }
    let mut out = format!("{:<24} {:<28} {:>10} {:>10} {:>10}\n", "part", "stored as", "error, %", "output, %", "MB");
    let mut line = |name: &str, storage: &str, errors: [&str; 2], bytes: usize| {
        let [error, output] = errors;
        out += &format!("{name:<24} {storage:<28} {error:>10} {output:>10} {:>10.2}\n", bytes as f64 / 1e6);
    };
    let percent = |loss: Loss| format!("{:.3}", 100.0 * loss.relative());
    for (name, row) in by_layer(all) {
        line(&name, &row.storage, [&percent(row.loss), &row.output_loss.map_or("-".to_owned(), percent)], row.bytes);
    }
    let as_they_are = all.iter().filter(|w| w.format.is_none()).map(|w| w.bytes_written).sum();
    line("all else", "-", ["-", "-"], as_they_are);
    out += &format!(
        "\n{}: {:.1} MB from {:.1} MB in {seconds:.1} s, by {}. Error: the root of the squares that rounding changed, over those of the \
         weights; output: the same of what the matrices make of calibration data.\n",
        args.output.display(),
        written as f64 / 1e6,
        read as f64 / 1e6,
        args.method
    );
    if let Some(evaluation) = &done.evaluation {
        out += &evaluation_text(evaluation, done);
    }
    common::put(&out)
}

/// What quantizing has cost, for JSON.
fn evaluation_json(evaluation: &Evaluation) -> Value {
    let (dense, quantized) = evaluation.perplexities();
    json!({
        "rows": evaluation.n_rows, "answer_tokens": evaluation.n_tokens,
        "dense": {"loss": evaluation.dense_loss, "perplexity": dense},
        "quantized": {"loss": evaluation.quantized_loss, "perplexity": quantized},
        "kl": evaluation.kl,
    })
}

/// What quantizing has cost, for people.
fn evaluation_text(evaluation: &Evaluation, done: &Report) -> String {
    let (dense, quantized) = evaluation.perplexities();
    let &Evaluation { n_rows, n_tokens, dense_loss, quantized_loss, kl } = evaluation;
    format!(
        "\n{:<24} {:>10} {:>10}\n{:<24} {dense_loss:>10.5} {quantized_loss:>10.5}\n{:<24} {dense:>10.4} {quantized:>10.4}\n\
         {:<24} {:>10} {kl:>10.5}\n\nOver {n_tokens} tokens of answers in {n_rows} rows that were held out; calibrated by {} rows of {} \
         tokens.\n",
        "held out",
        "before",
        "after",
        "loss, nats/token",
        "perplexity",
        "KL, nats/token",
        "-",
        done.n_calibration_rows,
        done.n_calibration_tokens
    )
}

/// The packed matrices of a layer.
struct Row {
    storage: String,
    loss: Loss,
    output_loss: Option<Loss>,
    bytes: usize,
}

/// The packed matrices by layer, in the order of the model.
fn by_layer(all: &[Written]) -> Vec<(String, Row)> {
    let mut rows: Vec<(String, Row)> = Vec::new();
    for w in all {
        let Some(format) = w.format else { continue };
        let (name, storage) = (layer(&w.name), format.to_string());
        match rows.iter_mut().find(|(n, row)| *n == name && row.storage == storage) {
            Some((_, row)) => {
                row.loss = row.loss.plus(w.loss);
                row.output_loss = row.output_loss.zip(w.output_loss).map(|(a, b)| a.plus(b));
                row.bytes += w.bytes_written;
            }
            None => rows.push((name, Row { storage, loss: w.loss, output_loss: w.output_loss, bytes: w.bytes_written })),
        }
    }
    rows
}

/// `llama.layers.3` of `llama.layers.3.mlp.up_proj`; the part and its first word otherwise.
fn layer(name: &str) -> String {
    let words: Vec<&str> = name.split('.').collect();
    let n = if words.get(1) == Some(&"layers") { 3 } else { 2 };
    words[..n.min(words.len())].join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_are_gathered_by_layer() {
        for (name, expected) in [
            ("llama.layers.13.mlp.up_proj", "llama.layers.13"),
            ("clip.layers.0.mlp.fc1.bias", "clip.layers.0"),
            ("llama.lm_head", "llama.lm_head"),
            ("projector.linear_1.bias", "projector.linear_1"),
            ("image_newline", "image_newline"),
        ] {
            assert_eq!(layer(name), expected);
        }
    }
}
