//! The packings of AutoGPTQ and AutoAWQ: `qweight`, `qzeros` and `scales` in place of a module's `weight`.
//!
//! ```text
//! w[row, col] = scales[g, row]·(q − zero[g, row]),   g = col / group_size, or g_idx[col]
//! ```
//!
//! | | GPTQ | AWQ (`gemm`) |
//! |---|---|---|
//! | `qweight` i32 | `[k·bits/32, n]`: a word holds columns in a row, lowest bits first | `[k, n/8]`: a word holds 8 rows, in the order 0, 2, 4, 6, 1, 3, 5, 7 |
//! | `qzeros` i32 | `[groups, n·bits/32]`: a word holds rows, lowest bits first | `[groups, n/8]`, in that order too |
//! | zero | what `qzeros` says plus 1 (mod 2^bits); in `gptq_v2` what it says | what `qzeros` says |
//! | `scales` f16 | `[groups, n]` | `[groups, n]` |
//! | `g_idx` i32 | `[k]`, which group a column is of | none |
//!
//! What becomes of them in memory: [`Packed`], with the scales of a group repeated where ours are shorter (a group of −1 is the whole row). That is
//! exact where every zero is 2^(bits−1), which symmetric quantization makes it. Otherwise the offset −zero·scale is rounded to f16: it
//! is off by at most 2⁻¹¹ of it, less than 1/128 of a step of 4 bits. What has no such form becomes dense f16: 8 bits with other zeros, groups
//! that are no multiple of 32, and columns in the order of their importance (`desc_act`), whose groups lie scattered over the row.

use half::f16;

use super::repack::{self, Block};
use crate::cpu::pool::Pool;
use crate::dtype::DType;
use crate::ops::Packed;
use crate::ops::packed::{BLOCK_ROWS, Format, GROUPS, SLAB};
use crate::tensor::Tensor;

/// Which of its 8 rows a word of AWQ has where: bits 4·i hold row `AWQ_ORDER[i]`.
const AWQ_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Whose packing it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// AutoGPTQ's.
    Gptq {
        /// Whether `qzeros` holds zeros less one, as all but `gptq_v2` do.
        zeros_less_one: bool,
    },
    /// AutoAWQ's `gemm`.
    Awq,
}

/// How the modules of a checkpoint are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheme {
    /// Whose packing it is.
    pub layout: Layout,
    /// 4, or of GPTQ 8.
    pub bits: usize,
    /// Columns that share a scale; none: all of a row.
    pub group_size: Option<usize>,
}

impl std::fmt::Display for Scheme {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = if self.layout == Layout::Awq { "AWQ" } else { "GPTQ" };
        write!(f, "{name}, {} bits, ", self.bits)?;
        match self.group_size {
            Some(group_size) => write!(f, "groups of {group_size}"),
            None => write!(f, "a scale a row"),
        }
    }
}

/// The tensors of a module as they lie in the file.
pub struct Stored {
    /// Integers.
    pub qweight: Tensor,
    /// Zeros.
    pub qzeros: Tensor,
    /// Scales.
    pub scales: Tensor,
    /// Groups of columns.
    pub g_idx: Option<Tensor>,
}

/// A module's matrix `[n, k]`, of which everything was checked.
pub struct Matrix {
    scheme: Scheme,
    n: usize,
    k: usize,
    group_size: usize,
    stored: Stored,
    /// Whether column c is of another group than c / group_size.
    is_reordered: bool,
    /// Whether every zero is 2^(bits−1).
    is_symmetric: bool,
}

