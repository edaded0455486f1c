//! [`Packed`]: a matrix of 4- or 8-bit integers with scales, in the order in which kernels read it.

use std::fmt;

use half::f16;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Rows of a block: what a CPU's vectors and a tensor core's fragments are made of. A matrix is filled up to whole blocks.
pub const BLOCK_ROWS: usize = 16;
/// Columns of a slab, the smallest piece of a row.
pub const SLAB: usize = 32;
/// Columns that may share a scale. The largest is as far as 16-bit partial sums of the CPU's kernels carry.
pub const GROUPS: [usize; 3] = [32, 64, 128];

/// A matrix `[n, k]` of integers: w\[row, col\] = scale·q + offset, with a scale and an offset for each row and group of columns.
///
/// | tensor | shape | |
/// |---|---|---|
/// | `words` | i32 `[⌈n/16⌉, k/32, 16, bits]` | the integers q of 16 rows, slab by slab |
/// | `scales` | f16 `[⌈n/16⌉, k/group, 16]` | |
/// | `offsets` | f16, as `scales` | none: offset = −zero·scale, zero = 2^(bits−1), the symmetric kind |
///
/// A row has `bits` words (4·bits bytes, little-endian) in a slab. With 8 bits, byte i is column i. With 4 bits, the low half of byte i is
/// column i, the high half column 16 + i. So a row's part of a slab is 16 or 32 bytes in a row, and the 16 rows of a slab lie together: a CPU
/// streams a block from end to end, and the lanes of a GPU's warp read 16 bytes each of neighbouring rows.
#[derive(Debug)]
pub struct Packed {
    /// 4 or 8.
    pub bits: usize,
    /// Columns that share a scale: one of [`GROUPS`].
    pub group: usize,
    /// Rows.
    pub n: usize,
    /// Columns, a multiple of `group`.
    pub k: usize,
    /// The integers.
    pub words: Tensor,
    /// Of each row and group.
    pub scales: Tensor,
    /// Of each row and group.
    pub offsets: Option<Tensor>,
}

/// How a matrix is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// 4 or 8.
    pub bits: usize,
    /// Columns that share a scale.
    pub group: usize,
    /// Whether offsets are stored.
    pub has_offsets: bool,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "int{} in groups of {}{}", self.bits, self.group, if self.has_offsets { " with offsets" } else { "" })
    }
}

impl Format {
    /// Refuses what there are no kernels for.
    pub fn new(bits: usize, group: usize, has_offsets: bool) -> Result<Self> {
        if bits != 4 && bits != 8 {
            return Err(Error::usage(format!("{bits} bits: weights are packed in 4 or 8")));
        }
        if !GROUPS.contains(&group) {
            return Err(Error::usage(format!("a group of {group} columns: use 32, 64 or 128")));
        }
        if bits == 8 && has_offsets {
            return Err(Error::usage("8 bits with offsets: integers of 8 bits are symmetric"));
        }
        Ok(Self { bits, group, has_offsets })
    }

    /// q of weight 0 in the symmetric kind.
    pub fn zero(&self) -> i32 {
        1 << (self.bits - 1)
    }

    /// Shape of `words` for a matrix `[n, k]`.
    pub fn words_shape(&self, n: usize, k: usize) -> [usize; 4] {
        [n.div_ceil(BLOCK_ROWS), k / SLAB, BLOCK_ROWS, self.bits]
    }

    /// Shape of `scales`, and of `offsets` if there are any.
    pub fn scales_shape(&self, n: usize, k: usize) -> [usize; 3] {
        [n.div_ceil(BLOCK_ROWS), k / self.group, BLOCK_ROWS]
    }
}

