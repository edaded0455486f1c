//! Stages of the forward pass that an observer may look at: what golden tests compare, layer by layer, with the reference.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};
use crate::ops::Ops;
use crate::tensor::Tensor;

/// A point of the forward pass, and the tensor found there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Patches after CLIP's convolution: `[images · patches, vision hidden]`.
    PatchEmbedding,
    /// Class token and patches with their positions, before the first norm: `[images · (1 + patches), vision hidden]`.
    ClipEmbeddings,
    /// Output of this many of CLIP's layers (0: after the first norm): `[images · (1 + patches), vision hidden]`.
    ClipHidden(usize),
    /// The tokens that go on to the projector: `[images · tokens per image, vision hidden]`.
    ClipSelected,
    /// Projected features: `[images · tokens per image, hidden]`.
    ImageFeatures,
    /// Text embeddings with the image features in their places: `[tokens, hidden]`.
    InputEmbeds,
    /// Output of this many decoder layers, before the last norm: `[tokens, hidden]`; of the last layer only the rows asked for.
    DecoderHidden(usize),
    /// Input of matrices of a decoder layer, seen before that layer's output: `[tokens, their width]`; where the last layer runs for the
    /// rows asked for alone, of those, but for [`LinearInput::Qkv`].
    DecoderLinear(LinearInput),
}

/// Which matrices of a decoder layer: those that share an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinearInput {
    /// Of Q, K and V: the hidden states after the layer's first norm.
    Qkv,
    /// Of the attention's output matrix: what the heads have gathered.
    Out,
    /// Of gate and up: the hidden states after the layer's second norm.
    GateUp,
    /// Of down: the gated activations.
    Down,
}

/// Called at every stage.
pub type Observer<'a> = &'a mut dyn FnMut(Stage, &Tensor);

/// What a forward pass is given besides tensors.
pub struct Ctx<'a> {
    /// The device.
    pub ops: &'a dyn Ops,
    /// Who looks on, if anybody.
    pub observer: Option<Observer<'a>>,
    /// Set from elsewhere to end the pass before its next layer.
    pub cancel: Option<&'a AtomicBool>,
}

impl<'a> Ctx<'a> {
    /// A forward pass that nobody looks at.
    pub fn new(ops: &'a dyn Ops) -> Self {
        Self { ops, observer: None, cancel: None }
    }

    /// An error if the pass was cancelled.
    pub fn check_cancelled(&self) -> Result<()> {
        if self.cancel.is_some_and(|c| c.load(Ordering::Relaxed)) { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Shows a tensor to the observer, brought to the host where it is not there.
    pub fn observe(&mut self, stage: Stage, tensor: &Tensor) -> Result<()> {
        let Some(observer) = &mut self.observer else { return Ok(()) };
        if tensor.device_address().is_some() {
            observer(stage, &Tensor::from_slice(tensor.shape(), &self.ops.download(tensor)?));
        } else {
            observer(stage, tensor);
        }
        Ok(())
    }
}
