//! What every device refuses: operands whose shapes do not fit together. Dtypes are a device's own matter.

use std::ops::Range;

use super::{Draw, Heads, KvLayer, KvSource, Matrix, RopeTable, RowCopy, Span, Weight};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::image::{CHANNELS, Preprocess, RgbImage};
use crate::tensor::Tensor;

/// Refuses a tensor whose dtype the op has no code for.
pub fn dtype(op: &'static str, what: &str, tensor: &Tensor, dtype: DType) -> Result<()> {
    if tensor.dtype() == dtype { Ok(()) } else { Err(Error::shape(op, format!("dtype of {what}"), dtype, tensor.dtype())) }
}

/// Operands of [`Ops::linear`](super::Ops::linear).
pub fn linear(y: &Tensor, x: &Tensor, w: &Weight, bias: Option<&Tensor>) -> Result<()> {
    let [tokens, k] = x.dims2("linear", "x")?;
    let [y_rows, y_stride] = y.dims2("linear", "y")?;
    if k != w.k() {
        return Err(Error::shape("linear", "width of x", w.k(), k));
    }
    if y_rows != tokens || y_stride < w.first_col + w.n() {
        return Err(Error::shape("linear", "y", (tokens, w.first_col + w.n()), (y_rows, y_stride)));
    }
    bias.map_or(Ok(()), |bias| bias.expect("linear", "bias", &[w.n()]))
}

/// Operands of a norm over rows: `weights` are `[hidden]` each.
pub fn norm(op: &'static str, y: &Tensor, x: &Tensor, weights: &[(&str, &Tensor)]) -> Result<()> {
    let [_, hidden] = x.dims2(op, "x")?;
    y.expect(op, "y", x.shape())?;
    weights.iter().try_for_each(|(what, w)| w.expect(op, what, &[hidden]))
}

/// Operands of [`Ops::silu_mul`](super::Ops::silu_mul).
pub fn silu_mul(y: &Tensor, gate_up: &Tensor) -> Result<()> {
    let [tokens, n] = y.dims2("silu_mul", "y")?;
    gate_up.expect("silu_mul", "gate_up", &[tokens, 2 * n])
}

/// Operands of [`Ops::embed`](super::Ops::embed).
pub fn embed(y: &Tensor, table: &Matrix, ids: &[u32]) -> Result<()> {
    let size = match table {
        Matrix::Dense(table) => table.dims2("embed", "table")?,
        Matrix::Packed(table) => [table.n, table.k],
    };
    embeddings("embed", ("y", y), size, ids)
}

/// A row of y for each id of a row of a table `[vocab, hidden]`.
pub(super) fn embeddings(op: &'static str, y: (&str, &Tensor), [vocab, hidden]: [usize; 2], ids: &[u32]) -> Result<()> {
    y.1.expect(op, y.0, &[ids.len(), hidden])?;
    match ids.iter().find(|&&id| id as usize >= vocab) {
        Some(&id) => Err(Error::shape(op, "token id", format!("below {vocab}"), id)),
        None => Ok(()),
    }
}

/// Operands of [`Ops::preprocess`](super::Ops::preprocess).
pub fn preprocess(pixels: &Tensor, images: &[RgbImage], config: &Preprocess) -> Result<()> {
    config.check()?;
    pixels.expect("preprocess", "pixels", &[images.len(), CHANNELS, config.crop_size, config.crop_size])?;
    dtype("preprocess", "pixels", pixels, DType::F32)
}

