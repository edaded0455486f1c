//! `inspect`: what a checkpoint is.

use std::collections::BTreeMap;

use llava_engine::engine::kv_bytes;
use llava_engine::error::Result;
use llava_engine::model::checkpoint::Checkpoint;
use llava_engine::weights::hub::resolve;

use super::Outcome;
use super::common::{self, ModelArgs};

/// Flags of `inspect`.
#[derive(clap::Args)]
#[command(after_help = "Example:
  llava-engine inspect --model llava-hf/llava-1.5-7b-hf")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Lists every tensor
    #[arg(long)]
    tensors: bool,
    /// Prints one JSON document
    #[arg(long)]
    json: bool,
}

/// Parameters and bytes of one part of a model.
#[derive(Clone, Default, serde::Serialize)]
struct Part {
    parameters: usize,
    bytes: usize,
    /// How many of its matrices `quantize` packed in which way.
    packed: BTreeMap<String, usize>,
}

/// Inspects.
pub fn run(args: &Args) -> Result<Outcome> {
    let options = args.model.options(None)?;
    let folder = resolve(&args.model.path()?.to_string_lossy())?;
    let checkpoint = Checkpoint::open(&folder, options.beside())?;
    let config = &checkpoint.config;
    let mut parts = BTreeMap::<&str, Part>::new();
    let mut storage = BTreeMap::<String, usize>::new();
    let mut n_unused = 0;
    for entry in checkpoint.weights.entries() {
        let Some(name) = &entry.canonical else {
            n_unused += 1;
            continue;
        };
        let part = parts.entry(part_of(name)).or_default();
        part.parameters += entry.parameters;
        part.bytes += entry.bytes;
        if let Some(format) = name.strip_suffix(".words").and_then(|module| checkpoint.weights.format(module)) {
            *part.packed.entry(format.to_string()).or_default() += 1;
        }
        *storage.entry(entry.dtype.to_string()).or_default() += entry.bytes;
    }
    let total = parts.values().fold(Part::default(), |a, b| Part {
        parameters: a.parameters + b.parameters,
        bytes: a.bytes + b.bytes,
        packed: BTreeMap::new(),
    });
    let packed_by = packed_by(&checkpoint);
    let kv_dtype = options.kv_dtype.or(options.dtype).unwrap_or(checkpoint.dtype);
    let (kv_token, kv_context) = (kv_bytes(config, kv_dtype, 1), kv_bytes(config, kv_dtype, config.context_tokens));
    if args.json {
        let tensors = args.tensors.then(|| {
            let entry = |e: llava_engine::weights::Entry| serde_json::json!({"name": e.source, "canonical": e.canonical, "shape": e.shape, "dtype": e.dtype.to_string()});
            checkpoint.weights.entries().map(entry).collect::<Vec<_>>()
        });
        common::put_json(&serde_json::json!({
            "path": folder.to_string_lossy(),
            "layout": checkpoint.layout.to_string(),
            "dtype": checkpoint.dtype.name(),
            "packed_by": packed_by,
            "bytes_by_dtype": storage,
            "config": config,
            "parts": parts,
            "parameters": total.parameters,
            "bytes": total.bytes,
            "tokens_per_image": config.tokens_per_image(),
            "context_tokens": config.context_tokens,
            "kv_bytes_per_token": kv_token,
            "kv_bytes_full_context": kv_context,
            "tensors": tensors,
        }))?;
        return Ok(Outcome::Done);
    }
    let mut out = format!("{}\n{}\n", folder.display(), checkpoint.layout);
    if let Some(packed_by) = packed_by {
        out += &format!("packed by {packed_by}\n");
    }
    out += "\n";
    let (v, t) = (&config.vision, &config.text);
    out += &format!(
        "vision     {} of {} layers, hidden {}, {} heads, {}x{} pixels in patches of {}: {} tokens per image\n",
        config.n_vision_layers,
        v.n_layers,
        v.hidden_size,
        v.n_heads,
        v.image_size,
        v.image_size,
        v.patch_size,
        config.tokens_per_image()
    );
    out += &format!("projector  {}\n", config.projector);
    out += &format!(
        "decoder    {} layers, hidden {}, {} heads of {} ({} for keys and values), MLP {}, vocabulary {}\n",
        t.n_layers, t.hidden_size, t.n_heads, t.head_dim, t.n_kv_heads, t.intermediate_size, t.vocab_size
    );
    out += &format!("context    {} tokens; rope theta {}, {:?}\n\n", config.context_tokens, t.rope_theta, t.rope_scaling);
    out += &format!("{:<12} {:>14} {:>12}\n", "part", "parameters", "MB");
    for (name, part) in parts.iter().map(|(n, p)| (*n, p)).chain([("total", &total)]) {
        let matrices = |n: usize| if n == 1 { "matrix" } else { "matrices" };
        let packed: Vec<_> = part.packed.iter().map(|(format, n)| format!("{n} {} in {format}", matrices(*n))).collect();
        let line = format!("{name:<12} {:>14} {:>12.1}  {}", part.parameters, part.bytes as f64 / 1e6, packed.join(", "));
        out += line.trim_end();
        out += "\n";
    }
    let mb = |bytes: usize| bytes as f64 / 1e6;
    let stored: Vec<_> = storage.iter().map(|(dtype, bytes)| format!("{dtype} {:.1}", mb(*bytes))).collect();
    out += &format!("stored as    {} MB\n", stored.join(", "));
    let is_foreign = checkpoint.gguf.is_some() || checkpoint.scheme.is_some();
    let how = if is_foreign { "mapped; what another program packed, packed anew in memory" } else { "mapped" };
    out += &format!(
        "\nto run: {:.1} MB of weights ({how}), and {:.3} MB of KV cache per token in {kv_dtype}: {:.1} MB for a full context\n",
        mb(total.bytes),
        mb(kv_token),
        mb(kv_context)
    );
    if n_unused > 0 {
        out += &format!("{n_unused} tensors of the file are not used\n");
    }
    if args.tensors {
        for e in checkpoint.weights.entries() {
            out += &format!("{:<8} {:<22} {}\n", e.dtype.to_string(), format!("{:?}", e.shape), e.source);
        }
    }
    common::put(&out)?;
    Ok(Outcome::Done)
}

/// Who packed a checkpoint, and how: another program, or `quantize`.
fn packed_by(checkpoint: &Checkpoint) -> Option<String> {
    let ours = || checkpoint.rounding.as_ref().map(|rounding| format!("llava-engine quantize, {}", rounding.escape_debug()));
    checkpoint.scheme.map(|scheme| scheme.to_string()).or_else(ours)
}

/// Which part of the model a canonical tensor name belongs to.
fn part_of(name: &str) -> &'static str {
    match name.split('.').next() {
        Some("clip") => "vision",
        Some("projector") => "projector",
        _ if name.starts_with("llama.embed_tokens") || name.starts_with("llama.lm_head") => "embeddings",
        _ => "decoder",
    }
}
