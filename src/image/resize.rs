//! Bicubic resizing, byte for byte as Pillow does it (`src/libImaging/Resample.c`, `Image.resize(size, Image.BICUBIC)`).
//!
//! Two passes, along the rows and along the columns, with the picture between them rounded to 8 bits. A pass is skipped where it
//! would not change the size. An output pixel is the weighted mean of the input pixels in its support:
//!
//! ```text
//! scale     = in / out,  stretch = max(scale, 1)            (shrinking widens the filter: antialiasing)
//! centre(o) = (o + 1/2) scale
//! w(o, i)   = cubic((i + 1/2 - centre(o)) / stretch),   i in round(centre ± 2 stretch), inside the picture
//! k(o, i)   = round(2^22 w(o, i) / sum_i w(o, i))
//! out(o)    = clamp((sum_i k(o, i) in(i) + 2^21) >> 22, 0, 255)
//! ```
//!
//! Weights are made in f64 and used as integers, so the result depends on neither the machine nor the order of the sums. No resizer
//! among the usual crates rounds like this; they are off by up to 23 levels.
//!
//! Output pixels do not depend on each other, so a [`Window`] of the output can be had for the cost of the window. And input rows
//! are read one at a time, so a [`Canvas`] wider than its picture never exists as a whole.

use std::ops::Range;

use super::{CHANNELS, RgbImage};
use crate::error::{Error, Result};

/// Fractional bits of a weight: 32, less 8 of the pixel, less 2 of headroom for the lobes of the filter.
const WEIGHT_BITS: u32 = 32 - 8 - 2;

/// Half width of the cubic at scale 1, in pixels.
const SUPPORT: f64 = 2.0;

/// Taps that the horizontal pass adds up side by side: the fewest that fill whole registers of 8 x i32 with pixels of 3 channels.
const TAP_BLOCK: usize = 8;

/// Sums that the horizontal pass keeps side by side.
const LANES: usize = TAP_BLOCK * CHANNELS;

/// A picture resized to `width` x `height` pixels, whatever that does to its proportions.
///
/// Refused if a side of the result is zero, or if it would not fit into memory.
pub fn resize_bicubic(image: &RgbImage, width: usize, height: usize) -> Result<RgbImage> {
    let bytes = width.checked_mul(height).and_then(|n| n.checked_mul(CHANNELS)).filter(|&n| n > 0 && n <= isize::MAX as usize);
    if bytes.is_none() {
        return Err(Error::shape("resize", "size", "at least 1 x 1, within memory", (width, height)));
    }
    let window = Window { columns: 0..width, rows: 0..height };
    Ok(RgbImage { width, height, pixels: Resize::new(Canvas::of(image), width, height, &window).run() })
}

/// A part of an output picture, in pixels.
#[derive(Clone, Debug)]
pub(super) struct Window {
    /// Columns from the left.
    pub columns: Range<usize>,
    /// Rows from the top.
    pub rows: Range<usize>,
}

/// A picture somewhere on a larger field of one colour.
pub(crate) struct Canvas<'a> {
    image: &'a RgbImage,
    width: usize,
    height: usize,
    /// Columns of the field to the left of the picture.
    left: usize,
    /// Rows of the field above the picture.
    top: usize,
    fill: [u8; CHANNELS],
}

impl<'a> Canvas<'a> {
    /// The picture alone.
    pub fn of(image: &'a RgbImage) -> Self {
        Self { image, width: image.width, height: image.height, left: 0, top: 0, fill: [0; CHANNELS] }
    }

    /// The picture in the middle of the square of its longer side (LLaVA's `expand2square`).
    pub fn square(image: &'a RgbImage, fill: [u8; CHANNELS]) -> Self {
        let side = image.width.max(image.height);
        Self { image, width: side, height: side, left: (side - image.width) / 2, top: (side - image.height) / 2, fill }
    }

