//! `chat`: turns about one or more images, with the cache kept between them.

use std::ops::ControlFlow;
use std::sync::atomic::Ordering;

use llava_engine::engine::{Engine, GenerateOptions, Turn};
use llava_engine::error::{Error, Result};
use llava_engine::image::RgbImage;
use rustyline::error::ReadlineError;

use super::Outcome;
use super::common::{self, ModelArgs, SamplingArgs};

/// Flags of `chat`.
#[derive(clap::Args)]
#[command(after_help = "Commands: /image FILE adds a picture to the next question, /reset starts anew, /exit ends.\n
Example:
  llava-engine chat --image cat.jpg --model llava-hf/llava-1.5-7b-hf")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Picture for the first question: a file or a URL; may be repeated
    #[arg(long, short, alias = "image-file", value_name = "FILE|URL")]
    image: Vec<String>,
    /// Conversation template; the checkpoint's own if absent
    #[arg(long, alias = "conv-mode", value_name = "NAME")]
    template: Option<String>,
    /// System prompt, instead of the template's own
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
}

/// What has been said, and the pictures it is about.
struct Conversation {
    turns: Vec<Turn>,
    images: Vec<RgbImage>,
    /// How many of the pictures belong to the question to come.
    n_new_images: usize,
}

/// Talks until the input ends.
pub fn run(args: &Args) -> Result<Outcome> {
    let engine_options = args.model.options(args.template.as_deref())?;
    let mut options = args.sampling.options()?;
    if args.image.iter().any(|i| i == "-") {
        return Err(Error::usage("standard input is where questions are read from: give the image as a file"));
    }
    let images = common::load_images(&args.image)?;
    let mut engine = args.model.open(&engine_options)?;
    options.stop.extend(engine.stop_texts());
    common::cancel_on_ctrl_c(engine.cancel_flag());
    if common::is_interactive() {
        eprintln!("{}\n/image FILE, /reset, /exit; Ctrl-C ends an answer", engine.layout());
    }
    let fail = |e: ReadlineError| Error::io("standard input", std::io::Error::other(e));
    let mut editor = rustyline::DefaultEditor::new().map_err(fail)?;
    let mut session = engine.session();
    let mut talk = Conversation { turns: Vec::new(), n_new_images: images.len(), images };
    loop {
        let line = match editor.readline("> ") {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => break,
            Err(error) => return Err(fail(error)),
        };
        let _ = editor.add_history_entry(&line);
        match line.trim() {
            "" => {}
            "/exit" => break,
            "/reset" => {
                session = engine.session();
                talk = Conversation { turns: Vec::new(), images: Vec::new(), n_new_images: 0 };
            }
            command if command.starts_with("/image") => {
                let file = command["/image".len()..].trim();
                // A picture that cannot be had must not end the conversation.
                match common::load_images(&[file.to_owned()]) {
                    Ok(mut new) => {
                        talk.n_new_images += new.len();
                        talk.images.append(&mut new);
                    }
                    Err(error) => eprintln!("error: {}", common::one_line(&error.to_string())),
                }
            }
            command if command.starts_with('/') => eprintln!("unknown command {command}: /image FILE, /reset, /exit"),
            question => {
                if let Err(error) = answer(&mut engine, &mut session, &mut talk, args.system.as_deref(), question, &options) {
                    match error {
                        Error::Io { .. } => return Err(error),
                        _ => eprintln!("error: {}", common::one_line(&error.to_string())),
                    }
                }
            }
        }
    }
    args.model.report_ops(&engine)?;
    Ok(Outcome::Done)
}

/// Asks, prints the answer, and keeps both; a question that fails leaves no trace.
fn answer(
    engine: &mut Engine,
    session: &mut llava_engine::engine::Session,
    talk: &mut Conversation,
    system: Option<&str>,
    question: &str,
    options: &GenerateOptions,
) -> Result<()> {
    talk.turns.push(Turn::user(question, talk.n_new_images));
    let mut output = Ok(());
    let answer = engine.prompt(system, &talk.turns).and_then(|prompt| {
        engine.generate_in(session, &prompt, &talk.images, options, &mut |text| {
            output = common::put(text);
            if output.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })
    });
    engine.cancel_flag().store(false, Ordering::Relaxed);
    match answer {
        Ok(answer) => {
            talk.turns.push(Turn::assistant(answer.text));
            talk.n_new_images = 0;
        }
        Err(error) => {
            talk.turns.pop();
            return Err(error);
        }
    }
    output?;
    common::put("\n")
}
