//! [`Engine`]: a LLaVA that is open and ready: what the command line, the C ABI and a program of yours use.

mod example;
mod generate;
mod score;
mod session;
mod template;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

pub use example::Example;
pub use generate::{Answer, Drafts, FinishReason, GenerateOptions, Timings, Usage};
pub use score::{Score, log_sum_exp};
pub use session::Session;
use template::Template;
pub use template::Turn;

use crate::checked::Checked;
use crate::cpu::Cpu;
use crate::cuda::Cuda;
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::image::{CHANNELS, Fit, Preprocess, RgbImage};
use crate::infer::kv::KvCache;
use crate::infer::runner::{Runner, StageObserver};
use crate::model::checkpoint::{Beside, Checkpoint};
use crate::model::config::{LlavaConfig, Profile};
use crate::model::{Llava, Slot};
use crate::ops::{GradOps, Ops, Peaks};
use crate::profile::{OpRecord, Profiled, Records};
use crate::tensor::Tensor;
use crate::text::{Prompt, Style, Tokenizer};
use crate::weights::adapter::Adapter;

/// How a model is opened.
#[derive(Clone, Debug, Default)]
pub struct EngineOptions {
    /// Where it runs.
    pub device: Device,
    /// What it computes in; `None` takes what the checkpoint stores.
    pub dtype: Option<DType>,
    /// What keys and values are kept in: f32, f16, bf16, or i8 with a scale for each token and head, which halves a context's memory;
    /// `None` takes what it computes in.
    pub kv_dtype: Option<DType>,
    /// On CUDA: whether activations are rounded to 8 bits for products of more than 8 tokens with weights of 8 bits, as the CPU always does.
    pub w8a8: bool,
    /// CPU threads; 0 for as many as the machine has.
    pub threads: usize,
    /// The language model that an `mm_projector.bin` was trained for.
    pub model_base: Option<std::path::PathBuf>,
    /// Vision tower and projector of a GGUF model; `None` takes the only such file beside it.
    pub mmproj: Option<std::path::PathBuf>,
    /// A folder of LoRA over the model, which stays as it is.
    pub lora: Option<std::path::PathBuf>,
    /// Whose preprocessing and tokenization is followed; `None` takes what the checkpoint's layout says.
    pub profile: Option<Profile>,
    /// Conversation template by name; `None` takes the checkpoint's own.
    pub template: Option<String>,
    /// Longest prompt and answer together, in tokens; `None` takes the model's own.
    pub context_tokens: Option<usize>,
    /// Contexts that the KV cache has room for, for [`Engine::into_runner`]; 0 for one.
    pub n_contexts: usize,
    /// Whether every op is timed, for [`Engine::op_records`].
    pub profile_ops: bool,
    /// Whether every op is done again by the CPU in f32, and the first that differs is an error; for debugging, and slow.
    pub check_ops: bool,
    /// Whether the results of every op are searched for NaN and infinity, and the first is an error that names its layer and op; for
    /// debugging, and slow.
    pub check_nan: bool,
}

impl EngineOptions {
    /// The files of a checkpoint that were named apart from it.
    pub fn beside(&self) -> Beside<'_> {
        Beside { model_base: self.model_base.as_deref(), mmproj: self.mmproj.as_deref() }
    }
}

/// A model on a device, with its tokenizer and templates.
pub struct Engine {
    runner: Runner,
    tokenizer: Tokenizer,
    style: Style,
    preprocess: Preprocess,
    template: Template,
    eos_token_ids: Vec<u32>,
    records: Option<Arc<Records>>,
    notes: Vec<String>,
    compute: DType,
    load_ms: f64,
    layout: String,
}

/// A prompt in the model's positions.
#[derive(Clone, Debug)]
pub struct TokenizedPrompt {
    /// What stands at each position; image features are numbered through in the order of the images.
    pub slots: Vec<Slot>,
    /// How many of the positions come from images.
    pub image_tokens: usize,
}

