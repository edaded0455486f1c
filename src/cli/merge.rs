//! `merge`: an adapter and its base become one checkpoint.

use std::path::PathBuf;

use llava_engine::cpu::Cpu;
use llava_engine::dtype::DType;
use llava_engine::error::Result;
use llava_engine::model::checkpoint::Checkpoint;
use llava_engine::model::merge::merge;
use llava_engine::weights::adapter::Adapter;
use llava_engine::weights::hub::resolve;
use serde_json::json;

use super::Outcome;
use super::common;

/// Flags of `merge`.
#[derive(clap::Args)]
#[command(after_help = "Example:
  llava-engine merge --model llava-hf/llava-1.5-7b-hf --lora tuned --output merged")]
pub struct Args {
    /// Checkpoint folder or Hugging Face hub id; the demo model if absent
    #[arg(long, short, env = "LLAVA_MODEL", alias = "model-path", value_name = "PATH|HF_ID")]
    model: Option<PathBuf>,
    /// Language model that an mm_projector.bin belongs to
    #[arg(long, env = "LLAVA_MODEL_BASE", value_name = "PATH")]
    model_base: Option<PathBuf>,
    /// Folder of the LoRA adapter, of finetune, PEFT or LLaVA's own trainer
    #[arg(long, env = "LLAVA_LORA", value_name = "DIR")]
    lora: PathBuf,
    /// New folder for the result
    #[arg(long, short, value_name = "DIR")]
    output: PathBuf,
    /// CPU threads; 0 for as many as the machine has
    #[arg(long, env = "LLAVA_THREADS", default_value_t = 0, value_name = "N")]
    threads: usize,
    /// Prints one JSON document
    #[arg(long)]
    json: bool,
}

/// Merges.
pub fn run(args: &Args) -> Result<Outcome> {
    let model = args.model.clone().map_or_else(common::demo_model, Ok)?;
    let model = resolve(&model.to_string_lossy())?;
    let checkpoint = Checkpoint::open(&model, args.model_base.as_deref())?;
    let adapter = Adapter::open(&args.lora)?;
    let merged = merge(&Cpu::new(args.threads, DType::F32)?, &model, &checkpoint, &adapter, &args.output)?;
    if args.json {
        common::put_json(&json!({"output": args.output.to_string_lossy(), "merged": merged}))?;
    } else {
        let llava_engine::model::merge::Merged { n_added, n_replaced } = merged;
        eprintln!("llava-engine: written to {}: {n_added} matrices added to, {n_replaced} tensors replaced", args.output.display());
    }
    Ok(Outcome::Done)
}
