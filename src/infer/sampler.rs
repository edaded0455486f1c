//! From logits to the next token: greedy, or drawn after penalty, temperature, top-k, top-p and min-p.

use rand_pcg::Pcg64;
use rand_pcg::rand_core::{Rng, SeedableRng};

use crate::error::{Error, Result};

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

/// Chooses tokens; holds the state of the draws and which tokens have occurred.
pub struct Sampler {
    options: SamplingOptions,
    rng: Pcg64,
    /// Whether each token of the vocabulary has occurred in prompt or answer.
    seen: Vec<bool>,
    /// Tokens still in the draw, with their logits; kept to be re-used.
    candidates: Vec<(u32, f32)>,
}

impl Sampler {
    /// A sampler that starts at the seed of `options`.
    pub fn new(options: SamplingOptions) -> Result<Self> {
        options.validate()?;
        let rng = Pcg64::seed_from_u64(options.seed);
        Ok(Self { options, rng, seen: Vec::new(), candidates: Vec::new() })
    }

    /// Counts tokens as having occurred.
    pub fn observe(&mut self, ids: impl IntoIterator<Item = u32>) {
        for id in ids {
            let id = id as usize;
            if id >= self.seen.len() {
                self.seen.resize(id + 1, false);
            }
            self.seen[id] = true;
        }
    }

    /// The next token for `logits` `[vocab]`, in the order of HF's `generate`: penalty, temperature, top-k, top-p, min-p, draw.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        if let Some(bad) = logits.iter().find(|l| l.is_nan()) {
            return Err(Error::Unsupported(format!(
                "the model gave {bad} for a logit: its weights or the chosen dtype do not work"
            )));
        }
        self.candidates.clear();
        self.candidates.extend((0u32..).zip(logits.iter().copied()));
        let penalty = self.options.repetition_penalty;
        if penalty != 1.0 {
            for ((_, logit), _) in self.candidates.iter_mut().zip(&self.seen).filter(|(_, seen)| **seen) {
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
        let id = if self.options.temperature == 0.0 { self.most_probable() } else { self.draw() };
        self.observe([id]);
        Ok(id)
    }

    /// The first of the largest logits, as the reference's argmax.
    fn most_probable(&self) -> u32 {
        let first = self.candidates[0];
        self.candidates.iter().fold(first, |best, &c| if c.1 > best.1 { c } else { best }).0
    }

    fn draw(&mut self) -> u32 {
        let SamplingOptions { temperature, top_k, top_p, min_p, .. } = self.options;
        let candidates = &mut self.candidates;
        let by_logit = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, by_logit);
            candidates.truncate(top_k);
        }
        candidates.sort_unstable_by(by_logit);
        // p_i = exp((l_i − max) / T) / Σ, kept as weights relative to the most probable token
        let max = candidates[0].1;
        for c in candidates.iter_mut() {
            c.1 = ((c.1 - max) / temperature).exp();
        }
        if top_p < 1.0 {
            let enough = f64::from(top_p) * total(candidates);
            let mut sum = 0.0;
            let kept = candidates.iter().position(|c| {
                sum += f64::from(c.1);
                sum >= enough
            });
            candidates.truncate(kept.map_or(candidates.len(), |i| i + 1));
        }
        if min_p > 0.0 {
            candidates.retain(|c| c.1 >= min_p); // the most probable one has weight 1
        }
        // 53 random bits make a uniform number in [0, 1).
        let mut left = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * total(candidates);
        let chosen = candidates.iter().find(|c| {
            left -= f64::from(c.1);
            left < 0.0
        });
        chosen.unwrap_or(&candidates[0]).0
    }
}

fn total(candidates: &[(u32, f32)]) -> f64 {
    candidates.iter().map(|c| f64::from(c.1)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(options: SamplingOptions, logits: &[f32], n: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(options).unwrap();
        let mut counts = vec![0; logits.len()];
        for _ in 0..n {
            sampler.seen.clear();
            counts[sampler.sample(logits).unwrap() as usize] += 1;
        }
        counts
    }

    const LOGITS: [f32; 4] = [0.0, 2.0, 1.0, -1.0];

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let mut sampler = Sampler::new(SamplingOptions::greedy()).unwrap();
        assert_eq!(sampler.sample(&[1.0, 3.0, 3.0, 2.0]).unwrap(), 1);
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
        let mut sampler = Sampler::new(options.clone()).unwrap();
        let picks: Vec<_> = (0..3).map(|_| sampler.sample(&[1.0, 2.0, 1.5]).unwrap()).collect();
        assert_eq!(picks, [1, 2, 0]);
        let mut sampler = Sampler::new(options).unwrap();
        sampler.observe([0]);
        assert_eq!(sampler.sample(&[-1.0, -2.0]).unwrap(), 1);
    }

    #[test]
    fn a_seed_gives_the_same_draws_and_another_does_not() {
        let draws = |seed| {
            let mut s = Sampler::new(SamplingOptions { temperature: 1.0, seed, ..Default::default() }).unwrap();
            (0..32).map(|_| s.sample(&LOGITS).unwrap()).collect::<Vec<_>>()
        };
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
            assert!(Sampler::new(options).err().unwrap().to_string().contains(name));
        }
    }

    #[test]
    fn a_model_that_fails_is_reported() {
        let mut sampler = Sampler::new(SamplingOptions::greedy()).unwrap();
        assert!(sampler.sample(&[0.0, f32::NAN]).is_err());
    }
}
