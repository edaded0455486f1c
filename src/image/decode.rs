//! Picture files to RGB, as Pillow's `Image.open(file).convert("RGB")` sees them, within limits that hold before anything is decoded.
//!
//! What that means where decoders differ:
//! - Alpha is dropped, not composited: the colour below a transparent pixel shows. So does the colour of a transparent palette entry.
//! - A 16-bit grey PNG is cut off at 255, not divided by 257 (Pillow's `I;16` to `RGB`): such a picture comes out nearly white.
//!   16-bit colour keeps its high byte.
//! - The first frame of an animation, on a canvas of its transparent colour.
//! - The EXIF orientation is ignored, as original LLaVA and Pillow itself do; a phone's photo may lie on its side. Rotating it would
//!   give the model other tokens than the reference gives it.
//!
//! PNG, GIF, WebP and BMP of 24 or 32 bits or with a palette give Pillow's very bytes; BMP of 16 bits may differ by one level, and a
//! GIF without any palette is refused. JPEG differs from libjpeg-turbo: at 4:4:4 and in grey by a rounding in 1 to 3 % of the bytes; at
//! 4:2:0, where colour is interpolated differently, by 0.4 levels on average (largest seen: 5 in photos, 30 at hard edges of colour).
//! After resizing a 1280 x 960 photo to 336 that is 0.0055 on average in the pixel values, 0.03 at most.

use std::fs::File;
use std::io::{BufReader, Cursor, Read, Seek};
use std::path::Path;

use image::ImageDecoder;
use image::codecs::{bmp::BmpDecoder, jpeg::JpegDecoder, webp::WebPDecoder};

use super::{CHANNELS, RgbImage};
use crate::error::{Error, Result};

/// What a picture may cost. Checked against the file's header, before memory is taken for its pixels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Largest file in bytes.
    pub max_bytes: usize,
    /// Longest side in pixels.
    pub max_side: usize,
    /// Most pixels, width times height.
    pub max_pixels: usize,
    /// Most memory in bytes that a decoder may take for one buffer.
    pub max_alloc_bytes: usize,
}

impl Default for Limits {
    /// 20 MB, 16,384 pixels a side, 40 megapixels, and as much memory as the largest such picture needs.
    fn default() -> Self {
        Self { max_bytes: 20_000_000, max_side: 16_384, max_pixels: 40_000_000, max_alloc_bytes: 200_000_000 }
    }
}

impl Limits {
    /// Refuses a file that is too large. `at_least` is its size, or as much of it as was read.
    pub(super) fn check_bytes(&self, at_least: usize) -> Result<(), String> {
        if at_least > self.max_bytes {
            let megabytes = self.max_bytes as f64 / 1e6;
            return Err(format!("has more than the {megabytes} MB that are allowed: make it smaller, or save it as JPEG"));
        }
        Ok(())
    }

    /// Refuses a picture that is empty or too large, by what its header says.
    fn check_size(&self, width: usize, height: usize) -> Result<(), String> {
        if width == 0 || height == 0 {
            return Err(format!("has no pixels ({width} x {height})"));
        }
        if width > self.max_side || height > self.max_side {
            let max = self.max_side;
            return Err(format!("has {width} x {height} pixels, more than the {max} that are allowed on a side: make it smaller"));
        }
        if width * height > self.max_pixels {
            let max = self.max_pixels as f64 / 1e6;
            return Err(format!("has {width} x {height} pixels, more than the {max} megapixels that are allowed: make it smaller"));
        }
        Ok(())
    }

    /// A zeroed buffer for a decoder to write into.
    fn buffer(&self, bytes: u64) -> Result<Vec<u8>, String> {
        match usize::try_from(bytes) {
            Ok(bytes) if bytes <= self.max_alloc_bytes => Ok(vec![0; bytes]),
            _ => Err(format!(
                "needs {bytes} bytes to decode, more than the {} that are allowed: make it smaller",
                self.max_alloc_bytes
            )),
        }
    }
}