/// Operands of [`Ops::patchify`](super::Ops::patchify); `[height, width]` of the pixels.
pub fn patchify(y: &Tensor, pixels: &Tensor, images: &Range<usize>, patch_size: usize) -> Result<[usize; 2]> {
    let &[n, CHANNELS, height, width] = pixels.shape() else {
        return Err(Error::shape("patchify", "pixels", "[images, 3, h, w]", pixels.shape()));
    };
    if images.start > images.end || images.end > n {
        return Err(Error::shape("patchify", "images", format!("within {n}"), images));
    }
    if patch_size == 0 || height % patch_size != 0 || width % patch_size != 0 {
        return Err(Error::shape("patchify", "pixels", format!("a multiple of {patch_size}"), pixels.shape()));
    }
    let n_patches = (height / patch_size) * (width / patch_size);
    y.expect("patchify", "y", &[images.len() * n_patches, CHANNELS * patch_size * patch_size])?;
    Ok([height, width])
}

/// Operands of [`Ops::clip_embed`](super::Ops::clip_embed).
pub fn clip_embed(y: &Tensor, patches: &Tensor, class: &Tensor, positions: &Tensor) -> Result<()> {
    clip_embeddings("clip_embed", ["y", "patches", "class", "positions"], [y, patches, class, positions])
}

/// Those, or their gradients: `names` says which.
pub(super) fn clip_embeddings(op: &'static str, names: [&str; 4], tensors: [&Tensor; 4]) -> Result<()> {
    let [y, patches, class, positions] = tensors;
    let [n_positions, hidden] = positions.dims2(op, names[3])?;
    class.expect(op, names[2], &[hidden])?;
    let [rows, width] = patches.dims2(op, names[1])?;
    if n_positions < 2 || rows % (n_positions - 1) != 0 || width != hidden {
        let expected = format!("[images * {}, {hidden}]", n_positions.max(1) - 1);
        return Err(Error::shape(op, names[1], expected, (rows, width)));
    }
    y.expect(op, names[0], &[rows / (n_positions - 1) * n_positions, hidden])
}

