//! Flags and habits that subcommands share.

use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use llava_engine::device::Device;
use llava_engine::dtype::DType;
use llava_engine::engine::{Engine, EngineOptions, GenerateOptions};
use llava_engine::error::{Error, Result};
use llava_engine::image::{ImageSource, Limits, RgbImage};
use llava_engine::infer::sampler::SamplingOptions;
use llava_engine::model::config::Profile;
use llava_engine::ops::{ArithmeticPeak, Operands, Peaks, kv};

/// Which model, where, and in what numbers.
#[derive(clap::Args)]
pub struct ModelArgs {
    /// Checkpoint folder, GGUF file or Hugging Face hub id; the demo model if absent
    #[arg(long, short, env = "LLAVA_MODEL", alias = "model-path", value_name = "PATH|HF_ID")]
    pub model: Option<PathBuf>,
    /// Language model that an mm_projector.bin belongs to
    #[arg(long, env = "LLAVA_MODEL_BASE", value_name = "PATH")]
    pub model_base: Option<PathBuf>,
    /// Vision tower and projector of a GGUF model; the only such file beside it if absent
    #[arg(long, env = "LLAVA_MMPROJ", value_name = "FILE")]
    pub mmproj: Option<PathBuf>,
    /// Folder of a LoRA adapter over the model, of finetune, PEFT or LLaVA's own trainer; the model stays as it is
    #[arg(long, env = "LLAVA_LORA", value_name = "DIR")]
    pub lora: Option<PathBuf>,
    /// Where it runs: auto, cpu, cuda, cuda:N, or sim (the CUDA kernels simulated; slow)
    #[arg(long, env = "LLAVA_DEVICE", default_value = "auto")]
    pub device: String,
    /// What it computes in: auto (as stored), f32, bf16 or f16
    #[arg(long, env = "LLAVA_DTYPE", default_value = "auto")]
    pub dtype: String,
    /// What keys and values of the context are kept in: auto (what it computes in), f32, bf16, f16, or int8, which halves their memory
    #[arg(long, env = "LLAVA_KV_CACHE_DTYPE", default_value = "auto", value_name = "DTYPE")]
    pub kv_cache_dtype: String,
    /// On CUDA, rounds activations to 8 bits for products of more than 8 tokens with weights of 8 bits, which then run on integer tensor cores;
    /// the CPU always does so
    #[arg(long)]
    pub w8a8: bool,
    /// CPU threads; 0 for as many as the machine has
    #[arg(long, env = "LLAVA_THREADS", default_value_t = 0, value_name = "N")]
    pub threads: usize,
    /// Whose preprocessing and tokenization: original or hf; what the checkpoint's layout says if absent
    #[arg(long, env = "LLAVA_PREPROCESS", value_name = "PROFILE")]
    pub preprocess: Option<String>,
    /// Longest prompt and answer together, in tokens; the model's own if absent
    #[arg(long, env = "LLAVA_CONTEXT", value_name = "TOKENS")]
    pub context: Option<usize>,
    /// Prints what each op cost, to standard error
    #[arg(long)]
    pub profile: bool,
    /// Does every op again on the CPU in f32 and stops at the first that differs; for debugging, slow
    #[arg(long)]
    pub check_ops: bool,
    /// Looks for NaN and infinity after every op and stops at the first, with its layer (counted from 0, as in the checkpoint) and op; for
    /// debugging, slow
    #[arg(long)]
    pub check_nan: bool,
}

