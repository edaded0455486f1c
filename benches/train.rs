//! A training step of the demo model, all of it trained, in f32: 16 conversations with a picture each.
//!
//! `[LLAVA_THREADS=N] cargo bench --bench train`; tools/bench_train.py times the same step in PyTorch.

use std::path::Path;
use std::time::Instant;

use llava_engine::cpu::{Cpu, probe};
use llava_engine::dtype::DType;
use llava_engine::model::checkpoint::Checkpoint;
use llava_engine::model::{Batch, Llava, Recompute, Slot, Tape, Trained};
use llava_engine::ops::Ops;
use llava_engine::tensor::Tensor;
use llava_engine::train::config::Config;
use llava_engine::train::optim::Optimizer;

const SEQUENCES: usize = 16;
/// Tokens of a conversation beside its picture, and how many at its end are learned.
const TEXT: usize = 64;
const LEARNED: usize = 24;
const STEPS: usize = 7;

fn main() {
    let n_threads = std::env::var("LLAVA_THREADS").map_or(0, |n| n.parse().expect("LLAVA_THREADS takes a number"));
    let ops = Cpu::new(n_threads, DType::F32).unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    let checkpoint = Checkpoint::open(&folder, None).unwrap();
    let config = &checkpoint.config;
    let trained = Trained { vision: true, projector: true, decoder: true };
    let mut model = Llava::load(&ops, config, &checkpoint.weights, Some(DType::F32)).unwrap();
    model.train(&ops, trained, DType::F32).unwrap();

    let (n_features, size) = (config.tokens_per_image(), config.vision.image_size);
    let slot = |i: usize| {
        let (sequence, at) = (i / (n_features + TEXT), i % (n_features + TEXT));
        if at < n_features { Slot::Image { feature_row: sequence * n_features + at } } else { Slot::Token((i * 7 % 600) as u32) }
    };
    let slots: Vec<_> = (0..SEQUENCES * (n_features + TEXT)).map(slot).collect();
    let is_learned: Vec<_> = (0..slots.len()).map(|i| i % (n_features + TEXT) >= n_features + TEXT - LEARNED).collect();
    let lengths = [n_features + TEXT; SEQUENCES];
    let pixels: Vec<f32> = (0..SEQUENCES * 3 * size * size).map(|i| (i % 97) as f32 / 48.0 - 1.0).collect();
    let pixels = Tensor::from_slice(&[SEQUENCES, 3, size, size], &pixels);
    let batch = Batch { slots: &slots, is_learned: &is_learned, lengths: &lengths };
    let scale = 1.0 / (SEQUENCES * LEARNED) as f32;

    println!("{}; {} tokens, {} of them of text", ops.name(), slots.len(), SEQUENCES * TEXT);
    for recompute in [Recompute::Selective, Recompute::Full] {
        let mut tape = Tape::plan(&ops, config, trained, slots.len(), SEQUENCES, recompute).unwrap();
        let mut optimizer = Optimizer::new(&Config { lr: 1e-5, ..Config::default() });
        let mut step = || {
            let start = Instant::now();
            model.gradients(&ops, &mut tape, Some(&pixels), &batch, scale).unwrap();
            let pass = start.elapsed().as_secs_f64() * 1e3;
            optimizer.step(&ops, &mut model, 1.0).unwrap();
            (start.elapsed().as_secs_f64() * 1e3, pass)
        };
        step();
        let mut times: Vec<_> = (0..STEPS).map(|_| step()).collect();
        times.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (ms, pass) = times[STEPS / 2];
        let (min, max) = (times[0].0, times[STEPS - 1].0);
        println!("{recompute:?}: {ms:.1} ms a step ({min:.1} to {max:.1}), {pass:.1} of them the pass");
    }
    let pool = llava_engine::cpu::pool::Pool::new(ops.n_threads());
    println!("f32 peak: {:.0} GFLOP/s", probe::fma_gflops(llava_engine::cpu::simd::Isa::detect(), &pool));
}
