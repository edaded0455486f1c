//! Attention of many rows at once: CLIP, and the prompt.
//!
//! A task owns one key and value head and a block of the queries that use it, and walks over the keys in blocks of [`KEYS`]:
//!
//! ```text
//! S = q·Kᵀ        m' = max(m, max S/√d)      P = exp(S/√d − m')      α = exp(m − m')
//! l = α·l + Σ P   O = α·O + P·V              m = m'                  at the end: out = O / l
//! ```
//!
//! Both products run in the tiles of the linear layer; K and V are packed as its weights are. Tiles that no query sees are skipped.

#![allow(clippy::needless_range_loop)] // lanes, rows and columns are indexed alike, and unrolled

use super::attention::{Attention, Kv, Stack, scale};
use super::pool::Pool;
use super::scratch::{carve, padded, with_scratch};
use super::simd::{self, Isa, Kernel, MAX_LANES, NV, Simd, Stored};
use super::tile::{MAX_ROWS, Tile, pack_columns, pack_rows, store_tile, tile, with_height};
use crate::ops::Span;

/// Keys in a block: with 192 queries, S takes 96 KiB.
const KEYS: usize = 128;
/// Queries of a task: each packed key is used that often.
const QUERIES: usize = 192;

/// Attention of these spans.
pub fn attend<E: Stored>(isa: Isa, pool: &Pool, op: &Attention<'_>, kv: Kv<'_, E>, spans: &[&Span<'_>]) {
    let mut tasks = Vec::new();
    for &span in spans {
        let n_queries = span.n_rows * op.group();
        let n_blocks = n_queries.div_ceil(QUERIES);
        for block in 0..n_blocks {
            let (first, end) = (block * n_queries / n_blocks, (block + 1) * n_queries / n_blocks);
            tasks.extend((0..op.heads.n_kv_heads).map(|kv_head| Task { stack: Stack { op, span, kv_head }, first, end }));
        }
    }
    // Causal tasks grow with their position: the long ones first, so that the last to finish are short.
    tasks.reverse();
    pool.run(tasks.len(), &|i| tasks[i].run(isa, kv));
}

/// Queries `first..end` of a stack.
struct Task<'a> {
    stack: Stack<'a>,
    first: usize,
    end: usize,
}

/// Working memory of a task. Rows and columns are filled up to whole tiles, with numbers that nothing reads.
struct Work<'a> {
    /// `[queries, head_dim]`
    q: &'a mut [f32],
    /// Panels of keys `[KEYS / NR][head_dim, NR]`.
    k: &'a mut [f32],
    /// Panels of values `[width / NR][KEYS, NR]`.
    v: &'a mut [f32],
    /// S, then P: `[queries, KEYS]`.
    s: &'a mut [f32],
    /// `[queries, width]`, width = head_dim in whole tiles
    o: &'a mut [f32],
    /// `[queries]`: largest score, sum of P, and what the last block did to what was there.
    max: &'a mut [f32],
    sum: &'a mut [f32],
    alpha: &'a mut [f32],
    /// `[KEYS]`: of keys and of values, if they have any.
    k_scales: &'a mut [f32],
    v_scales: &'a mut [f32],
    is_scaled: bool,
}

