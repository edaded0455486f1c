//! Subcommands, one file each. Results go to standard output, everything else to standard error.

mod bench;
mod chat;
mod common;
mod export;
mod finetune;
mod generate;
mod info;
mod inspect;
mod merge;
mod quantize;
mod score;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use llava_engine::error::Error;

/// Exit code of a run that Ctrl-C ended, as shells expect it.
const INTERRUPTED: u8 = 130;

/// Runs LLaVA: answers questions about images, on your own machine.
#[derive(Parser)]
#[command(name = "llava-engine", version, arg_required_else_help = true, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "Examples:
  llava-engine generate --image photo.jpg --prompt \"What is in this picture?\"
  llava-engine chat --image photo.jpg --model llava-hf/llava-1.5-7b-hf";

#[derive(Subcommand)]
enum Command {
    /// Answers a prompt about one or more images, as it goes
    Generate(generate::Args),
    /// Talks in turns; what was said stays in the cache
    Chat(chat::Args),
    /// Gives the log-probability of each token of a prompt
    Score(score::Args),
    /// Says what a checkpoint is and what running it needs
    Inspect(inspect::Args),
    /// Makes a checkpoint smaller: 4 or 8 bits for a weight
    Quantize(quantize::Args),
    /// Fine-tunes a model on conversations, or checks such data
    Finetune(finetune::Args),
    /// Merges a LoRA adapter into its base model
    Merge(merge::Args),
    /// Writes a checkpoint in the other layout: llava-hf, or LLaVA's own
    Export(export::Args),
    /// Says what this binary holds and what this machine has
    Info(info::Args),
    /// Measures how fast this machine encodes, reads prompts and answers
    Bench(bench::Args),
    /// Writes shell completions to standard output
    #[command(after_help = "Example:\n  llava-engine completions bash > ~/.local/share/bash-completion/completions/llava-engine")]
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// How a command ended, if it did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    Interrupted,
}

/// Parses the command line, runs it, and reports a failure in one line.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    let result = match &cli.command {
        Command::Generate(args) => generate::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Score(args) => score::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Finetune(args) => finetune::run(args),
        Command::Merge(args) => merge::run(args),
        Command::Export(args) => export::run(args),
        Command::Info(args) => info::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Completions { shell } => {
            clap_complete::generate(*shell, &mut Cli::command(), "llava-engine", &mut std::io::stdout());
            Ok(Outcome::Done)
        }
    };
    match result {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Interrupted) => ExitCode::from(INTERRUPTED),
        // Whoever read the output has seen enough.
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", common::one_line(&error.to_string()));
            ExitCode::from(error.exit_code())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_subcommand_has_an_example() {
        for command in Cli::command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Example"), "{} has no example", command.get_name());
        }
    }
}
