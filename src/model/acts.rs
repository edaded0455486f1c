//! Buffer plans: every activation of a forward pass, made once for the largest batch and re-used by all layers.
//!
//! The memory is reserved, not touched: a plan for long prompts costs a short one nothing.

use std::cell::Cell;

use super::config::{ClipConfig, LlamaConfig};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::Ops;
use crate::tensor::Tensor;

/// What gives buffers to a plan: a device, or [`Counted`].
pub trait Room {
    /// A buffer of this shape.
    fn room(&self, shape: &[usize], dtype: DType) -> Result<Tensor>;

    /// Number format of activations.
    fn of_activations(&self) -> DType;
}

impl<T: Ops + ?Sized> Room for T {
    fn room(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        self.alloc(shape, dtype)
    }

    fn of_activations(&self) -> DType {
        self.activation_dtype()
    }
}

/// Gives empty buffers, and counts what they would take.
pub struct Counted {
    activations: DType,
    bytes: Cell<usize>,
}

impl Counted {
    /// Bytes of what `plan` takes, on a device with activations of this dtype.
    ///
    /// # Errors
    /// Those of `plan`.
    pub fn bytes<T>(activations: DType, plan: impl FnOnce(&Self) -> Result<T>) -> Result<usize> {
        let counted = Self { activations, bytes: Cell::new(0) };
        plan(&counted)?;
        Ok(counted.bytes.get())
    }
}

impl Room for Counted {
    fn room(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        self.bytes.set(self.bytes.get() + shape.iter().product::<usize>() * dtype.size());
        Ok(Tensor::zeros(&[0, shape[1..].iter().product()], dtype))
    }

    fn of_activations(&self) -> DType {
        self.activations
    }
}

/// Activations of the vision tower.
pub struct ClipActs {
    pub(super) patches: Tensor,          // [images * n_patches, 3 * patch_size * patch_size]
    pub(super) patch_embeddings: Tensor, // [images * n_patches, hidden]
    pub(super) x: Tensor,                // [images * (1 + n_patches), hidden]: the residual stream
    pub(super) normed: Tensor,           // [images * (1 + n_patches), hidden]
    pub(super) qkv: Tensor,              // [images * (1 + n_patches), 3 * hidden]
    pub(super) attn: Tensor,             // [images * (1 + n_patches), hidden]
    pub(super) mlp: Tensor,              // [images * (1 + n_patches), intermediate]
}

impl ClipActs {
    /// Buffers for `n_images` pictures at once.
    pub fn plan(ops: &(impl Room + ?Sized), config: &ClipConfig, n_images: usize) -> Result<Self> {
        let (n_patches, hidden) = (n_images * config.n_patches(), config.hidden_size);
        let tokens = n_patches + n_images;
        let alloc = |rows, width| ops.room(&[rows, width], ops.of_activations());
        Ok(Self {
            patches: alloc(n_patches, 3 * config.patch_size * config.patch_size)?,
            patch_embeddings: alloc(n_patches, hidden)?,
            x: alloc(tokens, hidden)?,
            normed: alloc(tokens, hidden)?,
            qkv: alloc(tokens, 3 * hidden)?,
            attn: alloc(tokens, hidden)?,
            mlp: alloc(tokens, config.intermediate_size)?,
        })
    }
}

/// Activations of a decoder block for a number of rows.
pub struct BlockActs {
    /// The residual stream, `[tokens, hidden]`: what a block reads and adds to.
    pub x: Tensor,
    pub(super) normed: Tensor,  // [tokens, hidden]
    pub(super) qkv: Tensor,     // [tokens, (n_heads + 2 * n_kv_heads) * head_dim]
    pub(super) attn: Tensor,    // [tokens, n_heads * head_dim]
    pub(super) gate_up: Tensor, // [tokens, 2 * intermediate]
    pub(super) act: Tensor,     // [tokens, intermediate]
}

impl BlockActs {
    /// Buffers for up to `max_tokens` rows.
    pub fn plan(ops: &dyn Ops, config: &LlamaConfig, max_tokens: usize) -> Result<Self> {
        let heads = config.heads();
        let alloc = |width| ops.alloc(&[max_tokens, width], ops.activation_dtype());
        Ok(Self {
            x: alloc(config.hidden_size)?,
            normed: alloc(config.hidden_size)?,
            qkv: alloc(heads.qkv_width())?,
            attn: alloc(heads.q_width())?,
            gate_up: alloc(2 * config.intermediate_size)?,
            act: alloc(config.intermediate_size)?,
        })
    }

    /// Makes all buffers `tokens` rows long.
    pub fn set_tokens(&mut self, tokens: usize) {
        for t in [&mut self.x, &mut self.normed, &mut self.qkv, &mut self.attn, &mut self.gate_up, &mut self.act] {
            t.set_rows(tokens);
        }
    }

    pub(super) fn tokens(&self) -> usize {
        self.x.rows()
    }
}

/// Activations of the decoder.
pub struct LlamaActs {
    /// All rows of a batch; `x` is the decoder's input.
    pub(super) all: BlockActs,
    /// The rows whose logits are wanted: only they go through the last layer's attention and MLP.
    pub(super) tail: BlockActs,
    pub(super) embeds: Tensor, // [tokens, hidden]: of text tokens, before image features are put between them
    pub(super) logits: Tensor, // [rows of the head, vocab]
    max_tokens: usize,
}

/// Rows that go through the head at once: bounds the logits of a long prompt to a few MB.
pub const HEAD_ROWS: usize = 32;

impl LlamaActs {
    /// Buffers for batches of up to `max_tokens` rows.
    pub fn plan(ops: &dyn Ops, config: &LlamaConfig, max_tokens: usize) -> Result<Self> {
        Ok(Self {
            all: BlockActs::plan(ops, config, max_tokens)?,
            tail: BlockActs::plan(ops, config, max_tokens)?,
            embeds: ops.alloc(&[max_tokens, config.hidden_size], ops.activation_dtype())?,
            logits: ops.alloc(&[HEAD_ROWS, config.vocab_size], DType::F32)?,
            max_tokens,
        })
    }

    /// The largest batch in rows.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// The decoder's input of the batch at hand, `[tokens, hidden]`.
    pub fn input(&self) -> &Tensor {
        &self.all.x
    }
}
