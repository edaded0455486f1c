//! From logits to the next token: how it is chosen, and what is remembered from one token of an answer to the next.

use rand_pcg::Pcg64;
use rand_pcg::rand_core::{Rng, SeedableRng};

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::{Draw, Ops, RowCopy};
use crate::tensor::Tensor;

/// How tokens are chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingOptions {
    /// Divides the logits; 0 takes the most probable token, always.
    pub temperature: f32,
    /// Keeps this many of the most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the most probable tokens that together reach this probability; 1 keeps all.
    pub top_p: f32,
    /// Drops tokens less probable than this share of the most probable one; 0 drops none.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens that have occurred; 1 changes none (Keskar et al., arXiv 1909.05858).
    pub repetition_penalty: f32,
    /// Seed of the draws: the same seed and prompt give the same answer.
    pub seed: u64,
}

impl Default for SamplingOptions {
    /// LLaVA's own: temperature 0.2 and no filters.
    fn default() -> Self {
        Self { temperature: 0.2, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

impl SamplingOptions {
    /// The most probable token, always.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Refuses values that mean nothing, and says what is accepted.
    pub fn validate(&self) -> Result<()> {
        let check = |name: &str, value: f32, ok: bool, accepted: &str| {
            if ok { Ok(()) } else { Err(Error::usage(format!("{name} {value} makes no sense: it must be {accepted}"))) }
        };
        let Self { temperature, top_p, min_p, repetition_penalty, .. } = *self;
        check("temperature", temperature, temperature.is_finite() && temperature >= 0.0, "0 or more")?;
        check("top-p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1")?;
        check("min-p", min_p, (0.0..=1.0).contains(&min_p), "between 0 and 1")?;
        check("repetition penalty", repetition_penalty, repetition_penalty.is_finite() && repetition_penalty > 0.0, "above 0")
    }
}

/// The state of one answer: its draws, and which tokens have occurred. The choice itself is the device's ([`Ops::sample`]).
pub struct Sampler {
    options: SamplingOptions,
    rng: Pcg64,
    /// The token drawn last, i32 `[1]`, on the device.
    ids: Tensor,
    /// A bit for each token of the vocabulary that has occurred in prompt or answer, i32 `[1, ⌈vocab/32⌉]`, on the device.
    seen: Tensor,
    /// One row of logits, f32 `[1, vocab]`, where they come several at a time.
    row: Option<Tensor>,
}

impl Sampler {
    /// A sampler on a device that starts at the seed of `options`, for a vocabulary of `vocab` tokens; those of the prompt have `occurred`.
    ///
    /// # Errors
    /// If an option makes no sense.
    pub fn new(options: SamplingOptions, ops: &dyn Ops, vocab: usize, occurred: impl IntoIterator<Item = u32>) -> Result<Self> {
        options.validate()?;
        let mut seen = vec![0i32; vocab.div_ceil(32)];
        for id in occurred {
            // One outside of the vocabulary cannot occur again.
            if let Some(word) = seen.get_mut(id as usize / 32) {
                *word |= 1 << (id % 32);
            }
        }
        let rng = Pcg64::seed_from_u64(options.seed);
        let seen = ops.upload(Tensor::from_slice(&[1, seen.len()], &seen))?;
        Ok(Self { options, rng, ids: ops.alloc(&[1], DType::I32)?, seen, row: None })
    }

    /// The next token for a row of `logits` f32 `[rows, vocab]`, which are on the device and stay there.
    ///
    /// # Errors
    /// If there is a NaN in it.
    pub fn sample(&mut self, ops: &dyn Ops, logits: &Tensor, row: usize) -> Result<u32> {
        let logits = if logits.rows() == 1 {
            logits
        } else {
            let mut one = self.row.take().map_or_else(|| ops.alloc(&[1, logits.row_len()], DType::F32), Ok)?;
            ops.copy_rows(&mut one, logits, &[RowCopy { dst: 0, src: row, n_rows: 1 }])?;
            self.row.insert(one)
        };
        let SamplingOptions { temperature, top_k, top_p, min_p, repetition_penalty, seed: _ } = self.options;
        let draw = Draw { repetition_penalty, temperature, top_k, top_p, min_p, random: self.rng.next_u64() };
        ops.sample(&mut self.ids, logits, &mut self.seen, &[draw])?;
        u32::try_from(ops.download_i32(&self.ids)?[0]).map_err(|_| nan_logits())
    }
}

/// The error of logits with a NaN among them.
pub fn nan_logits() -> Error {
    Error::Unsupported(
        "the model gave NaN for a logit: its weights or the chosen dtype do not work; --check-nan names the layer that it comes from"
            .into(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Cpu;

    /// `n` tokens drawn from the same logits, on the CPU, after `occurred`.
    fn draws(options: SamplingOptions, occurred: &[u32], logits: &[f32], n: usize) -> Result<Vec<u32>> {
        let cpu = Cpu::new(1, DType::F32)?;
        let mut sampler = Sampler::new(options, &cpu, logits.len(), occurred.iter().copied())?;
        let logits = Tensor::from_slice(&[1, logits.len()], logits);
        (0..n).map(|_| sampler.sample(&cpu, &logits, 0)).collect()
    }

    fn counts(options: SamplingOptions, logits: &[f32], n: usize) -> Vec<usize> {
        let mut counts = vec![0; logits.len()];
        draws(options, &[], logits, n).unwrap().into_iter().for_each(|id| counts[id as usize] += 1);
        counts
    }

    const LOGITS: [f32; 4] = [0.0, 2.0, 1.0, -1.0];

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(draws(SamplingOptions::greedy(), &[], &[1.0, 3.0, 3.0, 2.0], 1).unwrap(), [1]);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let options = SamplingOptions { temperature: 1.0, ..Default::default() };
        let n = 200_000;
        let counts = counts(options, &LOGITS, n);
        let sum: f64 = LOGITS.iter().map(|&l| f64::from(l).exp()).sum();
        for (count, logit) in counts.iter().zip(LOGITS) {
            let p = f64::from(logit).exp() / sum;
            let sigma = (p * (1.0 - p) / n as f64).sqrt();
            assert!((*count as f64 / n as f64 - p).abs() < 5.0 * sigma, "{counts:?}, expected {p}");
        }
    }

    #[test]
    fn filters_keep_what_they_say() {
        let base = SamplingOptions { temperature: 1.0, ..Default::default() };
        let kept = |options| counts(options, &LOGITS, 20_000).iter().map(|&c| c > 0).collect::<Vec<_>>();
        // probabilities 0.0871, 0.6439, 0.2369, 0.0321
        assert_eq!(kept(SamplingOptions { top_k: 2, ..base.clone() }), [false, true, true, false]);
        assert_eq!(kept(SamplingOptions { top_p: 0.64, ..base.clone() }), [false, true, false, false]);
        assert_eq!(kept(SamplingOptions { top_p: 0.65, ..base.clone() }), [false, true, true, false]);
        assert_eq!(kept(SamplingOptions { top_p: 0.9, ..base.clone() }), [true, true, true, false]);
        assert_eq!(kept(SamplingOptions { min_p: 0.3, ..base.clone() }), [false, true, true, false]);
        assert_eq!(kept(SamplingOptions { min_p: 0.1, ..base }), [true, true, true, false]);
    }

    #[test]
    fn temperature_sharpens() {
        let at = |temperature| counts(SamplingOptions { temperature, ..Default::default() }, &LOGITS, 20_000)[1];
        assert!(at(0.2) > 19_600 && at(1.0) < 14_000 && at(5.0) < 9_000);
    }

    #[test]
    fn the_penalty_makes_seen_tokens_less_likely_whatever_their_sign() {
        let options = SamplingOptions { repetition_penalty: 3.0, ..SamplingOptions::greedy() };
        assert_eq!(draws(options.clone(), &[], &[1.0, 2.0, 1.5], 3).unwrap(), [1, 2, 0]);
        assert_eq!(draws(options, &[0, 7], &[-1.0, -2.0], 1).unwrap(), [1]);
    }

    #[test]
    fn a_seed_gives_the_same_draws_and_another_does_not() {
        let draws = |seed| draws(SamplingOptions { temperature: 1.0, seed, ..Default::default() }, &[], &LOGITS, 32).unwrap();
        assert_eq!(draws(7), draws(7));
        assert_ne!(draws(7), draws(8));
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for (options, name) in [
            (SamplingOptions { temperature: -1.0, ..Default::default() }, "temperature -1"),
            (SamplingOptions { temperature: f32::NAN, ..Default::default() }, "temperature NaN"),
            (SamplingOptions { top_p: 0.0, ..Default::default() }, "top-p 0"),
            (SamplingOptions { min_p: 1.5, ..Default::default() }, "min-p 1.5"),
            (SamplingOptions { repetition_penalty: 0.0, ..Default::default() }, "repetition penalty 0"),
        ] {
            assert!(draws(options, &[], &LOGITS, 1).unwrap_err().to_string().contains(name));
        }
    }

    #[test]
    fn a_model_that_fails_is_reported() {
        let error = draws(SamplingOptions::greedy(), &[], &[0.0, f32::NAN], 1).unwrap_err();
        assert!(error.to_string().contains("NaN"), "{error}");
    }
}
