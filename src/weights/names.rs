//! Every spelling of a tensor's name that LLaVA checkpoints use, mapped to one.
//!
//! The canonical name of a tensor is its part (`clip`, `projector`, `llama`) and its place in it, for instance
//! `llama.layers.3.mlp.up_proj.weight`. A spelling is a prefix, which tells the layout, and a suffix, which tells the tensor.

/// The parts a LLaVA is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The vision tower.
    Clip,
    /// The layers between the tower and the decoder.
    Projector,
    /// The decoder, its embedding and its head.
    Llama,
}

impl Part {
    /// The part that a canonical name belongs to.
    pub fn of(canonical: &str) -> Option<Self> {
        match canonical.split_once('.')?.0 {
            "clip" => Some(Self::Clip),
            "projector" => Some(Self::Projector),
            "llama" => Some(Self::Llama),
            _ => None,
        }
    }
}

/// Where the vision tower is found: llava-hf, the original with the tower inside (v1.6), a CLIP folder of its own; and each of them
/// as transformers 5 writes it, without `vision_model.`.
const CLIP_PREFIXES: [&str; 8] = [
    "vision_tower.vision_model.",
    "model.vision_tower.vision_model.",
    "vision_tower.",
    "model.vision_tower.",
    "model.vision_tower.vision_tower.vision_model.",
    "model.vision_tower.vision_tower.",
    "vision_model.",
    "",
];

/// Where the decoder's body is found: llava-hf (transformers 4, then 5), and plain LLaMA, which the original LLaVA extends.
const LLAMA_PREFIXES: [&str; 4] = ["language_model.model.", "model.language_model.", "language_model.", "model."];

/// Where the decoder's head is found.
const HEAD_PREFIXES: [&str; 3] = ["language_model.", "", "model.language_model."];

/// Where the projector of llava-hf is found.
const HF_PROJECTOR_PREFIXES: [&str; 2] = ["multi_modal_projector.", "model.multi_modal_projector."];

/// Where the projector of the original LLaVA is found.
const MM_PROJECTOR_PREFIXES: [&str; 2] = ["model.mm_projector.", "mm_projector."];

/// Tensors outside the layers: (suffix in the file, canonical name). `pre_layrnorm` is how CLIP spells it.
const CLIP_SINGLES: [(&str, &str); 5] = [
    ("embeddings.class_embedding", "clip.class_embedding"),
    ("embeddings.patch_embedding.weight", "clip.patch_embedding.weight"),
    ("embeddings.position_embedding.weight", "clip.position_embedding.weight"),
    ("pre_layrnorm.weight", "clip.pre_layernorm.weight"),
    ("pre_layrnorm.bias", "clip.pre_layernorm.bias"),
];

/// What a packed matrix has in place of its weight: ours (`src/ops/packed.rs`), then GPTQ's and AWQ's (`src/weights/qweight.rs`).
const PACKED_KINDS: [&str; 6] = ["words", "scales", "offsets", "qweight", "qzeros", "g_idx"];

/// Modules of a CLIP layer; each has a weight and a bias.
const CLIP_MODULES: [&str; 8] = [
    "layer_norm1",
    "layer_norm2",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
];