impl ModelArgs {
    /// Checks every flag before any file is read.
    pub fn options(&self, template: Option<&str>) -> Result<EngineOptions> {
        let dtype = if self.dtype == "auto" { None } else { Some(self.dtype.parse::<DType>()?) };
        let profile = self.preprocess.as_deref().map(|name| match name {
            "hf" => Ok(Profile::Hf),
            "original" => Ok(Profile::Original),
            _ => Err(Error::usage(format!("unknown preprocessing `{name}`: use original or hf"))),
        });
        if let Some(name) = template {
            llava_engine::text::Template::by_name(name)?;
        }
        Ok(EngineOptions {
            device: self.device.parse::<Device>()?,
            dtype,
            kv_dtype: kv::dtype(&self.kv_cache_dtype)?,
            w8a8: self.w8a8,
            threads: self.threads,
            model_base: self.model_base.clone(),
            mmproj: self.mmproj.clone(),
            lora: self.lora.clone(),
            profile: profile.transpose()?,
            template: template.map(str::to_owned),
            context_tokens: self.context,
            n_contexts: 1,
            profile_ops: self.profile,
            check_ops: self.check_ops,
            check_nan: self.check_nan,
        })
    }

    /// The model named, or the demo model.
    pub fn path(&self) -> Result<PathBuf> {
        self.model.clone().map_or_else(demo_model, Ok)
    }

    /// Opens the model.
    pub fn open(&self, options: &EngineOptions) -> Result<Engine> {
        let engine = Engine::open(self.path()?, options)?;
        for note in engine.notes() {
            eprintln!("llava-engine: {note}");
        }
        Ok(engine)
    }

    /// Prints the table of ops, if it was asked for.
    pub fn report_ops(&self, engine: &Engine) -> Result<()> {
        let Some(records) = engine.op_records() else { return Ok(()) };
        let peaks = engine.measure_peaks()?;
        eprintln!("\n{:<18} {:>8} {:>10} {:>8} {:>10} {:>8}", "op", "calls", "ms", "GB/s", "GFLOP/s", "% peak");
        for (op, record) in records {
            let arithmetic = record.arithmetic_ms(&peaks, engine.compute_dtype()).unwrap_or(f64::NAN) / record.ms;
            let percent = 100.0 * arithmetic.max(record.gbps() / peaks.read_gbps);
            let (calls, ms) = (record.calls, record.ms);
            eprintln!("{op:<18} {calls:>8} {ms:>10.2} {:>8.2} {:>10.1} {percent:>8.1}", record.gbps(), record.gflops());
        }
        eprintln!("measured peaks of {}: {}", engine.device_name(), peaks_text(&peaks));
        Ok(())
    }
}

/// A bar on standard error; draws nothing where that is no terminal.
pub fn progress(template: &str) -> indicatif::ProgressBar {
    let style = indicatif::ProgressStyle::with_template(template);
    indicatif::ProgressBar::new(0).with_style(style.unwrap_or_else(|_| indicatif::ProgressStyle::default_bar()))
}

/// Peaks as they stand in JSON documents: the best rate by dtype, null where it was not probed, and every probe by itself.
pub fn peaks_json(peaks: &Peaks) -> serde_json::Value {
    let probe = |p: &ArithmeticPeak| serde_json::json!({"dtype": p.operands.to_string(), "how": p.how, "gflops": p.gflops});
    serde_json::json!({
        "f32_gflops": peaks.gflops(Operands::Float(DType::F32)),
        "bf16_gflops": peaks.gflops(Operands::Float(DType::Bf16)),
        "f16_gflops": peaks.gflops(Operands::Float(DType::F16)),
        "int8_gflops": peaks.gflops(Operands::Int8),
        "probes": peaks.arithmetic.iter().map(probe).collect::<Vec<_>>(),
    })
}

/// Peaks in a line.
pub fn peaks_text(peaks: &Peaks) -> String {
    let probe = |p: &ArithmeticPeak| format!(", {:.1} GFLOP/s {} ({})", p.gflops, p.operands, p.how);
    format!("{:.1} GB/s read", peaks.read_gbps) + &peaks.arithmetic.iter().map(probe).collect::<String>()
}