impl Engine {
    /// Opens a checkpoint: a folder, a GGUF file, or the name of a model on the Hugging Face hub.
    ///
    /// # Errors
    /// If the folder is not a LLaVA (the message says what it is), if a tensor is missing or ill-shaped, or if an option names
    /// something that this machine does not have.
    pub fn open(model: impl AsRef<Path>, options: &EngineOptions) -> Result<Self> {
        let start = Instant::now();
        let folder = crate::weights::hub::resolve(&model.as_ref().to_string_lossy())?;
        let mut checkpoint = Checkpoint::open(&folder, options.beside())?;
        checkpoint.weights.set_threads(options.threads);
        let config = &mut checkpoint.config;
        if let Some(tokens) = options.context_tokens {
            if tokens == 0 || tokens > config.context_tokens {
                return Err(Error::usage(format!("a context of {tokens} tokens: this model's is 1 to {}", config.context_tokens)));
            }
            config.context_tokens = tokens;
        }
        let profile = options.profile.unwrap_or(config.profile);
        if options.profile.is_some() {
            config.preprocess.fit = if profile == Profile::Original { Fit::Pad } else { Fit::Crop };
        }
        let tokenizer = match &checkpoint.gguf {
            Some(gguf) => Tokenizer::from_gguf(&gguf.path, &gguf.keys)?,
            None => Tokenizer::open(&checkpoint.tokenizer_dir)?,
        };
        let template = Template::choose(options.template.as_deref(), &folder, &checkpoint, profile)?;
        let compute = options.dtype.unwrap_or(checkpoint.dtype);
        let OpenDevice { ops, records, note } = open_device(options, compute)?;
        // A checkpoint of another dtype than asked for is converted, except to f32 on a device that takes any: widening while computing is
        // exact and free.
        let convert = ops.weight_dtype().or(options.dtype.filter(|&dtype| dtype != DType::F32));
        let adapter = options.lora.as_deref().map(Adapter::open).transpose()?;
        let model = Llava::load_adapted(&*ops, &checkpoint.config, &checkpoint.weights, adapter.as_ref(), convert)?;
        let mut eos_token_ids = checkpoint.config.eos_token_ids.clone();
        eos_token_ids.extend(tokenizer.eos().filter(|id| !checkpoint.config.eos_token_ids.contains(id)));
        Ok(Self {
            runner: Runner::new(ops, model, options.kv_dtype.unwrap_or(compute), options.n_contexts.max(1))?,
            tokenizer,
            style: match profile {
                Profile::Hf => Style::Hf,
                Profile::Original => Style::Original,
            },
            preprocess: checkpoint.config.preprocess.clone(),
            template,
            eos_token_ids,
            records,
            notes: note.into_iter().chain(checkpoint.weights.unpacked_note()).collect(),
            compute,
            load_ms: start.elapsed().as_secs_f64() * 1e3,
            layout: checkpoint.layout.to_string(),
        })
    }

