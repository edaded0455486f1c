//! The LLaMA decoder (Touvron et al., arXiv 2302.13971; HF `modeling_llama.py`).

use super::acts::{BlockActs, HEAD_ROWS, LlamaActs};
use super::config::LlamaConfig;
use super::load::Loader;
use super::stage::{Ctx, LinearInput, Stage};
use super::tape::{Saved, Work, copy, kept_or, place};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::{Linear, RmsNorm, TrainedMatrix, VisitParams, rope_table};
use crate::ops::grad::{GradOps, Rotation, Update};
use crate::ops::{Heads, KvLayer, KvSource, Matrix, RopeTable, RowCopy, Span, Weight};
use crate::tensor::Tensor;

/// The decoder.
pub struct Llama {
    pub(super) embedding: Matrix, // [vocab, hidden]
    pub(super) embedding_grad: Option<TrainedMatrix>,
    pub(super) blocks: Vec<Block>,
    pub(super) norm: RmsNorm,
    pub(super) head: Linear, // [vocab, hidden]
    pub(super) rope: RopeTable,
}

impl Llama {
    /// The decoder, for positions below `context_tokens`.
    pub fn load(loader: &Loader<'_>, config: &LlamaConfig, context_tokens: usize) -> Result<Self> {
        let embedding = loader.module("llama.embed_tokens", config.vocab_size, config.hidden_size)?;
        let head = match config.tie_word_embeddings {
            true => embedding.clone(),
            false => loader.module("llama.lm_head", config.vocab_size, config.hidden_size)?,
        };
        Ok(Self {
            embedding,
            blocks: (0..config.n_layers).map(|i| Block::load(loader, config, i)).collect::<Result<_>>()?,
            norm: loader.rms_norm("llama.norm", config.hidden_size, config.rms_norm_eps)?,
            head: loader.with_lora(Linear::new(Weight::of(vec![head])?, None), &["llama.lm_head".to_owned()])?,
            embedding_grad: None,
            rope: rope_table(loader.ops, context_tokens, config.head_dim, config.rope_theta, &config.rope_scaling)?,
        })
    }

