//! `quantize`: makes a checkpoint smaller.

use std::path::PathBuf;
use std::time::Instant;

use llava_engine::error::{Error, Result};
use llava_engine::ops::packed::Format;
use llava_engine::quantize::round::Loss;
use llava_engine::quantize::{Written, quantize};
use llava_engine::weights::hub::resolve;
use llava_engine::weights::recipe::Recipe;
use serde_json::json;

use super::Outcome;
use super::common;

/// Flags of `quantize`.
#[derive(clap::Args)]
#[command(after_help = "Example:
  llava-engine quantize --model llava-hf/llava-1.5-7b-hf --output llava-7b-int4 --bits 4
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
    /// Bits of the decoder's head
    #[arg(long, default_value_t = 8, value_name = "BITS")]
    head_bits: usize,
    /// Bits of the projector
    #[arg(long, default_value_t = 8, value_name = "BITS")]
    projector_bits: usize,
    /// Bits of the vision tower
    #[arg(long, default_value_t = 8, value_name = "BITS")]
    vision_bits: usize,
    /// Weights of a row that share a scale: 32, 64 or 128; fewer where a row is not made of such groups
    #[arg(long, default_value_t = 128, value_name = "N")]
    group_size: usize,
    /// How weights are rounded: rtn (each to the nearest)
    #[arg(long, default_value = "rtn", value_parser = ["rtn"])]
    method: String,
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
            head: format(self.head_bits)?,
            projector: format(self.projector_bits)?,
            vision: format(self.vision_bits)?,
        };
        if recipe == Recipe::DENSE {
            return Err(Error::usage("all parts left at 16 bits: nothing would be quantized"));
        }
        Ok(recipe)
    }
}

/// Quantizes.
pub fn run(args: &Args) -> Result<Outcome> {
    let recipe = args.recipe()?;
    let model = args.model.clone().map_or_else(common::demo_model, Ok)?;
    let model = resolve(&model.to_string_lossy())?;
    let start = Instant::now();
    let bar = common::progress("{msg:40} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    let mut all: Vec<Written> = Vec::new();
    quantize(&model, args.model_base.as_deref(), &args.output, recipe, args.threads, |written, total| {
        bar.set_length(total as u64);
        bar.inc(written.bytes_read as u64);
        bar.set_message(written.name.clone());
        all.push(written.clone());
    })?;
    bar.finish_and_clear();
    report(args, &all, start.elapsed().as_secs_f64())?;
    Ok(Outcome::Done)
}

fn report(args: &Args, all: &[Written], seconds: f64) -> Result<()> {
    let bytes = |f: fn(&Written) -> usize| all.iter().map(f).sum::<usize>();
    let (read, written) = (bytes(|w| w.bytes_read), bytes(|w| w.bytes_written));
    if args.json {
        let tensor = |w: &Written| {
            json!({
                "name": w.name, "storage": w.format.map(|f| f.to_string()), "relative_error": w.format.map(|_| w.loss.relative()),
                "bytes_read": w.bytes_read, "bytes_written": w.bytes_written,
            })
        };
        return common::put_json(&json!({
            "output": args.output.to_string_lossy(), "method": args.method, "seconds": seconds,
            "bytes_read": read, "bytes_written": written, "tensors": all.iter().map(tensor).collect::<Vec<_>>(),
        }));
    }
    let mut out = format!("{:<24} {:<28} {:>10} {:>10}\n", "part", "stored as", "error, %", "MB");
    let mut line = |name: &str, storage: &str, error: &str, bytes: usize| {
        out += &format!("{name:<24} {storage:<28} {error:>10} {:>10.2}\n", bytes as f64 / 1e6);
    };
    for (name, row) in by_layer(all) {
        line(&name, &row.storage, &format!("{:.3}", 100.0 * row.loss.relative()), row.bytes);
    }
    let as_they_are = all.iter().filter(|w| w.format.is_none()).map(|w| w.bytes_written).sum();
    line("all else", "as it was", "0", as_they_are);
    out += &format!(
        "\n{}: {:.1} MB from {:.1} MB in {seconds:.1} s. Error: the root of the squares that rounding changed, over those of the weights.\n",
        args.output.display(),
        written as f64 / 1e6,
        read as f64 / 1e6
    );
    common::put(&out)
}

/// The packed matrices of a layer.
struct Row {
    storage: String,
    loss: Loss,
    bytes: usize,
}

/// The packed matrices by layer, in the order of the model.
fn by_layer(all: &[Written]) -> Vec<(String, Row)> {
    let mut rows: Vec<(String, Row)> = Vec::new();
    for w in all {
        let Some(format) = w.format else { continue };
        let (name, storage) = (layer(&w.name), format.to_string());
        match rows.iter_mut().find(|(n, row)| *n == name && row.storage == storage) {
            Some((_, row)) => *row = Row { loss: row.loss.plus(w.loss), bytes: row.bytes + w.bytes_written, storage },
            None => rows.push((name, Row { storage, loss: w.loss, bytes: w.bytes_written })),
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
