//! [`Rows`]: those of a run, as it uses them: laid out, with their pictures, without those that cannot be used.

use super::config::Config;
use super::data::{Dataset, length_in_words};
use super::mask::Masker;
use super::sampler::{Grouping, Length};
use crate::data::{Row, RowError};
use crate::engine::Example;
use crate::error::{Error, Result};
use crate::image::RgbImage;
use crate::model::{Batch, Slot};

/// Rows, and which of them were left out.
pub struct Rows {
    /// All of them.
    pub data: Dataset,
    /// How many may be left out.
    pub max_bad: usize,
    /// Number in the set of each that was, and what is wrong with it, in the order in which they were met.
    pub bad: Vec<(usize, String)>,
}

/// Some rows, one after the other.
#[derive(Default)]
pub struct Loaded {
    /// Their pictures.
    pub images: Vec<RgbImage>,
    /// What stands at each position, features numbered through.
    pub slots: Vec<Slot>,
    /// Which positions are to be learned.
    pub is_learned: Vec<bool>,
    /// Positions of each row.
    pub lengths: Vec<usize>,
}

impl Loaded {
    /// As the model takes them.
    pub fn batch(&self) -> Batch<'_> {
        Batch { slots: &self.slots, is_learned: &self.is_learned, lengths: &self.lengths }
    }
}

impl Rows {
    /// Those to learn, and those to evaluate by, if there are any; of each, `max_bad` may be left out.
    ///
    /// # Errors
    /// If files to evaluate by cannot be read, or a share of the rows is none of them.
    pub fn split(config: &Config, mut data: Dataset, max_bad: usize) -> Result<(Self, Option<Self>)> {
        let held_out = match (&config.eval_data[..], config.eval_share) {
            ([], 0.0) => None,
            ([], share) => Some(data.hold_out(share, config.seed)),
            (files, _) => Some(Dataset::open(files, config.image_folder.as_deref())?),
        };
        if held_out.as_ref().is_some_and(|held_out| held_out.n_rows() == 0) {
            return Err(Error::usage(format!("eval_share = {} of the rows is none of them", config.eval_share)));
        }
        let rows = |data| Self { data, max_bad, bad: Vec::new() };
        Ok((rows(data), held_out.map(rows)))
    }

    /// Lays the rows `indices` out; those that are left out are not among them.
    pub fn load(&mut self, masker: &Masker<'_>, indices: &[usize]) -> Result<Loaded> {
        let mut all = Loaded::default();
        for &index in indices {
            let read = self.data.row(index).and_then(|row| Ok((masker.example(&row)?.example, row)));
            let loaded = read.map_err(|e| e.error).and_then(|(example, row)| Ok((example, row.load_images()?)));
            let Some((example, pictures)) = self.left_out(index, loaded)? else { continue };
            let first_feature = all.images.len() * masker.tokens_per_image;
            let Example { slots: of_row, is_answer } = example;
            all.lengths.push(of_row.len());
            all.slots.extend(of_row.into_iter().map(|slot| match slot {
                Slot::Image { feature_row } => Slot::Image { feature_row: first_feature + feature_row },
                token => token,
            }));
            all.is_learned.extend(is_answer);
            all.images.extend(pictures);
        }
        Ok(all)
    }

    /// Looks through all rows, so that none of them stops a run in its middle.
    pub fn check(&mut self, masker: &Masker<'_>) -> Result<()> {
        for index in 0..self.data.n_rows() {
            let usable = self.data.row(index).and_then(|row| masker.example(&row).and_then(|_| row.check_images()));
            self.left_out(index, usable.map_err(|e| e.error))?;
        }
        Ok(())
    }

    /// What is made of row `index`; none if that failed and is put up with.
    pub fn left_out<T>(&mut self, index: usize, result: Result<T>) -> Result<Option<T>> {
        let error = match result {
            Ok(value) => return Ok(Some(value)),
            Err(e) => e,
        };
        if self.bad.iter().any(|(known, _)| *known == index) {
            return Ok(None);
        }
        if self.bad.len() >= self.max_bad {
            return Err(error);
        }
        self.bad.push((index, error.to_string()));
        Ok(None)
    }
}

/// How long each row is, for their order: in tokens if they are packed, else in words.
pub fn lengths(config: &Config, masker: &Masker<'_>, rows: &mut Rows) -> Result<Vec<Length>> {
    let length = |row: Row| match config.grouping {
        Grouping::Packed => {
            let has_images = !row.images.is_empty();
            Ok(Length { n: masker.example(&row)?.example.slots.len(), has_images })
        }
        Grouping::None | Grouping::Modality => Ok(length_in_words(&row)),
    };
    let mut lengths = Vec::with_capacity(rows.data.n_rows());
    for index in 0..rows.data.n_rows() {
        let of_row = rows.data.row(index).and_then(length).map_err(|e: RowError| e.error);
        lengths.push(rows.left_out(index, of_row)?.unwrap_or(Length { n: 1, has_images: false }));
    }
    Ok(lengths)
}
