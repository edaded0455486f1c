//! What this machine can do: the peaks that benchmarks are measured against.
//!
//! Each is the best of several short runs with all threads of the pool, since other programs only ever make it slower.

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::pool::Pool;
use super::simd::{Isa, Kernel, Simd};

/// Runs of which the best counts.
const RUNS: usize = 5;
/// Accumulators of the arithmetic probes: more than latency times throughput (4·2), fewer than registers (16).
const CHAINS: usize = 12;
/// Elements of a reading task.
const READ_TASK: usize = 1 << 18;
/// Places that a thread reads from at a time: its core follows each and asks for what comes next, which keeps more lines under way than
/// one stream does. (Two Zen 3 cores: 23 to 27 GB/s by one, 37 to 41 by four.)
const STREAMS: usize = 4;
/// Vectors read from one stream before the next one's turn.
const LINE: usize = 2;
/// Steps of an arithmetic task; a few milliseconds.
const STEPS: usize = 1 << 20;

/// GB/s of reading, by all threads, of a buffer of `bytes`, which should be far larger than the last cache.
pub fn read_gbps(pool: &Pool, bytes: usize) -> f64 {
    let buffer = vec![1.0; bytes / 4];
    best(|| read_once(pool, &buffer))
}

/// f32 GFLOP/s of fused multiply-adds in registers, by all threads.
pub fn fma_gflops(isa: Isa, pool: &Pool) -> f64 {
    best(|| fma_once(isa, pool))
}

/// GFLOP/s of bf16 dot products in registers, by all threads; none if the instruction set has none.
pub fn dpbf16_gflops(isa: Isa, pool: &Pool) -> Option<f64> {
    (isa == Isa::Avx512Bf16).then(|| best(|| dpbf16_once(isa, pool)))
}

/// GFLOP/s (billions of multiplications and additions) of the dot products of bytes that 4-bit weights take, in registers, by all threads.
pub fn int8_gflops(isa: Isa, pool: &Pool) -> f64 {
    best(|| int8_once(isa, pool))
}

/// Reads a buffer once, with all threads. Returns the bytes.
pub fn read_once(pool: &Pool, buffer: &[f32]) -> f64 {
    let isa = Isa::detect();
    pool.run(buffer.len() / READ_TASK, &|i| {
        black_box(isa.run(Sum(&buffer[i * READ_TASK..][..READ_TASK])));
    });
    (buffer.len() / READ_TASK * READ_TASK * 4) as f64
}

/// Keeps all threads busy with fused multiply-adds for some milliseconds. Returns the operations, two for each.
pub fn fma_once(isa: Isa, pool: &Pool) -> f64 {
    arithmetic(isa, pool, Multiply::<FMA>) * 2.0
}

/// As [`fma_once`], with bf16 dot products, which `isa` must have.
pub fn dpbf16_once(isa: Isa, pool: &Pool) -> f64 {
    arithmetic(isa, pool, Multiply::<DOT_BF16>) * 4.0
}

/// As [`fma_once`], with dot products of bytes.
pub fn int8_once(isa: Isa, pool: &Pool) -> f64 {
    arithmetic(isa, pool, Multiply::<DOT_BYTES>) * 8.0
}

/// Runs one instruction on all threads, and returns how many lanes went through it.
fn arithmetic<const WHAT: u8>(isa: Isa, pool: &Pool, instruction: Multiply<WHAT>) -> f64 {
    let lanes = AtomicUsize::new(0);
    let n_tasks = pool.n_threads() * 4;
    pool.run(n_tasks, &|_| lanes.store(isa.run(instruction), Ordering::Relaxed));
    (n_tasks * STEPS * CHAINS * lanes.into_inner()) as f64
}

/// The highest rate, in billions a second, of some runs after one to warm up.
fn best(run: impl Fn() -> f64) -> f64 {
    run();
    let rate = || {
        let start = Instant::now();
        run() / start.elapsed().as_secs_f64() / 1e9
    };
    (0..RUNS).map(|_| rate()).fold(0.0, f64::max)
}

/// Reads a slice.
struct Sum<'a>(&'a [f32]);

impl Kernel for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        let quarter = self.0.len() / STREAMS;
        let p = self.0.as_ptr();
        // SAFETY: vectors end within the slice: a quarter of it is a multiple of LINE·LANES.
        unsafe {
            let mut acc = [S::splat(0.0); STREAMS * LINE];
            for i in (0..quarter).step_by(LINE * S::LANES) {
                for (j, acc) in acc.iter_mut().enumerate() {
                    *acc = S::add(*acc, S::load(p.add(j / LINE * quarter + i + j % LINE * S::LANES)));
                }
            }
            for i in 1..STREAMS * LINE {
                acc[0] = S::add(acc[0], acc[i]);
            }
            S::reduce_add(acc[0])
        }
    }
}

/// Runs one instruction in [`CHAINS`] independent chains and returns its lanes.
#[derive(Clone, Copy)]
struct Multiply<const WHAT: u8>;

const FMA: u8 = 0;
const DOT_BF16: u8 = 1;
const DOT_BYTES: u8 = 2;

impl<const WHAT: u8> Kernel for Multiply<WHAT> {
    type Output = usize;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> usize {
        // SAFETY: the caller's.
        unsafe {
            if WHAT == DOT_BYTES {
                // Nothing is known of these, so that no two chains and no two steps share a product.
                let bytes = black_box([3u8; 16 * 64]);
                let mut sums = [S::zero4(); CHAINS];
                let x = [S::repeat_bytes::<16>(bytes.as_ptr().cast()); CHAINS / 3].map(black_box);
                for step in 0..STEPS {
                    for (i, sum) in sums.iter_mut().enumerate() {
                        let w = S::load_bytes(bytes.as_ptr().add((step + i % 3) % 16 * 4 * S::LANES));
                        *sum = S::dot4(*sum, w, x[i / 3]);
                    }
                }
                for sum in sums {
                    black_box(S::reduce_add(S::sums4(sum)));
                }
                return S::LANES;
            }
            // Values that stay where they are (x·1 + 0), so that no run meets subnormal numbers.
            let (one, zero) = (S::splat(black_box(1.0)), S::splat(black_box(0.0)));
            let mut acc = [one; CHAINS];
            for _ in 0..STEPS {
                for acc in &mut acc {
                    *acc = if WHAT == DOT_BF16 { S::dot_bf16(one, zero, *acc) } else { S::fma(*acc, one, zero) };
                }
            }
            for acc in acc {
                black_box(S::reduce_add(acc));
            }
        }
        S::LANES
    }
}
