//! GPTQ (Frantar et al., arXiv 2210.17323): columns are rounded one after the other, and what the rounding of one has done to the layer's
//! output is made good by those that come after it.
//!
//! With e = w − ŵ of a row, and Lᵀ·L = H + δ·1 ([`hessian`](super::hessian)), the output's error is
//!
//! ```text
//! e·H·eᵀ ≈ Σ_j (Σ_{i≤j} e_i·L_ji)²
//! ```
//!
//! so that, columns i < j being rounded, the j-th term vanishes for ŵ_j = w_j + a_j/L_jj with a_j = Σ_{i<j} e_i·L_ji, which is what is
//! rounded: the same number as in the paper, whose factor of H⁻¹ is L⁻ᵀ. L itself does as well, and nothing is inverted.
//!
//! The paper's lazy batches are the panels of L: within one, a_j grows column by column; all later ones get theirs by one product when a
//! panel is done. A matrix `[n, k]` takes n·k² multiply-adds, and 4·n·k bytes for a.

use half::f16;

use super::Machine;
use super::hessian::{Factor, PANEL};
use super::round::{self, Block, Draft, LARGEST_GROUP};
use crate::cpu::pool::Disjoint;
use crate::cpu::simd::{Kernel, Simd};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::packed::Format;
use crate::ops::{Epilogue, Ops, Packed, Weight};
use crate::tensor::Tensor;

/// Packs a matrix `[n, k]` for inputs whose Hessian has this factor.
///
/// # Errors
/// As [`round::pack`]; the inner result is a weight that cannot be packed.
pub fn pack(machine: &Machine, matrix: &Tensor, factor: &Factor, format: Format) -> Result<Result<Packed, String>> {
    let (n, k) = (matrix.rows(), matrix.row_len());
    let mut draft = Draft::new(n, k, format);
    let mut a = Tensor::zeros(&[n, k], DType::F32);
    for (j, diagonal) in factor.diagonal.iter().enumerate() {
        let (first_col, width) = factor.panel(j);
        let mut errors = Tensor::zeros(&[n, width], DType::F32);
        {
            let (a, diagonal) = (a.as_slice(), diagonal.as_slice());
            let errors = Disjoint::new(errors.as_mut_slice());
            let results = draft.fill(&machine.pool, |block| {
                // SAFETY: each block has rows of its own.
                let errors = unsafe { errors.slice(block.first_row * width, block.n_rows * width) };
                machine.isa.run(RoundPanel { matrix, a, diagonal, first_col, width, errors, block })
            });
            if let Some(problem) = results.into_iter().find_map(Result::err) {
                return Ok(Err(problem));
            }
        }
        let later: Vec<_> = factor.below[j + 1..].iter().map(|parts| parts[j].clone()).collect();
        if !later.is_empty() {
            let weight = Weight { first_col: first_col + width, ..Weight::stacked(later)? };
            machine.ops.linear(&mut a, &errors, &weight, None, Epilogue::Add)?;
        }
    }
    Ok(Ok(draft.finish()))
}

/// All columns of a group matter alike where its scale is chosen.
const ONES: [f32; LARGEST_GROUP] = [1.0; LARGEST_GROUP];

/// A panel's columns of up to 16 rows.
struct RoundPanel<'a> {
    /// `[n, k]`
    matrix: &'a Tensor,
    /// `[n, k]`: what the errors of earlier panels come to.
    a: &'a [f32],
    /// `[width, width]`, row i: L_ji for j ≥ i.
    diagonal: &'a [f32],
    first_col: usize,
    width: usize,
    /// `[rows, width]`, to be written.
    errors: &'a mut [f32],
    block: Block<'a>,
}

