//! What a run says of its steps, to files: `log.jsonl`, a row for each.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::run::Step;
use crate::error::{Error, Result};
use crate::weights::write::write_whole;

/// The file of rows.
const NAME: &str = "log.jsonl";

/// A log that is being written.
pub struct Log {
    path: PathBuf,
    file: File,
    steps: Vec<Step>,
}

impl Log {
    /// Goes on with the log in the folder `output` after step `n_done`: what it says of later steps, which were made by a run that did not
    /// live to save them, goes.
    ///
    /// # Errors
    /// If it cannot be read or written.
    pub fn open(output: &Path, n_done: usize) -> Result<Self> {
        let path = output.join(NAME);
        let text = match fs::read_to_string(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
            text => text.map_err(|e| Error::io(&path, e))?,
        };
        let rows = text.lines().map_while(|line| Some((line, serde_json::from_str::<Step>(line).ok()?)));
        let kept: Vec<_> = rows.take_while(|(_, step)| step.step <= n_done).collect();
        let lines: String = kept.iter().map(|(line, _)| format!("{line}\n")).collect();
        write_whole(&path, lines.as_bytes())?;
        let file = File::options().append(true).open(&path).map_err(|e| Error::io(&path, e))?;
        Ok(Self { file, steps: kept.into_iter().map(|(_, step)| step).collect(), path })
    }

    /// Adds a step.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn add(&mut self, step: Step) -> Result<()> {
        let line = serde_json::to_string(&step).map_err(|e| Error::file(&self.path, e))?;
        writeln!(self.file, "{line}").map_err(|e| Error::io(&self.path, e))?;
        self.steps.push(step);
        Ok(())
    }

    /// The last step.
    pub fn last(&self) -> Option<&Step> {
        self.steps.last()
    }
}
