//! The phases of an answer, each run by itself and timed, with the device's peaks probed beside every run: a machine that is shared may be
//! half as fast a few seconds later.

use std::io::IsTerminal;
use std::time::Instant;

use llava_engine::dtype::DType;
use llava_engine::error::Result;
use llava_engine::infer::kv::PageTable;
use llava_engine::infer::runner::{Runner, Step};
use llava_engine::model::Slot;
use llava_engine::model::config::LlavaConfig;
use llava_engine::ops::{Ops, Peaks};
use llava_engine::profile::{OpRecord, Records};
use llava_engine::tensor::Tensor;

use super::{Args, Subject};

/// The least time that `work` takes on a machine of such peaks: weights and cache read once, or all arithmetic, whichever is longer.
fn limit_ms(work: &OpRecord, peaks: &Peaks, stored: DType) -> Option<f64> {
    Some(f64::max(work.stored_bytes / peaks.read_gbps / 1e6, work.arithmetic_ms(peaks, stored)?))
}

/// What all ops have done so far.
pub fn so_far(records: &Records) -> OpRecord {
    OpRecord::sum(records.snapshot().into_iter().map(|(_, record)| record))
}

/// One run of a phase.
pub struct Run {
    pub ms: f64,
    pub work: OpRecord,
    /// The mean of those right before and right after it.
    pub peaks: Peaks,
}

/// All runs of a phase.
pub struct Phase {
    pub name: &'static str,
    /// Sequences that run together.
    pub batch_size: usize,
    /// Tokens that a run works on or makes, of all sequences.
    pub tokens: usize,
    /// Tokens in the cache of each sequence when it ends.
    pub context: usize,
    pub runs: Vec<Run>,
}

impl Phase {
    /// Times of its runs from the fastest to the slowest.
    pub fn sorted_ms(&self) -> Vec<f64> {
        sorted(self.runs.iter().map(|r| r.ms))
    }

    /// The median of the times that its runs would have taken at the peaks probed beside them.
    pub fn limit_ms(&self, stored: DType) -> Option<f64> {
        median(self.runs.iter().filter_map(|run| limit_ms(&run.work, &run.peaks, stored)))
    }

    /// The median share of that limit, in percent: each run against its own.
    pub fn percent_of_limit(&self, stored: DType) -> Option<f64> {
        median(self.runs.iter().filter_map(|run| Some(limit_ms(&run.work, &run.peaks, stored)? / run.ms * 100.0)))
    }
}

/// From the smallest to the largest.
pub fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let values = sorted(values);
    values.get(values.len() / 2).copied()
}

/// A device's peaks, probed when the last run was over.
pub struct Probed(Peaks);

impl Probed {
    /// Before the first run.
    pub fn new(ops: &dyn Ops) -> Result<Self> {
        Ok(Self(ops.measure_peaks()?))
    }

    /// Those of the run that is just over: the mean of those before and after it.
    pub fn of_run(&mut self, ops: &dyn Ops) -> Result<Peaks> {
        let after = ops.measure_peaks()?;
        Ok(std::mem::replace(&mut self.0, after).zip_with(&self.0, |a, b| (a + b) / 2.0))
    }
}

/// Times runs of one subject.
struct Stopwatch<'a> {
    subject: &'a mut Subject,
    probed: Probed,
}

impl Stopwatch<'_> {
    /// Runs `work`, which must wait for its own results, as a run of `phase`.
    fn time(&mut self, phase: &mut Phase, work: impl FnOnce(&mut Runner) -> Result<()>) -> Result<()> {
        let before = so_far(&self.subject.records);
        let start = Instant::now();
        work(&mut self.subject.runner)?;
        let ms = start.elapsed().as_secs_f64() * 1e3;
        let work = so_far(&self.subject.records).since(before);
        let peaks = self.probed.of_run(self.subject.runner.ops())?;
        phase.runs.push(Run { ms, work, peaks });
        Ok(())
    }
}

/// Tells whoever waits at a terminal, for minutes with a large model, what is going on.
pub fn say(what: &str) {
    if std::io::stderr().is_terminal() {
        eprintln!("llava-engine: {what}");
    }
}

/// Pixel values `[n_images, 3, image_size, image_size]` of no picture.
pub fn made_up_pixels(n_images: usize, config: &LlavaConfig) -> Tensor {
    let side = config.vision.image_size;
    let shape = [n_images, 3, side, side];
    let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| (i * 7919 % 4093) as f32 / 2046.5 - 1.0).collect();
    Tensor::from_slice(&shape, &values)
}