/// The pixels of the picture in `bytes`, whose format is told by its content alone. `name` is for messages.
///
/// Takes PNG, JPEG, WebP, GIF and BMP. Refused with one line: a file of another kind, one that was cut off or damaged, one that is
/// larger than `limits`.
pub fn decode(bytes: &[u8], name: &str, limits: &Limits) -> Result<RgbImage> {
    let decoded = limits.check_bytes(bytes.len()).and_then(|()| match Format::of(bytes) {
        Some(Format::Png) => decode_png(bytes, limits),
        Some(Format::Gif) => decode_gif(bytes, limits),
        Some(Format::Jpeg) => {
            if !jpeg_is_complete(bytes) {
                return Err("is a JPEG that was cut off: copy or download it again".to_owned());
            }
            JpegDecoder::new(Cursor::new(bytes)).map_err(|e| damaged("JPEG", e)).and_then(|d| read(d, "JPEG", limits))
        }
        Some(Format::WebP) => {
            WebPDecoder::new(Cursor::new(bytes)).map_err(|e| damaged("WebP", e)).and_then(|d| read(d, "WebP", limits))
        }
        Some(Format::Bmp) => {
            BmpDecoder::new(Cursor::new(bytes)).map_err(|e| damaged("BMP", e)).and_then(|d| read(d, "BMP", limits))
        }
        None => Err(no_picture(bytes)),
    });
    decoded.map_err(|problem| Error::image(name, problem))
}

/// Width and height of the picture in a file, by its header alone, with the limits that [`decode`] has. A picture whose header is good may
/// still be damaged behind it.
///
/// # Errors
/// If the file cannot be read, is no picture, or too large.
pub fn probe(path: &Path, limits: &Limits) -> Result<(usize, usize)> {
    let mut file = File::open(path).map_err(|e| Error::io(path, e))?;
    let n_bytes = file.metadata().map_err(|e| Error::io(path, e))?.len();
    let mut head = Vec::new();
    file.by_ref().take(512).read_to_end(&mut head).map_err(|e| Error::io(path, e))?;
    file.rewind().map_err(|e| Error::io(path, e))?;
    let size = limits.check_bytes(usize::try_from(n_bytes).unwrap_or(usize::MAX)).and_then(|()| {
        let (format, name) = match Format::of(&head) {
            Some(Format::Png) => (image::ImageFormat::Png, "PNG"),
            Some(Format::Jpeg) => (image::ImageFormat::Jpeg, "JPEG"),
            Some(Format::WebP) => (image::ImageFormat::WebP, "WebP"),
            Some(Format::Gif) => (image::ImageFormat::Gif, "GIF"),
            Some(Format::Bmp) => (image::ImageFormat::Bmp, "BMP"),
            None => return Err(no_picture(&head)),
        };
        let reader = image::ImageReader::with_format(BufReader::new(file), format);
        let (width, height) = reader.into_dimensions().map_err(|e| damaged(name, e))?;
        let (width, height) = (width as usize, height as usize);
        limits.check_size(width, height).map(|()| (width, height))
    });
    size.map_err(|problem| Error::image(path.display().to_string(), problem))
}

/// What to say of a file that is none of ours.
fn no_picture(bytes: &[u8]) -> String {
    format!("is not a picture that can be read but {}: give a PNG, JPEG, WebP, GIF or BMP file", other_content(bytes))
}

/// The formats that are read.
#[derive(Clone, Copy)]
enum Format {
    Png,
    Jpeg,
    WebP,
    Gif,
    Bmp,
}

impl Format {
    /// By the first bytes.
    fn of(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => Some(Self::Png),
            [0xff, 0xd8, 0xff, ..] => Some(Self::Jpeg),
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Some(Self::WebP),
            [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => Some(Self::Gif),
            [b'B', b'M', ..] => Some(Self::Bmp),
            _ => None,
        }
    }
}

