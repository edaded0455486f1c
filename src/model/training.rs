//! A training pass: the loss of a batch and its gradients by all parameters that are trained.
//!
//! The forward is that of inference over whole sequences without a cache; the way back runs through the same layers, each of which has its
//! `backward` beside its `forward`. Logits are made for tokens that are to be learned alone, [`LOSS_ROWS`] at a time, and become their own
//! gradients: no `[tokens, vocab]` is ever held.

use super::acts::Room;
use super::clip::Clip;
use super::config::LlavaConfig;
use super::llama::Llama;
use super::llava::{Llava, Slot, splice};
use super::projector::ProjectorSaved;
use super::stage::Ctx;
use super::tape::{Recompute, Stack, Widths};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::{Lora, TrainedMatrix, VisitParams};
use crate::ops::grad::GradOps;
use crate::ops::{Heads, RowCopy, Span};
use crate::tensor::Tensor;

/// Tokens whose logits are made at once.
pub const LOSS_ROWS: usize = 256;

/// Which parts of the model are trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trained {
    /// The vision tower, as far as it is run.
    pub vision: bool,
    /// The projector.
    pub projector: bool,
    /// The decoder, with embeddings and head.
    pub decoder: bool,
}

/// Sequences to be learned, one after the other.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// What stands at each position.
    pub slots: &'a [Slot],
    /// Whether the token there is to be learned, `[slots]`. The first of a sequence cannot be: nothing predicts it.
    pub is_learned: &'a [bool],
    /// Positions of each sequence.
    pub lengths: &'a [usize],
}

/// Buffers of a training pass.
pub struct Tape {
    /// What there is room for.
    max_tokens: usize,
    max_images: usize,
    decoder: Stack,
    /// Of the vision tower, if it is trained: its patches, and embeddings before the first norm.
    vision: Option<Vision>,
    embeds: Tensor, // [tokens, hidden]: of text tokens, and the gradient by them
    head: Head,
}

struct Vision {
    stack: Stack,
    patches: Tensor,          // [images * n_patches, 3 * patch_size * patch_size]
    patch_embeddings: Tensor, // [images * n_patches, hidden], and the gradient by them
    embedded: Tensor,         // [images * (1 + n_patches), hidden]
    d_embedded: Tensor,       // as `embedded`
}

/// Rows whose next token is to be learned.
struct Head {
    x: Tensor,      // [tokens, hidden]
    normed: Tensor, // [tokens, hidden], and the gradient by it
    d_x: Tensor,    // [tokens, hidden]
    chunk: Tensor,  // [LOSS_ROWS, hidden]
    logits: Tensor, // f32 [LOSS_ROWS, vocab], and the gradient by them
    losses: Tensor, // f32 [LOSS_ROWS]
}

impl Tape {
    /// For batches of up to `max_tokens` positions and `max_images` pictures.
    pub fn plan(
        ops: &(impl Room + ?Sized),
        config: &LlavaConfig,
        trained: Trained,
        max_tokens: usize,
        max_images: usize,
        recompute: Recompute,
    ) -> Result<Self> {
        let (text, vision) = (&config.text, &config.vision);
        let alloc = |rows, width| ops.room(&[rows, width], ops.of_activations());
        let hidden = || alloc(max_tokens, text.hidden_size);
        let n_mlp = text.intermediate_size;
        let widths = Widths { hidden: text.hidden_size, heads: text.heads(), mlp_in: 2 * n_mlp, mlp: n_mlp };
        let plan_vision = || {
            let (n_patches, tokens) = (max_images * vision.n_patches(), max_images * (1 + vision.n_patches()));
            let heads = Heads { n_heads: vision.n_heads, n_kv_heads: vision.n_heads, head_dim: vision.head_dim() };
            let n_mlp = vision.intermediate_size;
            let widths = Widths { hidden: vision.hidden_size, heads, mlp_in: n_mlp, mlp: n_mlp };
            Ok(Vision {
                stack: Stack::plan(ops, widths, config.n_vision_layers, tokens, recompute)?,
                patches: alloc(n_patches, 3 * vision.patch_size * vision.patch_size)?,
                patch_embeddings: alloc(n_patches, vision.hidden_size)?,
                embedded: alloc(tokens, vision.hidden_size)?,
                d_embedded: alloc(tokens, vision.hidden_size)?,
            })
        };
        Ok(Self {
            max_tokens,
            max_images,
            decoder: Stack::plan(ops, widths, text.n_layers, max_tokens, recompute)?,
            vision: trained.vision.then(plan_vision).transpose()?,
            embeds: hidden()?,
            head: Head {
                x: hidden()?,
                normed: hidden()?,
                d_x: hidden()?,
                chunk: alloc(LOSS_ROWS, text.hidden_size)?,
                logits: ops.room(&[LOSS_ROWS, text.vocab_size], DType::F32)?,
                losses: ops.room(&[LOSS_ROWS], DType::F32)?,
            },
        })
    }
}

