//! The heavy ops against the peaks of the machine.
//!
//! Machines are noisy, so each timing stands beside a peak that is measured right before and after it, and what counts is the ratio:
//! the median of [`ROUNDS`] rounds. Both are also measured in seconds of processor time, where the system tells them (Linux): that
//! ratio is the kernels' own even while other programs take half of the machine. Buffers that must come from memory are larger than the
//! last cache.
//!
//! `[LLAVA_THREADS=N] cargo bench --bench roofline [-- FILTER]`

mod common;

use std::time::Instant;

use common::{Case, STREAM_BYTES, Work};
use llava_engine::cpu::pool::Pool;
use llava_engine::cpu::simd::Isa;
use llava_engine::cpu::{Cpu, probe};
use llava_engine::dtype::DType;
use llava_engine::ops::Ops;

const ROUNDS: usize = 7;

/// Where to run, and what to measure it against.
struct Bench {
    cpu: Cpu,
    /// What the probes run with: the same, on threads of their own, which sleep while the ops run.
    isa: Isa,
    pool: Pool,
    /// Something to read.
    stream: Vec<f32>,
}

fn main() {
    let filter = std::env::args().skip(1).find(|arg| arg != "--bench");
    let cpu = common::cpu();
    let pool = Pool::new(cpu.n_threads());
    let bench = Bench { cpu, isa: Isa::from_env().expect("LLAVA_ISA"), pool, stream: vec![1.0; STREAM_BYTES / 4] };
    println!("{}", bench.cpu.name());

    let linears = [DType::F32, DType::Bf16, DType::F16].into_iter().flat_map(common::linears);
    let packed = [4, 8].into_iter().flat_map(common::packed_linears);
    for case in linears.chain(packed).chain(common::linear_gradients()).chain(common::attentions(&[DType::F32, DType::Bf16])) {
        let name = format!("{} {}", case.op, case.shape);
        if filter.as_ref().is_none_or(|filter| name.contains(filter)) {
            bench.report(&name, &case);
        }
    }
}

impl Bench {
    /// Prints how fast an op is, and how near to the peak.
    fn report(&self, name: &str, case: &Case) {
        let probe = || match case.work {
            Work::Bf16Flops(_) if self.isa == Isa::Avx512Bf16 => probe::dpbf16_once(self.isa, &self.pool),
            Work::Flops(_) | Work::Bf16Flops(_) => probe::fma_once(self.isa, &self.pool),
            Work::IntOps(_) => probe::int8_once(self.isa, &self.pool),
            Work::Bytes(_) => probe::read_once(&self.pool, &self.stream),
        };
        // What bytes bound is over too soon to be timed alone.
        let (unit, work, calls) = match case.work {
            Work::Flops(n) | Work::Bf16Flops(n) => ("GFLOP/s", n, 1),
            Work::IntOps(n) => ("GOP/s", n, 1),
            Work::Bytes(n) => ("GB/s", n, STREAM_BYTES.div_ceil(n)),
        };
        let mut call = case.prepare(&self.cpu);
        let mut op = || {
            (0..calls).for_each(|_| call());
            (work * calls) as f64
        };
        op();
        probe();
        let mut before = Rate::of(probe);
        let mut ratios: Vec<(f64, Rate, f64)> = (0..ROUNDS)
            .map(|_| {
                let rate = Rate::of(&mut op);
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
