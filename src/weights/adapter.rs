//! [`Adapter`]: low-rank additions to a model (LoRA) and what was trained whole beside them, in a folder of PEFT or of LLaVA's own trainer.
//!
//! | file | holds |
//! |---|---|
//! | `adapter_config.json` | ranks, scales, and whatever else changes what the factors mean |
//! | `adapter_model.safetensors` or `.bin` | the factors, and modules that PEFT was told to save whole |
//! | `non_lora_trainables.safetensors` or `.bin` | modules that LLaVA's trainer has trained whole: the projector |
//!
//! Factors are called `MODULE.lora_a.weight` and `MODULE.lora_b.weight` here, MODULE by its canonical name. Whatever an adapter says that has
//! no equal here is refused by its name: nothing is left out in silence.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{LowRank, Source, Store, files, names};
use crate::error::{Error, Result};
use crate::ops::Packed;
use crate::tensor::Tensor;

/// What PEFT puts in front of a module's name.
pub const PREFIX: &str = "base_model.model.";
/// What an adapter's configuration is called.
pub const CONFIG: &str = "adapter_config.json";
/// What its factors are called, without an extension.
pub const FACTORS: &str = "adapter_model";
/// What LLaVA's trainer calls the file of all else that it has trained, without an extension.
pub const WHOLE: &str = "non_lora_trainables";

/// An opened adapter. Its tensors are mapped, not read.
#[derive(Debug)]
pub struct Adapter {
    root: PathBuf,
    config: Config,
    store: Store,
    /// Canonical names of tensors that somebody has asked for.
    taken: Mutex<BTreeSet<String>>,
}

/// `adapter_config.json`, as PEFT 0.21 and those before it write it.
#[derive(Debug, Deserialize)]
struct Config {
    peft_type: Option<String>,
    r: usize,
    lora_alpha: f32,
    #[serde(default)]
    use_rslora: Option<bool>,
    #[serde(default)]
    rank_pattern: Option<Map<String, Value>>,
    #[serde(default)]
    alpha_pattern: Option<Map<String, Value>>,
    #[serde(default)]
    bias: Option<String>,
    #[serde(default)]
    init_lora_weights: Value,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// Keys that say nothing of what the factors mean: which modules have some is told by the tensors, the rest is for training.
const HARMLESS: [&str; 21] = [
    "arrow_config",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
];

/// Beginnings of factors that leave the base as it is. Others (`pissa`, `olora`, `loftq`, `corda`) change it.
const HARMLESS_BEGINNINGS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

impl Config {
    /// Refuses what has no equal here.
    fn check(&self) -> Result<(), String> {
        if let Some(kind) = self.peft_type.as_deref().filter(|kind| *kind != "LORA") {
            return Err(format!("`peft_type` is {kind}: of PEFT's adapters, LORA is supported"));
        }
        if self.r == 0 {
            return Err("`r` is 0: an adapter has at least rank 1".to_owned());
        }
        if !self.lora_alpha.is_finite() {
            return Err(format!("`lora_alpha` is {}: expected a number", self.lora_alpha));
        }
        if let Some(bias) = self.bias.as_deref().filter(|bias| *bias != "none") {
            return Err(format!("`bias` is {bias}: adapters that change biases are not supported"));
        }
        match &self.init_lora_weights {
            Value::Null | Value::Bool(_) => {}
            Value::String(name) if HARMLESS_BEGINNINGS.contains(&name.as_str()) => {}
            other => return Err(format!("`init_lora_weights` is {other}, which changes the base model: not supported")),
        }
        let is_off = |value: &Value| match value {
            Value::Null | Value::Bool(false) => true,
            Value::Object(map) => map.is_empty(),
            Value::Array(list) => list.is_empty(),
            _ => false,
        };
        if let Some((key, _)) = self.rest.iter().find(|(key, value)| !HARMLESS.contains(&key.as_str()) && !is_off(value)) {
            return Err(format!("`{}` is set: adapters with it are not supported", key.escape_debug()));
        }
        for (key, patterns) in [("rank_pattern", &self.rank_pattern), ("alpha_pattern", &self.alpha_pattern)] {
            for (pattern, value) in patterns.iter().flatten() {
                let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
                if !pattern.chars().all(is_name) {
                    let pattern = pattern.escape_debug();
                    return Err(format!(
                        "`{key}` has `{pattern}`: names of modules are supported there, regular expressions are not"
                    ));
                }
                if !value.as_f64().is_some_and(|value| value.is_finite() && (value >= 1.0 || key == "alpha_pattern")) {
                    return Err(format!("`{key}` has {value} for `{pattern}`: expected a number"));
                }
            }
        }
        Ok(())
    }