impl Tape {
    /// Positions and pictures that it has room for.
    pub fn room(&self) -> (usize, usize) {
        (self.max_tokens, self.max_images)
    }
}

impl Llava {
    /// Makes room for the gradients of these parts, and of low-rank additions that learn: from now on they are trained. Products read what is
    /// trained in `compute`; steps are made in f32 ([`TrainedMatrix`]).
    ///
    /// # Errors
    /// If a matrix of them is packed; if embeddings and head are one tensor, whose gradient would be two.
    pub fn train(&mut self, ops: &dyn GradOps, trained: Trained, compute: DType) -> Result<()> {
        self.loras().try_for_each(|lora| lora.train(ops, compute))?;
        if trained.vision {
            self.clip.train(ops, compute).map_err(|e| e.within("vision tower"))?;
        }
        if trained.projector {
            self.projector.train(ops, compute).map_err(|e| e.within("projector"))?;
        }
        if trained.decoder {
            if self.config.text.tie_word_embeddings {
                return Err(Error::Unsupported("training a decoder whose head is its embedding (tie_word_embeddings)".into()));
            }
            self.llama.train(ops, compute).map_err(|e| e.within("decoder"))?;
        }
        Ok(())
    }

    /// Says which pass is next, of those that drop something of what low-rank additions take; none, as at first, drops nothing.
    pub fn set_pass(&mut self, pass: Option<u64>) {
        self.loras().for_each(|lora| lora.set_pass(pass));
    }

    /// Low-rank additions to layers.
    fn loras(&mut self) -> impl Iterator<Item = &mut Lora> {
        let tower = self.clip.layers.iter_mut().flat_map(|layer| layer.linears());
        let decoder = self.llama.blocks.iter_mut().flat_map(|block| block.linears());
        tower.chain(decoder).flat_map(|linear| &mut linear.lora)
    }

    /// Makes the projector's matrices dense, so that it can be trained whole.
    pub fn unpack_projector(&mut self, ops: &dyn GradOps) -> Result<()> {
        self.projector.layers.iter_mut().try_for_each(|layer| layer.unpack(ops))
    }

    /// Shows the parameters that are trained, in an order that is always the same.
    pub fn visit_params(&mut self, visit: VisitParams<'_>) -> Result<()> {
        self.clip.visit(visit)?;
        self.projector.visit(visit)?;
        self.llama.visit(visit)
    }

    /// Hands what was learned to `take`, tensor by tensor: canonical name, and values on the host.
    ///
    /// # Errors
    /// Those of `take`.
    pub fn visit_learned(&mut self, ops: &dyn GradOps, take: &mut dyn FnMut(&str, Tensor) -> Result<()>) -> Result<()> {
        self.visit_params(&mut |param| {
            // Biases of several modules are one parameter.
            let (names, kind) = param.name.rsplit_once('.').expect("names of parameters end with their kind");
            let names: Vec<_> = names.split('+').collect();
            if let [_] = names[..] {
                return take(param.name, ops.to_host(param.value)?);
            }
            let value = ops.download(param.value)?;
            let mut parts = names.iter().zip(value.chunks(value.len() / names.len()));
            parts.try_for_each(|(name, value)| take(&format!("{name}.{kind}"), Tensor::from_slice(&[value.len()], value)))
        })
    }

