//! A sequence that stays in the cache between turns.

use crate::error::Result;
use crate::image::RgbImage;
use crate::infer::kv::PageTable;
use crate::model::Slot;
use crate::ops::RowCopy;
use crate::tensor::Tensor;

use super::Engine;

/// What the cache holds of a conversation. A prompt that begins as the last one did costs only what is new in it.
pub struct Session {
    pub(super) table: PageTable,
    /// What stands at the positions that are cached.
    pub(super) cached: Vec<Slot>,
    /// The images whose features follow; compared pixel by pixel, so that no two are ever mistaken for one another.
    images: Vec<RgbImage>,
    pub(super) features: Option<Tensor>, // [images * tokens per image, hidden]
}

impl Session {
    /// How many positions at the start of `slots` are in the cache already. At least one is left to run: its logits are needed.
    pub(super) fn reuse(&mut self, slots: &[Slot]) -> usize {
        let common = self.cached.iter().zip(slots).take_while(|(a, b)| a == b).count().min(slots.len() - 1);
        self.cached.truncate(common);
        self.table.truncate(common);
        common
    }
}

impl Engine {
    /// A conversation with nothing in the cache.
    pub fn session(&self) -> Session {
        Session { table: self.runner.kv().sequence(), cached: Vec::new(), images: Vec::new(), features: None }
    }

    /// Gives `session` the features of `images`; those that it had in the same places are not encoded again.
    ///
    /// Returns the times of preprocessing and encoding in ms.
    pub(super) fn set_images(&mut self, session: &mut Session, images: &[RgbImage]) -> Result<(f64, f64)> {
        let kept = session.images.iter().zip(images).take_while(|(a, b)| a == b).count();
        let tokens_per_image = self.config().tokens_per_image();
        let kept_rows = kept * tokens_per_image;
        let is_kept = |slot: &Slot| !matches!(slot, Slot::Image { feature_row } if *feature_row >= kept_rows);
        let valid = session.cached.iter().take_while(|s| is_kept(s)).count();
        session.cached.truncate(valid);
        session.table.truncate(valid);
        if kept == images.len() {
            return Ok((0.0, 0.0));
        }
        let start = std::time::Instant::now();
        let pixels = self.preprocess(&images[kept..])?;
        let image_ms = start.elapsed().as_secs_f64() * 1e3;
        let start = std::time::Instant::now();
        let new = self.encode_image(&pixels)?;
        let encode_ms = start.elapsed().as_secs_f64() * 1e3;
        let features = match session.features.take() {
            Some(old) if kept > 0 => {
                let ops = self.runner.ops();
                let mut all = ops.alloc(&[kept_rows + new.rows(), new.row_len()], new.dtype())?;
                ops.copy_rows(&mut all, &old, &[RowCopy { dst: 0, src: 0, n_rows: kept_rows }])?;
                ops.copy_rows(&mut all, &new, &[RowCopy { dst: kept_rows, src: 0, n_rows: new.rows() }])?;
                all
            }
            _ => new,
        };
        session.images = images.to_vec();
        session.features = Some(features);
        Ok((image_ms, encode_ms))
    }
}
