//! From other programs' packings to [`Packed`], 16 rows at a time, shared out among threads.

use half::f16;

use crate::cpu::pool::{Disjoint, Pool};
use crate::dtype::DType;
use crate::ops::Packed;
use crate::ops::packed::{BLOCK_ROWS, Format};
use crate::tensor::Tensor;

/// Up to 16 rows of a matrix that is being packed; rows past its end are left as they are, zero.
pub struct Block<'a> {
    /// The first of its rows in the matrix.
    pub first_row: usize,
    /// Rows that the matrix has here, 1 to 16.
    pub n_rows: usize,
    /// All integers: `[k/32][16]` parts of 4·bits bytes each, as [`Packed`] lays them out.
    pub words: &'a mut [u8],
    /// `[k/group][16]`
    pub scales: &'a mut [f16],
    /// As `scales`; empty where the format has none.
    pub offsets: &'a mut [f16],
}

/// A matrix `[n, k]` whose blocks are made by `fill`.
///
/// # Errors
/// If a scale or an offset is no finite number: its row, and what it is.
///
/// # Panics
/// If k is not a multiple of the group.
pub fn pack(pool: &Pool, [n, k]: [usize; 2], format: Format, fill: impl Fn(Block<'_>) + Sync) -> Result<Packed, String> {
    assert!(k.is_multiple_of(format.group), "{format} of rows of {k}");
    let mut words = Tensor::zeros(&format.words_shape(n, k), DType::I32);
    let mut scales = Tensor::zeros(&format.scales_shape(n, k), DType::F16);
    let mut offsets = format.has_offsets.then(|| Tensor::zeros(&format.scales_shape(n, k), DType::F16));
    {
        let (words_len, scales_len) = (BLOCK_ROWS * k * format.bits / 8, BLOCK_ROWS * k / format.group);
        let offsets_len = if format.has_offsets { scales_len } else { 0 };
        let offsets: &mut [f16] = offsets.as_mut().map_or(&mut [], |t| t.as_mut_slice());
        let (words, scales) = (Disjoint::new(words.as_mut_bytes()), Disjoint::new(scales.as_mut_slice::<f16>()));
        let offsets = Disjoint::new(offsets);
        pool.run(n.div_ceil(BLOCK_ROWS), &|i| {
            let first_row = i * BLOCK_ROWS;
            // SAFETY: each block has its own words, scales and offsets.
            let (words, scales, offsets) = unsafe {
                (
                    words.slice(i * words_len, words_len),
                    scales.slice(i * scales_len, scales_len),
                    offsets.slice(i * offsets_len, offsets_len),
                )
            };
            fill(Block { first_row, n_rows: BLOCK_ROWS.min(n - first_row), words, scales, offsets });
        });
    }
    for (what, tensor) in [("scale", Some(&scales)), ("offset", offsets.as_ref())] {
        let Some(tensor) = tensor else { continue };
        let values = tensor.as_slice::<f16>();
        if let Some(bad) = values.iter().position(|x| !x.is_finite()) {
            let row = bad / (BLOCK_ROWS * k / format.group) * BLOCK_ROWS + bad % BLOCK_ROWS;
            return Err(format!("row {row} has the {what} {}: not a finite number that f16 can hold", values[bad]));
        }
    }
    Ok(Packed::new(n, k, words, scales, offsets).expect("made in the shapes of its format"))
}

/// A dense f16 matrix `[n, k]` whose rows are made by `fill`, from the row's number to its elements in f32.
///
/// Of w, f16 keeps 11 bits: what is rounded off is at most 2⁻¹¹·|w| + 2⁻²⁵.
///
/// # Errors
/// If an element is no finite number that f16 can hold: its row, and what it is.
pub fn dense(pool: &Pool, [n, k]: [usize; 2], fill: impl Fn(usize, &mut [f32]) + Sync) -> Result<Tensor, String> {
    let mut tensor = Tensor::zeros(&[n, k], DType::F16);
    let rows = Disjoint::new(tensor.as_mut_slice::<f16>());
    pool.run(n.div_ceil(BLOCK_ROWS), &|i| {
        let mut values = vec![0.0; k];
        for row in i * BLOCK_ROWS..n.min((i + 1) * BLOCK_ROWS) {
            fill(row, &mut values);
            // SAFETY: each row is made by one task.
            let to = unsafe { rows.slice(row * k, k) };
            to.iter_mut().zip(&values).for_each(|(to, x)| *to = f16::from_f32(*x));
        }
    });
    match tensor.as_slice::<f16>().iter().position(|x| !x.is_finite()) {
        Some(bad) => Err(format!("row {} has a weight that is not a finite number that f16 can hold", bad / k)),
        None => Ok(tensor),
    }
}