    /// The model's configuration.
    pub fn config(&self) -> &LlavaConfig {
        self.runner.model().config()
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// One line on the layout that was found.
    pub fn layout(&self) -> &str {
        &self.layout
    }

    /// What it runs on.
    pub fn device_name(&self) -> String {
        self.runner.ops().name()
    }

    /// What a user should know of how it was opened: why [`Device::Auto`] did not take the GPU that the machine seems to have, or that
    /// matrices take more memory than their files.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Time that opening took, in ms.
    pub fn load_ms(&self) -> f64 {
        self.load_ms
    }

    /// Ends whatever runs when set, from any thread; what was said so far is returned. Cleared when the next run begins.
    pub fn cancel_flag(&self) -> Arc<AtomicBool> {
        self.runner.cancel_flag()
    }

    /// What each op has cost so far, if the engine was opened to time them.
    pub fn op_records(&self) -> Option<Vec<(&'static str, OpRecord)>> {
        self.records.as_ref().map(|r| r.snapshot())
    }

    /// Where the costs of ops are kept, if the engine was opened to time them.
    pub fn records(&self) -> Option<Arc<Records>> {
        self.records.clone()
    }

    /// What the device can do at best, measured now.
    pub fn measure_peaks(&self) -> Result<Peaks> {
        self.runner.ops().measure_peaks()
    }

    /// What it computes in.
    pub fn compute_dtype(&self) -> DType {
        self.compute
    }

    /// The model, its buffers and its cache, for whoever runs it without text.
    pub fn into_runner(self) -> Runner {
        self.runner
    }

    /// Shows every stage of the forward passes that follow to `observer`.
    pub fn observe(&mut self, observer: Option<StageObserver>) {
        self.runner.observe(observer);
    }

    /// Pixels of `images` as the tower takes them: f32 `[images, 3, image_size, image_size]`, made on the device.
    pub fn preprocess(&self, images: &[RgbImage]) -> Result<Tensor> {
        let (ops, side) = (self.runner.ops(), self.preprocess.crop_size);
        let mut pixels = ops.alloc(&[images.len(), CHANNELS, side, side], DType::F32)?;
        ops.preprocess(&mut pixels, images, &self.preprocess)?;
        Ok(pixels)
    }

    /// Features of `pixels` f32 `[images, 3, h, w]` on the device: `[images · tokens per image, hidden]`.
    pub fn encode_image(&mut self, pixels: &Tensor) -> Result<Tensor> {
        self.runner.encode(pixels)
    }

    /// Lays a prompt out in the model's positions, for `n_images` pictures.
    ///
    /// # Errors
    /// If the prompt has another number of places for images, or is longer than the context.
    pub fn tokenize(&self, prompt: &Prompt, n_images: usize) -> Result<TokenizedPrompt> {
        let ids = self.tokenizer.place_prompt(prompt, self.style)?;
        let marks = ids.iter().filter(|placed| placed.id.is_none()).count();
        if marks != n_images {
            return Err(Error::usage(format!("the prompt has {marks} <image> marks but {n_images} images were given")));
        }
        let tokens_per_image = self.config().tokens_per_image();
        let mut slots = Vec::new();
        let mut image_tokens = 0;
        for placed in ids {
            slots.extend(Slot::of(placed.id, image_tokens, tokens_per_image));
            image_tokens += if placed.id.is_none() { tokens_per_image } else { 0 };
        }
        let vocab_size = self.config().text.vocab_size;
        if let Some(Slot::Token(id)) = slots.iter().find(|s| matches!(s, Slot::Token(id) if *id as usize >= vocab_size)) {
            let problem =
                format!("its token {id} is outside the model's vocabulary of {vocab_size}: the tokenizer is another model's");
            return Err(Error::file("tokenizer", problem));
        }
        let (prompt_tokens, context_tokens) = (slots.len(), self.config().context_tokens);
        if prompt_tokens == 0 {
            return Err(Error::usage("the prompt is empty"));
        }
        if prompt_tokens >= context_tokens {
            return Err(Error::Context { prompt_tokens, image_tokens, context_tokens });
        }
        Ok(TokenizedPrompt { slots, image_tokens })
    }
}

/// A device that was opened.
pub struct OpenDevice {
    /// The device.
    pub ops: Box<dyn Ops>,
    /// What its ops cost, if they are to be timed.
    pub records: Option<Arc<Records>>,
    /// What a user should know of how it was chosen.
    pub note: Option<String>,
}

/// A device that computes in `compute`.
///
/// # Errors
/// If this build or this machine has no such device.
pub fn open_device(options: &EngineOptions, compute: DType) -> Result<OpenDevice> {
    let (ops, note) = open(options.device, options.threads, compute, options.w8a8)?;
    let mut ops: Box<dyn Ops> = ops;
    if options.check_ops || options.check_nan {
        let reference = || Ok::<_, Error>(Box::new(Cpu::new(options.threads, DType::F32)?) as Box<dyn Ops>);
        let reference = options.check_ops.then(reference).transpose()?;
        ops = Box::new(Checked::new(ops, reference, options.check_nan));
    }
    let mut records = None;
    if options.profile_ops {
        let profiled = Profiled::new(ops);
        records = Some(profiled.records());
        ops = Box::new(profiled);
    }
    Ok(OpenDevice { ops, records, note })
}

/// The same to train on, with nothing in front of it; and what a user should know of the choice.
///
/// # Errors
/// As [`open_device`].
pub fn open_grad_device(device: Device, threads: usize, compute: DType) -> Result<(Box<dyn GradOps>, Option<String>)> {
    open(device, threads, compute, false)
}

fn open(device: Device, threads: usize, compute: DType, w8a8: bool) -> Result<(Box<dyn GradOps>, Option<String>)> {
    let cpu = || Cpu::new(threads, compute).map(|cpu| Box::new(cpu) as Box<dyn GradOps>);
    let ops: Box<dyn GradOps> = match device {
        Device::Cpu => cpu()?,
        Device::Cuda(ordinal) => Box::new(Cuda::open(ordinal, compute)?.with_w8a8(w8a8)),
        #[cfg(llava_sim)]
        Device::Sim => Box::new(Cuda::simulated(threads, compute)?.with_w8a8(w8a8)),
        #[cfg(not(llava_sim))]
        Device::Sim => {
            return Err(Error::Unsupported("this build has no kernel simulator: it was made without a C++ compiler".into()));
        }
        Device::Auto if !Cuda::has_driver() => cpu()?,
        Device::Auto => return gpu_or(Cuda::open(0, compute).map(|cuda| cuda.with_w8a8(w8a8)), cpu),
    };
    Ok((ops, None))
}

/// The GPU if it can be used; else the CPU, and why.
fn gpu_or(gpu: Result<Cuda>, cpu: impl FnOnce() -> Result<Box<dyn GradOps>>) -> Result<(Box<dyn GradOps>, Option<String>)> {
    match gpu {
        Ok(gpu) => Ok((Box::new(gpu), None)),
        Err(error) => Ok((cpu()?, Some(format!("running on the CPU: {error}")))),
    }
}

/// Bytes that a KV cache of `tokens` tokens takes when kept in `dtype`.
pub fn kv_bytes(config: &LlavaConfig, dtype: DType, tokens: usize) -> usize {
    KvCache::bytes_per_token(config.text.n_layers, config.text.heads(), dtype) * tokens
}

#[cfg(all(test, llava_sim))]
mod tests {
    use super::*;
    use crate::cuda::driver::Faults;

    #[test]
    fn auto_takes_the_cpu_where_the_gpu_cannot_be_used_and_says_why() {
        let cpu = || Cpu::new(1, DType::F32).map(|cpu| Box::new(cpu) as Box<dyn GradOps>);
        let choose = |faults| gpu_or(Cuda::simulated_with(1, DType::F32, Faults::parse(faults).unwrap()), cpu).unwrap();
        let (ops, why) = choose("");
        assert!(ops.name().contains("simulator") && why.is_none(), "{why:?}");
        for (faults, number) in [("driver=12.9", "12.9"), ("capability=7.5", "7.5")] {
            let (ops, why) = choose(faults);
            let why = why.unwrap();
            assert_eq!(ops.name(), cpu().unwrap().name());
            assert!(why.starts_with("running on the CPU: ") && why.contains(number), "{why}");
        }
    }
}
