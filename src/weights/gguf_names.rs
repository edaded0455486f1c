//! What GGUF files call the tensors of a LLaVA. Their names tell nothing of a layout: each tensor has one.

use super::gguf::TensorInfo;
use super::names::index;

/// What a file calls something, and its canonical name.
type Names = (&'static str, &'static str);

/// Tensors outside the layers.
const SINGLES: [Names; 11] = [
    ("token_embd.weight", "llama.embed_tokens.weight"),
    ("output_norm.weight", "llama.norm.weight"),
    ("output.weight", "llama.lm_head.weight"),
    ("rope_freqs.weight", "llama.rope_freqs.weight"),
    ("v.class_embd", "clip.class_embedding"),
    ("v.patch_embd.weight", "clip.patch_embedding.weight"),
    ("v.position_embd.weight", "clip.position_embedding.weight"),
    ("v.pre_ln.weight", "clip.pre_layernorm.weight"),
    ("v.pre_ln.bias", "clip.pre_layernorm.bias"),
    ("model.image_newline", "image_newline"),
    ("v.image_newline", "image_newline"),
];

/// Modules of a decoder layer.
const LLAMA_MODULES: [Names; 9] = [
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Modules of a CLIP layer, whose MLP files of before 2025 name the wrong way round: see [`mlp_is_swapped`].
const CLIP_MODULES: [Names; 8] = [
    ("ln1", "layer_norm1"),
    ("ln2", "layer_norm2"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_out", "self_attn.out_proj"),
    ("ffn_up", "mlp.fc1"),
    ("ffn_down", "mlp.fc2"),
];

/// Where the layers of each part are.
const LAYERS: [(&str, &str, &[Names]); 2] = [("blk.", "llama.layers.", &LLAMA_MODULES), ("v.blk.", "clip.layers.", &CLIP_MODULES)];

/// The canonical name of the tensor that a GGUF file calls `name`; `None` if LLaVA has no such tensor.
pub fn canonical(name: &str, mlp_is_swapped: bool) -> Option<String> {
    if let Some((_, canonical)) = SINGLES.iter().find(|(single, _)| *single == name) {
        return Some((*canonical).to_owned());
    }
    if let Some((n, kind)) = name.strip_prefix("mm.").and_then(|rest| rest.split_once('.')) {
        // Activations between the layers are counted too.
        let n = index(n).filter(|n| n % 2 == 0 && is_kind(kind))?;
        return Some(format!("projector.linear_{}.{kind}", n / 2 + 1));
    }
    let (rest, canonical, modules) =
        LAYERS.iter().find_map(|(prefix, canonical, modules)| Some((name.strip_prefix(prefix)?, canonical, modules)))?;
    let (n, (module, kind)) = rest.split_once('.').and_then(|(n, rest)| Some((n, rest.rsplit_once('.')?)))?;
    let module = match module {
        "ffn_up" if mlp_is_swapped => "ffn_down",
        "ffn_down" if mlp_is_swapped => "ffn_up",
        other => other,
    };
    let (_, module) = modules.iter().find(|(m, _)| *m == module).filter(|_| is_kind(kind))?;
    Some(format!("{canonical}{}.{module}.{kind}", index(n)?))
}

/// What a GGUF file calls the tensor `canonical`: what is looked for, to be told when it is missing.
pub fn spelling(canonical: &str) -> Option<String> {
    if let Some((single, _)) = SINGLES.iter().find(|(_, c)| *c == canonical) {
        return Some((*single).to_owned());
    }
    if let Some((n, kind)) = canonical.strip_prefix("projector.linear_").and_then(|rest| rest.split_once('.')) {
        return Some(format!("mm.{}.{kind}", 2 * index(n)?.checked_sub(1)?));
    }
    let (prefix, rest, modules) = LAYERS
        .iter()
        .find_map(|(prefix, canonical_prefix, modules)| Some((prefix, canonical.strip_prefix(canonical_prefix)?, modules)))?;
    let (n, (module, kind)) = rest.split_once('.').and_then(|(n, rest)| Some((n, rest.rsplit_once('.')?)))?;
    let (module, _) = modules.iter().find(|(_, c)| *c == module)?;
    Some(format!("{prefix}{n}.{module}.{kind}"))
}

/// Whether a file calls the MLP's first matrix `ffn_down` and its second `ffn_up`, as llama.cpp's converter for CLIP once did: the one that
/// takes what attention takes, vectors of the tower's width, is the first. Where both do, the names are believed.
pub fn mlp_is_swapped(tensors: &[TensorInfo]) -> bool {
    let width = |name: &str| tensors.iter().find(|t| t.name == name).and_then(|t| t.shape.last());
    let (hidden, up, down) = (width("v.blk.0.attn_q.weight"), width("v.blk.0.ffn_up.weight"), width("v.blk.0.ffn_down.weight"));
    down.is_some() && down == hidden && up != hidden
}

/// Whether the rows of `name` are in the order of llama.cpp's rotary pairs: LLaMA's queries and keys.
pub fn is_in_rotary_pairs(name: &str) -> bool {
    name.starts_with("blk.") && (name.contains(".attn_q.") || name.contains(".attn_k."))
}

fn is_kind(kind: &str) -> bool {
    matches!(kind, "weight" | "bias")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_is_understood_as_the_one_it_is_the_spelling_of() {
        let mut names: Vec<String> = SINGLES.iter().map(|(_, c)| (*c).to_owned()).collect();
        names.extend(["projector.linear_1.weight", "projector.linear_2.bias"].map(str::to_owned));
        for (_, prefix, modules) in LAYERS {
            names.extend(modules.iter().map(|(_, m)| format!("{prefix}17.{m}.weight")));
        }
        for name in names {
            assert_eq!(canonical(&spelling(&name).unwrap(), false), Some(name));
        }
    }

    #[test]
    fn names_from_released_files() {
        for (name, swapped, expected) in [
            ("blk.31.attn_output.weight", false, Some("llama.layers.31.self_attn.o_proj.weight")), // mys/ggml_llava-v1.5-7b
            ("v.blk.22.ffn_down.bias", true, Some("clip.layers.22.mlp.fc1.bias")),
            ("v.blk.22.ffn_down.bias", false, Some("clip.layers.22.mlp.fc2.bias")),
            ("blk.0.ffn_down.weight", false, Some("llama.layers.0.mlp.down_proj.weight")),
            ("mm.2.weight", false, Some("projector.linear_2.weight")),
            ("mm.1.weight", false, None),
            ("v.post_ln.weight", false, None),
            ("blk.00.attn_q.weight", false, None),
            ("blk.0.attn_q.scales", false, None),
            ("blk.0.ffn_gate_inp.weight", false, None),
        ] {
            assert_eq!(canonical(name, swapped).as_deref(), expected, "{name}");
        }
    }
}
