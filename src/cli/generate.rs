//! `generate`: one prompt, one answer.

use std::ops::ControlFlow;

use llava_engine::engine::{FinishReason, Turn};
use llava_engine::error::{Error, Result};
use llava_engine::text::Prompt;

use super::Outcome;
use super::common::{self, ModelArgs, SamplingArgs};

/// Flags of `generate`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  llava-engine generate --image cat.jpg --prompt \"What is this?\"
  llava-engine generate --image a.png --image b.png --prompt \"What differs?\" --model llava-hf/llava-1.5-7b-hf --json
  llava-engine generate --image cat.jpg --raw-prompt \"USER: <image>\\nWhat is this? ASSISTANT:\" --temperature 0")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Picture: a file, a URL, or - for standard input; may be repeated
    #[arg(long, short, alias = "image-file", value_name = "FILE|URL|-")]
    image: Vec<String>,
    /// What to ask, or - for standard input
    #[arg(
        long,
        short,
        alias = "query",
        value_name = "TEXT",
        required_unless_present = "raw_prompt",
        conflicts_with = "raw_prompt"
    )]
    prompt: Option<String>,
    /// Prompt taken verbatim, with <image> where the images go; nothing is added but the first token
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["template", "system"])]
    raw_prompt: Option<String>,
    /// Conversation template; the checkpoint's own if absent
    #[arg(long, alias = "conv-mode", value_name = "NAME")]
    template: Option<String>,
    /// System prompt, instead of the template's own
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Prints the answer as one JSON document
    #[arg(long)]
    json: bool,
}

/// Answers.
pub fn run(args: &Args) -> Result<Outcome> {
    let engine_options = args.model.options(args.template.as_deref())?;
    let mut options = args.sampling.options()?;
    let typed = args.prompt.as_deref().or(args.raw_prompt.as_deref()).unwrap_or_default();
    if typed == "-" && args.image.iter().any(|i| i == "-") {
        return Err(Error::usage("standard input cannot be both the prompt and an image"));
    }
    let images = common::load_images(&args.image)?;
    let typed = common::text_or_stdin(typed)?;
    let mut engine = args.model.open(&engine_options)?;
    let prompt = match args.raw_prompt {
        Some(_) => Prompt::raw(&typed),
        None => {
            options.stop.extend(engine.stop_texts());
            engine.prompt(args.system.as_deref(), &[Turn::user(typed, images.len())])?
        }
    };
    common::cancel_on_ctrl_c(engine.cancel_flag());
    let mut output = Ok(());
    let answer = engine.generate(&prompt, &images, &options, &mut |text| {
        if !args.json {
            output = common::put(text);
        }
        if output.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    output?;
    if args.json {
        common::put_json(&answer)?;
    } else {
        common::put("\n")?;
    }
    args.model.report_ops(&engine)?;
    Ok(if answer.finish_reason == FinishReason::Cancelled { Outcome::Interrupted } else { Outcome::Done })
}
