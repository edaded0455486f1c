//! Answering a prompt, token by token.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::error::{Error, Result};
use crate::image::RgbImage;
use crate::infer::lookup::{self, MAX_DRAFT};
use crate::infer::runner::Runner;
use crate::infer::sampler::{Sampler, SamplingOptions};
use crate::model::Slot;
use crate::text::{Prompt, StopMatcher, StreamDecoder};

use super::{Engine, Session};

/// How an answer is made.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// How tokens are chosen.
    pub sampling: SamplingOptions,
    /// Longest answer in tokens; the context may end it sooner.
    pub max_new_tokens: usize,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Whether the end token is ignored, so that an answer has just `max_new_tokens`: for measurements.
    pub ignore_eos: bool,
    /// Tokens to guess from what was said before and to check in one pass, at most [`MAX_DRAFT`]; 0 for none. The answer is the same.
    pub prompt_lookup: usize,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { sampling: SamplingOptions::default(), max_new_tokens: 512, stop: Vec::new(), ignore_eos: false, prompt_lookup: 0 }
    }
}

impl GenerateOptions {
    /// Refuses what makes no sense.
    ///
    /// # Errors
    /// [`Error::Usage`], by the names of the command line.
    pub fn validate(&self) -> Result<()> {
        self.sampling.validate()?;
        if self.max_new_tokens == 0 {
            return Err(Error::usage("an answer of 0 tokens: --max-new-tokens (max_new_tokens) must be at least 1"));
        }
        if self.prompt_lookup > MAX_DRAFT {
            let problem = format!("at most {MAX_DRAFT} tokens are guessed at a time");
            return Err(Error::usage(format!("--prompt-lookup {} (prompt_lookup): {problem}", self.prompt_lookup)));
        }
        Ok(())
    }
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// The model said that it was done, or a stop text came.
    Stop,
    /// It reached the longest answer or the end of the context.
    Length,
    /// It was cancelled.
    Cancelled,
}

/// What was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Usage {
    /// Positions of the prompt, those of images included.
    pub prompt_tokens: usize,
    /// Positions that come from images.
    pub image_tokens: usize,
    /// Tokens of the answer, the end token included.
    pub completion_tokens: usize,
    /// Of prompt lookup, if it was asked for.
    #[serde(flatten)]
    pub drafts: Option<Drafts>,
}

/// What prompt lookup has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Drafts {
    /// Tokens that were guessed.
    pub drafted_tokens: usize,
    /// Those of them that were right.
    pub accepted_tokens: usize,
}

/// What was timed.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Timings {
    /// Opening the model.
    pub load_ms: f64,
    /// Preprocessing of the images.
    pub image_ms: f64,
    /// Vision tower and projector.
    pub encode_ms: f64,
    /// Prompt.
    pub prefill_ms: f64,
    /// All tokens after the first.
    pub decode_ms: f64,
    /// Prompt positions that were run, per second.
    pub prefill_tokens_per_second: f64,
    /// Tokens after the first, per second; 0 if there were none.
    pub decode_tokens_per_second: f64,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Answer {
    /// What the model said, without stop texts.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Its tokens, with the end token if that ended it.
    pub token_ids: Vec<u32>,
    /// What was counted.
    pub usage: Usage,
    /// What was timed.
    pub timings: Timings,
}

