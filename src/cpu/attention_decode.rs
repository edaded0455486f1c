//! Attention of a few rows: a step of decoding, bound by reading K and V.
//!
//! A task owns one key and value head and [`CHUNK`] tokens of the context, for all queries that use the head. It leaves a partial result
//! (O, m, l); the partial results of a query are merged in the order of the context:
//!
//! ```text
//! m = max mᵢ      l = Σ lᵢ·exp(mᵢ − m)      out = Σ Oᵢ·exp(mᵢ − m) / l
//! ```
//!
//! The size of a chunk is fixed, so that the result does not depend on the number of threads.

#![allow(clippy::needless_range_loop)] // lanes, rows and columns are indexed alike, and unrolled

use super::attention::{Attention, Kv, Stack, scale};
use super::attention_blocks::softmax;
use super::pool::Disjoint;
use super::pool::Pool;
use super::scratch::{padded, with_scratch};
use super::simd::{Isa, Kernel, LINE, MAX_LANES, Simd, Stored};
use crate::ops::Span;

/// Tokens of the context in a task.
const CHUNK: usize = 512;
/// Tokens whose scores are computed before their values are read.
const KEYS: usize = 64;
/// Queries that meet a key while it is in registers.
const QUERIES: usize = 4;
/// Vectors of an output row that are summed at a time.
const OUT_VECTORS: usize = 8;

/// Attention of these spans.
pub fn attend<E: Stored>(isa: Isa, pool: &Pool, op: &Attention<'_>, kv: Kv<'_, E>, spans: &[&Span<'_>]) {
    let d = op.heads.head_dim;
    let row = partial_len(d);
    let mut tasks = Vec::new();
    let mut len = 0;
    for &span in spans {
        let (context, n_queries) = (span.past + span.n_rows, span.n_rows * op.group());
        for kv_head in 0..op.heads.n_kv_heads {
            for start in (0..context).step_by(CHUNK) {
                tasks.push(Task { stack: Stack { op, span, kv_head }, n_queries, start, end: context.min(start + CHUNK), at: len });
                len += n_queries * row;
            }
        }
    }
    with_scratch(len, |partials| {
        let shared = Disjoint::new(partials);
        pool.run(tasks.len(), &|i| {
            let task = &tasks[i];
            // SAFETY: each task has its own partial results.
            let partials = unsafe { shared.slice(task.at, task.n_queries * row) };
            with_scratch(task.n_queries * KEYS, |scores| isa.run(Stream { task, kv, partials, scores }));
        });
        let partials = shared.into_inner();
        for chunks in tasks.chunk_by(|a, b| std::ptr::eq(a.stack.span, b.stack.span) && a.stack.kv_head == b.stack.kv_head) {
            let Task { stack, n_queries, .. } = chunks[0];
            for q in 0..n_queries {
                let parts = chunks.iter().map(|task| &partials[task.at + q * row..][..row]);
                // SAFETY: all tasks are done; nobody else writes.
                merge(unsafe { op.out.slice(stack.out_index(q), d) }, parts);
            }
        }
    });
}

/// Elements of a partial result: O, then m and l, in whole cache lines.
fn partial_len(head_dim: usize) -> usize {
    padded(head_dim + 2)
}

/// out = Σ Oᵢ·exp(mᵢ − m) / Σ lᵢ·exp(mᵢ − m)
fn merge<'a>(out: &mut [f32], parts: impl Iterator<Item = &'a [f32]> + Clone) {
    let d = out.len();
    let max = parts.clone().map(|part| part[d]).fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = parts.clone().map(|part| part[d + 1] * (part[d] - max).exp()).sum();
    out.fill(0.0);
    for part in parts {
        let scale = (part[d] - max).exp() / sum;
        out.iter_mut().zip(part).for_each(|(out, o)| *out += o * scale);
    }
}

/// Tokens `start..end` of a sequence, for the queries of one stack.
#[derive(Clone, Copy)]
struct Task<'a> {
    stack: Stack<'a>,
    n_queries: usize,
    start: usize,
    end: usize,
    /// Where its partial results start.
    at: usize,
}

/// Streams the keys and values of a task.
struct Stream<'a, E> {
    task: &'a Task<'a>,
    kv: Kv<'a, E>,
    partials: &'a mut [f32],
    /// `[queries, KEYS]`
    scores: &'a mut [f32],
}

