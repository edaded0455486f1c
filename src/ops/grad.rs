//! [`GradOps`]: what training needs of a device beyond [`Ops`]: the gradient of each op on the path, the loss, and the optimizer.
//!
//! `dy` is the gradient of the loss by `y`. Gradients of parameters are added to what is there (`+=`), so that several batches make one step.
//! Those of activations are written (`=`), unless the op says otherwise: norms add theirs, since the residual stream flows around them.
//!
//! Gradients of activations have the dtype of activations. Parameters that are trained, their gradients and moments, log-sum-exps and losses
//! are f32. All sums have an order that no number of threads changes: results are the same from run to run, bit for bit.

use super::{Heads, Ops, RopeTable, RowCopy, Span, Weight};
use crate::error::Result;
use crate::tensor::Tensor;

/// What a gradient does with what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Update {
    /// `=`
    Set,
    /// `+=`
    Add,
}

/// Which way heads are turned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotation {
    /// By the angle of their position.
    Forward,
    /// Back by it: the transposed matrix, which takes gradients back.
    Inverse,
}

/// An activation function by itself, where its input is kept for the backward. ([`Epilogue`](super::Epilogue) has them fused.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// f(x) = x·Φ(x), with the exact erf
    Gelu,
    /// f(x) = x·σ(1.702 x)
    QuickGelu,
}

/// One step of AdamW (Loshchilov & Hutter, arXiv 1711.05101), as PyTorch's `AdamW` makes it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// How much of the first moment is kept.
    pub beta1: f64,
    /// How much of the second moment is kept.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Share of a parameter that decays, times the learning rate.
    pub weight_decay: f64,
    /// Number of this step, from 1 on.
    pub step: u64,
    /// Factor of all gradients: what clipping has left, and the inverse of a loss scale.
    pub grad_scale: f64,
}

/// What [`AdamW`] comes to for one element, in f32: computed on the host, so that all devices have the same.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWFactors {
    /// As in [`AdamW`].
    pub grad_scale: f32,
    /// 1 − lr·weight_decay
    pub decay: f32,
    /// 1 − β₁
    pub one_minus_beta1: f32,
    /// β₂
    pub beta2: f32,
    /// 1 − β₂
    pub one_minus_beta2: f32,
    /// √(1 − β₂ᵗ)
    pub sqrt_correction2: f32,
    /// As in [`AdamW`].
    pub eps: f32,
    /// lr / (1 − β₁ᵗ)
    pub step_size: f32,
}

impl AdamW {
    /// The factors of this step.
    pub fn factors(&self) -> AdamWFactors {
        let correction = |beta: f64| 1.0 - beta.powf(self.step as f64);
        AdamWFactors {
            grad_scale: self.grad_scale as f32,
            decay: (1.0 - self.lr * self.weight_decay) as f32,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            sqrt_correction2: correction(self.beta2).sqrt() as f32,
            eps: self.eps as f32,
            step_size: (self.lr / correction(self.beta1)) as f32,
        }
    }
}

/// What training asks of a device. All ops check their operands and say which one does not fit.
pub trait GradOps: Ops {
    /// t = 0
    fn clear(&self, t: &mut Tensor) -> Result<()>;

    /// t = factor·t, t of activations or f32: LoRA's α/r.
    fn scale(&self, t: &mut Tensor, factor: f32) -> Result<()>;

    /// Adds rows of `src` to rows of `dst`, copy after copy: the gradient of [`Ops::copy_rows`], with `dst` and `src` of each copy exchanged.
    ///
    /// Rows of `dst` may occur in several copies. Reads both and writes one: 3 elements moved for one added.
    fn add_rows(&self, dst: &mut Tensor, src: &Tensor, copies: &[RowCopy]) -> Result<()>;

