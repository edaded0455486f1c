//! LLaVA: pictures through tower and projector, their features spliced among the text embeddings, and through the decoder.

use super::acts::{ClipActs, LlamaActs};
use super::clip::Clip;
use super::config::{FeatureSelect, LlavaConfig};
use super::llama::Llama;
use super::load::Loader;
use super::projector::Projector;
use super::stage::{Ctx, Stage};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::{KvLayer, Ops, RowCopy, Span};
use crate::tensor::Tensor;
use crate::weights::Source;
use crate::weights::adapter::Adapter;

/// Pictures that go through the tower at once: bounds its activations.
pub const IMAGES_AT_ONCE: usize = 4;

/// What stands at one position of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// A token of the vocabulary.
    Token(u32),
    /// A row of the image features.
    Image {
        /// Which row.
        feature_row: usize,
    },
}

impl Slot {
    /// The positions of a token, or of an image (`None`) whose features begin at `feature_row`.
    pub fn of(id: Option<u32>, feature_row: usize, tokens_per_image: usize) -> impl Iterator<Item = Self> {
        let n_rows = if id.is_some() { 0 } else { tokens_per_image };
        let rows = (feature_row..feature_row + n_rows).map(|feature_row| Self::Image { feature_row });
        id.map(Self::Token).into_iter().chain(rows)
    }
}

/// The whole model on a device.
pub struct Llava {
    pub(super) config: LlavaConfig,
    pub(super) clip: Clip,
    pub(super) projector: Projector,
    pub(super) llama: Llama,
}

impl Llava {
    /// Loads the model; `dtype` converts matrices, `None` keeps them as they are stored.
    pub fn load(ops: &dyn Ops, config: &LlavaConfig, weights: &dyn Source, dtype: Option<DType>) -> Result<Self> {
        let loader = Loader::new(ops, weights, dtype);
        let load = || {
            Ok(Self {
                clip: Clip::load(&loader, &config.vision, config.n_vision_layers)?,
                projector: Projector::load(&loader, &config.projector, config.vision.hidden_size, config.text.hidden_size)?,
                llama: Llama::load(&loader, &config.text, config.context_tokens)?,
                config: config.clone(),
            })
        };
        let advice = match dtype {
            Some(DType::F32) => "take --dtype bf16, which halves them, or run with --device cpu",
            _ => "take a smaller model, or run with --device cpu",
        };
        load().map_err(|e: Error| e.lacking_for("the model's weights", advice))
    }

    /// As [`Llava::load`], with an adapter over the weights, if there is one.
    ///
    /// # Errors
    /// If the adapter does not fit the model: the tensor is named.
    pub fn load_adapted(
        ops: &dyn Ops,
        config: &LlavaConfig,
        weights: &dyn Source,
        adapter: Option<&Adapter>,
        dtype: Option<DType>,
    ) -> Result<Self> {
        let Some(adapter) = adapter else { return Self::load(ops, config, weights, dtype) };
        let model = Self::load(ops, config, &adapter.over(weights), dtype)?;
        adapter.expect_taken(|name| config.is_not_run(name))?;
        Ok(model)
    }

    /// Its configuration.
    pub fn config(&self) -> &LlavaConfig {
        &self.config
    }

    /// The decoder.
    pub fn llama(&self) -> &Llama {
        &self.llama
    }

    /// Features of `pixels` f32 `[images, 3, image_size, image_size]` on the device: `[images · tokens per image, hidden]`.
    pub fn encode(&self, ctx: &mut Ctx<'_>, pixels: &Tensor) -> Result<Tensor> {
        let selected = self.select(ctx, pixels)?;
        let features = self.projector.forward(ctx.ops, selected).map_err(|e| e.within("projector"))?;
        ctx.observe(Stage::ImageFeatures, &features)?;
        Ok(features)
    }

    /// What the tower gives to the projector: `[images · tokens per image, vision hidden]`.
    pub(super) fn select(&self, ctx: &mut Ctx<'_>, pixels: &Tensor) -> Result<Tensor> {
        let n_images = pixels.rows();
        let tokens_per_image = self.config.tokens_per_image();
        let mut selected =
            ctx.ops.alloc(&[n_images * tokens_per_image, self.config.vision.hidden_size], ctx.ops.activation_dtype())?;
        let mut acts = ClipActs::plan(ctx.ops, &self.config.vision, n_images.min(IMAGES_AT_ONCE))?;
        for first in (0..n_images).step_by(IMAGES_AT_ONCE) {
            let n = IMAGES_AT_ONCE.min(n_images - first);
            self.clip.forward(ctx, &mut acts, pixels, first..first + n)?;
            ctx.ops.copy_rows(&mut selected, &acts.x, &self.selection(first, n)).map_err(|e| e.within("vision outputs"))?;
        }
        ctx.observe(Stage::ClipSelected, &selected)?;
        Ok(selected)
    }

