//! `preprocessor_config.json`, or the `image_processor` of transformers 5's `processor_config.json`.

use super::config::{Fit, Preprocess};
use super::keys::Keys;
use crate::error::Result;
use crate::image::{CLIP_MEAN, CLIP_STD};

/// PIL's number for bicubic interpolation.
const BICUBIC: i64 = 3;
/// Largest side of a picture after resizing, in pixels.
const MAX_SIDE: usize = 1 << 14;

/// Reads the keys of HF's `CLIPImageProcessor`, absent ones with its defaults, for a tower of `image_size` pixels.
///
/// # Errors
/// [`crate::error::Error::File`] if a value is malformed or does not fit the tower, [`crate::error::Error::Unsupported`] if another
/// preprocessing is asked for.
pub fn read(keys: &Keys, image_size: usize) -> Result<Preprocess> {
    for key in ["do_resize", "do_rescale", "do_normalize"] {
        if keys.bool(key)? == Some(false) {
            return Err(keys.unsupported(key, "pictures are always resized, rescaled and normalised"));
        }
    }
    if keys.int("resample", 0..=5)?.is_some_and(|n| n != BICUBIC) {
        return Err(keys.unsupported("resample", "pictures are resized bicubically (3)"));
    }
    // Taken as the file writes it, because the reference multiplies by just that.
    let rescale_factor = keys.value("rescale_factor").map_or(Some(1.0 / 255.0), serde_json::Value::as_f64);
    let rescale_factor = rescale_factor.filter(|x| (x * 255.0 - 1.0).abs() < 1e-4);
    let rescale_factor = rescale_factor.ok_or_else(|| keys.unsupported("rescale_factor", "colours are divided by 255"))?;
    // LLaVA's own processor pads first; then resizing gives a square and the crop cuts nothing off.
    let pads = keys.bool("do_pad")?.unwrap_or(false);
    let shortest_edge = shortest_edge(keys, pads)?;
    let crop_size = if keys.bool("do_center_crop")? == Some(false) {
        if !pads {
            return Err(keys.unsupported("do_center_crop", "a picture that is not padded to a square is cropped to one"));
        }
        shortest_edge
    } else {
        square(keys, "crop_size")?.unwrap_or(224)
    };
    if crop_size != image_size {
        return Err(keys.error("crop_size", &format!("the picture size of the vision tower, {image_size}")));
    }
    if shortest_edge < crop_size {
        return Err(keys.error("size", &format!("at least `crop_size` {crop_size}")));
    }
    let std = keys.channels("image_std")?.unwrap_or(CLIP_STD);
    if std.iter().any(|x| *x <= 0.0) {
        return Err(keys.error("image_std", "three positive numbers"));
    }
    let fit = if pads { Fit::Pad } else { Fit::Crop };
    let mean = keys.channels("image_mean")?.unwrap_or(CLIP_MEAN);
    Ok(Preprocess { shortest_edge, crop_size, mean, std, rescale_factor, fit })
}

/// `size`: a number, or `{"shortest_edge": n}`; `{"height": n, "width": n}` distorts unless the picture is a square already.
fn shortest_edge(keys: &Keys, pads: bool) -> Result<usize> {
    if keys.value("size").is_some_and(serde_json::Value::is_number) {
        return Ok(keys.count("size", MAX_SIDE)?.unwrap_or(224));
    }
    let size = keys.object("size")?;
    if !keys.has("size") {
        return Ok(224);
    }
    match size.count("shortest_edge", MAX_SIDE)? {
        Some(n) => Ok(n),
        None if pads => square(keys, "size")?.ok_or_else(|| keys.error("size", "a number or an object with `shortest_edge`")),
        None => Err(keys.unsupported("size", "pictures keep their aspect ratio when resized (`shortest_edge`)")),
    }
}

/// The side of a square: a number, or `height` and `width` that agree.
fn square(keys: &Keys, key: &str) -> Result<Option<usize>> {
    match keys.value(key) {
        None => Ok(None),
        Some(serde_json::Value::Number(_)) => keys.count(key, MAX_SIDE),
        Some(_) => {
            let sides = keys.object(key)?;
            match (sides.count("height", MAX_SIDE)?, sides.count("width", MAX_SIDE)?) {
                (Some(height), Some(width)) if height == width => Ok(Some(height)),
                _ => Err(keys.error(key, "a number, or `height` and `width` that are equal")),
            }
        }
    }
}
