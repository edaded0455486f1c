//! What every device refuses of [`GradOps`](super::GradOps): operands whose shapes do not fit together. Dtypes are checked here where they are
//! the same on all devices.

use super::check::{self, dtype};
use super::{AdamW, Heads, RopeTable, RowCopy, Span, Weight};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Refuses tensors that are not f32, which some must be on all devices.
pub fn f32s<const N: usize>(op: &'static str, tensors: [(&str, &Tensor); N]) -> Result<()> {
    tensors.into_iter().try_for_each(|(what, tensor)| dtype(op, what, tensor, DType::F32))
}

/// Refuses tensors that are not of the shape of `like`.
pub fn alike<const N: usize>(op: &'static str, like: &Tensor, tensors: [(&str, &Tensor); N]) -> Result<()> {
    tensors.into_iter().try_for_each(|(what, tensor)| tensor.expect(op, what, like.shape()))
}

/// Operands of [`GradOps::add_rows`](super::GradOps::add_rows).
pub fn add_rows(dst: &Tensor, src: &Tensor, copies: &[RowCopy]) -> Result<()> {
    check::row_copies("add_rows", dst, src, copies)
}

/// Operands of [`GradOps::rope`](super::GradOps::rope).
pub fn rope(qkv: &Tensor, rope: &RopeTable, spans: &[Span<'_>], heads: Heads) -> Result<()> {
    check::rotation("rope", qkv, rope, spans, heads, None)
}

/// Operands of attention over own rows, forward or backward: `qkvs` are `[tokens, qkv_width]`, `outs` `[tokens, q_width]`.
pub fn own_attention(
    op: &'static str,
    qkvs: &[(&str, &Tensor)],
    outs: &[(&str, &Tensor)],
    lse: &Tensor,
    spans: &[Span<'_>],
    heads: Heads,
) -> Result<()> {
    let Heads { n_heads, n_kv_heads, head_dim } = heads;
    if n_kv_heads == 0 || n_heads % n_kv_heads != 0 || head_dim == 0 || head_dim % 8 != 0 {
        let expected = "a multiple of key heads, each a multiple of 8 wide";
        return Err(Error::shape(op, "heads", expected, heads));
    }
    let tokens = lse.rows();
    lse.expect(op, "lse", &[tokens, n_heads])?;
    dtype(op, "lse", lse, DType::F32)?;
    qkvs.iter().try_for_each(|(what, t)| t.expect(op, what, &[tokens, heads.qkv_width()]))?;
    outs.iter().try_for_each(|(what, t)| t.expect(op, what, &[tokens, heads.q_width()]))?;
    check::spans(op, spans, tokens, None)?;
    if let Some(span) = spans.iter().find(|span| span.past != 0) {
        return Err(Error::shape(op, "past of a span", 0, span.past));
    }
    Ok(())
}

/// Operands of [`GradOps::linear_dx`](super::GradOps::linear_dx).
pub fn linear_dx(dx: &Tensor, dy: &Tensor, w: &Weight) -> Result<()> {
    let [tokens, _] = dy.dims2("linear_dx", "dy")?;
    columns("linear_dx", dy, w.first_col, w.n())?;
    dx.expect("linear_dx", "dx", &[tokens, w.k()])
}

/// Operands of [`GradOps::linear_dw`](super::GradOps::linear_dw).
pub fn linear_dw(dw: &Tensor, dy: &Tensor, first_col: usize, x: &Tensor) -> Result<()> {
    let [n, k] = dw.dims2("linear_dw", "dw")?;
    dtype("linear_dw", "dw", dw, DType::F32)?;
    let [tokens, _] = dy.dims2("linear_dw", "dy")?;
    columns("linear_dw", dy, first_col, n)?;
    x.expect("linear_dw", "x", &[tokens, k])
}

/// Operands of [`GradOps::bias_backward`](super::GradOps::bias_backward).
pub fn bias_backward(db: &Tensor, dy: &Tensor, first_col: usize) -> Result<()> {
    let &[n] = db.shape() else { return Err(Error::shape("bias_backward", "db", "one dimension", db.shape())) };
    dtype("bias_backward", "db", db, DType::F32)?;
    dy.dims2("bias_backward", "dy")?;
    columns("bias_backward", dy, first_col, n)
}

/// Refuses a dy that has no columns `first_col .. first_col + n`.
fn columns(op: &'static str, dy: &Tensor, first_col: usize, n: usize) -> Result<()> {
    match first_col.checked_add(n) {
        Some(end) if end <= dy.row_len() => Ok(()),
        _ => Err(Error::shape(op, "width of dy", format!("at least {first_col} + {n}"), dy.row_len())),
    }
}

/// Operands of a norm's backward: `vectors`, its weights and their gradients, are f32 `[hidden]`.
pub fn norm_backward(op: &'static str, dx: &Tensor, dy: &Tensor, x: &Tensor, vectors: &[(&str, &Tensor)]) -> Result<()> {
    let [_, hidden] = x.dims2(op, "x")?;
    alike(op, x, [("dx", dx), ("dy", dy)])?;
    vectors.iter().try_for_each(|(what, t)| {
        t.expect(op, what, &[hidden])?;
        dtype(op, what, t, DType::F32)
    })
}

/// Operands of [`GradOps::silu_mul_backward`](super::GradOps::silu_mul_backward).
pub fn silu_mul_backward(d_gate_up: &Tensor, dy: &Tensor, gate_up: &Tensor) -> Result<()> {
    let [tokens, n] = dy.dims2("silu_mul_backward", "dy")?;
    gate_up.expect("silu_mul_backward", "gate_up", &[tokens, 2 * n])?;
    d_gate_up.expect("silu_mul_backward", "d_gate_up", gate_up.shape())
}

/// Operands of [`GradOps::embed_backward`](super::GradOps::embed_backward).
pub fn embed_backward(d_table: &Tensor, dy: &Tensor, ids: &[u32]) -> Result<()> {
    check::embeddings("embed_backward", ("dy", dy), d_table.dims2("embed_backward", "d_table")?, ids)?;
    dtype("embed_backward", "d_table", d_table, DType::F32)
}

/// Operands of [`GradOps::clip_embed_backward`](super::GradOps::clip_embed_backward).
pub fn clip_embed_backward(d_patches: &Tensor, d_class: &Tensor, d_positions: &Tensor, dy: &Tensor) -> Result<()> {
    const OP: &str = "clip_embed_backward";
    check::clip_embeddings(OP, ["dy", "d_patches", "d_class", "d_positions"], [dy, d_patches, d_class, d_positions])?;
    f32s(OP, [("d_class", d_class), ("d_positions", d_positions)])
}

/// Operands of [`GradOps::cross_entropy`](super::GradOps::cross_entropy).
pub fn cross_entropy(logits: &Tensor, loss: &Tensor, labels: &[u32]) -> Result<()> {
    let [rows, vocab] = logits.dims2("cross_entropy", "logits")?;
    loss.expect("cross_entropy", "loss", &[rows])?;
    f32s("cross_entropy", [("logits", logits), ("loss", loss)])?;
    if labels.len() != rows {
        return Err(Error::shape("cross_entropy", "number of labels", rows, labels.len()));
    }
    match labels.iter().find(|&&label| label as usize >= vocab) {
        Some(label) => Err(Error::shape("cross_entropy", "label", format!("below {vocab}"), label)),
        None => Ok(()),
    }
}

/// Operands of [`GradOps::dropout`](super::GradOps::dropout).
pub fn dropout(y: &Tensor, x: &Tensor, p: f32) -> Result<()> {
    alike("dropout", x, [("y", y)])?;
    if (0.0..1.0).contains(&p) { Ok(()) } else { Err(Error::shape("dropout", "p", "at least 0 and below 1", p)) }
}

/// Operands of [`GradOps::adamw`](super::GradOps::adamw).
pub fn adamw(param: &Tensor, m: &Tensor, v: &Tensor, grad: &Tensor, rounded: Option<&Tensor>, options: &AdamW) -> Result<()> {
    const OP: &str = "adamw";
    alike(OP, param, [("m", m), ("v", v), ("grad", grad)])?;
    f32s(OP, [("param", param), ("m", m), ("v", v), ("grad", grad)])?;
    rounded.map_or(Ok(()), |rounded| rounded.expect(OP, "rounded", param.shape()))?;
    if options.step == 0 {
        return Err(Error::shape(OP, "step", "counted from 1", 0));
    }
    Ok(())
}
