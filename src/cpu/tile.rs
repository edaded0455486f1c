//! The tile that matrix products and attention are made of, and the packing of its operands.
//!
//! A tile is up to [`Simd::MR`] rows of A times [`Simd::NR`] columns of B, held in registers while k runs. B comes as a *panel*
//! `[k, NR]`, so that each step loads [`NV`] vectors, broadcasts one number per row, and multiplies all with all.

#![allow(clippy::needless_range_loop)] // lanes, rows and columns are indexed alike, and unrolled

use half::bf16;

use super::simd::{NV, Simd, Stored};

/// Runs `$body` with the constant `$M` equal to the height of the tile that covers `$rows` rows, at most [`Simd::MR`]: that, or half of it,
/// so that a last tile of few rows does not do the work of many. (Two heights, since each is code of its own.)
macro_rules! with_height {
    ($rows:expr, $S:ty, $M:ident => $body:expr) => {{
        macro_rules! at {
            ($height:literal) => {{
                const $M: usize = $height;
                $body
            }};
        }
        match $rows * 2 > <$S>::MR {
            true if <$S>::MR == 14 => at!(14),
            false if <$S>::MR == 14 => at!(7),
            true if <$S>::MR == 6 => at!(6),
            false if <$S>::MR == 6 => at!(3),
            true if <$S>::MR == 4 => at!(4),
            false if <$S>::MR == 4 => at!(2),
            _ => unreachable!("no tile is {} rows high", <$S>::MR),
        }
    }};
}
pub(crate) use with_height;

/// More rows than the highest tile has.
pub const MAX_ROWS: usize = 16;

/// The accumulators of a tile of `M` rows.
pub type Tile<S, const M: usize> = [[<S as Simd>::V; NV]; M];

/// A·B over `k` steps: row i of A has its numbers at `a + i·a_row + step·a_step`, B is a panel.
///
/// If not 0, `ahead` elements beyond those at work the numbers of the next tile are asked for: the processor's own prefetching comes late
/// for a panel that lies in the last cache.
///
/// With `DOT`, each f32 of A and B holds a pair of bf16 instead, and a step is two of k. Each element is one chain of fused
/// multiply-adds in the order of k: a row's result does not depend on which rows stand beside it.
///
/// # Safety
/// That of [`Simd`]; `a` and `b` reach as far as said.
#[inline(always)]
pub unsafe fn tile<S: Simd, const M: usize, const DOT: bool>(
    k: usize,
    a: *const f32,
    a_row: usize,
    a_step: usize,
    ahead: usize,
    b: *const f32,
) -> Tile<S, M> {
    // SAFETY: the caller's.
    unsafe {
        let mut acc = [[S::splat(0.0); NV]; M];
        for step in 0..k {
            let mut columns = [S::splat(0.0); NV];
            for v in 0..NV {
                columns[v] = S::load(b.add(step * S::NR + v * S::LANES));
            }
            if ahead > 0 {
                S::prefetch(a.wrapping_add(step * a_step + ahead).cast());
            }
            for i in 0..M {
                let x = S::splat(*a.add(i * a_row + step * a_step));
                for v in 0..NV {
                    acc[i][v] = if DOT { S::dot_bf16(x, columns[v], acc[i][v]) } else { S::fma(x, columns[v], acc[i][v]) };
                }
            }
        }
        acc
    }
}

/// Writes a tile to rows of `stride`, added to what is there if `add`.
///
/// # Safety
/// That of [`Simd`]; there is room.
#[inline(always)]
pub unsafe fn store_tile<S: Simd, const M: usize>(acc: &Tile<S, M>, to: *mut f32, stride: usize, add: bool) {
    for i in 0..M {
        for v in 0..NV {
            // SAFETY: the caller's.
            unsafe {
                let to = to.add(i * stride + v * S::LANES);
                S::store(to, if add { S::add(S::load(to), acc[i][v]) } else { acc[i][v] });
            }
        }
    }
}