    /// Width in pixels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// The picture that is on it.
    pub fn image(&self) -> &'a RgbImage {
        self.image
    }

    /// The columns that the picture takes.
    pub fn image_columns(&self) -> Range<usize> {
        self.left..self.left + self.image.width
    }

    /// The rows that the picture takes.
    pub fn image_rows(&self) -> Range<usize> {
        self.top..self.top + self.image.height
    }

    /// The colour of the field.
    pub fn fill(&self) -> [u8; CHANNELS] {
        self.fill
    }

    /// The row of the picture that lies in row `y`, or `None` if that row is all field.
    fn image_row(&self, y: usize) -> Option<&'a [u8]> {
        self.image_rows().contains(&y).then(|| self.image.row(y - self.top))
    }

    /// Writes the picture's part of a row; the rest of `row`, [width, 3], keeps the fill colour it was made with.
    fn write_row(&self, image_row: &[u8], row: &mut [u8]) {
        row[self.left * CHANNELS..][..image_row.len()].copy_from_slice(image_row);
    }
}

/// How a window of a canvas is resized: both passes with their weights, and which comes first. A device may run both passes where the
/// host skips one that would change nothing: its weights are then 2^22 at the pixel itself and 0 beside it.
pub(crate) struct Resize<'a> {
    /// What is resized.
    pub canvas: Canvas<'a>,
    /// Weights of the window's columns.
    pub horizontal: Weights,
    /// Weights of the window's rows.
    pub vertical: Weights,
    /// Whether the columns are resized before the rows.
    pub vertical_first: bool,
}

impl<'a> Resize<'a> {
    /// The window of `canvas` resized to `width` x `height`.
    pub(super) fn new(canvas: Canvas<'a>, width: usize, height: usize, window: &Window) -> Self {
        Self {
            horizontal: Weights::new(canvas.width, width, window.columns.clone()),
            vertical: Weights::new(canvas.height, height, window.rows.clone()),
            vertical_first: vertical_first(&canvas, width, height),
            canvas,
        }
    }

    /// The window's pixels, [window rows, window columns, 3]. The first of two passes makes only what the second one reads.
    pub(super) fn run(&self) -> Vec<u8> {
        let Self { canvas, horizontal, vertical, .. } = self;
        let (columns, rows) = (&horizontal.outputs, &vertical.outputs);
        let horizontal = (!horizontal.keeps_length).then_some(horizontal);
        let vertical = (!vertical.keeps_length).then_some(vertical);
        match (horizontal, vertical) {
            (Some(_), Some(vertical)) if self.vertical_first => {
                let read = narrow(canvas, None, &(0..canvas.width), vertical.inputs());
                let pixels = shorten(&read, canvas.width * CHANNELS, vertical.inputs().start, vertical);
                let shortened = RgbImage { width: canvas.width, height: rows.len(), pixels };
                narrow(&Canvas::of(&shortened), horizontal, columns, 0..shortened.height)
            }
            (horizontal, Some(vertical)) => {
                let read = narrow(canvas, horizontal, columns, vertical.inputs());
                shorten(&read, columns.len() * CHANNELS, vertical.inputs().start, vertical)
            }
            (horizontal, None) => narrow(canvas, horizontal, columns, rows.clone()),
        }
    }
}

/// Whether the columns are resized before the rows, which changes what is rounded to 8 bits in between.
///
/// Pillow does so since version 13 where the height shrinks by more than twice as many pixels as the width (pull request 9549); for a
/// resize that keeps the proportions, where the picture is more than twice as high as wide. Older versions always begin with the rows.
fn vertical_first(canvas: &Canvas, width: usize, height: usize) -> bool {
    let shrinks_by = |from: usize, to: usize| from as i64 - to as i64;
    shrinks_by(canvas.height, height) > (2 * shrinks_by(canvas.width, width)).max(0)
}