    /// Rows of the tower's output for `n` pictures, the first of which is picture `first`, that go on to the projector.
    pub(super) fn selection(&self, first: usize, n: usize) -> Vec<RowCopy> {
        let (n_rows, clip_tokens) = (self.config.tokens_per_image(), 1 + self.config.vision.n_patches());
        let skip = usize::from(self.config.feature_select == FeatureSelect::Patch); // the class token comes first
        (0..n).map(|i| RowCopy { dst: (first + i) * n_rows, src: i * clip_tokens + skip, n_rows }).collect()
    }

    /// Lays embeddings and image features out as the decoder's input: `slots` in order, in `acts`' input rows.
    pub fn embed(&self, ctx: &mut Ctx<'_>, acts: &mut LlamaActs, slots: &[Slot], features: Option<&Tensor>) -> Result<()> {
        let ids: Vec<u32> = slots.iter().filter_map(|s| if let Slot::Token(id) = s { Some(*id) } else { None }).collect();
        acts.all.x.set_rows(slots.len());
        acts.embeds.set_rows(ids.len());
        ctx.ops.embed(&mut acts.embeds, &self.llama.embedding, &ids)?;
        let (text, images) = splice(slots);
        ctx.ops.copy_rows(&mut acts.all.x, &acts.embeds, &text)?;
        if !images.is_empty() {
            let features = features.ok_or_else(|| Error::usage("the prompt has image positions but no image was encoded"))?;
            ctx.ops.copy_rows(&mut acts.all.x, features, &images)?;
        }
        ctx.observe(Stage::InputEmbeds, &acts.all.x)?;
        Ok(())
    }

    /// Runs a batch: `slots` of all sequences one after the other, `spans` says which are whose and what of each is cached. Hands the
    /// logits of the rows from `first_output` on to `take`, as [`Llama::logits`] does.
    #[allow(clippy::too_many_arguments)]
    pub fn run(
        &self,
        ctx: &mut Ctx<'_>,
        acts: &mut LlamaActs,
        kv: &mut [KvLayer],
        spans: &[Span<'_>],
        slots: &[Slot],
        features: Option<&Tensor>,
        first_output: usize,
        take: impl FnMut(&Tensor) -> Result<()>,
    ) -> Result<()> {
        self.embed(ctx, acts, slots, features).map_err(|e| e.within("input embeddings"))?;
        let outputs = RowCopy { dst: 0, src: first_output.min(slots.len()), n_rows: slots.len().saturating_sub(first_output) };
        self.llama.forward(ctx, acts, kv, spans, &[outputs])?;
        if outputs.n_rows > 0 { self.llama.logits(ctx, acts, take) } else { Ok(()) }
    }
}

/// Runs of slots that lie together both in the sequence and in their source: (text rows, image rows).
pub(super) fn splice(slots: &[Slot]) -> (Vec<RowCopy>, Vec<RowCopy>) {
    let (mut text, mut images) = (Vec::<RowCopy>::new(), Vec::<RowCopy>::new());
    let mut n_text = 0;
    for (dst, slot) in slots.iter().enumerate() {
        let (runs, src) = match *slot {
            Slot::Token(_) => {
                n_text += 1;
                (&mut text, n_text - 1)
            }
            Slot::Image { feature_row } => (&mut images, feature_row),
        };
        match runs.last_mut() {
            Some(run) if run.dst + run.n_rows == dst && run.src + run.n_rows == src => run.n_rows += 1,
            _ => runs.push(RowCopy { dst, src, n_rows: 1 }),
        }
    }
    (text, images)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splicing_keeps_order_and_merges_runs() {
        let image = |feature_row| Slot::Image { feature_row };
        let slots = [Slot::Token(1), image(0), image(1), Slot::Token(7), Slot::Token(8), image(1), image(3)];
        let (text, images) = splice(&slots);
        let run = |dst, src, n_rows| RowCopy { dst, src, n_rows };
        assert_eq!(text, [run(0, 0, 1), run(3, 1, 2)]);
        assert_eq!(images, [run(1, 0, 2), run(5, 1, 1), run(6, 3, 1)]);
    }
}