/// What a file that is no picture of ours seems to be, for the message.
fn other_content(bytes: &[u8]) -> &'static str {
    let head = &bytes[..bytes.len().min(512)];
    let starts = |magic: &[u8]| head.starts_with(magic);
    let brand = head.get(4..12).filter(|b| b.starts_with(b"ftyp")).map(|b| &b[4..]);
    if head.is_empty() {
        return "an empty file";
    } else if let Some(brand) = brand {
        return match brand {
            b"avif" | b"avis" => "an AVIF picture",
            b"heic" | b"heix" | b"mif1" | b"msf1" => "a HEIC picture",
            _ => "a video",
        };
    } else if starts(b"II*\0") || starts(b"MM\0*") {
        return "a TIFF picture";
    } else if starts(b"\xff\x0a") || starts(b"\0\0\0\x0cJXL ") {
        return "a JPEG XL picture";
    } else if starts(b"\0\0\0\x0cjP  ") {
        return "a JPEG 2000 picture";
    } else if starts(b"\0\0\x01\0") {
        return "an icon";
    } else if starts(b"%PDF") {
        return "a PDF document";
    } else if starts(b"PK\x03\x04") || starts(b"\x1f\x8b") {
        return "an archive";
    } else if starts(b"version https://git-lfs") {
        return "a Git LFS pointer (fetch the file itself with `git lfs pull`)";
    }
    // Text may be cut inside of a character at the end of `head`.
    let text = match std::str::from_utf8(head) {
        Ok(text) => text,
        Err(e) if e.error_len().is_none() => std::str::from_utf8(&head[..e.valid_up_to()]).unwrap_or_default(),
        Err(_) => "",
    };
    let text = text.trim_start_matches('\u{feff}').trim_start();
    if text.is_empty() || text.contains('\0') {
        "data of an unknown kind"
    } else if text.starts_with("<svg") || (text.starts_with("<?xml") && text.contains("<svg")) {
        "an SVG drawing"
    } else if text.get(..9).is_some_and(|t| t.eq_ignore_ascii_case("<!doctype")) || text.starts_with("<html") {
        "a web page (was it downloaded from a link to a page?)"
    } else if text.starts_with(['{', '[']) {
        "JSON text"
    } else {
        "text"
    }
}

/// The message for a file of the right kind that its decoder refuses, on one line whatever the decoder wrote.
fn damaged(format: &str, error: impl std::fmt::Display) -> String {
    let error = error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
    format!("is a {format} that is damaged, cut off or of an unusual kind ({error}): open it in an image editor and save it again")
}

/// Reads what a decoder of the `image` crate offers, after a look at the size.
fn read(mut decoder: impl ImageDecoder, format: &str, limits: &Limits) -> Result<RgbImage, String> {
    let (width, height) = decoder.dimensions();
    limits.check_size(width as usize, height as usize)?;
    let mut decoder_limits = image::Limits::no_limits();
    decoder_limits.max_alloc = Some(limits.max_alloc_bytes as u64);
    decoder.set_limits(decoder_limits).map_err(|e| damaged(format, e))?;
    let color = decoder.color_type();
    let mut samples = limits.buffer(decoder.total_bytes())?;
    decoder.read_image(&mut samples).map_err(|e| damaged(format, e))?;
    let pixels = match color {
        image::ColorType::L8 => grey_to_rgb(&samples),
        image::ColorType::Rgb8 => samples,
        image::ColorType::Rgba8 => keep_rgb(&samples),
        other => return Err(format!("is a {format} of an unusual kind ({other:?}): save it with 8 bits per channel")),
    };
    checked_image(width as usize, height as usize, pixels)
}

/// PNG through the `png` crate itself: 16-bit grey and transparency must be told apart from what they would be expanded to.
fn decode_png(bytes: &[u8], limits: &Limits) -> Result<RgbImage, String> {
    let problem = |e: png::DecodingError| damaged("PNG", e);
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), png::Limits { bytes: limits.max_alloc_bytes });
    // Neither is of use here, and both may hold compressed bombs.
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    let header = decoder.read_header_info().map_err(problem)?;
    let (width, height) = (header.width as usize, header.height as usize);
    limits.check_size(width, height)?;
    let is_grey16 = header.color_type == png::ColorType::Grayscale && header.bit_depth == png::BitDepth::Sixteen;
    decoder.set_transformations(match is_grey16 {
        true => png::Transformations::IDENTITY,
        false => png::Transformations::EXPAND | png::Transformations::STRIP_16,
    });
    let mut reader = decoder.read_info().map_err(problem)?;
    let mut samples = limits.buffer(reader.output_buffer_size().map_or(u64::MAX, |n| n as u64))?;
    let frame = reader.next_frame(&mut samples).map_err(problem)?;
    let pixels = match frame.color_type {
        png::ColorType::Grayscale if is_grey16 => grey16_to_rgb(&samples),
        png::ColorType::Grayscale => grey_to_rgb(&samples),
        png::ColorType::GrayscaleAlpha => samples.chunks_exact(2).flat_map(|p| [p[0]; CHANNELS]).collect(),
        png::ColorType::Rgb => samples,
        png::ColorType::Rgba => keep_rgb(&samples),
        png::ColorType::Indexed => return Err("is a PNG with a palette that cannot be expanded".to_owned()),
    };
    checked_image(width, height, pixels)
}

