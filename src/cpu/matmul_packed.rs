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

/// The most tokens of a tile: as many as leave sums in registers beside what they are made of. Of 32 registers, all `bits` vectors of a
/// block's rows have sums, of 16 two have.
const fn tile(lanes: usize, bits: usize) -> usize {
    match (lanes, bits) {
        (_, 4) => 5,
        (16, _) => 3,
        _ => 4,
    }
}
/// Tiles of tokens that a group of W meets before the next group comes.
const fn tiles_of_band(lanes: usize) -> usize {
    if lanes == 16 { 4 } else { 1 }
}
/// Bytes of W that stay in L2 while all tiles of tokens pass by; and what a task of few tiles reads, small enough to share out evenly.
const TASK_BYTES: usize = 256 << 10;
const STREAM_BYTES: usize = 128 << 10;
/// Blocks that are read at a time where tokens are few, and what is asked for ahead is a line of each in turn: a core has more lines under
/// way from four places than from one. (Two Zen 3 cores, one token, int4: 8 to 18 % faster than block after block.)
const STREAMS: usize = 4;
/// Tasks for each thread that are left, so that threads end together.
const TASKS: usize = 4;
/// How far ahead scales are asked for, in elements: some groups.
const SCALES_AHEAD: usize = 256;
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
fn tiles(tokens: usize, lanes: usize, bits: usize) -> Vec<(usize, usize)> {
    let n = tokens.div_ceil(tile(lanes, bits));
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
    let lanes = isa.run(LanesOf);
    let (tiles, n_groups) = (tiles(tokens, lanes, bits), k / group);
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
            let n_sums = at_once * tiles_of_band(lanes) * tile(lanes, bits) * n_sums(lanes, bits);
            with_scratch(n_sums, |sums| match bits {
                4 => isa.run(OfBits::<4> { task, sums }),
                _ => isa.run(OfBits::<8> { task, sums }),
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

/// f32 sums under way for a block and a token: where vectors have as many lanes as a block has rows one for each row, else as many as a
/// row has lanes.
const fn n_sums(lanes: usize, bits: usize) -> usize {
    if lanes == BLOCK_ROWS { BLOCK_ROWS } else { BLOCK_ROWS * bits }
}

/// Asks for the lanes of an instruction set.
struct LanesOf;

impl Kernel for LanesOf {
    type Output = usize;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> usize {
        S::LANES
    }
}

struct OfBits<'a, const BITS: usize> {
    task: Task<'a>,
    /// Room for sums.
    sums: &'a mut [f32],
}

impl<const BITS: usize> Kernel for OfBits<'_, BITS> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { task, sums } = self;
        for band in task.tiles.chunks(tiles_of_band(S::LANES)) {
            for block in (0..task.blocks.n).step_by(task.at_once) {
                let n_blocks = task.at_once.min(task.blocks.n - block);
                // SAFETY: the instructions are there, says the caller.
                unsafe { Turn { task: &task, band, block: task.blocks.first + block, n_blocks, sums }.run::<S, BITS>() };
            }
        }
    }
}

/// A few blocks of W, group by group in turn, and a band of tiles of tokens.
struct Turn<'a> {
    task: &'a Task<'a>,
    /// The first token and the tokens of each tile.
    band: &'a [(usize, usize)],
    /// The first block's number within the part, and how many there are.
    block: usize,
    n_blocks: usize,
    /// Of each block and tile in turn, [`n_sums`] for a token.
    sums: &'a mut [f32],
}