/// Modules of a decoder layer. LLaMA has weights only; biases are known so that they can be refused rather than dropped.
const LLAMA_MODULES: [&str; 9] = [
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// The canonical name of the tensor that a file calls `name`; `None` if LLaVA has no such tensor.
///
/// ```
/// use llava_engine::weights::names::canonical;
/// assert_eq!(canonical("language_model.lm_head.weight").as_deref(), Some("llama.lm_head.weight"));
/// assert_eq!(canonical("model.mm_projector.2.bias").as_deref(), Some("projector.linear_2.bias"));
/// assert_eq!(canonical("text_model.final_layer_norm.weight"), None);
/// ```
pub fn canonical(name: &str) -> Option<String> {
    if matches!(name, "model.image_newline" | "image_newline") {
        return Some("image_newline".to_owned());
    }
    let by_prefix = |prefixes: &[&str], suffix: fn(&str) -> Option<String>| {
        prefixes.iter().filter_map(|prefix| name.strip_prefix(prefix)).find_map(suffix)
    };
    by_prefix(&LLAMA_PREFIXES, llama)
        .or_else(|| by_prefix(&HEAD_PREFIXES, head))
        .or_else(|| by_prefix(&HF_PROJECTOR_PREFIXES, hf_projector))
        .or_else(|| by_prefix(&MM_PROJECTOR_PREFIXES, mm_projector))
        .or_else(|| by_prefix(&CLIP_PREFIXES, clip))
}

/// The names that files give to the tensor `canonical`: what is looked for, to be told when it is missing.
pub fn spellings(canonical: &str) -> Vec<String> {
    let with = |prefixes: &[&str], suffix: &str| prefixes.iter().map(|p| format!("{p}{suffix}")).collect::<Vec<_>>();
    let Some((part, rest)) = canonical.split_once('.') else { return vec![canonical.to_owned()] };
    match part {
        "clip" => {
            let single = CLIP_SINGLES.iter().find(|(_, c)| *c == canonical).map(|(suffix, _)| (*suffix).to_owned());
            with(&CLIP_PREFIXES, &single.unwrap_or_else(|| format!("encoder.{rest}")))
        }
        "projector" => {
            let mut names = with(&HF_PROJECTOR_PREFIXES, rest);
            if let Some((k, kind)) =
                rest.strip_prefix("linear_").and_then(|r| r.split_once('.')).and_then(|(n, k)| Some((index(n)?, k)))
            {
                names.extend(with(&MM_PROJECTOR_PREFIXES, &format!("{}.{kind}", 2 * k.saturating_sub(1))));
                if k == 1 {
                    names.extend(with(&MM_PROJECTOR_PREFIXES, kind));
                }
            }
            names
        }
        "llama" if rest.starts_with("lm_head.") => with(&HEAD_PREFIXES, rest),
        "llama" => with(&LLAMA_PREFIXES, rest),
        _ => vec![canonical.to_owned()],
    }
}

/// Whose names of modules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// transformers', of version 5; its decoder and projector are called so since 4.52.
    Hf,
    /// haotian-liu/LLaVA's.
    Original,
}

/// The name within a model of that dialect of the tensor `canonical`.
pub fn spelling(canonical: &str, dialect: Dialect) -> String {
    with_starts(
        canonical,
        match dialect {
            Dialect::Hf => ["model.language_model.", "model.vision_tower.", "model.multi_modal_projector.", "lm_head."],
            Dialect::Original => ["model.", "model.vision_tower.vision_tower.vision_model.", "model.mm_projector.", "lm_head."],
        },
    )
}

/// The name of the tensor `canonical` in the llava-hf files on the hub, which transformers reads from 4.36 to this day.
pub fn spelling_in_hf_files(canonical: &str) -> String {
    with_starts(
        canonical,
        ["language_model.model.", "vision_tower.vision_model.", "multi_modal_projector.", "language_model.lm_head."],
    )
}

/// The spelling of `canonical` that starts as those of decoder, tower, projector and head do.
fn with_starts(canonical: &str, starts: [&str; 4]) -> String {
    let part = match Part::of(canonical) {
        Some(Part::Llama) if canonical.starts_with("llama.lm_head.") => 3,
        Some(Part::Llama) => 0,
        Some(Part::Clip) => 1,
        Some(Part::Projector) => 2,
        None => return canonical.to_owned(),
    };
    let spelt = spellings(canonical).into_iter().filter(|name| name.starts_with(starts[part]));
    // Others that begin so have more in front of the same end; but the projector's first layer may go without a number.
    let spelt = if part == 2 { spelt.max_by_key(String::len) } else { spelt.min_by_key(String::len) };
    spelt.unwrap_or_else(|| canonical.to_owned())
}

/// The kind (`weight`, `bias`) of the tower's last norm, if that is what a file calls `name`. LLaVA never comes to it, and so it has no
/// canonical name, but transformers' tower has it.
pub fn post_layernorm(name: &str) -> Option<&str> {
    let kind = CLIP_PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix)?.strip_prefix("post_layernorm."))?;
    matches!(kind, "weight" | "bias").then_some(kind)
}

