//! The CPU's part of training: operands are checked here, then handed to the kernels, which stand beside those of the forward.

use super::{Cpu, attention, attention_backward, elementwise, loss, matmul_grad, norm, optim, rope, sum_rows};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::dropout::Dropout;
use crate::ops::{Activation, AdamW, GradOps, Heads, RopeTable, Rotation, RowCopy, Span, Update, Weight, check, check_grad};
use crate::tensor::Tensor;

impl GradOps for Cpu {
    fn clear(&self, t: &mut Tensor) -> Result<()> {
        t.as_mut_bytes().fill(0);
        Ok(())
    }

    fn scale(&self, t: &mut Tensor, factor: f32) -> Result<()> {
        check::dtype("scale", "t", t, DType::F32)?;
        elementwise::scale(&self.pool, t.as_mut_slice(), factor);
        Ok(())
    }

    fn add_rows(&self, dst: &mut Tensor, src: &Tensor, copies: &[RowCopy]) -> Result<()> {
        check_grad::add_rows(dst, src, copies)?;
        check::dtype("add_rows", "dst", dst, DType::F32)?;
        elementwise::add_rows(dst, src, copies);
        Ok(())
    }

    fn rope(&self, qkv: &mut Tensor, table: &RopeTable, spans: &[Span<'_>], heads: Heads, rotation: Rotation) -> Result<()> {
        check_grad::rope(qkv, table, spans, heads)?;
        check_grad::f32s("rope", [("qkv", qkv), ("cos", &table.cos), ("sin", &table.sin)])?;
        rope::rope(&self.pool, qkv.as_mut_slice(), table, spans, heads, rotation);
        Ok(())
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
        check_grad::own_attention("attention_lse", &[("qkv", qkv)], &[("out", out)], lse, spans, heads)?;
        check_grad::f32s("attention_lse", [("out", out), ("qkv", qkv)])?;
        let (out, lse) = (out.as_mut_slice(), lse.as_mut_slice());
        attention::attention_lse(self.isa, &self.pool, out, lse, qkv.as_slice(), spans, heads, causal);
        Ok(())
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
        const OP: &str = "attention_backward";
        check_grad::own_attention(OP, &[("d_qkv", d_qkv), ("qkv", qkv)], &[("out", out), ("d_out", d_out)], lse, spans, heads)?;
        check_grad::f32s(OP, [("d_qkv", d_qkv), ("qkv", qkv), ("out", out), ("d_out", d_out)])?;
        let (d_qkv, forward) = (d_qkv.as_mut_slice(), [out, d_out, lse].map(Tensor::as_slice));
        attention_backward::attention_backward(self.isa, &self.pool, d_qkv, qkv.as_slice(), forward, spans, heads, causal);
        Ok(())
    }

    fn linear_dx(&self, dx: &mut Tensor, dy: &Tensor, w: &Weight, update: Update) -> Result<()> {
        check_grad::linear_dx(dx, dy, w)?;
        check_grad::f32s("linear_dx", [("dx", dx), ("dy", dy)])?;
        matmul_grad::linear_dx(self.isa, &self.pool, dx.as_mut_slice(), dy.as_slice(), dy.row_len(), w, update);
        Ok(())
    }

    fn linear_dw(&self, dw: &mut Tensor, dy: &Tensor, first_col: usize, x: &Tensor) -> Result<()> {
        check_grad::linear_dw(dw, dy, first_col, x)?;
        check_grad::f32s("linear_dw", [("dy", dy), ("x", x)])?;
        let dy = matmul_grad::Columns { data: dy.as_slice(), stride: dy.row_len(), first: first_col };
        matmul_grad::linear_dw(self.isa, &self.pool, dw.as_mut_slice(), dy, x.as_slice(), x.row_len());
        Ok(())
    }

    fn bias_backward(&self, db: &mut Tensor, dy: &Tensor, first_col: usize) -> Result<()> {
        check_grad::bias_backward(db, dy, first_col)?;
        check::dtype("bias_backward", "dy", dy, DType::F32)?;
        sum_rows::sum_columns(&self.pool, db.as_mut_slice(), dy.as_slice(), dy.row_len(), first_col);
        Ok(())
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
        const OP: &str = "rms_norm_backward";
        check_grad::norm_backward(OP, dx, dy, x, &[("w", w)])?;
        dw.as_deref().map_or(Ok(()), |dw| check_grad::norm_backward(OP, dx, dy, x, &[("dw", dw)]))?;
        check_grad::f32s(OP, [("dx", dx), ("dy", dy), ("x", x)])?;
        let dw = dw.map(Tensor::as_mut_slice);
        norm::rms_norm_backward(&self.pool, dx.as_mut_slice(), dw, dy.as_slice(), x.as_slice(), w.as_slice(), eps);
        Ok(())
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
        const OP: &str = "layer_norm_backward";
        check_grad::norm_backward(OP, dx, dy, x, &[("w", w)])?;
        if let Some([dw, db]) = &d_wb {
            check_grad::norm_backward(OP, dx, dy, x, &[("dw", dw), ("db", db)])?;
        }
        check_grad::f32s(OP, [("dx", dx), ("dy", dy), ("x", x)])?;
        let d_wb = d_wb.map(|d_wb| d_wb.map(Tensor::as_mut_slice));
        norm::layer_norm_backward(&self.pool, dx.as_mut_slice(), d_wb, dy.as_slice(), x.as_slice(), w.as_slice(), eps);
        Ok(())
    }

    fn silu_mul_backward(&self, d_gate_up: &mut Tensor, dy: &Tensor, gate_up: &Tensor) -> Result<()> {
        check_grad::silu_mul_backward(d_gate_up, dy, gate_up)?;
        check_grad::f32s("silu_mul_backward", [("d_gate_up", d_gate_up), ("dy", dy), ("gate_up", gate_up)])?;
        let n = dy.row_len();
        elementwise::silu_mul_backward(self.isa, &self.pool, d_gate_up.as_mut_slice(), dy.as_slice(), gate_up.as_slice(), n);
        Ok(())
    }

    fn activate(&self, y: &mut Tensor, x: &Tensor, f: Activation) -> Result<()> {
        check_grad::alike("activate", x, [("y", y)])?;
        check_grad::f32s("activate", [("y", y), ("x", x)])?;
        elementwise::activate(self.isa, &self.pool, y.as_mut_slice(), x.as_slice(), f);
        Ok(())
    }

    fn activate_backward(&self, dx: &mut Tensor, dy: &Tensor, x: &Tensor, f: Activation) -> Result<()> {
        check_grad::alike("activate_backward", x, [("dx", dx), ("dy", dy)])?;
        check_grad::f32s("activate_backward", [("dx", dx), ("dy", dy), ("x", x)])?;
        elementwise::activate_backward(self.isa, &self.pool, dx.as_mut_slice(), dy.as_slice(), x.as_slice(), f);
        Ok(())
    }

    fn embed_backward(&self, d_table: &mut Tensor, dy: &Tensor, ids: &[u32]) -> Result<()> {
        check_grad::embed_backward(d_table, dy, ids)?;
        check::dtype("embed_backward", "dy", dy, DType::F32)?;
        elementwise::embed_backward(&self.pool, d_table.as_mut_slice(), dy.as_slice(), ids, dy.row_len());
        Ok(())
    }

    fn clip_embed_backward(
        &self,
        d_patches: &mut Tensor,
        d_class: &mut Tensor,
        d_positions: &mut Tensor,
        dy: &Tensor,
    ) -> Result<()> {
        check_grad::clip_embed_backward(d_patches, d_class, d_positions, dy)?;
        check_grad::f32s("clip_embed_backward", [("d_patches", d_patches), ("dy", dy)])?;
        let (d_class, d_positions) = (d_class.as_mut_slice(), d_positions.as_mut_slice());
        elementwise::clip_embed_backward(&self.pool, d_patches.as_mut_slice(), d_class, d_positions, dy.as_slice());
        Ok(())
    }

    fn cross_entropy(&self, logits: &mut Tensor, loss: &mut Tensor, labels: &[u32], scale: f32) -> Result<()> {
        check_grad::cross_entropy(logits, loss, labels)?;
        let vocab = logits.row_len();
        loss::cross_entropy(self.isa, &self.pool, logits.as_mut_slice(), loss.as_mut_slice(), labels, vocab, scale);
        Ok(())
    }

    fn dropout(&self, y: &mut Tensor, x: &Tensor, p: f32, key: u64) -> Result<()> {
        check_grad::dropout(y, x, p)?;
        check_grad::f32s("dropout", [("y", y), ("x", x)])?;
        elementwise::dropout(&self.pool, y.as_mut_slice(), x.as_slice(), Dropout::new(p, key));
        Ok(())
    }

    fn sq_norm(&self, tensors: &[&Tensor]) -> Result<f64> {
        tensors.iter().try_for_each(|t| check::dtype("sq_norm", "a tensor", t, DType::F32))?;
        let tensors: Vec<&[f32]> = tensors.iter().map(|t| t.as_slice()).collect();
        Ok(optim::sq_norm(self.isa, &self.pool, &tensors))
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
        check_grad::adamw(param, m, v, grad, rounded.as_deref(), options)?;
        let moments = [m.as_mut_slice(), v.as_mut_slice()];
        optim::adamw(self.isa, &self.pool, param.as_mut_slice(), moments, grad.as_slice(), rounded, options.factors());
        Ok(())
    }
}
