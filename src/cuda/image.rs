//! Launches of `kernels/image.cu`: pictures are resized and normalised where the tower runs, and cross the bus as bytes.
//!
//! A picture comes in strips of rows, each through the first pass before the next: however large the picture, the device holds one strip
//! and what the first pass made.

use std::ops::Range;

use super::Cuda;
use super::driver::{Arg, DevicePtr, Grid};
use super::launch::{Kernel, address, int};
use super::memory::Allocation;
use crate::error::{Error, Result};
use crate::image::{CHANNELS, Plan, Preprocess, Resize, RgbImage, Weights};
use crate::ops::check;
use crate::tensor::Tensor;

const OP: &str = "preprocess";
/// Threads of a block, in all kernels here.
const THREADS: usize = 128;
/// Bytes of a strip: long enough that copying it is what takes time. One that a single row of the first pass needs may be larger.
const STRIP_BYTES: usize = 16 << 20;
/// Most blocks in y.
const MAX_PARTS: usize = 65_535;

/// `rows` rows of `n` elements, a thread for each.
fn grid(rows: usize, n: usize) -> Result<Grid> {
    let parts = n.div_ceil(THREADS);
    if parts > MAX_PARTS {
        return Err(Error::shape(OP, "width of a picture", format!("at most {}", MAX_PARTS * THREADS / CHANNELS), n / CHANNELS));
    }
    Ok(Grid { blocks: [rows, parts, 1], threads: THREADS, shared_bytes: 0 })
}

/// Pixels on the device, [rows, columns, 3] u8, with where they lie on a field of one colour.
struct Source {
    memory: Allocation,
    rows: Range<usize>,
    columns: Range<usize>,
    fill: [u8; CHANNELS],
}

impl Source {
    fn row_bytes(&self) -> usize {
        self.columns.len() * CHANNELS
    }

    /// As the kernels take it.
    fn args(&self) -> Result<[Arg; 6]> {
        let [r, g, b] = self.fill.map(i32::from);
        Ok([
            Arg::Ptr(self.memory.ptr),
            int(OP, "row of a picture", self.rows.start)?,
            int(OP, "row of a picture", self.rows.end)?,
            int(OP, "column of a picture", self.columns.start)?,
            int(OP, "column of a picture", self.columns.end)?,
            Arg::Int(r | g << 8 | b << 16),
        ])
    }
}

/// The direction of a pass.
#[derive(Clone, Copy, PartialEq)]
enum Axis {
    Horizontal,
    Vertical,
}

/// One pass of a [`Resize`].
struct Pass<'a> {
    axis: Axis,
    weights: &'a Weights,
}

impl Pass<'_> {
    /// The rows that the output rows `rows` are made of.
    fn reads(&self, rows: &Range<usize>) -> Range<usize> {
        match self.axis {
            Axis::Horizontal => rows.clone(),
            Axis::Vertical => {
                let first = self.weights.outputs.start;
                self.weights.bounds[rows.start - first].start..self.weights.bounds[rows.end - 1 - first].end
            }
        }
    }

    /// The weights as the kernels take them: [outputs, 2 + padded_taps], start and number of taps before each output's weights.
    fn taps(&self) -> Result<Vec<i32>> {
        let Weights { bounds, k, padded_taps, .. } = self.weights;
        int(OP, "length of an axis", self.weights.inputs().end)?; // and so all that follows
        let rows = bounds.iter().zip(k.chunks_exact(*padded_taps));
        Ok(rows.flat_map(|(bounds, k)| [bounds.start as i32, bounds.len() as i32].into_iter().chain(k.iter().copied())).collect())
    }

    /// Words of a row of [`Self::taps`].
    fn stride(&self) -> usize {
        2 + self.weights.padded_taps
    }
}

impl Cuda {
    /// [`Ops::preprocess`](crate::ops::Ops::preprocess)
    pub(super) fn preprocess(&self, pixels: &mut Tensor, images: &[RgbImage], config: &Preprocess) -> Result<()> {
        self.preprocess_in_strips(pixels, images, config, STRIP_BYTES)
    }

    /// [`Self::preprocess`] with strips of `strip_bytes`.
    pub(super) fn preprocess_in_strips(
        &self,
        pixels: &mut Tensor,
        images: &[RgbImage],
        config: &Preprocess,
        strip_bytes: usize,
    ) -> Result<()> {
        check::preprocess(pixels, images, config)?;
        let to = address(OP, "pixels", pixels)?;
        let levels: Vec<i32> = config.levels().as_flattened().iter().map(|level| level.to_bits() as i32).collect();
        let bytes_per_image = pixels.row_len() * pixels.dtype().size();
        for (i, image) in images.iter().enumerate() {
            let Plan { resize, left, top } = config.plan(image);
            let mut cropped = self.resize(&resize, strip_bytes)?;
            // In the crop's coordinates; what the picture does not fill is black.
            cropped.rows = top..top + cropped.rows.len();
            cropped.columns = left..left + cropped.columns.len();
            cropped.fill = [0; CHANNELS];
            let side = config.crop_size;
            let mut args = vec![Arg::Ptr(to.offset(i * bytes_per_image)), int(OP, "crop_size", side)?];
            args.extend(cropped.args()?);
            let grid = grid(CHANNELS * side, side)?;
            self.with_ints(levels.clone(), |levels| {
                args.push(Arg::Ptr(levels));
                // SAFETY: the arguments are the kernel's; picture i of pixels has three planes of side², `cropped` has the rows and
                // columns that it says, and levels one value for each u8 of each channel.
                unsafe { self.launch(Kernel::Normalize, grid, &args) }
            })?;
        }
        Ok(())
    }

