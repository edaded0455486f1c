//! Attention: out = softmax(q·Kᵀ/√head_dim)·V for each head, in f32 over a cache in f32, bf16, f16, or 8 bits with
//! scales: those of keys multiply scores, those of values probabilities.
//!
//! Spans of more than [`DECODE_ROWS`] rows go in blocks with an online softmax ([`blocks`](super::attention_blocks): Dao et al.,
//! arXiv 2205.14135), whose products are those of the linear layer; spans of fewer stream K and V once
//! ([`decode`](super::attention_decode)), in chunks of the context that are merged at the end.
//!
//! Numerics: a row's result depends on its sequence and on the kind of its span, not on the batch, the pages or the number of threads.

use half::{bf16, f16};

use super::pool::{Disjoint, Pool};
use super::simd::{Isa, Stored};
use super::{attention_blocks, attention_decode};
use crate::dtype::DType;
use crate::ops::{Heads, KvSource, Span};
use crate::tensor::Tensor;

/// The most rows of a span that are bound by reading the cache.
pub const DECODE_ROWS: usize = 4;

/// One attention op at work.
pub(super) struct Attention<'a> {
    /// What it writes: `[tokens, q_width]`; of the gradient, `[tokens, qkv_width]`.
    pub out: Disjoint<'a, f32>,
    /// `[tokens, qkv_width]`
    pub qkv: &'a [f32],
    pub heads: Heads,
    pub causal: bool,
    /// 1/√head_dim
    pub scale: f32,
    /// `[tokens, n_heads]`: the logarithm of each row's Σ exp(score), where it is wanted.
    pub lse: Option<Disjoint<'a, f32>>,
}

/// Where the keys and values of a token are.
#[derive(Clone, Copy)]
pub(super) enum Kv<'a, E> {
    /// In the rows of `qkv`.
    Own(&'a [E]),
    /// In pages `[n_pages, n_kv_heads, page_tokens, head_dim]`, with scales `[n_pages, n_kv_heads, page_tokens]` if they are integers.
    Paged { k: &'a [E], v: &'a [E], page_tokens: usize, scales: Option<[&'a [f32]; 2]> },
}

/// The queries that use one key and value head of a span, stacked: query q is that of row `q / group`.
#[derive(Clone, Copy)]
pub(super) struct Stack<'a> {
    pub op: &'a Attention<'a>,
    pub span: &'a Span<'a>,
    pub kv_head: usize,
}

impl Attention<'_> {
    /// Query heads that share a key and value head.
    pub fn group(&self) -> usize {
        self.heads.n_heads / self.heads.n_kv_heads
    }
}

impl<'a> Stack<'a> {
    /// Tokens that query `q` sees, from the start of its sequence.
    pub fn visible(&self, q: usize) -> usize {
        self.span.past + if self.op.causal { q / self.op.group() + 1 } else { self.span.n_rows }
    }

    /// How many of `n_keys` keys from position `key` on query `q` sees; of queries in a row, the last sees most.
    pub fn n_seen(&self, q: usize, key: usize, n_keys: usize) -> usize {
        self.visible(q).saturating_sub(key).min(n_keys)
    }

    /// The first query that sees position `key`; those after it see it too.
    pub fn first_to_see(&self, key: usize) -> usize {
        if self.op.causal { key.saturating_sub(self.span.past) * self.op.group() } else { 0 }
    }

    /// Row and head of query `q`.
    fn row_head(&self, q: usize) -> (usize, usize) {
        let group = self.op.group();
        (self.span.first_row + q / group, self.kv_head * group + q % group)
    }

    /// Where query `q` starts in `qkv`.
    pub fn query_index(&self, q: usize) -> usize {
        let ((row, head), heads) = (self.row_head(q), self.op.heads);
        row * heads.qkv_width() + head * heads.head_dim
    }

    /// Query `q`: `head_dim` numbers.
    pub fn query(&self, q: usize) -> &'a [f32] {
        &self.op.qkv[self.query_index(q)..][..self.op.heads.head_dim]
    }

    /// Where the result of query `q` starts in `out`.
    pub fn out_index(&self, q: usize) -> usize {
        let ((row, head), heads) = (self.row_head(q), self.op.heads);
        row * heads.q_width() + head * heads.head_dim
    }

    /// Where in `[tokens, n_heads]` query `q` is.
    pub fn head_index(&self, q: usize) -> usize {
        let (row, head) = self.row_head(q);
        row * self.op.heads.n_heads + head
    }

    /// The key and the value at position `token` of the sequence: `head_dim` elements each.
    pub fn key_value<'k, E>(&self, kv: Kv<'k, E>, token: usize) -> (&'k [E], &'k [E]) {
        let (heads, d) = (self.op.heads, self.op.heads.head_dim);
        match kv {
            Kv::Own(qkv) => {
                let row = &qkv[(self.span.first_row + token) * heads.qkv_width()..][..heads.qkv_width()];
                let k = heads.q_width() + self.kv_head * d;
                (&row[k..][..d], &row[k + heads.kv_width()..][..d])
            }
            Kv::Paged { k, v, page_tokens, .. } => {
                let at = self.slot(page_tokens, token) * d;
                (&k[at..][..d], &v[at..][..d])
            }
        }
    }

    /// Which of the cache's rows of `head_dim` elements is that of position `token`.
    fn slot(&self, page_tokens: usize, token: usize) -> usize {
        let page = self.span.pages[token / page_tokens] as usize;
        (page * self.op.heads.n_kv_heads + self.kv_head) * page_tokens + token % page_tokens
    }

    /// Writes the scales of keys and of values from position `token` on, if there are any; whether there are.
    pub fn scales<E>(&self, kv: Kv<'_, E>, token: usize, k_scales: &mut [f32], v_scales: &mut [f32]) -> bool {
        let Kv::Paged { scales: Some([k, v]), page_tokens, .. } = kv else { return false };
        for (i, (k_scale, v_scale)) in k_scales.iter_mut().zip(v_scales).enumerate() {
            let slot = self.slot(page_tokens, token + i);
            (*k_scale, *v_scale) = (k[slot], v[slot]);
        }
        true
    }
}