impl Packed {
    /// A matrix from its tensors, which say by their shapes how they are packed.
    ///
    /// # Errors
    /// If they are not what a matrix `[n, k]` has.
    pub fn new(n: usize, k: usize, words: Tensor, scales: Tensor, offsets: Option<Tensor>) -> Result<Self> {
        const OP: &str = "packed weight";
        let (Some(&bits), &[_, n_groups, _]) = (words.shape().get(3), scales.shape()) else {
            return Err(Error::shape(OP, "words and scales", "4 and 3 dimensions", (&words, &scales)));
        };
        let group = k.checked_div(n_groups).unwrap_or(0);
        let format = Format::new(bits, group, offsets.is_some()).ok().filter(|_| k % group == 0);
        let format = format.ok_or_else(|| {
            let accepted = "4 bits, or 8 without offsets, in groups of 32, 64 or 128";
            Error::shape(OP, format!("words and scales of {n} x {k}"), accepted, (&words, &scales, &offsets))
        })?;
        words.expect(OP, "words", &format.words_shape(n, k))?;
        for (what, dtype, tensor) in
            [("words", DType::I32, Some(&words)), ("scales", DType::F16, Some(&scales)), ("offsets", DType::F16, offsets.as_ref())]
        {
            let Some(tensor) = tensor else { continue };
            if what != "words" {
                tensor.expect(OP, what, &format.scales_shape(n, k))?;
            }
            super::check::dtype(OP, what, tensor, dtype)?;
        }
        Ok(Self { bits, group, n, k, words, scales, offsets })
    }

    /// How it is packed.
    pub fn format(&self) -> Format {
        Format { bits: self.bits, group: self.group, has_offsets: self.offsets.is_some() }
    }

    /// Bytes of all its tensors.
    pub fn bytes(&self) -> usize {
        self.words.bytes() + self.scales.bytes() + self.offsets.as_ref().map_or(0, Tensor::bytes)
    }

    /// The same matrix elsewhere: each tensor as `f` moves it.
    pub fn map(&self, mut f: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Self::new(self.n, self.k, f(&self.words)?, f(&self.scales)?, self.offsets.as_ref().map(f).transpose()?)
    }

    /// Scale and offset of a row and a column. Of tensors on the host.
    pub fn scale_offset(&self, row: usize, col: usize) -> (f32, f32) {
        let at = (row / BLOCK_ROWS * (self.k / self.group) + col / self.group) * BLOCK_ROWS + row % BLOCK_ROWS;
        let scale = self.scales.as_slice::<f16>()[at].to_f32();
        let offset = self.offsets.as_ref().map(|t| t.as_slice::<f16>()[at].to_f32());
        (scale, offset.unwrap_or(-(self.format().zero() as f32) * scale))
    }

    /// The integer at a row and a column. Of tensors on the host.
    pub fn q(&self, row: usize, col: usize) -> u8 {
        let bytes = bytemuck::cast_slice::<i32, u8>(self.words.as_slice());
        let (byte, shift) = place(self.bits, self.k, row, col);
        bytes[byte] >> shift & (u8::MAX >> (8 - self.bits))
    }

    /// The matrix `[n, k]` in f32, as the equation says: what kernels are compared with. Of tensors on the host.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.n * self.k];
        values.chunks_exact_mut(self.k.max(1)).enumerate().for_each(|(row, values)| self.row_to_f32(row, values));
        values
    }

    /// A row of it: `[k]`. Of tensors on the host.
    pub fn row_to_f32(&self, row: usize, values: &mut [f32]) {
        let bytes = bytemuck::cast_slice::<i32, u8>(self.words.as_slice());
        for (slab, values) in values.chunks_exact_mut(SLAB).enumerate() {
            let (scale, offset) = self.scale_offset(row, slab * SLAB);
            let w = |q: u8| scale * f32::from(q) + offset;
            let (first, _) = place(self.bits, self.k, row, slab * SLAB);
            let q = &bytes[first..first + SLAB * self.bits / 8];
            if self.bits == 8 {
                values.iter_mut().zip(q).for_each(|(value, q)| *value = w(*q));
            } else {
                let (low, high) = values.split_at_mut(SLAB / 2);
                low.iter_mut().zip(high).zip(q).for_each(|((low, high), q)| (*low, *high) = (w(q & 15), w(q >> 4)));
            }
        }
    }
}