fn llama(suffix: &str) -> Option<String> {
    let is_embedding = suffix.strip_prefix("embed_tokens.").is_some_and(|kind| kind != "bias" && is_kind(kind));
    let known = is_embedding || suffix == "norm.weight" || in_layer(suffix, "layers.", &LLAMA_MODULES);
    known.then(|| format!("llama.{suffix}"))
}

fn head(suffix: &str) -> Option<String> {
    suffix.strip_prefix("lm_head.").is_some_and(is_kind).then(|| format!("llama.{suffix}"))
}

fn hf_projector(suffix: &str) -> Option<String> {
    let (n, kind) = suffix.strip_prefix("linear_")?.split_once('.')?;
    (index(n)? >= 1 && is_kind(kind)).then(|| format!("projector.{suffix}"))
}

/// `linear` has one unnamed layer; `mlpNx_gelu` counts its activations too, so that layer k is number 2(k - 1).
fn mm_projector(suffix: &str) -> Option<String> {
    if is_kind(suffix) {
        return Some(format!("projector.linear_1.{suffix}"));
    }
    let (n, kind) = suffix.split_once('.')?;
    let n = index(n)?;
    (n % 2 == 0 && is_kind(kind)).then(|| format!("projector.linear_{}.{kind}", n / 2 + 1))
}

fn clip(suffix: &str) -> Option<String> {
    if let Some((_, canonical)) = CLIP_SINGLES.iter().find(|(s, _)| *s == suffix) {
        return Some((*canonical).to_owned());
    }
    let layer = suffix.strip_prefix("encoder.")?;
    in_layer(layer, "layers.", &CLIP_MODULES).then(|| format!("clip.{layer}"))
}

/// Whether `suffix` is `layers.<index>.<module>.<weight|bias>` for one of `modules`.
fn in_layer(suffix: &str, layers: &str, modules: &[&str]) -> bool {
    let parts = suffix.strip_prefix(layers).and_then(|s| s.split_once('.'));
    let Some((n, (module, kind))) = parts.and_then(|(n, rest)| Some((n, rest.rsplit_once('.')?))) else { return false };
    index(n).is_some() && modules.contains(&module) && is_kind(kind)
}

fn is_kind(kind: &str) -> bool {
    matches!(kind, "weight" | "bias") || PACKED_KINDS.contains(&kind)
}

