//! `bench`: how fast this machine encodes a picture, reads a prompt and answers, or trains, against what it could do at best.

mod measure;
mod report;
mod train;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use llava_engine::device::Device;
use llava_engine::dtype::DType;
use llava_engine::engine::{Engine, EngineOptions, OpenDevice, open_device};
use llava_engine::error::{Error, Result};
use llava_engine::infer::runner::Runner;
use llava_engine::model::Llava;
use llava_engine::model::config::LlavaConfig;
use llava_engine::ops::Ops;
use llava_engine::profile::Records;
use llava_engine::weights::random::Random;
use llava_engine::weights::recipe::Recipe;

use super::Outcome;

/// The largest batch that is taken.
const MAX_BATCH: usize = 1024;

/// Flags of `bench`.
#[derive(clap::Args)]
#[command(after_help = "Example:
  llava-engine bench --shape llava-1.5-7b --weights bf16 --prompt-tokens 640 --new-tokens 64
  llava-engine bench --train tune=full --train tune_vision=full --train dtype=f32 --prompt-tokens 104 --new-tokens 24 --batch-size 16 \\
    --model models/demo")]
pub struct Args {
    /// Model: a folder, a GGUF file or a hub id; with random weights of a known shape if absent
    #[arg(long, env = "LLAVA_MODEL", value_name = "PATH|HF_ID")]
    model: Option<PathBuf>,
    /// Vision tower and projector of a GGUF model; the only such file beside it if absent
    #[arg(long, env = "LLAVA_MMPROJ", requires = "model", value_name = "FILE")]
    mmproj: Option<PathBuf>,
    /// Folder of a LoRA adapter over the model
    #[arg(long, env = "LLAVA_LORA", requires = "model", value_name = "DIR")]
    lora: Option<PathBuf>,
    /// Shape whose weights are made up: llava-1.5-7b or llava-1.5-13b
    #[arg(long, conflicts_with = "model", value_name = "NAME")]
    shape: Option<String>,
    /// What made-up weights are stored in: bf16, f16, f32, int8 or int4 (as `quantize` would make them)
    #[arg(long, default_value = "bf16", value_name = "DTYPE")]
    weights: String,
    /// Decoder layers of the shape, where all of them do not fit; the others' share of a step is then missing
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Tokens of the prompt, an image's among them
    #[arg(long, default_value_t = 640, value_name = "N")]
    prompt_tokens: usize,
    /// Tokens of the answer
    #[arg(long, default_value_t = 64, value_name = "N")]
    new_tokens: usize,
    /// Sequences that are decoded together, each with its own prompt and answer; several numbers are measured one after the other
    #[arg(long, default_value = "1,4,8", value_delimiter = ',', value_name = "N[,N...]")]
    batch_size: Vec<usize>,
    /// Measures training steps instead, with settings of `finetune`; each of --batch-size rows is a prompt with a picture, and an answer to learn. May be repeated
    #[arg(long, value_name = "KEY=VALUE", conflicts_with_all = ["lora", "w8a8", "mmproj"])]
    train: Vec<String>,
    /// Runs of everything; medians are over these
    #[arg(long, default_value_t = 5, value_name = "N")]
    repeat: usize,
    /// Where it runs: auto, cpu, cuda, cuda:N, or sim
    #[arg(long, env = "LLAVA_DEVICE", default_value = "auto")]
    device: String,
    /// On CUDA, rounds activations to 8 bits for products of more than 8 tokens with weights of 8 bits, as the CPU always does
    #[arg(long)]
    w8a8: bool,
    /// CPU threads; 0 for as many as the machine has
    #[arg(long, env = "LLAVA_THREADS", default_value_t = 0, value_name = "N")]
    threads: usize,
    /// Prints one JSON document
    #[arg(long)]
    json: bool,
}

/// What is measured.
struct Subject {
    about: About,
    runner: Runner,
    /// What the ops of `runner` cost.
    records: Arc<Records>,
}

/// What a report says of it.
struct About {
    /// Of the model.
    name: String,
    /// Of the device.
    device: String,
    /// What the decoder's matrices are stored as.
    weights: String,
    /// What dense matrices are stored in; of training, what it computes in.
    stored: DType,
    hidden_size: usize,
    n_layers: usize,
    load_ms: f64,
}