impl Task<'_> {
    fn run<E: Stored>(&self, isa: Isa, kv: Kv<'_, E>) {
        let (stack, d) = (self.stack, self.stack.op.heads.head_dim);
        let n = self.end - self.first;
        // Room for whole tiles of any instruction set.
        let (rows, width) = (n + MAX_ROWS, d.next_multiple_of(NV * MAX_LANES));
        let sizes = [rows * d, KEYS * d, KEYS * width, rows * KEYS, rows * width, rows, rows, rows, KEYS, KEYS];
        with_scratch(sizes.iter().map(|&len| padded(len)).sum(), |mut rest| {
            let [q, k, v, s, o, max, sum, alpha, k_scales, v_scales] = sizes.map(|len| carve(&mut rest, len));
            let mut work = Work { q, k, v, s, o, max, sum, alpha, k_scales, v_scales, is_scaled: false };
            for i in 0..n {
                work.q[i * d..][..d].copy_from_slice(stack.query(self.first + i));
            }
            work.o.fill(0.0);
            work.max.fill(f32::NEG_INFINITY);
            work.sum.fill(0.0);
            let last = stack.visible(self.end - 1);
            for key in (0..last).step_by(KEYS) {
                let n_keys = KEYS.min(last - key);
                isa.run(Pack { stack, kv, key, n_keys, work: &mut work });
                isa.run(Block { task: self, key, n_keys, width, work: &mut work });
            }
            for i in 0..n {
                // SAFETY: each query's result is written by the one task that owns it.
                let out = unsafe { stack.op.out.slice(stack.out_index(self.first + i), d) };
                let scale = 1.0 / work.sum[i];
                if let Some(lse) = &stack.op.lse {
                    // SAFETY: as above.
                    unsafe { lse.slice(stack.head_index(self.first + i), 1)[0] = work.max[i] + work.sum[i].ln() };
                }
                out.iter_mut().zip(&work.o[i * width..]).for_each(|(out, o)| *out = o * scale);
            }
        });
    }
}

/// Packs keys and values `key .. key + n_keys`.
struct Pack<'a, 'w, E> {
    stack: Stack<'a>,
    kv: Kv<'a, E>,
    key: usize,
    n_keys: usize,
    work: &'a mut Work<'w>,
}

impl<E: Stored> Kernel for Pack<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { stack, kv, key, n_keys, work } = self;
        let d = stack.op.heads.head_dim;
        let mut k_rows = [std::ptr::null::<E>(); KEYS];
        let mut v_rows = [std::ptr::null::<E>(); KEYS];
        for i in 0..n_keys {
            let (k, v) = stack.key_value(kv, key + i);
            (k_rows[i], v_rows[i]) = (k.as_ptr(), v.as_ptr());
        }
        work.is_scaled = stack.scales(kv, key, &mut work.k_scales[..n_keys], &mut work.v_scales[..n_keys]);
        for (rows, panel) in k_rows[..n_keys].chunks(S::NR).zip(work.k.chunks_exact_mut(d * S::NR)) {
            // SAFETY: the instructions are there, says the caller; keys have d elements, and the panel has room for them.
            unsafe { pack_columns::<S, E>(panel.as_mut_ptr(), rows, d) };
        }
        for (j, panel) in (0..d).step_by(S::NR).zip(work.v.chunks_exact_mut(KEYS * S::NR)) {
            // SAFETY: as above, for values.
            unsafe { pack_rows::<S, E>(panel.as_mut_ptr(), &v_rows[..n_keys], j, S::NR.min(d - j)) };
        }
    }
}

/// Adds the keys and values that were packed, in the steps that the head of this file names.
struct Block<'a, 'w> {
    task: &'a Task<'a>,
    key: usize,
    n_keys: usize,
    /// Row length of O.
    width: usize,
    work: &'a mut Work<'w>,
}