impl Turn<'_> {
    /// The product for a band of tiles, W in integers of `BITS`.
    ///
    /// # Safety
    /// That of [`Simd`].
    #[inline(always)]
    unsafe fn run<S: Simd, const BITS: usize>(&mut self) {
        let Task { x, w, .. } = *self.task;
        let (first, tokens) = (self.band[0].0, self.band.iter().map(|tile| tile.1).sum::<usize>());
        let n_blocks = self.n_blocks;
        let (n_slabs, n_groups, slabs_of_group) = (x.k / SLAB, x.k / x.group, x.group / SLAB);
        let slab_bytes = BLOCK_ROWS * 4 * BITS;
        let (group_bytes, block_bytes) = (slabs_of_group * slab_bytes, n_slabs * slab_bytes);
        // With each slab that is read as many lines are asked for as it has, from all blocks in turn: some of each.
        let share = slab_bytes / LINE / n_blocks;
        let mut places = [0; MAX_SLAB_LINES];
        for (i, place) in places.iter_mut().enumerate() {
            *place = i % n_blocks * block_bytes + i / n_blocks * LINE;
        }
        let places = &places[..slab_bytes / LINE];
        let bytes = bytemuck::cast_slice::<i32, u8>(w.words.as_slice());
        let bytes = &bytes[self.block * block_bytes..][..n_blocks * block_bytes];
        let n_scales = n_groups * BLOCK_ROWS;
        // Blocks whose sums are in registers at once. Their lines come in turn by themselves then, and the processor's own prefetching does
        // better. (Two Zen 4 cores, int4: 82 % of the read bandwidth with prefetches, 90 % so.)
        let together = if S::LANES == 16 && BITS == 4 && tokens == 1 && n_blocks == STREAMS { STREAMS } else { 1 };
        let places = if together == 1 { places } else { &[] };
        let scales = w.scales.as_slice::<f16>()[self.block * n_scales..][..n_blocks * n_scales].as_ptr();
        let sums_of_token = n_sums(S::LANES, BITS);
        let sums = &mut self.sums[..n_blocks * tokens * sums_of_token];
        sums.fill(0.0);
        for g in 0..n_groups {
            for b in (0..n_blocks).step_by(together) {
                // While this group is read, those come that are next: of each block the one after, or the first of the blocks that
                // follow. Each block of a turn asks for its share of their lines.
                let ahead = bytes.as_ptr().wrapping_add(if g + 1 < n_groups { (g + 1) * group_bytes } else { bytes.len() });
                let ahead = ahead.wrapping_add(b * slabs_of_group * share * LINE);
                for (i, &(token, n)) in self.band.iter().enumerate() {
                    let p = x.p[token * x.k + g * x.group * n..][..x.group * n].as_ptr();
                    let x_scales = x.scales[token * n_groups + g * n..][..n].as_ptr();
                    let sums = sums[(b * tokens + token - first) * sums_of_token..][..n * sums_of_token].as_mut_ptr();
                    // SAFETY: blocks and groups are inside W, and there are as many scales; the slices are those of the tile, or of the only
                    // token and all blocks.
                    unsafe {
                        let scales = scales.add((b * n_groups + g) * BLOCK_ROWS);
                        let w = bytes.as_ptr().add(b * block_bytes + g * group_bytes);
                        let places = if i == 0 { places } else { &[] };
                        let n_slabs = slabs_of_group;
                        let group = Group { w, block_bytes, scales, n_scales, p, x_scales, sums, n_slabs, ahead, places, share };
                        match (n, S::LANES) {
                            (1, 16) if together > 1 => group.add_rows::<S, BITS, STREAMS, 1>(),
                            (1, 16) => group.add_rows::<S, BITS, 1, 1>(),
                            (2, 16) => group.add_rows::<S, BITS, 1, 2>(),
                            (3, 16) => group.add_rows::<S, BITS, 1, 3>(),
                            (4, 16) => group.add_rows::<S, BITS, 1, 4>(),
                            (_, 16) => group.add_rows::<S, BITS, 1, 5>(),
                            (1, _) => group.add_lanes::<S, BITS, 8, 1>(),
                            (2, _) => group.add_lanes::<S, BITS, 4, 2>(),
                            (3, _) => group.add_lanes::<S, BITS, 2, 3>(),
                            (4, _) => group.add_lanes::<S, BITS, 2, 4>(),
                            _ => group.add_lanes::<S, BITS, 2, 5>(),
                        }
                    }
                }
            }
        }
        for b in 0..n_blocks {
            for &(token, n) in self.band {
                let at = (b * tokens + token - first) * sums_of_token;
                // SAFETY: the sums are made.
                unsafe { self.finish::<S, BITS>(b, token, n, &self.sums[at..][..n * sums_of_token]) };
            }
        }
    }

    /// Adds the offsets to the sums of a tile that begins with token `first` and block number `b` of the turn, and hands the result on.
    ///
    /// # Safety
    /// That of [`Self::run`].
    #[inline(always)]
    unsafe fn finish<S: Simd, const BITS: usize>(&self, b: usize, first: usize, n_tokens: usize, sums: &[f32]) {
        let Task { out, x, w, blocks, .. } = *self.task;
        let n_groups = x.k / x.group;
        // Without offsets of its own, w[r, i] = s·(q − zero).
        let zero = if BITS == 8 && !S::DOT8_UNSIGNED { 0 } else { w.format().zero() };
        let (offsets, factor) = w.offsets.as_ref().map_or((&w.scales, -zero as f32), |offsets| (offsets, 1.0));
        let offsets = &offsets.as_slice::<f16>()[(self.block + b) * n_groups * BLOCK_ROWS..][..n_groups * BLOCK_ROWS];
        let x_sums = &x.sums[first * n_groups..][..n_tokens * n_groups];
        let first_row = (self.block + b) * BLOCK_ROWS;
        let n_rows = BLOCK_ROWS.min(w.n - first_row);
        let first_col = blocks.col + first_row - blocks.first * BLOCK_ROWS;
        let lanes_of_row = n_sums(S::LANES, BITS) / BLOCK_ROWS;
        // A few tokens at a time, so that their chains of multiply-adds overlap; the last few may take some twice.
        const CHAINS: usize = 4;
        for t in (0..n_tokens).step_by(CHAINS) {
            let tokens: [_; CHAINS] = std::array::from_fn(|i| (t + i).min(n_tokens - 1));
            let mut rows = [[0.0; BLOCK_ROWS]; CHAINS];
            for i in 0..CHAINS {
                for (row, sum) in rows[i].iter_mut().enumerate() {
                    // Where a row has several lanes, each vector of a token stands among those of the tile's other tokens.
                    let (vector, lane) = (row * lanes_of_row / S::LANES, row * lanes_of_row % S::LANES);
                    *sum = sums[(vector * n_tokens + tokens[i]) * S::LANES + lane..][..lanes_of_row].iter().sum();
                }
            }
            for j in (0..n_rows).step_by(S::LANES) {
                // SAFETY: groups are inside offsets and sums, whose sizes were just checked; rows of y are those of the tile, columns those
                // of this task alone.
                unsafe {
                    let mut acc = [S::splat(0.0); CHAINS];
                    for i in 0..CHAINS {
                        acc[i] = S::load(rows[i].as_ptr().add(j));
                    }
                    for g in 0..n_groups {
                        let offset = f16::load::<S>(offsets.as_ptr().add(g * BLOCK_ROWS + j));
                        for i in 0..CHAINS {
                            acc[i] = S::fma(offset, S::splat(factor * x_sums.get_unchecked(g * n_tokens + tokens[i])), acc[i]);
                        }
                    }
                    for i in 0..CHAINS.min(n_tokens - t) {
                        out.finish::<S>(first + tokens[i], first_col + j, S::LANES.min(n_rows - j), acc[i]);
                    }
                }
            }
        }
    }
}

