//! A model on a device with its cache: runs prompts in chunks and answers token by token.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::kv::{KvCache, PageTable};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::{Ctx, LlamaActs, Llava, Sequence, Slot, Stage};
use crate::ops::Ops;
use crate::tensor::Tensor;

/// Tokens of a prompt that run at once. Each weight is read once per chunk, so that a chunk must be long against what compute and
/// memory bandwidth balance at; and its activations are all the memory that a long prompt takes beside its cache.
const CHUNK_TOKENS: usize = 1024;

/// Called at every stage of a forward pass.
pub type StageObserver = Box<dyn FnMut(Stage, &Tensor) + Send>;

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
    /// A runner whose cache holds one context; `kv_dtype` is what keys and values are kept in.
    pub fn new(ops: Box<dyn Ops>, model: Llava, kv_dtype: DType) -> Result<Self> {
        let config = model.config();
        let acts = LlamaActs::plan(&*ops, &config.text, CHUNK_TOKENS.min(config.context_tokens))?;
        let kv = KvCache::new(&*ops, config.text.n_layers, config.text.heads(), config.context_tokens, kv_dtype)?;
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
        model.encode(&mut ctx, pixels)
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
        let Self { ops, model, acts, kv, cancel, observer } = self;
        let context_tokens = model.config().context_tokens;
        if past + slots.len() > context_tokens {
            return Err(Error::Unsupported(format!("{} tokens do not fit a context of {context_tokens}", past + slots.len())));
        }
        table.reserve(past + slots.len())?;
        let mut done = 0;
        for chunk in slots.chunks(acts.max_tokens()) {
            let mut ctx = Ctx { ops: &**ops, observer: observer.as_mut().map(|o| &mut **o as _), cancel: Some(cancel) };
            let sequence = Sequence { past: past + done, pages: table.pages() };
            let first_output = first_output.saturating_sub(done);
            model.run(&mut ctx, acts, &mut kv.layers, sequence, chunk, features, first_output, &mut take)?;
            done += chunk.len();
        }
        Ok(())
    }
}