/// The first frame of a GIF through the `gif` crate itself, because a transparent pixel must keep its colour.
///
/// As Pillow does it: the canvas grows where the frame is larger, and what the frame leaves free has the transparent colour, or else
/// that of index 0. Indices behind the end of the palette are grey levels.
fn decode_gif(bytes: &[u8], limits: &Limits) -> Result<RgbImage, String> {
    let problem = |e: gif::DecodingError| damaged("GIF", e);
    let mut options = gif::DecodeOptions::new();
    options.set_color_output(gif::ColorOutput::Indexed);
    if let Some(bytes) = std::num::NonZeroU64::new(limits.max_alloc_bytes as u64) {
        options.set_memory_limit(gif::MemoryLimit::Bytes(bytes));
    }
    let mut decoder = options.read_info(bytes).map_err(problem)?;
    let screen = (usize::from(decoder.width()), usize::from(decoder.height()));
    let Some(frame) = decoder.next_frame_info().map_err(problem)? else {
        return Err("is a GIF without a frame".to_owned());
    };
    let [left, top, frame_width, frame_height] = [frame.left, frame.top, frame.width, frame.height].map(usize::from);
    let free = frame.transparent.unwrap_or(0);
    let (width, height) = (screen.0.max(left + frame_width), screen.1.max(top + frame_height));
    limits.check_size(width, height)?;
    let mut indices = limits.buffer((frame_width * frame_height) as u64)?; // [frame_height, frame_width]
    decoder.read_into_buffer(&mut indices).map_err(problem)?;

    let mut palette: [[u8; CHANNELS]; 256] = std::array::from_fn(|level| [level as u8; CHANNELS]);
    for (entry, rgb) in palette.iter_mut().zip(decoder.palette().unwrap_or_default().chunks_exact(CHANNELS)) {
        entry.copy_from_slice(rgb);
    }
    let mut pixels = palette[usize::from(free)].repeat(width * height);
    for (y, row) in indices.chunks_exact(frame_width.max(1)).enumerate() {
        let out = &mut pixels[((top + y) * width + left) * CHANNELS..][..frame_width * CHANNELS];
        for (pixel, &index) in out.chunks_exact_mut(CHANNELS).zip(row) {
            pixel.copy_from_slice(&palette[usize::from(index)]);
        }
    }
    checked_image(width, height, pixels)
}

/// Whether a JPEG has its end: walks from marker to marker, through the coded data between them.
///
/// The decoder fills what is missing with grey, without a word; Pillow refuses any file without an end marker, and so do we.
fn jpeg_is_complete(bytes: &[u8]) -> bool {
    const START_OF_SCAN: u8 = 0xda;
    const END_OF_IMAGE: u8 = 0xd9;
    let mut rest = &bytes[2..];
    let mut in_scan = false;
    loop {
        // Bytes up to the next 0xff are coded data, or stray bytes that decoders skip.
        let Some(at) = rest.iter().position(|&b| b == 0xff) else { return false };
        rest = &rest[at + 1..];
        match rest {
            [] => return false,
            [END_OF_IMAGE, ..] => return true,
            [0xff, ..] => {}                                          // fill byte: the marker is still to come
            [0x00 | 0xd0..=0xd7, ..] if in_scan => rest = &rest[1..], // an escaped 0xff of the data, or a restart
            [0x00 | 0x01 | 0xd0..=0xd8, ..] => rest = &rest[1..],     // markers without a length
            [marker, high, low, ..] => {
                in_scan = *marker == START_OF_SCAN;
                let length = usize::from(u16::from_be_bytes([*high, *low]));
                let Some(after) = rest.get(1 + length..) else { return false };
                rest = after;
            }
            _ => return false,
        }
    }
}

/// [n] to [n, 3].
fn grey_to_rgb(samples: &[u8]) -> Vec<u8> {
    samples.iter().flat_map(|&level| [level; CHANNELS]).collect()
}

/// Big-endian [n] to [n, 3], cut off at 255.
fn grey16_to_rgb(samples: &[u8]) -> Vec<u8> {
    samples.chunks_exact(2).flat_map(|s| [if s[0] > 0 { 255 } else { s[1] }; CHANNELS]).collect()
}

/// [n, 4] to [n, 3].
fn keep_rgb(samples: &[u8]) -> Vec<u8> {
    samples.chunks_exact(4).flat_map(|p| [p[0], p[1], p[2]]).collect()
}

/// The picture, or a message where a decoder gave another number of bytes than its header promised.
fn checked_image(width: usize, height: usize, pixels: Vec<u8>) -> Result<RgbImage, String> {
    RgbImage::new(width, height, pixels).map_err(|e| e.to_string())
}
