//! Low-rank additions: what they add, on every device; and their gradients against PEFT's by autograd in f64 (tools/reference/make_lora.py), each tensor by its name.

mod reference;
mod support;

use std::sync::Arc;

use llava_engine::cpu::Cpu;
use llava_engine::dtype::DType;
use llava_engine::error::Result;
use llava_engine::model::checkpoint::Checkpoint;
use llava_engine::model::{Batch, Llava, Loader, Recompute, Tape, Trained};
use llava_engine::nn::{Linear, Lora, Scratch};
use llava_engine::ops::{Epilogue, Matrix, Packed, Weight};
use llava_engine::tensor::Tensor;
use llava_engine::weights::adapter::Adapter;
use llava_engine::weights::{Learned, LowRank, Source};
use reference::linear::linear as exact;
use reference::random;
use support::devices::devices;
use support::reference::{Reference, assert_gradient};
use support::{Bound, assert_close, fixture};

/// As in make_lora.py.
const SCALE: f32 = 10.0 / 4.0;
const DROPOUT: f32 = 0.25;
const PASS: u64 = 3;

/// A checkpoint with the factors of a reference.
struct Given<'a> {
    base: &'a dyn Source,
    lora: &'a Reference,
}

impl Source for Given<'_> {
    fn tensor(&self, canonical: &str, shape: &[usize]) -> Result<Tensor> {
        self.base.tensor(canonical, shape)
    }

    fn packed(&self, module: &str, n: usize, k: usize) -> Result<Option<Packed>> {
        self.base.packed(module, n, k)
    }

    fn low_rank(&self, module: &str, _n: usize, _k: usize) -> Result<Option<LowRank>> {
        let factor = |name: &str| format!("value.{module}.{name}.weight");
        if !self.lora.has(&factor("lora_a")) {
            return Ok(None);
        }
        let seed = self.lora.i32(&format!("seed.{module}"))[0] as u64;
        Ok(Some(LowRank {
            a: self.lora.tensor(&factor("lora_a")),
            b: self.lora.tensor(&factor("lora_b")),
            scale: SCALE,
            learned: Some(Learned { dropout: DROPOUT, seed }),
        }))
    }
}

/// Loss and gradients of a model with the reference's additions.
fn gradients(name: &str, pass: Option<u64>, threads: usize, recompute: Recompute) -> (f64, Vec<(String, Vec<f32>)>) {
    let (of_model, lora) = (Reference::of(name), Reference::read(&format!("lora/{name}_gradients.safetensors")));
    let checkpoint = Checkpoint::open(&fixture(&format!("checkpoints/{name}")), None).unwrap();
    let ops = Cpu::new(threads, DType::F32).unwrap();
    let source = Given { base: &checkpoint.weights, lora: &lora };
    let mut model = Llava::load(&ops, &checkpoint.config, &source, None).unwrap();
    model.train(&ops, Trained { vision: false, projector: true, decoder: false }, DType::F32).unwrap();
    model.set_pass(pass);
    let (slots, is_learned, lengths) = of_model.batch();
    let trained = Trained { vision: true, projector: true, decoder: true };
    let mut tape = Tape::plan(&ops, &checkpoint.config, trained, slots.len(), 1, recompute).unwrap();
    let size = checkpoint.config.vision.image_size;
    let pixels = Tensor::from_slice(&[1, 3, size, size], &of_model.f32("pixels"));
    let batch = Batch { slots: &slots, is_learned: &is_learned, lengths: &lengths };
    // Twice into the same buffers, as in tests/gradients.rs.
    let mut loss = 0.0;
    for _ in 0..2 {
        loss = model.gradients(&ops, &mut tape, Some(&pixels), &batch, of_model.f32("scale")[0] / 2.0).unwrap();
    }
    let mut all = Vec::new();
    model
        .visit_params(&mut |param| {
            all.push((param.name.to_owned(), param.grad.to_f32()));
            Ok(())
        })
        .unwrap();
    (loss, all)
}

#[test]
fn every_factor_has_the_gradient_that_autograd_finds() {
    for name in ["hf_mha_f32", "hf_gqa_bf16"] {
        let reference = Reference::read(&format!("lora/{name}_gradients.safetensors"));
        for (kind, pass) in [("kept", None), ("dropped", Some(PASS))] {
            let (loss, gradients) = gradients(name, pass, 2, Recompute::Selective);
            let expected = f64::from(reference.f32(&format!("{kind}.loss"))[0]);
            assert!((loss / expected - 1.0).abs() < 1e-5, "{name}, {kind}: the loss is {loss}, expected {expected}");
            let mut names: Vec<_> = gradients.iter().map(|(name, _)| name.clone()).collect();
            names.sort();
            assert_eq!(names, reference.names(&format!("{kind}.grad.")), "{name}, {kind}");
            assert!(names.len() > 60, "{names:?}");
            for (parameter, got) in gradients {
                let expected = reference.f32(&format!("{kind}.grad.{parameter}"));
                assert_gradient(&format!("{name}, {kind}: {parameter}"), &got, &expected);
            }
        }
    }
}

/// What a layer drops it drops again when it is run again; another pass drops other elements; threads change nothing.
#[test]
fn passes_differ_and_recomputing_does_not() {
    let name = "hf_gqa_bf16";
    let expected = gradients(name, Some(7), 2, Recompute::Selective);
    assert!(gradients(name, Some(7), 1, Recompute::Full) == expected);
    assert!(gradients(name, Some(8), 2, Recompute::Selective) != expected);
}