    /// Rotates the queries and keys of `qkv` `[tokens, qkv_width]` in place, as [`Ops::rope_append`] does but without a cache; or back, which
    /// is what gradients need. Row r of a span stands at position `past + r`. Values stay as they are.
    fn rope(&self, qkv: &mut Tensor, rope: &RopeTable, spans: &[Span<'_>], heads: Heads, rotation: Rotation) -> Result<()>;

    /// [`Ops::attention`] over the rows' own keys and values, and lse\[t, h\] = ln Σ exp(q·k/√head_dim) over what row t sees, f32
    /// `[tokens, n_heads]`: all that the backward needs of the probabilities. Spans have no past and share no rows.
    #[allow(clippy::too_many_arguments)] // results, operands, and what they mean
    fn attention_lse(
        &self,
        out: &mut Tensor,
        lse: &mut Tensor,
        qkv: &Tensor,
        spans: &[Span<'_>],
        heads: Heads,
        causal: bool,
    ) -> Result<()>;

    /// d_qkv = the gradient of [`GradOps::attention_lse`] by qkv, both `[tokens, qkv_width]`; out, d_out `[tokens, q_width]`, lse
    /// `[tokens, n_heads]` as that has written it. Rows that are in no span stay as they are.
    ///
    /// With P = exp(q·Kᵀ/√d − lse), which is made again block by block, and D = Σ d_out ⊙ out over a head:
    /// dV = Pᵀ·d_out, dS = P ⊙ (d_out·Vᵀ − D)/√d, dq = dS·K, dK = dSᵀ·q. Where query heads share keys and values, their gradients add up.
    /// 5 products where the forward has 2: `10·pairs·q_width` FLOPs.
    #[allow(clippy::too_many_arguments)] // as `attention_lse`
    fn attention_backward(
        &self,
        d_qkv: &mut Tensor,
        qkv: &Tensor,
        out: &Tensor,
        d_out: &Tensor,
        lse: &Tensor,
        spans: &[Span<'_>],
        heads: Heads,
        causal: bool,
    ) -> Result<()>;

    /// dx = dy\[:, c..c+n\]·W, or dx += of it, c = `w.first_col`: the gradient of [`Ops::linear`] by x.
    ///
    /// dx `[tokens, k]`, dy `[tokens, >= c + n]`, W `[n, k]` dense or packed: integers are dequantized a block at a time, W is never copied.
    /// `2·tokens·n·k` FLOPs; working memory is a copy of dy.
    fn linear_dx(&self, dx: &mut Tensor, dy: &Tensor, w: &Weight, update: Update) -> Result<()>;

    /// dW += dy\[:, c..c+n\]ᵀ·x, c = `first_col`: the gradient of [`Ops::linear`] by one part of its weight.
    ///
    /// dW f32 `[n, k]`, dy `[tokens, >= c + n]`, x `[tokens, k]`. `2·tokens·n·k` FLOPs; working memory is a copy of dy.
    fn linear_dw(&self, dw: &mut Tensor, dy: &Tensor, first_col: usize, x: &Tensor) -> Result<()>;

    /// db += Σ_t dy\[t, c..c+n\], c = `first_col`: db f32 `[n]`, dy `[tokens, >= c + n]`. Reads dy once.
    fn bias_backward(&self, db: &mut Tensor, dy: &Tensor, first_col: usize) -> Result<()>;

    /// The gradient of [`Ops::rms_norm`]: with rstd = 1/sqrt(mean(x²) + eps), x̂ = x·rstd and g = dy ⊙ w,
    /// dx += rstd·(g − x̂·mean(g ⊙ x̂)), dw += Σ_t dy ⊙ x̂.
    ///
    /// dx, dy, x `[tokens, hidden]`, w f32 `[hidden]`; dw f32 `[hidden]`, if it is wanted. Reads dy, x and dx, writes dx.
    fn rms_norm_backward(
        &self,
        dx: &mut Tensor,
        dw: Option<&mut Tensor>,
        dy: &Tensor,
        x: &Tensor,
        w: &Tensor,
        eps: f32,
    ) -> Result<()>;

    /// The gradient of [`Ops::layer_norm`]: with rstd = 1/sqrt(var(x) + eps), x̂ = (x − mean(x))·rstd and g = dy ⊙ w,
    /// dx += rstd·(g − mean(g) − x̂·mean(g ⊙ x̂)), dw += Σ_t dy ⊙ x̂, db += Σ_t dy.
    ///
    /// dx, dy, x `[tokens, hidden]`, w f32 `[hidden]`; dw and db f32 `[hidden]`, if they are wanted. Reads dy, x and dx, writes dx.
    fn layer_norm_backward(
        &self,
        dx: &mut Tensor,
        d_wb: Option<[&mut Tensor; 2]>,
        dy: &Tensor,
        x: &Tensor,
        w: &Tensor,
        eps: f32,
    ) -> Result<()>;

    /// The gradient of [`Ops::silu_mul`]: d_gate = dy ⊙ up ⊙ silu′(gate), d_up = dy ⊙ silu(gate), silu′(g) = σ(g)·(1 + g·(1 − σ(g))).
    ///
    /// d_gate_up, gate_up `[tokens, 2·n]` (gate first), dy `[tokens, n]`.
    fn silu_mul_backward(&self, d_gate_up: &mut Tensor, dy: &Tensor, gate_up: &Tensor) -> Result<()>;

    /// y = f(x), element by element: y, x of one shape.
    fn activate(&self, y: &mut Tensor, x: &Tensor, f: Activation) -> Result<()>;

    /// dx = dy ⊙ f′(x): dx, dy, x of one shape. gelu′(x) = Φ(x) + x·φ(x); quick_gelu′(x) = s·(1 + 1.702 x·(1 − s)), s = σ(1.702 x).
    fn activate_backward(&self, dx: &mut Tensor, dy: &Tensor, x: &Tensor, f: Activation) -> Result<()>;

    /// d_table\[ids\[i\]\] += dy\[i\], for each i in order: the gradient of [`Ops::embed`]. d_table f32 `[vocab, hidden]`, dy
    /// `[ids.len(), hidden]`.
    fn embed_backward(&self, d_table: &mut Tensor, dy: &Tensor, ids: &[u32]) -> Result<()>;

    /// The gradient of [`Ops::clip_embed`]: d_patches\[i·p+j\] = dy\[i·(1+p)+1+j\], d_class += Σ_i dy\[i·(1+p)\],
    /// d_positions\[j\] += Σ_i dy\[i·(1+p)+j\].
    ///
    /// d_patches `[images·p, hidden]`, d_class f32 `[hidden]`, d_positions f32 `[1+p, hidden]`, dy `[images·(1+p), hidden]`.
    fn clip_embed_backward(
        &self,
        d_patches: &mut Tensor,
        d_class: &mut Tensor,
        d_positions: &mut Tensor,
        dy: &Tensor,
    ) -> Result<()>;

    /// loss\[r\] = ln Σ_i exp(logits\[r, i\]) − logits\[r, labels\[r\]\], in nats; then logits\[r\] becomes its gradient
    /// scale·(softmax(logits\[r\]) − onehot(labels\[r\])).
    ///
    /// logits f32 `[rows, vocab]`, loss f32 `[rows]`; `scale` is one over the number of tokens that a loss is the mean of. A row that holds
    /// NaN or +∞ has a loss of NaN. Reads logits three times, writes them twice.
    fn cross_entropy(&self, logits: &mut Tensor, loss: &mut Tensor, labels: &[u32], scale: f32) -> Result<()>;

    /// y\[i\] = x\[i\]/(1 − p), or 0 with probability p: which of them is decided by `key` and i alone, in whole numbers ([`super::dropout`]).
    ///
    /// x, y of one shape; 0 <= p < 1. It is its own gradient: the same op with the same key, of dy.
    fn dropout(&self, y: &mut Tensor, x: &Tensor, p: f32, key: u64) -> Result<()>;

    /// Σ x² over the elements of all `tensors`, f32, in f64; not finite if one of them is not. Waits for what was asked for before.
    fn sq_norm(&self, tensors: &[&Tensor]) -> Result<f64>;

    /// One step of AdamW. With g = grad_scale·grad and t = `step`:
    ///
    /// ```text
    /// param ← param·(1 − lr·weight_decay)
    /// m ← m + (1 − β₁)·(g − m)                 v ← β₂·v + (1 − β₂)·g²
    /// param ← param − lr/(1 − β₁ᵗ)·m / (√v/√(1 − β₂ᵗ) + eps)
    /// ```
    ///
    /// param, m, v, grad f32 of one shape. `rounded`, if there is one, is what the model computes with: param in its own dtype. Moves 28
    /// bytes a parameter.
    fn adamw(
        &self,
        param: &mut Tensor,
        m: &mut Tensor,
        v: &mut Tensor,
        grad: &Tensor,
        rounded: Option<&mut Tensor>,
        options: &AdamW,
    ) -> Result<()>;
}