/// One group of a block's columns, and a tile of tokens.
#[derive(Clone, Copy)]
struct Group<'a> {
    /// `[slabs][BLOCK_ROWS][4·bits]` bytes of W
    w: *const u8,
    /// How far the next block is.
    block_bytes: usize,
    /// `[BLOCK_ROWS]`
    scales: *const f16,
    /// How far those of the next block are.
    n_scales: usize,
    /// `[slabs][tokens][SLAB]`
    p: *const i8,
    /// `[tokens]`
    x_scales: *const f32,
    /// Where the products are added.
    sums: *mut f32,
    n_slabs: usize,
    /// What is asked for while slab i is read: the lines at `places` from here on and i times `share` lines.
    ahead: *const u8,
    places: &'a [usize],
    share: usize,
}

impl Group<'_> {
    /// # Safety
    /// That of [`Simd`].
    #[inline(always)]
    unsafe fn prefetch<S: Simd>(&self, slab: usize) {
        for place in self.places {
            // SAFETY: the caller's.
            unsafe { S::prefetch(self.ahead.wrapping_add(slab * self.share * LINE + place)) };
        }
    }

    /// sums\[b\]\[t\]\[row\] += s·a·Σ q·p for `T` tokens and `B` blocks, where the vectors of a block have as many lanes as it has rows: `BITS`
    /// vectors, whose sums are in registers all at once and are added up, row by row, before they are multiplied.
    ///
    /// # Safety
    /// That of [`Simd`]; pointers reach as far as said, `sums` is `[B][T][BLOCK_ROWS]`.
    #[inline(always)]
    unsafe fn add_rows<S: Simd, const BITS: usize, const B: usize, const T: usize>(self) {
        // SAFETY: the caller's.
        unsafe {
            let mut sums4 = [[[S::zero4(); BITS]; T]; B];
            let mut sums8 = [[[S::zero8(); BITS]; T]; B];
            for slab in 0..self.n_slabs {
                let p = self.p.add(slab * T * SLAB);
                self.prefetch::<S>(slab);
                for b in 0..B {
                    let w = self.w.add(b * self.block_bytes + slab * BITS * 4 * S::LANES);
                    if BITS == 4 {
                        let mut q = [S::load_bytes(w); BITS];
                        for half in 0..2 {
                            for r in 0..BITS {
                                let both = S::load_bytes(w.add(r * 4 * S::LANES));
                                q[r] = if half == 0 { S::low4(both) } else { S::high4(both) };
                            }
                            for t in 0..T {
                                let x = S::repeat_bytes::<16>(p.add(t * SLAB + half * SLAB / 2));
                                for r in 0..BITS {
                                    sums4[b][t][r] = S::dot4(sums4[b][t][r], q[r], x);
                                }
                            }
                        }
                    } else {
                        let mut x = [S::repeat_bytes::<32>(p); T];
                        for t in 1..T {
                            x[t] = S::repeat_bytes::<32>(p.add(t * SLAB));
                        }
                        for r in 0..BITS {
                            let q = S::load_bytes(w.add(r * 4 * S::LANES));
                            for t in 0..T {
                                sums8[b][t][r] = S::dot8(sums8[b][t][r], q, x[t]);
                            }
                        }
                    }
                }
            }
            for b in 0..B {
                let scales = self.scales.add(b * self.n_scales);
                S::prefetch(scales.wrapping_add(SCALES_AHEAD).cast());
                let scale = f16::load::<S>(scales);
                for t in 0..T {
                    let sum = if BITS == 4 { S::rows4(&sums4[b][t]) } else { S::rows8(&sums8[b][t]) };
                    let acc = self.sums.add((b * T + t) * BLOCK_ROWS);
                    S::store(acc, S::fma(sum, S::mul(scale, S::splat(*self.x_scales.add(t))), S::load(acc)));
                }
            }
        }
    }

    /// sums\[vector\]\[t\]\[lane\] += s·a·Σ q·p for `T` tokens, where `BITS` lanes have partial sums of one row: `R` vectors at a time.
    ///
    /// # Safety
    /// That of [`Simd`]; pointers reach as far as said, `sums` is `[BLOCK_ROWS·BITS / LANES][T][LANES]`.
    #[inline(always)]
    unsafe fn add_lanes<S: Simd, const BITS: usize, const R: usize, const T: usize>(self) {
        let n_vectors = BLOCK_ROWS * BITS / S::LANES;
        let rows_of_vector = S::LANES / BITS;
        assert!(n_vectors.is_multiple_of(R), "{R} vectors of {n_vectors} at a time");
        // SAFETY: the caller's.
        unsafe {
            let mut scales_of = [0.0; BLOCK_ROWS];
            S::prefetch(self.scales.wrapping_add(SCALES_AHEAD).cast());
            for i in (0..BLOCK_ROWS).step_by(S::LANES) {
                S::store(scales_of.as_mut_ptr().add(i), f16::load::<S>(self.scales.add(i)));
            }
            for vector in (0..n_vectors).step_by(R) {
                let mut sums4 = [[S::zero4(); T]; R];
                let mut sums8 = [[S::zero8(); T]; R];
                for slab in 0..self.n_slabs {
                    let w = self.w.add((slab * n_vectors + vector) * 4 * S::LANES);
                    let p = self.p.add(slab * T * SLAB);
                    if vector == 0 {
                        self.prefetch::<S>(slab);
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
                    let scales = scales_of.as_ptr().add((vector + r) * rows_of_vector);
                    let scale = if BITS == 4 { S::spread::<4>(scales) } else { S::spread::<8>(scales) };
                    for t in 0..T {
                        let sum = if BITS == 4 { S::sums4(sums4[r][t]) } else { S::sums8(sums8[r][t]) };
                        let acc = self.sums.add(((vector + r) * T + t) * S::LANES);
                        let scale = S::mul(scale, S::splat(*self.x_scales.add(t)));
                        S::store(acc, S::fma(sum, scale, S::load(acc)));
                    }
                }
            }
        }
    }
}
