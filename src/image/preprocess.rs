//! From pictures of any size to what the vision tower takes: CLIP's preprocessing, and LLaVA's padding in front of it.

use super::resize::{Canvas, Resize, Window};
use super::{CHANNELS, RgbImage};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Mean of the channels in CLIP's training pictures, after division by 255 (`OPENAI_CLIP_MEAN`).
pub const CLIP_MEAN: [f32; 3] = [0.48145466, 0.4578275, 0.40821073];

/// Standard deviation of the channels in CLIP's training pictures (`OPENAI_CLIP_STD`).
pub const CLIP_STD: [f32; 3] = [0.26862954, 0.261_302_6, 0.275_777_1];

/// How a picture of any shape becomes a square one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum Fit {
    /// Shortest edge to the picture size, then centre crop: what sticks out on the longer side is not seen.
    Crop,
    /// Padded to a square with the mean colour first: everything is seen, smaller.
    Pad,
}

/// Pixel preprocessing, as `preprocessor_config.json` gives it.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Preprocess {
    /// Length of the shortest edge after resizing, in pixels.
    pub shortest_edge: usize,
    /// Side of the centre crop in pixels: the picture size of the tower.
    pub crop_size: usize,
    /// Mean of the channels R, G, B after rescaling.
    pub mean: [f32; 3],
    /// Standard deviation of the channels.
    pub std: [f32; 3],
    /// What a pixel is multiplied with before normalisation: 1/255.
    pub rescale_factor: f64,
    /// Crop or pad.
    pub fit: Fit,
}

impl Preprocess {
    /// CLIP's own constants for a tower of `size` x `size` pixels.
    pub fn clip(size: usize, fit: Fit) -> Self {
        Self { shortest_edge: size, crop_size: size, mean: CLIP_MEAN, std: CLIP_STD, rescale_factor: 1.0 / 255.0, fit }
    }

    /// Colour of the padding: the mean, cut down to whole levels (`int(x * 255)` in LLaVA's `process_images`); (122, 116, 104) for CLIP.
    pub fn pad_colour(&self) -> [u8; 3] {
        // The reference multiplies the decimal fraction that the file gives. Its f32 may lie just below a whole level that the fraction
        // reaches; printed and read again it is the fraction.
        self.mean.map(|mean| (mean.to_string().parse::<f64>().unwrap_or_default() * 255.0) as u8)
    }

    /// What each level of each channel becomes, [3, 256].
    ///
    /// value = (f32(level · rescale_factor) - mean) / std, with the product in f64 and the rest in f32, as `rescale` and `normalize`
    /// of transformers' `image_transforms.py` do.
    pub(crate) fn levels(&self) -> [[f32; 256]; CHANNELS] {
        std::array::from_fn(|c| {
            std::array::from_fn(|level| ((level as f64 * self.rescale_factor) as f32 - self.mean[c]) / self.std[c])
        })
    }

    /// What is to be done with one picture.
    pub(crate) fn plan<'a>(&self, image: &'a RgbImage) -> Plan<'a> {
        let canvas = match self.fit {
            Fit::Crop => Canvas::of(image),
            Fit::Pad => Canvas::square(image, self.pad_colour()),
        };
        let (width, height) = resized(canvas.width(), canvas.height(), self.shortest_edge);
        let (columns, rows) = (Crop::centre(width, self.crop_size), Crop::centre(height, self.crop_size));
        let window = Window { columns: columns.kept, rows: rows.kept };
        Plan { resize: Resize::new(canvas, width, height, &window), left: columns.offset, top: rows.offset }
    }

    /// Refuses constants that can give no picture.
    pub fn check(&self) -> Result<()> {
        let bad = |what: &str, expected: &str, got: String| {
            Err(Error::usage(format!("preprocessing: {what} is {got}, expected {expected}")))
        };
        if self.shortest_edge == 0 || self.shortest_edge > 16_384 {
            return bad("shortest_edge", "1 to 16384 pixels", self.shortest_edge.to_string());
        }
        if self.crop_size == 0 || self.crop_size > 16_384 {
            return bad("crop_size", "1 to 16384 pixels", self.crop_size.to_string());
        }
        if !self.std.iter().all(|s| s.is_finite() && *s > 0.0) {
            return bad("std", "three positive numbers", format!("{:?}", self.std));
        }
        if !self.mean.iter().all(|m| m.is_finite()) || !self.rescale_factor.is_finite() {
            return bad("mean or rescale_factor", "finite", format!("{:?}, {}", self.mean, self.rescale_factor));
        }
        Ok(())
    }
}

