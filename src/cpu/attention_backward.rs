//! The gradient of attention over the rows' own keys and values (Dao, *FlashAttention-2*, arXiv 2307.08691, section 3.1.2).
//!
//! P is not kept by the forward but made again from the log-sum-exp of each row, a block of queries and keys at a time:
//!
//! ```text
//! S = q·Kᵀ           P = exp(S/√d − lse)     D = Σ do ⊙ out
//! dP = do·Vᵀ         dS = P ⊙ (dP − D)/√d
//! dV = Pᵀ·do         dK = dSᵀ·q              dq = dS·K
//! ```
//!
//! All five products run in the tiles of the linear layer; tiles, and steps of them, in which no query sees a key are left out. A task owns
//! one key and value head of a span, with all queries that use it: nothing is added up between tasks, so that results do not depend on how
//! threads share them. (The price: there is no more work at a time than spans times key and value heads.)

use std::cmp::Reverse;

use super::attention::{Attention, Kv, Stack};
use super::pool::{Disjoint, Pool};
use super::scratch::{carve, padded, with_scratch};
use super::simd::{self, Isa, Kernel, MAX_LANES, NV, Simd};
use super::tile::{MAX_ROWS, pack_columns, pack_lanes, pack_rows, store_tile, tile, with_height};
use crate::ops::{Heads, Span};

/// Keys in a block.
const KEYS: usize = 128;
/// Queries in a block: whole tiles of all heights, so that no tile reaches into the dq of the next block. S and dP of them take 95 KiB,
/// which stays in L2 while five products use it.
const QUERIES: usize = 84;
/// Row length of S and dP: more than the keys, by a cache line. Their columns are read too, and rows a power of two apart would share a few
/// sets of L1.
const STRIDE: usize = KEYS + MAX_ROWS;

const _: () = assert!(KEYS.is_multiple_of(NV * MAX_LANES), "blocks of keys are whole panels");

/// What the forward has left, and the gradient that comes in.
struct Backward<'a> {
    /// Its result is d_qkv.
    op: &'a Attention<'a>,
    /// `[tokens, q_width]` both.
    out: &'a [f32],
    d_out: &'a [f32],
    /// `[tokens, n_heads]`
    lse: &'a [f32],
}

/// d_qkv = the gradient of [`attention_lse`](super::attention::attention_lse) by the rows of `qkv` in spans, where `d_out` is that by its
/// result; `out` and `lse` are what it has written.
///
/// # Panics
/// If spans or heads do not fit the buffers.
#[allow(clippy::too_many_arguments)] // the operands of `GradOps::attention_backward`, and where to run
pub fn attention_backward(
    isa: Isa,
    pool: &Pool,
    d_qkv: &mut [f32],
    qkv: &[f32],
    [out, d_out, lse]: [&[f32]; 3],
    spans: &[Span<'_>],
    heads: Heads,
    causal: bool,
) {
    // Kernels rely on these.
    let Heads { n_heads, n_kv_heads, head_dim } = heads;
    assert!(n_kv_heads > 0 && n_heads % n_kv_heads == 0 && head_dim > 0, "{heads:?}");
    let rows = spans.iter().map(|span| span.first_row + span.n_rows).max().unwrap_or(0);
    let fits = [d_qkv.len(), qkv.len()].iter().all(|&len| len >= rows * heads.qkv_width())
        && [out, d_out].iter().all(|t| t.len() >= rows * heads.q_width())
        && lse.len() >= rows * n_heads;
    assert!(fits && spans.iter().all(|span| span.past == 0), "spans of {rows} rows");
    let scale = 1.0 / (head_dim as f32).sqrt();
    let op = Attention { out: Disjoint::new(d_qkv), qkv, heads, causal, scale, lse: None };
    let backward = Backward { op: &op, out, d_out, lse };
    let of_span = |span| (0..n_kv_heads).map(move |kv_head| (span, kv_head));
    let mut tasks: Vec<_> = spans.iter().filter(|span| span.n_rows > 0).flat_map(of_span).collect();
    // The long ones first, so that the last to finish are short.
    tasks.sort_by_key(|(span, _)| Reverse(span.n_rows));
    pool.run(tasks.len(), &|i| {
        let (span, kv_head) = tasks[i];
        backward.run(isa, Stack { op: &op, span, kv_head });
    });
}

/// Working memory of a task. Rows and columns are filled up to whole tiles, with numbers that nothing reads; `width` is head_dim in whole
/// tiles.
struct Work<'a> {
    /// Of all queries: dq `[queries, width]`, D and the log-sum-exp.
    dq: &'a mut [f32],
    delta: &'a mut [f32],
    lse: &'a mut [f32],
    /// Of a block of keys: Kᵀ and Vᵀ in panels `[KEYS / NR][head_dim, NR]`, K in panels `[width / NR][KEYS, NR]`, dK and dV `[KEYS, width]`.
    k_columns: &'a mut [f32],
    v_columns: &'a mut [f32],
    k_rows: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
    /// Of a block of queries: q and do in panels `[QUERIES / MR][head_dim, MR]`, and the same in panels `[width / NR][QUERIES, NR]`.
    q: &'a mut [f32],
    d_out: &'a mut [f32],
    q_rows: &'a mut [f32],
    d_out_rows: &'a mut [f32],
    /// S, then P, and dP, then dS: `[QUERIES, STRIDE]`.
    s: &'a mut [f32],
    dp: &'a mut [f32],
}

