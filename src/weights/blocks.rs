//! The block types of GGUF files: short stretches of a row that share scales, laid one after the other.
//!
//! | type | weights | bytes | a block |
//! |---|---|---|---|
//! | Q4_0 | 32 | 18 | d f16; 16 bytes q, the low half of byte i is weight i, the high half weight 16 + i: w = d·(q − 8) |
//! | Q4_1 | 32 | 20 | d, m f16; q as in Q4_0: w = d·q + m |
//! | Q5_0 | 32 | 22 | d f16; 4 bytes whose bit i is the fifth of q of weight i; the other bits as in Q4_0: w = d·(q − 16) |
//! | Q5_1 | 32 | 24 | d, m f16; q as in Q5_0: w = d·q + m |
//! | Q8_0 | 32 | 34 | d f16; 32 signed bytes q: w = d·q |
//! | Q4_K | 256 | 144 | d, dmin f16; 12 bytes of 6-bit s and m of 8 groups of 32; 128 bytes q of 4 bits: w = d·s·q − dmin·m |
//! | Q5_K | 256 | 176 | as Q4_K, with 32 bytes before those of q: bit i of byte c is the fifth of q of weight c of group i |
//! | Q6_K | 256 | 210 | 128 bytes low and 64 bytes high bits of q; 16 signed bytes s of groups of 16; d f16: w = d·s·(q − 32) |
//!
//! What becomes of them in memory:
//! - Q4_0, Q4_1, Q5_0 and Q8_0 are [`Packed`] in groups of 32 under another order, Q5_0 in 8 bits: exact.
//! - Q4_K is packed in 4 bits with offsets: scale d·s and offset −dmin·m, each rounded to f16, so that a weight is off by at most
//!   2⁻¹¹·(d·s·q + dmin·m) (and 2⁻²¹ where they are below 2⁻¹⁴).
//! - Q5_1, Q5_K and Q6_K have no equal here: offsets come with 4 bits only, and Q6_K's groups are too short for our kernels. They are rounded
//!   anew to 8 bits in groups of 32, by half a step at most. Of normal weights, the error of Q6_K grows from 1.67 % to 1.75 % by that (a
//!   Q4_0 has 9 %), and it takes 8.5 bits a weight. Dense f16 would add nothing that matters, and take twice the memory and time of what
//!   is usually the largest matrix of a file, the decoder's head.

use std::fmt;

use half::f16;

use super::repack::{self, Block};
use crate::cpu::pool::Pool;
use crate::ops::Packed;
use crate::ops::packed::{BLOCK_ROWS, Format, SLAB};
use crate::tensor::Tensor;

/// A number format of stretches of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockType {
    name: &'static str,
    /// Weights of a block.
    pub weights: usize,
    /// Bytes of a block.
    pub bytes: usize,
    kind: Option<Kind>,
}

/// A type that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

impl fmt::Display for BlockType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// The types of ggml that come in blocks, by their numbers in files.
const TYPES: [(u32, BlockType); 21] = [
    (2, BlockType { kind: Some(Kind::Q4_0), ..other("Q4_0", 32, 18) }),
    (3, BlockType { kind: Some(Kind::Q4_1), ..other("Q4_1", 32, 20) }),
    (6, BlockType { kind: Some(Kind::Q5_0), ..other("Q5_0", 32, 22) }),
    (7, BlockType { kind: Some(Kind::Q5_1), ..other("Q5_1", 32, 24) }),
    (8, BlockType { kind: Some(Kind::Q8_0), ..other("Q8_0", 32, 34) }),
    (10, other("Q2_K", 256, 84)),
    (11, other("Q3_K", 256, 110)),
    (12, BlockType { kind: Some(Kind::Q4K), ..other("Q4_K", 256, 144) }),
    (13, BlockType { kind: Some(Kind::Q5K), ..other("Q5_K", 256, 176) }),
    (14, BlockType { kind: Some(Kind::Q6K), ..other("Q6_K", 256, 210) }),
    (16, other("IQ2_XXS", 256, 66)),
    (17, other("IQ2_XS", 256, 74)),
    (18, other("IQ3_XXS", 256, 98)),
    (19, other("IQ1_S", 256, 50)),
    (20, other("IQ4_NL", 32, 18)),
    (21, other("IQ3_S", 256, 110)),
    (22, other("IQ2_S", 256, 82)),
    (23, other("IQ4_XS", 256, 136)),
    (29, other("IQ1_M", 256, 56)),
    (34, other("TQ1_0", 256, 54)),
    (35, other("TQ2_0", 256, 66)),
];