/// Horizontal pass: `rows` of the canvas at their final width, [rows, columns, 3]. Without weights the columns are taken as they are.
fn narrow(canvas: &Canvas, weights: Option<&Weights>, columns: &Range<usize>, rows: Range<usize>) -> Vec<u8> {
    let row_bytes = columns.len() * CHANNELS;
    let mut out = vec![0; rows.len() * row_bytes];
    // Long enough that a block of taps which starts in the row may end behind it, where its weights are zero.
    let mut row = canvas.fill.repeat(canvas.width + TAP_BLOCK);
    let weights = weights.map(|w| (w, w.by_channel()));
    let pass = |row: &[u8], out: &mut [u8]| match &weights {
        Some((weights, by_channel)) => narrow_row_fast(row, out, weights, by_channel),
        None => out.copy_from_slice(&row[columns.start * CHANNELS..][..row_bytes]),
    };
    let mut field = vec![0; row_bytes];
    pass(&row, &mut field);
    for (y, out) in rows.zip(out.chunks_exact_mut(row_bytes)) {
        match canvas.image_row(y) {
            Some(image_row) => {
                canvas.write_row(image_row, &mut row);
                pass(&row, out);
            }
            None => out.copy_from_slice(&field),
        }
    }
    out
}

/// Vertical pass: `image`, whose first row is row `first` of the canvas, to its final height.
fn shorten(image: &[u8], row_bytes: usize, first: usize, weights: &Weights) -> Vec<u8> {
    let mut out = vec![0; weights.bounds.len() * row_bytes];
    let mut sums = vec![0; row_bytes];
    for ((out, k), bounds) in out.chunks_exact_mut(row_bytes).zip(weights.k.chunks_exact(weights.padded_taps)).zip(&weights.bounds)
    {
        shorten_row_fast(image, out, &mut sums, first, bounds, k);
    }
    out
}

/// One row of the horizontal pass: `row` [canvas width + TAP_BLOCK, 3] to `out` [columns, 3].
#[inline(always)]
fn narrow_row(row: &[u8], out: &mut [u8], weights: &Weights, by_channel: &[i32]) {
    let stride = weights.padded_taps * CHANNELS;
    for ((out, k), bounds) in out.chunks_exact_mut(CHANNELS).zip(by_channel.chunks_exact(stride)).zip(&weights.bounds) {
        let n_lanes = bounds.len().next_multiple_of(TAP_BLOCK) * CHANNELS;
        let (pixels, _) = row[bounds.start * CHANNELS..][..n_lanes].as_chunks::<LANES>();
        let (k, _) = k[..n_lanes].as_chunks::<LANES>();
        let mut sums = [0i32; LANES];
        for (pixels, k) in pixels.iter().zip(k) {
            for lane in 0..LANES {
                sums[lane] += i32::from(pixels[lane]) * k[lane];
            }
        }
        for (channel, out) in out.iter_mut().enumerate() {
            *out = to_u8(sums.iter().skip(channel).step_by(CHANNELS).sum());
        }
    }
}

/// One row of the vertical pass: the rows of `image` from row `bounds.start - first` on, weighted with `k`, to `out`; all rows are as
/// long as `sums`.
#[inline(always)]
fn shorten_row(image: &[u8], out: &mut [u8], sums: &mut [i32], first: usize, bounds: &Range<usize>, k: &[i32]) {
    sums.fill(0);
    for (y, &k) in bounds.clone().zip(k) {
        let row = &image[(y - first) * sums.len()..][..sums.len()];
        for (sum, &pixel) in sums.iter_mut().zip(row) {
            *sum += i32::from(pixel) * k;
        }
    }
    for (out, &sum) in out.iter_mut().zip(&*sums) {
        *out = to_u8(sum);
    }
}

