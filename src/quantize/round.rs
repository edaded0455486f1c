//! Rounding to the nearest: from a dense matrix to a [`Packed`] one, group by group.
//!
//! ```text
//! w ≈ s·(q − 2^(b−1)),  0 ≤ q < 2^b         for each row and group of columns
//! ```
//!
//! With 8 bits, s is the largest |w| over 127. With 4 bits the range is so coarse that it pays to look for the scale: each candidate rounds the
//! group, and the one that can explain most of it wins, with the scale of least squares, s = Σ h·w·p / Σ h·p², p = q − 8, where h is how
//! much a column matters: 1, or what is known of its inputs.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::cpu::pool::{Disjoint, Pool};
use crate::cpu::simd::{Isa, Kernel, Simd};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::Packed;
use crate::ops::packed::{BLOCK_ROWS, Format, GROUPS, SLAB, place};
use crate::tensor::Tensor;

/// What the weight of the largest magnitude in a group is rounded to, of 4 bits: −8 is the end of the range; with less of it the group's other
/// weights are met more finely, with more the largest is cut off.
const CANDIDATES: [f32; 9] = [-6.8, -7.1, -7.4, -7.7, -8.0, -8.3, -8.6, -8.9, -9.3];
/// Rows that one task takes where each is little work.
pub(super) const ROWS_PER_TASK: usize = 16;
/// Sums under way at once, of as many columns side by side.
const LANES: usize = 16;
/// 1.5·2²³ leaves no bits for fractions: adding and taking it away again rounds to the nearest integer.
const ROUND: f32 = 12_582_912.0;

/// Squares of a matrix and of what rounding changed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loss {
    /// Σ (w − ŵ)²
    pub error: f64,
    /// Σ w²
    pub total: f64,
}

impl Loss {
    /// The root of error over total.
    pub fn relative(&self) -> f64 {
        if self.total > 0.0 { (self.error / self.total).sqrt() } else { 0.0 }
    }

    /// Of a matrix `[n, k]` and what it was rounded to, in f32.
    pub fn between(matrix: &Tensor, rounded: &Tensor) -> Self {
        let pairs = matrix.to_f32();
        let pairs = pairs.iter().zip(rounded.as_slice::<f32>()).map(|(w, r)| (f64::from(*w), f64::from(*r)));
        pairs.fold(Self::default(), |sum, (w, r)| Self { error: sum.error + (w - r).powi(2), total: sum.total + w * w })
    }

    /// Of both.
    pub fn plus(self, other: Self) -> Self {
        Self { error: self.error + other.error, total: self.total + other.total }
    }
}

/// Packs a matrix `[n, k]` of a format without offsets.
///
/// # Errors
/// The row and column of the first weight that is no finite number, or too large for the scales' f16.
///
/// # Panics
/// If k is not a multiple of the group, or the format has offsets.
pub fn pack(pool: &Pool, isa: Isa, matrix: &Tensor, format: Format) -> Result<(Packed, Loss), String> {
    pack_for(pool, isa, matrix, format, &vec![1.0; matrix.row_len()])
}

/// As [`pack`], with scales that make the sum of h·(w − ŵ)² small: `importance` h `[k]` is how much a column matters.
pub(super) fn pack_for(
    pool: &Pool,
    isa: Isa,
    matrix: &Tensor,
    format: Format,
    importance: &[f32],
) -> Result<(Packed, Loss), String> {
    let mut draft = Draft::new(matrix.rows(), matrix.row_len(), format);
    let mut loss = Loss::default();
    for result in draft.fill(pool, |block| isa.run(PackBlock { matrix, importance, block })) {
        loss = loss.plus(result?);
    }
    Ok((draft.finish(), loss))
}

/// Refuses a matrix with a weight that is no finite number: the first, with its row and column.
pub fn check_finite(matrix: &Tensor) -> Result<(), String> {
    let (values, k) = (matrix.to_f32(), matrix.row_len());
    match values.iter().position(|w| !w.is_finite()) {
        Some(i) => Err(refusal(i / k, i % k, values[i])),
        None => Ok(()),
    }
}

