//! How probable a prompt is to the model, token by token.

use crate::error::Result;
use crate::image::RgbImage;
use crate::infer::sampler::nan_logits;
use crate::model::Slot;
use crate::tensor::Tensor;
use crate::text::Prompt;

use super::Engine;

/// Id that stands for an image position in models whose vocabulary has none (`IMAGE_TOKEN_INDEX` of the original LLaVA).
pub const IMAGE_TOKEN_INDEX: i64 = -200;

/// What a model makes of a prompt.
#[derive(Debug)]
pub struct Score {
    /// Ids `[tokens]`; image positions have the checkpoint's image token id, or -200 where it has none.
    pub input_ids: Vec<i64>,
    /// Which positions are an image's, `[tokens]`. Their ids do not tell: a prompt may name the image token as text.
    pub is_image: Vec<bool>,
    /// f32 `[images, 3, h, w]`, if there are images.
    pub pixel_values: Option<Tensor>,
    /// f32 `[image tokens, hidden]`, if there are images.
    pub image_features: Option<Tensor>,
    /// log p of each token given those before it, `[tokens − 1]`; 0 where an image position has no id in the vocabulary.
    pub logprobs: Vec<f32>,
    /// Logits after the last token, `[vocab]`.
    pub last_logits: Vec<f32>,
}

impl Score {
    /// Sum of the log-probabilities of tokens of text, and how many they are.
    ///
    /// The first token follows nothing and has none. Image positions do not count: no model is trained to predict their id, so that
    /// what it thinks of them says nothing about the text.
    pub fn text_sum(&self) -> (f64, usize) {
        let text = self.is_image.iter().skip(1).zip(&self.logprobs).filter(|(is_image, _)| !**is_image);
        text.fold((0.0, 0), |(sum, n), (_, &logprob)| (sum + f64::from(logprob), n + 1))
    }
}

/// log Σ exp(l_i), in f64: log p_i is l_i less that, and differences of large logits keep their digits.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
    f64::from(max) + sum.ln()
}

/// log p of a token.
fn log_softmax_at(logits: &[f32], token: usize) -> f32 {
    (f64::from(logits[token]) - log_sum_exp(logits)) as f32
}

impl Engine {
    /// Scores `prompt` with `images`.
    ///
    /// # Errors
    /// If the prompt is empty, or does not fit the images or the context; if there is a NaN among the logits.
    pub fn score(&mut self, prompt: &Prompt, images: &[RgbImage]) -> Result<Score> {
        let prompt = self.tokenize(prompt, images.len())?;
        let image_token = self.config().image_token_index.map_or(IMAGE_TOKEN_INDEX, i64::from);
        let id = |slot: &Slot| match slot {
            Slot::Token(id) => i64::from(*id),
            Slot::Image { .. } => image_token,
        };
        let input_ids: Vec<i64> = prompt.slots.iter().map(id).collect();
        let is_image = prompt.slots.iter().map(|slot| matches!(slot, Slot::Image { .. })).collect();
        let pixel_values = if images.is_empty() { None } else { Some(self.preprocess(images)?) };
        let image_features = pixel_values.as_ref().map(|pixels| self.encode_image(pixels)).transpose()?;
        let mut logprobs = Vec::with_capacity(input_ids.len());
        let mut last_logits = Vec::new();
        let mut targets = input_ids.iter().skip(1);
        self.logits(&prompt.slots, image_features.as_ref(), 0, |logits| match targets.next() {
            Some(&target) => {
                let target = usize::try_from(target).ok().filter(|&t| t < logits.len());
                logprobs.push(target.map_or(0.0, |t| log_softmax_at(logits, t)));
            }
            None => last_logits = logits.to_vec(),
        })?;
        let on_host = |tensor: Tensor| {
            let values = self.runner.ops().download(&tensor)?;
            Ok(Tensor::from_slice(tensor.shape(), &values))
        };
        let pixel_values = pixel_values.map(on_host).transpose()?;
        let image_features = image_features.map(on_host).transpose()?;
        Ok(Score { input_ids, is_image, pixel_values, image_features, logprobs, last_logits })
    }

    /// Runs `slots` from an empty cache and hands the logits `[vocab]` of each from `first_output` on to `take`.
    ///
    /// # Errors
    /// If there is a NaN among them.
    pub(super) fn logits(
        &mut self,
        slots: &[Slot],
        features: Option<&Tensor>,
        first_output: usize,
        mut take: impl FnMut(&[f32]),
    ) -> Result<()> {
        let mut table = self.runner.kv().sequence();
        let mut has_nan = false;
        self.runner.extend(&mut table, 0, slots, features, first_output, |logits| {
            has_nan |= logits.iter().any(|l| l.is_nan());
            take(logits);
        })?;
        if has_nan { Err(nan_logits()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(is_image: &[bool], logprobs: &[f32]) -> Score {
        Score {
            input_ids: vec![0; is_image.len()],
            is_image: is_image.to_vec(),
            pixel_values: None,
            image_features: None,
            logprobs: logprobs.to_vec(),
            last_logits: Vec::new(),
        }
    }

    #[test]
    fn the_sum_leaves_out_images_and_the_first_token() {
        assert_eq!(score(&[false, true, true, false, false], &[-9.0, -7.0, -1.0, -0.5]).text_sum(), (-1.5, 2));
        assert_eq!(score(&[true, false], &[-3.0]).text_sum(), (-3.0, 1));
        assert_eq!(score(&[false], &[]).text_sum(), (0.0, 0));
        assert_eq!(score(&[], &[]).text_sum(), (0.0, 0));
    }

    #[test]
    fn log_softmax_of_large_logits_is_finite() {
        assert!((log_softmax_at(&[1000.0, 1000.0], 0) + 2f32.ln()).abs() < 1e-6);
        assert!((log_softmax_at(&[0.0, 1.0, 2.0], 2) + 0.407_606).abs() < 1e-6);
    }
}