/// Runs the same loops compiled for AVX2 where the machine has it: x86-64 alone has no 32-bit multiplication of vectors, which makes
/// them four times slower. Integers, so the results are the same.
macro_rules! dispatch {
    ($function:ident($($arg:ident: $type:ty),*)) => {{
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx2")]
            fn avx2($($arg: $type),*) {
                $function($($arg),*);
            }
            if is_x86_feature_detected!("avx2") {
                // SAFETY: the only thing that `avx2` asks for is AVX2, which was just found.
                return unsafe { avx2($($arg),*) };
            }
        }
        $function($($arg),*)
    }};
}

/// [`narrow_row`] as fast as this machine can.
fn narrow_row_fast(row: &[u8], out: &mut [u8], weights: &Weights, by_channel: &[i32]) {
    dispatch!(narrow_row(row: &[u8], out: &mut [u8], weights: &Weights, by_channel: &[i32]))
}

/// [`shorten_row`] as fast as this machine can.
fn shorten_row_fast(image: &[u8], out: &mut [u8], sums: &mut [i32], first: usize, bounds: &Range<usize>, k: &[i32]) {
    dispatch!(shorten_row(image: &[u8], out: &mut [u8], sums: &mut [i32], first: usize, bounds: &Range<usize>, k: &[i32]))
}

/// A weighted sum back to a pixel, rounded half up. It cannot have overflowed: weights sum up to 2^22, and the absolute values of a
/// cubic's to less than twice that, so |sum| < 2^31.
fn to_u8(sum: i32) -> u8 {
    ((sum + (1 << (WEIGHT_BITS - 1))) >> WEIGHT_BITS).clamp(0, 255) as u8
}

/// What each output coordinate of one axis is made of.
pub(crate) struct Weights {
    /// The output coordinates.
    pub outputs: Range<usize>,
    /// The input coordinates that an output coordinate reads.
    pub bounds: Vec<Range<usize>>,
    /// Their weights in units of 2^-22, [outputs, padded_taps], zero behind the end of the bounds.
    pub k: Vec<i32>,
    /// Room for the taps of one output, a multiple of [`TAP_BLOCK`].
    pub padded_taps: usize,
    /// Whether the axis keeps its length, and so all its pixels.
    keeps_length: bool,
}

impl Weights {
    /// For the output coordinates `outputs` of an axis of `n_in` pixels that becomes `n_out` long.
    fn new(n_in: usize, n_out: usize, outputs: Range<usize>) -> Self {
        let scale = n_in as f64 / n_out as f64;
        let stretch = scale.max(1.0);
        let support = SUPPORT * stretch;
        let max_taps = (support.ceil() as usize * 2 + 1).min(n_in);
        let padded_taps = max_taps.next_multiple_of(TAP_BLOCK);
        let mut bounds = Vec::with_capacity(outputs.len());
        let mut k = vec![0; outputs.len() * padded_taps];
        let mut w = Vec::with_capacity(max_taps);
        for (o, k) in outputs.clone().zip(k.chunks_exact_mut(padded_taps)) {
            let centre = (o as f64 + 0.5) * scale;
            // `as usize` cuts off the fraction and takes anything negative as zero, as the reference does in two steps.
            let start = (centre - support + 0.5) as usize;
            let end = ((centre + support + 0.5) as usize).min(n_in);
            // The reference multiplies by the reciprocal; a division would round differently.
            let per_pixel = 1.0 / stretch;
            w.clear();
            w.extend((0..end - start).map(|i| cubic((i as f64 + start as f64 - centre + 0.5) * per_pixel)));
            let total: f64 = w.iter().sum();
            for (k, w) in k.iter_mut().zip(&w) {
                *k = fixed_point(w / total);
            }
            bounds.push(start..end);
        }
        Self { outputs, bounds, k, padded_taps, keeps_length: n_in == n_out }
    }

    /// All input coordinates that are read: bounds grow with the output coordinate.
    pub fn inputs(&self) -> Range<usize> {
        match (self.bounds.first(), self.bounds.last()) {
            (Some(first), Some(last)) => first.start..last.end,
            _ => 0..0,
        }
    }