impl Matrix {
    /// The matrix `[n, k]` of these tensors.
    ///
    /// # Errors
    /// What is wrong with which of them.
    pub fn new(scheme: Scheme, n: usize, k: usize, stored: Stored) -> Result<Self, String> {
        let per_word = 32 / scheme.bits;
        let group_size = scheme.group_size.unwrap_or(k);
        let (rows, columns) = if scheme.layout == Layout::Awq { (1, per_word) } else { (per_word, 1) };
        for (what, size, multiple) in [("rows", n, per_word), ("columns", k, rows), ("columns", k, group_size)] {
            if multiple == 0 || !size.is_multiple_of(multiple) {
                return Err(format!("has {size} {what}, which {scheme} cannot pack: no multiple of {multiple}"));
            }
        }
        let n_groups = k / group_size;
        let g_idx_shape = [k];
        for (what, tensor, dtype, shape) in [
            ("qweight", Some(&stored.qweight), DType::I32, &[k / rows, n / columns][..]),
            ("qzeros", Some(&stored.qzeros), DType::I32, &[n_groups, n / per_word]),
            ("scales", Some(&stored.scales), DType::F16, &[n_groups, n]),
            ("g_idx", stored.g_idx.as_ref(), DType::I32, &g_idx_shape),
        ] {
            let Some(tensor) = tensor else { continue };
            if tensor.shape() != shape || tensor.dtype() != dtype {
                return Err(format!("its {what} is {tensor:?}: a matrix of {n} x {k} has {dtype}{shape:?} ({scheme})"));
            }
        }
        let mut is_reordered = false;
        for (col, &g) in stored.g_idx.iter().flat_map(|t| t.as_slice::<i32>()).enumerate() {
            let g = usize::try_from(g).ok().filter(|g| *g < n_groups);
            let g = g.ok_or_else(|| format!("its g_idx puts column {col} in a group that is none of its {n_groups}"))?;
            is_reordered |= g != col / group_size;
        }
        let mut matrix = Self { scheme, n, k, group_size, stored, is_reordered, is_symmetric: false };
        let symmetric = 1 << (scheme.bits - 1);
        matrix.is_symmetric = (0..n_groups).all(|g| (0..n).all(|row| matrix.zero(g, row) == symmetric));
        Ok(matrix)
    }

    /// How [`Matrix::pack`] packs it; none if it can only be dense.
    pub fn format(&self) -> Option<Format> {
        let group = GROUPS.into_iter().rev().find(|group| self.group_size.is_multiple_of(*group))?;
        let has_offsets = !self.is_symmetric;
        let is_dense = self.is_reordered || self.scheme.bits == 8 && has_offsets;
        (!is_dense).then_some(Format { bits: self.scheme.bits, group, has_offsets })
    }

    /// Zero of a group and row.
    fn zero(&self, g: usize, row: usize) -> u32 {
        let bits = self.scheme.bits;
        let per_word = 32 / bits;
        let word = self.stored.qzeros.as_slice::<i32>()[g * (self.n / per_word) + row / per_word] as u32;
        let mask = (1 << bits) - 1;
        match self.scheme.layout {
            Layout::Awq => word >> (bits * awq_place(row % per_word)) & mask,
            Layout::Gptq { zeros_less_one } => (word >> (bits * (row % per_word))).wrapping_add(zeros_less_one.into()) & mask,
        }
    }

    /// The integer of a row and column.
    fn q(&self, row: usize, col: usize) -> u32 {
        let bits = self.scheme.bits;
        let (words, per_word) = (self.stored.qweight.as_slice::<i32>(), 32 / bits);
        let (word, place) = match self.scheme.layout {
            Layout::Awq => (words[col * (self.n / per_word) + row / per_word], awq_place(row % per_word)),
            Layout::Gptq { .. } => (words[col / per_word * self.n + row], col % per_word),
        };
        word as u32 >> (bits * place) & ((1 << bits) - 1)
    }

    /// Which group a column is of.
    fn group(&self, col: usize) -> usize {
        match &self.stored.g_idx {
            Some(g_idx) if self.is_reordered => g_idx.as_slice::<i32>()[col] as usize,
            _ => col / self.group_size,
        }
    }