    /// Runs the rows of `acts.all.x` through all layers; the hidden states of `outputs` (rows of the batch) are left for
    /// [`Llama::logits`].
    ///
    /// The last layer needs keys and values of all rows, but queries, attention and MLP of the output rows only: where those are few,
    /// it is run for them alone.
    pub fn forward(
        &self,
        ctx: &mut Ctx<'_>,
        acts: &mut LlamaActs,
        kv: &mut [KvLayer],
        spans: &[Span<'_>],
        outputs: &[RowCopy],
    ) -> Result<()> {
        let LlamaActs { all, tail, .. } = acts;
        let tokens = all.x.rows();
        let n_outputs = outputs.iter().map(|o| o.n_rows).sum();
        all.set_tokens(tokens);
        tail.set_tokens(n_outputs);
        let trim_last = n_outputs <= tokens / 2;
        let n_full = self.blocks.len() - usize::from(trim_last);
        for (i, block) in self.blocks[..n_full].iter().enumerate() {
            ctx.check_cancelled()?;
            block.forward(ctx, all, &mut kv[i], &self.rope, spans).map_err(|e| e.within(format_args!("decoder layer {i}")))?;
            ctx.observe(Stage::DecoderHidden(i + 1), &all.x)?;
        }
        ctx.ops.copy_rows(&mut tail.x, &all.x, outputs).map_err(|e| e.within("decoder outputs"))?;
        if trim_last {
            let last = &self.blocks[n_full];
            let done = last.forward_trimmed(ctx, all, tail, &mut kv[n_full], &self.rope, spans, outputs);
            done.map_err(|e| e.within(format_args!("decoder layer {n_full}")))?;
            ctx.observe(Stage::DecoderHidden(n_full + 1), &tail.x)?;
        }
        Ok(())
    }

    /// Hands the logits of the rows that the last [`Llama::forward`] was asked for to `take`, a few rows at a time: f32 `[rows, vocab]`,
    /// on the device.
    pub fn logits(&self, ctx: &mut Ctx<'_>, acts: &mut LlamaActs, mut take: impl FnMut(&Tensor) -> Result<()>) -> Result<()> {
        let LlamaActs { all, tail, logits, .. } = acts;
        let in_head = |e: Error| e.within("decoder head");
        self.norm.forward(ctx.ops, &mut tail.normed, &tail.x).map_err(in_head)?;
        for first in (0..tail.tokens()).step_by(HEAD_ROWS) {
            let n_rows = HEAD_ROWS.min(tail.tokens() - first);
            // The other set of buffers has done its work.
            all.normed.set_rows(n_rows);
            logits.set_rows(n_rows);
            ctx.ops.copy_rows(&mut all.normed, &tail.normed, &[RowCopy { dst: 0, src: first, n_rows }]).map_err(in_head)?;
            self.head.forward(ctx.ops, logits, &all.normed).map_err(in_head)?;
            take(logits)?;
        }
        Ok(())
    }

    /// How the matrices of its layers are stored, as the first of them is.
    pub fn weights(&self) -> String {
        self.blocks.first().map_or(&self.head, |block| &block.qkv).weight.parts[0].storage()
    }

    /// Number of layers: as many as a KV cache must have.
    pub fn n_layers(&self) -> usize {
        self.blocks.len()
    }
}

/// A layer of the decoder.
pub struct Block {
    pub(super) heads: Heads,
    pub(super) attn_norm: RmsNorm,
    pub(super) qkv: Linear, // [(n_heads + 2 * n_kv_heads) * head_dim, hidden]
    pub(super) out: Linear, // [hidden, n_heads * head_dim]
    pub(super) mlp_norm: RmsNorm,
    pub(super) gate_up: Linear, // [2 * intermediate, hidden]
    pub(super) down: Linear,    // [hidden, intermediate]
}

impl Block {
    /// Layer `index`.
    ///
    /// # Errors
    /// If a tensor of it is missing or ill-shaped.
    pub fn load(loader: &Loader<'_>, config: &LlamaConfig, index: usize) -> Result<Self> {
        let (hidden, intermediate, heads) = (config.hidden_size, config.intermediate_size, config.heads());
        let layer = format!("llama.layers.{index}");
        let (attn, mlp) = (format!("{layer}.self_attn"), format!("{layer}.mlp"));
        let qkv = [("q_proj", heads.q_width()), ("k_proj", heads.kv_width()), ("v_proj", heads.kv_width())];
        Ok(Self {
            heads,
            attn_norm: loader.rms_norm(&format!("{layer}.input_layernorm"), hidden, config.rms_norm_eps)?,
            qkv: loader.linear(&attn, &qkv, hidden)?,
            out: loader.linear(&attn, &[("o_proj", hidden)], heads.q_width())?,
            mlp_norm: loader.rms_norm(&format!("{layer}.post_attention_layernorm"), hidden, config.rms_norm_eps)?,
            gate_up: loader.linear(&mlp, &[("gate_proj", intermediate), ("up_proj", intermediate)], hidden)?,
            down: loader.linear(&mlp, &[("down_proj", hidden)], intermediate)?,
        })
    }

