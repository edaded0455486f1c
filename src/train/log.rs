//! What a run says of its steps, to files: `log.jsonl`, a row for each; the same for TensorBoard; in the end, the course of the loss as SVG.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::curve;
use super::run::Step;
use super::tensorboard::EventFile;
use crate::error::{Error, Result};
use crate::weights::write::write_whole;

/// The file of rows.
pub const ROWS: &str = "log.jsonl";
/// TensorBoard takes the folder's name for that of the run.
const EVENTS: &str = "tensorboard/events.out.tfevents";
const CURVE: &str = "loss.svg";

/// A row of the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What the step was.
    #[serde(flatten)]
    pub step: Step,
    /// Share of the device's measured peak that the step's arithmetic reached; that done twice to save memory counts once. (Model FLOPs
    /// utilization, Chowdhery et al., arXiv 2204.02311, section 4.1.)
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// Loss of the rows that the model is evaluated by, after this step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    /// When it ended, in seconds since 1970.
    pub time: f64,
}

/// A log that is being written.
pub struct Log {
    output: PathBuf,
    rows: Vec<Row>,
    file: File,
    events: EventFile,
}

impl Log {
    /// The last row of the log in the folder `output`; none if there is no log or no row.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn last_of(output: &Path) -> Result<Option<Row>> {
        Ok(rows(&output.join(ROWS))?.pop())
    }

    /// Goes on with the log in the folder `output` after step `n_done`: what it says of later steps, which were made by a run that did not
    /// live to save them, goes.
    ///
    /// # Errors
    /// If it cannot be read or written.
    pub fn open(output: &Path, n_done: usize) -> Result<Self> {
        let path = output.join(ROWS);
        let mut rows = rows(&path)?;
        rows.retain(|row| row.step.step <= n_done);
        let lines = rows.iter().map(|row| line(row, &path)).collect::<Result<String>>()?;
        write_whole(&path, lines.as_bytes())?;
        let file = File::options().append(true).open(&path).map_err(|e| Error::io(&path, e))?;
        let path = output.join(EVENTS);
        let folder = path.parent().expect("it is in a folder of the output");
        fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        let mut events = EventFile::create(&path, rows.first().map_or_else(now, |row| row.time))?;
        rows.iter().try_for_each(|row| tell(&mut events, row)).map_err(|e| Error::io(&path, e))?;
        Ok(Self { output: output.to_owned(), rows, file, events })
    }

    /// Adds a step.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn add(&mut self, step: Step, mfu: Option<f64>, eval_loss: Option<f64>) -> Result<()> {
        let row = Row { step, mfu, eval_loss, time: now() };
        let path = self.output.join(ROWS);
        self.file.write_all(line(&row, &path)?.as_bytes()).map_err(|e| Error::io(&path, e))?;
        tell(&mut self.events, &row).map_err(|e| Error::io(self.output.join(EVENTS), e))?;
        self.rows.push(row);
        Ok(())
    }

    /// The last row.
    pub fn last(&self) -> Option<&Row> {
        self.rows.last()
    }

    /// Draws the course of the loss.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn draw(&self) -> Result<()> {
        write_whole(&self.output.join(CURVE), curve::svg(&self.rows)?.as_bytes())
    }
}

/// The rows of a log, up to one that was not written whole.
fn rows(path: &Path) -> Result<Vec<Row>> {
    let text = match fs::read_to_string(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
        text => text.map_err(|e| Error::io(path, e))?,
    };
    Ok(text.lines().map_while(|line| serde_json::from_str(line).ok()).collect())
}

fn line(row: &Row, path: &Path) -> Result<String> {
    serde_json::to_string(row).map(|line| line + "\n").map_err(|e| Error::file(path, e))
}

fn tell(events: &mut EventFile, row: &Row) -> io::Result<()> {
    let Step { step, loss, lr, grad_norm, loss_scale, n_tokens, ms, .. } = &row.step;
    let speed = *n_tokens as f64 / ms * 1e3;
    let mut values = vec![
        ("train/loss", *loss),
        ("train/learning_rate", *lr),
        ("train/grad_norm", *grad_norm),
        ("train/tokens_per_second", speed),
    ];
    values.extend(loss_scale.map(|scale| ("train/loss_scale", f64::from(scale))));
    values.extend(row.mfu.map(|mfu| ("train/mfu", mfu)));
    values.extend(row.eval_loss.map(|loss| ("eval/loss", loss)));
    events.scalars(*step, row.time, &values)
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