    /// The sum of the losses of all tokens to be learned, in nats; the gradients of `scale` times it are added to those of the parameters.
    ///
    /// `pixels` are those of the pictures whose features the slots name, in order.
    ///
    /// # Errors
    /// If the batch's parts do not fit together; if the loss is not finite: the first layer that is at fault is named.
    pub fn gradients(
        &mut self,
        ops: &dyn GradOps,
        tape: &mut Tape,
        pixels: Option<&Tensor>,
        batch: &Batch<'_>,
        scale: f32,
    ) -> Result<f64> {
        let spans = batch.spans()?;
        let projected = self.forward_saving(ops, tape, pixels, batch, &spans)?;
        let Tape { decoder, vision, embeds, head, .. } = tape;
        let learned = batch.learned();
        let loss = self.llama.loss(ops, decoder, head, &learned, Some(scale)).map_err(|e| e.within("decoder head"))?;
        if !loss.is_finite() {
            let place = not_finite(ops, vision.as_ref(), decoder)?;
            let problem = format!(
                "the loss is {loss}, and here is where numbers stop being finite: take a lower learning rate, or, in f16, --dtype bf16"
            );
            return Err(Error::Check { place, problem });
        }
        self.llama.backward(ops, decoder, &spans)?;

        let Positions { ids, text, images } = Positions::of(batch.slots);
        let exchanged =
            |copies: &[RowCopy]| copies.iter().map(|c| RowCopy { dst: c.src, src: c.dst, n_rows: c.n_rows }).collect::<Vec<_>>();
        if let Some(table) = &mut self.llama.embedding_grad {
            embeds.set_rows(ids.len());
            ops.copy_rows(embeds, &decoder.d_x, &exchanged(&text))?;
            ops.embed_backward(&mut table.grad, embeds, &ids)?;
        }
        let Some(projected) = projected else { return Ok(loss) };
        let mut d_features = ops.alloc(projected.features().shape(), ops.activation_dtype())?;
        ops.add_rows(&mut d_features, &decoder.d_x, &exchanged(&images))?;
        let d_selected =
            self.projector.backward(ops, &projected, d_features, vision.is_some()).map_err(|e| e.within("projector"))?;
        if let (Some(vision), Some(d_selected)) = (vision, d_selected) {
            let n_images = pixels.map_or(0, Tensor::rows);
            ops.clear(&mut vision.stack.d_x)?;
            ops.add_rows(&mut vision.stack.d_x, &d_selected, &exchanged(&self.selection(0, n_images)))?;
            self.clip.backward(ops, vision, n_images).map_err(|e| e.within("vision tower"))?;
        }
        Ok(loss)
    }

    /// The sum of the losses of all tokens to be learned, in nats. Nothing learns.
    ///
    /// # Errors
    /// As [`Self::gradients`], but for a loss that is not finite.
    pub fn loss(&mut self, ops: &dyn GradOps, tape: &mut Tape, pixels: Option<&Tensor>, batch: &Batch<'_>) -> Result<f64> {
        self.forward_saving(ops, tape, pixels, batch, &batch.spans()?)?;
        self.llama.loss(ops, &mut tape.decoder, &mut tape.head, &batch.learned(), None).map_err(|e| e.within("decoder head"))
    }

    /// All but the head: leaves the last hidden states in `tape.decoder`. Returns what the projector keeps, if there are pictures.
    fn forward_saving(
        &self,
        ops: &dyn GradOps,
        tape: &mut Tape,
        pixels: Option<&Tensor>,
        batch: &Batch<'_>,
        spans: &[Span<'_>],
    ) -> Result<Option<ProjectorSaved>> {
        let Tape { decoder, vision, embeds, .. } = tape;
        decoder.set_tokens(batch.slots.len());

        let n_images = pixels.map_or(0, Tensor::rows);
        let projected = match (pixels, &mut *vision) {
            (None, _) => None,
            (Some(pixels), None) => Some(self.select(&mut Ctx::new(ops), pixels)?),
            (Some(pixels), Some(vision)) => {
                self.clip.forward_saving(ops, vision, pixels).map_err(|e| e.within("vision tower"))?;
                let shape = [n_images * self.config.tokens_per_image(), self.config.vision.hidden_size];
                let mut selected = ops.alloc(&shape, ops.activation_dtype())?;
                ops.copy_rows(&mut selected, vision.stack.output(), &self.selection(0, n_images))?;
                Some(selected)
            }
        };
        let projected = projected.map(|selected| self.projector.forward_saving(ops, selected)).transpose()?;

        let Positions { ids, text, images } = Positions::of(batch.slots);
        embeds.set_rows(ids.len());
        ops.embed(embeds, &self.llama.embedding, &ids)?;
        ops.copy_rows(&mut decoder.hidden[0], embeds, &text)?;
        if !images.is_empty() {
            let projected = projected.as_ref().ok_or_else(|| Error::usage("the batch has image positions but no pictures"))?;
            ops.copy_rows(&mut decoder.hidden[0], projected.features(), &images)?;
        }

        self.llama.forward_saving(ops, decoder, spans)?;
        Ok(projected)
    }
}

/// What stands where in a batch.
struct Positions {
    /// Tokens, in order.
    ids: Vec<u32>,
    /// Where their embeddings go, and where image features do.
    text: Vec<RowCopy>,
    images: Vec<RowCopy>,
}

impl Positions {
    fn of(slots: &[Slot]) -> Self {
        let (text, images) = splice(slots);
        let ids = slots.iter().filter_map(|s| if let Slot::Token(id) = s { Some(*id) } else { None }).collect();
        Self { ids, text, images }
    }
}

/// The first part of the model whose output is not finite.
fn not_finite(ops: &dyn GradOps, vision: Option<&Vision>, decoder: &Stack) -> Result<String> {
    let of_vision = vision.map_or(Ok(None), |vision| vision.stack.first_not_finite(ops))?;
    Ok(match (of_vision, decoder.first_not_finite(ops)?) {
        (Some(0), _) => "vision tower, embeddings".to_owned(),
        (Some(i), _) => format!("vision tower, layer {}", i - 1),
        (None, Some(0)) => "input of the decoder".to_owned(),
        (None, Some(i)) => format!("decoder layer {}", i - 1),
        (None, None) => "decoder head".to_owned(),
    })
}

impl Batch<'_> {
    fn spans(&self) -> Result<Vec<Span<'static>>> {
        let total: usize = self.lengths.iter().sum();
        if total != self.slots.len() || self.is_learned.len() != total {
            let got = (self.slots.len(), self.is_learned.len());
            return Err(Error::shape("training pass", "slots and what is learned of them", total, got));
        }
        let mut first_row = 0;
        let span = |&n_rows: &usize| {
            first_row += n_rows;
            Span { first_row: first_row - n_rows, n_rows, past: 0, pages: &[] }
        };
        let spans: Vec<_> = self.lengths.iter().map(span).collect();
        let is_bad = |row: usize| self.is_learned[row] && !matches!(self.slots[row], Slot::Token(_));
        if let Some(row) = (0..total).find(|&row| is_bad(row)) {
            return Err(Error::shape(
                "training pass",
                format!("position {row}, which is to be learned"),
                "a token",
                self.slots[row],
            ));
        }
        match spans.iter().find(|span| span.n_rows > 0 && self.is_learned[span.first_row]) {
            Some(span) => {
                let what = format!("position {}, the first of a sequence", span.first_row);
                Err(Error::shape("training pass", what, "not to be learned", "learned"))
            }
            None => Ok(spans),
        }
    }

    /// The row that predicts each token to be learned, and the token.
    fn learned(&self) -> Vec<(usize, u32)> {
        let of = |(row, slot): (usize, &Slot)| match slot {
            Slot::Token(id) if self.is_learned[row] => Some((row - 1, *id)),
            _ => None,
        };
        self.slots.iter().enumerate().filter_map(of).collect()
    }
}