impl About {
    fn new(name: String, ops: &dyn Ops, model: &Llava, stored: DType, load_ms: f64) -> Self {
        let text = &model.config().text;
        let (device, weights) = (ops.name().to_owned(), model.llama().weights());
        Self { name, device, weights, stored, hidden_size: text.hidden_size, n_layers: text.n_layers, load_ms }
    }
}

/// Benchmarks.
pub fn run(args: &Args) -> Result<Outcome> {
    let device = args.device.parse::<Device>()?;
    let weights = Weights::parse(&args.weights)?;
    if args.new_tokens < 2 || args.repeat == 0 || args.prompt_tokens == 0 {
        return Err(Error::usage("--prompt-tokens and --repeat must be at least 1, --new-tokens at least 2"));
    }
    let most = args.batch_size.iter().copied().max().unwrap_or(0);
    if args.batch_size.contains(&0) || most > MAX_BATCH {
        return Err(Error::usage(format!("--batch-size takes numbers from 1 to {MAX_BATCH}, such as 1,4,8")));
    }
    if !args.train.is_empty() {
        let (about, phases) = train::measure(args, device, weights)?;
        report::report(args, device, &about, &phases)?;
        return Ok(Outcome::Done);
    }
    let options = EngineOptions {
        device,
        w8a8: args.w8a8,
        threads: args.threads,
        mmproj: args.mmproj.clone(),
        context_tokens: Some(args.prompt_tokens + args.new_tokens),
        n_contexts: most,
        profile_ops: true,
        lora: args.lora.clone(),
        ..Default::default()
    };
    let mut subject = match &args.model {
        Some(model) => open(model, &options)?,
        None => make_up(args, weights, &options)?,
    };
    let phases = measure::measure(args, &mut subject)?;
    report::report(args, device, &subject.about, &phases)?;
    Ok(Outcome::Done)
}

fn open(model: &Path, options: &EngineOptions) -> Result<Subject> {
    let engine = Engine::open(model, options)?;
    let (stored, load_ms) = (engine.compute_dtype(), engine.load_ms());
    let records = engine.records().ok_or_else(|| Error::usage("the engine keeps no records"))?;
    let runner = engine.into_runner();
    Ok(Subject { about: About::new(model.display().to_string(), runner.ops(), runner.model(), stored, load_ms), runner, records })
}

/// How made-up weights are stored.
struct Weights {
    /// Of what is not packed.
    dtype: DType,
    recipe: Recipe,
}

impl Weights {
    fn parse(name: &str) -> Result<Self> {
        let packed = |bits| Ok(Self { dtype: DType::Bf16, recipe: Recipe::of_bits(bits, 128)? });
        match name {
            "int4" => packed(4),
            "int8" => packed(8),
            _ => match name.parse() {
                Ok(dtype) => Ok(Self { dtype, recipe: Recipe::DENSE }),
                Err(_) => Err(Error::usage(format!("--weights `{name}`: use bf16, f16, f32, int8 or int4"))),
            },
        }
    }
}

fn make_up(args: &Args, Weights { dtype, recipe }: Weights, options: &EngineOptions) -> Result<Subject> {
    let start = Instant::now();
    let (name, config) = shape(args)?;
    let OpenDevice { ops, records, note } = open_device(options, dtype)?;
    if let Some(note) = note {
        eprintln!("llava-engine: {note}");
    }
    let model = Llava::load(&*ops, &config, &Random::packed(dtype, recipe), ops.weight_dtype())?;
    let records = records.ok_or_else(|| Error::usage("the device keeps no records"))?;
    let runner = Runner::new(ops, model, options.kv_dtype.unwrap_or(dtype), options.n_contexts)?;
    let load_ms = start.elapsed().as_secs_f64() * 1e3;
    Ok(Subject { about: About::new(name.to_owned(), runner.ops(), runner.model(), dtype, load_ms), runner, records })
}

/// The shape that was named, with its name.
fn shape(args: &Args) -> Result<(&str, LlavaConfig)> {
    let name = args.shape.as_deref().unwrap_or("llava-1.5-7b");
    let mut config = LlavaConfig::by_name(name)
        .ok_or_else(|| Error::usage(format!("unknown shape `{name}`: use llava-1.5-7b or llava-1.5-13b, or name a --model")))?;
    config.text.n_layers = args.layers.unwrap_or(config.text.n_layers);
    config.context_tokens = args.prompt_tokens + args.new_tokens;
    Ok((name, config))
}
