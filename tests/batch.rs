//! Sequences that are decoded together: each gets what it would get alone, whatever the others are and whenever they come and go.

mod support;

use std::path::Path;

use llava_engine::device::Device;
use llava_engine::dtype::DType;
use llava_engine::engine::{Engine, EngineOptions};
use llava_engine::infer::kv::PageTable;
use llava_engine::infer::lookup::MAX_DRAFT;
use llava_engine::infer::runner::{Runner, Step};
use llava_engine::model::Slot;
use llava_engine::quantize::{Method, Options, quantize};
use llava_engine::weights::recipe::Recipe;
use support::{Bound, assert_close, fixture, kernel_device};

/// Heads that share keys and heads that do not.
const CHECKPOINTS: [&str; 2] = ["hf_mha_f32", "hf_gqa_bf16"];
/// Tokens of the prompts: below a page of the cache, at its end, and beyond.
const PROMPTS: [usize; 4] = [1, 37, 64, 111];
/// Tokens of the answers.
const ANSWER: usize = 9;
/// Sums in another order: with one row and with several, products take different ways.
const CLOSE: Bound = Bound { abs: 2e-5, rel_to_max: 2e-5 };

/// A sequence under way.
struct Sequence {
    table: PageTable,
    past: usize,
    /// Its tokens so far, and the logits that each was chosen by.
    answer: Vec<u32>,
    logits: Vec<Vec<f32>>,
}

impl Sequence {
    /// Reads a prompt of `tokens` tokens, which are others for each length.
    fn new(runner: &mut Runner, tokens: usize) -> Self {
        let vocab_size = runner.model().config().text.vocab_size;
        let slots: Vec<_> = (0..tokens).map(|i| Slot::Token(((i * 31 + tokens * 7) % vocab_size) as u32)).collect();
        let mut sequence = Self { table: runner.kv().sequence(), past: tokens, answer: Vec::new(), logits: Vec::new() };
        let mut logits = Vec::new();
        runner.extend(&mut sequence.table, 0, &slots, None, tokens - 1, |row| logits.push(row.to_vec())).unwrap();
        sequence.take(logits.pop().unwrap());
        sequence
    }

    /// The most probable token comes next.
    fn take(&mut self, logits: Vec<f32>) {
        let best = (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
        self.answer.push(best as u32);
        self.logits.push(logits);
    }

    fn step(&mut self) -> Step<'_> {
        Step { table: &mut self.table, past: self.past, token: *self.answer.last().unwrap() }
    }
}

/// One more token of each.
fn advance(runner: &mut Runner, sequences: &mut [&mut Sequence]) {
    let mut rows = Vec::new();
    let mut batch: Vec<_> = sequences.iter_mut().map(|s| s.step()).collect();
    runner.step(&mut batch, |row| rows.push(row.to_vec())).unwrap();
    assert_eq!(rows.len(), sequences.len());
    for (sequence, row) in sequences.iter_mut().zip(rows) {
        sequence.past += 1;
        sequence.take(row);
    }
}

fn open(checkpoint: &str, device: Device, context_tokens: usize, n_contexts: usize) -> Runner {
    open_at(&fixture(&format!("checkpoints/{checkpoint}")), device, context_tokens, n_contexts)
}

fn open_at(model: &Path, device: Device, context_tokens: usize, n_contexts: usize) -> Runner {
    let options = EngineOptions {
        device,
        dtype: Some(DType::F32),
        threads: 2,
        context_tokens: Some(context_tokens),
        n_contexts,
        ..Default::default()
    };
    Engine::open(model, &options).unwrap().into_runner()
}

/// The CPU, and the CUDA kernels.
fn devices() -> impl Iterator<Item = Device> {
    [Device::Cpu].into_iter().chain(kernel_device())
}