impl Clip {
    fn forward_saving(&self, ops: &dyn GradOps, v: &mut Vision, pixels: &Tensor) -> Result<()> {
        let n_images = pixels.rows();
        v.patches.set_rows(n_images * self.n_patches);
        v.patch_embeddings.set_rows(n_images * self.n_patches);
        v.embedded.set_rows(n_images * (1 + self.n_patches));
        v.stack.set_tokens(n_images * (1 + self.n_patches));
        ops.patchify(&mut v.patches, pixels, 0..n_images, self.patch_size)?;
        self.patch_embedding.forward(ops, &mut v.patch_embeddings, &v.patches)?;
        ops.clip_embed(&mut v.embedded, &v.patch_embeddings, &self.class_embedding, &self.position_embedding)?;
        self.pre_norm.forward(ops, &mut v.stack.hidden[0], &v.embedded)?;
        let spans = Span::uniform(n_images, 1 + self.n_patches);
        for (i, layer) in self.layers.iter().enumerate() {
            v.stack.forward(i, |x, y, s, w| layer.forward_saving(ops, x, y, s, w, &spans))?;
        }
        Ok(())
    }

    /// From the gradient by the last hidden states, in `v.stack.d_x`, to those of the parameters.
    fn backward(&mut self, ops: &dyn GradOps, v: &mut Vision, n_images: usize) -> Result<()> {
        let spans = Span::uniform(n_images, 1 + self.n_patches);
        for (i, layer) in self.layers.iter_mut().enumerate().rev() {
            if v.stack.is_shared() {
                v.stack.forward(i, |x, y, s, w| layer.forward_saving(ops, x, y, s, w, &spans))?;
            }
            v.stack.backward(i, |x, s, w, d_x| layer.backward(ops, x, s, w, d_x, &spans))?;
        }
        let Some([d_class, d_positions]) = &mut self.grad else { return Ok(()) };
        v.d_embedded.set_rows(v.embedded.rows());
        ops.clear(&mut v.d_embedded)?;
        self.pre_norm.backward(ops, &mut v.d_embedded, &v.stack.d_x, &v.embedded)?;
        ops.clip_embed_backward(&mut v.patch_embeddings, d_class, d_positions, &v.d_embedded)?;
        self.patch_embedding.backward(ops, None, &v.patch_embeddings, &v.patches)
    }
}

