//! [`Example`]: a conversation with its answers, as a model sees it that is calibrated, judged or taught by it.

use crate::error::{Error, Result};
use crate::image::RgbImage;
use crate::model::Slot;
use crate::tensor::Tensor;

use super::{Engine, Turn};

/// A whole conversation in the model's positions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// What stands at each position.
    pub slots: Vec<Slot>,
    /// Which of the positions are of an answer, `[slots]`: its words, and the token that the template ends it with.
    pub is_answer: Vec<bool>,
}

impl Example {
    /// The token at a position, if an answer says it.
    pub fn answer(&self, position: usize) -> Option<u32> {
        match self.slots.get(position) {
            Some(Slot::Token(id)) if self.is_answer[position] => Some(*id),
            _ => None,
        }
    }

    /// The first position of an answer.
    pub fn first_answer(&self) -> Option<usize> {
        self.is_answer.iter().position(|is| *is)
    }

    /// How many positions are of answers.
    pub fn n_answer_tokens(&self) -> usize {
        self.is_answer.iter().filter(|is| **is).count()
    }
}

impl Engine {
    /// Lays a conversation out that ends with an answer, with `n_images` pictures; `system` stands instead of the template's own system prompt.
    ///
    /// An answer begins where the tokens of the prompt before it end, and ends where the tokens of the conversation up to it do; white
    /// space that the template puts after it belongs to nobody and is left out at the end.
    ///
    /// # Errors
    /// As [`Engine::tokenize`]; if the conversation does not end with an answer, or one of its answers has no token of its own.
    pub fn example(&self, system: Option<&str>, turns: &[Turn], n_images: usize) -> Result<Example> {
        if turns.last().is_none_or(|t| !t.is_answer) {
            return Err(Error::usage("the conversation does not end with an answer"));
        }
        let slots = self.slots_of(system, turns, n_images)?;
        let mut is_answer = vec![false; slots.len()];
        for (i, turn) in turns.iter().enumerate().filter(|(_, turn)| turn.is_answer) {
            let n_images = turns[..i].iter().map(|t| t.n_images).sum();
            let shared = |turns: &[Turn]| {
                Ok::<_, Error>(self.slots_of(system, turns, n_images)?.iter().zip(&slots).take_while(|(a, b)| a == b).count())
            };
            let (start, end) = (shared(&turns[..i])?, shared(&turns[..=i])?);
            if start >= end {
                let problem = format!("the answer {:?} has no tokens of its own in this template", turn.text);
                return Err(Error::template(self.template_name(), problem));
            }
            is_answer[start..end].fill(true);
        }
        Ok(Example { slots, is_answer })
    }

    /// Positions of a conversation, without white space at its end.
    fn slots_of(&self, system: Option<&str>, turns: &[Turn], n_images: usize) -> Result<Vec<Slot>> {
        let mut slots = self.tokenize(&self.render(system, turns)?, n_images)?.slots;
        let is_space = |slot: &Slot| matches!(slot, Slot::Token(id) if !self.tokenizer.is_special(*id) && self.tokenizer.decode(&[*id]).trim().is_empty());
        // Of a prompt it stays: it is what the answer follows.
        if turns.last().is_some_and(|turn| turn.is_answer) {
            slots.truncate(slots.iter().rposition(|slot| !is_space(slot)).map_or(0, |last| last + 1));
        }
        Ok(slots)
    }

    /// Features of `images`; none of none.
    fn features(&mut self, images: &[RgbImage]) -> Result<Option<Tensor>> {
        if images.is_empty() {
            return Ok(None);
        }
        let pixels = self.preprocess(images)?;
        self.encode_image(&pixels).map(Some)
    }

    /// The decoder's input for an example with these pictures: embeddings and image features, f32 `[slots, hidden]` on the host.
    pub fn input_embeds(&mut self, example: &Example, images: &[RgbImage]) -> Result<Tensor> {
        let features = self.features(images)?;
        self.runner.embed(&example.slots, features.as_ref())
    }

    /// Hands the logits `[vocab]` that predict each token of an answer to `take`, in order, with that token.
    ///
    /// # Errors
    /// If the pictures do not fit; if there is a NaN among the logits.
    pub fn answer_logits(&mut self, example: &Example, images: &[RgbImage], mut take: impl FnMut(u32, &[f32])) -> Result<()> {
        let Some(first) = example.first_answer() else { return Ok(()) };
        let features = self.features(images)?;
        let mut position = first;
        self.logits(&example.slots[..example.slots.len() - 1], features.as_ref(), first - 1, |logits| {
            if let Some(token) = example.answer(position) {
                take(token, logits);
            }
            position += 1;
        })
    }
}
