//! The heavy ops on the shapes of CLIP ViT-L/14-336 and LLaMA-7B, against the peaks of the machine.
//!
//! Machines are noisy, so each timing stands beside a peak that is measured right before and after it, and what counts is the ratio:
//! the median of [`ROUNDS`] rounds. Both are also measured in seconds of processor time, where the system tells them (Linux): that
//! ratio is the kernels' own even while other programs take half of the machine. Buffers that must come from memory are larger than the
//! last cache.
//!
//! `cargo bench --bench ops [-- FILTER] [--threads N]`

use std::sync::Arc;
use std::time::Instant;

use llava_engine::cpu::attention::attention;
use llava_engine::cpu::matmul::linear;
use llava_engine::cpu::pool::Pool;
use llava_engine::cpu::probe;
use llava_engine::cpu::simd::Isa;
use llava_engine::dtype::DType;
use llava_engine::ops::{Epilogue, Heads, KvLayer, KvSource, Span, Weight};
use llava_engine::tensor::Tensor;

const ROUNDS: usize = 7;
/// Far larger than any last cache that is shared by few threads.
const STREAM_BYTES: usize = 256 << 20;

/// Where to run.
struct Bench {
    isa: Isa,
    pool: Pool,
    filter: Option<String>,
    /// Something to read.
    stream: Vec<f32>,
}

/// What bounds an op.
#[derive(Clone, Copy)]
enum Bound {
    Flops,
    Bytes,
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let mut n_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut filter = None;
    let mut rest = args.into_iter();
    while let Some(arg) = rest.next() {
        match arg.as_str() {
            "--threads" => n_threads = rest.next().and_then(|n| n.parse().ok()).expect("--threads takes a number"),
            _ => filter = Some(arg),
        }
    }
    let bench =
        Bench { isa: Isa::from_env().expect("LLAVA_ISA"), pool: Pool::new(n_threads), filter, stream: vec![1.0; STREAM_BYTES / 4] };
    println!("{} threads, {}", n_threads, bench.isa);

    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        for (tokens, n, k) in [(577, 4096, 1024), (577, 1024, 4096), (640, 11008, 4096), (640, 4096, 11008), (32, 4096, 4096)] {
            bench.linear(tokens, n, k, dtype, Bound::Flops);
        }
        for (tokens, n, k) in [(1, 4096, 4096), (1, 11008, 4096), (1, 4096, 11008), (4, 11008, 4096), (8, 11008, 4096)] {
            bench.linear(tokens, n, k, dtype, Bound::Bytes);
        }
    }
    let clip = Heads { n_heads: 16, n_kv_heads: 16, head_dim: 64 };
    let llama = Heads { n_heads: 32, n_kv_heads: 32, head_dim: 128 };
    bench.attention("clip 577", clip, 0, 577, None);
    for dtype in [DType::F32, DType::Bf16] {
        bench.attention("prompt 640", llama, 0, 640, Some(dtype));
        bench.attention("decode at 8192", llama, 8191, 1, Some(dtype));
    }
}

impl Bench {
    /// Prints how fast `op` is, and how near to the peak.
    fn report(&self, name: &str, bound: Bound, work: f64, mut op: impl FnMut()) {
        if self.filter.as_ref().is_some_and(|f| !name.contains(f)) {
            return;
        }
        let probe = || match bound {
            Bound::Flops => probe::fma_once(self.isa, &self.pool),
            Bound::Bytes => probe::read_once(&self.pool, &self.stream),
        };
        op();
        probe();
        let mut before = Rate::of(probe);
        let mut ratios: Vec<(f64, Rate, f64)> = (0..ROUNDS)
            .map(|_| {
                let rate = Rate::of(|| {
                    op();
                    work
                });
                let after = Rate::of(probe);
                let ratio = |f: fn(&Rate) -> f64| f(&rate) / ((f(&before) + f(&after)) / 2.0) * 100.0;
                let ratios = (ratio(|r| r.wall), ratio(|r| r.cpu));
                before = after;
                (ratios.0, rate, ratios.1)
            })
            .collect();
        let mut cpu: Vec<f64> = ratios.iter().map(|r| r.2).collect();
        cpu.sort_by(f64::total_cmp);
        ratios.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (ratio, rate, _) = &ratios[ROUNDS / 2];
        let unit = match bound {
            Bound::Flops => "GFLOP/s",
            Bound::Bytes => "GB/s",
        };
        println!(
            "{name:34} {:7.1} {unit:7} {ratio:5.1} % of peak ({:.0}..{:.0}); by processor time {:5.1} % ({:.0}..{:.0})",
            rate.wall / 1e9,
            ratios[0].0,
            ratios[ROUNDS - 1].0,
            cpu[ROUNDS / 2],
            cpu[0],
            cpu[ROUNDS - 1],
        );
    }

