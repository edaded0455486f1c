//! Every hot op, timed by criterion: for comparing two versions on one machine (`--save-baseline`, `--baseline`).
//!
//! What bounds an op is its throughput: criterion's elements are FLOPs, its bytes are bytes. How near that is to what the machine can do
//! is told by the `roofline` bench.
//!
//! `[LLAVA_THREADS=N] cargo bench --bench ops [-- FILTER]`; with `-- --test` every op runs once and nothing is timed.

mod common;

use std::time::Duration;

use common::Work;
use criterion::{Criterion, Throughput};
use llava_engine::dtype::DType;

fn main() {
    // A prompt's linear layer takes a good part of a second: ten samples are what one has the time for.
    let criterion =
        Criterion::default().sample_size(10).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3));
    let mut criterion = criterion.configure_from_args();
    let cpu = common::cpu();
    let dtypes = [DType::F32, DType::Bf16];
    let linears = dtypes.into_iter().flat_map(common::linears);
    let packed = [4, 8].into_iter().flat_map(common::packed_linears);
    for case in linears.chain(packed).chain(common::attentions(&dtypes)).chain(common::small_ops()) {
        let mut group = criterion.benchmark_group(case.op);
        group.throughput(match case.work {
            Work::Flops(n) | Work::Bf16Flops(n) | Work::IntOps(n) => Throughput::Elements(n as u64),
            Work::Bytes(n) => Throughput::Bytes(n as u64),
        });
        // Criterion calls this several times, or never if the filter leaves the case out.
        let mut call = None;
        group.bench_function(case.shape.as_str(), |bencher| bencher.iter(call.get_or_insert_with(|| case.prepare(&cpu))));
        group.finish();
    }
    criterion.final_summary();
}