impl Kernel for Block<'_, '_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { task: &Task { stack, first, end }, key, n_keys, width, work } = self;
        let (n, d) = (end - first, stack.op.heads.head_dim);
        // SAFETY: the instructions are there, says the caller; panels, q, S and O have room for whole tiles.
        unsafe {
            for j in (0..n_keys).step_by(S::NR) {
                for i in (0..n).step_by(S::MR) {
                    if j >= stack.n_seen(first + (i + S::MR).min(n) - 1, key, n_keys) {
                        continue;
                    }
                    let (q, k, s) = (work.q[i * d..].as_ptr(), work.k[j * d..].as_ptr(), work.s[i * KEYS + j..].as_mut_ptr());
                    with_height!(S::MR.min(n - i), S, M => {
                        let acc = tile::<S, M, false>(d, q, d, 1, 0, k);
                        store_tile::<S, M>(&acc, s, KEYS, false);
                    });
                }
            }
            for i in 0..n {
                let n_visible = stack.n_seen(first + i, key, n_keys);
                let row = &mut work.s[i * KEYS..][..KEYS];
                if work.is_scaled {
                    scale(&mut row[..n_keys], work.k_scales);
                }
                let (max, alpha, sum) = softmax::<S>(row, n_visible, n_keys, stack.op.scale, work.max[i]);
                (work.max[i], work.alpha[i], work.sum[i]) = (max, alpha, work.sum[i] * alpha + sum);
                if work.is_scaled {
                    scale(&mut row[..n_keys], work.v_scales);
                }
            }
            for j in (0..d).step_by(S::NR) {
                for i in (0..n).step_by(S::MR) {
                    // P is zero beyond what the last of these queries sees.
                    let n_seen = stack.n_seen(first + (i + S::MR).min(n) - 1, key, n_keys);
                    if n_seen == 0 {
                        continue;
                    }
                    let (p, v, o) =
                        (work.s[i * KEYS..].as_ptr(), work.v[j * KEYS..].as_ptr(), work.o[i * width + j..].as_mut_ptr());
                    with_height!(S::MR.min(n - i), S, M => {
                        let acc = tile::<S, M, false>(n_seen, p, KEYS, 1, 0, v);
                        add_scaled::<S, M>(&acc, o, width, &work.alpha[i..]);
                    });
                }
            }
        }
    }
}

/// Turns the first `n_visible` scores of a row into exp(scale·s − m') and the rest, up to `n_keys`, into zero.
/// Returns m' = max(m, max scale·s), exp(m − m') and the sum.
///
/// # Safety
/// That of [`Simd`]; the row has room for `n_keys` in whole vectors.
#[inline(always)]
pub(super) unsafe fn softmax<S: Simd>(row: &mut [f32], n_visible: usize, n_keys: usize, scale: f32, m: f32) -> (f32, f32, f32) {
    if n_visible == 0 {
        row[..n_keys].fill(0.0);
        return (m, 1.0, 0.0);
    }
    let whole = n_visible.next_multiple_of(S::LANES);
    assert!(row.len() >= whole, "a row of {} for {n_visible} scores", row.len());
    row[n_visible..whole].fill(f32::NEG_INFINITY);
    let p = row.as_mut_ptr();
    // SAFETY: the caller's; the row has `whole` elements.
    unsafe {
        let mut max = S::splat(f32::NEG_INFINITY);
        for i in (0..whole).step_by(S::LANES) {
            max = S::max(max, S::load(p.add(i)));
        }
        let new_max = m.max(S::reduce_max(max) * scale);
        let mut sum = S::splat(0.0);
        for i in (0..whole).step_by(S::LANES) {
            let e = simd::exp::<S>(S::fma(S::load(p.add(i)), S::splat(scale), S::splat(-new_max)));
            S::store(p.add(i), e);
            sum = S::add(sum, e);
        }
        if whole < n_keys {
            row[whole..n_keys].fill(0.0);
        }
        // Before the first block there is nothing, which takes no exp to know.
        let alpha = if m == f32::NEG_INFINITY { 0.0 } else { (m - new_max).exp() };
        (new_max, alpha, S::reduce_add(sum))
    }
}

/// row i of o = row i of o · alpha\[i\] + acc\[i\]
///
/// # Safety
/// That of [`Simd`]; there is room.
#[inline(always)]
unsafe fn add_scaled<S: Simd, const M: usize>(acc: &Tile<S, M>, o: *mut f32, stride: usize, alpha: &[f32]) {
    for i in 0..M {
        for v in 0..NV {
            // SAFETY: the caller's.
            unsafe {
                let o = o.add(i * stride + v * S::LANES);
                S::store(o, S::fma(S::load(o), S::splat(alpha[i]), acc[i][v]));
            }
        }
    }
}

const _: () = assert!(KEYS.is_multiple_of(NV * MAX_LANES), "blocks of keys are whole panels");