    /// x += W_o·Attn(RoPE(W_qkv·RMS(x))),  then  x += W_down·(silu(W_gate·n) ⊙ W_up·n),  n = RMS(x)
    ///
    /// x is `a.x`, whose rows are those of `spans`; their keys and values are appended to `kv`.
    pub fn forward(
        &self,
        ctx: &mut Ctx<'_>,
        a: &mut BlockActs,
        kv: &mut KvLayer,
        rope: &RopeTable,
        spans: &[Span<'_>],
    ) -> Result<()> {
        let ops = ctx.ops;
        self.attn_norm.forward(ops, &mut a.normed, &a.x)?;
        ctx.observe(Stage::DecoderLinear(LinearInput::Qkv), &a.normed)?;
        self.qkv.forward(ops, &mut a.qkv, &a.normed)?;
        ops.rope_append(&mut a.qkv, kv, rope, spans, self.heads)?;
        ops.attention(&mut a.attn, &a.qkv, KvSource::Paged(kv), spans, self.heads, true)?;
        ctx.observe(Stage::DecoderLinear(LinearInput::Out), &a.attn)?;
        self.out.forward_add(ops, &mut a.x, &a.attn)?;
        self.mlp(ctx, a)
    }

    /// x += W_down·(silu(W_gate·n) ⊙ W_up·n),  n = RMS(x)
    fn mlp(&self, ctx: &mut Ctx<'_>, a: &mut BlockActs) -> Result<()> {
        let ops = ctx.ops;
        self.mlp_norm.forward(ops, &mut a.normed, &a.x)?;
        ctx.observe(Stage::DecoderLinear(LinearInput::GateUp), &a.normed)?;
        self.gate_up.forward(ops, &mut a.gate_up, &a.normed)?;
        ops.silu_mul(&mut a.act, &a.gate_up)?;
        ctx.observe(Stage::DecoderLinear(LinearInput::Down), &a.act)?;
        self.down.forward_add(ops, &mut a.x, &a.act)
    }

    /// As [`Block::forward`] of whole sequences without a cache, from x to y; what the way back needs stays in `s`.
    #[allow(clippy::too_many_arguments)] // as the equation has them
    pub(super) fn forward_saving(
        &self,
        ops: &dyn GradOps,
        x: &Tensor,
        y: &mut Tensor,
        s: &mut Saved,
        w: &mut Work,
        rope: &RopeTable,
        spans: &[Span<'_>],
    ) -> Result<()> {
        let normed = place(&mut s.normed[0], &mut w.normed);
        self.attn_norm.forward(ops, normed, x)?;
        self.qkv.forward_training(ops, &mut s.qkv, normed, Update::Set)?;
        ops.rope(&mut s.qkv, rope, spans, self.heads, Rotation::Forward)?;
        ops.attention_lse(&mut s.attn, &mut s.lse, &s.qkv, spans, self.heads, true)?;
        copy(ops, &mut s.mid, x)?;
        self.out.forward_training(ops, &mut s.mid, &s.attn, Update::Add)?;
        let normed = place(&mut s.normed[1], &mut w.normed);
        self.mlp_norm.forward(ops, normed, &s.mid)?;
        self.gate_up.forward_training(ops, &mut s.mlp_in, normed, Update::Set)?;
        let act = place(&mut s.act, &mut w.act);
        ops.silu_mul(act, &s.mlp_in)?;
        copy(ops, y, &s.mid)?;
        self.down.forward_training(ops, y, act, Update::Add)
    }

    /// d_x, the gradient by y of [`Block::forward_saving`], becomes that by x; those of parameters that are trained are added to.
    #[allow(clippy::too_many_arguments)] // as `forward_saving`
    pub(super) fn backward(
        &mut self,
        ops: &dyn GradOps,
        x: &Tensor,
        s: &Saved,
        w: &mut Work,
        d_x: &mut Tensor,
        rope: &RopeTable,
        spans: &[Span<'_>],
    ) -> Result<()> {
        let act = kept_or(&s.act, &mut w.act, |act| ops.silu_mul(act, &s.mlp_in))?;
        self.down.backward(ops, Some(&mut w.d_act), d_x, act)?;
        ops.silu_mul_backward(&mut w.d_mlp_in, &w.d_act, &s.mlp_in)?;
        let normed = kept_or(&s.normed[1], &mut w.normed, |normed| self.mlp_norm.forward(ops, normed, &s.mid))?;
        self.gate_up.backward(ops, Some(&mut w.d_normed), &w.d_mlp_in, normed)?;
        self.mlp_norm.backward(ops, d_x, &w.d_normed, &s.mid)?;
        self.out.backward(ops, Some(&mut w.d_attn), d_x, &s.attn)?;
        ops.attention_backward(&mut w.d_qkv, &s.qkv, &s.attn, &w.d_attn, &s.lse, spans, self.heads, true)?;
        ops.rope(&mut w.d_qkv, rope, spans, self.heads, Rotation::Inverse)?;
        let normed = kept_or(&s.normed[0], &mut w.normed, |normed| self.attn_norm.forward(ops, normed, x))?;
        self.qkv.backward(ops, Some(&mut w.d_normed), &w.d_qkv, normed)?;
        self.attn_norm.backward(ops, d_x, &w.d_normed, x)
    }

    /// Its linear layers.
    pub(super) fn linears(&mut self) -> [&mut Linear; 4] {
        [&mut self.qkv, &mut self.out, &mut self.gate_up, &mut self.down]
    }

    /// Makes room for gradients of all its parameters.
    pub(super) fn train(&mut self, ops: &dyn GradOps, compute: DType) -> Result<()> {
        self.linears().into_iter().try_for_each(|l| l.train(ops, compute))?;
        [&mut self.attn_norm, &mut self.mlp_norm].into_iter().try_for_each(|norm| norm.train(ops))
    }

    /// Shows the parameters of layer `index` that are trained.
    pub(super) fn visit(&mut self, index: usize, visit: VisitParams<'_>) -> Result<()> {
        let name = |module: &str| format!("llama.layers.{index}.{module}");
        self.attn_norm.visit(&name("input_layernorm"), visit)?;
        self.qkv.visit(&["q_proj", "k_proj", "v_proj"].map(|m| name(&format!("self_attn.{m}"))), visit)?;
        self.out.visit(&[name("self_attn.o_proj")], visit)?;
        self.mlp_norm.visit(&name("post_attention_layernorm"), visit)?;
        self.gate_up.visit(&[name("mlp.gate_proj"), name("mlp.up_proj")], visit)?;
        self.down.visit(&[name("mlp.down_proj")], visit)
    }

    /// As [`Block::forward`], but all rows give keys and values only; `tail.x` holds the output rows and goes through the rest.
    #[allow(clippy::too_many_arguments)]
    fn forward_trimmed(
        &self,
        ctx: &mut Ctx<'_>,
        all: &mut BlockActs,
        tail: &mut BlockActs,
        kv: &mut KvLayer,
        rope: &RopeTable,
        spans: &[Span<'_>],
        outputs: &[RowCopy],
    ) -> Result<()> {
        let ops = ctx.ops;
        self.attn_norm.forward(ops, &mut all.normed, &all.x)?;
        ctx.observe(Stage::DecoderLinear(LinearInput::Qkv), &all.normed)?;
        self.qkv.forward_parts(ops, &mut all.qkv, &all.normed, 1..3)?;
        // The output rows' own q, k and v go back among the others to be rotated with them.
        self.attn_norm.forward(ops, &mut tail.normed, &tail.x)?;
        self.qkv.forward(ops, &mut tail.qkv, &tail.normed)?;
        let back: Vec<_> = outputs.iter().map(|o| RowCopy { dst: o.src, src: o.dst, n_rows: o.n_rows }).collect();
        ops.copy_rows(&mut all.qkv, &tail.qkv, &back)?;
        ops.rope_append(&mut all.qkv, kv, rope, spans, self.heads)?;
        ops.copy_rows(&mut tail.qkv, &all.qkv, outputs)?;
        ops.attention(&mut tail.attn, &tail.qkv, KvSource::Paged(kv), &tail_spans(spans, outputs), self.heads, true)?;
        ctx.observe(Stage::DecoderLinear(LinearInput::Out), &tail.attn)?;
        self.out.forward_add(ops, &mut tail.x, &tail.attn)?;
        self.mlp(ctx, tail)
    }
}

/// The sequences as seen from their output rows: everything before such a row is in the cache by now.
fn tail_spans<'a>(spans: &[Span<'a>], outputs: &[RowCopy]) -> Vec<Span<'a>> {
    let mut tail = Vec::new();
    for output in outputs {
        for row in 0..output.n_rows {
            let src = output.src + row;
            let span = spans.iter().find(|s| (s.first_row..s.first_row + s.n_rows).contains(&src));
            let span = span.expect("an output row belongs to a sequence of the batch");
            tail.push(Span { first_row: output.dst + row, n_rows: 1, past: span.past + src - span.first_row, pages: span.pages });
        }
    }
    tail
}