impl Kernel for RoundPanel<'_> {
    /// A weight that cannot be packed.
    type Output = Result<(), String>;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Self::Output {
        let Self { matrix, a, diagonal, first_col, width, errors, mut block } = self;
        let k = matrix.row_len();
        let Format { bits, group, .. } = block.format;
        let (low, high) = round::bounds(bits);
        let (mut sums, mut ahead) = ([0.0f32; PANEL], [0.0f32; PANEL]);
        let mut values = [0.0f32; LARGEST_GROUP];
        let mut updated = [0.0f32; LARGEST_GROUP];
        let mut p = [0i8; LARGEST_GROUP];
        for row in 0..block.n_rows {
            let start = (block.first_row + row) * k + first_col;
            let errors = &mut errors[row * width..][..width];
            let sums = &mut sums[..width];
            sums.copy_from_slice(&a[start..start + width]);
            for first in (0..width).step_by(group) {
                let (values, updated, p) = (&mut values[..group], &mut updated[..group], &mut p[..group]);
                round::read(matrix, start + first, values);
                // The scale is for what the group's weights are by now, were none of them to be rounded.
                let ahead = &mut ahead[..width];
                ahead.copy_from_slice(sums);
                for i in 0..group {
                    let (j, l) = (first + i, &diagonal[(first + i) * width..][..width]);
                    let e = -ahead[j] / l[j];
                    updated[i] = values[i] - e;
                    spread(&mut ahead[j + 1..first + group], e, &l[j + 1..first + group]);
                }
                let scale = round::round(bits, updated, &ONES[..group], p);
                round::check_scale(scale, values, block.first_row + row, first_col + first)?;
                let (s, inverse) = (f16::to_f32(scale), round::inverse(scale));
                for i in 0..group {
                    let (j, l) = (first + i, &diagonal[(first + i) * width..][..width]);
                    let w = values[i] + sums[j] / l[j];
                    let q = round::nearest((w * inverse).clamp(low, high));
                    p[i] = q as i8;
                    errors[j] = values[i] - s * q;
                    spread(&mut sums[j + 1..], errors[j], &l[j + 1..]);
                }
                block.put(row, first_col + first, p, scale);
            }
        }
        Ok(())
    }
}

/// a += e·l
#[inline(always)]
fn spread(a: &mut [f32], e: f32, l: &[f32]) {
    for i in 0..a.len().min(l.len()) {
        a[i] += e * l[i];
    }
}

#[cfg(test)]
mod tests {
    use super::super::hessian::Hessian;
    use super::super::inputs::Inputs;
    use super::super::test_support::{correlated, machine, weights};
    use super::*;

    fn factor(machine: &Machine, x: &Tensor) -> Factor {
        let mut hessian = Hessian::new(x.row_len());
        hessian.add(machine, x).unwrap();
        hessian.factor(machine).unwrap()
    }

    /// The paper's algorithm as it stands there, in f64: the inverse in full, a step of elimination in it after each column.
    fn naive(w: &[f32], x: &[f32], k: usize, format: Format) -> (Vec<f32>, Vec<i8>) {
        let mut h = vec![0.0f64; k * k];
        for row in x.chunks_exact(k) {
            for (i, j) in (0..k).flat_map(|i| (0..k).map(move |j| (i, j))) {
                h[i * k + j] += f64::from(row[i]) * f64::from(row[j]);
            }
        }
        let mean = (0..k).map(|i| h[i * k + i]).sum::<f64>() / k as f64;
        (0..k).for_each(|i| h[i * k + i] += 0.01 * mean);
        let inverse = inverse(h, k);
        let (low, high) = round::bounds(format.bits);
        let (mut scales, mut all) = (Vec::new(), Vec::new());
        for row in w.chunks_exact(k) {
            let mut w: Vec<f64> = row.iter().map(|&w| f64::from(w)).collect();
            let mut inverse = inverse.clone();
            for j in 0..k {
                if j % format.group == 0 {
                    let values: Vec<f32> = w[j..j + format.group].iter().map(|&w| w as f32).collect();
                    scales.push(round::round(format.bits, &values, &ONES[..format.group], &mut vec![0; format.group]).to_f32());
                }
                let scale = f64::from(*scales.last().unwrap());
                let p = (w[j] / scale).round_ties_even().clamp(f64::from(low), f64::from(high));
                let error = (w[j] - scale * p) / inverse[j * k + j];
                let of_j: Vec<f64> = (0..k).map(|i| inverse[j * k + i]).collect();
                for i in j + 1..k {
                    w[i] -= error * of_j[i];
                    for c in j + 1..k {
                        inverse[i * k + c] -= of_j[i] * of_j[c] / of_j[j];
                    }
                }
                all.push(p as i8);
            }
        }
        (scales, all)
    }

