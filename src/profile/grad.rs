//! The ops of training, timed.

use super::{Profiled, Work};
use crate::error::Result;
use crate::ops::{Activation, AdamW, GradOps, Heads, Matrix, RopeTable, Rotation, RowCopy, Span, Update, Weight};
use crate::tensor::Tensor;

/// What a product of `rows`, `cols` and sums of `terms` comes to, of operands of so many bytes.
fn product(rows: usize, cols: usize, terms: usize, bytes: usize) -> Work {
    Work { bytes, flops: 2 * rows * cols * terms, ..Work::default() }
}

/// An op that moves `bytes`, with `flops`.
fn moves(bytes: usize, flops: usize) -> Work {
    Work { bytes, flops, ..Work::default() }
}

impl GradOps for Profiled<dyn GradOps> {
    fn clear(&self, t: &mut Tensor) -> Result<()> {
        self.timed("clear", moves(t.bytes(), 0), |ops| ops.clear(t))
    }

    fn scale(&self, t: &mut Tensor, factor: f32) -> Result<()> {
        self.timed("scale", moves(2 * t.bytes(), t.len()), |ops| ops.scale(t, factor))
    }

    fn add_rows(&self, dst: &mut Tensor, src: &Tensor, copies: &[RowCopy]) -> Result<()> {
        let n = copies.iter().map(|c| c.n_rows).sum::<usize>() * src.row_len();
        self.timed("add_rows", moves(3 * n * src.dtype().size(), n), |ops| ops.add_rows(dst, src, copies))
    }

    fn rope(&self, qkv: &mut Tensor, rope: &RopeTable, spans: &[Span<'_>], heads: Heads, rotation: Rotation) -> Result<()> {
        let n = qkv.rows() * (heads.q_width() + heads.kv_width());
        let work = moves(2 * n * qkv.dtype().size(), 3 * n);
        self.timed("rope", work, |ops| ops.rope(qkv, rope, spans, heads, rotation))
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
        let work = moves(qkv.bytes() + out.bytes() + lse.bytes(), 4 * super::pairs(spans, causal) * heads.q_width());
        self.timed("attention_lse", work, |ops| ops.attention_lse(out, lse, qkv, spans, heads, causal))
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
        let bytes = 2 * (qkv.bytes() + out.bytes()) + lse.bytes();
        let work = moves(bytes, 10 * super::pairs(spans, causal) * heads.q_width());
        self.timed("attention_backward", work, |ops| ops.attention_backward(d_qkv, qkv, out, d_out, lse, spans, heads, causal))
    }

    fn linear_dx(&self, dx: &mut Tensor, dy: &Tensor, w: &Weight, update: Update) -> Result<()> {
        let tokens = dy.rows();
        let written = dx.bytes() * if update == Update::Add { 2 } else { 1 };
        let packed_rows: usize = w.parts.iter().filter(|part| matches!(part, Matrix::Packed(_))).map(Matrix::n).sum();
        let work = Work {
            stored_bytes: w.bytes(),
            packed_flops: 2 * tokens * packed_rows * w.k(),
            ..product(tokens, w.k(), w.n(), w.bytes() + tokens * w.n() * dy.dtype().size() + written)
        };
        self.timed("linear_dx", work, |ops| ops.linear_dx(dx, dy, w, update))
    }

    fn linear_dw(&self, dw: &mut Tensor, dy: &Tensor, first_col: usize, x: &Tensor) -> Result<()> {
        let (tokens, n) = (dy.rows(), dw.rows());
        let bytes = 2 * dw.bytes() + tokens * n * dy.dtype().size() + x.bytes();
        self.timed("linear_dw", product(n, dw.row_len(), tokens, bytes), |ops| ops.linear_dw(dw, dy, first_col, x))
    }

    fn bias_backward(&self, db: &mut Tensor, dy: &Tensor, first_col: usize) -> Result<()> {
        let n = dy.rows() * db.len();
        self.timed("bias_backward", moves(n * dy.dtype().size(), n), |ops| ops.bias_backward(db, dy, first_col))
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
        let work = moves(4 * x.bytes(), 11 * x.len());
        self.timed("rms_norm_backward", work, |ops| ops.rms_norm_backward(dx, dw, dy, x, w, eps))
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
        let work = moves(4 * x.bytes(), 15 * x.len());
        self.timed("layer_norm_backward", work, |ops| ops.layer_norm_backward(dx, d_wb, dy, x, w, eps))
    }

    fn silu_mul_backward(&self, d_gate_up: &mut Tensor, dy: &Tensor, gate_up: &Tensor) -> Result<()> {
        let work = moves(2 * gate_up.bytes() + dy.bytes(), 12 * dy.len());
        self.timed("silu_mul_backward", work, |ops| ops.silu_mul_backward(d_gate_up, dy, gate_up))
    }

    fn activate(&self, y: &mut Tensor, x: &Tensor, f: Activation) -> Result<()> {
        self.timed("activate", moves(2 * x.bytes(), 4 * x.len()), |ops| ops.activate(y, x, f))
    }

    fn activate_backward(&self, dx: &mut Tensor, dy: &Tensor, x: &Tensor, f: Activation) -> Result<()> {
        self.timed("activate_backward", moves(3 * x.bytes(), 8 * x.len()), |ops| ops.activate_backward(dx, dy, x, f))
    }

    fn embed_backward(&self, d_table: &mut Tensor, dy: &Tensor, ids: &[u32]) -> Result<()> {
        let work = moves(dy.bytes() + 2 * dy.len() * d_table.dtype().size(), dy.len());
        self.timed("embed_backward", work, |ops| ops.embed_backward(d_table, dy, ids))
    }

    fn clip_embed_backward(
        &self,
        d_patches: &mut Tensor,
        d_class: &mut Tensor,
        d_positions: &mut Tensor,
        dy: &Tensor,
    ) -> Result<()> {
        let work = moves(2 * dy.bytes(), dy.len());
        self.timed("clip_embed_backward", work, |ops| ops.clip_embed_backward(d_patches, d_class, d_positions, dy))
    }

    fn cross_entropy(&self, logits: &mut Tensor, loss: &mut Tensor, labels: &[u32], scale: f32) -> Result<()> {
        let work = moves(2 * logits.bytes(), 5 * logits.len());
        self.timed("cross_entropy", work, |ops| ops.cross_entropy(logits, loss, labels, scale))
    }

    fn dropout(&self, y: &mut Tensor, x: &Tensor, p: f32, key: u64) -> Result<()> {
        self.timed("dropout", moves(2 * x.bytes(), x.len()), |ops| ops.dropout(y, x, p, key))
    }

    fn sq_norm(&self, tensors: &[&Tensor]) -> Result<f64> {
        let (bytes, len) = (tensors.iter().map(|t| t.bytes()).sum(), tensors.iter().map(|t| t.len()).sum::<usize>());
        self.timed("sq_norm", moves(bytes, 2 * len), |ops| ops.sq_norm(tensors))
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
        let bytes = 7 * param.bytes() + rounded.as_deref().map_or(0, Tensor::bytes);
        self.timed("adamw", moves(bytes, 14 * param.len()), |ops| ops.adamw(param, m, v, grad, rounded, options))
    }
}
