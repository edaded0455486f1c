//! Looks through the data of a run before anything is trained: what is wrong with which row, and how long rows are.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::data::Dataset;
use super::mask::{Masker, Stretch};
use crate::data::{Fault, Row, RowError};
use crate::error::{Error, Result};
use crate::image::{ImageSource, Limits, probe};

/// A row that a run could not use.
#[derive(Debug)]
pub struct BadRow {
    /// Its file.
    pub file: PathBuf,
    /// Its number there, counted from 1.
    pub number: usize,
    /// What kind of fault.
    pub fault: Fault,
    /// What is wrong, with file and row.
    pub message: String,
}

/// What a set of rows is like.
#[derive(Debug, Default)]
pub struct Report {
    /// Rows, good and bad.
    pub n_rows: usize,
    /// Questions and answers of those that could be read.
    pub n_turns: usize,
    /// Pictures of them.
    pub n_images: usize,
    /// Rows that are longer than the longest length.
    pub n_truncated: usize,
    /// How many rows have which fault; each row counts once.
    pub faults: BTreeMap<Fault, usize>,
    /// The bad rows, in order.
    pub bad_rows: Vec<BadRow>,
    /// Positions of each row that was laid out, before it was cut; ascending.
    pub tokens: Vec<usize>,
    /// Supervised positions of each, after it was cut; ascending.
    pub supervised: Vec<usize>,
}

impl Report {
    /// Looks through all rows, pictures by their headers or, if `decode`, whole. `watch` sees each row as it goes, with its masks if it is
    /// one of the first `n_previews` that are good.
    ///
    /// # Errors
    /// If `watch` fails. Faults of rows are in the report.
    pub fn of(
        data: &Dataset,
        masker: &Masker,
        decode: bool,
        n_previews: usize,
        mut watch: impl FnMut(Option<(&Row, Vec<Stretch>)>) -> Result<()>,
    ) -> Result<Self> {
        let mut report = Self { n_rows: data.n_rows(), ..Self::default() };
        let mut n_left = n_previews;
        for i in 0..data.n_rows() {
            match report.look_at(data, i, masker, decode) {
                Ok(row) if n_left > 0 => {
                    n_left -= 1;
                    watch(Some((&row, masker.preview(&row).map_err(|e| e.error)?)))?;
                }
                Ok(_) => watch(None)?,
                Err(RowError { fault, number, error }) => {
                    *report.faults.entry(fault).or_default() += 1;
                    let file = data.place(i).0.to_owned();
                    report.bad_rows.push(BadRow { file, number, fault, message: error.to_string() });
                    watch(None)?;
                }
            }
        }
        report.tokens.sort_unstable();
        report.supervised.sort_unstable();
        Ok(report)
    }

    /// Adds a row, or says what is wrong with it.
    fn look_at(&mut self, data: &Dataset, index: usize, masker: &Masker, decode: bool) -> Result<Row, RowError> {
        let row = data.row(index)?;
        self.n_turns += 2 * row.exchanges.len();
        self.n_images += row.images.len();
        row.check_images()?;
        let limits = Limits::default();
        for path in &row.images {
            let seen = match decode {
                true => ImageSource::File(path.clone()).load(&limits).map(|_| ()),
                false => probe(path, &limits).map(|_| ()),
            };
            seen.map_err(|e| row.fault(Fault::BrokenImage, e))?;
        }
        let masked = masker.example(&row)?;
        self.n_truncated += usize::from(masked.n_tokens > masked.example.slots.len());
        self.tokens.push(masked.n_tokens);
        self.supervised.push(masked.example.n_answer_tokens());
        Ok(row)
    }

    /// Fails if there are more bad rows than `max_bad_rows`.
    ///
    /// # Errors
    /// With the first of them.
    pub fn judge(&self, max_bad_rows: usize) -> Result<()> {
        match self.bad_rows.first() {
            Some(first) if self.bad_rows.len() > max_bad_rows => {
                let (n, of) = (self.bad_rows.len(), self.n_rows);
                let problem =
                    format!("{n} of {of} rows are bad, {max_bad_rows} are allowed (--max-bad-rows); the first: {}", first.message);
                Err(Error::file(&first.file, problem))
            }
            _ => Ok(()),
        }
    }
}

/// The value that a share `p` of `sorted` values is at most (nearest rank); `None` of none.
pub fn percentile(sorted: &[usize], p: f64) -> Option<usize> {
    let rank = (p * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1).min(sorted.len().saturating_sub(1))).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        assert_eq!(percentile(&[], 0.5), None);
        // Wikipedia's example of the method.
        let values = [15, 20, 35, 40, 50];
        for (p, expected) in [(0.05, 15), (0.3, 20), (0.4, 20), (0.5, 35), (1.0, 50), (0.0, 15)] {
            assert_eq!(percentile(&values, p), Some(expected), "{p}");
        }
    }
}
