//! The rows of a run: those of all its files, some of them held out for evaluation.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::sampler::{Length, Permutations};
use crate::data::{Row, RowError, RowFile};
use crate::error::{Error, Result};

/// Rows of one or more files, numbered through. Only their places are in memory.
#[derive(Debug)]
pub struct Dataset {
    files: Arc<[RowFile]>,
    /// File and index there of each row.
    rows: Vec<(u32, u32)>,
}

impl Dataset {
    /// The rows of `files`, whose pictures are in `image_folder`, or beside each file if that is not given.
    ///
    /// # Errors
    /// As [`RowFile::open`]; if no file is named.
    pub fn open(files: &[PathBuf], image_folder: Option<&Path>) -> Result<Self> {
        if files.is_empty() {
            return Err(Error::usage("no data: name a file of rows with --data"));
        }
        let open = |path: &PathBuf| {
            let folder = image_folder.or(path.parent()).unwrap_or_else(|| Path::new("."));
            RowFile::open(path, folder)
        };
        let files: Vec<RowFile> = files.iter().map(open).collect::<Result<_>>()?;
        let rows = (0u32..).zip(&files).flat_map(|(f, file)| (0..file.n_rows() as u32).map(move |row| (f, row)));
        Ok(Self { rows: rows.collect(), files: files.into() })
    }

    /// How many rows there are.
    pub fn n_rows(&self) -> usize {
        self.rows.len()
    }

    /// A row by its number in the set, counted from 0.
    ///
    /// # Errors
    /// As [`RowFile::row`].
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, index: usize) -> Result<Row, RowError> {
        let (file, row) = self.rows[index];
        self.files[file as usize].row(row as usize)
    }

    /// What the files are known by: SHA-256 of each.
    pub fn hashes(&self) -> impl Iterator<Item = Vec<u8>> + '_ {
        self.files.iter().map(|file| file.sha256().to_vec())
    }

    /// The file and the number, counted from 1, of a row.
    pub fn place(&self, index: usize) -> (&Path, usize) {
        let (file, row) = self.rows[index];
        (self.files[file as usize].path(), row as usize + 1)
    }

    /// Takes a share of the rows out, drawn by `seed`: what a run is evaluated by and does not learn. Both sets keep the order of the files.
    pub fn hold_out(&mut self, share: f64, seed: u64) -> Self {
        let n_held = (self.rows.len() as f64 * share).round() as usize;
        let mut is_held = vec![false; self.rows.len()];
        Permutations::new(seed, HOLD_OUT).next(self.rows.len()).into_iter().take(n_held).for_each(|i| is_held[i] = true);
        let rows = |held: bool| self.rows.iter().zip(&is_held).filter(|(_, is)| **is == held).map(|(row, _)| *row).collect();
        let (kept, held) = (rows(false), rows(true));
        self.rows = kept;
        Self { files: Arc::clone(&self.files), rows: held }
    }
}

/// An epoch that no run reaches, so that what is held out is drawn by numbers of its own.
const HOLD_OUT: u64 = u64::MAX;

/// What a row counts for where rows are grouped by length, as in LLaVA's own trainer: its words, at least 1.
pub fn length_in_words(row: &Row) -> Length {
    Length { n: row.n_words.max(1), has_images: !row.images.is_empty() }
}
