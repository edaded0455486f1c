//! Every stage of every tiny checkpoint against transformers' own outputs: a wrong layer, crop or rotary pairing shows where it is.

mod support;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use llava_engine::device::Device;
use llava_engine::dtype::DType;
use llava_engine::engine::{Engine, EngineOptions, GenerateOptions};
use llava_engine::image::RgbImage;
use llava_engine::infer::lookup::MAX_DRAFT;
use llava_engine::infer::sampler::SamplingOptions;
use llava_engine::model::Stage;
use llava_engine::tensor::Tensor;
use llava_engine::text::Prompt;
use safetensors::SafeTensors;
use support::{Bound, assert_close, cosine, fixture, image, kernel_device};

#[derive(serde::Deserialize)]
struct Expected {
    cases: Vec<Case>,
}

#[derive(serde::Deserialize)]
struct Case {
    #[serde(skip)]
    index: usize,
    name: String,
    images: Vec<String>,
    prompt: String,
}

/// A checkpoint with what the reference makes of it.
struct Fixture {
    name: String,
    folder: PathBuf,
    expected: Expected,
    tensors: Vec<u8>,
}

impl Fixture {
    fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for entry in std::fs::read_dir(fixture("checkpoints")).unwrap() {
            let folder = entry.unwrap().path();
            let Ok(expected) = std::fs::read(folder.join("expected.json")) else { continue };
            let mut expected: Expected = serde_json::from_slice(&expected).unwrap();
            for (index, case) in expected.cases.iter_mut().enumerate() {
                case.index = index;
            }
            // JPEG decoders round differently (tests/image.rs bounds by how much): only pictures that decode exactly are golden.
            expected.cases.retain(|c| !c.images.iter().any(|i| i.ends_with(".jpg")));
            all.push(Self {
                name: folder.file_name().unwrap().to_string_lossy().into_owned(),
                expected,
                tensors: std::fs::read(folder.join("expected.safetensors")).unwrap(),
                folder,
            });
        }
        assert!(all.len() >= 8, "only {} checkpoints have expectations", all.len());
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    fn open(&self, device: Device, dtype: DType) -> Engine {
        let model_base = (self.name == "orig_projector_over_base").then(|| fixture("checkpoints/base-llama"));
        let options = EngineOptions { device, dtype: Some(dtype), threads: 2, model_base, ..Default::default() };
        Engine::open(&self.folder, &options).unwrap_or_else(|e| panic!("{} on {device}: {e}", self.name))
    }

    fn images(&self, case: &Case) -> Vec<RgbImage> {
        case.images.iter().map(|file| image(&self.folder.join(file))).collect()
    }

    fn f32(&self, name: &str) -> Option<Vec<f32>> {
        let tensors = SafeTensors::deserialize(&self.tensors).unwrap();
        let data = tensors.tensor(name).ok()?.data().to_vec();
        Some(bytemuck::pod_collect_to_vec(&data))
    }

    fn i64(&self, name: &str) -> Vec<i64> {
        let tensors = SafeTensors::deserialize(&self.tensors).unwrap();
        bytemuck::pod_collect_to_vec(tensors.tensor(name).unwrap().data())
    }
}

/// The CPU, and the CUDA kernels.
fn devices() -> impl Iterator<Item = Device> {
    [Device::Cpu].into_iter().chain(kernel_device())
}

/// All fixtures on all devices.
fn fixtures_by_device() -> impl Iterator<Item = (Fixture, Device)> {
    devices().flat_map(|device| Fixture::all().into_iter().map(move |fixture| (fixture, device)))
}

/// The name that a stage has in the fixtures; none if they leave it out.
fn stage_name(stage: Stage) -> Option<String> {
    Some(match stage {
        Stage::PatchEmbedding => "patch_embedding".into(),
        Stage::ClipEmbeddings => "clip_embeddings".into(),
        Stage::ClipHidden(k) => format!("clip_hidden.{k}"),
        Stage::ClipSelected => "clip_selected".into(),
        Stage::ImageFeatures => "image_features".into(),
        Stage::InputEmbeds => "inputs_embeds".into(),
        Stage::DecoderHidden(k) => format!("decoder_hidden.{k}"),
        Stage::DecoderLinear(_) => return None,
    })
}

