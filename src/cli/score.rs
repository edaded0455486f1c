//! `score`: how probable each token of a prompt is to the model.

use std::path::PathBuf;

use llava_engine::engine::Score;
use llava_engine::error::{Error, Result};
use llava_engine::text::Prompt;
use safetensors::tensor::{Dtype, TensorView};

use super::Outcome;
use super::common::{self, ModelArgs};

/// Flags of `score`.
#[derive(clap::Args)]
#[command(after_help = "Example:
  llava-engine score --image cat.jpg --raw-prompt \"USER: <image>\\nWhat is this? ASSISTANT: A cat.\" --dump scores.safetensors")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Picture: a file, a URL, or - for standard input; may be repeated
    #[arg(long, short, alias = "image-file", value_name = "FILE|URL|-")]
    image: Vec<String>,
    /// Text to score, verbatim, with <image> where the images go; - for standard input
    #[arg(long, value_name = "TEXT")]
    raw_prompt: String,
    /// Writes ids, pixels, features, log-probabilities and last logits to this file
    #[arg(long, value_name = "OUT.safetensors")]
    dump: Option<PathBuf>,
    /// Prints one JSON document
    #[arg(long)]
    json: bool,
}

/// Scores.
pub fn run(args: &Args) -> Result<Outcome> {
    let options = args.model.options(None)?;
    if args.raw_prompt == "-" && args.image.iter().any(|i| i == "-") {
        return Err(Error::usage("standard input cannot be both the prompt and an image"));
    }
    let images = common::load_images(&args.image)?;
    let text = common::text_or_stdin(&args.raw_prompt)?;
    let mut engine = args.model.open(&options)?;
    let score = engine.score(&Prompt::raw(&text), &images)?;
    if let Some(path) = &args.dump {
        dump(&score, path)?;
    }
    let (sum, text_tokens) = score.text_sum();
    // Of nothing there is none: not a number, which JSON writes as null.
    let perplexity = (-sum / text_tokens as f64).exp();
    if args.json {
        common::put_json(&serde_json::json!({
            "input_ids": score.input_ids,
            "logprobs": score.logprobs,
            "sum": sum,
            "text_tokens": text_tokens,
            "perplexity": perplexity,
        }))?;
    } else {
        for (id, logprob) in score.input_ids.iter().skip(1).zip(&score.logprobs) {
            let token = u32::try_from(*id).ok().and_then(|id| engine.tokenizer().id_to_token(id)).unwrap_or_default();
            common::put(&format!("{logprob:>10.4}  {id:>6}  {}\n", common::one_line(&token)))?;
        }
        let perplexity = if text_tokens == 0 { "none".to_owned() } else { format!("{perplexity:.4}") };
        common::put(&format!("sum {sum:.4}, perplexity {perplexity} over {text_tokens} tokens of text\n"))?;
    }
    args.model.report_ops(&engine)?;
    Ok(Outcome::Done)
}

/// Writes a score as safetensors: a new file beside the old one, put in its place when whole.
fn dump(score: &Score, path: &PathBuf) -> Result<()> {
    let ids: Vec<u8> = score.input_ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let logprobs: &[u8] = bytemuck::cast_slice(&score.logprobs);
    let last_logits: &[u8] = bytemuck::cast_slice(&score.last_logits);
    let mut tensors = vec![
        ("input_ids", Dtype::I64, vec![score.input_ids.len()], ids.as_slice()),
        ("logprobs", Dtype::F32, vec![score.logprobs.len()], logprobs),
        ("last_logits", Dtype::F32, vec![score.last_logits.len()], last_logits),
    ];
    for (name, tensor) in [("pixel_values", &score.pixel_values), ("image_features", &score.image_features)] {
        if let Some(tensor) = tensor {
            tensors.push((name, Dtype::F32, tensor.shape().to_vec(), tensor.as_bytes()));
        }
    }
    let views = tensors.into_iter().map(|(name, dtype, shape, data)| TensorView::new(dtype, shape, data).map(|view| (name, view)));
    let bad = |e: safetensors::SafeTensorError| Error::file(path, e);
    let views = views.collect::<std::result::Result<Vec<_>, _>>().map_err(bad)?;
    let bytes = safetensors::serialize(views, None).map_err(bad)?;
    let partial = path.with_extension("partial");
    std::fs::write(&partial, bytes).and_then(|()| std::fs::rename(&partial, path)).map_err(|e| Error::io(path, e))
}
