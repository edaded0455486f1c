//! `bench`: how fast this machine encodes a picture, reads a prompt and answers, against what it could do at best.

use std::path::PathBuf;
use std::time::Instant;

use llava_engine::cpu::Peaks;
use llava_engine::device::Device;
use llava_engine::dtype::DType;
use llava_engine::engine::{Engine, EngineOptions, OpenDevice, open_device};
use llava_engine::error::{Error, Result};
use llava_engine::infer::runner::Runner;
use llava_engine::model::config::LlavaConfig;
use llava_engine::model::{Llava, Slot};
use llava_engine::profile::Records;
use llava_engine::tensor::Tensor;
use llava_engine::weights::random::Random;

use super::Outcome;
use super::common;

/// Flags of `bench`.
#[derive(clap::Args)]
#[command(after_help = "Example:
  llava-engine bench --shape llava-1.5-7b --weights bf16 --prompt-tokens 640 --new-tokens 64")]
pub struct Args {
    /// Model: a folder, or a hub id; with random weights of a known shape if absent
    #[arg(long, env = "LLAVA_MODEL", value_name = "PATH|HF_ID")]
    model: Option<PathBuf>,
    /// Shape whose weights are made up: llava-1.5-7b or llava-1.5-13b
    #[arg(long, conflicts_with = "model", value_name = "NAME")]
    shape: Option<String>,
    /// What made-up weights are stored in: bf16, f16 or f32
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
    /// Runs of everything; medians are over these
    #[arg(long, default_value_t = 5, value_name = "N")]
    repeat: usize,
    /// Where it runs: auto, cpu, cuda, cuda:N, or sim
    #[arg(long, env = "LLAVA_DEVICE", default_value = "auto")]
    device: String,
    /// CPU threads; 0 for as many as the machine has
    #[arg(long, env = "LLAVA_THREADS", default_value_t = 0, value_name = "N")]
    threads: usize,
    /// Prints one JSON document
    #[arg(long)]
    json: bool,
}

/// One run of a phase.
#[derive(Clone, Copy)]
struct Run {
    ms: f64,
    bytes: f64,
    flops: f64,
    peaks: Option<Peaks>,
}

/// All runs of a phase.
struct Phase {
    name: &'static str,
    /// Tokens that a run works on or makes.
    tokens: usize,
    /// Tokens in the cache when it ends.
    context: usize,
    runs: Vec<Run>,
}

/// Benchmarks.
pub fn run(args: &Args) -> Result<Outcome> {
    let device = args.device.parse::<Device>()?;
    let dtype = args.weights.parse::<DType>()?;
    if args.new_tokens < 2 || args.repeat == 0 || args.prompt_tokens == 0 {
        return Err(Error::usage("--prompt-tokens and --repeat must be at least 1, --new-tokens at least 2"));
    }
    let options = EngineOptions { device, threads: args.threads, profile_ops: true, ..Default::default() };
    let start = Instant::now();
    let (mut runner, records, stored) = match &args.model {
        Some(model) => open(model, &options)?,
        None => make_up(args, dtype, &options)?,
    };
    let load_ms = start.elapsed().as_secs_f64() * 1e3;
    let phases = measure(args, &mut runner, &records)?;
    report(args, &runner, &phases, stored, load_ms)
}

type Opened = (Runner, std::sync::Arc<Records>, DType);

fn open(model: &std::path::Path, options: &EngineOptions) -> Result<Opened> {
    let engine = Engine::open(model, options)?;
    let records = engine.records().ok_or_else(|| Error::usage("the engine keeps no records"))?;
    let stored = engine.compute_dtype();
    Ok((engine.into_runner(), records, stored))
}

fn make_up(args: &Args, dtype: DType, options: &EngineOptions) -> Result<Opened> {
    let name = args.shape.as_deref().unwrap_or("llava-1.5-7b");
    let mut config = LlavaConfig::by_name(name)
        .ok_or_else(|| Error::usage(format!("unknown shape `{name}`: use llava-1.5-7b or llava-1.5-13b, or name a --model")))?;
    config.text.n_layers = args.layers.unwrap_or(config.text.n_layers);
    config.context_tokens = (args.prompt_tokens + args.new_tokens).max(config.tokens_per_image());
    let OpenDevice { ops, records, note } = open_device(options, dtype)?;
    if let Some(note) = note {
        eprintln!("llava-engine: {note}");
    }
    let model = Llava::load(&*ops, &config, &Random::new(dtype), ops.weight_dtype())?;
    let records = records.ok_or_else(|| Error::usage("the device keeps no records"))?;
    Ok((Runner::new(ops, model, dtype)?, records, dtype))
}

