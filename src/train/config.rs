//! [`Config`]: all settings of a run. A preset, then a file, then flags say what they are.
//!
//! A setting is one line of the macro below. From it come the key of the TOML file, the flag of the command line (`projector_lr` is
//! `--projector-lr`) and its help.

mod presets;
mod setting;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

pub use presets::PRESETS;
pub use setting::Setting;
use setting::{FromFlag, one_line};

use super::sampler::Grouping;
use super::schedule::Decay;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::text::Template;

/// The words of a setting that has some to choose from.
macro_rules! choice {
    ($(#[doc = $doc:literal])+ $name:ident: $($(#[doc = $variant_doc:literal])+ $variant:ident)+) => {
        $(#[doc = $doc])+
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "lowercase")]
        pub enum $name { $($(#[doc = $variant_doc])+ $variant,)+ }
    };
}

choice! {
    /// What a run begins with.
    Init:
        /// The model's weights.
        Checkpoint
        /// Weights that are drawn; of the model, no more is needed than its configuration, tokenizer and preprocessing.
        Random
}
choice! {
    /// A stage of LLaVA's training.
    Stage:
        /// The projector learns to show pictures to the decoder.
        Pretrain
        /// The model learns to follow instructions.
        Instruct
}
choice! {
    /// What of decoder and projector learns.
    Tune:
        /// The projector alone.
        Projector
        /// Low-rank additions to the decoder's matrices, and the projector.
        Lora
        /// All of both.
        Full
}
choice! {
    /// What of the vision tower learns.
    TuneVision:
        /// Nothing.
        Off
        /// Low-rank additions to its matrices.
        Lora
        /// All of it.
        Full
}
choice! {
    /// What a run computes in.
    Precision:
        /// 32 bits.
        F32
        /// 16 bits with the range of 32; the weights that learn are kept in f32 as well.
        Bf16
        /// 16 bits of more precision and less range, so that the loss is scaled; else as bf16.
        F16
}
choice! {
    /// Which activations are computed again on the way back instead of being kept.
    Recompute:
        /// None.
        None
        /// Those that are cheap for their size.
        Selective
        /// All of a layer but its input.
        Full
}
choice! {
    /// How pictures become square.
    AspectRatio:
        /// Their sides are filled up.
        Pad
        /// Their middle is cut out.
        Square
}

impl Precision {
    /// Number format in which products read weights that learn; on a GPU, of all matrices, activations and their gradients.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::Bf16,
            Self::F16 => DType::F16,
        }
    }
}

macro_rules! config {
    ($($(#[doc = $help:literal])+ $key:ident: $type:ty = $default:expr;)+) => {
        /// All settings of a run; see `src/train/config.rs` for what each defaults to.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct Config { $($(#[doc = $help])+ pub $key: $type,)+ }

        // A setting that may be absent must be so here: a table cannot say that it is, and what it does not have is taken from here.
        impl Default for Config {
            fn default() -> Self { Self { $($key: $default,)+ } }
        }

        /// All settings, in the order of their list.
        pub const SETTINGS: &[Setting] = &[$(Setting {
            key: stringify!($key),
            help: concat!($($help),+).trim_ascii(),
            value_name: <$type as FromFlag>::VALUE_NAME,
            parse: <$type as FromFlag>::parse,
        },)+];
    };
}

config! {
    /// Settings to begin with: llava-1.5-pretrain, llava-1.5-finetune, llava-1.5-lora, llava-1.5-task-lora, llava-1-pretrain, llava-1-qlora
    preset: Option<String> = None;
    /// Files of rows, LLaVA-Instruct JSON or JSONL; may be repeated
    data: Vec<PathBuf> = Vec::new();
    /// Folder that the paths of pictures begin in; that of the file of rows if absent
    image_folder: Option<PathBuf> = None;
    /// Files of rows to evaluate by; may be repeated
    eval_data: Vec<PathBuf> = Vec::new();
    /// Share of the rows to hold out and evaluate by
    eval_share: f64 = 0.0;
    /// Folder for checkpoints and the result
    output: Option<PathBuf> = None;

    /// What it begins with: checkpoint, or random, for which the model's folder needs no weights, only config.json, tokenizer and preprocessor; they are drawn into a file in the temporary folder (TMPDIR)
    init: Init = Init::Checkpoint;
    /// What is trained: pretrain (the projector, by captions) or instruct
    stage: Stage = Stage::Instruct;
    /// What of decoder and projector learns: projector, lora (with the projector) or full
    tune: Tune = Tune::Lora;
    /// What of the vision tower learns: off, lora or full
    tune_vision: TuneVision = TuneVision::Off;
    /// Bits of the decoder's matrices under LoRA: 16, 8 or 4 (QLoRA)
    base_bits: u64 = 16;
    /// Conversation template; plain to pretrain and the checkpoint's own to instruct if absent
    template: Option<String> = None;
    /// How pictures become square: pad or square; the checkpoint's own way if absent
    image_aspect_ratio: Option<AspectRatio> = None;

    /// Rank of LoRA
    lora_r: u64 = 128;
    /// Scale of LoRA, times its rank
    lora_alpha: f64 = 256.0;
    /// Share of LoRA's inputs that is dropped
    lora_dropout: f64 = 0.05;
    /// Matrices that LoRA adds to, of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj
    lora_targets: Vec<String> = LORA_TARGETS.map(str::to_owned).to_vec();

    /// Learning rate
    lr: f64 = 2e-4;
    /// Learning rate of the projector; the common one if absent
    projector_lr: Option<f64> = None;
    /// Learning rate of the vision tower; the common one if absent
    vision_lr: Option<f64> = None;
    /// Course of the learning rate: constant, linear or cosine
    schedule: Decay = Decay::Cosine;
    /// Share of the steps in which the learning rate rises
    warmup_ratio: f64 = 0.03;
    /// Steps in which the learning rate rises, if not a share of them
    warmup_steps: u64 = 0;
    /// Weight decay of AdamW
    weight_decay: f64 = 0.0;
    /// How much of the mean of gradients AdamW keeps from step to step
    beta1: f64 = 0.9;
    /// How much of the mean of their squares AdamW keeps
    beta2: f64 = 0.999;
    /// What AdamW adds to the root of that
    adam_eps: f64 = 1e-8;
    /// Norm that gradients are cut down to; 0 leaves them
    max_grad_norm: f64 = 1.0;

    /// Times that all rows are learnt
    epochs: f64 = 1.0;
    /// Steps after which the run ends, if before its epochs; 0 for no such limit
    max_steps: u64 = 0;
    /// Rows that go through the model at once
    batch_size: u64 = 16;
    /// Batches of a step
    accumulation: u64 = 8;
    /// Positions of the longest row, images included; longer ones are cut off
    max_tokens: u64 = 2048;
    /// Which rows come together: none (by chance), modality (with pictures or without, of similar lengths) or packed
    grouping: Grouping = Grouping::Modality;
    /// Tokens of a packed batch; as many as the longest row if 0
    pack_tokens: u64 = 0;
    /// What it computes in: f32, bf16 or f16 (with a loss scale). Weights that learn are kept in f32 as well, for their steps. A CPU takes it for these alone: others stay as they are stored, and activations are f32
    dtype: Precision = Precision::Bf16;
    /// Which activations are computed twice instead of being kept: none, selective (norms and activation functions) or full (layers)
    recompute: Recompute = Recompute::Full;
    /// Seed of the order of rows, of random weights, of LoRA's beginnings and of what is dropped
    seed: u64 = 42;

    /// Steps from line to line of the log
    log_steps: u64 = 1;
    /// Steps from checkpoint to checkpoint; 0 for none between the steps
    save_steps: u64 = 50_000;
    /// Checkpoints that are kept
    keep: u64 = 1;
    /// Steps from evaluation to evaluation; 0 for one at the end
    eval_steps: u64 = 0;
}

/// The decoder's linear layers, which LLaVA's own script adds LoRA to.
const LORA_TARGETS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// Rows of a batch, batches of a step, and ranks: more are a slip of the hand.
const MAX_COUNT: u64 = 1 << 16;

impl Config {
    /// The settings of a run: those of a preset, over them those of a TOML file, over them those of flags. The preset is the one that the
    /// flags name, else the one that the file names; else the numbers are those of LLaVA-1.5's script for such a stage and such tuning.
    ///
    /// # Errors
    /// If the file cannot be read, is no TOML or has a key that is no setting; if a value is of another kind; if
    /// [`validate`](Self::validate) refuses the result.
    pub fn resolve(file: Option<&Path>, flags: Table) -> Result<Self> {
        let table = file.map_or_else(|| Ok(Table::new()), read)?;
        let word = |key: &str| flags.get(key).or(table.get(key)).and_then(Value::as_str);
        let base = match (word("preset"), word("stage"), word("tune")) {
            (Some(preset), _, _) => Self::preset(preset)?,
            (None, Some("pretrain"), _) => Self::preset("llava-1.5-pretrain")?.unnamed(),
            (None, _, Some("full")) => Self::preset("llava-1.5-finetune")?.unnamed(),
            // Of its own rate, which that of LoRA's script is, a flag --lr would say nothing.
            (None, _, Some("projector")) => Self { projector_lr: None, ..Self::preset("llava-1.5-lora")?.unnamed() },
            _ => Self::preset("llava-1.5-lora")?.unnamed(),
        };
        let mut all = base.table();
        all.extend(table);
        all.extend(flags);
        let config: Self = all.try_into().map_err(|e: toml::de::Error| Error::usage(one_line(&e)))?;
        config.validate()?;
        Ok(config)
    }

    /// A preset's numbers, for a checkpoint of any kind.
    fn unnamed(self) -> Self {
        Self { preset: None, template: None, image_aspect_ratio: None, ..self }
    }

    /// The settings as a TOML file has them.
    pub fn to_toml(&self) -> String {
        self.table().to_string()
    }

    /// The settings of a TOML file's text, for the checkpoint that it came with.
    ///
    /// # Errors
    /// If it is no TOML or has a key that is no setting.
    pub fn from_toml(path: &Path, text: &str) -> Result<Self> {
        toml::from_str(text).map_err(|e| {
            let line = e.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            let place = line.map(|line| format!("line {line}: ")).unwrap_or_default();
            Error::file(path, format!("{place}{}", one_line(&e)))
        })
    }

    /// What differs from the settings of another run, but for those in `ignored`: `lr: 0.0002 there, 0.0001 here`.
    pub fn differences(&self, there: &Self, ignored: &[&str]) -> Vec<String> {
        let (here, there) = (self.table(), there.table());
        let value = |table: &Table, key: &str| table.get(key).map_or("unset".to_owned(), Value::to_string);
        let differing = SETTINGS.iter().filter(|s| here.get(s.key) != there.get(s.key) && !ignored.contains(&s.key));
        differing.map(|s| format!("{}: {} there, {} here", s.key, value(&there, s.key), value(&here, s.key))).collect()
    }

    /// Whether anything learns by low-rank additions, so that the result is an adapter.
    pub fn has_lora(&self) -> bool {
        self.tune == Tune::Lora || self.tune_vision == TuneVision::Lora
    }

    /// The conversation template, unless it is the checkpoint's own.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn template(&self) -> Result<Option<&'static Template>> {
        let name = self.template.as_deref().or((self.stage == Stage::Pretrain).then_some("plain"));
        name.map(Template::by_name).transpose()
    }

    fn table(&self) -> Table {
        // Fails only for what TOML cannot say; of the kinds above there is nothing, but numbers beyond i64, which `validate` refuses.
        Table::try_from(self).unwrap_or_default()
    }

    /// Refuses settings that make no sense, by themselves or together.
    ///
    /// # Errors
    /// [`Error::Usage`] with the setting and what it may be.
    pub fn validate(&self) -> Result<()> {
        let check = |key: &str, value: f64, ok: bool, accepted: &str| {
            if ok { Ok(()) } else { Err(Error::usage(format!("{key} = {value} makes no sense: it must be {accepted}"))) }
        };
        let rates = [("lr", Some(self.lr)), ("projector_lr", self.projector_lr), ("vision_lr", self.vision_lr)];
        for (key, rate) in rates.iter().filter_map(|(key, rate)| rate.map(|rate| (key, rate))) {
            check(key, rate, rate.is_finite() && rate > 0.0, "a number above 0")?;
        }
        for (key, x) in [("weight_decay", self.weight_decay), ("max_grad_norm", self.max_grad_norm)] {
            check(key, x, x.is_finite() && x >= 0.0, "0 or more")?;
        }
        for (key, x) in
            [("beta1", self.beta1), ("beta2", self.beta2), ("lora_dropout", self.lora_dropout), ("eval_share", self.eval_share)]
        {
            check(key, x, (0.0..1.0).contains(&x), "at least 0 and below 1")?;
        }
        for (key, x) in [("adam_eps", self.adam_eps), ("epochs", self.epochs), ("lora_alpha", self.lora_alpha)] {
            check(key, x, x.is_finite() && x > 0.0, "a number above 0")?;
        }
        check("warmup_ratio", self.warmup_ratio, (0.0..=1.0).contains(&self.warmup_ratio), "between 0 and 1")?;
        let counts = [
            ("lora_r", self.lora_r),
            ("batch_size", self.batch_size),
            ("accumulation", self.accumulation),
            ("max_tokens", self.max_tokens),
            ("log_steps", self.log_steps),
            ("keep", self.keep),
        ];
        for (key, n) in counts {
            check(key, n as f64, n > 0, "at least 1")?;
        }
        for (key, n) in [("batch_size", self.batch_size), ("accumulation", self.accumulation), ("lora_r", self.lora_r)] {
            check(key, n as f64, n <= MAX_COUNT, "at most 65536")?;
        }
        let all =
            [self.seed, self.warmup_steps, self.max_steps, self.pack_tokens, self.save_steps, self.eval_steps, self.base_bits];
        if let Some(n) = all.iter().chain(counts.iter().map(|(_, n)| n)).find(|n| i64::try_from(**n).is_err()) {
            return Err(Error::usage(format!("{n} is beyond the numbers that a setting may have")));
        }
        self.validate_together()
    }

    /// Settings that do not go together.
    fn validate_together(&self) -> Result<()> {
        let refuse = |problem: &str| Err(Error::usage(problem));
        self.template()?;
        if self.stage == Stage::Pretrain && (self.tune != Tune::Projector || self.tune_vision != TuneVision::Off) {
            return refuse("stage = pretrain trains the projector alone: take tune = projector and tune_vision = off");
        }
        if self.tune == Tune::Full && self.tune_vision == TuneVision::Lora {
            return refuse("a decoder that learns whole leaves no adapter: take tune_vision = full or off, or tune = lora");
        }
        if self.init == Init::Random && self.has_lora() {
            return refuse(
                "init = random has nothing that additions of low rank could build on: take tune = full or projector, and tune_vision = full or off",
            );
        }
        if ![16, 8, 4].contains(&self.base_bits) {
            return refuse(&format!("base_bits = {} makes no sense: it must be 16, 8 or 4", self.base_bits));
        }
        if self.base_bits != 16 && self.tune != Tune::Lora {
            return refuse("a base of 8 or 4 bits does not learn: take tune = lora");
        }
        if let Some(name) = self.lora_targets.iter().find(|name| !LORA_TARGETS.contains(&name.as_str())) {
            return refuse(&format!("lora_targets: no matrix is called `{name}`; there are {}", LORA_TARGETS.join(", ")));
        }
        if self.lora_targets.is_empty() && self.tune == Tune::Lora {
            return refuse("lora_targets is empty: LoRA would learn nothing");
        }
        if self.eval_share > 0.0 && !self.eval_data.is_empty() {
            return refuse("eval_share and eval_data are both set: evaluate by rows that are held out, or by files of their own");
        }
        if self.eval_steps > 0 && self.eval_share == 0.0 && self.eval_data.is_empty() {
            return refuse("eval_steps is set, but there is nothing to evaluate by: set eval_share or eval_data");
        }
        if self.pack_tokens > 0 && self.grouping != Grouping::Packed {
            return refuse("pack_tokens is set, but nothing is packed: take grouping = packed");
        }
        Ok(())
    }
}

/// The keys and values of a TOML file, all of them settings.
fn read(path: &Path) -> Result<Table> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    // As a whole first, which checks keys and kinds with their lines.
    Config::from_toml(path, &text)?;
    toml::from_str(&text).map_err(|e| Error::file(path, one_line(&e)))
}