/// A type that is known by name and size only.
const fn other(name: &'static str, weights: usize, bytes: usize) -> BlockType {
    BlockType { name, weights, bytes, kind: None }
}

/// What can be read, for errors.
pub const SUPPORTED: &str = "Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K";

/// 8 signed bits have the largest weight of a group here.
const INT8_MAX: f32 = 127.0;

impl BlockType {
    /// The type that GGUF files number so, if it is one of blocks.
    pub fn of_ggml(number: u32) -> Option<Self> {
        TYPES.iter().find(|(n, _)| *n == number).map(|(_, block)| *block)
    }

    /// Whether weights of this type can be read.
    pub fn is_supported(self) -> bool {
        self.kind.is_some()
    }

    fn kind(self) -> Result<Kind, String> {
        self.kind.ok_or_else(|| format!("is stored as {self}: of block types, {SUPPORTED} are read"))
    }

    /// Bytes of a row of `k` weights, a multiple of a block's.
    fn row_bytes(self, k: usize) -> usize {
        k / self.weights * self.bytes
    }

    /// The matrix `[n, k]` in `bytes` as our kernels take it, row i being the row `row(i)` of the file; how exactly, this module says.
    ///
    /// # Errors
    /// If the type cannot be read, or a scale is not a finite number.
    ///
    /// # Panics
    /// If `bytes` are not those of such a matrix, or rows are not whole blocks.
    pub fn pack(
        self,
        pool: &Pool,
        bytes: &[u8],
        [n, k]: [usize; 2],
        row: impl Fn(usize) -> usize + Sync,
    ) -> Result<Packed, String> {
        let kind = self.kind()?;
        assert_eq!(bytes.len(), n * self.row_bytes(k), "{self} of {n} x {k}");
        let (bits, has_offsets) = match kind {
            Kind::Q4_0 => (4, false),
            Kind::Q4_1 | Kind::Q4K => (4, true),
            Kind::Q5_0 | Kind::Q5_1 | Kind::Q8_0 | Kind::Q5K | Kind::Q6K => (8, false),
        };
        let format = Format { bits, group: SLAB, has_offsets };
        repack::pack(pool, [n, k], format, |Block { first_row, n_rows, words, scales, offsets }| {
            for r in 0..n_rows {
                let stored = &bytes[row(first_row + r) * self.row_bytes(k)..][..self.row_bytes(k)];
                for (b, block) in stored.chunks_exact(self.bytes).enumerate() {
                    for i in 0..self.weights / SLAB {
                        let slab = b * (self.weights / SLAB) + i;
                        let part = slab * BLOCK_ROWS + r;
                        let q = &mut words[part * SLAB * bits / 8..][..SLAB * bits / 8];
                        match kind {
                            Kind::Q4_0 => {
                                scales[part] = f16_at(block, 0);
                                q.copy_from_slice(&block[2..]); // this is our order
                            }
                            Kind::Q4_1 => {
                                (scales[part], offsets[part]) = (f16_at(block, 0), f16_at(block, 2));
                                q.copy_from_slice(&block[4..]);
                            }
                            Kind::Q5_0 => {
                                scales[part] = f16_at(block, 0);
                                q.iter_mut().enumerate().for_each(|(c, q)| *q = q5(block, 2, c) + (128 - 16));
                            }
                            Kind::Q8_0 => {
                                scales[part] = f16_at(block, 0);
                                q.iter_mut().zip(&block[2..]).for_each(|(q, stored)| *q = stored ^ 0x80);
                            }
                            Kind::Q4K => {
                                let (scale, min) = scale_min(block, i);
                                scales[part] = f16::from_f32(scale);
                                offsets[part] = f16::from_f32(-min);
                                let stored = q4k(&block[16..], i);
                                (0..SLAB / 2).for_each(|c| q[c] = stored(c) | stored(SLAB / 2 + c) << 4);
                            }
                            Kind::Q5_1 | Kind::Q5K | Kind::Q6K => {
                                let mut w = [0.0; SLAB];
                                dequantize(kind, block, i, &mut w);
                                scales[part] = round8(&w, q);
                            }
                        }
                    }
                }
            }
        })
    }

