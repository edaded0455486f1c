//! [`Plan`]: what a run will take, before anything of the model is loaded.

use super::config::Config;
use super::data::Dataset;
use super::flops::{Size, model_flops};
use super::lora;
use super::mask::Masker;
use super::rows::{Rows, lengths};
use super::run::{course, learns_whole, passes, rows_at_once, trained_whole};
use crate::data::Row;
use crate::dtype::DType;
use crate::error::Result;
use crate::image::{CHANNELS, Limits, probe};
use crate::model::checkpoint::Checkpoint;
use crate::model::config::{LlavaConfig, ProjectorConfig};
use crate::model::{ClipActs, Counted, IMAGES_AT_ONCE, LOSS_ROWS, Recompute, Tape, Trained};

/// What a run will take.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Plan {
    /// Rows that are learnt.
    pub n_rows: usize,
    /// Steps of the run.
    pub n_steps: usize,
    /// Positions that go through the decoder in all of them.
    pub n_tokens: usize,
    /// Parameters that learn.
    pub n_trained: usize,
    /// Arithmetic of the run without evaluation, in TFLOP: what is computed twice counts once.
    pub tflop: f64,
    /// Most positions of a batch, and most pictures.
    pub largest_batch: [usize; 2],
    /// What takes how many bytes when most is needed.
    pub memory: Vec<(&'static str, usize)>,
}

/// A row, as far as a plan needs it.
#[derive(Clone, Copy, Default)]
struct Laid {
    n_tokens: usize,
    n_images: usize,
    n_learned: usize,
}

impl Plan {
    /// Lays out all rows, and counts. The memory of the program itself is not in it.
    ///
    /// # Errors
    /// As [`Trainer::new`](super::run::Trainer::new), as far as the model's weights have no part in it.
    pub fn of(config: &Config, checkpoint: &Checkpoint, masker: &Masker<'_>, data: Dataset, max_bad: usize) -> Result<Self> {
        if !config.has_lora() {
            checkpoint.expect_unpacked()?;
        }
        let (trained, recompute) = passes(config);
        let (whole, n_added) = (trained_whole(config), lora::n_added(config, &checkpoint.config));
        let (mut rows, mut eval_rows) = Rows::split(config, data, max_bad)?;
        let laid_out = laid_out(masker, &mut rows)?;
        let (mut sampler, n_steps) = course(config, lengths(config, masker, &mut rows)?)?;
        let mut plan = Self {
            n_rows: laid_out.iter().filter(|row| row.n_tokens > 0).count(),
            n_steps,
            n_tokens: 0,
            n_trained: 0,
            tflop: 0.0,
            largest_batch: [0; 2],
            memory: Vec::new(),
        };
        let mut n_pixels = 0;
        let mut largest = |rows: &Rows, laid_out: &[Laid], batch: &[usize]| -> Result<Size> {
            let mut size = Size::default();
            for row in batch.iter().map(|&i| laid_out[i]).filter(|row| row.n_tokens > 0) {
                size.lengths.push(row.n_tokens);
                size.n_images += row.n_images;
                size.n_learned += row.n_learned;
            }
            let [max_tokens, max_images] = &mut plan.largest_batch;
            *max_tokens = size.lengths.iter().sum::<usize>().max(*max_tokens);
            if size.n_images > *max_images {
                *max_images = size.n_images;
                n_pixels = batch.iter().map(|&i| rows.data.row(i).map_or(0, |row| pixels(&row))).sum();
            }
            Ok(size)
        };
        for _ in 0..n_steps {
            for batch in sampler.next_step() {
                let size = largest(&rows, &laid_out, &batch)?;
                plan.n_tokens += size.lengths.iter().sum::<usize>();
                plan.tflop += model_flops(&checkpoint.config, whole, n_added, &size) / 1e12;
            }
        }
        if let Some(rows) = &mut eval_rows {
            let laid_out = self::laid_out(masker, rows)?;
            let indices: Vec<usize> = (0..laid_out.len()).collect();
            for batch in indices.chunks(rows_at_once(config)) {
                largest(rows, &laid_out, batch)?;
            }
        }
        plan.n_trained = n_added.iter().sum();
        plan.add_memory(config, checkpoint, trained, recompute, n_pixels)?;
        Ok(plan)
    }

    /// Bytes in all.
    pub fn bytes(&self) -> usize {
        self.memory.iter().map(|(_, bytes)| bytes).sum()
    }