/// Whatever is added, whether it learns or not: matrices stay in their file.
#[test]
fn matrices_under_additions_are_not_copied() {
    let checkpoint = Checkpoint::open(&fixture("checkpoints/hf_mha_f32"), None).unwrap();
    let adapter = Adapter::open(&fixture("lora/rslora")).unwrap();
    let reference = Reference::read("lora/hf_mha_f32_gradients.safetensors");
    let learning = Given { base: &checkpoint.weights, lora: &reference };
    let ops = Cpu::new(1, DType::F32).unwrap();
    for source in [&adapter.over(&checkpoint.weights) as &dyn Source, &learning] {
        let qkv = [("q_proj", 32), ("k_proj", 32), ("v_proj", 32)];
        let linear = Loader::new(&ops, source, None).linear("llama.layers.0.self_attn", &qkv, 32).unwrap();
        assert_eq!(linear.lora.len(), 3);
        let is_mapped = |part: &Matrix| matches!(part, Matrix::Dense(tensor) if tensor.is_mapped());
        assert!(linear.weight.parts.iter().all(is_mapped) && linear.grad.is_none());
    }
}

/// Additions of odd shapes to some parts of a weight, through every epilogue, on every device, against the matrix that they make of it;
/// one after the other in the same buffers. Columns of parts that are not asked for stay as they are.
#[test]
fn additions_are_those_of_the_matrix_that_they_make() {
    let epilogues =
        [(Epilogue::Store, "store"), (Epilogue::Add, "add"), (Epilogue::QuickGelu, "quick_gelu"), (Epilogue::Gelu, "gelu")];
    // Tokens, width of x, rows of the parts, and the rank of what is added to each; 0 for nothing.
    type Shape = (usize, usize, [usize; 2], [usize; 2]);
    let shapes: [Shape; 6] = [
        (1, 1, [1, 1], [1, 1]),
        (33, 96, [64, 64], [8, 16]),
        (2, 3, [2, 3], [0, 1]),
        (3, 111, [5, 70], [2, 7]),
        (40, 70, [3, 1], [3, 0]),
        (9, 577, [2, 12], [1, 2]),
    ];
    for device in devices() {
        let scratch = Scratch::default();
        for ((i, (tokens, k, n, ranks)), (epilogue, name)) in
            shapes.into_iter().enumerate().flat_map(|shape| epilogues.map(|e| (shape, e)))
        {
            let what = format!("{name} of {tokens} by {k}, {n:?}, {ranks:?} on {}", device.name);
            let draw = |len: usize, seed: usize, size: f32| {
                let values: Vec<f32> = random(len, (10 * i + seed) as u64).iter().map(|x| x * size).collect();
                device.round(&values)
            };
            let width = n[0] + n[1];
            let (x, old, bias) = (draw(tokens * k, 0, 1.0), draw(tokens * width, 1, 1.0), random(width, 2));
            let (mut parts, mut merged, mut additions) = (Vec::new(), Vec::new(), Vec::new());
            for part in 0..2 {
                let (n, r) = (n[part], ranks[part]);
                let mut w = draw(n * k, 3 + part, (k as f32).powf(-0.5));
                parts.push(Arc::new(device.put(&[n, k], &w)));
                if r > 0 {
                    let (a, b) = (draw(r * k, 5 + part, (k as f32).powf(-0.5)), draw(n * r, 7 + part, (r as f32).powf(-0.5)));
                    for (row, col) in (0..n).flat_map(|row| (0..k).map(move |col| (row, col))) {
                        let sum: f64 = (0..r).map(|j| f64::from(b[row * r + j]) * f64::from(a[j * k + col])).sum();
                        w[row * k + col] += sum as f32;
                    }
                    additions.push((part, device.put(&[r, k], &a), device.put(&[n, r], &b)));
                }
                merged.extend(w);
            }
            let mut linear = Linear::new(Weight::stacked(parts).unwrap(), Some(device.put_f32(&[width], &bias)));
            for (part, a, b) in additions {
                linear.lora.push(Lora::new(part, part * n[0], a, b, scratch.clone()).unwrap());
            }
            let bound = Bound { abs: 2e-6, rel_to_max: 2e-5 + 3.0 * device.epsilon() as f32 };
            let (x_there, mut y) = (device.put(&[tokens, k], &x), device.put(&[tokens, width], &old));
            linear.forward_with(&*device.ops, &mut y, &x_there, epilogue).unwrap();
            let expected: Vec<f32> = exact(&x, &merged, Some(&bias), &old, k, name).iter().map(|&v| v as f32).collect();
            assert_close(&what, &device.get(&y), &expected, bound);

            let mut y = device.put(&[tokens, width], &old);
            linear.forward_parts(&*device.ops, &mut y, &x_there, 1..2).unwrap();
            let of_second = exact(&x, &merged[n[0] * k..], None, &vec![0.0; tokens * n[1]], k, "store");
            let expected = |row: usize, col: usize| match col.checked_sub(n[0]) {
                Some(col) => of_second[row * n[1] + col] as f32,
                None => old[row * width + col],
            };
            let expected: Vec<f32> = (0..tokens * width).map(|i| expected(i / width, i % width)).collect();
            assert_close(&format!("{what}: the second part"), &device.get(&y), &expected, bound);
        }
    }
}
