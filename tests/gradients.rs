//! Gradients of whole models, and steps along them, against PyTorch's autograd and AdamW in f64 (tools/reference/make_gradients.py):
//! every tensor, by name.

mod support;

use llava_engine::cpu::Cpu;
use llava_engine::dtype::DType;
use llava_engine::engine::open_grad_device;
use llava_engine::model::checkpoint::Checkpoint;
use llava_engine::model::{Batch, Llava, Recompute, Slot, Tape, Trained};
use llava_engine::nn::Linear;
use llava_engine::ops::{GradOps, Matrix, Weight};
use llava_engine::tensor::Tensor;
use llava_engine::train::config::Config;
use llava_engine::train::optim::Optimizer;
use llava_engine::train::schedule::{Decay, Schedule};
use llava_engine::weights::Source;
use llava_engine::weights::random::Random;
use llava_engine::weights::recipe::Recipe;
use support::reference::{Reference, assert_gradient};
use support::{Bound, assert_close, fixture, kernel_device};

/// Loss and gradients of a model by name, on the CPU.
fn gradients(name: &str, threads: usize, trained: Trained, recompute: Recompute) -> (f64, Vec<(String, Vec<f32>)>) {
    gradients_on(&Cpu::new(threads, DType::F32).unwrap(), name, trained, recompute)
}

/// ... on any device.
fn gradients_on(ops: &dyn GradOps, name: &str, trained: Trained, recompute: Recompute) -> (f64, Vec<(String, Vec<f32>)>) {
    let reference = Reference::of(name);
    let checkpoint = Checkpoint::open(&fixture(&format!("checkpoints/{name}")), None).unwrap();
    let mut model = Llava::load(ops, &checkpoint.config, &checkpoint.weights, Some(DType::F32)).unwrap();
    model.train(ops, trained).unwrap();
    let (slots, is_learned, lengths) = reference.batch();
    let mut tape = Tape::plan(ops, &checkpoint.config, trained, slots.len() + 5, 2, recompute).unwrap();
    let size = checkpoint.config.vision.image_size;
    let pixels = ops.upload(Tensor::from_slice(&[1, 3, size, size], &reference.f32("pixels"))).unwrap();
    let batch = Batch { slots: &slots, is_learned: &is_learned, lengths: &lengths };
    let scale = reference.f32("scale")[0];
    // Twice into the same buffers: gradients add up, and nothing of a pass is left for the next.
    let mut loss = 0.0;
    for _ in 0..2 {
        loss = model.gradients(ops, &mut tape, Some(&pixels), &batch, scale / 2.0).unwrap();
    }
    let mut all = Vec::new();
    model
        .visit_params(&mut |param| {
            assert_eq!(param.value.shape(), param.grad.shape(), "{}", param.name);
            all.push((param.name.to_owned(), ops.download(param.grad)?));
            Ok(())
        })
        .unwrap();
    (loss, all)
}

const MODELS: [&str; 2] = ["hf_mha_f32", "hf_gqa_bf16"];
const ALL: Trained = Trained { vision: true, projector: true, decoder: true };

/// The loss and the gradient of every parameter, as PyTorch has them.
fn check_against_autograd(ops: &dyn GradOps, name: &str, recompute: Recompute) {
    let reference = Reference::of(name);
    let (loss, gradients) = gradients_on(ops, name, ALL, recompute);
    let name = format!("{name} on {}", ops.name());
    let expected = f64::from(reference.f32("loss")[0]);
    assert!((loss / expected - 1.0).abs() < 1e-5, "{name}: the loss is {loss}, expected {expected}");
    let mut names: Vec<_> = gradients.iter().map(|(name, _)| name.clone()).collect();
    names.sort();
    assert_eq!(names, reference.names("grad."), "{name}");
    for (parameter, got) in gradients {
        let expected = reference.f32(&format!("grad.{parameter}"));
        // A key's bias moves all scores of a query alike: its gradient is zero but for rounding, and is left to the length of Q's and V's.
        assert_gradient(&format!("{name}: {parameter}"), &got, &expected);
    }
}

#[test]
fn every_parameter_has_the_gradient_that_autograd_finds() {
    for name in MODELS {
        check_against_autograd(&Cpu::new(2, DType::F32).unwrap(), name, Recompute::Selective);
    }
}

/// Through the CUDA kernels, layers kept and layers run again.
#[test]
fn kernels_find_the_gradients_of_autograd() {
    let Some(device) = kernel_device() else { return };
    let (ops, _) = open_grad_device(device, 2, DType::F32).unwrap();
    for (name, recompute) in MODELS.into_iter().zip([Recompute::Selective, Recompute::Full]) {
        check_against_autograd(&*ops, name, recompute);
    }
}