#[test]
fn sequences_decoded_together_answer_as_each_alone() {
    for (checkpoint, device) in CHECKPOINTS.iter().flat_map(|c| devices().map(move |d| (c, d))) {
        let mut runner = open(checkpoint, device, 128, PROMPTS.len());
        let alone = PROMPTS.map(|tokens| {
            let mut sequence = Sequence::new(&mut runner, tokens);
            for _ in 1..ANSWER {
                let Sequence { table, past, answer, .. } = &mut sequence;
                let mut logits = Vec::new();
                let slots = [Slot::Token(*answer.last().unwrap())];
                runner.extend(table, *past, &slots, None, 0, |row| logits = row.to_vec()).unwrap();
                *past += 1;
                sequence.take(logits);
            }
            sequence
        });
        let alone = alone.map(|s| (s.answer, s.logits)); // and their pages are free again
        let mut together = PROMPTS.map(|tokens| Sequence::new(&mut runner, tokens));
        // The second comes three steps later and the first leaves three steps before the end, so that places in the batch change.
        for i in 0..ANSWER + 2 {
            let under_way = |(at, _): &(usize, &mut Sequence)| match at {
                1 => i >= 3,
                _ => i < ANSWER - 1,
            };
            let mut batch: Vec<_> = together.iter_mut().enumerate().filter(under_way).map(|(_, s)| s).collect();
            if i % 2 == 1 {
                batch.reverse();
            }
            advance(&mut runner, &mut batch);
        }
        for (sequence, (answer, logits)) in together.iter().zip(&alone) {
            let name = format!("{checkpoint} on {device}, {} tokens", sequence.past);
            assert_eq!(&sequence.answer, answer, "{name}");
            assert_close(&name, &sequence.logits.concat(), &logits.concat(), CLOSE);
        }
        assert!(alone.iter().all(|(answer, _)| answer != &alone[0].0 || std::ptr::eq(answer, &alone[0].0)), "all answer the same");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut runner = open(CHECKPOINTS[0], Device::Cpu, 70, 2);
    let refusal = |runner: &mut Runner, sequences: &mut [Sequence]| {
        let mut batch: Vec<_> = sequences.iter_mut().map(Sequence::step).collect();
        runner.step(&mut batch, |_| {}).unwrap_err().to_string()
    };
    // Two contexts of 70 tokens are four pages of 64.
    let mut full = [Sequence::new(&mut runner, 70)];
    assert!(refusal(&mut runner, &mut full).contains("a context of 70"));
    let mut many: Vec<_> = (0..2).map(|_| Sequence::new(&mut runner, 64)).collect();
    assert!(refusal(&mut runner, &mut many).contains("KV cache"));
    drop((full, many));
    let mut crowd: Vec<_> =
        (0..71).map(|_| Sequence { table: runner.kv().sequence(), past: 0, answer: vec![1], logits: Vec::new() }).collect();
    assert!(refusal(&mut runner, &mut crowd).contains("at most 70"));
    runner.step(&mut [], |_| panic!("nobody asked")).unwrap();
}

/// A draft that is checked in one pass gives the logits of token after token: on the CPU to the last bit, so that prompt lookup cannot
/// change an answer; elsewhere to the rounding of sums in another order.
#[test]
fn rows_of_a_draft_have_the_logits_of_single_ones() {
    let packed = tempfile::tempdir().unwrap();
    let options = Options { recipe: Recipe::of_bits(4, 32).unwrap(), method: Method::Rtn, calibration: None, n_threads: 1 };
    quantize(&fixture("checkpoints/hf_mha_f32"), None, packed.path(), &options, |_, _| {}).unwrap();
    let models = CHECKPOINTS.map(|name| fixture(&format!("checkpoints/{name}"))).into_iter().chain([packed.path().to_owned()]);
    for (model, device) in models.flat_map(|m| devices().map(move |d| (m.clone(), d))) {
        let mut runner = open_at(&model, device, 128, 2);
        let ids: [u32; 1 + MAX_DRAFT] = std::array::from_fn(|i| 5 + 7 * i as u32);
        let slots = ids.map(Slot::Token);
        for past in [1, 62, 63, 64, 100] {
            let mut sequence = Sequence::new(&mut runner, past);
            let mut rows = |slots: &[Slot], past| {
                let mut rows = Vec::new();
                runner.extend(&mut sequence.table, past, slots, None, 0, |row| rows.push(row.to_vec())).unwrap();
                rows
            };
            let together = rows(&slots, past);
            let alone: Vec<_> = (0..slots.len()).flat_map(|i| rows(&slots[i..=i], past + i)).collect();
            let name = format!("{} on {device}, {past} tokens", model.display());
            if device == Device::Cpu {
                assert!(together == alone, "{name}: not the same to the last bit");
            } else {
                assert_close(&name, &together.concat(), &alone.concat(), CLOSE);
            }
        }
    }
}