    /// Each weight repeated for each channel, [outputs, padded_taps, 3]: then a row of pixels is multiplied element by element.
    fn by_channel(&self) -> Vec<i32> {
        self.k.iter().flat_map(|&k| [k; CHANNELS]).collect()
    }
}

/// A weight as an integer, rounded half away from zero.
fn fixed_point(weight: f64) -> i32 {
    (weight * f64::from(1 << WEIGHT_BITS) + if weight < 0.0 { -0.5 } else { 0.5 }) as i32
}

/// Keys' cubic with a = -1/2, in Pillow's order of operations ("Cubic convolution interpolation for digital image processing", 1981).
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patterned(width: usize, height: usize) -> RgbImage {
        let value = |i: usize| (i.wrapping_mul(2_654_435_761) >> 9) as u8;
        RgbImage::new(width, height, (0..width * height * CHANNELS).map(value).collect()).unwrap()
    }

    /// Bits of a row, made with and without vector instructions.
    #[test]
    fn every_instruction_set_gives_the_same_bytes() {
        for (n_in, n_out) in [(1, 9), (7, 7), (61, 23), (200, 3), (37, 111)] {
            let weights = Weights::new(n_in, n_out, 0..n_out);
            let image = patterned(n_in + TAP_BLOCK, 1);
            let (mut plain, mut fast) = (vec![1; n_out * CHANNELS], vec![2; n_out * CHANNELS]);
            narrow_row(image.pixels(), &mut plain, &weights, &weights.by_channel());
            narrow_row_fast(image.pixels(), &mut fast, &weights, &weights.by_channel());
            assert_eq!(plain, fast, "{n_in} to {n_out} columns");

            let column = patterned(5, n_in);
            let (mut plain, mut fast, mut sums) = (vec![1; 15], vec![2; 15], vec![0; 15]);
            for (k, bounds) in weights.k.chunks_exact(weights.padded_taps).zip(&weights.bounds) {
                shorten_row(column.pixels(), &mut plain, &mut sums, 0, bounds, k);
                shorten_row_fast(column.pixels(), &mut fast, &mut sums, 0, bounds, k);
                assert_eq!(plain, fast, "{n_in} to {n_out} rows");
            }
        }
    }

    #[test]
    fn a_window_is_a_part_of_the_whole() {
        for (width, height, to_width, to_height) in [(40, 30, 17, 23), (9, 60, 8, 20), (12, 12, 12, 31), (20, 10, 33, 10)] {
            let image = patterned(width, height);
            let whole = resize_bicubic(&image, to_width, to_height).unwrap();
            let window = Window { columns: 3..7, rows: 5..9 };
            let part = Resize::new(Canvas::of(&image), to_width, to_height, &window).run();
            let expected: Vec<u8> = window.rows.flat_map(|y| whole.row(y)[3 * CHANNELS..7 * CHANNELS].to_vec()).collect();
            assert_eq!(part, expected, "{width} x {height} to {to_width} x {to_height}");
        }
    }

    #[test]
    fn a_canvas_is_the_padded_picture() {
        for (width, height) in [(9, 4), (4, 9), (8, 3), (1, 6), (5, 5)] {
            let (image, fill, side) = (patterned(width, height), [1, 2, 3], width.max(height));
            let mut square = RgbImage::filled(side, side, fill).unwrap();
            for y in 0..height {
                let at = ((y + (side - height) / 2) * side + (side - width) / 2) * CHANNELS;
                square.pixels[at..at + width * CHANNELS].copy_from_slice(image.row(y));
            }
            for to in [side, 7, 30] {
                let window = Window { columns: 0..to, rows: 0..to };
                let expected = resize_bicubic(&square, to, to).unwrap();
                assert_eq!(
                    Resize::new(Canvas::square(&image, fill), to, to, &window).run(),
                    expected.pixels(),
                    "{width} x {height} to {to}"
                );
            }
        }
    }
}