/// A layer number as checkpoints write it; `007` or `+7` would be a second name for a layer that has one.
pub(super) fn index(digits: &str) -> Option<usize> {
    let n: u16 = digits.parse().ok()?;
    (n.to_string() == digits).then_some(usize::from(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every canonical name of a model with two layers in each part.
    fn all() -> Vec<String> {
        let mut names: Vec<String> = CLIP_SINGLES.iter().map(|(_, c)| (*c).to_owned()).collect();
        for i in 0..2 {
            for kind in ["weight", "bias", "words", "scales", "offsets"] {
                names.extend(CLIP_MODULES.iter().map(|m| format!("clip.layers.{i}.{m}.{kind}")));
                names.push(format!("projector.linear_{}.{kind}", i + 1));
            }
            names.extend(LLAMA_MODULES.iter().map(|m| format!("llama.layers.{i}.{m}.weight")));
        }
        names.extend(["embed_tokens", "norm", "lm_head"].map(|m| format!("llama.{m}.weight")));
        names.extend(
            ["embed_tokens", "lm_head"].into_iter().flat_map(|m| ["words", "scales"].map(|kind| format!("llama.{m}.{kind}"))),
        );
        names
    }

    #[test]
    fn each_spelling_is_understood_as_its_canonical_name() {
        for name in all() {
            let spellings = spellings(&name);
            assert!(spellings.len() >= 3, "{name}: {spellings:?}");
            for spelling in spellings {
                assert_eq!(canonical(&spelling).as_deref(), Some(name.as_str()), "{spelling}");
            }
        }
    }

    #[test]
    fn a_dialect_has_one_name_for_each() {
        for (canonical, hf, hf_files, original) in [
            (
                "llama.layers.3.mlp.up_proj.weight",
                "model.language_model.layers.3.mlp.up_proj.weight",
                "language_model.model.layers.3.mlp.up_proj.weight",
                "model.layers.3.mlp.up_proj.weight",
            ),
            (
                "llama.embed_tokens.weight",
                "model.language_model.embed_tokens.weight",
                "language_model.model.embed_tokens.weight",
                "model.embed_tokens.weight",
            ),
            ("llama.lm_head.weight", "lm_head.weight", "language_model.lm_head.weight", "lm_head.weight"),
            (
                "projector.linear_1.weight",
                "model.multi_modal_projector.linear_1.weight",
                "multi_modal_projector.linear_1.weight",
                "model.mm_projector.0.weight",
            ),
            (
                "projector.linear_2.bias",
                "model.multi_modal_projector.linear_2.bias",
                "multi_modal_projector.linear_2.bias",
                "model.mm_projector.2.bias",
            ),
            (
                "clip.layers.3.mlp.fc1.weight",
                "model.vision_tower.encoder.layers.3.mlp.fc1.weight",
                "vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight",
                "model.vision_tower.vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight",
            ),
            (
                "clip.pre_layernorm.bias",
                "model.vision_tower.pre_layrnorm.bias",
                "vision_tower.vision_model.pre_layrnorm.bias",
                "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias",
            ),
        ] {
            assert_eq!([Dialect::Hf, Dialect::Original].map(|dialect| spelling(canonical, dialect)), [hf, original]);
            assert_eq!(spelling_in_hf_files(canonical), hf_files);
        }
        let norm = |name| post_layernorm(name);
        assert_eq!(norm("vision_tower.vision_model.post_layernorm.weight"), Some("weight"));
        assert_eq!(norm("model.vision_tower.vision_tower.vision_model.post_layernorm.bias"), Some("bias"));
        assert_eq!((norm("vision_model.post_layernorm.running"), norm("text_model.post_layernorm.bias")), (None, None));
    }

    #[test]
    fn names_from_released_checkpoints() {
        for (name, expected) in [
            ("language_model.model.layers.31.mlp.down_proj.weight", "llama.layers.31.mlp.down_proj.weight"), // llava-hf/llava-1.5-7b-hf
            ("vision_tower.vision_model.pre_layrnorm.bias", "clip.pre_layernorm.bias"),
            ("multi_modal_projector.linear_2.weight", "projector.linear_2.weight"),
            ("model.language_model.norm.weight", "llama.norm.weight"), // as transformers 5 holds it
            ("model.vision_tower.encoder.layers.3.mlp.fc1.bias", "clip.layers.3.mlp.fc1.bias"),
            ("model.mm_projector.0.weight", "projector.linear_1.weight"), // liuhaotian/llava-v1.5-7b
            ("model.mm_projector.weight", "projector.linear_1.weight"),   // a `linear` projector
            (
                "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding", // liuhaotian/llava-v1.6-vicuna-7b
                "clip.class_embedding",
            ),
            ("model.image_newline", "image_newline"),
            ("vision_model.encoder.layers.0.self_attn.out_proj.weight", "clip.layers.0.self_attn.out_proj.weight"), // openai/clip-vit-*
        ] {
            assert_eq!(canonical(name).as_deref(), Some(expected), "{name}");
        }
    }

    #[test]
    fn strangers_are_left_alone() {
        for name in [
            "",
            ".",
            "model.",
            "vision_tower.vision_model.post_layernorm.weight",
            "vision_model.embeddings.position_ids",
            "text_model.encoder.layers.0.mlp.fc1.weight",
            "text_model.embeddings.position_embedding.weight",
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.layers.007.mlp.up_proj.weight",
            "model.layers.+7.mlp.up_proj.weight",
            "model.layers.99999.mlp.up_proj.weight",
            "model.layers.0.mlp.up_proj.weight.absmax",
            "model.mm_projector.1.weight",
            "multi_modal_projector.linear_0.weight",
            "model.layers.0.self_attn.q_proj.lora_A.weight",
        ] {
            assert_eq!(canonical(name), None, "{name}");
        }
    }
}