/// One picture's way into the crop. Only the pixels inside of it are ever computed, so that a picture of 1 x 16384 costs no more than
/// others.
pub(crate) struct Plan<'a> {
    /// Resizing, of the pixels that the crop keeps.
    pub resize: Resize<'a>,
    /// Columns of the crop to the left of them. A crop larger than the picture is black around it.
    pub left: usize,
    /// Rows of the crop above them.
    pub top: usize,
}

/// Pictures as the tower takes them, f32 [n_images, 3, crop_size, crop_size].
///
/// The steps of transformers' `CLIPImageProcessor` (Pillow backend): convert to RGB (done by [`super::decode`]), resize so that the
/// shortest edge has its length, cut the centre out, rescale, normalise; with [`Fit::Pad`] LLaVA's `expand2square` before them.
pub fn preprocess(images: &[RgbImage], config: &Preprocess) -> Result<Tensor> {
    config.check()?;
    let mut out = Tensor::zeros(&[images.len(), CHANNELS, config.crop_size, config.crop_size], DType::F32);
    preprocess_into(out.as_mut_slice(), images, config);
    Ok(out)
}

/// [`preprocess`] into `out` f32 [n_images, 3, crop_size, crop_size], with constants that were checked.
pub(crate) fn preprocess_into(out: &mut [f32], images: &[RgbImage], config: &Preprocess) {
    let side = config.crop_size;
    let levels = config.levels();
    for (image, planes) in images.iter().zip(out.chunks_exact_mut(CHANNELS * side * side)) {
        let Plan { resize, left, top } = config.plan(image);
        let pixels = resize.run(); // [rows kept, columns kept, 3]
        for (plane, levels) in planes.chunks_exact_mut(side * side).zip(&levels) {
            plane.fill(levels[0]);
        }
        for (y, row) in pixels.chunks_exact(resize.horizontal.outputs.len() * CHANNELS).enumerate() {
            for (x, pixel) in row.chunks_exact(CHANNELS).enumerate() {
                for c in 0..CHANNELS {
                    planes[(c * side + top + y) * side + left + x] = levels[c][usize::from(pixel[c])];
                }
            }
        }
    }
}

/// Width and height after the shortest edge got its length: the other one is int(shortest_edge · long / short), where the quotient
/// is taken in f64 and cut (`get_resize_output_image_size` with `default_to_square=False`).
fn resized(width: usize, height: usize, shortest_edge: usize) -> (usize, usize) {
    let (short, long) = (width.min(height), width.max(height));
    let new_long = ((shortest_edge * long) as f64 / short as f64) as usize;
    if width <= height { (shortest_edge, new_long) } else { (new_long, shortest_edge) }
}

/// What a centre crop takes of one axis (`center_crop` of transformers' `image_transforms.py`).
struct Crop {
    /// The pixels of the picture that are kept.
    kept: std::ops::Range<usize>,
    /// Where the first of them lands in the crop: not zero if the picture is the smaller of the two.
    offset: usize,
}

impl Crop {
    /// Pixel i of the crop is pixel i + floor((length - side) / 2) of the picture, where there is one.
    fn centre(length: usize, side: usize) -> Self {
        if length >= side {
            let start = (length - side) / 2;
            Self { kept: start..start + side, offset: 0 }
        } else {
            Self { kept: 0..length, offset: (side - length).div_ceil(2) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longer_edge_is_that_of_the_reference() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/resize.json");
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let cases = json["shortest_edge"].as_array().unwrap();
        for case in cases {
            let number = |value: &serde_json::Value| value.as_u64().unwrap() as usize;
            let [from, to] = ["from", "to"].map(|key| (number(&case[key][0]), number(&case[key][1])));
            assert_eq!(resized(from.0, from.1, number(&case["edge"])), to, "{case}");
        }
        assert!(cases.len() >= 30, "only {} fixtures", cases.len());
    }

    #[test]
    fn the_padding_is_the_mean_cut_to_whole_levels() {
        assert_eq!(Preprocess::clip(336, Fit::Pad).pad_colour(), [122, 116, 104]);
        // 51/255 and 0.7 as f32 lie below their decimals, and 0.7 · 255 is 178.49999999999997.
        assert_eq!(Preprocess { mean: [0.2, 0.7, 1.0], ..Preprocess::clip(336, Fit::Pad) }.pad_colour(), [51, 178, 255]);
    }
}