/// The matrix `[n, k]` in f32 that a packed one stands for.
pub fn dense(pool: &Pool, packed: &Packed) -> Tensor {
    let mut dense = Tensor::zeros(&[packed.n, packed.k], DType::F32);
    pool.for_rows(dense.as_mut_slice(), packed.k, ROWS_PER_TASK, |first, rows| {
        for (i, row) in rows.chunks_exact_mut(packed.k).enumerate() {
            packed.row_to_f32(first + i, row);
        }
    });
    dense
}

/// A packed matrix in the making.
pub(super) struct Draft {
    n: usize,
    k: usize,
    format: Format,
    words: Tensor,
    scales: Tensor,
}

/// Up to 16 rows of it.
pub(super) struct Block<'a> {
    /// The first of them.
    pub first_row: usize,
    /// How many they are.
    pub n_rows: usize,
    /// How they are packed.
    pub format: Format,
    k: usize,
    /// All integers of the block.
    bytes: &'a mut [u8],
    /// `[k / group][BLOCK_ROWS]`
    scales: &'a mut [f16],
}

impl Draft {
    /// A matrix `[n, k]` of zeros.
    pub fn new(n: usize, k: usize, format: Format) -> Self {
        assert!(k.is_multiple_of(format.group) && !format.has_offsets, "{format:?} of {n} x {k}");
        let words = Tensor::zeros(&format.words_shape(n, k), DType::I32);
        Self { n, k, format, words, scales: Tensor::zeros(&format.scales_shape(n, k), DType::F16) }
    }

    /// Hands each block of rows to `fill`, side by side; its results, first rows first.
    pub fn fill<T: Send>(&mut self, pool: &Pool, fill: impl Fn(Block<'_>) -> T + Sync) -> Vec<T> {
        let Self { n, k, format, .. } = *self;
        let n_blocks = n.div_ceil(BLOCK_ROWS);
        let mut results: Vec<Option<T>> = (0..n_blocks).map(|_| None).collect();
        let (block_bytes, block_scales) = (BLOCK_ROWS * k * format.bits / 8, BLOCK_ROWS * k / format.group);
        let (words, scales) = (Disjoint::new(self.words.as_mut_bytes()), Disjoint::new(self.scales.as_mut_slice::<f16>()));
        let all = Disjoint::new(&mut results);
        pool.run(n_blocks, &|block| {
            // SAFETY: each block has its own words, scales and result.
            let (bytes, scales, result) = unsafe {
                (
                    words.slice(block * block_bytes, block_bytes),
                    scales.slice(block * block_scales, block_scales),
                    &mut all.slice(block, 1)[0],
                )
            };
            let first_row = block * BLOCK_ROWS;
            *result = Some(fill(Block { first_row, n_rows: BLOCK_ROWS.min(n - first_row), format, k, bytes, scales }));
        });
        results.into_iter().flatten().collect()
    }

    /// The matrix.
    pub fn finish(self) -> Packed {
        Packed::new(self.n, self.k, self.words, self.scales, None).expect("made in the shapes of its format")
    }
}

impl Block<'_> {
    /// Writes p = q − 2^(b−1) and the scale of the group that begins at column `first_col` of the block's row `row`.
    #[inline(always)]
    pub fn put(&mut self, row: usize, first_col: usize, p: &[i8], scale: f16) {
        let Format { bits, group, .. } = self.format;
        let zero = self.format.zero() as u8;
        self.scales[first_col / group * BLOCK_ROWS + row] = scale;
        for (slab, p) in p.chunks_exact(SLAB).enumerate() {
            let to = &mut self.bytes[place(bits, self.k, row, first_col + slab * SLAB).0..][..SLAB * bits / 8];
            if bits == 8 {
                to.iter_mut().zip(p).for_each(|(to, p)| *to = p.cast_unsigned().wrapping_add(zero));
                continue;
            }
            let (low, high) = p.split_at(SLAB / 2);
            for i in 0..SLAB / 2 {
                to[i] = low[i].cast_unsigned().wrapping_add(zero) | high[i].cast_unsigned().wrapping_add(zero) << 4;
            }
        }
    }
}