/// A token of no text.
pub fn made_up_token(i: usize, config: &LlavaConfig) -> u32 {
    (i * 31 % config.text.vocab_size) as u32
}

/// A prompt of `n` tokens, those of a picture in its middle, or as many of these as it has room for.
pub fn made_up_prompt(n: usize, config: &LlavaConfig) -> Vec<Slot> {
    let image_tokens = config.tokens_per_image();
    let slot = |i: usize| match i.checked_sub(n.saturating_sub(image_tokens) / 2) {
        Some(feature_row) if feature_row < image_tokens => Slot::Image { feature_row },
        _ => Slot::Token(made_up_token(i, config)),
    };
    (0..n).map(slot).collect()
}

/// Runs every phase as often as `args` say, in turn: encoding one picture, reading one prompt with it, and decoding, for each batch size.
pub fn measure(args: &Args, subject: &mut Subject) -> Result<Vec<Phase>> {
    let config = subject.runner.model().config().clone();
    let (prompt, new) = (args.prompt_tokens, args.new_tokens);
    let slots = made_up_prompt(prompt, &config);
    let pixels = subject.runner.ops().upload(made_up_pixels(1, &config))?;
    let phase = |name, batch_size, tokens, context| Phase { name, batch_size, tokens, context, runs: Vec::new() };
    let mut encode = phase("encode", 1, config.tokens_per_image(), 0);
    let mut prefill = phase("prefill", 1, prompt, prompt);
    let decode = |&n: &usize| phase("decode", n, n * (new - 1), prompt + new - 1);
    let mut decodes: Vec<_> = args.batch_size.iter().map(decode).collect();

    // Each sequence has read its prompt by itself, so that no two share memory; all but the first do so once for all runs.
    let most = decodes.iter().map(|d| d.batch_size).max().unwrap_or(1);
    let mut tables: Vec<PageTable> = (0..most).map(|_| subject.runner.kv().sequence()).collect();
    let features = subject.runner.encode(&pixels)?;
    for (i, table) in tables.iter_mut().enumerate().skip(1) {
        say(&format!("prompt of sequence {} of {most}", i + 1));
        subject.runner.extend(table, 0, &slots, Some(&features), prompt - 1, |_| {})?;
    }
    // A device does what it is asked in that order: when this has come from it, all before is done.
    let mark = subject.runner.ops().alloc(&[1], DType::F32)?;
    let probed = Probed::new(subject.runner.ops())?;
    let mut stopwatch = Stopwatch { subject, probed };
    for i in 0..args.repeat {
        say(&format!("run {} of {}", i + 1, args.repeat));
        let mut features = None;
        stopwatch.time(&mut encode, |runner| {
            features = Some(runner.encode(&pixels)?);
            runner.ops().download(&mark).map(drop)
        })?;
        stopwatch.time(&mut prefill, |runner| runner.extend(&mut tables[0], 0, &slots, features.as_ref(), prompt - 1, |_| {}))?;
        for decode in &mut decodes {
            let tables = &mut tables[..decode.batch_size];
            stopwatch.time(decode, |runner| {
                (0..new - 1).try_for_each(|i| {
                    let step = |table| Step { table, past: prompt + i, token: made_up_token(i, &config) };
                    runner.step(&mut tables.iter_mut().map(step).collect::<Vec<_>>(), |_| {})
                })
            })?;
        }
    }
    Ok([encode, prefill].into_iter().chain(decodes).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use llava_engine::ops::{ArithmeticPeak, Operands};

    #[test]
    fn the_limit_is_the_slower_of_memory_and_arithmetic() {
        let peak = |operands, gflops| ArithmeticPeak { operands, how: "test".into(), gflops };
        let arithmetic = vec![peak(Operands::Float(DType::F32), 100.0), peak(Operands::Int8, 400.0)];
        let peaks = Peaks { read_gbps: 10.0, arithmetic };
        let limit = |stored_bytes, flops, packed_flops| -> Option<f64> {
            let work = OpRecord { bytes: 9e9, stored_bytes, flops, packed_flops, ..OpRecord::default() };
            limit_ms(&work, &peaks, DType::F16)
        };
        assert_eq!(limit(5e6, 1e6, 0.0), Some(0.5));
        assert_eq!(limit(5e6, 1e9, 0.0), Some(10.0));
        assert_eq!(limit(5e6, 1e9, 8e8), Some(4.0));
    }
}