    /// y = x·Wᵀ: a set of weights larger than the caches, taken in turn, if bound by bytes.
    fn linear(&self, tokens: usize, n: usize, k: usize, dtype: DType, bound: Bound) {
        let name = format!("linear {tokens}x{n}x{k} {dtype}");
        if self.filter.as_ref().is_some_and(|f| !name.contains(f)) {
            return;
        }
        let bytes = n * k * dtype.size();
        let copies = match bound {
            Bound::Flops => 1,
            Bound::Bytes => STREAM_BYTES.div_ceil(bytes),
        };
        let values = Tensor::from_slice(&[n, k], &random(n * k)).converted(dtype);
        let weights: Vec<Weight> = (0..copies)
            .map(|_| {
                let mut copy = Tensor::zeros(&[n, k], dtype);
                copy_bytes(&mut copy, &values);
                Weight::stacked(vec![Arc::new(copy)]).expect("one part")
            })
            .collect();
        let x = random(tokens * k);
        let mut y = vec![0.0; tokens * n];
        let work = match bound {
            Bound::Flops => 2.0 * (tokens * n * k) as f64,
            Bound::Bytes => (bytes * copies) as f64,
        };
        self.report(&name, bound, work, || {
            for w in &weights {
                linear(self.isa, &self.pool, &mut y, n, &x, tokens, w, None, Epilogue::Store);
            }
        });
    }

    /// Causal with a cache, else not.
    fn attention(&self, name: &str, heads: Heads, past: usize, rows: usize, cache: Option<DType>) {
        const PAGE_TOKENS: usize = 64;
        let name = format!("attention {name} {}", cache.map_or("own".to_string(), |dtype| dtype.to_string()));
        let context = past + rows;
        let qkv = random(rows * heads.qkv_width());
        let mut out = vec![0.0; rows * heads.q_width()];
        let pages: Vec<u32> = (0..context.div_ceil(PAGE_TOKENS) as u32).collect();
        let span = Span { first_row: 0, n_rows: rows, past, pages: &pages };
        let layer = cache.map(|dtype| {
            let shape = [pages.len(), heads.n_kv_heads, PAGE_TOKENS, heads.head_dim];
            let values = || Tensor::from_slice(&shape, &random(shape.iter().product())).converted(dtype);
            KvLayer { k: values(), v: values() }
        });
        let source = layer.as_ref().map_or(KvSource::Own, KvSource::Paged);
        let pairs = if cache.is_some() { rows * past + rows * (rows + 1) / 2 } else { rows * rows };
        let (bound, work) = match layer.as_ref().filter(|_| rows == 1) {
            Some(layer) => (Bound::Bytes, (layer.k.bytes() + layer.v.bytes()) as f64),
            None => (Bound::Flops, (4 * pairs * heads.q_width()) as f64),
        };
        self.report(&name, bound, work, || {
            attention(self.isa, &self.pool, &mut out, &qkv, source, &[span], heads, cache.is_some());
        });
    }
}

/// Work per second of the clock, and of processor time of all threads.
#[derive(Clone, Copy)]
struct Rate {
    wall: f64,
    cpu: f64,
}

impl Rate {
    /// Of a run that returns its work.
    fn of(run: impl FnOnce() -> f64) -> Self {
        let (start, cpu) = (Instant::now(), cpu_seconds());
        let work = run();
        Self { wall: work / start.elapsed().as_secs_f64(), cpu: work / (cpu_seconds() - cpu) }
    }
}

/// Seconds that the threads of this process have run; not a number where the system does not say.
fn cpu_seconds() -> f64 {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return f64::NAN };
    let seconds = tasks.flatten().map(|task| {
        let stat = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        stat.split(' ').next().and_then(|ns| ns.parse::<f64>().ok()).map_or(f64::NAN, |ns| ns / 1e9)
    });
    seconds.sum()
}

/// Copies the elements of a tensor of the same dtype and shape.
fn copy_bytes(to: &mut Tensor, from: &Tensor) {
    match from.dtype() {
        DType::F32 => to.as_mut_slice::<f32>().copy_from_slice(from.as_slice()),
        DType::Bf16 => to.as_mut_slice::<half::bf16>().copy_from_slice(from.as_slice()),
        DType::F16 => to.as_mut_slice::<half::f16>().copy_from_slice(from.as_slice()),
        DType::I32 => unreachable!("weights are not integers"),
    }
}

/// Numbers in −1..1 that look random.
fn random(n: usize) -> Vec<f32> {
    let mut state = 1_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}