impl Backward<'_> {
    fn run(&self, isa: Isa, stack: Stack<'_>) {
        let (heads, d) = (self.op.heads, self.op.heads.head_dim);
        let (n_keys, group) = (stack.span.n_rows, self.op.group());
        let n = n_keys * group;
        // Room for whole tiles of any instruction set.
        let width = d.next_multiple_of(NV * MAX_LANES);
        let (queries, keys, all) = (QUERIES + MAX_ROWS, KEYS + MAX_ROWS, n + MAX_ROWS);
        let of_all = [all * width, all, all];
        let of_keys = [KEYS * d, KEYS * d, KEYS * width, keys * width, keys * width];
        let of_queries = [queries * d, queries * d, QUERIES * width, QUERIES * width, queries * STRIDE, queries * STRIDE];
        let total = of_all.iter().chain(&of_keys).chain(&of_queries).map(|&len| padded(len)).sum();
        with_scratch(total, |mut rest| {
            let [dq, delta, lse] = of_all.map(|len| carve(&mut rest, len));
            let [k_columns, v_columns, k_rows, dk, dv] = of_keys.map(|len| carve(&mut rest, len));
            let [q, d_out, q_rows, d_out_rows, s, dp] = of_queries.map(|len| carve(&mut rest, len));
            let mut work = Work { dq, delta, lse, k_columns, v_columns, k_rows, dk, dv, q, d_out, q_rows, d_out_rows, s, dp };
            work.dq.fill(0.0);
            isa.run(Deltas { backward: self, stack, delta: &mut work.delta[..n] });
            for q in 0..n {
                work.lse[q] = self.lse[stack.head_index(q)];
            }
            // SAFETY: each head of a row of a span is written by the one task that owns it.
            let write = |index, from: &[f32]| unsafe { self.op.out.slice(index, d) }.copy_from_slice(&from[..d]);
            for key in (0..n_keys).step_by(KEYS) {
                let n_keys = KEYS.min(n_keys - key);
                isa.run(PackKeys { stack, key, n_keys, work: &mut work });
                work.dk.fill(0.0);
                work.dv.fill(0.0);
                for query in (stack.first_to_see(key)..n).step_by(QUERIES) {
                    let n_queries = QUERIES.min(n - query);
                    isa.run(Block { backward: self, stack, query, n_queries, key, n_keys, width, work: &mut work });
                }
                for i in 0..n_keys {
                    let k = (stack.span.first_row + key + i) * heads.qkv_width() + heads.q_width() + stack.kv_head * d;
                    write(k, &work.dk[i * width..]);
                    write(k + heads.kv_width(), &work.dv[i * width..]);
                }
            }
            for q in 0..n {
                write(stack.query_index(q), &work.dq[q * width..]);
            }
        });
    }
}

/// D of the queries of a stack.
struct Deltas<'a, 'w> {
    backward: &'a Backward<'a>,
    stack: Stack<'a>,
    delta: &'w mut [f32],
}

impl Kernel for Deltas<'_, '_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let d = self.stack.op.heads.head_dim;
        let (whole, rest) = (d / S::LANES * S::LANES, d % S::LANES);
        for (q, delta) in self.delta.iter_mut().enumerate() {
            let at = self.stack.out_index(q);
            let (a, b) = (self.backward.d_out[at..][..d].as_ptr(), self.backward.out[at..][..d].as_ptr());
            // SAFETY: the instructions are there, says the caller; both have d elements.
            unsafe {
                let mut sum = S::splat(0.0);
                for i in (0..whole).step_by(S::LANES) {
                    sum = S::fma(S::load(a.add(i)), S::load(b.add(i)), sum);
                }
                if rest > 0 {
                    sum = S::fma(S::load_part(a.add(whole), rest), S::load_part(b.add(whole), rest), sum);
                }
                *delta = S::reduce_add(sum);
            }
        }
    }
}

/// Packs keys and values `key .. key + n_keys`.
struct PackKeys<'a, 'w> {
    stack: Stack<'a>,
    key: usize,
    n_keys: usize,
    work: &'a mut Work<'w>,
}

