//! Low-rank additions (LoRA) of a run: how they begin ([`begin`]), and the folder that they are left in ([`save`]).

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::json;

use super::config::{Config, Tune, TuneVision};
use super::run::learns_whole;
use crate::error::{Error, Result};
use crate::model::Llava;
use crate::model::checkpoint::{Checkpoint, Layout};
use crate::model::config::LlavaConfig;
use crate::ops::dropout::philox;
use crate::ops::{GradOps, Packed};
use crate::tensor::Tensor;
use crate::weights::names::{self, Dialect, Part};
use crate::weights::write::{self, Planned};
use crate::weights::{Learned, LowRank, Source, adapter, torch_write};

/// Matrices of the vision tower that LoRA adds to: all of its layers.
const TOWER_TARGETS: [&str; 6] = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"];

/// The model of a run, before its first step. Matrices stay as they are stored, packed ones too, but for a projector that is to learn.
///
/// # Errors
/// If it cannot be loaded; if its matrices have other bits than the settings say.
pub fn begin(ops: &dyn GradOps, config: &Config, shape: &LlavaConfig, base: &dyn Source) -> Result<Llava> {
    let source = Fresh { base, config };
    let mut model = Llava::load(ops, shape, &source, ops.weight_dtype())?;
    let (stored, bits) = (model.llama().weights(), config.base_bits);
    if bits != 16 && !stored.starts_with(&format!("int{bits}")) {
        let what = format!("base_bits is {bits}, but the matrices of the base are {stored}");
        return Err(Error::usage(format!("{what}: make a base of {bits} bits with `llava-engine quantize --bits {bits}` first")));
    }
    if config.has_lora() {
        model.unpack_projector(ops)?;
    }
    Ok(model)
}

/// A model with additions that add nothing yet.
struct Fresh<'a> {
    base: &'a dyn Source,
    config: &'a Config,
}

impl Fresh<'_> {
    fn adds_to(&self, module: &str) -> bool {
        let leaf = module.rsplit('.').next().unwrap_or(module);
        match Part::of(module) {
            Some(Part::Llama) => {
                let is_target = self.config.lora_targets.iter().any(|target| target == leaf);
                self.config.tune == Tune::Lora && module.starts_with("llama.layers.") && is_target
            }
            Some(Part::Clip) => self.config.tune_vision == TuneVision::Lora && TOWER_TARGETS.contains(&leaf),
            Some(Part::Projector) | None => false,
        }
    }
}

impl Source for Fresh<'_> {
    fn tensor(&self, canonical: &str, shape: &[usize]) -> Result<Tensor> {
        self.base.tensor(canonical, shape)
    }

    fn packed(&self, module: &str, n: usize, k: usize) -> Result<Option<Packed>> {
        self.base.packed(module, n, k)
    }

    fn learns(&self, canonical: &str) -> bool {
        learns_whole(self.config, canonical)
    }

    /// A as PEFT begins it, by Kaiming's rule with a = √5, which comes to U(−1/√k, 1/√k); B = 0.
    fn low_rank(&self, module: &str, n: usize, k: usize) -> Result<Option<LowRank>> {
        if !self.adds_to(module) {
            return Ok(None);
        }
        let (r, seed) = (self.config.lora_r as usize, seed(self.config.seed, module));
        let bound = 1.0 / (k as f64).sqrt();
        let key = [seed as u32, (seed >> 32) as u32];
        // Apart from the bits that dropout takes from the same generator: their counters have zeros there.
        let words = (0..(r * k).div_ceil(4)).flat_map(|block| philox([block as u32, (block >> 32) as u32, 1, 0], key));
        let uniform = |word: u32| ((f64::from(word) + 0.5) / 2f64.powi(31) - 1.0) * bound;
        let a: Vec<f32> = words.take(r * k).map(|word| uniform(word) as f32).collect();
        Ok(Some(LowRank {
            a: Tensor::from_slice(&[r, k], &a),
            b: Tensor::from_slice(&[n, r], &vec![0f32; n * r]),
            scale: (self.config.lora_alpha / r as f64) as f32,
            learned: Some(Learned { dropout: self.config.lora_dropout as f32, seed }),
        }))
    }
}

/// Parameters that a run adds to the decoder and to the tower.
pub fn n_added(config: &Config, model: &LlavaConfig) -> [usize; 2] {
    let (t, v, r) = (&model.text, &model.vision, config.lora_r as usize);
    let (heads, hidden, n_mlp) = (t.heads(), t.hidden_size, t.intermediate_size);
    let sum = |module: &str| match module {
        "q_proj" | "o_proj" => hidden + heads.q_width(),
        "k_proj" | "v_proj" => hidden + heads.kv_width(),
        _ => hidden + n_mlp,
    };
    let decoder: usize = config.lora_targets.iter().map(|module| sum(module)).sum();
    let tower = 4 * 2 * v.hidden_size + 2 * (v.hidden_size + v.intermediate_size);
    let has = |lora: bool| usize::from(lora) * r;
    [
        has(config.tune == Tune::Lora) * decoder * t.n_layers,
        has(config.tune_vision == TuneVision::Lora) * tower * model.n_vision_layers,
    ]
}