    fn add_memory(
        &mut self,
        settings: &Config,
        checkpoint: &Checkpoint,
        trained: Trained,
        recompute: Recompute,
        n_pixels: usize,
    ) -> Result<()> {
        let config = &checkpoint.config;
        let (mut frozen, mut n_trained, mut n_rounded) = (0, self.n_trained, self.n_trained);
        for entry in checkpoint.weights.entries() {
            let Some(name) = entry.canonical.filter(|name| is_run(name, config)) else { continue };
            if !learns_whole(settings, &name) {
                frozen += entry.bytes;
                continue;
            }
            n_trained += entry.parameters;
            if is_rounded(&name, &entry.shape) {
                n_rounded += entry.parameters;
            }
        }
        self.n_trained = n_trained;
        let [n_tokens, n_images] = self.largest_batch;
        let (v, t) = (&config.vision, &config.text);
        let (float, compute) = (DType::F32.size(), settings.dtype.dtype());
        let n_features = n_images * config.tokens_per_image();
        let n_projected = match &config.projector {
            // Inputs and outputs of its layers, and of the activations between them; three gradients at a time.
            ProjectorConfig::Mlp { n_linear, .. } => (2 * n_linear - 1 + 3) * t.hidden_size,
            ProjectorConfig::Identity => t.hidden_size,
        };
        let tower = match trained.vision {
            true => 0, // a part of the pass
            false => Counted::bytes(DType::F32, |room| ClipActs::plan(room, v, n_images.min(IMAGES_AT_ONCE)))?,
        };
        // Kernels copy the wider operand of a product.
        let widest = t.heads().qkv_width().max(2 * t.intermediate_size).max(t.hidden_size);
        let seen = n_images * (1 + v.n_patches());
        let widest_seen = if trained.vision { (3 * v.hidden_size).max(v.intermediate_size) } else { 0 };
        // What low-rank additions take of a layer's inputs, less what is dropped, and that times A.
        let dropped = if settings.has_lora() { n_tokens * (t.intermediate_size + settings.lora_r as usize) } else { 0 };
        let copies = (n_tokens * widest).max(LOSS_ROWS * t.vocab_size).max(seen * widest_seen);
        self.memory = vec![
            ("weights that do not learn, mapped", frozen),
            ("weights that learn, f32", n_trained * float),
            ("their matrices in 16 bits", if compute == DType::F32 { 0 } else { n_rounded * compute.size() }),
            ("their gradients", n_trained * float),
            ("their moments", 2 * n_trained * float),
            ("an adapter, while it is written", if settings.has_lora() { n_trained * float } else { 0 }),
            ("activations", Counted::bytes(DType::F32, |room| Tape::plan(room, config, trained, n_tokens, n_images, recompute))?),
            ("vision tower and projector", tower + n_features * (v.hidden_size + n_projected) * float),
            ("pictures", n_pixels * CHANNELS + n_images * CHANNELS * v.image_size.pow(2) * float),
            ("copies of operands", (copies + dropped) * float),
        ];
        Ok(())
    }
}

/// Whether a tensor takes part in a run: layers of the tower behind the selected one do not.
fn is_run(name: &str, config: &LlavaConfig) -> bool {
    let layer = name.strip_prefix("clip.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    layer.is_none_or(|layer| layer < config.n_vision_layers)
}

/// Whether products read it: all that learns but vectors, and the table of the tower's positions.
fn is_rounded(name: &str, shape: &[usize]) -> bool {
    shape.len() > 1 && name != "clip.position_embedding.weight"
}

/// Each row; one that cannot be used has no tokens.
fn laid_out(masker: &Masker<'_>, rows: &mut Rows) -> Result<Vec<Laid>> {
    let mut all = Vec::with_capacity(rows.data.n_rows());
    for index in 0..rows.data.n_rows() {
        let laid = rows.data.row(index).and_then(|row| {
            row.check_images()?;
            let example = masker.example(&row)?.example;
            let n_learned = example.is_answer.iter().filter(|is| **is).count();
            Ok(Laid { n_tokens: example.slots.len(), n_images: row.images.len(), n_learned })
        });
        all.push(rows.left_out(index, laid.map_err(|e| e.error))?.unwrap_or_default());
    }
    Ok(all)
}

/// Pixels of a row's pictures, by their headers; what is wrong with one is said when it is learnt.
fn pixels(row: &Row) -> usize {
    let sizes = row.images.iter().map(|path| probe(path, &Limits::default()));
    sizes.map(|size| size.map_or(0, |(width, height)| width * height)).sum()
}
