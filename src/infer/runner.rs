//! A model on a device with its cache: runs prompts in chunks and answers token by token, of one sequence or of many together.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::kv::{KvCache, PAGE_TOKENS, PageTable};
use super::sampler::Sampler;
use crate::dtype::DType;
use crate::error::{Error, Result, size};
use crate::model::{Ctx, LlamaActs, Llava, Slot, Stage};
use crate::ops::{Ops, Span};
use crate::tensor::Tensor;

/// Tokens of a prompt that run at once. Each weight is read once per chunk, so that a chunk must be long against what compute and
/// memory bandwidth balance at; and its activations are all the memory that a long prompt takes beside its cache.
const CHUNK_TOKENS: usize = 1024;

/// What to do where a context is too long for a device's memory.
const LESS_CONTEXT: &str = "take a shorter --context, fewer sequences at once, or run with --device cpu";

/// Called at every stage of a forward pass.
pub type StageObserver = Box<dyn FnMut(Stage, &Tensor) + Send>;

/// The next token of a sequence.
pub struct Step<'a> {
    /// Where the sequence is cached.
    pub table: &'a mut PageTable,
    /// Tokens of it that are.
    pub past: usize,
    /// The token that follows them.
    pub token: u32,
}

/// A model, its device, its buffers and its KV cache.
pub struct Runner {
    ops: Box<dyn Ops>,
    model: Llava,
    acts: LlamaActs,
    kv: KvCache,
    cancel: Arc<AtomicBool>,
    observer: Option<StageObserver>,
}

impl Runner {
    /// A runner whose cache holds `n_contexts` whole contexts; `kv_dtype` is what keys and values are kept in.
    pub fn new(ops: Box<dyn Ops>, model: Llava, kv_dtype: DType, n_contexts: usize) -> Result<Self> {
        let config = model.config();
        let chunk = CHUNK_TOKENS.min(config.context_tokens).max(n_contexts);
        let acts = LlamaActs::plan(&*ops, &config.text, chunk)
            .map_err(|e| e.lacking_for(format_args!("buffers of {chunk} tokens at once"), LESS_CONTEXT))?;
        // Sequences share no page, so that each rounds up for itself.
        let tokens = config.context_tokens.next_multiple_of(PAGE_TOKENS).checked_mul(n_contexts);
        let tokens = tokens.ok_or_else(|| Error::usage(format!("{n_contexts} contexts at once are more than any memory holds")))?;
        let (n_layers, heads) = (config.text.n_layers, config.text.heads());
        let kv = KvCache::new(&*ops, n_layers, heads, tokens, kv_dtype).map_err(|e| {
            let bytes = size(KvCache::bytes_per_token(n_layers, heads, kv_dtype).saturating_mul(tokens));
            e.lacking_for(format_args!("a KV cache of {tokens} tokens ({bytes} in all)"), LESS_CONTEXT)
        })?;
        Ok(Self { ops, model, acts, kv, cancel: Arc::default(), observer: None })
    }

    /// The model.
    pub fn model(&self) -> &Llava {
        &self.model
    }

    /// The device.
    pub fn ops(&self) -> &dyn Ops {
        &*self.ops
    }

    /// The cache.
    pub fn kv(&self) -> &KvCache {
        &self.kv
    }

    /// Ends the pass at hand before its next layer when set, from any thread.
    pub fn cancel_flag(&self) -> Arc<AtomicBool> {
        self.cancel.clone()
    }

    /// Shows every stage of the passes that follow to `observer`.
    pub fn observe(&mut self, observer: Option<StageObserver>) {
        self.observer = observer;
    }

    /// Features of `pixels` f32 `[images, 3, h, w]` on the device: `[images · tokens per image, hidden]`.
    pub fn encode(&mut self, pixels: &Tensor) -> Result<Tensor> {
        let Self { ops, model, cancel, observer, .. } = self;
        let mut ctx = Ctx { ops: &**ops, observer: observer.as_mut().map(|o| &mut **o as _), cancel: Some(cancel) };
        let advice = "give fewer images, take a shorter --context, or run with --device cpu";
        model.encode(&mut ctx, pixels).map_err(|e| e.lacking_for("encoding the images", advice))
    }

    /// The decoder's input for `slots`, f32 `[slots, hidden]` on the host.
    pub fn embed(&mut self, slots: &[Slot], features: Option<&Tensor>) -> Result<Tensor> {
        let Self { ops, model, acts, .. } = self;
        let mut all = Vec::new();
        for chunk in slots.chunks(acts.max_tokens()) {
            model.embed(&mut Ctx::new(&**ops), acts, chunk, features)?;
            all.extend(ops.download(acts.input())?);
        }
        Ok(Tensor::from_slice(&[slots.len(), all.len() / slots.len().max(1)], &all))
    }