type Stages = Arc<Mutex<BTreeMap<String, Vec<f32>>>>;

/// Records every stage of what runs next.
fn record(engine: &mut Engine) -> Stages {
    let stages = Stages::default();
    let sink = stages.clone();
    engine.observe(Some(Box::new(move |stage, tensor: &Tensor| {
        stage_name(stage).and_then(|name| sink.lock().unwrap().insert(name, tensor.to_f32()));
    })));
    stages
}

/// Sums of f32 in another order than the reference's: what a few layers make of rounding, as a share of the largest value.
const F32: Bound = Bound { abs: 2e-5, rel_to_max: 2e-5 };

#[test]
fn every_stage_agrees_with_the_reference_in_f32() {
    for (fixture, device) in fixtures_by_device() {
        let mut engine = fixture.open(device, DType::F32);
        for case in &fixture.expected.cases {
            let i = case.index;
            let name = format!("{} case {i} ({}) on {device}", fixture.name, case.name);
            let stages = record(&mut engine);
            let score = engine.score(&Prompt::raw(&case.prompt), &fixture.images(case)).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(score.input_ids, fixture.i64(&format!("case{i}.input_ids")), "{name}: ids");
            if let Some(pixels) = &score.pixel_values {
                let expected = fixture.f32(&format!("case{i}.pixel_values")).unwrap();
                assert_close(&format!("{name}: pixels"), pixels.as_slice(), &expected, Bound::abs(1e-6));
            }
            let stages = std::mem::take(&mut *stages.lock().unwrap());
            assert_eq!(stages.keys().any(|k| k == "image_features"), !case.images.is_empty());
            for (stage, got) in &stages {
                let expected =
                    fixture.f32(&format!("case{i}.{stage}")).unwrap_or_else(|| panic!("{name}: no {stage} to compare with"));
                assert_close(&format!("{name}: {stage}"), got, &expected, F32);
            }
            let n_stages =
                if case.images.is_empty() { 0 } else { 5 + engine.config().n_vision_layers } + 1 + engine.config().text.n_layers;
            assert_eq!(stages.len(), n_stages, "{name}: a stage was not compared");
            for (what, got) in [("logprobs", &score.logprobs), ("last_logits", &score.last_logits)] {
                let expected = fixture.f32(&format!("case{i}.{what}")).unwrap();
                assert_close(&format!("{name}: {what}"), got, &expected, Bound::abs(1e-3));
            }
        }
    }
}

#[test]
fn greedy_tokens_are_the_references() {
    let options =
        GenerateOptions { sampling: SamplingOptions::greedy(), max_new_tokens: 24, ignore_eos: true, ..Default::default() };
    for (fixture, device) in fixtures_by_device() {
        let mut engine = fixture.open(device, DType::F32);
        for case in &fixture.expected.cases {
            let i = case.index;
            let images = fixture.images(case);
            let answer =
                engine.generate(&Prompt::raw(&case.prompt), &images, &options, &mut |_| ControlFlow::Continue(())).unwrap();
            let got: Vec<i64> = answer.token_ids.iter().map(|&id| i64::from(id)).collect();
            assert_eq!(got, fixture.i64(&format!("case{i}.greedy")), "{} case {i} ({}) on {device}", fixture.name, case.name);
        }
    }
}