    /// The window's pixels, in the coordinates of the resized picture. Both passes are made, whatever they change: one that keeps the
    /// length copies.
    fn resize(&self, resize: &Resize<'_>, strip_bytes: usize) -> Result<Source> {
        let horizontal = Pass { axis: Axis::Horizontal, weights: &resize.horizontal };
        let vertical = Pass { axis: Axis::Vertical, weights: &resize.vertical };
        let (rows, columns) = (&resize.vertical.outputs, &resize.horizontal.outputs);
        // The first pass makes what the second one reads.
        let (first, second, rows_between, columns_between) = if resize.vertical_first {
            (vertical, horizontal, rows.clone(), resize.horizontal.inputs())
        } else {
            (horizontal, vertical, resize.vertical.inputs(), columns.clone())
        };
        let canvas = &resize.canvas;
        let between = self.bytes(rows_between, columns_between, canvas.fill())?;
        let image = canvas.image();
        let row_bytes = image.width() * CHANNELS;
        // The rows of the picture that an output needs; the others on the canvas are field.
        let needs = |rows: &Range<usize>| {
            let (reads, picture) = (first.reads(rows), canvas.image_rows());
            let start = reads.start.clamp(picture.start, picture.end);
            start..reads.end.clamp(start, picture.end)
        };
        let mut strip = between.rows.start..between.rows.start;
        while strip.end < between.rows.end {
            strip = strip.end..strip.end + 1;
            while strip.end < between.rows.end && needs(&(strip.start..strip.end + 1)).len() * row_bytes <= strip_bytes {
                strip.end += 1;
            }
            let source = self.bytes(needs(&strip), canvas.image_columns(), canvas.fill())?;
            let in_image = |row: usize| (row - canvas.image_rows().start) * row_bytes;
            let pixels = &image.pixels()[in_image(source.rows.start)..in_image(source.rows.end)];
            self.queue.flush()?;
            // SAFETY: the memory was made for these rows, and what may have used it before is launched.
            unsafe { self.driver.upload(source.memory.ptr, pixels)? };
            self.pass(&first, &between, strip.clone(), &source)?;
        }
        let out = self.bytes(rows.clone(), columns.clone(), canvas.fill())?;
        self.pass(&second, &out, rows.clone(), &between)?;
        Ok(out)
    }

    /// Memory for pixels, with anything in it. Sizes are rounded up to powers of two: pictures of all sizes come, and what the arena took
    /// once it keeps.
    fn bytes(&self, rows: Range<usize>, columns: Range<usize>, fill: [u8; CHANNELS]) -> Result<Source> {
        let memory = self.arena.alloc((rows.len() * columns.len() * CHANNELS).next_power_of_two())?;
        Ok(Source { memory, rows, columns, fill })
    }

    /// Queues the rows `rows` of `to`, made from `from`, which holds all that they read but field.
    fn pass(&self, pass: &Pass<'_>, to: &Source, rows: Range<usize>, from: &Source) -> Result<()> {
        let y = to.memory.ptr.offset((rows.start - to.rows.start) * to.row_bytes());
        let mut args = vec![Arg::Ptr(y), int(OP, "columns", to.columns.len())?];
        args.extend(from.args()?);
        let stride = int(OP, "taps", pass.stride())?;
        let (kernel, skipped, first) = match pass.axis {
            Axis::Horizontal => (Kernel::ResizeHorizontal, 0, rows.start),
            Axis::Vertical => (Kernel::ResizeVertical, rows.start - to.rows.start, to.columns.start),
        };
        let first = int(OP, "first row or column", first)?;
        let grid = grid(rows.len(), to.row_bytes())?;
        self.with_ints(pass.taps()?, |taps: DevicePtr| {
            args.extend([Arg::Ptr(taps.offset(skipped * pass.stride() * 4)), stride, first]);
            // SAFETY: the arguments are the kernel's; `to` has these rows, taps an entry for each column (or, `skipped` further on, row)
            // of it, and the kernel reads of `from` only the rows and columns that it says it has.
            unsafe { self.launch(kernel, grid, &args) }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A launch would be refused, when nobody knows any more what for.
    #[test]
    fn pictures_wider_than_a_grid_are_refused() {
        let widest = MAX_PARTS * THREADS;
        assert_eq!(grid(7, widest).unwrap().blocks, [7, 65_535, 1]);
        let error = grid(7, widest + CHANNELS).unwrap_err().to_string();
        assert!(error.contains("width of a picture") && error.contains(&(widest / CHANNELS).to_string()), "{error}");
    }
}