/// Runs every phase `repeat` times, in turn. Where the processor does the work, the machine's peaks are probed right before and after each
/// run, and their means count: a machine that is shared may be half as fast a few seconds later.
fn measure(args: &Args, runner: &mut Runner, records: &Records) -> Result<[Phase; 3]> {
    let config = runner.model().config().clone();
    let (image_tokens, size) = (config.tokens_per_image(), config.vision.image_size);
    let (prompt, new) = (args.prompt_tokens, args.new_tokens);
    if prompt + new > config.context_tokens {
        return Err(Error::usage(format!("{} tokens do not fit a context of {}", prompt + new, config.context_tokens)));
    }
    let pixels: Vec<f32> = (0..3 * size * size).map(|i| (i * 7919 % 4093) as f32 / 2046.5 - 1.0).collect();
    let pixels = runner.ops().upload(Tensor::from_slice(&[1, 3, size, size], &pixels))?;
    let id = |i: usize| Slot::Token((i * 31 % config.text.vocab_size) as u32);
    let slots: Vec<Slot> = (0..prompt)
        .map(|i| match i.checked_sub(prompt.saturating_sub(image_tokens) / 2) {
            Some(row) if row < image_tokens => Slot::Image { feature_row: row },
            _ => id(i),
        })
        .collect();
    let on_cpu = runner.ops().name().starts_with("cpu");
    let phase = |name, tokens, context| Phase { name, tokens, context, runs: Vec::new() };
    let mut phases =
        [phase("encode", image_tokens, 0), phase("prefill", prompt, prompt), phase("decode", new - 1, prompt + new - 1)];
    let probe = || on_cpu.then(|| Peaks::measure(args.threads));
    for _ in 0..args.repeat {
        let mut before = probe();
        let mut timed = |phase: &mut Phase, work: &mut dyn FnMut() -> Result<()>| -> Result<()> {
            let (bytes, flops) = totals(records);
            let start = Instant::now();
            work()?;
            let ms = start.elapsed().as_secs_f64() * 1e3;
            let (bytes_after, flops_after) = totals(records);
            let after = probe();
            let peaks = before.zip(after).map(|(a, b)| a.mean(b));
            before = after;
            phase.runs.push(Run { ms, bytes: bytes_after - bytes, flops: flops_after - flops, peaks });
            Ok(())
        };
        let [encode, prefill, decode] = &mut phases;
        let mut features = None;
        timed(encode, &mut || {
            let encoded = runner.encode(&pixels)?;
            if encoded.device_address().is_some() {
                runner.ops().download(&encoded)?; // until then it may only be queued
            }
            features = Some(encoded);
            Ok(())
        })?;
        let mut table = runner.kv().sequence();
        timed(prefill, &mut || runner.extend(&mut table, 0, &slots, features.as_ref(), prompt - 1, |_| {}))?;
        timed(decode, &mut || (0..new - 1).try_for_each(|i| runner.extend(&mut table, prompt + i, &[id(i)], None, 0, |_| {})))?;
    }
    Ok(phases)
}

/// Bytes and operations of all ops so far.
fn totals(records: &Records) -> (f64, f64) {
    records.snapshot().iter().fold((0.0, 0.0), |(bytes, flops), (_, r)| (bytes + r.bytes, flops + r.flops))
}

impl Phase {
    /// Its runs from the fastest to the slowest.
    fn sorted_ms(&self) -> Vec<f64> {
        let mut ms: Vec<f64> = self.runs.iter().map(|r| r.ms).collect();
        ms.sort_by(f64::total_cmp);
        ms
    }