/// panel\[step\]\[j\] = rows\[j\]\[step\], `[k, NR]`, zero for columns beyond the rows given: Wᵀ, or Kᵀ.
///
/// # Safety
/// That of [`Simd`]; each row has `k` elements, `panel` room for k·NR.
#[inline(always)]
pub unsafe fn pack_columns<S: Simd, E: Stored>(panel: *mut f32, rows: &[*const E], k: usize) {
    debug_assert!(rows.len() <= S::NR);
    for v in 0..NV {
        let rows = rows.get(v * S::LANES..).unwrap_or_default();
        // SAFETY: the caller's.
        unsafe { pack_lanes::<S, E>(panel.add(v * S::LANES), &rows[..rows.len().min(S::LANES)], k, S::NR) };
    }
}

/// panel\[step·stride + j\] = rows\[j\]\[step\] for up to LANES rows, zero for j beyond them.
///
/// A stride below LANES, but not below its half, is the width of the panel: what a vector writes beyond, the next one overwrites.
///
/// # Safety
/// That of [`Simd`]; each row has `k` elements, `panel` room for k·stride.
#[inline(always)]
pub unsafe fn pack_lanes<S: Simd, E: Stored>(panel: *mut f32, rows: &[*const E], k: usize, stride: usize) {
    debug_assert!(rows.len() <= S::LANES.min(stride) && 2 * stride >= S::LANES);
    // SAFETY: the caller's; `i` stays below the number of rows, `step + n` at most k.
    unsafe {
        for step in (0..k).step_by(S::LANES) {
            let n = S::LANES.min(k - step);
            let mut square = S::square();
            let lanes = square.as_mut();
            if n == S::LANES && rows.len() == S::LANES {
                for i in 0..S::LANES {
                    lanes[i] = E::load::<S>(rows[i].add(step));
                }
            } else {
                for i in 0..rows.len() {
                    let p = rows[i].add(step);
                    lanes[i] = if n == S::LANES { E::load::<S>(p) } else { E::load_part::<S>(p, n) };
                }
            }
            S::transpose(&mut square);
            for (i, &column) in square.as_mut().iter().enumerate().take(n) {
                let to = panel.add((step + i) * stride);
                if stride >= S::LANES || step + i + 1 < k { S::store(to, column) } else { S::store_part(to, column, stride) }
            }
        }
    }
}

/// As [`pack_columns`] for [`Simd::dot_bf16`]: panel\[step\]\[j\] is the pair rows\[j\]\[2·step ..\], the last one filled up with zero.
///
/// # Safety
/// That of [`Simd`]; each row has `k` elements, `panel` room for ⌈k/2⌉·NR.
#[inline(always)]
pub unsafe fn pack_column_pairs<S: Simd>(panel: *mut f32, rows: &[*const bf16], k: usize) {
    let mut pairs = [std::ptr::null::<f32>(); 2 * super::simd::MAX_LANES];
    for (pair, &row) in pairs.iter_mut().zip(rows) {
        *pair = row.cast();
    }
    // SAFETY: the caller's; k/2 pairs of bf16 take the bytes of k/2 f32, and vector loads need no alignment.
    unsafe {
        pack_columns::<S, f32>(panel, &pairs[..rows.len()], k / 2);
        if k % 2 == 1 {
            let last = panel.add(k / 2 * S::NR);
            for j in 0..S::NR {
                let bits = rows.get(j).map_or(0, |row| (*row.add(k - 1)).to_bits());
                *last.add(j) = f32::from_bits(u32::from(bits));
            }
        }
    }
}

/// panel\[step\]\[j\] = rows\[step\]\[j\] for j < `width`, `[k, NR]`, zero beyond: V.
///
/// # Safety
/// That of [`Simd`]; each row has `width` elements from its pointer on, `panel` room for rows.len()·NR.
#[inline(always)]
pub unsafe fn pack_rows<S: Simd, E: Stored>(panel: *mut f32, rows: &[*const E], offset: usize, width: usize) {
    // SAFETY: the caller's.
    unsafe {
        for (step, &row) in rows.iter().enumerate() {
            for v in 0..NV {
                let n = width.saturating_sub(v * S::LANES).min(S::LANES);
                let p = row.wrapping_add(offset + v * S::LANES);
                let x = match n {
                    0 => S::splat(0.0),
                    n if n == S::LANES => E::load::<S>(p),
                    n => E::load_part::<S>(p, n),
                };
                S::store(panel.add(step * S::NR + v * S::LANES), x);
            }
        }
    }
}