impl Kernel for PackKeys<'_, '_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { stack, key, n_keys, work } = self;
        let d = stack.op.heads.head_dim;
        let mut k_rows = [std::ptr::null::<f32>(); KEYS];
        let mut v_rows = [std::ptr::null::<f32>(); KEYS];
        for i in 0..n_keys {
            let (k, v) = stack.key_value(Kv::Own(stack.op.qkv), key + i);
            (k_rows[i], v_rows[i]) = (k.as_ptr(), v.as_ptr());
        }
        for (rows, panels) in [(&k_rows, &mut *work.k_columns), (&v_rows, &mut *work.v_columns)] {
            for (rows, panel) in rows[..n_keys].chunks(S::NR).zip(panels.chunks_exact_mut(d * S::NR)) {
                // SAFETY: the instructions are there, says the caller; keys and values have d elements, and the panel has room for them.
                unsafe { pack_columns::<S, f32>(panel.as_mut_ptr(), rows, d) };
            }
        }
        // SAFETY: as above.
        unsafe { pack_panels::<S>(work.k_rows, KEYS, &k_rows[..n_keys], d) };
    }
}

/// Packs rows of `d` elements into panels `[panel_rows, NR]`, as many as cover them.
///
/// # Safety
/// That of [`Simd`]; rows have `d` elements.
#[inline(always)]
unsafe fn pack_panels<S: Simd>(panels: &mut [f32], panel_rows: usize, rows: &[*const f32], d: usize) {
    assert!(rows.len() <= panel_rows, "{} rows in a panel of {panel_rows}", rows.len());
    for (col, panel) in (0..d).step_by(S::NR).zip(panels.chunks_exact_mut(panel_rows * S::NR)) {
        // SAFETY: the caller's; the panel has room for all rows.
        unsafe { pack_rows::<S, f32>(panel.as_mut_ptr(), rows, col, S::NR.min(d - col)) };
    }
}

/// Adds what a block of queries and the keys that were packed give each other, in the steps that the head of this file names.
struct Block<'a, 'w> {
    backward: &'a Backward<'a>,
    stack: Stack<'a>,
    query: usize,
    n_queries: usize,
    key: usize,
    n_keys: usize,
    /// Row length of dq, dK and dV.
    width: usize,
    work: &'a mut Work<'w>,
}

impl Kernel for Block<'_, '_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { backward, stack, query, n_queries, key, n_keys, width, work } = self;
        let d = stack.op.heads.head_dim;
        let mut q_rows = [std::ptr::null::<f32>(); QUERIES];
        let mut d_out_rows = [std::ptr::null::<f32>(); QUERIES];
        for i in 0..n_queries {
            q_rows[i] = stack.query(query + i).as_ptr();
            d_out_rows[i] = backward.d_out[stack.out_index(query + i)..][..d].as_ptr();
        }
        const { assert!(QUERIES.is_multiple_of(S::MR)) };
        // Of each tile of queries, how many keys one of them sees; of each tile of keys, which query is the first to see one.
        let (mut seen, mut first) = ([0; QUERIES], [0; KEYS]);
        for (i, seen) in (0..n_queries).step_by(S::MR).zip(&mut seen) {
            *seen = stack.n_seen(query + (i + S::MR).min(n_queries) - 1, key, n_keys);
        }
        for (i, first) in (0..n_keys).step_by(S::MR).zip(&mut first) {
            *first = stack.first_to_see(key + i).saturating_sub(query).min(n_queries);
        }
        let (cols, steps, tails) = (Part::Cols(&seen), Part::Steps(&seen), Part::StepsFrom(&first));
        let packed = Rows { tile: d, row: 1, step: S::MR };
        let by_row = Rows { tile: STRIDE, row: STRIDE, step: 1 };
        let by_column = Rows { tile: 1, row: 1, step: STRIDE };
        // SAFETY: the instructions are there, says the caller; rows have d elements, and all buffers have room for whole tiles.
        unsafe {
            for (rows, panels) in [(&q_rows, &mut *work.q), (&d_out_rows, &mut *work.d_out)] {
                for (i, rows) in rows[..n_queries].chunks(S::MR).enumerate() {
                    pack_lanes::<S, f32>(panels[i * S::MR * d..].as_mut_ptr(), rows, d, S::MR);
                }
            }
            pack_panels::<S>(work.q_rows, QUERIES, &q_rows[..n_queries], d);
            pack_panels::<S>(work.d_out_rows, QUERIES, &d_out_rows[..n_queries], d);
            let (s, dp) = (work.s.as_mut_ptr(), work.dp.as_mut_ptr());
            let of_keys = [n_queries, n_keys, d];
            product::<S>(of_keys, work.q.as_ptr(), packed, work.k_columns.as_ptr(), d, s, STRIDE, false, cols);
            product::<S>(of_keys, work.d_out.as_ptr(), packed, work.v_columns.as_ptr(), d, dp, STRIDE, false, cols);
            for i in 0..n_queries {
                let n_visible = stack.n_seen(query + i, key, n_keys);
                let (s, dp) = (&mut work.s[i * STRIDE..][..STRIDE], &mut work.dp[i * STRIDE..][..STRIDE]);
                d_softmax::<S>(s, dp, n_visible, stack.op.scale, work.lse[query + i], work.delta[query + i]);
            }
            let of_queries = [n_keys, d, n_queries];
            product::<S>(of_queries, s, by_column, work.d_out_rows.as_ptr(), QUERIES, work.dv.as_mut_ptr(), width, true, tails);
            product::<S>(of_queries, dp, by_column, work.q_rows.as_ptr(), QUERIES, work.dk.as_mut_ptr(), width, true, tails);
            let dq = work.dq[query * width..].as_mut_ptr();
            product::<S>([n_queries, d, n_keys], dp, by_row, work.k_rows.as_ptr(), KEYS, dq, width, true, steps);
        }
    }
}