/// A number of a run's seed and a module's name: FNV-1a of both.
fn seed(seed: u64, module: &str) -> u64 {
    let bytes = seed.to_le_bytes().into_iter().chain(module.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// What a dialect calls a tensor that was learned whole.
pub fn spelling(checkpoint: &Checkpoint, canonical: &str, dialect: Dialect) -> String {
    // A projector of one layer may have no number: then it has none in the base.
    match checkpoint.weights.source(canonical).and_then(|source| source.split_once("mm_projector.")) {
        Some((_, end)) => format!("model.mm_projector.{end}"),
        None => names::spelling(canonical, dialect),
    }
}

/// Writes what was learned over the checkpoint from the folder `model` into the folder `output`, f32, as PEFT reads it over transformers'
/// LLaVA; over an original LLaVA with the projector in a file of its own and the configuration beside it, as that reads it.
///
/// # Errors
/// If the folder cannot be written.
pub fn save(
    config: &Config,
    checkpoint: &Checkpoint,
    learned: BTreeMap<String, Tensor>,
    model: &Path,
    output: &Path,
) -> Result<()> {
    let dialect = match checkpoint.layout {
        Layout::Original { .. } | Layout::ProjectorOverBase { .. } => Dialect::Original,
        Layout::Hf { .. } | Layout::Gguf { .. } => Dialect::Hf,
    };
    let (mut factors, mut whole) = (Vec::new(), Vec::new());
    for (canonical, tensor) in learned {
        let of_factor = |factor: &str| canonical.strip_suffix(&format!(".lora_{}.weight", factor.to_lowercase()));
        match ["A", "B"].into_iter().find_map(|factor| Some((of_factor(factor)?, factor))) {
            Some((module, factor)) => {
                let name = names::spelling(&format!("{module}.weight"), dialect);
                let module = name.strip_suffix(".weight").unwrap_or(&name);
                factors.push((format!("{}{module}.lora_{factor}.weight", adapter::PREFIX), tensor));
            }
            None => {
                // A convolution's kernel is a matrix here.
                let shape = checkpoint.weights.shape(&canonical).filter(|shape| shape.iter().product::<usize>() == tensor.len());
                let shape = shape.map_or_else(|| tensor.shape().to_vec(), <[usize]>::to_vec);
                let name = format!("{}{}", adapter::PREFIX, spelling(checkpoint, &canonical, dialect));
                whole.push((name, tensor.reshaped(&shape)?));
            }
        }
    }
    let file = |stem: &str, extension: &str| output.join(format!("{stem}.{extension}"));
    match dialect {
        Dialect::Hf => factors.extend(whole),
        Dialect::Original => torch_write::write(&file(adapter::WHOLE, "bin"), &whole)?,
    }
    let planned =
        |(name, tensor): &(String, Tensor)| Planned { name: name.clone(), shape: tensor.shape().to_vec(), dtype: tensor.dtype() };
    let planned: Vec<_> = factors.iter().map(planned).collect();
    let mut writer = write::Writer::create(&file(adapter::FACTORS, "safetensors"), &planned)?;
    factors.iter().try_for_each(|(name, tensor)| writer.write(name, tensor.as_bytes()))?;
    writer.finish()?;
    if dialect == Dialect::Original {
        let [from, to] = [model, output].map(|folder| folder.join("config.json"));
        write::copy_whole(&from, &to)?;
    }
    write::sync_folder(output)?;
    let path = output.join(adapter::CONFIG);
    let text =
        serde_json::to_string_pretty(&configuration(config, checkpoint, dialect, model)).map_err(|e| Error::file(&path, e))?;
    write::write_whole(&path, (text + "\n").as_bytes())
}

/// What PEFT needs to know. Modules are told by regular expressions: names alone (`q_proj`) would hit the vision tower too.
fn configuration(config: &Config, checkpoint: &Checkpoint, dialect: Dialect, model: &Path) -> serde_json::Value {
    let decoder = match dialect {
        Dialect::Hf => r".*language_model\..*",
        Dialect::Original => r"model\.layers\..*",
    };
    let mut targets = Vec::new();
    if config.tune == Tune::Lora {
        targets.push(format!(r"{decoder}\.({})", config.lora_targets.join("|")));
    }
    if config.tune_vision == TuneVision::Lora {
        targets.push(format!(r".*vision_tower\..*\.({})", TOWER_TARGETS.join("|")));
    }
    let mut whole = vec!["multi_modal_projector".to_owned()];
    if config.tune_vision == TuneVision::Full {
        // Module by module: PEFT wants all of one, and LLaVA does not run all of the tower.
        whole.extend(["vision_tower.embeddings", "vision_tower.pre_layrnorm"].map(str::to_owned));
        whole.extend((0..checkpoint.config.n_vision_layers).map(|layer| format!("vision_tower.encoder.layers.{layer}")));
    }
    json!({
        "alpha_pattern": {},
        "base_model_name_or_path": model.to_string_lossy(),
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": if dialect == Dialect::Hf { json!(whole) } else { json!(null) },
        "peft_type": "LORA",
        "r": config.lora_r,
        "rank_pattern": {},
        "target_modules": targets.join("|"),
        "task_type": if dialect == Dialect::Hf { json!(null) } else { json!("CAUSAL_LM") },
        "use_dora": false,
        "use_rslora": false,
    })
}
