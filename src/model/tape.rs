//! What a training pass keeps for its way back: one slot for each layer, of decoder and vision tower alike.

use super::acts::Room;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{Heads, Ops, RowCopy};
use crate::tensor::Tensor;

/// What is computed again on the way back instead of being kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// Nothing, but for probabilities of attention, and A·x of low-rank additions.
    None,
    /// Norms and activation functions: cheap, and half of what there is to keep.
    Selective,
    /// Whole layers: only their inputs are kept.
    Full,
}

/// Widths of a transformer layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Widths {
    pub hidden: usize,
    pub heads: Heads,
    /// Of what the activation function takes, and of what it gives.
    pub mlp_in: usize,
    pub mlp: usize,
}

/// What a layer keeps, beside its input.
pub(super) struct Saved {
    pub qkv: Tensor,    // [tokens, qkv_width], rotated
    pub attn: Tensor,   // [tokens, q_width]
    pub lse: Tensor,    // f32 [tokens, n_heads]
    pub mid: Tensor,    // [tokens, hidden]: the residual stream after attention
    pub mlp_in: Tensor, // [tokens, mlp_in]
    /// Outputs of both norms and of the activation function, if they are not made again.
    pub normed: [Option<Tensor>; 2], // [tokens, hidden]
    pub act: Option<Tensor>, // [tokens, mlp]
}

/// Where a layer puts what its products take: `kept`, or else `work`, where the next layer overwrites it.
pub(super) fn place<'a>(kept: &'a mut Option<Tensor>, work: &'a mut Tensor) -> &'a mut Tensor {
    kept.as_mut().unwrap_or(work)
}

/// What was kept; else what `make` makes of `work`, again.
pub(super) fn kept_or<'a>(
    kept: &'a Option<Tensor>,
    work: &'a mut Tensor,
    make: impl FnOnce(&mut Tensor) -> Result<()>,
) -> Result<&'a Tensor> {
    if let Some(kept) = kept {
        return Ok(kept);
    }
    make(work)?;
    Ok(work)
}

/// What layers need while they run, and no longer.
pub(super) struct Work {
    pub normed: Tensor,   // [tokens, hidden], but for 0 columns where it is kept
    pub act: Tensor,      // [tokens, mlp], likewise
    pub d_act: Tensor,    // [tokens, mlp]
    pub d_mlp_in: Tensor, // [tokens, mlp_in]
    pub d_normed: Tensor, // [tokens, hidden]
    pub d_attn: Tensor,   // [tokens, q_width]
    pub d_qkv: Tensor,    // [tokens, qkv_width]
}

/// A stack of layers on a training pass.
pub(super) struct Stack {
    /// Input of each layer, and the output of the last, `[tokens, hidden]`.
    pub hidden: Vec<Tensor>,
    /// Of each layer; one that all share if whole layers are computed again.
    pub saved: Vec<Saved>,
    pub work: Work,
    /// The gradient by the residual stream, `[tokens, hidden]`.
    pub d_x: Tensor,
}

impl Stack {
    pub fn plan(
        ops: &(impl Room + ?Sized),
        widths: Widths,
        n_layers: usize,
        max_tokens: usize,
        recompute: Recompute,
    ) -> Result<Self> {
        let Widths { hidden, heads, mlp_in, mlp } = widths;
        let alloc = |width| ops.room(&[max_tokens, width], ops.of_activations());
        let is_kept = recompute == Recompute::None;
        let kept = |width| is_kept.then(|| alloc(width)).transpose();
        let not_kept = |width| alloc(if is_kept { 0 } else { width });
        let saved = || {
            Ok(Saved {
                qkv: alloc(heads.qkv_width())?,
                attn: alloc(heads.q_width())?,
                lse: ops.room(&[max_tokens, heads.n_heads], DType::F32)?,
                mid: alloc(hidden)?,
                mlp_in: alloc(mlp_in)?,
                normed: [kept(hidden)?, kept(hidden)?],
                act: kept(mlp)?,
            })
        };
        let n_saved = if recompute == Recompute::Full { n_layers.min(1) } else { n_layers };
        Ok(Self {
            hidden: (0..=n_layers).map(|_| alloc(hidden)).collect::<Result<_>>()?,
            saved: (0..n_saved).map(|_| saved()).collect::<Result<_>>()?,
            work: Work {
                normed: not_kept(hidden)?,
                act: not_kept(mlp)?,
                d_act: alloc(mlp)?,
                d_mlp_in: alloc(mlp_in)?,
                d_normed: alloc(hidden)?,
                d_attn: alloc(heads.q_width())?,
                d_qkv: alloc(heads.qkv_width())?,
            },
            d_x: alloc(hidden)?,
        })
    }

    /// Makes all buffers `tokens` rows long.
    pub fn set_tokens(&mut self, tokens: usize) {
        let Work { normed, act, d_act, d_mlp_in, d_normed, d_attn, d_qkv } = &mut self.work;
        for t in [normed, act, d_act, d_mlp_in, d_normed, d_attn, d_qkv, &mut self.d_x].into_iter().chain(&mut self.hidden) {
            t.set_rows(tokens);
        }
        for Saved { qkv, attn, lse, mid, mlp_in, normed, act } in &mut self.saved {
            for t in [qkv, attn, lse, mid, mlp_in].into_iter().chain(normed.iter_mut().flatten()).chain(act) {
                t.set_rows(tokens);
            }
        }
    }

    /// The first of `hidden` that holds a number that is not finite.
    pub fn first_not_finite(&self, ops: &dyn Ops) -> Result<Option<usize>> {
        for (i, hidden) in self.hidden.iter().enumerate() {
            if ops.download(hidden)?.iter().any(|x| !x.is_finite()) {
                return Ok(Some(i));
            }
        }
        Ok(None)
    }

    /// Layers.
    pub fn n_layers(&self) -> usize {
        self.hidden.len() - 1
    }

    /// Runs `layer(i, input, output, saved, work)` for layer `i`.
    pub fn forward(
        &mut self,
        i: usize,
        layer: impl FnOnce(&Tensor, &mut Tensor, &mut Saved, &mut Work) -> Result<()>,
    ) -> Result<()> {
        let (before, after) = self.hidden.split_at_mut(i + 1);
        let slot = i.min(self.saved.len() - 1);
        layer(&before[i], &mut after[0], &mut self.saved[slot], &mut self.work)
    }

    /// Runs `layer(input, saved, work, d_x)` for layer `i`, on the way back.
    pub fn backward(&mut self, i: usize, layer: impl FnOnce(&Tensor, &Saved, &mut Work, &mut Tensor) -> Result<()>) -> Result<()> {
        let slot = i.min(self.saved.len() - 1);
        layer(&self.hidden[i], &self.saved[slot], &mut self.work, &mut self.d_x)
    }

    /// The output of the last layer.
    pub fn output(&self) -> &Tensor {
        self.hidden.last().expect("there is an input at least")
    }

    /// Whether the layer must run again before its way back.
    pub fn is_shared(&self) -> bool {
        self.saved.len() < self.n_layers()
    }
}

/// dst = src, both `[tokens, hidden]`.
pub(super) fn copy(ops: &dyn Ops, dst: &mut Tensor, src: &Tensor) -> Result<()> {
    ops.copy_rows(dst, src, &[RowCopy { dst: 0, src: 0, n_rows: src.rows() }])
}