/// Where the integer at a row and column lies: its byte, and how far it is to be shifted down.
pub fn place(bits: usize, k: usize, row: usize, col: usize) -> (usize, u32) {
    let part = (row / BLOCK_ROWS * (k / SLAB) + col / SLAB) * BLOCK_ROWS + row % BLOCK_ROWS;
    let col = col % SLAB;
    match bits {
        8 => (part * SLAB + col, 0),
        _ => (part * (SLAB / 2) + col % (SLAB / 2), if col < SLAB / 2 { 0 } else { 4 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_that_are_no_packed_matrix_are_refused() {
        let (n, k) = (17, 256);
        let of = |bits, groups, k, offsets: bool, dtype| {
            let scales = || Tensor::zeros(&[2, groups, BLOCK_ROWS], dtype);
            Packed::new(n, k, Tensor::zeros(&[2, 8, BLOCK_ROWS, bits], DType::I32), scales(), offsets.then(scales))
        };
        for (bits, groups, offsets) in [(4, 8, false), (4, 4, true), (4, 2, false), (8, 2, false)] {
            let packed = of(bits, groups, k, offsets, DType::F16).unwrap();
            assert_eq!(packed.format(), Format { bits, group: k / groups, has_offsets: offsets });
        }
        for (bits, groups, k, offsets, dtype) in [
            (3, 2, k, false, DType::F16),
            (8, 2, k, true, DType::F16),
            (4, 0, k, false, DType::F16),
            (4, 16, k, false, DType::F16),
            (4, 1, k, false, DType::F16),
            (4, 2, k - 1, false, DType::F16),
            (4, 2, k + 32, false, DType::F16),
            (4, 2, k, false, DType::Bf16),
        ] {
            let error = of(bits, groups, k, offsets, dtype).expect_err("refused").to_string();
            assert!(error.contains("packed weight"), "{error}");
        }
        let flat = Packed::new(n, k, Tensor::zeros(&[4], DType::I32), Tensor::zeros(&[2, 2, 16], DType::F16), None);
        assert!(flat.is_err());
    }

    /// The equation, element by element.
    #[test]
    fn rows_are_what_their_integers_mean() {
        for (bits, group, has_offsets) in [(4, 64, false), (4, 32, true), (8, 128, false)] {
            let (n, k, format) = (19, 384, Format::new(bits, group, has_offsets).unwrap());
            let shape = format.words_shape(n, k);
            let words: Vec<i32> = (0..shape.iter().product::<usize>() as u32).map(|i| i.wrapping_mul(0x9e37_79b1) as i32).collect();
            let shape_of_scales = format.scales_shape(n, k);
            let halves = |first: usize| {
                let values = (0..shape_of_scales.iter().product()).map(|i: usize| f16::from_f32((first + i) as f32 / 512.0 - 0.3));
                Tensor::from_slice(&shape_of_scales, &values.collect::<Vec<_>>())
            };
            let packed = Packed::new(n, k, Tensor::from_slice(&shape, &words), halves(1), has_offsets.then(|| halves(77))).unwrap();
            for (i, w) in packed.to_f32().into_iter().enumerate() {
                let (scale, offset) = packed.scale_offset(i / k, i % k);
                assert_eq!(w, scale * f32::from(packed.q(i / k, i % k)) + offset, "{format}: {i}");
            }
        }
    }

    /// Every integer has a place of its own, and all places are taken.
    #[test]
    fn places_fill_the_words() {
        for bits in [4, 8] {
            let (n, k) = (2 * BLOCK_ROWS, 2 * SLAB);
            let mut taken = vec![0u8; n * k * bits / 8];
            for (row, col) in (0..n).flat_map(|row| (0..k).map(move |col| (row, col))) {
                let (byte, shift) = place(bits, k, row, col);
                let mask = (u8::MAX >> (8 - bits)) << shift;
                assert_eq!(taken[byte] & mask, 0, "{bits} bits: row {row}, column {col}");
                taken[byte] |= mask;
            }
            assert!(taken.iter().all(|&t| t == u8::MAX), "{bits} bits");
        }
    }
}
