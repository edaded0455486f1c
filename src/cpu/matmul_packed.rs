//! The linear layer with packed integer weights (`src/ops/packed.rs`): y = epilogue(x·Wᵀ + bias).
//!
//! Each group of x (as many columns as share a scale of W) is rounded to 8 bits with a scale of its own, and dot products are sums of
//! integers, exact within a group:
//!
//! ```text
//! y[t, r] = Σ_g s[r, g]·a[t, g]·Σ_{i in g} q[r, i]·p[t, i]  +  Σ_g o[r, g]·a[t, g]·Σ_{i in g} p[t, i]
//! w[r, i] = s[r, g]·q[r, i] + o[r, g],   x[t, i] ≈ a[t, g]·p[t, i],   |p| ≤ 127
//! ```
//!
//! Tokens are taken in tiles of a few, rows of W in blocks of 16, which stream from memory once: a task has as many blocks as stay in L2
//! while all tiles of tokens pass by. Integers are unpacked in registers, once for a tile. Where tokens are few, memory is the limit: a few
//! blocks are read at a time, a group of each in turn.
//!
//! Numerics: a result depends on its row of x and of W alone, bit for bit, however many tokens there are and however many threads.

#![allow(clippy::needless_range_loop)] // lanes, rows and columns are indexed alike, and unrolled

use half::f16;

use super::matmul::{Output, SKINNY};
use super::pool::{Disjoint, Pool};
use super::scratch::{carve, padded, with_scratch};
use super::simd::{Isa, Kernel, LINE, Simd, Stored};
use crate::ops::Packed;
use crate::ops::packed::{BLOCK_ROWS, SLAB};

/// The most tokens of a tile: with two vectors of rows, as many sums as stay in 16 registers beside what they are made of.
const fn tile(bits: usize) -> usize {
    if bits == 4 { 5 } else { 4 }
}
/// Bytes of W that stay in L2 while all tiles of tokens pass by; and what a task of few tiles reads, small enough to share out evenly.
const TASK_BYTES: usize = 256 << 10;
const STREAM_BYTES: usize = 128 << 10;
/// Blocks that are read at a time where tokens are few, and what is asked for ahead is a line of each in turn: a core has more lines under
/// way from four places than from one. (Two Zen 3 cores, one token, int4: 8 to 18 % faster than block after block.)
const STREAMS: usize = 4;
/// Tasks for each thread that are left, so that threads end together.
const TASKS: usize = 4;
/// Lines of the largest slab.
const MAX_SLAB_LINES: usize = BLOCK_ROWS * SLAB / LINE;
/// The largest |p|.
const LIMIT: f32 = 127.0;

/// x in 8 bits, tile by tile.
struct X<'a> {
    /// `[tiles][k / SLAB][tokens of the tile][SLAB]`
    p: &'a [i8],
    /// a: `[tiles][k / group][tokens of the tile]`
    scales: &'a [f32],
    /// a·Σp, as `scales`
    sums: &'a [f32],
    k: usize,
    group: usize,
}

/// The first token of each tile, and its tokens: at most [`tile`], shared out evenly, so that no tile is left with few.
fn tiles(tokens: usize, bits: usize) -> Vec<(usize, usize)> {
    let n = tokens.div_ceil(tile(bits));
    (0..n).map(|i| (i * tokens / n, (i + 1) * tokens / n - i * tokens / n)).collect()
}

/// Rows of W that a task computes.
#[derive(Clone, Copy)]
struct Blocks {
    part: usize,
    /// Its first block within the part, and how many there are.
    first: usize,
    n: usize,
    /// Its first row, counted over all parts.
    col: usize,
}