/// How the numbers of A lie. (A tile wants rows a constant apart: its addresses are then one register and constants.)
#[derive(Clone, Copy)]
struct Rows {
    /// Where a tile begins, in elements for each row before it.
    tile: usize,
    /// Elements from one row of a tile to the next, and from one step to the next.
    row: usize,
    step: usize,
}

/// What of C = A·B is computed, by tiles of rows.
#[derive(Clone, Copy)]
enum Part<'a> {
    /// As many columns of C, in whole panels. The others are left as they are.
    Cols(&'a [usize]),
    /// All columns, by as many steps of k: what A has beyond is zero. To be added only: a tile of no steps is left as it is.
    Steps(&'a [usize]),
    /// The same by the steps of k from this one on: what A has before is zero.
    StepsFrom(&'a [usize]),
}

/// `part` of C = A·B, or of C += A·B if `add`, for A `[rows, k]`, B `[k, cols]` in panels of `panel_rows`, and C in rows of `stride`.
///
/// # Safety
/// That of [`Simd`]; all have room for whole tiles.
#[allow(clippy::too_many_arguments)] // three matrices, and how they lie
#[inline(always)]
unsafe fn product<S: Simd>(
    [rows, cols, k]: [usize; 3],
    a: *const f32,
    a_rows: Rows,
    panels: *const f32,
    panel_rows: usize,
    c: *mut f32,
    stride: usize,
    add: bool,
    part: Part<'_>,
) {
    for j in (0..cols).step_by(S::NR) {
        for (t, i) in (0..rows).step_by(S::MR).enumerate() {
            let (cols, steps) = match part {
                Part::Cols(n) => (n[t], 0..k),
                Part::Steps(n) => (cols, 0..n[t]),
                Part::StepsFrom(first) => (cols, first[t]..k),
            };
            if j >= cols || steps.is_empty() {
                continue;
            }
            // SAFETY: the caller's.
            unsafe {
                let (a, b) = (a.add(i * a_rows.tile + steps.start * a_rows.step), panels.add(j * panel_rows + steps.start * S::NR));
                let c = c.add(i * stride + j);
                with_height!(S::MR.min(rows - i), S, M => {
                    let acc = tile::<S, M, false>(steps.len(), a, a_rows.row, a_rows.step, 0, b);
                    store_tile::<S, M>(&acc, c, stride, add);
                });
            }
        }
    }
}

/// Turns the first `n_visible` of a row's scores s into P = exp(scale·s − lse), and of dP into dS = P ⊙ (dP − delta)·scale; the rest of both
/// rows into zero.
///
/// # Safety
/// That of [`Simd`].
#[inline(always)]
unsafe fn d_softmax<S: Simd>(s: &mut [f32], dp: &mut [f32], n_visible: usize, scale: f32, lse: f32, delta: f32) {
    let whole = n_visible.next_multiple_of(S::LANES);
    assert!(s.len() >= whole && dp.len() >= whole, "rows of {} and {} for {n_visible} scores", s.len(), dp.len());
    for i in (0..whole).step_by(S::LANES) {
        // SAFETY: the caller's; both rows have `whole` elements.
        unsafe {
            let (s, dp) = (s.as_mut_ptr().add(i), dp.as_mut_ptr().add(i));
            let p = simd::exp::<S>(S::fma(S::load(s), S::splat(scale), S::splat(-lse)));
            S::store(s, p);
            S::store(dp, S::mul(S::mul(p, S::splat(scale)), S::sub(S::load(dp), S::splat(delta))));
        }
    }
    s[n_visible..].fill(0.0);
    dp[n_visible..].fill(0.0);
}