    /// The matrix as our kernels take it; `None` if it can only be dense.
    ///
    /// # Errors
    /// If a scale is not a finite number.
    pub fn pack(&self, pool: &Pool) -> Result<Option<Packed>, String> {
        let Some(format) = self.format() else { return Ok(None) };
        let scales_of = self.stored.scales.as_slice::<f16>();
        let packed = repack::pack(pool, [self.n, self.k], format, |Block { first_row, n_rows, words, scales, offsets }| {
            for g in 0..self.k / format.group {
                let stored_group = g * format.group / self.group_size;
                for r in 0..n_rows {
                    let scale = scales_of[stored_group * self.n + first_row + r];
                    scales[g * BLOCK_ROWS + r] = scale;
                    if format.has_offsets {
                        let offset = -(self.zero(stored_group, first_row + r) as f32) * scale.to_f32();
                        offsets[g * BLOCK_ROWS + r] = f16::from_f32(offset);
                    }
                }
            }
            match self.scheme.layout {
                Layout::Gptq { .. } => self.gptq_words(first_row, n_rows, words),
                Layout::Awq => self.awq_words(first_row, n_rows, words),
            }
        });
        packed.map(Some)
    }

    /// A word has 8 columns of 4 bits, or 4 of 8, in the order in which they come.
    fn gptq_words(&self, first_row: usize, n_rows: usize, to: &mut [u8]) {
        let bits = self.scheme.bits;
        let stored = self.stored.qweight.as_slice::<i32>();
        let word = |i: usize, row: usize| stored[i * self.n + row] as u32;
        for (part, to) in to.chunks_exact_mut(SLAB * bits / 8).enumerate() {
            let (slab, r) = (part / BLOCK_ROWS, part % BLOCK_ROWS);
            if r >= n_rows {
                continue;
            }
            // A slab of 32 columns is as many words as there are bits.
            let (first, row) = (slab * bits, first_row + r);
            if bits == 8 {
                to.chunks_exact_mut(4).enumerate().for_each(|(i, to)| to.copy_from_slice(&word(first + i, row).to_le_bytes()));
                continue;
            }
            for (i, to) in to.chunks_exact_mut(8).enumerate() {
                let both = spread(word(first + i, row)) | spread(word(first + 2 + i, row)) << 4;
                to.copy_from_slice(&both.to_le_bytes());
            }
        }
    }

    /// A word has 8 rows of one column.
    fn awq_words(&self, first_row: usize, n_rows: usize, to: &mut [u8]) {
        let stored = self.stored.qweight.as_slice::<i32>();
        let words_per_col = self.n / AWQ_ORDER.len();
        for (slab, to) in to.chunks_exact_mut(BLOCK_ROWS * SLAB / 2).enumerate() {
            for col in 0..SLAB {
                let (byte, shift) = (col % (SLAB / 2), 4 * (col / (SLAB / 2)));
                let words = &stored[(slab * SLAB + col) * words_per_col + first_row / 8..];
                for (word, first) in words.iter().zip((0..n_rows).step_by(8)) {
                    for (place, row) in AWQ_ORDER.into_iter().enumerate() {
                        to[(first + row) * SLAB / 2 + byte] |= ((*word as u32 >> (4 * place) & 15) as u8) << shift;
                    }
                }
            }
        }
    }

    /// The matrix as dense f16; f16 rounds as [`repack::dense`] says.
    ///
    /// # Errors
    /// If a weight is not a finite number.
    pub fn dense(&self, pool: &Pool) -> Result<Tensor, String> {
        let scales = self.stored.scales.as_slice::<f16>();
        repack::dense(pool, [self.n, self.k], |row, to| {
            for (col, to) in to.iter_mut().enumerate() {
                let g = self.group(col);
                *to = scales[g * self.n + row].to_f32() * (self.q(row, col) as f32 - self.zero(g, row) as f32);
            }
        })
    }
}

/// Where a word of AWQ has row `row` of its 8.
fn awq_place(row: usize) -> usize {
    row / 2 + row % 2 * 4
}

/// The 8 half-bytes of a word, each in the low half of a byte of its own.
fn spread(word: u32) -> u64 {
    let x = u64::from(word);
    let x = (x | x << 16) & 0x0000_ffff_0000_ffff;
    let x = (x | x << 8) & 0x00ff_00ff_00ff_00ff;
    (x | x << 4) & 0x0f0f_0f0f_0f0f_0f0f
}