/// The product of x `[tokens, k]` and `parts` `[n_i, k]`, all of one format.
///
/// # Panics
/// If an operand is too small for these shapes.
pub(super) fn linear(isa: Isa, pool: &Pool, out: Output<'_>, x: &[f32], tokens: usize, parts: &[&Packed]) {
    let (k, group, bits) = (parts[0].k, parts[0].group, parts[0].bits);
    let n: usize = parts.iter().map(|part| part.n).sum();
    if tokens == 0 || n == 0 {
        return;
    }
    // Kernels rely on these.
    assert!(k > 0 && x.len() >= tokens * k, "x has {} elements, not {tokens} rows of {k}", x.len());
    out.expect(tokens, n);
    let (tiles, n_groups) = (tiles(tokens, bits), k / group);
    let n_scales = tokens * n_groups;
    with_scratch(padded(tokens * k / 4) + 2 * padded(n_scales), |mut rest| {
        let (p, scales, sums) = (carve(&mut rest, tokens * k / 4), carve(&mut rest, n_scales), carve(&mut rest, n_scales));
        {
            let p = Disjoint::new(bytemuck::cast_slice_mut(p));
            let (scales, sums) = (Disjoint::new(scales), Disjoint::new(sums));
            pool.run(tiles.len(), &|i| {
                let (first, n) = tiles[i];
                // SAFETY: tiles do not overlap, and each task has its own.
                let (p, scales, sums) = unsafe {
                    (
                        p.slice(first * k, n * k),
                        scales.slice(first * n_groups, n * n_groups),
                        sums.slice(first * n_groups, n * n_groups),
                    )
                };
                isa.run(PackX { x: &x[first * k..(first + n) * k], n, k, group, p, scales, sums });
            });
        }
        let x = X { p: bytemuck::cast_slice(p), scales, sums, k, group };
        let block_bytes = BLOCK_ROWS * k * bits / 8;
        let streams = (n.div_ceil(BLOCK_ROWS) / (TASKS * pool.n_threads())).clamp(1, STREAMS);
        let (task_bytes, at_once) = if tokens <= SKINNY { (STREAM_BYTES, streams) } else { (TASK_BYTES, 1) };
        let n_blocks = (task_bytes / block_bytes).max(at_once);
        let mut tasks = Vec::new();
        let mut col = 0;
        for (part, packed) in parts.iter().enumerate() {
            let all = packed.n.div_ceil(BLOCK_ROWS);
            let of = |first| Blocks { part, first, n: n_blocks.min(all - first), col: col + first * BLOCK_ROWS };
            tasks.extend((0..all).step_by(n_blocks).map(of));
            col += packed.n;
        }
        pool.run(tasks.len(), &|i| {
            let task = Task { out: &out, x: &x, tiles: &tiles, w: parts[tasks[i].part], blocks: tasks[i], at_once };
            let n_scales = padded(tasks[i].n * n_groups * BLOCK_ROWS);
            with_scratch(2 * n_scales + at_once * n_sums(bits), |scratch| match bits {
                4 => isa.run(OfBits::<4> { task, scratch }),
                _ => isa.run(OfBits::<8> { task, scratch }),
            });
        });
    });
}

/// Rounds a tile of x.
struct PackX<'a> {
    /// `[n, k]`
    x: &'a [f32],
    n: usize,
    k: usize,
    group: usize,
    p: &'a mut [i8],
    scales: &'a mut [f32],
    sums: &'a mut [f32],
}

impl Kernel for PackX<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { x, n, k, group, p, scales, sums } = self;
        for (t, row) in x.chunks_exact(k).enumerate() {
            for (g, x) in row.chunks_exact(group).enumerate() {
                // As bits, which order magnitudes and put NaN on top.
                let mut largest = 0;
                for v in x {
                    largest = largest.max(v.to_bits() & 0x7fff_ffff);
                }
                let scale = f32::from_bits(largest) / LIMIT;
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                let mut sum = 0;
                for (s, x) in x.chunks_exact(SLAB).enumerate() {
                    let to = &mut p[((g * group / SLAB + s) * n + t) * SLAB..][..SLAB];
                    for i in 0..SLAB {
                        // 1.5·2²³ leaves no bits for fractions: the low byte is the nearest integer.
                        to[i] = (x[i] * inverse + 12_582_912.0).to_bits() as i8;
                    }
                    for i in 0..SLAB {
                        sum += i32::from(to[i]);
                    }
                }
                scales[g * n + t] = scale;
                sums[g * n + t] = scale * sum as f32;
            }
        }
    }
}