/// What cannot be packed in a group that begins at this row and column, if its scale is `scale`.
#[inline(always)]
pub(super) fn check_scale(scale: f16, values: &[f32], row: usize, first_col: usize) -> Result<(), String> {
    if scale.is_finite() { Ok(()) } else { Err(unpackable(values, row, first_col)) }
}

#[cold]
fn unpackable(values: &[f32], row: usize, first_col: usize) -> String {
    let worst = extreme(values).to_bits();
    let bad = values.iter().position(|w| w.to_bits() == worst).unwrap_or(0);
    refusal(row, first_col + bad, values[bad])
}

fn refusal(row: usize, col: usize, w: f32) -> String {
    format!("row {row}, column {col} is {w}: it cannot be packed")
}

struct PackBlock<'a> {
    matrix: &'a Tensor,
    /// `[k]`
    importance: &'a [f32],
    block: Block<'a>,
}

impl Kernel for PackBlock<'_> {
    type Output = Result<Loss, String>;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Self::Output {
        let Self { matrix, importance, mut block } = self;
        let k = matrix.row_len();
        let Format { bits, group, .. } = block.format;
        let mut values = [0.0; LARGEST_GROUP];
        let mut p = [0i8; LARGEST_GROUP];
        let mut loss = Loss::default();
        for row in 0..block.n_rows {
            for first_col in (0..k).step_by(group) {
                let values = &mut values[..group];
                read(matrix, (block.first_row + row) * k + first_col, values);
                let p = &mut p[..group];
                let scale = round(bits, values, &importance[first_col..first_col + group], p);
                check_scale(scale, values, block.first_row + row, first_col)?;
                loss = loss.plus(loss_of(values, p, scale.to_f32()));
                block.put(row, first_col, p, scale);
            }
        }
        Ok(loss)
    }
}

/// Rounds a group: p = q − 2^(b−1) and its scale, which is not finite if a value cannot be packed.
#[inline(always)]
pub(super) fn round(bits: usize, values: &[f32], importance: &[f32], p: &mut [i8]) -> f16 {
    if bits == 4 { round4(values, importance, p) } else { round8(values, p) }
}

/// What p is cut off at.
#[inline(always)]
pub(super) fn bounds(bits: usize) -> (f32, f32) {
    if bits == 4 { (-8.0, 7.0) } else { (-127.0, 127.0) }
}

/// The nearest integer.
#[inline(always)]
pub(super) fn nearest(x: f32) -> f32 {
    x + ROUND - ROUND
}

/// The nearest integer to x, which is within −128.5 and 127.5: the low byte of what [`nearest`] has before it takes 1.5·2²³ away. (A conversion
/// that saturates takes several times as long.)
#[inline(always)]
pub(super) fn integer(x: f32) -> i8 {
    (x + ROUND).to_bits() as i8
}

/// Columns that share a scale at most.
pub(super) const LARGEST_GROUP: usize = GROUPS[GROUPS.len() - 1];

/// Elements of a matrix from `start` on, as f32.
#[inline(always)]
pub(super) fn read(matrix: &Tensor, start: usize, to: &mut [f32]) {
    let range = start..start + to.len();
    match matrix.dtype() {
        DType::F32 => to.copy_from_slice(&matrix.as_slice::<f32>()[range]),
        DType::F16 => matrix.as_slice::<f16>()[range].convert_to_f32_slice(to),
        DType::Bf16 => to
            .iter_mut()
            .zip(&matrix.as_slice::<half::bf16>()[range])
            .for_each(|(to, x)| *to = f32::from_bits(u32::from(x.to_bits()) << 16)),
        DType::I32 | DType::I8 => panic!("weights are not integers"),
    }
}