    /// Median share of the peak that bounds the phase, in percent: each run against the peaks probed beside it. Decoding is bound by memory; the rest by arithmetic, in bf16 where both the weights and the processor have it.
    fn percent_of_limit(&self, stored: DType) -> Option<f64> {
        let share = |run: &Run| {
            let peaks = run.peaks?;
            let arithmetic = peaks.bf16_gflops.filter(|_| stored == DType::Bf16).unwrap_or(peaks.gflops);
            let (work, peak) = if self.name == "decode" { (run.bytes, peaks.read_gbps) } else { (run.flops, arithmetic) };
            Some(work / run.ms / 1e4 / peak)
        };
        let mut shares: Vec<f64> = self.runs.iter().filter_map(share).collect();
        shares.sort_by(f64::total_cmp);
        shares.get(shares.len() / 2).copied()
    }

    fn json(&self, stored: DType) -> serde_json::Value {
        let ms = self.sorted_ms();
        let median = ms[ms.len() / 2];
        let run = self.runs[0];
        serde_json::json!({
            "phase": self.name, "batch_size": 1, "tokens": self.tokens, "context": self.context,
            "ms_median": median, "ms_min": ms[0], "ms_max": ms[ms.len() - 1],
            "tokens_per_second": self.tokens as f64 / median * 1e3,
            "gbps": run.bytes / median / 1e6, "tflops": run.flops / median / 1e9,
            "percent_of_limit": self.percent_of_limit(stored),
        })
    }
}

fn report(args: &Args, runner: &Runner, phases: &[Phase], stored: DType, load_ms: f64) -> Result<Outcome> {
    // Other programs only ever make a machine slower: the best of the probes is what it can do.
    let peaks = phases.iter().flat_map(|p| &p.runs).filter_map(|r| r.peaks).reduce(|a, b| Peaks {
        read_gbps: a.read_gbps.max(b.read_gbps),
        gflops: a.gflops.max(b.gflops),
        bf16_gflops: a.bf16_gflops.zip(b.bf16_gflops).map(|(a, b)| a.max(b)),
    });
    let config = runner.model().config();
    let name = args.model.as_ref().map_or_else(|| args.shape.clone().unwrap_or("llava-1.5-7b".into()), |m| m.display().to_string());
    let document = serde_json::json!({
        "machine": {
            "device": runner.ops().name(),
            "threads": args.threads,
            "read_gbps": peaks.map(|p| p.read_gbps),
            "peaks": peaks.map(|p| serde_json::json!({"f32_gflops": p.gflops, "bf16_gflops": p.bf16_gflops})),
        },
        "model": {
            "name": name, "weights": stored.to_string(), "hidden_size": config.text.hidden_size, "n_layers": config.text.n_layers,
            "load_ms": load_ms,
        },
        "rows": phases.iter().map(|p| p.json(stored)).collect::<Vec<_>>(),
        "peak_memory_bytes": peak_memory(),
    });
    if args.json {
        common::put_json(&document)?;
        return Ok(Outcome::Done);
    }
    let mut out = format!("{name}, {stored}, {} layers, on {}\n\n", config.text.n_layers, runner.ops().name());
    out += "| phase | tokens | context | ms, median (range) | tokens/s | GB/s | TFLOP/s | % of limit |\n|---|---|---|---|---|---|---|---|\n";
    for phase in phases {
        let (row, ms) = (phase.json(stored), phase.sorted_ms());
        let number = |key: &str| row[key].as_f64().unwrap_or_default();
        let percent = phase.percent_of_limit(stored).map_or("unknown".into(), |p| format!("{p:.1}"));
        out += &format!(
            "| {} | {} | {} | {:.1} ({:.1} to {:.1}) | {:.2} | {:.1} | {:.3} | {percent} |\n",
            phase.name,
            phase.tokens,
            phase.context,
            number("ms_median"),
            ms[0],
            ms[ms.len() - 1],
            number("tokens_per_second"),
            number("gbps"),
            number("tflops"),
        );
    }
    if let Some(p) = peaks {
        out += &format!("\nmeasured peaks: {:.1} GB/s read, {:.1} GFLOP/s f32", p.read_gbps, p.gflops);
        out += &p.bf16_gflops.map_or(String::new(), |g| format!(", {g:.1} GFLOP/s bf16"));
    }
    out += &peak_memory().map_or(String::new(), |bytes| format!("\npeak memory: {:.2} GB\n", bytes as f64 / 1e9));
    common::put(&out)?;
    Ok(Outcome::Done)
}

/// The most memory that this process has had resident, where the system tells (Linux).
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kb| kb * 1024)
}