impl Engine {
    /// Answers `prompt` about `images`; `on_text` is handed the answer as it comes, in whole characters, and may end it.
    ///
    /// # Errors
    /// Before any work: if the prompt does not fit the images or the context, or an option makes no sense.
    pub fn generate(
        &mut self,
        prompt: &Prompt,
        images: &[RgbImage],
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Answer> {
        let mut session = self.session();
        self.generate_in(&mut session, prompt, images, options, on_text)
    }

    /// As [`Engine::generate`], in a conversation whose earlier turns are cached: `prompt` is the whole conversation.
    pub fn generate_in(
        &mut self,
        session: &mut Session,
        prompt: &Prompt,
        images: &[RgbImage],
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Answer> {
        let prompt = self.tokenize(prompt, images.len())?;
        options.validate()?;
        let occurred = prompt.slots.iter().filter_map(|s| if let Slot::Token(id) = s { Some(*id) } else { None });
        let vocab = self.config().text.vocab_size;
        let mut sampler = Sampler::new(options.sampling.clone(), self.runner.ops(), vocab, occurred)?;
        self.runner.cancel_flag().store(false, Ordering::Relaxed);

        let (image_ms, encode_ms) = match self.set_images(session, images) {
            Err(Error::Cancelled) => return Ok(self.cancelled(&prompt)),
            times => times?,
        };
        let prefill_start = Instant::now();
        let reused = session.reuse(&prompt.slots);
        let new = &prompt.slots[reused..];
        let first = match advance(&mut self.runner, session, new, &[], &mut sampler) {
            Err(Error::Cancelled) => return Ok(self.cancelled(&prompt)),
            first => first?[0],
        };
        let prefill_ms = prefill_start.elapsed().as_secs_f64() * 1e3;

        let decode_start = Instant::now();
        let max_new_tokens = options.max_new_tokens.min(self.config().context_tokens - prompt.slots.len());
        let drafts = (options.prompt_lookup > 0).then(Drafts::default);
        let mut usage = Usage { prompt_tokens: prompt.slots.len(), image_tokens: prompt.image_tokens, drafts, ..Usage::default() };
        let said = self.decode(session, &mut sampler, first, max_new_tokens, options, &mut usage, on_text)?;
        let (text, token_ids, finish_reason) = said;
        let decode_ms = decode_start.elapsed().as_secs_f64() * 1e3;
        let per_second = |n: usize, ms: f64| if n == 0 { 0.0 } else { n as f64 / ms * 1e3 };
        Ok(Answer {
            text,
            finish_reason,
            usage,
            timings: Timings {
                load_ms: self.load_ms,
                image_ms,
                encode_ms,
                prefill_ms,
                decode_ms,
                prefill_tokens_per_second: per_second(new.len(), prefill_ms),
                decode_tokens_per_second: per_second(token_ids.len().saturating_sub(1), decode_ms),
            },
            token_ids,
        })
    }

    /// Goes on from the `first` token until something ends the answer: (text, tokens, why it ended). Counts tokens in `usage`.
    #[allow(clippy::too_many_arguments)] // the state of one answer
    fn decode(
        &mut self,
        session: &mut Session,
        sampler: &mut Sampler,
        first: u32,
        max_new_tokens: usize,
        options: &GenerateOptions,
        usage: &mut Usage,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<(String, Vec<u32>, FinishReason)> {
        let mut stops = StopMatcher::new(options.stop.clone());
        let mut token_ids = Vec::new();
        let mut text = String::new();
        let mut emit = |piece: String| {
            text.push_str(&piece);
            if piece.is_empty() { ControlFlow::Continue(()) } else { on_text(&piece) }
        };
        // The decoder borrows the tokenizer while the runner works: they are different parts of the engine.
        let Self { runner, tokenizer, eos_token_ids, .. } = self;
        let mut decoder = StreamDecoder::new(tokenizer);
        let mut drawn = VecDeque::from([first]);
        let reason = loop {
            let id = drawn.pop_front().expect("each pass draws a token");
            token_ids.push(id);
            if eos_token_ids.contains(&id) && !options.ignore_eos {
                break FinishReason::Stop;
            }
            let (piece, stopped) = stops.push(&decoder.push(id));
            let flow = emit(piece);
            if stopped {
                break FinishReason::Stop;
            }
            if flow.is_break() {
                break FinishReason::Cancelled;
            }
            if token_ids.len() == max_new_tokens {
                break FinishReason::Length;
            }
            if drawn.is_empty() {
                // The answer is not to be longer than it may be: that much of a draft would be in vain.
                let n = options.prompt_lookup.min(max_new_tokens - token_ids.len() - 1);
                let draft = if n == 0 { Vec::new() } else { lookup::draft(&[&session.cached[..], &[Slot::Token(id)]].concat(), n) };
                drawn = match advance(runner, session, &[Slot::Token(id)], &draft, sampler) {
                    Err(Error::Cancelled) => break FinishReason::Cancelled,
                    next => next?.into(),
                };
                if let Some(drafts) = &mut usage.drafts {
                    drafts.drafted_tokens += draft.len();
                    drafts.accepted_tokens += drawn.len() - 1;
                }
            }
        };
        usage.completion_tokens = token_ids.len();
        if !stops.stopped() {
            let (piece, stopped) = stops.push(&decoder.finish());
            let _ = emit(piece);
            if !stopped {
                let _ = emit(stops.finish());
            }
        }
        Ok((text, token_ids, reason))
    }

    /// The answer of a run that was cancelled before its first token.
    fn cancelled(&self, prompt: &super::TokenizedPrompt) -> Answer {
        Answer {
            text: String::new(),
            finish_reason: FinishReason::Cancelled,
            token_ids: Vec::new(),
            usage: Usage { prompt_tokens: prompt.slots.len(), image_tokens: prompt.image_tokens, ..Usage::default() },
            timings: Timings { load_ms: self.load_ms, ..Timings::default() },
        }
    }
}

/// Runs `slots` after what `session` has cached, and then the guesses of `draft`; the tokens that follow, which are one more than guesses
/// were right.
fn advance(runner: &mut Runner, session: &mut Session, slots: &[Slot], draft: &[Slot], sampler: &mut Sampler) -> Result<Vec<u32>> {
    let Session { table, cached, features, .. } = session;
    let all = [slots, draft].concat();
    let next = runner.next_tokens(table, cached.len(), &all, draft.len(), features.as_ref(), sampler)?;
    // What was cached for wrong guesses is overwritten by what comes in their place.
    cached.extend_from_slice(&all[..slots.len() + next.len() - 1]);
    Ok(next)
}