/// What rounding the group to scale·p has changed.
#[inline(always)]
fn loss_of(values: &[f32], p: &[i8], scale: f32) -> Loss {
    let (mut error, mut total) = ([0.0f32; LANES], [0.0f32; LANES]);
    for (values, p) in values.as_chunks::<LANES>().0.iter().zip(p.as_chunks::<LANES>().0) {
        let mut wide = [0.0; LANES];
        for i in 0..LANES {
            wide[i] = f32::from(p[i]);
        }
        for i in 0..LANES {
            let e = values[i] - scale * wide[i];
            error[i] += e * e;
            total[i] += values[i] * values[i];
        }
    }
    let sum = |lanes: [f32; LANES]| lanes.iter().map(|&x| f64::from(x)).sum();
    Loss { error: sum(error), total: sum(total) }
}

/// The value of the largest magnitude; NaN or an infinity if there is one. Of whole lanes.
#[inline(always)]
fn extreme(values: &[f32]) -> f32 {
    // As bits, which order magnitudes and put NaN on top; the sign goes last, where it tells nothing apart but the two.
    let mut largest = [0u32; LANES];
    for values in values.as_chunks::<LANES>().0 {
        for i in 0..LANES {
            largest[i] = largest[i].max(values[i].to_bits().rotate_left(1));
        }
    }
    f32::from_bits(largest.into_iter().max().unwrap_or(0).rotate_right(1))
}

/// p = q − 128 and the scale of a group.
#[inline(always)]
fn round8(values: &[f32], p: &mut [i8]) -> f16 {
    let scale = f16::from_f32(extreme(values).abs() / 127.0);
    let (inverse, (low, high)) = (inverse(scale), bounds(8));
    for (w, p) in values.iter().zip(p) {
        // What the scale lost in its own rounding may ask for one more.
        *p = integer((w * inverse).clamp(low, high));
    }
    scale
}

/// p = q − 8 and the scale of a group.
#[inline(always)]
fn round4(values: &[f32], importance: &[f32], p: &mut [i8]) -> f16 {
    let extreme = extreme(values);
    let (low, high) = bounds(4);
    let (values_in_lanes, importance) = (values.as_chunks::<LANES>().0, importance.as_chunks::<LANES>().0);
    let (mut wp, mut pp) = ([[0.0; LANES]; CANDIDATES.len()], [[0.0; LANES]; CANDIDATES.len()]);
    for candidate in 0..CANDIDATES.len() {
        let inverse = if extreme == 0.0 { 0.0 } else { CANDIDATES[candidate] / extreme };
        // Sums of its own, so that they stay in registers.
        let (mut its_wp, mut its_pp) = ([0.0; LANES], [0.0; LANES]);
        for (values, h) in values_in_lanes.iter().zip(importance) {
            for i in 0..LANES {
                let p = nearest((values[i] * inverse).clamp(low, high));
                its_wp[i] += h[i] * values[i] * p;
                its_pp[i] += h[i] * p * p;
            }
        }
        (wp[candidate], pp[candidate]) = (its_wp, its_pp);
    }
    let (mut best, mut best_scale) = (0.0, extreme / CANDIDATES[4]);
    for (wp, pp) in sums(&wp).into_iter().zip(sums(&pp)) {
        // With s = wp/pp, Σh·(w − s·p)² = Σh·w² − wp²/pp.
        if wp * wp > best * pp {
            (best, best_scale) = (wp * wp / pp, wp / pp);
        }
    }
    let scale = f16::from_f32(best_scale);
    let inverse = inverse(scale);
    for (w, p) in values.iter().zip(p) {
        *p = integer((w * inverse).clamp(low, high));
    }
    scale
}

/// The sum of each candidate's lanes, first lanes first; all candidates side by side, so that no sum waits for itself alone.
#[inline(always)]
fn sums(lanes: &[[f32; LANES]; CANDIDATES.len()]) -> [f32; CANDIDATES.len()] {
    let mut sums = [0.0; CANDIDATES.len()];
    for lane in 0..LANES {
        for candidate in 0..CANDIDATES.len() {
            sums[candidate] += lanes[candidate][lane];
        }
    }
    sums
}