/// Parts that are trained alone have the gradients that they have in company, to the last bit.
#[test]
fn parts_are_trained_alone() {
    for name in MODELS {
        let (_, all) = gradients(name, 2, ALL, Recompute::Selective);
        let parts = [(true, false, false, "clip."), (false, true, false, "projector."), (false, false, true, "llama.")];
        for (vision, projector, decoder, prefix) in parts {
            let (_, alone) = gradients(name, 2, Trained { vision, projector, decoder }, Recompute::Selective);
            let expected: Vec<_> = all.iter().filter(|(name, _)| name.starts_with(prefix)).cloned().collect();
            assert!(!expected.is_empty() && alone == expected, "{name}: {prefix} alone");
        }
    }
}

/// Neither computing layers again nor another number of threads changes a bit.
#[test]
fn recomputing_and_threads_change_nothing() {
    for name in MODELS {
        let expected = gradients(name, 2, ALL, Recompute::Selective);
        assert!(gradients(name, 2, ALL, Recompute::Full) == expected, "{name}: recomputed");
        assert!(gradients(name, 1, ALL, Recompute::Selective) == expected, "{name}: one thread");
    }
}

#[test]
fn what_cannot_be_trained_is_refused() {
    let checkpoint = Checkpoint::open(&fixture("checkpoints/hf_gqa_bf16"), None).unwrap();
    let ops = Cpu::new(1, DType::F32).unwrap();
    let source = Random::packed(DType::F32, Recipe::of_bits(8, 32).unwrap());
    let packed = source.packed("llama.layers.0.mlp.up_proj", 16, 64).unwrap().unwrap();
    let mut linear = Linear::new(Weight::of(vec![Matrix::Packed(packed.into())]).unwrap(), None);
    let error = linear.train(&ops).unwrap_err().to_string();
    assert!(error.contains("int8"), "{error}");

    let mut model = Llava::load(&ops, &checkpoint.config, &checkpoint.weights, Some(DType::F32)).unwrap();
    let trained = Trained { vision: false, projector: true, decoder: false };
    model.train(&ops, trained).unwrap();
    let mut tape = Tape::plan(&ops, &checkpoint.config, trained, 8, 1, Recompute::Full).unwrap();
    let slots = [1, 2, 3].map(Slot::Token);
    let mut run = |slots: &[Slot], is_learned: &[bool], lengths: &[usize]| {
        model.gradients(&ops, &mut tape, None, &Batch { slots, is_learned, lengths }, 1.0).unwrap_err().to_string()
    };
    assert!(run(&slots, &[true, false, false], &[3]).contains("position 0"));
    assert!(run(&slots, &[false, true, true], &[1, 2]).contains("position 1"));
    assert!(run(&slots, &[false, true], &[3]).contains("training pass"));
    let with_image = [Slot::Token(1), Slot::Image { feature_row: 0 }];
    assert!(run(&with_image, &[false, true], &[2]).contains("position 1"));
    assert!(run(&with_image, &[false, false], &[2]).contains("no pictures"));
}

/// The settings of `train` in make_gradients.py.
fn settings() -> Config {
    Config {
        lr: 1e-3,
        projector_lr: Some(4e-3),
        vision_lr: Some(5e-4),
        weight_decay: 0.1,
        beta2: 0.99,
        max_grad_norm: 1.0,
        ..Config::default()
    }
}

/// A model of the fixtures with all that a pass needs.
struct Run {
    ops: Box<dyn GradOps>,
    model: Llava,
    tape: Tape,
    pixels: Tensor,
    slots: Vec<Slot>,
    is_learned: Vec<bool>,
    lengths: Vec<usize>,
}

impl Run {
    fn new(name: &str) -> Self {
        Self::on(Box::new(Cpu::new(2, DType::F32).unwrap()), name)
    }

    fn on(ops: Box<dyn GradOps>, name: &str) -> Self {
        let reference = Reference::of(name);
        let checkpoint = Checkpoint::open(&fixture(&format!("checkpoints/{name}")), None).unwrap();
        let mut model = Llava::load(&*ops, &checkpoint.config, &checkpoint.weights, Some(DType::F32)).unwrap();
        model.train(&*ops, ALL).unwrap();
        let (slots, is_learned, lengths) = reference.batch();
        let tape = Tape::plan(&*ops, &checkpoint.config, ALL, slots.len(), 1, Recompute::Full).unwrap();
        let size = checkpoint.config.vision.image_size;
        let pixels = ops.upload(Tensor::from_slice(&[1, 3, size, size], &reference.f32("pixels"))).unwrap();
        Self { ops, model, tape, pixels, slots, is_learned, lengths }
    }