impl<E: Stored> Kernel for Stream<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { task: &Task { stack, n_queries, start, end, .. }, kv, partials, scores } = self;
        let d = stack.op.heads.head_dim;
        for partial in partials.chunks_mut(partial_len(d)) {
            partial[..d].fill(0.0);
            partial[d..d + 2].copy_from_slice(&[f32::NEG_INFINITY, 0.0]);
        }
        for key in (start..end).step_by(KEYS) {
            let n_keys = KEYS.min(end - key);
            let mut rows = [(std::ptr::null::<E>(), std::ptr::null::<E>()); KEYS];
            for (i, row) in rows[..n_keys].iter_mut().enumerate() {
                let (k, v) = stack.key_value(kv, key + i);
                *row = (k.as_ptr(), v.as_ptr());
            }
            let (mut k_scales, mut v_scales) = ([1.0; KEYS], [1.0; KEYS]);
            let is_scaled = stack.scales(kv, key, &mut k_scales[..n_keys], &mut v_scales[..n_keys]);
            // SAFETY: the instructions are there, says the caller; keys and values have d elements.
            unsafe {
                let mut first = 0;
                while first + QUERIES <= n_queries {
                    dots::<S, E, QUERIES>(stack, first, &rows[..n_keys], scores);
                    first += QUERIES;
                }
                for first in first..n_queries {
                    dots::<S, E, 1>(stack, first, &rows[..n_keys], scores);
                }
                for (q, (partial, scores)) in partials.chunks_mut(partial_len(d)).zip(scores.chunks_mut(KEYS)).enumerate() {
                    let n_visible = stack.visible(q).saturating_sub(key).min(n_keys);
                    if is_scaled {
                        scale(&mut scores[..n_keys], &k_scales);
                    }
                    let (max, alpha, sum) = softmax::<S>(scores, n_visible, n_keys, stack.op.scale, partial[d]);
                    (partial[d], partial[d + 1]) = (max, partial[d + 1] * alpha + sum);
                    if is_scaled {
                        scale(&mut scores[..n_keys], &v_scales);
                    }
                    for j in (0..d).step_by(OUT_VECTORS * S::LANES) {
                        add_values::<S, E>(&mut partial[j..d], alpha, &scores[..n_keys], &rows[..n_keys], j);
                    }
                }
            }
        }
    }
}

/// Scores of queries `first .. first + Q`: scores\[q\]\[i\] = q·k, `[queries, KEYS]`.
///
/// # Safety
/// That of [`Simd`]; keys have `head_dim` elements.
#[inline(always)]
unsafe fn dots<S: Simd, E: Stored, const Q: usize>(
    stack: Stack<'_>,
    first: usize,
    rows: &[(*const E, *const E)],
    scores: &mut [f32],
) {
    let d = stack.op.heads.head_dim;
    let queries: [*const f32; Q] = std::array::from_fn(|q| stack.query(first + q).as_ptr());
    let whole = d - d % S::LANES;
    for (i, &(k, v)) in rows.iter().enumerate() {
        // SAFETY: the caller's; queries have d elements too.
        unsafe {
            // Values are read a part of each row at a time, which no core foresees: whole rows of them come while keys are read.
            for line in (0..d * size_of::<E>()).step_by(LINE) {
                S::prefetch(v.cast::<u8>().wrapping_add(line));
            }
            let mut acc = [S::splat(0.0); Q];
            for j in (0..whole).step_by(S::LANES) {
                let k = E::load::<S>(k.add(j));
                for q in 0..Q {
                    acc[q] = S::fma(S::load(queries[q].add(j)), k, acc[q]);
                }
            }
            if whole < d {
                let k = E::load_part::<S>(k.add(whole), d - whole);
                for q in 0..Q {
                    acc[q] = S::fma(S::load_part(queries[q].add(whole), d - whole), k, acc[q]);
                }
            }
            for q in 0..Q {
                scores[(first + q) * KEYS + i] = S::reduce_add(acc[q]);
            }
        }
    }
}

/// out = alpha·out + Σ weights\[i\]·v\[i\]\[j..\], for the first [`OUT_VECTORS`] vectors of `out`.
///
/// # Safety
/// That of [`Simd`]; each value has `j + out.len()` elements.
#[inline(always)]
unsafe fn add_values<S: Simd, E: Stored>(out: &mut [f32], alpha: f32, weights: &[f32], rows: &[(*const E, *const E)], j: usize) {
    let n = out.len().min(OUT_VECTORS * S::LANES);
    let out = out.as_mut_ptr();
    // SAFETY: the caller's; vectors and the last part end at n.
    unsafe {
        if n == OUT_VECTORS * S::LANES {
            let mut acc = [S::splat(0.0); OUT_VECTORS];
            for i in 0..OUT_VECTORS {
                acc[i] = S::mul(S::load(out.add(i * S::LANES)), S::splat(alpha));
            }
            for (&weight, &(_, v)) in weights.iter().zip(rows) {
                let weight = S::splat(weight);
                for i in 0..OUT_VECTORS {
                    acc[i] = S::fma(weight, E::load::<S>(v.add(j + i * S::LANES)), acc[i]);
                }
            }
            for i in 0..OUT_VECTORS {
                S::store(out.add(i * S::LANES), acc[i]);
            }
            return;
        }
        for i in (0..n).step_by(S::LANES) {
            let width = S::LANES.min(n - i);
            let mut acc =
                S::mul(if width == S::LANES { S::load(out.add(i)) } else { S::load_part(out.add(i), width) }, S::splat(alpha));
            for (&weight, &(_, v)) in weights.iter().zip(rows) {
                let v = v.add(j + i);
                let v = if width == S::LANES { E::load::<S>(v) } else { E::load_part::<S>(v, width) };
                acc = S::fma(S::splat(weight), v, acc);
            }
            if width == S::LANES { S::store(out.add(i), acc) } else { S::store_part(out.add(i), acc, width) }
        }
    }
}

const _: () = assert!(KEYS.is_multiple_of(MAX_LANES) && CHUNK.is_multiple_of(KEYS), "blocks of keys are whole vectors");