/// Operands of [`Ops::rope_append`](super::Ops::rope_append).
pub fn rope_append(qkv: &Tensor, kv: &KvLayer, rope: &RopeTable, spans: &[Span<'_>], heads: Heads) -> Result<()> {
    cache("rope_append", kv, heads)?;
    rotation("rope_append", qkv, rope, spans, heads, Some(kv))
}

/// Rows whose heads are turned by the angles of a table.
pub(super) fn rotation(
    op: &'static str,
    qkv: &Tensor,
    rope: &RopeTable,
    spans: &[Span<'_>],
    heads: Heads,
    kv: Option<&KvLayer>,
) -> Result<()> {
    let [tokens, width] = qkv.dims2(op, "qkv")?;
    if width != heads.qkv_width() {
        return Err(Error::shape(op, "width of qkv", heads.qkv_width(), width));
    }
    self::spans(op, spans, tokens, kv)?;
    let [positions, half] = rope.cos.dims2(op, "cos")?;
    rope.sin.expect(op, "sin", &[positions, half])?;
    let last = spans.iter().map(|s| s.past + s.n_rows).max().unwrap_or(0);
    if half * 2 != heads.head_dim || positions < last {
        return Err(Error::shape(op, "cos", (last, heads.head_dim / 2), (positions, half)));
    }
    Ok(())
}

/// Operands of [`Ops::attention`](super::Ops::attention).
pub fn attention(out: &Tensor, qkv: &Tensor, kv: KvSource<'_>, spans: &[Span<'_>], heads: Heads) -> Result<()> {
    let [tokens, width] = qkv.dims2("attention", "qkv")?;
    if width != heads.qkv_width() || heads.n_heads % heads.n_kv_heads != 0 {
        return Err(Error::shape("attention", "width of qkv", heads, width));
    }
    out.expect("attention", "out", &[tokens, heads.q_width()])?;
    match kv {
        KvSource::Paged(layer) => {
            cache("attention", layer, heads)?;
            self::spans("attention", spans, tokens, Some(layer))
        }
        KvSource::Own => self::spans("attention", spans, tokens, None),
    }
}

/// Operands of [`Ops::copy_rows`](super::Ops::copy_rows).
pub fn copy_rows(dst: &Tensor, src: &Tensor, copies: &[RowCopy]) -> Result<()> {
    row_copies("copy_rows", dst, src, copies)
}

/// Rows that come to rows as long as they are.
pub(super) fn row_copies(op: &'static str, dst: &Tensor, src: &Tensor, copies: &[RowCopy]) -> Result<()> {
    if dst.row_len() != src.row_len() || dst.dtype() != src.dtype() {
        return Err(Error::shape(op, "rows of src", dst, src));
    }
    match copies.iter().find(|c| c.dst + c.n_rows > dst.rows() || c.src + c.n_rows > src.rows()) {
        Some(copy) => Err(Error::shape(op, "rows", format!("within {} and {}", dst.rows(), src.rows()), copy)),
        None => Ok(()),
    }
}

/// Operands of [`Ops::sample`](super::Ops::sample), whose dtypes are the same on all devices; the size of the vocabulary.
pub fn sample(ids: &Tensor, logits: &Tensor, seen: &Tensor, draws: &[Draw]) -> Result<usize> {
    let [rows, vocab] = logits.dims2("sample", "logits")?;
    if vocab == 0 || vocab > 1 << 30 {
        return Err(Error::shape("sample", "vocabulary", "1 to 2^30 tokens", vocab));
    }
    ids.expect("sample", "ids", &[rows])?;
    seen.expect("sample", "seen", &[rows, vocab.div_ceil(32)])?;
    if draws.len() != rows {
        return Err(Error::shape("sample", "number of draws", rows, draws.len()));
    }
    dtype("sample", "logits", logits, DType::F32)?;
    dtype("sample", "ids", ids, DType::I32)?;
    dtype("sample", "seen", seen, DType::I32)?;
    Ok(vocab)
}

/// Refuses spans that leave the batch, or share rows, or whose pages do not hold them.
pub(super) fn spans(op: &'static str, spans: &[Span<'_>], tokens: usize, kv: Option<&KvLayer>) -> Result<()> {
    for span in spans {
        if span.first_row + span.n_rows > tokens {
            return Err(Error::shape(op, "rows of a span", format!("within {tokens}"), span));
        }
        let Some(kv) = kv else { continue };
        if span.pages.len() * kv.page_tokens() < span.past + span.n_rows {
            let expected = format!("at least {} tokens", span.past + span.n_rows);
            return Err(Error::shape(op, "pages of a span", expected, span.pages.len()));
        }
        if let Some(&page) = span.pages.iter().find(|&&p| p as usize >= kv.k.rows()) {
            return Err(Error::shape(op, "page", format!("below {}", kv.k.rows()), page));
        }
    }
    // Each row is written by one task: no two spans may have it.
    let mut sorted: Vec<_> = spans.iter().filter(|span| span.n_rows > 0).collect();
    sorted.sort_by_key(|span| span.first_row);
    match sorted.windows(2).find(|pair| pair[0].first_row + pair[0].n_rows > pair[1].first_row) {
        Some(pair) => Err(Error::shape(op, "rows of two spans", "none in common", pair)),
        None => Ok(()),
    }
}

fn cache(op: &'static str, kv: &KvLayer, heads: Heads) -> Result<()> {
    let expected = [kv.k.rows(), heads.n_kv_heads, kv.k.shape().get(2).copied().unwrap_or(0), heads.head_dim];
    kv.k.expect(op, "key cache", &expected)?;
    kv.v.expect(op, "value cache", &expected)?;
    dtype(op, "value cache", &kv.v, kv.k.dtype())?;
    if kv.scales.is_some() != (kv.k.dtype() == DType::I8) {
        return Err(Error::shape(op, "scales of the cache", "some for i8, else none", (&kv.k, &kv.scales)));
    }
    kv.scales.iter().flatten().try_for_each(|scales| {
        scales.expect(op, "scales of the cache", &expected[..3])?;
        dtype(op, "scales of the cache", scales, DType::F32)
    })
}