/// Some blocks of W times all tokens.
#[derive(Clone, Copy)]
struct Task<'a> {
    out: &'a Output<'a>,
    x: &'a X<'a>,
    tiles: &'a [(usize, usize)],
    w: &'a Packed,
    blocks: Blocks,
    /// Blocks that are read at a time.
    at_once: usize,
}

/// f32 sums under way for a block and a tile: of each row and token, as many as a row has lanes.
const fn n_sums(bits: usize) -> usize {
    BLOCK_ROWS * bits * tile(bits)
}

struct OfBits<'a, const BITS: usize> {
    task: Task<'a>,
    /// Room for scales, offsets, and sums.
    scratch: &'a mut [f32],
}

impl<const BITS: usize> Kernel for OfBits<'_, BITS> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { task, scratch: mut rest } = self;
        let Task { x, tiles, w, blocks, at_once, .. } = task;
        let n_scales = x.k / x.group * BLOCK_ROWS;
        // Scales, and what Σ a·Σp is to be multiplied by, of each block.
        let at = blocks.first * n_scales..(blocks.first + blocks.n) * n_scales;
        let (scales, offsets) = (carve(&mut rest, at.len()), carve(&mut rest, at.len()));
        let zero = if BITS == 8 && !S::DOT8_UNSIGNED { 0.0 } else { -(w.format().zero() as f32) };
        // SAFETY: the instructions are there, says the caller; the slices have these elements, a multiple of 16.
        unsafe {
            widen::<S>(scales, &w.scales.as_slice::<f16>()[at.clone()], 1.0);
            match &w.offsets {
                Some(offsets_of) => widen::<S>(offsets, &offsets_of.as_slice::<f16>()[at], 1.0),
                None => widen::<S>(offsets, &w.scales.as_slice::<f16>()[at], zero),
            }
            for &(first, n) in tiles {
                for block in (0..blocks.n).step_by(at_once) {
                    let n_blocks = at_once.min(blocks.n - block);
                    let of_blocks = block * n_scales..(block + n_blocks) * n_scales;
                    let (scales, offsets) = (&scales[of_blocks.clone()], &offsets[of_blocks]);
                    let mut blocks = Turn { task: &task, first, block, n_blocks, scales, offsets, sums: rest };
                    match n {
                        1 if BLOCK_ROWS * BITS < 8 * S::LANES => blocks.run::<S, BITS, 4, 1>(),
                        1 => blocks.run::<S, BITS, 8, 1>(),
                        2 => blocks.run::<S, BITS, 4, 2>(),
                        3 => blocks.run::<S, BITS, 2, 3>(),
                        4 => blocks.run::<S, BITS, 2, 4>(),
                        _ => blocks.run::<S, BITS, 2, 5>(),
                    }
                }
            }
        }
    }
}

/// to\[i\] = from\[i\]·factor
///
/// # Safety
/// That of [`Simd`]; both have as many elements, a multiple of 16.
#[inline(always)]
unsafe fn widen<S: Simd>(to: &mut [f32], from: &[f16], factor: f32) {
    for i in (0..to.len()).step_by(S::LANES) {
        // SAFETY: the caller's.
        unsafe { S::store(to.as_mut_ptr().add(i), S::mul(f16::load::<S>(from.as_ptr().add(i)), S::splat(factor))) };
    }
}