    /// Rank and scale of the module that PEFT calls `name`.
    fn of(&self, name: &str) -> (usize, f32) {
        // The first that is the name, or its end.
        let pattern = |patterns: &Option<Map<String, Value>>| {
            let ends_so = |pattern: &str| name.strip_suffix(pattern).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
            patterns.iter().flatten().find(|(pattern, _)| ends_so(pattern)).and_then(|(_, value)| value.as_f64())
        };
        let rank = pattern(&self.rank_pattern).map_or(self.r, |rank| rank as usize);
        let alpha = pattern(&self.alpha_pattern).map_or(self.lora_alpha, |alpha| alpha as f32);
        let by = if self.use_rslora == Some(true) { (rank as f32).sqrt() } else { rank as f32 };
        (rank, alpha / by)
    }
}

impl Adapter {
    /// Opens the adapter in the folder `root`.
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be read; [`Error::File`] if one is missing or malformed, or says what is not supported;
    /// [`Error::Tensor`] for a tensor that belongs to nothing in a LLaVA.
    pub fn open(root: &Path) -> Result<Self> {
        let names = files::list(root)?;
        let path = root.join(CONFIG);
        let config = files::json(&path)?.ok_or_else(|| {
            let what = if names.iter().any(|name| name == "config.json") { "a checkpoint" } else { "a folder without it" };
            Error::file(root, format!("no {CONFIG}, so no LoRA adapter but {what}"))
        })?;
        let config: Config = serde_json::from_value(Value::Object(config)).map_err(|e| Error::file(&path, e))?;
        config.check().map_err(|problem| Error::file(&path, problem))?;
        let file = |stem: &str| {
            let named = [format!("{stem}.safetensors"), format!("{stem}.bin")];
            named.into_iter().find(|name| names.contains(name)).map(|name| root.join(name))
        };
        let factors = file(FACTORS)
            .ok_or_else(|| Error::file(root, format!("an {CONFIG} without its factors: no {FACTORS}.safetensors and no .bin")))?;
        let mut store = Store::new(root);
        store.add_as(&factors, canonical)?;
        let whole = file(WHOLE);
        if let Some(whole) = &whole {
            store.add_as(whole, canonical)?;
        }
        // LLaVA's trainer leaves the model's configuration beside its adapters, and has always trained the projector.
        let model = files::json(&root.join("config.json"))?.unwrap_or_default();
        if model.contains_key("mm_projector_type") && whole.is_none() && !store.has_part(names::Part::Projector) {
            let problem = format!("{WHOLE}.bin is missing, in which LLaVA's trainer leaves the projector: copy it here");
            return Err(Error::file(root, problem));
        }
        Ok(Self { root: root.to_owned(), config, store, taken: Mutex::default() })
    }

    /// A model with the adapter over it.
    pub fn over<'a>(&'a self, base: &'a dyn Source) -> Adapted<'a> {
        Adapted { base, adapter: self }
    }

    /// Whether the adapter has a tensor in place of the base's of this canonical name.
    pub fn replaces(&self, canonical: &str) -> bool {
        self.store.contains(canonical)
    }

    /// Checks that all its tensors were asked for, but for those that `is_spare` knows.
    ///
    /// # Errors
    /// [`Error::Tensor`] with the first that was not.
    pub fn expect_taken(&self, is_spare: impl Fn(&str) -> bool) -> Result<()> {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let of_none = |name: &String| !taken.contains(name) && !is_spare(name);
        match self.store.entries().find(|entry| entry.canonical.as_ref().is_some_and(of_none)) {
            Some(entry) => {
                let problem = "belongs to nothing in this model that an adapter can change: is it another model's?";
                Err(Error::tensor(entry.source, entry.file, problem))
            }
            None => Ok(()),
        }
    }