/// out = softmax(q·Kᵀ/√head_dim)·V for each head: q in qkv `[tokens, qkv_width]`, out `[tokens, q_width]`.
///
/// Row r of a span sees the first `past + r + 1` tokens of its sequence if `causal`, else all `past + n_rows`. With [`KvSource::Own`] the
/// keys and values are those of the span's own rows, and `past` is 0.
///
/// # Panics
/// If spans, pages or heads do not fit the buffers.
#[allow(clippy::too_many_arguments)] // the operands of `Ops::attention`, and where to run
pub fn attention(
    isa: Isa,
    pool: &Pool,
    out: &mut [f32],
    qkv: &[f32],
    kv: KvSource<'_>,
    spans: &[Span<'_>],
    heads: Heads,
    causal: bool,
) {
    match kv {
        KvSource::Own => {
            assert!(spans.iter().all(|span| span.past == 0), "keys of the past are in no cache");
            attention_of(isa, pool, out, None, qkv, Kv::Own(qkv), spans, heads, causal);
        }
        KvSource::Paged(layer) => {
            let page_tokens = layer.page_tokens();
            macro_rules! of {
                ($E:ty) => {{
                    let scales = layer.scales.as_ref().map(|scales| scales.each_ref().map(Tensor::as_slice));
                    let kv = Kv::Paged { k: layer.k.as_slice::<$E>(), v: layer.v.as_slice::<$E>(), page_tokens, scales };
                    attention_of(isa, pool, out, None, qkv, kv, spans, heads, causal)
                }};
            }
            match layer.k.dtype() {
                DType::F32 => of!(f32),
                DType::Bf16 => of!(bf16),
                DType::F16 => of!(f16),
                DType::I8 => of!(i8),
                DType::I32 => panic!("keys are not integers of 32 bits"),
            }
        }
    }
}

/// [`attention`] over the rows' own keys and values, all of it in blocks, and lse\[t, h\] = ln Σ exp(q·k/√head_dim): `[tokens, n_heads]`.
///
/// # Panics
/// If spans or heads do not fit the buffers.
#[allow(clippy::too_many_arguments)] // as `attention`
pub fn attention_lse(
    isa: Isa,
    pool: &Pool,
    out: &mut [f32],
    lse: &mut [f32],
    qkv: &[f32],
    spans: &[Span<'_>],
    heads: Heads,
    causal: bool,
) {
    assert!(spans.iter().all(|span| span.past == 0), "keys of the past are in no cache");
    attention_of(isa, pool, out, Some(lse), qkv, Kv::Own(qkv), spans, heads, causal);
}

/// row\[i\] *= scales\[i\]
#[inline(always)]
pub(super) fn scale(row: &mut [f32], scales: &[f32]) {
    for (x, s) in row.iter_mut().zip(scales) {
        *x *= s;
    }
}

#[allow(clippy::too_many_arguments)] // as `attention`
fn attention_of<E: Stored>(
    isa: Isa,
    pool: &Pool,
    out: &mut [f32],
    lse: Option<&mut [f32]>,
    qkv: &[f32],
    kv: Kv<'_, E>,
    spans: &[Span<'_>],
    heads: Heads,
    causal: bool,
) {
    // Kernels rely on these; pages are checked where they are read.
    let Heads { n_heads, n_kv_heads, head_dim } = heads;
    assert!(n_kv_heads > 0 && n_heads % n_kv_heads == 0 && head_dim > 0 && head_dim % 8 == 0, "{heads:?}");
    let rows = spans.iter().map(|span| span.first_row + span.n_rows).max().unwrap_or(0);
    assert!(out.len() >= rows * heads.q_width() && qkv.len() >= rows * heads.qkv_width(), "spans of {rows} rows");
    let scale = 1.0 / (head_dim as f32).sqrt();
    let op = Attention { out: Disjoint::new(out), qkv, heads, causal, scale, lse: lse.map(Disjoint::new) };
    let most_few = if op.lse.is_some() { 0 } else { DECODE_ROWS };
    let (few, many): (Vec<_>, Vec<_>) = spans.iter().filter(|span| span.n_rows > 0).partition(|span| span.n_rows <= most_few);
    if !many.is_empty() {
        attention_blocks::attend(isa, pool, &op, kv, &many);
    }
    if !few.is_empty() {
        attention_decode::attend(isa, pool, &op, kv, &few);
    }
}