    /// The matrix `[n, k]` in `bytes` as dense f16, row i being the row `row(i)` of the file; f16 rounds as [`repack::dense`] says.
    ///
    /// # Errors
    /// As [`BlockType::pack`].
    ///
    /// # Panics
    /// As [`BlockType::pack`].
    pub fn dense(
        self,
        pool: &Pool,
        bytes: &[u8],
        [n, k]: [usize; 2],
        row: impl Fn(usize) -> usize + Sync,
    ) -> Result<Tensor, String> {
        let kind = self.kind()?;
        assert_eq!(bytes.len(), n * self.row_bytes(k), "{self} of {n} x {k}");
        repack::dense(pool, [n, k], |r, to| {
            let stored = &bytes[row(r) * self.row_bytes(k)..][..self.row_bytes(k)];
            for (block, to) in stored.chunks_exact(self.bytes).zip(to.chunks_exact_mut(self.weights)) {
                for (i, to) in to.chunks_exact_mut(SLAB).enumerate() {
                    dequantize(kind, block, i, to);
                }
            }
        })
    }
}

/// The 32 weights from 32·i on of a block, by its type's definition.
fn dequantize(kind: Kind, block: &[u8], i: usize, to: &mut [f32]) {
    match kind {
        Kind::Q4_0 => {
            let (d, q) = (f16_at(block, 0).to_f32(), &block[2..]);
            let weight = |q: u8| d * (f32::from(q) - 8.0);
            let (low, high) = to.split_at_mut(SLAB / 2);
            low.iter_mut().zip(q).for_each(|(to, q)| *to = weight(q & 15));
            high.iter_mut().zip(q).for_each(|(to, q)| *to = weight(q >> 4));
        }
        Kind::Q4_1 => {
            let (d, m, q) = (f16_at(block, 0).to_f32(), f16_at(block, 2).to_f32(), &block[4..]);
            let (low, high) = to.split_at_mut(SLAB / 2);
            low.iter_mut().zip(q).for_each(|(to, q)| *to = d * f32::from(q & 15) + m);
            high.iter_mut().zip(q).for_each(|(to, q)| *to = d * f32::from(q >> 4) + m);
        }
        Kind::Q5_0 => {
            let d = f16_at(block, 0).to_f32();
            to.iter_mut().enumerate().for_each(|(c, to)| *to = d * (f32::from(q5(block, 2, c)) - 16.0));
        }
        Kind::Q5_1 => {
            let (d, m) = (f16_at(block, 0).to_f32(), f16_at(block, 2).to_f32());
            to.iter_mut().enumerate().for_each(|(c, to)| *to = d * f32::from(q5(block, 4, c)) + m);
        }
        Kind::Q8_0 => {
            let d = f16_at(block, 0).to_f32();
            to.iter_mut().zip(&block[2..]).for_each(|(to, q)| *to = d * f32::from(*q as i8));
        }
        Kind::Q4K => {
            let ((scale, min), q) = (scale_min(block, i), q4k(&block[16..], i));
            to.iter_mut().enumerate().for_each(|(c, to)| *to = scale * f32::from(q(c)) - min);
        }
        Kind::Q5K => {
            let ((scale, min), low, high) = (scale_min(block, i), q4k(&block[48..], i), &block[16..48]);
            to.iter_mut().enumerate().for_each(|(c, to)| *to = scale * f32::from(low(c) | (high[c] >> i & 1) << 4) - min);
        }
        Kind::Q6K => q6k(block, i, to),
    }
}