/// A few blocks of W, group by group in turn, and a tile of tokens.
struct Turn<'a> {
    task: &'a Task<'a>,
    /// The first token.
    first: usize,
    /// The first block's number within the task, and how many there are.
    block: usize,
    n_blocks: usize,
    /// `[blocks][k / group][BLOCK_ROWS]`
    scales: &'a [f32],
    /// As `scales`.
    offsets: &'a [f32],
    /// `[blocks][vectors][tokens][LANES]`
    sums: &'a mut [f32],
}

impl Turn<'_> {
    /// The product for a tile of `T` tokens, `R` vectors of W at a time.
    ///
    /// # Safety
    /// That of [`Simd`]; the tile has `T` tokens, W integers of `BITS`.
    #[inline(always)]
    unsafe fn run<S: Simd, const BITS: usize, const R: usize, const T: usize>(&mut self) {
        let Task { x, w, blocks, .. } = *self.task;
        let n_blocks = self.n_blocks;
        let (n_slabs, n_groups, slabs_of_group) = (x.k / SLAB, x.k / x.group, x.group / SLAB);
        // A slab's 16 rows of 4·BITS bytes in vectors of 4·LANES: BITS lanes have partial sums of one row.
        let slab_bytes = BLOCK_ROWS * 4 * BITS;
        let n_vectors = BLOCK_ROWS * BITS / S::LANES;
        let rows_of_vector = S::LANES / BITS;
        assert!(n_vectors.is_multiple_of(R), "{R} vectors of {n_vectors} at a time");
        let (group_bytes, block_bytes) = (slabs_of_group * slab_bytes, n_slabs * slab_bytes);
        // With each slab that is read as many lines are asked for as it has, from all blocks in turn: some of each.
        let share = slab_bytes / LINE / n_blocks;
        let mut places = [0; MAX_SLAB_LINES];
        for (i, place) in places.iter_mut().enumerate() {
            *place = i % n_blocks * block_bytes + i / n_blocks * LINE;
        }
        let bytes = bytemuck::cast_slice::<i32, u8>(w.words.as_slice());
        let bytes = &bytes[(blocks.first + self.block) * block_bytes..][..n_blocks * block_bytes];
        let p = x.p[self.first * x.k..][..T * x.k].as_ptr();
        let x_scales = x.scales[self.first * n_groups..][..T * n_groups].as_ptr();
        let scales = self.scales[..n_blocks * n_groups * BLOCK_ROWS].as_ptr();
        let sums = &mut self.sums[..n_blocks * n_vectors * T * S::LANES];
        sums.fill(0.0);
        // SAFETY: blocks, groups and slabs are inside W, the tile, their scales and the sums, whose sizes were just checked.
        unsafe {
            for g in 0..n_groups {
                for b in 0..n_blocks {
                    let scales = scales.add((b * n_groups + g) * BLOCK_ROWS);
                    let sums = sums.as_mut_ptr().add(b * n_vectors * T * S::LANES);
                    let w = bytes.as_ptr().add(b * block_bytes + g * group_bytes);
                    let p = p.add(g * slabs_of_group * T * SLAB);
                    // While this group is read, those come that are next: of each block the one after, or the first of the blocks that
                    // follow. Each block of a turn asks for its share of their lines.
                    let ahead = bytes.as_ptr().wrapping_add(if g + 1 < n_groups { (g + 1) * group_bytes } else { bytes.len() });
                    let ahead = ahead.wrapping_add(b * slabs_of_group * share * LINE);
                    for vector in (0..n_vectors).step_by(R) {
                        let mut sums4 = [[S::zero4(); T]; R];
                        let mut sums8 = [[S::zero8(); T]; R];
                        for slab in 0..slabs_of_group {
                            let w = w.add(slab * slab_bytes + vector * 4 * S::LANES);
                            let p = p.add(slab * T * SLAB);
                            if vector == 0 {
                                for place in &places[..slab_bytes / LINE] {
                                    S::prefetch(ahead.wrapping_add(slab * share * LINE + place));
                                }
                            }
                            let mut q = [S::load_bytes(w); R];
                            if BITS == 4 {
                                // One half of the bytes after the other: no more of them than there are registers for beside the sums.
                                for half in 0..2 {
                                    for r in 0..R {
                                        let both = S::load_bytes(w.add(r * 4 * S::LANES));
                                        q[r] = if half == 0 { S::low4(both) } else { S::high4(both) };
                                    }
                                    for t in 0..T {
                                        let x = S::repeat_bytes::<16>(p.add(t * SLAB + half * SLAB / 2));
                                        for r in 0..R {
                                            sums4[r][t] = S::dot4(sums4[r][t], q[r], x);
                                        }
                                    }
                                }
                            } else {
                                for r in 0..R {
                                    q[r] = S::load_bytes(w.add(r * 4 * S::LANES));
                                }
                                for t in 0..T {
                                    let x = S::repeat_bytes::<32>(p.add(t * SLAB));
                                    for r in 0..R {
                                        sums8[r][t] = S::dot8(sums8[r][t], q[r], x);
                                    }
                                }
                            }
                        }
                        for r in 0..R {
                            let scales = scales.add((vector + r) * rows_of_vector);
                            let scale = if BITS == 4 { S::spread::<4>(scales) } else { S::spread::<8>(scales) };
                            for t in 0..T {
                                let sum = if BITS == 4 { S::sums4(sums4[r][t]) } else { S::sums8(sums8[r][t]) };
                                let acc = sums.add(((vector + r) * T + t) * S::LANES);
                                let scale = S::mul(scale, S::splat(*x_scales.add(g * T + t)));
                                S::store(acc, S::fma(sum, scale, S::load(acc)));
                            }
                        }
                    }
                }
            }
            for b in 0..n_blocks {
                self.finish::<S, BITS, T>(b);
            }
        }
    }

    /// Adds up the lanes of each row of a block, adds the offsets, and hands the result on.
    ///
    /// # Safety
    /// That of [`Self::run`], which has made the sums.
    #[inline(always)]
    unsafe fn finish<S: Simd, const BITS: usize, const T: usize>(&self, b: usize) {
        let Task { out, x, w, blocks, .. } = *self.task;
        let n_groups = x.k / x.group;
        let sums = &self.sums[b * BLOCK_ROWS * BITS * T..][..BLOCK_ROWS * BITS * T];
        let mut rows = [[0.0; BLOCK_ROWS]; T];
        for (vector, sums) in sums.chunks_exact(T * S::LANES).enumerate() {
            for (t, lanes) in sums.chunks_exact(S::LANES).enumerate() {
                for (row, lanes) in lanes.chunks_exact(BITS).enumerate() {
                    rows[t][vector * (S::LANES / BITS) + row] = lanes.iter().sum();
                }
            }
        }
        let offsets = self.offsets[b * n_groups * BLOCK_ROWS..][..n_groups * BLOCK_ROWS].as_ptr();
        let x_sums = x.sums[self.first * n_groups..][..T * n_groups].as_ptr();
        let first_row = (self.block + b) * BLOCK_ROWS;
        let n_rows = BLOCK_ROWS.min(w.n - blocks.first * BLOCK_ROWS - first_row);
        // SAFETY: groups are inside offsets and sums, whose sizes were just checked; rows of y are those of the tile, columns those of
        // this task alone.
        unsafe {
            for j in (0..n_rows).step_by(S::LANES) {
                let mut acc = [S::splat(0.0); T];
                for t in 0..T {
                    acc[t] = S::load(rows[t].as_ptr().add(j));
                }
                for g in 0..n_groups {
                    let offset = S::load(offsets.add(g * BLOCK_ROWS + j));
                    for t in 0..T {
                        acc[t] = S::fma(offset, S::splat(*x_sums.add(g * T + t)), acc[t]);
                    }
                }
                for t in 0..T {
                    out.finish::<S>(self.first + t, blocks.col + first_row + j, S::LANES.min(n_rows - j), acc[t]);
                }
            }
        }
    }
}