/// 1 / scale; of 0, which only a group of zeros has, 0.
#[inline(always)]
pub(super) fn inverse(scale: f16) -> f32 {
    if scale == f16::ZERO || scale == f16::NEG_ZERO { 0.0 } else { 1.0 / scale.to_f32() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(n: usize, k: usize, f: impl Fn(usize, usize) -> f32) -> Tensor {
        let values: Vec<f32> = (0..n * k).map(|i| f(i / k, i % k)).collect();
        Tensor::from_slice(&[n, k], &values)
    }

    fn noise(row: usize, col: usize) -> f32 {
        let x = (row * 7919 + col).wrapping_mul(2_654_435_761) >> 7;
        // Sum of uniform numbers: thin tails, as weights have.
        ((x & 255) + (x >> 8 & 255) + (x >> 16 & 255)) as f32 / 255.0 - 1.5
    }

    /// Every integer is the nearest to its weight at the scale that was chosen, and that is no worse than the plain one.
    #[test]
    fn weights_are_rounded_to_the_nearest() {
        let pool = Pool::new(2);
        for (bits, group) in [(4, 32), (4, 64), (4, 128), (8, 32), (8, 128)] {
            let format = Format::new(bits, group, false).unwrap();
            for n in [1, 15, 16, 33] {
                let w = matrix(n, 256, noise);
                let (packed, loss) = pack(&pool, Isa::detect(), &w, format).unwrap();
                assert_eq!((packed.n, packed.k, packed.format()), (n, 256, format));
                let (values, rounded) = (w.to_f32(), packed.to_f32());
                let (mut error, mut plain) = (0.0, 0.0);
                let top = f32::from((1u8 << (bits - 1)) - 1);
                for (row, col) in (0..n).flat_map(|row| (0..256).map(move |col| (row, col))) {
                    let (w, got) = (values[row * 256 + col], rounded[row * 256 + col]);
                    let (scale, _) = packed.scale_offset(row, col);
                    let p = (w / scale).round().clamp(if bits == 4 { -8.0 } else { -127.0 }, top);
                    assert!((got - p * scale).abs() <= 1e-3 * scale.abs() || ((w / scale).fract().abs() - 0.5).abs() < 1e-3);
                    error += f64::from(w - got).powi(2);
                    let of_group = &values[row * 256 + col / group * group..][..group];
                    let s = of_group.iter().fold(0f32, |a, w| a.max(w.abs())) / top;
                    plain += f64::from(w - (w / s).round() * s).powi(2);
                }
                assert!((loss.error / error - 1.0).abs() < 1e-3, "{loss:?} {error}");
                assert!(error <= plain * if bits == 4 { 0.95 } else { 1.01 }, "{bits} bits of {group}: {error} > {plain}");
            }
        }
    }

    #[test]
    fn all_instruction_sets_and_dtypes_agree() {
        let format = Format::new(4, 64, false).unwrap();
        let w = matrix(18, 128, noise).converted(DType::Bf16);
        let expected = pack(&Pool::new(1), Isa::Scalar, &w, format).unwrap();
        for isa in Isa::tested() {
            for dtype in [DType::Bf16, DType::F32, DType::F16] {
                let (packed, loss) = pack(&Pool::new(2), isa, &w.converted(dtype), format).unwrap();
                assert_eq!(packed.words.as_bytes(), expected.0.words.as_bytes(), "{isa:?} {dtype}");
                assert_eq!((packed.scales.as_bytes(), loss), (expected.0.scales.as_bytes(), expected.1));
            }
        }
    }

    #[test]
    fn zeros_stay_zero_and_what_is_no_number_is_refused() {
        let (pool, isa) = (Pool::new(1), Isa::detect());
        for bits in [4, 8] {
            let format = Format::new(bits, 32, false).unwrap();
            let (packed, loss) = pack(&pool, isa, &matrix(3, 64, |_, _| 0.0), format).unwrap();
            assert!(packed.to_f32().iter().all(|&w| w == 0.0) && loss == Loss::default());
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e8] {
                let at = |row, col| if (row, col) == (17, 40) { bad } else { noise(row, col) };
                let error = pack(&pool, isa, &matrix(20, 64, at), format).unwrap_err();
                assert!(error.contains("row 17") && (bad == 1e8 || error.contains("column 40")), "{error}");
            }
        }
    }
}