    /// The mean loss; gradients are those of it.
    fn loss(&mut self) -> f64 {
        let n = self.is_learned.iter().filter(|l| **l).count() as f64;
        let batch = Batch { slots: &self.slots, is_learned: &self.is_learned, lengths: &self.lengths };
        self.model.gradients(&*self.ops, &mut self.tape, Some(&self.pixels), &batch, (1.0 / n) as f32).unwrap() / n
    }
}

/// The losses of the first `n_steps` of the 50 steps that PyTorch made.
fn check_steps(mut run: Run, name: &str, n_steps: usize) {
    let expected = Reference::of(name).f32("losses");
    let schedule = Schedule::new(Decay::Cosine, expected.len(), 5, 0.0);
    let mut optimizer = Optimizer::new(&settings());
    let mut worst = 0f64;
    for (step, &expected) in expected.iter().enumerate().take(n_steps) {
        let loss = run.loss();
        let error = (loss - f64::from(expected)).abs();
        assert!(error <= 1e-3, "{name}: before step {step} the loss is {loss}, PyTorch's {expected}");
        worst = worst.max(error);
        optimizer.step(&*run.ops, &mut run.model, schedule.factor(step)).unwrap();
    }
    println!("{name} on {}: losses of {n_steps} steps are within {worst:.1e}", run.ops.name());
}

#[test]
fn fifty_steps_follow_pytorch() {
    for name in MODELS {
        check_steps(Run::new(name), name, 50);
    }
}

/// Through the CUDA kernels: a few steps, since each takes the simulator a while.
#[test]
fn steps_of_kernels_follow_pytorch() {
    let Some(device) = kernel_device() else { return };
    for name in MODELS {
        let (ops, _) = open_grad_device(device, 2, DType::F32).unwrap();
        check_steps(Run::on(ops, name), name, 8);
    }
}

/// A number that is none stops the step, names the parameter, and changes nothing.
#[test]
fn a_gradient_that_is_not_finite_is_named() {
    let (mut run, mut optimizer) = (Run::new("hf_mha_f32"), Optimizer::new(&settings()));
    run.loss();
    optimizer.step(&*run.ops, &mut run.model, 1.0).unwrap();
    run.loss();
    let name = "llama.layers.1.mlp.down_proj.weight";
    let values = |run: &mut Run| {
        let mut all = Vec::new();
        run.model
            .visit_params(&mut |param| {
                all.push(param.value.to_f32());
                Ok(())
            })
            .unwrap();
        all
    };
    run.model
        .visit_params(&mut |param| {
            if param.name == name {
                param.grad.as_mut_slice::<f32>()[7] = f32::NAN;
            }
            Ok(())
        })
        .unwrap();
    let before = values(&mut run);
    let error = optimizer.step(&*run.ops, &mut run.model, 1.0).unwrap_err().to_string();
    assert!(error.starts_with(name) && error.contains("not finite"), "{error}");
    assert!(values(&mut run) == before);
}

/// A batch that is the same sequences many times over: more tokens to be learned than have their logits made at once.
#[test]
fn gradients_of_many_sequences_add_up() {
    const TIMES: usize = 30;
    let name = "hf_gqa_bf16";
    let (loss, expected) = gradients(name, 2, ALL, Recompute::Full);
    let mut run = Run::new(name);
    let n_features = run.slots.iter().filter(|slot| matches!(slot, Slot::Image { .. })).count();
    let shifted = |by: usize| {
        run.slots.iter().map(move |slot| match *slot {
            Slot::Image { feature_row } => Slot::Image { feature_row: feature_row + by * n_features },
            token => token,
        })
    };
    let slots: Vec<_> = (0..TIMES).flat_map(shifted).collect();
    let (is_learned, lengths) = (run.is_learned.repeat(TIMES), run.lengths.repeat(TIMES));
    assert!(is_learned.iter().filter(|l| **l).count() > 256);
    let config = run.model.config().clone();
    let size = config.vision.image_size;
    let pixels = Tensor::from_slice(&[TIMES, 3, size, size], &run.pixels.to_f32().repeat(TIMES));
    let mut tape = Tape::plan(&*run.ops, &config, ALL, slots.len(), TIMES, Recompute::Full).unwrap();
    let batch = Batch { slots: &slots, is_learned: &is_learned, lengths: &lengths };
    let scale = Reference::of(name).f32("scale")[0] / TIMES as f32;
    let sum = run.model.gradients(&*run.ops, &mut tape, Some(&pixels), &batch, scale).unwrap();
    assert!((sum / TIMES as f64 / loss - 1.0).abs() < 1e-6);
    let mut i = 0;
    run.model
        .visit_params(&mut |param| {
            assert_close(param.name, &param.grad.to_f32(), &expected[i].1, Bound { abs: 1e-7, rel_to_max: 2e-5 });
            i += 1;
            Ok(())
        })
        .unwrap();
    assert_eq!(i, expected.len());
}