    fn take(&self, canonical: &str) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).insert(canonical.to_owned());
    }

    /// What is added to the matrix `[n, k]` of a module.
    fn low_rank(&self, module: &str, n: usize, k: usize) -> Result<Option<LowRank>> {
        let [a, b] = ["lora_a", "lora_b"].map(|factor| format!("{module}.{factor}.weight"));
        let (stored_a, stored_b) = match (self.store.find(&a), self.store.find(&b)) {
            (None, None) => return Ok(None),
            (Some(a), Some(b)) => (a, b),
            (Some(one), None) | (None, Some(one)) => {
                return Err(Error::tensor(&one.located.name, &one.file, "has no counterpart: of lora_A and lora_B one is missing"));
            }
        };
        let name = stored_a.located.name.strip_prefix(PREFIX).unwrap_or(&stored_a.located.name);
        let (rank, scale) = self.config.of(name.split(".lora_").next().unwrap_or(name));
        for (stored, shape) in [(stored_a, [rank, k]), (stored_b, [n, rank])] {
            let got = &stored.located.shape;
            if *got != shape {
                let problem = format!(
                    "has shape {got:?}, but of rank {rank}, which {CONFIG} says, to a matrix {:?} of this model it would have {shape:?}",
                    [n, k]
                );
                return Err(Error::tensor(&stored.located.name, &stored.file, problem));
            }
        }
        let tensor = |name: &str, shape: [usize; 2]| {
            self.take(name);
            self.store.tensor(name, &shape)
        };
        Ok(Some(LowRank { a: tensor(&a, [rank, k])?, b: tensor(&b, [n, rank])?, scale, learned: None }))
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }
}

/// A model with an adapter over it.
pub struct Adapted<'a> {
    base: &'a dyn Source,
    adapter: &'a Adapter,
}

impl Source for Adapted<'_> {
    fn tensor(&self, canonical: &str, shape: &[usize]) -> Result<Tensor> {
        if !self.adapter.replaces(canonical) {
            return self.base.tensor(canonical, shape);
        }
        self.adapter.take(canonical);
        self.adapter.store.tensor(canonical, shape)
    }

    fn packed(&self, module: &str, n: usize, k: usize) -> Result<Option<Packed>> {
        if self.adapter.replaces(&format!("{module}.weight")) { Ok(None) } else { self.base.packed(module, n, k) }
    }

    fn low_rank(&self, module: &str, n: usize, k: usize) -> Result<Option<LowRank>> {
        self.adapter.low_rank(module, n, k)
    }
}

