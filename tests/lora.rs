//! Gradients of low-rank additions against PEFT's by autograd in f64 (tools/reference/make_lora.py), each tensor by its name.

mod support;

use llava_engine::cpu::Cpu;
use llava_engine::dtype::DType;
use llava_engine::error::Result;
use llava_engine::model::checkpoint::Checkpoint;
use llava_engine::model::{Batch, Llava, Recompute, Tape, Trained};
use llava_engine::ops::Packed;
use llava_engine::tensor::Tensor;
use llava_engine::weights::{Learned, LowRank, Source};
use support::fixture;
use support::reference::{Reference, assert_gradient};

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
    model.train(&ops, Trained { vision: false, projector: true, decoder: false }).unwrap();
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
