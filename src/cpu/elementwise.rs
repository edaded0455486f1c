//! Ops that touch each element once: activations, gathers, copies.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;

use super::pool::Pool;
use super::simd::{self, Isa};
use crate::dtype::DType;
use crate::ops::RowCopy;
use crate::tensor::Tensor;

/// y = silu(gate) ⊙ up, silu(g) = g·σ(g): gate_up rows are `[gate | up]`, `n` of each.
pub fn silu_mul(isa: Isa, pool: &Pool, y: &mut [f32], gate_up: &[f32], n: usize) {
    pool.for_rows(y, n, 1, |row, y| {
        let (gate, up) = gate_up[row * 2 * n..(row + 1) * 2 * n].split_at(n);
        simd::silu_mul_row(isa, y, gate, up);
    });
}

/// y\[i\] = table\[ids\[i\]\], widened to f32.
pub fn embed(y: &mut [f32], table: &Tensor, ids: &[u32]) {
    let hidden = table.row_len();
    for (y, &id) in y.chunks_exact_mut(hidden).zip(ids) {
        let row = id as usize * hidden..(id as usize + 1) * hidden;
        match table.dtype() {
            DType::F32 => y.copy_from_slice(&table.as_slice::<f32>()[row]),
            DType::F16 => table.as_slice::<half::f16>()[row].convert_to_f32_slice(y),
            DType::Bf16 => table.as_slice::<half::bf16>()[row].convert_to_f32_slice(y),
            DType::I32 | DType::I8 => unreachable!("weights are floating-point"),
        }
    }
}

/// y\[patch, (c, r, s)\] = pixels\[image, c, pr·p + r, pc·p + s\]: what CLIP's stride-p convolution reads, patch by patch.
pub fn patchify(y: &mut [f32], pixels: &[f32], images: Range<usize>, [height, width]: [usize; 2], p: usize) {
    let (patch_rows, patch_cols) = (height / p, width / p);
    let mut runs = y.chunks_exact_mut(p);
    for image in images {
        for (patch_row, patch_col) in (0..patch_rows).flat_map(|r| (0..patch_cols).map(move |c| (r, c))) {
            for (channel, row) in (0..3).flat_map(|c| (0..p).map(move |r| (c, r))) {
                let start = ((image * 3 + channel) * height + patch_row * p + row) * width + patch_col * p;
                let run = runs.next().expect("y holds every patch");
                run.copy_from_slice(&pixels[start..start + p]);
            }
        }
    }
}

/// y = \[class; patches\] + positions, image by image.
pub fn clip_embed(y: &mut [f32], patches: &[f32], class: &[f32], positions: &[f32]) {
    let hidden = class.len();
    let n_patches = positions.len() / hidden - 1;
    for (y, patches) in y.chunks_exact_mut(positions.len()).zip(patches.chunks_exact(n_patches * hidden)) {
        for ((y, &x), &position) in y.iter_mut().zip(class.iter().chain(patches)).zip(positions) {
            *y = x + position;
        }
    }
}

/// Row copies between f32 tensors.
pub fn copy_rows(dst: &mut Tensor, src: &Tensor, copies: &[RowCopy]) {
    let width = src.row_len();
    let (dst, src) = (dst.as_mut_slice::<f32>(), src.as_slice::<f32>());
    for c in copies {
        dst[c.dst * width..(c.dst + c.n_rows) * width].copy_from_slice(&src[c.src * width..(c.src + c.n_rows) * width]);
    }
}
