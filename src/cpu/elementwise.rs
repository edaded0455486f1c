//! Ops that touch each element once: activations, gathers, copies.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;

use super::pool::{Disjoint, Pool};
use super::simd::{self, Isa};
use super::sum_rows::sum_columns;
use crate::dtype::DType;
use crate::ops::dropout::Dropout;
use crate::ops::{Activation, Matrix, RowCopy};
use crate::tensor::Tensor;

/// Elements of a task: far more than claiming one costs.
const RUN: usize = 4096;

/// y = silu(gate) ⊙ up, silu(g) = g·σ(g): gate_up rows are `[gate | up]`, `n` of each.
pub fn silu_mul(isa: Isa, pool: &Pool, y: &mut [f32], gate_up: &[f32], n: usize) {
    pool.for_rows(y, n, RUN.div_ceil(n), |first, y| {
        for (y, gate_up) in y.chunks_exact_mut(n).zip(gate_up[first * 2 * n..].chunks_exact(2 * n)) {
            let (gate, up) = gate_up.split_at(n);
            simd::silu_mul_row(isa, y, gate, up);
        }
    });
}

/// d_gate = dy ⊙ up ⊙ silu′(gate), d_up = dy ⊙ silu(gate); rows are `[gate | up]`, `n` of each.
pub fn silu_mul_backward(isa: Isa, pool: &Pool, d_gate_up: &mut [f32], dy: &[f32], gate_up: &[f32], n: usize) {
    pool.for_rows(d_gate_up, 2 * n, RUN.div_ceil(n), |first, d_gate_up| {
        let rows = dy[first * n..].chunks_exact(n).zip(gate_up[first * 2 * n..].chunks_exact(2 * n));
        for (d_gate_up, (dy, gate_up)) in d_gate_up.chunks_exact_mut(2 * n).zip(rows) {
            let ((gate, up), (d_gate, d_up)) = (gate_up.split_at(n), d_gate_up.split_at_mut(n));
            simd::silu_mul_backward_row(isa, [d_gate, d_up], dy, [gate, up]);
        }
    });
}

/// y = f(x)
pub fn activate(isa: Isa, pool: &Pool, y: &mut [f32], x: &[f32], f: Activation) {
    pool.for_rows(y, 1, RUN, |first, y| {
        let x = &x[first..first + y.len()];
        match f {
            Activation::Gelu => simd::gelu_row(isa, y, x),
            Activation::QuickGelu => simd::quick_gelu_row(isa, y, x),
        }
    });
}

/// dx = dy ⊙ f′(x)
pub fn activate_backward(isa: Isa, pool: &Pool, dx: &mut [f32], dy: &[f32], x: &[f32], f: Activation) {
    pool.for_rows(dx, 1, RUN, |first, dx| {
        let (dy, x) = (&dy[first..first + dx.len()], &x[first..first + dx.len()]);
        match f {
            Activation::Gelu => simd::gelu_backward_row(isa, dx, dy, x),
            Activation::QuickGelu => simd::quick_gelu_backward_row(isa, dx, dy, x),
        }
    });
}

/// t = factor·t
pub fn scale(pool: &Pool, t: &mut [f32], factor: f32) {
    pool.for_rows(t, 1, RUN, |_, t| t.iter_mut().for_each(|t| *t *= factor));
}

/// y\[i\] = x\[i\] times its factor.
pub fn dropout(pool: &Pool, y: &mut [f32], x: &[f32], dropout: Dropout) {
    pool.for_rows(y, 1, RUN, |first, y| {
        // A task begins with a block.
        for (i, (y, x)) in y.chunks_mut(4).zip(x[first..].chunks(4)).enumerate() {
            let factors = dropout.factors((first / 4 + i) as u64);
            for ((y, x), factor) in y.iter_mut().zip(x).zip(factors) {
                // Not a product: what is dropped may be infinite.
                *y = if factor == 0.0 { 0.0 } else { x * factor };
            }
        }
    });
}

/// y\[i\] = table\[ids\[i\]\], widened to f32.
pub fn embed(y: &mut [f32], table: &Matrix, ids: &[u32]) {
    let hidden = table.k();
    for (y, &id) in y.chunks_exact_mut(hidden).zip(ids) {
        let row = id as usize * hidden..(id as usize + 1) * hidden;
        let table = match table {
            Matrix::Dense(table) => table,
            Matrix::Packed(table) => {
                table.row_to_f32(id as usize, y);
                continue;
            }
        };
        match table.dtype() {
            DType::F32 => y.copy_from_slice(&table.as_slice::<f32>()[row]),
            DType::F16 => table.as_slice::<half::f16>()[row].convert_to_f32_slice(y),
            DType::Bf16 => table.as_slice::<half::bf16>()[row].convert_to_f32_slice(y),
            DType::I32 | DType::I8 => unreachable!("weights are floating-point"),
        }
    }
}

/// d_table\[ids\[i\]\] += dy\[i\], rows of `hidden`: each row of the table belongs to one task, which adds to it in the order of i.
pub fn embed_backward(pool: &Pool, d_table: &mut [f32], dy: &[f32], ids: &[u32], hidden: usize) {
    let mut order: Vec<usize> = (0..ids.len()).collect();
    order.sort_by_key(|&i| ids[i]); // stable
    let tokens: Vec<&[usize]> = order.chunk_by(|&a, &b| ids[a] == ids[b]).collect();
    let d_table = Disjoint::new(d_table);
    pool.run(tokens.len(), &|token| {
        // SAFETY: each row of the table is that of one token, and each token has one task.
        let row = unsafe { d_table.slice(ids[tokens[token][0]] as usize * hidden, hidden) };
        for i in tokens[token] {
            add(row, &dy[i * hidden..(i + 1) * hidden]);
        }
    });
}

/// a += b
fn add(a: &mut [f32], b: &[f32]) {
    a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
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

/// The gradient of [`clip_embed`]: that of the patches is written, those of class and positions are added to.
pub fn clip_embed_backward(pool: &Pool, d_patches: &mut [f32], d_class: &mut [f32], d_positions: &mut [f32], dy: &[f32]) {
    let (hidden, of_image) = (d_class.len(), d_positions.len());
    if hidden == 0 {
        return;
    }
    for (d_patches, dy) in d_patches.chunks_exact_mut(of_image - hidden).zip(dy.chunks_exact(of_image)) {
        d_patches.copy_from_slice(&dy[hidden..]);
    }
    sum_columns(pool, d_class, dy, of_image, 0);
    sum_columns(pool, d_positions, dy, of_image, 0);
}

/// dst rows += src rows, between f32 tensors.
pub fn add_rows(dst: &mut Tensor, src: &Tensor, copies: &[RowCopy]) {
    let width = src.row_len();
    let (dst, src) = (dst.as_mut_slice::<f32>(), src.as_slice::<f32>());
    for c in copies {
        add(&mut dst[c.dst * width..(c.dst + c.n_rows) * width], &src[c.src * width..(c.src + c.n_rows) * width]);
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