    /// Runs `slots` after the `past` cached tokens of the sequence in `table`, and hands the logits `[vocab]` of each row from
    /// `first_output` on to `take`.
    pub fn extend(
        &mut self,
        table: &mut PageTable,
        past: usize,
        slots: &[Slot],
        features: Option<&Tensor>,
        first_output: usize,
        mut take: impl FnMut(&[f32]),
    ) -> Result<()> {
        self.run(table, past, slots, features, first_output, |ops, logits| hand_rows(ops, logits, &mut take))
    }

    /// Runs `slots` after the `past` cached tokens of the sequence in `table`, and draws what follows them: all that comes back from the
    /// device.
    ///
    /// The last `n_drafted` slots are guesses: the first token drawn is that after the slot before them, and only where it is what was
    /// guessed there is one more drawn after it. So there are 1 to `n_drafted` + 1 tokens, and as many fewer guesses were right.
    pub fn next_tokens(
        &mut self,
        table: &mut PageTable,
        past: usize,
        slots: &[Slot],
        n_drafted: usize,
        features: Option<&Tensor>,
        sampler: &mut Sampler,
    ) -> Result<Vec<u32>> {
        let first =
            (slots.len().checked_sub(n_drafted + 1)).ok_or_else(|| Error::usage("there is no token for a next one to follow"))?;
        let mut ids = Vec::new();
        let mut right = true;
        self.run(table, past, slots, features, first, |ops, logits| {
            for row in 0..logits.rows() {
                if right {
                    let id = sampler.sample(ops, logits, row)?;
                    ids.push(id);
                    right = slots.get(first + ids.len()) == Some(&Slot::Token(id));
                }
            }
            Ok(())
        })?;
        Ok(ids)
    }

    /// Runs `slots` after the `past` cached tokens of the sequence in `table`, and hands the logits of the rows from `first_output` on to
    /// `take`, with the device that they are on: f32 `[rows, vocab]`, a few rows at a time.
    fn run(
        &mut self,
        table: &mut PageTable,
        past: usize,
        slots: &[Slot],
        features: Option<&Tensor>,
        first_output: usize,
        mut take: impl FnMut(&dyn Ops, &Tensor) -> Result<()>,
    ) -> Result<()> {
        self.reserve(table, past + slots.len())?;
        let Self { ops, model, acts, kv, cancel, observer } = self;
        let mut done = 0;
        for chunk in slots.chunks(acts.max_tokens()) {
            let mut ctx = Ctx { ops: &**ops, observer: observer.as_mut().map(|o| &mut **o as _), cancel: Some(cancel) };
            let span = Span { first_row: 0, n_rows: chunk.len(), past: past + done, pages: table.pages() };
            let first_output = first_output.saturating_sub(done);
            let take = |logits: &Tensor| take(&**ops, logits);
            model.run(&mut ctx, acts, &mut kv.layers, &[span], chunk, features, first_output, take)?;
            done += chunk.len();
        }
        Ok(())
    }

    /// Runs one more token of each sequence of `batch`, all in one pass, which reads each weight once; hands their logits `[vocab]` to
    /// `take` in the same order.
    ///
    /// # Errors
    /// If a sequence is at the end of its context, or the cache or the buffers have no room for so many.
    pub fn step(&mut self, batch: &mut [Step<'_>], mut take: impl FnMut(&[f32])) -> Result<()> {
        if batch.len() > self.acts.max_tokens() {
            let most = self.acts.max_tokens();
            return Err(Error::Unsupported(format!("{} sequences cannot run at once: at most {most} can", batch.len())));
        }
        for step in &mut *batch {
            self.reserve(step.table, step.past + 1)?;
        }
        let Self { ops, model, acts, kv, cancel, observer } = self;
        let slots: Vec<_> = batch.iter().map(|step| Slot::Token(step.token)).collect();
        let spans: Vec<_> = batch
            .iter()
            .enumerate()
            .map(|(first_row, step)| Span { first_row, n_rows: 1, past: step.past, pages: step.table.pages() })
            .collect();
        let mut ctx = Ctx { ops: &**ops, observer: observer.as_mut().map(|o| &mut **o as _), cancel: Some(cancel) };
        let take = |logits: &Tensor| hand_rows(&**ops, logits, &mut take);
        model.run(&mut ctx, acts, &mut kv.layers, &spans, &slots, None, 0, take)
    }

    /// Makes room for a sequence of `tokens` tokens.
    fn reserve(&self, table: &mut PageTable, tokens: usize) -> Result<()> {
        let context_tokens = self.model.config().context_tokens;
        if tokens > context_tokens {
            return Err(Error::Unsupported(format!("{tokens} tokens do not fit a context of {context_tokens}")));
        }
        table.reserve(tokens)
    }
}

/// Brings logits `[rows, vocab]` to the host and hands each row to `take`.
fn hand_rows(ops: &dyn Ops, logits: &Tensor, take: &mut impl FnMut(&[f32])) -> Result<()> {
    ops.download(logits)?.chunks_exact(logits.row_len()).for_each(take);
    Ok(())
}
