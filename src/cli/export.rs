//! `export`: a checkpoint in the other layout.

use std::path::PathBuf;

use llava_engine::dtype::DType;
use llava_engine::error::{Error, Result};
use llava_engine::export::{Exported, Options, SHARD_BYTES, Target, export};
use llava_engine::model::checkpoint::Checkpoint;
use llava_engine::text::Template;
use llava_engine::weights::hub::resolve;
use serde_json::json;

use super::Outcome;
use super::common;

/// Flags of `export`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  llava-engine export --model liuhaotian/llava-v1.5-7b --to hf --output llava-7b-hf
  llava-engine export --model tuned --to original --output llava-v1.5-tuned --dtype f16")]
pub struct Args {
    /// Checkpoint folder or Hugging Face hub id; the demo model if absent
    #[arg(long, short, env = "LLAVA_MODEL", alias = "model-path", value_name = "PATH|HF_ID")]
    model: Option<PathBuf>,
    /// Language model that an mm_projector.bin belongs to
    #[arg(long, env = "LLAVA_MODEL_BASE", value_name = "PATH")]
    model_base: Option<PathBuf>,
    /// Layout: llava-hf for transformers, or haotian-liu/LLaVA's own
    #[arg(long, value_enum)]
    to: To,
    /// New folder for the result
    #[arg(long, short, value_name = "DIR")]
    output: PathBuf,
    /// Number format of all weights: f32, bf16, f16; each keeps its own if absent
    #[arg(long, value_name = "DTYPE")]
    dtype: Option<DType>,
    /// Largest file of weights, in GB
    #[arg(long, default_value_t = SHARD_BYTES as f64 / 1e9, value_name = "GB")]
    max_shard_gb: f64,
    /// Conversation template that becomes llava-hf's chat template; by default what the checkpoint and its name say
    #[arg(long, value_name = "NAME")]
    template: Option<String>,
    /// Prints one JSON document
    #[arg(long)]
    json: bool,
}

/// A layout by name.
#[derive(Clone, Copy, clap::ValueEnum)]
enum To {
    Hf,
    Original,
}

/// Exports.
pub fn run(args: &Args) -> Result<Outcome> {
    if !(args.max_shard_gb > 0.0 && args.max_shard_gb.is_finite()) {
        return Err(Error::usage(format!("--max-shard-gb is {}: expected a positive number", args.max_shard_gb)));
    }
    let model = args.model.clone().map_or_else(common::demo_model, Ok)?;
    let name = model.to_string_lossy();
    let options = Options {
        to: match args.to {
            To::Hf => Target::Hf,
            To::Original => Target::Original,
        },
        dtype: args.dtype,
        max_shard_bytes: (args.max_shard_gb * 1e9) as usize,
        name: &name,
        template: args.template.as_deref(),
    };
    if let Some(name) = options.template {
        Template::by_name(name)?;
        if options.to != Target::Hf {
            return Err(Error::usage("--template goes with --to hf: the original layout has no chat template"));
        }
    }
    let model = resolve(&name)?;
    let checkpoint = Checkpoint::open(&model, args.model_base.as_deref())?;
    let exported = export(&model, &checkpoint, &args.output, &options)?;
    let Exported { n_tensors, bytes, n_files, rows_before, rows, notes } = &exported;
    for note in notes {
        eprintln!("llava-engine: {note}");
    }
    if args.json {
        common::put_json(&json!({"output": args.output.to_string_lossy(), "exported": exported}))?;
    } else {
        let vocabulary = match rows == rows_before {
            true => format!("{rows} rows in the vocabulary"),
            false => format!("{rows} rows in the vocabulary instead of {rows_before}"),
        };
        let (output, mb) = (args.output.display(), *bytes as f64 / 1e6);
        let files = if *n_files == 1 { "file" } else { "files" };
        eprintln!("llava-engine: written to {output}: {n_tensors} tensors, {mb:.1} MB in {n_files} {files}, {vocabulary}");
    }
    Ok(Outcome::Done)
}