fn f16_at(block: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}

/// The integer of weight c of a Q5_0 or Q5_1 block whose scales end at byte `at`.
fn q5(block: &[u8], at: usize, c: usize) -> u8 {
    let (high, low) = block[at..].split_at(4);
    let half = SLAB / 2;
    low[c % half] >> (4 * (c / half)) & 15 | (high[c / 8] >> (c % 8) & 1) << 4
}

/// d·s and dmin·m of group i of a Q4_K or Q5_K block. Of groups 0 to 3, s and m are the low 6 bits of bytes i and 4 + i; of groups 4 to 7,
/// their low 4 bits are the halves of byte 4 + i, and their high 2 bits are at the top of bytes i − 4 and i.
fn scale_min(block: &[u8], i: usize) -> (f32, f32) {
    let packed = &block[4..16];
    let (s, m) = match i {
        0..4 => (packed[i] & 63, packed[4 + i] & 63),
        _ => (packed[4 + i] & 15 | packed[i - 4] >> 6 << 4, packed[4 + i] >> 4 | packed[i] >> 6 << 4),
    };
    (f16_at(block, 0).to_f32() * f32::from(s), f16_at(block, 2).to_f32() * f32::from(m))
}

/// The 4-bit integers of group i of a Q4_K or Q5_K block: two groups share 32 of these bytes, the even one has the low halves.
fn q4k(bytes: &[u8], i: usize) -> impl Fn(usize) -> u8 {
    let bytes = &bytes[i / 2 * SLAB..][..SLAB];
    move |c| bytes[c] >> (4 * (i % 2)) & 15
}

/// The 32 weights from 32·i on of a Q6_K block. Each half of 128 weights has 64 bytes of low and 32 of high bits: quarter j of it (32 weights) has
/// the low (j < 2) or high halves of the bytes from 32·(j mod 2) on, and bits 2j and 2j + 1 of the high bytes.
fn q6k(block: &[u8], i: usize, to: &mut [f32]) {
    let (half, j) = (i / 4, i % 4);
    let low = &block[half * 64 + j % 2 * 32..][..SLAB];
    let high = &block[128 + half * 32..][..SLAB];
    let scales = &block[192 + 2 * i..][..2];
    let d = f16_at(block, 208).to_f32();
    for (c, to) in to.iter_mut().enumerate() {
        let q = low[c] >> (4 * (j / 2)) & 15 | (high[c] >> (2 * j) & 3) << 4;
        *to = d * f32::from(scales[c / 16] as i8) * (f32::from(q) - 32.0);
    }
}

/// Rounds a group to 8 bits, w ≈ scale·(q − 128), and gives the scale.
fn round8(w: &[f32], q: &mut [u8]) -> f16 {
    // `max` would pass over NaN, the sum does not.
    let largest = w.iter().fold(0.0f32, |m, x| m.max(x.abs())) + 0.0 * w.iter().sum::<f32>();
    let scale = f16::from_f32(largest / INT8_MAX);
    let inverse = if scale.to_f32() > 0.0 { 1.0 / scale.to_f32() } else { 0.0 };
    // Rounding the scale to f16 may leave the largest weight a little outside.
    q.iter_mut().zip(w).for_each(|(q, w)| *q = ((w * inverse).round().clamp(-INT8_MAX, INT8_MAX) + 128.0) as u8);
    scale
}