/// How answers are made.
#[derive(clap::Args)]
pub struct SamplingArgs {
    /// Longest answer in tokens
    #[arg(long, default_value_t = 512, value_name = "N")]
    pub max_new_tokens: usize,
    /// 0 always takes the most probable token; higher is more varied
    #[arg(long, default_value_t = 0.2, allow_negative_numbers = true, value_name = "T")]
    pub temperature: f32,
    /// Draws from the most probable tokens that together reach this probability
    #[arg(long, default_value_t = 1.0, alias = "top_p", allow_negative_numbers = true, value_name = "P")]
    pub top_p: f32,
    /// Draws from this many of the most probable tokens; 0 for all
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub top_k: usize,
    /// Drops tokens less probable than this share of the most probable one
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true, value_name = "P")]
    pub min_p: f32,
    /// Above 1, makes tokens that have occurred less likely
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true, value_name = "X")]
    pub repetition_penalty: f32,
    /// A text that ends the answer; may be repeated
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Seed of the draws: the same seed gives the same answer
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// Guesses up to 3 tokens from what was said before and checks them in one pass; the answer is the same, sooner where it repeats
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub prompt_lookup: usize,
}

impl SamplingArgs {
    /// Checks the flags.
    pub fn options(&self) -> Result<GenerateOptions> {
        let sampling = SamplingOptions {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
        };
        let options = GenerateOptions {
            sampling,
            max_new_tokens: self.max_new_tokens,
            stop: self.stop.clone(),
            ignore_eos: false,
            prompt_lookup: self.prompt_lookup,
        };
        options.validate()?;
        Ok(options)
    }
}

/// Reads and decodes images, in order.
pub fn load_images(sources: &[String]) -> Result<Vec<RgbImage>> {
    sources.iter().map(|source| ImageSource::parse(source)?.load(&Limits::default())).collect()
}

/// `text`, or standard input where it is `-`.
pub fn text_or_stdin(text: &str) -> Result<String> {
    if text != "-" {
        return Ok(text.to_owned());
    }
    let mut input = String::new();
    std::io::stdin().read_to_string(&mut input).map_err(|e| Error::io("standard input", e))?;
    Ok(input.trim_end_matches(['\n', '\r']).to_owned())
}

/// Writes to standard output at once.
pub fn put(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|e| Error::io("standard output", e))
}

/// Writes one JSON document to standard output.
pub fn put_json(value: &impl serde::Serialize) -> Result<()> {
    let json = serde_json::to_string_pretty(value).map_err(|e| Error::io("standard output", e.into()))?;
    put(&(json + "\n"))
}

/// First Ctrl-C ends the answer after its token; the second ends the program.
pub fn cancel_on_ctrl_c(flag: Arc<AtomicBool>) {
    // A handler that cannot be set leaves the system's own, which ends the program: nothing to report.
    let _ = ctrlc::set_handler(move || {
        // Every answer clears the flag when it begins: only a second Ctrl-C within one ends the program.
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(i32::from(super::INTERRUPTED));
        }
    });
}

/// Bytes of memory that this process has resident, `VmRSS` now and `VmHWM` at most, where the system tells (Linux).
pub fn memory(which: &str) -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(which)?.strip_prefix(':'))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<usize>().ok().map(|kb| kb * 1024)
}

/// Whether somebody watches standard output.
pub fn is_interactive() -> bool {
    std::io::stdout().is_terminal()
}

/// A message with line breaks and control characters taken out: one line on the terminal, whatever a file's name holds.
pub fn one_line(message: &str) -> String {
    message.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// The model that ships with the project: beside the binary, in the installation's share folder, or in the source tree.
pub fn demo_model() -> Result<PathBuf> {
    let exe = std::env::current_exe().and_then(std::fs::canonicalize).unwrap_or_default();
    let beside = exe.ancestors().skip(1).flat_map(|dir| [dir.join("models/demo"), dir.join("share/llava-engine/demo")]);
    let source_tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    let found = beside.chain([source_tree]).find(|dir| dir.join("config.json").is_file());
    found.ok_or_else(|| Error::usage("the demo model was not found beside the binary: name a model with --model"))
}
