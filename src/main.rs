//! The command line of llava-engine.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
