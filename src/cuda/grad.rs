//! [`GradOps`] for [`Cuda`]: where each op is.

use super::Cuda;
use crate::error::Result;
use crate::ops::{Activation, AdamW, GradOps, Heads, RopeTable, Rotation, RowCopy, Span, Update, Weight};
use crate::tensor::Tensor;

impl GradOps for Cuda {
    fn clear(&self, t: &mut Tensor) -> Result<()> {
        self.clear(t)
    }

    fn scale(&self, t: &mut Tensor, factor: f32) -> Result<()> {
        self.scale(t, factor)
    }

    fn add_rows(&self, dst: &mut Tensor, src: &Tensor, copies: &[RowCopy]) -> Result<()> {
        self.add_rows(dst, src, copies)
    }

    fn rope(&self, qkv: &mut Tensor, rope: &RopeTable, spans: &[Span<'_>], heads: Heads, rotation: Rotation) -> Result<()> {
        self.rope(qkv, rope, spans, heads, rotation)
    }

    fn attention_lse(
        &self,
        out: &mut Tensor,
        lse: &mut Tensor,
        qkv: &Tensor,
        spans: &[Span<'_>],
        heads: Heads,
        causal: bool,
    ) -> Result<()> {
        self.attention_lse(out, lse, qkv, spans, heads, causal)
    }

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
    ) -> Result<()> {
        self.attention_backward(d_qkv, qkv, [out, d_out, lse], spans, heads, causal)
    }

    fn linear_dx(&self, dx: &mut Tensor, dy: &Tensor, w: &Weight, update: Update) -> Result<()> {
        self.linear_dx(dx, dy, w, update)
    }

    fn linear_dw(&self, dw: &mut Tensor, dy: &Tensor, first_col: usize, x: &Tensor) -> Result<()> {
        self.linear_dw(dw, dy, first_col, x)
    }

    fn bias_backward(&self, db: &mut Tensor, dy: &Tensor, first_col: usize) -> Result<()> {
        self.bias_backward(db, dy, first_col)
    }

    fn rms_norm_backward(
        &self,
        dx: &mut Tensor,
        dw: Option<&mut Tensor>,
        dy: &Tensor,
        x: &Tensor,
        w: &Tensor,
        eps: f32,
    ) -> Result<()> {
        self.rms_norm_backward(dx, dw, dy, x, w, eps)
    }

    fn layer_norm_backward(
        &self,
        dx: &mut Tensor,
        d_wb: Option<[&mut Tensor; 2]>,
        dy: &Tensor,
        x: &Tensor,
        w: &Tensor,
        eps: f32,
    ) -> Result<()> {
        self.layer_norm_backward(dx, d_wb, dy, x, w, eps)
    }

    fn silu_mul_backward(&self, d_gate_up: &mut Tensor, dy: &Tensor, gate_up: &Tensor) -> Result<()> {
        self.silu_mul_backward(d_gate_up, dy, gate_up)
    }

    fn activate(&self, y: &mut Tensor, x: &Tensor, f: Activation) -> Result<()> {
        self.activate(y, x, f)
    }

    fn activate_backward(&self, dx: &mut Tensor, dy: &Tensor, x: &Tensor, f: Activation) -> Result<()> {
        self.activate_backward(dx, dy, x, f)
    }

    fn embed_backward(&self, d_table: &mut Tensor, dy: &Tensor, ids: &[u32]) -> Result<()> {
        self.embed_backward(d_table, dy, ids)
    }

    fn clip_embed_backward(
        &self,
        d_patches: &mut Tensor,
        d_class: &mut Tensor,
        d_positions: &mut Tensor,
        dy: &Tensor,
    ) -> Result<()> {
        self.clip_embed_backward(d_patches, d_class, d_positions, dy)
    }

    fn cross_entropy(&self, logits: &mut Tensor, loss: &mut Tensor, labels: &[u32], scale: f32) -> Result<()> {
        self.cross_entropy(logits, loss, labels, scale)
    }

    fn dropout(&self, y: &mut Tensor, x: &Tensor, p: f32, key: u64) -> Result<()> {
        self.dropout(y, x, p, key)
    }

    fn sq_norm(&self, tensors: &[&Tensor]) -> Result<f64> {
        self.sq_norm(tensors)
    }

    fn adamw(
        &self,
        param: &mut Tensor,
        m: &mut Tensor,
        v: &mut Tensor,
        grad: &Tensor,
        rounded: Option<&mut Tensor>,
        options: &AdamW,
    ) -> Result<()> {
        self.adamw([param, m, v], grad, rounded, options)
    }
}
