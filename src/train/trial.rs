//! [`Trial`]: training steps over rows that are made up, to see how long they take.

use super::config::Config;
use super::flops::{Size, model_flops};
use super::lora;
use super::optim::Optimizer;
use super::run::{passes, trained_whole};
use crate::dtype::DType;
use crate::error::Result;
use crate::model::config::LlavaConfig;
use crate::model::{Batch, Llava, Slot, Tape};
use crate::ops::GradOps;
use crate::tensor::Tensor;
use crate::weights::Source;

/// A model that is trained as a run would, but for its rows: each has one picture, and all are alike.
pub struct Trial {
    config: Config,
    ops: Box<dyn GradOps>,
    model: Llava,
    optimizer: Optimizer,
    n_done: u64,
}

/// Rows of a step, and the buffers that it takes.
pub struct Rows {
    tape: Tape,
    pixels: Tensor, // [rows, 3, image_size, image_size]
    slots: Vec<Slot>,
    is_learned: Vec<bool>,
    size: Size,
}

impl Trial {
    /// A model of the shape `shape` with weights from `source`, on a device that was opened for the dtype of the settings.
    ///
    /// # Errors
    /// If it cannot be trained so.
    pub fn new(ops: Box<dyn GradOps>, config: Config, shape: &LlavaConfig, source: &dyn Source) -> Result<Self> {
        let mut model = lora::begin(&*ops, &config, shape, source)?;
        model.train(&*ops, trained_whole(&config), config.dtype.dtype())?;
        Ok(Self { optimizer: Optimizer::new(&config), config, ops, model, n_done: 0 })
    }

    /// The device.
    pub fn ops(&self) -> &dyn GradOps {
        &*self.ops
    }

    /// The model.
    pub fn model(&self) -> &Llava {
        &self.model
    }

    /// Rows of `prompt` and `answer`, which is learned, one for each of the pictures `pixels` `[rows, 3, image_size, image_size]`.
    ///
    /// # Errors
    /// If there is no memory for a step.
    pub fn rows(&self, pixels: Tensor, prompt: &[Slot], answer: &[u32]) -> Result<Rows> {
        let config = self.model.config();
        let (n_rows, length) = (pixels.rows(), prompt.len() + answer.len());
        let slot = |i: usize| match prompt.get(i % length) {
            Some(Slot::Image { feature_row }) => Slot::Image { feature_row: i / length * config.tokens_per_image() + feature_row },
            Some(token) => *token,
            None => Slot::Token(answer[i % length - prompt.len()]),
        };
        let (trained, recompute) = passes(&self.config);
        Ok(Rows {
            tape: Tape::plan(&*self.ops, config, trained, n_rows * length, n_rows, recompute)?,
            pixels: self.ops.upload(pixels)?,
            slots: (0..n_rows * length).map(slot).collect(),
            is_learned: (0..n_rows * length).map(|i| i % length >= prompt.len()).collect(),
            size: Size { lengths: vec![length; n_rows], n_images: n_rows, n_learned: n_rows * answer.len() },
        })
    }

    /// FLOPs of a step ([`model_flops`]).
    pub fn flops(&self, rows: &Rows) -> f64 {
        let config = self.model.config();
        model_flops(config, trained_whole(&self.config), lora::n_added(&self.config, config), &rows.size)
    }

    /// Makes a step, waits for its end, and returns the mean loss of what it learned, in nats.
    ///
    /// # Errors
    /// If it fails; if a gradient is not finite.
    pub fn step(&mut self, rows: &mut Rows) -> Result<f64> {
        let Rows { tape, pixels, slots, is_learned, size } = rows;
        self.model.set_pass(Some(self.n_done));
        let batch = Batch { slots, is_learned, lengths: &size.lengths };
        let scale = self.optimizer.loss_scale().map_or(1.0, |scale| scale.value()) / size.n_learned as f32;
        let loss = self.model.gradients(&*self.ops, tape, Some(pixels), &batch, scale)?;
        self.optimizer.step(&*self.ops, &mut self.model, 1.0)?;
        self.n_done += 1;
        // A device does what it is asked in that order: when this has come from it, all before is done.
        self.ops.download(&self.ops.alloc(&[1], DType::F32)?)?;
        Ok(loss / size.n_learned as f64)
    }
}