/// Guessed tokens save passes, and change no answer: greedy or drawn, right or wrong as they may be.
#[test]
fn guesses_change_no_answer() {
    let greedy =
        GenerateOptions { sampling: SamplingOptions::greedy(), max_new_tokens: 40, ignore_eos: true, ..Default::default() };
    let drawn = SamplingOptions { temperature: 0.3, top_p: 0.95, repetition_penalty: 1.05, seed: 5, ..Default::default() };
    let drawn = GenerateOptions { sampling: drawn, ..greedy.clone() };
    let (mut drafted, mut accepted) = ([0; 2], [0; 2]);
    for fixture in Fixture::all() {
        let mut engine = fixture.open(Device::Cpu, DType::F32);
        for case in &fixture.expected.cases {
            let images = fixture.images(case);
            for (i, options) in [&greedy, &drawn].into_iter().enumerate() {
                let mut answer = |prompt_lookup| {
                    let options = GenerateOptions { prompt_lookup, ..options.clone() };
                    engine.generate(&Prompt::raw(&case.prompt), &images, &options, &mut |_| ControlFlow::Continue(())).unwrap()
                };
                let (plain, guessed) = (answer(0), answer(MAX_DRAFT));
                assert_eq!(guessed.token_ids, plain.token_ids, "{} ({}), {options:?}", fixture.name, case.name);
                assert_eq!((plain.usage.drafts, guessed.text), (None, plain.text));
                let drafts = guessed.usage.drafts.unwrap();
                drafted[i] += drafts.drafted_tokens;
                accepted[i] += drafts.accepted_tokens;
            }
        }
    }
    // Both kinds of guesses came up.
    assert!((0..2).all(|i| accepted[i] > 20 && accepted[i] + 20 < drafted[i]), "{accepted:?} of {drafted:?} were right");
}

#[test]
fn half_precision_stays_close_to_the_reference() {
    for (fixture, device) in fixtures_by_device() {
        for dtype in [DType::Bf16, DType::F16] {
            let mut engine = fixture.open(device, dtype);
            for case in &fixture.expected.cases {
                let i = case.index;
                let name = format!("{} case {i} ({}) in {dtype} on {device}", fixture.name, case.name);
                let score = engine.score(&Prompt::raw(&case.prompt), &fixture.images(case)).unwrap();
                let expected = fixture.f32(&format!("case{i}.last_logits")).unwrap();
                let similarity = cosine(&score.last_logits, &expected);
                assert!(similarity >= 0.9995, "{name}: cosine {similarity}");
                let (top, margin) = top(&expected);
                assert!(margin <= 0.1 || self::top(&score.last_logits).0 == top, "{name}: top-1 differs at margin {margin}");
            }
        }
    }
}

/// Index of the largest logit, and how far the next one is.
fn top(logits: &[f32]) -> (usize, f32) {
    let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
    let second = (0..logits.len()).filter(|&i| i != best).map(|i| logits[i]).fold(f32::NEG_INFINITY, f32::max);
    (best, logits[best] - second)
}

#[test]
fn a_conversation_in_the_cache_answers_as_one_that_is_not() {
    let options =
        GenerateOptions { sampling: SamplingOptions::greedy(), max_new_tokens: 8, ignore_eos: true, ..Default::default() };
    for fixture in Fixture::all().iter().filter(|f| f.name.starts_with("hf_")) {
        let mut engine = fixture.open(Device::Cpu, DType::F32);
        let case = fixture.expected.cases.iter().find(|c| c.images.len() == 1).unwrap();
        let images = fixture.images(case);
        let mut session = engine.session();
        let mut text = case.prompt.clone();
        for turn in 0..3 {
            let prompt = Prompt::raw(&text);
            let alone = engine.generate(&prompt, &images, &options, &mut |_| ControlFlow::Continue(())).unwrap();
            let cached = engine.generate_in(&mut session, &prompt, &images, &options, &mut |_| ControlFlow::Continue(())).unwrap();
            assert_eq!(alone.token_ids, cached.token_ids, "{} turn {turn}", fixture.name);
            assert!(turn == 0 || cached.timings.encode_ms == 0.0, "the image was encoded again");
            text += " and then?";
        }
    }
}