    /// Gauss and Jordan.
    fn inverse(mut a: Vec<f64>, k: usize) -> Vec<f64> {
        let mut b: Vec<f64> = (0..k * k).map(|i| f64::from(u8::from(i / k == i % k))).collect();
        for j in 0..k {
            let pivot = a[j * k + j];
            for c in 0..k {
                (a[j * k + c], b[j * k + c]) = (a[j * k + c] / pivot, b[j * k + c] / pivot);
            }
            for i in (0..k).filter(|&i| i != j) {
                let factor = a[i * k + j];
                for c in 0..k {
                    a[i * k + c] -= factor * a[j * k + c];
                    b[i * k + c] -= factor * b[j * k + c];
                }
            }
        }
        b
    }

    #[test]
    fn integers_and_scales_are_the_papers() {
        let machine = machine();
        // One panel, several, and one that is not full.
        for (bits, group, k) in [(4, 32, 64), (4, 64, 192), (8, 32, 160), (4, 128, 256)] {
            let format = Format::new(bits, group, false).unwrap();
            let (w, x) = (weights(19, k, 5), correlated(2 * k, k, 6));
            let packed = pack(&machine, &w, &factor(&machine, &x), format).unwrap().unwrap();
            let (scales, p) = naive(w.as_slice(), x.as_slice(), k, format);
            let mut differ = 0;
            for (i, p) in p.iter().enumerate() {
                let (row, col) = (i / k, i % k);
                let (scale, expected) = (packed.scale_offset(row, col).0, scales[(row * k + col) / group]);
                assert!((scale - expected).abs() <= f16::EPSILON.to_f32() * expected.abs(), "{format}: {scale}, not {expected}");
                differ += usize::from(i32::from(packed.q(row, col)) - format.zero() != i32::from(*p));
            }
            // f32 sums may tip a scale to the next f16, or a weight that is right between two integers, and then what follows in its row.
            println!("{format}, k = {k}: {differ} of {} differ", p.len());
            assert!(differ <= p.len() / 200, "{format}, k = {k}: {differ} of {} differ", p.len());
        }
    }

    /// Where columns have something in common, the output's error is less than 0.4 of that of plain rounding (0.31 to 0.34).
    #[test]
    fn correlated_inputs_make_good_for_rounding() {
        let machine = machine();
        for (bits, group) in [(4, 32), (4, 128), (8, 128)] {
            let format = Format::new(bits, group, false).unwrap();
            let (w, x) = (weights(96, 384, 7), correlated(1500, 384, 8));
            let mut inputs = Inputs::new(384, x.rows(), false);
            inputs.see(&machine, &x).unwrap();
            let error =
                |packed: &Packed| inputs.output_loss(&machine, &w, &round::dense(&machine.pool, packed)).unwrap().relative();
            let gptq = error(&pack(&machine, &w, &factor(&machine, &x), format).unwrap().unwrap());
            let rtn = error(&round::pack(&machine.pool, machine.isa, &w, format).unwrap().0);
            println!("{format}: {gptq} of RTN's {rtn}: {}", gptq / rtn);
            assert!(gptq < 0.4 * rtn, "{format}: {gptq}, plain rounding {rtn}");
        }
    }

    #[test]
    fn instruction_sets_agree_and_what_is_too_large_is_refused() {
        let format = Format::new(4, 64, false).unwrap();
        let (w, x) = (weights(33, 192, 1), correlated(300, 192, 2));
        let factor = factor(&machine(), &x);
        let mut scalar = machine();
        scalar.isa = crate::cpu::simd::Isa::Scalar;
        let (a, b) =
            (pack(&machine(), &w, &factor, format).unwrap().unwrap(), pack(&scalar, &w, &factor, format).unwrap().unwrap());
        // Products between panels are the same; within one, a fused multiply-add rounds once where two instructions round twice.
        let differ = a.words.as_bytes().iter().zip(b.words.as_bytes()).filter(|(a, b)| a != b).count();
        assert!(differ <= a.words.bytes() / 50, "{differ}");
        let mut large = w.converted(DType::F32);
        large.as_mut_slice::<f32>()[20 * 192 + 70] = 1e9;
        let problem = pack(&machine(), &large, &factor, format).unwrap().unwrap_err();
        assert!(problem.contains("row 20") && problem.contains("column 70"), "{problem}");
    }
}