/// The canonical name of the tensor that an adapter calls `name`; none for what a base model has too and LLaVA does not use.
fn canonical(name: &str) -> Result<Option<String>, String> {
    let name = name.strip_prefix(PREFIX).unwrap_or(name);
    if let Some((module, factor)) = name.split_once(".lora_") {
        let factor = match factor.strip_suffix(".weight").map(|factor| factor.strip_suffix(".default").unwrap_or(factor)) {
            Some("A") => "lora_a",
            Some("B") => "lora_b",
            _ => return Err("is part of an adapter of another kind than LoRA over a matrix: not supported".to_owned()),
        };
        let matrix = names::canonical(&format!("{module}.weight"));
        let module = matrix.as_deref().and_then(|matrix| matrix.strip_suffix(".weight"));
        return match module {
            Some(module) => Ok(Some(format!("{module}.{factor}.weight"))),
            None => Err("adds to a module that LLaVA does not have".to_owned()),
        };
    }
    // As they are called within a model of PEFT; it saves a head that it adds to whole as well.
    let within = [".modules_to_save.default.", ".modules_to_save.", ".base_layer."];
    let name = within.iter().fold(name.to_owned(), |name, within| name.replace(within, "."));
    let is_unused = ["post_layernorm", "position_ids", "inv_freq", "original_module."].iter().any(|part| name.contains(part));
    match names::canonical(&name) {
        Some(canonical) => Ok(Some(canonical)),
        None if is_unused => Ok(None),
        None => Err("was trained, but LLaVA has no such tensor".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_a_factor_is_understood() {
        for (name, expected) in [
            ("model.layers.1.self_attn.q_proj.lora_A.weight", "llama.layers.1.self_attn.q_proj.lora_a.weight"),
            ("language_model.model.layers.1.mlp.up_proj.lora_B.weight", "llama.layers.1.mlp.up_proj.lora_b.weight"),
            ("model.language_model.layers.1.mlp.up_proj.lora_B.default.weight", "llama.layers.1.mlp.up_proj.lora_b.weight"),
            (
                "model.vision_tower.vision_tower.vision_model.encoder.layers.3.self_attn.v_proj.lora_A.weight",
                "clip.layers.3.self_attn.v_proj.lora_a.weight",
            ),
            ("vision_tower.vision_model.encoder.layers.3.mlp.fc1.lora_A.weight", "clip.layers.3.mlp.fc1.lora_a.weight"),
            ("model.vision_tower.encoder.layers.3.mlp.fc1.lora_A.weight", "clip.layers.3.mlp.fc1.lora_a.weight"),
            ("model.mm_projector.2.bias", "projector.linear_2.bias"),
            ("model.multi_modal_projector.linear_1.weight", "projector.linear_1.weight"),
            ("model.multi_modal_projector.modules_to_save.default.linear_1.weight", "projector.linear_1.weight"),
            ("lm_head.base_layer.weight", "llama.lm_head.weight"),
            ("lm_head.lora_B.weight", "llama.lm_head.lora_b.weight"),
        ] {
            for name in [name.to_owned(), format!("{PREFIX}{name}")] {
                assert_eq!(canonical(&name).unwrap().as_deref(), Some(expected), "{name}");
            }
        }
        assert_eq!(canonical("base_model.model.model.vision_tower.vision_tower.vision_model.post_layernorm.bias"), Ok(None));
        for name in [
            "model.embed_tokens.lora_embedding_A",
            "model.layers.1.self_attn.q_proj.lora_magnitude_vector.weight",
            "model.layers.1.self_attn.q_proj.lora_B.bias",
            "model.layers.1.self_attn.q_proj.lora_A.other.weight",
            "model.layers.1.block_sparse_moe.w1.lora_A.weight",
            "model.resampler.weight",
        ] {
            assert!(canonical(&format!("{PREFIX}{name}")).is_err(), "{name}");
        }
    }

    /// The cases of PEFT's own rule: the first pattern that is the name, or what a dot stands before.
    #[test]
    fn patterns_are_ends_of_names() {
        let config = |text: &str| {
            let config: Config = serde_json::from_str(text).unwrap();
            config.check().unwrap();
            config
        };
        let given = config(
            r#"{"r": 8, "lora_alpha": 4, "rank_pattern": {"0.q_proj": 2}, "alpha_pattern": {"k_proj": 16, "layers.1.k_proj": 1, "proj": 3}}"#,
        );
        assert_eq!(given.of("model.layers.0.q_proj"), (2, 2.0));
        assert_eq!(given.of("model.layers.10.q_proj"), (8, 0.5));
        assert_eq!(given.of("model.layers.1.k_proj"), (8, 2.0));
        assert_eq!(given.of("k_proj"), (8, 2.0));
        assert_eq!(config(r#"{"r": 16, "lora_alpha": 8, "use_rslora": true, "bias": "none"}"#).of("k_proj"), (16, 2.0));
    }

    #[test]
    fn what_has_no_equal_is_refused_by_name() {
        for (key, value) in [
            ("peft_type", r#""IA3""#),
            ("r", "0"),
            ("bias", r#""all""#),
            ("use_dora", "true"),
            ("fan_in_fan_out", "true"),
            ("lora_bias", "true"),
            ("init_lora_weights", r#""pissa_niter_4""#),
            ("target_parameters", r#"["mlp.experts"]"#),
            ("layer_replication", "[[0, 1]]"),
            ("something_new", "3"),
            ("rank_pattern", r#"{".*q_proj": 4}"#),
            ("rank_pattern", r#"{"q_proj": 0}"#),
            ("alpha_pattern", r#"{"q_proj|k_proj": 4}"#),
            ("alpha_pattern", r#"{"q_proj": "4"}"#),
        ] {
            let mut config: Map<String, Value> = serde_json::from_str(r#"{"r": 8, "lora_alpha": 4}"#).unwrap();
            config.insert(key.to_owned(), serde_json::from_str(value).unwrap());
            let config: Config = serde_json::from_value(Value::Object(config)).unwrap();
            let problem = config.check().unwrap_err();
            assert!(problem.contains(&format!("`{key}`")), "{problem}");
        }
    }
}
