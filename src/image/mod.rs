//! Pictures: from a file, standard input or a URL to the pixels that the vision tower sees.
//!
//! [`ImageSource`] fetches bytes, [`decode`] turns them into an [`RgbImage`] within [`Limits`], [`preprocess`] resizes, crops and
//! normalises into f32 [n_images, 3, crop_size, crop_size]. Every step gives the numbers of Pillow and of the Hugging Face CLIP
//! image processor on top of it: a picture that is off by one row or one rounding step is a different prompt.

mod decode;
mod preprocess;
mod resize;
mod source;

pub use decode::{Limits, decode, probe};
pub use preprocess::{CLIP_MEAN, CLIP_STD, Fit, Preprocess, preprocess};
pub(crate) use preprocess::{Plan, preprocess_into};
pub use resize::resize_bicubic;
pub(crate) use resize::{Resize, Weights};
pub use source::ImageSource;

use crate::error::{Error, Result};

/// Channels of every picture here: R, G, B.
pub(crate) const CHANNELS: usize = 3;

/// A picture of at least 1 x 1 pixels, 8 bits per channel.
#[derive(Clone, PartialEq, Eq)]
pub struct RgbImage {
    width: usize,
    height: usize,
    pixels: Vec<u8>, // [height, width, 3]
}

impl RgbImage {
    /// A picture from its pixels, `[height, width, 3]`: rows from the top, R, G, B for each pixel.
    ///
    /// Refused if a side is zero or if `pixels` is not exactly that long.
    pub fn new(width: usize, height: usize, pixels: Vec<u8>) -> Result<Self> {
        let bytes = width.checked_mul(height).and_then(|n| n.checked_mul(CHANNELS));
        if width == 0 || height == 0 || bytes != Some(pixels.len()) {
            let expected = "width x height x 3 bytes, with no side of zero";
            return Err(Error::shape("image", "pixels", expected, (width, height, pixels.len())));
        }
        Ok(Self { width, height, pixels })
    }

    /// A picture of one colour.
    pub fn filled(width: usize, height: usize, rgb: [u8; 3]) -> Result<Self> {
        let n_pixels = width.saturating_mul(height);
        if n_pixels > isize::MAX as usize / CHANNELS {
            return Err(Error::shape("image", "size", "one that fits into memory", (width, height)));
        }
        Self::new(width, height, rgb.repeat(n_pixels))
    }

    /// Width in pixels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Its pixels, [height, width, 3].
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// One row from the top, [width, 3].
    ///
    /// # Panics
    /// If `y` is not less than the height.
    pub fn row(&self, y: usize) -> &[u8] {
        &self.pixels[y * self.width * CHANNELS..][..self.width * CHANNELS]
    }
}

impl std::fmt::Debug for RgbImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RgbImage[{} x {}]", self.width, self.height)
    }
}
