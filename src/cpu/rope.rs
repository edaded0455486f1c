//! Rotary embedding of queries and keys; in inference followed by the append of keys and values to the paged cache.

use half::slice::HalfFloatSliceExt;

use super::pool::{Disjoint, Pool};
use crate::dtype::DType;
use crate::ops::{Heads, KvLayer, RopeTable, Rotation, Span, kv};
use crate::tensor::Tensor;

/// (a, b) ← (a·cos − b·sin, b·cos + a·sin) for the pairs (x_i, x_{i + d/2}) of one head, sin times `sign`.
fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
    let (first, second) = head.split_at_mut(cos.len());
    for (((a, b), &c), &s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        let s = s * sign;
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}

/// Rows of a task.
const ROWS: usize = 16;

/// Rotates queries and keys in place by the position of their row, or back by it. Spans share no rows: ops check that.
pub fn rope(pool: &Pool, qkv: &mut [f32], rope: &RopeTable, spans: &[Span<'_>], heads: Heads, rotation: Rotation) {
    let (width, dim, half) = (heads.qkv_width(), heads.head_dim, heads.head_dim / 2);
    let rotated = heads.q_width() + heads.kv_width();
    let (cos, sin) = (rope.cos.as_slice::<f32>(), rope.sin.as_slice::<f32>());
    let sign = match rotation {
        Rotation::Forward => 1.0,
        Rotation::Inverse => -1.0,
    };
    // All spans at once: a batch of short ones would else be as many hand-overs to the threads.
    let tasks: Vec<_> = spans.iter().flat_map(|span| (0..span.n_rows).step_by(ROWS).map(move |first| (span, first))).collect();
    let qkv = Disjoint::new(qkv);
    pool.run(tasks.len(), &|i| {
        let (span, first) = tasks[i];
        let n_rows = ROWS.min(span.n_rows - first);
        // SAFETY: spans have rows of their own, says the caller, and tasks rows of their span.
        let rows = unsafe { qkv.slice((span.first_row + first) * width, n_rows * width) };
        for (i, row) in rows.chunks_exact_mut(width).enumerate() {
            let angle = (span.past + first + i) * half..(span.past + first + i + 1) * half;
            for head in row[..rotated].chunks_exact_mut(dim) {
                rotate(head, &cos[angle.clone()], &sin[angle.clone()], sign);
            }
        }
    });
}

/// Rounds `values` into row `slot` of `cache`, with a scale of their own if it has scales.
fn store(cache: &mut Tensor, scales: Option<&mut Tensor>, slot: usize, values: &[f32]) {
    let range = slot * values.len()..(slot + 1) * values.len();
    match cache.dtype() {
        DType::F32 => cache.as_mut_slice::<f32>()[range].copy_from_slice(values),
        DType::F16 => cache.as_mut_slice::<half::f16>()[range].convert_from_f32_slice(values),
        DType::Bf16 => cache.as_mut_slice::<half::bf16>()[range].convert_from_f32_slice(values),
        DType::I8 => {
            let scales = scales.expect("a cache of integers has scales: the op was checked");
            scales.as_mut_slice::<f32>()[slot] = kv::quantize(values, &mut cache.as_mut_slice::<i8>()[range]);
        }
        DType::I32 => unreachable!("the cache is floating-point, or of 8 bits"),
    }
}

/// Rotates queries and keys in place by the position of their row, then writes keys and values to their pages.
pub fn rope_append(pool: &Pool, qkv: &mut [f32], cache: &mut KvLayer, rope: &RopeTable, spans: &[Span<'_>], heads: Heads) {
    self::rope(pool, qkv, rope, spans, heads, Rotation::Forward);
    let (width, dim) = (heads.qkv_width(), heads.head_dim);
    for span in spans {
        let rows = &qkv[span.first_row * width..(span.first_row + span.n_rows) * width];
        let page_tokens = cache.page_tokens();
        for (i, row) in rows.chunks_exact(width).enumerate() {
            let position = span.past + i;
            let page = span.pages[position / page_tokens] as usize;
            for head in 0..heads.n_kv_heads {
                let slot = (page * heads.n_kv_heads + head) * page_tokens + position % page_tokens;
                let [k_scales, v_scales] = cache.scales.as_mut().map_or([None, None], |[k, v]| [Some(k), Some(v)]);
                let key = heads.q_width() + head * dim;
                store(&mut cache.k, k_scales, slot, &row[key..key + dim]);
                let value = key + heads.kv_width();
                store(&mut cache.v, v_scales, slot, &row[value..value + dim]);
            }
        }
    }
}