impl Llama {
    fn forward_saving(&self, ops: &dyn GradOps, stack: &mut Stack, spans: &[Span<'_>]) -> Result<()> {
        for (i, block) in self.blocks.iter().enumerate() {
            let done = stack.forward(i, |x, y, s, w| block.forward_saving(ops, x, y, s, w, &self.rope, spans));
            done.map_err(|e| e.within(format_args!("decoder layer {i}")))?;
        }
        Ok(())
    }

    /// Σ of the losses of `learned` (row, next token), in nats; `stack.d_x` becomes the gradient of `scale` times it by the last hidden
    /// states, if there is a scale.
    fn loss(
        &mut self,
        ops: &dyn GradOps,
        stack: &mut Stack,
        h: &mut Head,
        learned: &[(usize, u32)],
        scale: Option<f32>,
    ) -> Result<f64> {
        let rows: Vec<_> = learned.iter().enumerate().map(|(dst, &(src, _))| RowCopy { dst, src, n_rows: 1 }).collect();
        for t in [&mut h.x, &mut h.normed, &mut h.d_x] {
            t.set_rows(learned.len());
        }
        ops.copy_rows(&mut h.x, stack.output(), &rows)?;
        self.norm.forward(ops, &mut h.normed, &h.x)?;
        let mut loss = 0.0;
        for first in (0..learned.len()).step_by(LOSS_ROWS) {
            let n_rows = LOSS_ROWS.min(learned.len() - first);
            for t in [&mut h.chunk, &mut h.logits, &mut h.losses] {
                t.set_rows(n_rows);
            }
            ops.copy_rows(&mut h.chunk, &h.normed, &[RowCopy { dst: 0, src: first, n_rows }])?;
            self.head.forward(ops, &mut h.logits, &h.chunk)?;
            let labels: Vec<u32> = learned[first..first + n_rows].iter().map(|&(_, id)| id).collect();
            ops.cross_entropy(&mut h.logits, &mut h.losses, &labels, scale.unwrap_or(1.0))?;
            loss += ops.download(&h.losses)?.into_iter().map(f64::from).sum::<f64>();
            if scale.is_none() {
                continue;
            }
            // The rows at hand have done their work: their gradient takes their place.
            self.head.backward(ops, None, &h.logits, &h.chunk)?;
            self.head.input_gradient(ops, &mut h.chunk, &h.logits)?;
            ops.copy_rows(&mut h.normed, &h.chunk, &[RowCopy { dst: first, src: 0, n_rows }])?;
        }
        if scale.is_none() {
            return Ok(loss);
        }
        ops.clear(&mut h.d_x)?;
        self.norm.backward(ops, &mut h.d_x, &h.normed, &h.x)?;
        let back: Vec<_> = rows.iter().map(|r| RowCopy { dst: r.src, src: r.dst, n_rows: 1 }).collect();
        ops.clear(&mut stack.d_x)?;
        ops.add_rows(&mut stack.d_x, &h.d_x, &back)?;
        Ok(loss)
    }

    /// From the gradient by the last hidden states, in `stack.d_x`, to that by the input.
    fn backward(&mut self, ops: &dyn GradOps, stack: &mut Stack, spans: &[Span<'_>]) -> Result<()> {
        let rope = &self.rope;
        for (i, block) in self.blocks.iter_mut().enumerate().rev() {
            if stack.is_shared() {
                stack.forward(i, |x, y, s, w| block.forward_saving(ops, x, y, s, w, rope, spans))?;
            }
            let done = stack.backward(i, |x, s, w, d_x| block.backward(ops, x, s, w, d_x, rope, spans));
            done.map_err(|e| e.within(format_args!("decoder layer {i}")))?;
        }
        Ok(())
    }

    fn train(&mut self, ops: &dyn GradOps, compute: DType) -> Result<()> {
        self.embedding_grad = Some(TrainedMatrix::begin(ops, &mut self.embedding, compute)?);
        self.blocks.iter_mut().try_for_each(|block| block.train(ops, compute))?;
        self.norm.train(ops)?;
        self.head.train(ops, compute)
    }

    fn visit(&mut self, visit: VisitParams<'_>) -> Result<()> {
        if let Some(table) = &mut self.embedding_grad {
            table.visit("llama.embed_tokens.weight", &mut self.embedding, visit)?;
        }
        self.blocks.iter_mut().enumerate().try_for_each(|(i, block)| block.visit(i, visit))?;
        self.norm.visit("llama.norm", visit)?;
        self.head.visit(&["llama.lm_head".to_owned()], visit)
    }
}
