//! Launches of `kernels/attention.cu`, `kernels/attention_decode.cu` and `kernels/widen.cu`.
//!
//! A cache of 8 bits is read as it is where one row a sequence meets it. Where more do, the pages of the sequences at hand are brought to the
//! dtype of activations first, in memory that all layers share.

use std::sync::{Mutex, PoisonError};

use super::Cuda;
use super::driver::{Arg, DevicePtr, Grid};
use super::launch::{Kernel, address, int};
use super::memory::Allocation;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::{Heads, KvLayer, KvSource, Span, check, check_grad};
use crate::tensor::Tensor;

/// Threads of a block, of all kernels.
pub(super) const THREADS: usize = 128;
/// The widest head that there are kernels for.
pub(super) const MAX_HEAD_DIM: usize = 256;
/// Blocks for each multiprocessor that splitting a context aims at: fewer leave memory waiting, more only make parts to be merged.
const DECODE_BLOCKS: usize = 4;
/// Tokens below which a part of a context is not worth a block: twice what a block has under way at a head of 128.
const SPLIT_TOKENS: usize = 64;

/// Numbers of a thread of `widen_cache_fwd`.
const WIDEN_PART: usize = 8;

/// Head widths up to which there is a kernel, and the kernel.
const WIDTHS: [(usize, Kernel); 5] = [
    (64, Kernel::AttentionD64),
    (80, Kernel::AttentionD80),
    (96, Kernel::AttentionD96),
    (128, Kernel::AttentionD128),
    (MAX_HEAD_DIM, Kernel::AttentionD256),
];

/// Rows of a block of `attention_fwd_d{width}`, and its shared memory: `MmaTile` and `PlainTile` of `kernels/attention.cu`.
fn tile(dtype: DType, width: usize) -> (usize, usize) {
    if dtype != DType::F32 && width <= 128 {
        // K and V of 64 tokens, twice, in 16 bits.
        (64, 2 * 2 * 64 * (width + 8) * 2)
    } else {
        // Q of 16 rows, K and V of 32 tokens, in f32.
        (16, (16 + 2 * 32) * (width.next_multiple_of(32) + 4) * 4)
    }
}

/// The kernel for heads of a width, and the width up to which it takes them.
pub(super) fn of_width(op: &'static str, kernels: &[(usize, Kernel)], heads: Heads) -> Result<(usize, Kernel)> {
    let fits = |&&(width, _): &&(usize, Kernel)| heads.head_dim > 0 && heads.head_dim % 8 == 0 && heads.head_dim <= width;
    let wrong = || Error::shape(op, "head_dim", format!("a multiple of 8 up to {MAX_HEAD_DIM}"), heads.head_dim);
    kernels.iter().find(fits).copied().ok_or_else(wrong)
}

/// What the blocks of a decode step leave for each other. Its size depends on the device alone, so that it never moves.
#[derive(Default)]
pub(super) struct Workspace(Mutex<Option<Allocation>>);

/// Keys and values of one layer's pages in the dtype of activations. It is as large as the cache of a layer, so that it does not move while
/// contexts grow; launches are done in order, so all layers share it.
#[derive(Default)]
pub(super) struct Widened(Mutex<Option<[Tensor; 2]>>);

impl Cuda {
    /// [`Ops::attention`](crate::ops::Ops::attention)
    pub(super) fn attention(
        &self,
        out: &mut Tensor,
        qkv: &Tensor,
        kv: KvSource<'_>,
        spans: &[Span<'_>],
        heads: Heads,
        causal: bool,
    ) -> Result<()> {
        check::attention(out, qkv, kv, spans, heads)?;
        self.attention_with("attention", out, None, qkv, kv, spans, heads, causal)
    }

    /// [`GradOps::attention_lse`](crate::ops::GradOps::attention_lse)
    pub(super) fn attention_lse(
        &self,
        out: &mut Tensor,
        lse: &mut Tensor,
        qkv: &Tensor,
        spans: &[Span<'_>],
        heads: Heads,
        causal: bool,
    ) -> Result<()> {
        const OP: &str = "attention_lse";
        check_grad::own_attention(OP, &[("qkv", qkv)], &[("out", out)], lse, spans, heads)?;
        self.attention_with(OP, out, Some(lse), qkv, KvSource::Own, spans, heads, causal)
    }

    /// Both of them: shapes are checked.
    #[allow(clippy::too_many_arguments)] // as `attention_lse`
    fn attention_with(
        &self,
        op: &'static str,
        out: &mut Tensor,
        lse: Option<&mut Tensor>,
        qkv: &Tensor,
        kv: KvSource<'_>,
        spans: &[Span<'_>],
        heads: Heads,
        causal: bool,
    ) -> Result<()> {
        check::dtype(op, "out", out, self.dtype)?;
        check::dtype(op, "qkv", qkv, self.dtype)?;
        let (width, kernel) = of_width(op, &WIDTHS, heads)?;
        let qkv_ptr = address(op, "qkv", qkv)?;
        // Where keys, values and the scales of both are.
        let (cache, scales, page_tokens) = match kv {
            KvSource::Own => {
                if let Some(span) = spans.iter().find(|span| span.past != 0) {
                    return Err(Error::shape(op, "past of a span without a cache", 0, span));
                }
                ([qkv_ptr; 2], None, 0)
            }
            KvSource::Paged(layer) => {
                let kept = if layer.scales.is_some() { DType::I8 } else { self.dtype };
                check::dtype(op, "key cache", &layer.k, kept)?;
                check::dtype(op, "value cache", &layer.v, kept)?;
                let scales = layer.scales.as_ref();
                let scales =
                    scales.map(|[k, v]| Ok::<_, Error>([address(op, "scales", k)?, address(op, "scales", v)?])).transpose()?;
                let cache = [address(op, "key cache", &layer.k)?, address(op, "value cache", &layer.v)?];
                (cache, scales, layer.page_tokens())
            }
        };
        let n_rows = spans.iter().map(|span| span.n_rows).max().unwrap_or(0);
        if n_rows == 0 {
            return Ok(());
        }
        int(op, "elements of a page", page_tokens * heads.kv_width())?;
        int(op, "width of qkv", heads.qkv_width())?;
        let scale_log2 = std::f32::consts::LOG2_E / (heads.head_dim as f32).sqrt();
        let sizes = [
            int(op, "heads", heads.n_heads)?,
            int(op, "key heads", heads.n_kv_heads)?,
            int(op, "head_dim", heads.head_dim)?,
            int(op, "tokens of a page", page_tokens)?,
        ];
        let out_ptr = Arg::Ptr(address(op, "out", out)?);
        let lse_ptr = Arg::Ptr(lse.map_or(Ok(DevicePtr(0)), |lse| address(op, "lse", lse))?);
        let (arrivals, parts) = self.decode.addresses(self)?;
        let is_decode = page_tokens > 0 && spans.iter().all(|span| span.n_rows == 1);
        let widened = match (kv, scales) {
            (KvSource::Paged(layer), Some(_)) if !is_decode => Some(self.widened.addresses(self, layer)?),
            _ => None,
        };
        self.with_spans(op, spans, qkv.rows(), |table| {
            let tables = [table.spans, table.pages].map(Arg::Ptr);
            let queries = Arg::Ptr(qkv_ptr);
            if is_decode {
                let context = spans.iter().map(|span| span.past + 1).max().unwrap_or(1);
                let n_splits = self.n_splits(spans.len() * heads.n_heads, context);
                let kernel = if scales.is_some() { Kernel::AttentionDecodeI8 } else { Kernel::AttentionDecode };
                let mut args = vec![out_ptr, Arg::Ptr(parts), Arg::Ptr(arrivals), queries];
                args.extend(cache.into_iter().chain(scales.into_iter().flatten()).map(Arg::Ptr));
                args.extend(tables.into_iter().chain(sizes));
                args.push(Arg::Float(scale_log2));
                let shared_bytes = THREADS / 32 * (heads.head_dim + 2) * 4 + 4;
                let grid = Grid { blocks: [n_splits, heads.n_heads, spans.len()], threads: THREADS, shared_bytes };
                // SAFETY: the arguments are the kernel's; spans lie within qkv and out and their pages within the cache (just checked), and
                // the workspace has room for `n_splits` parts (`n_splits` says why).
                return unsafe { self.launch(kernel, grid, &args) };
            }
            if let (Some(wide), Some(scales)) = (widened, scales) {
                let n_pages: usize = spans.iter().map(|span| span.pages.len()).sum();
                let page_slots = page_tokens * heads.n_kv_heads;
                let mut args: Vec<_> = [wide, cache, scales].concat().into_iter().map(Arg::Ptr).collect();
                args.extend([Arg::Ptr(table.pages), int(op, "tokens and heads of a page", page_slots)?, sizes[2]]);
                let parts = (page_slots * heads.head_dim / WIDEN_PART).div_ceil(THREADS);
                let grid = Grid { blocks: [n_pages, parts, 2], threads: THREADS, shared_bytes: 0 };
                // SAFETY: the arguments are the kernel's; the pages lie within the cache (just checked), and within what is widened, which is
                // as large.
                unsafe { self.launch(Kernel::WidenCache, grid, &args)? };
            }
            let (rows, shared_bytes) = tile(self.dtype, width);
            let mut args = vec![out_ptr, lse_ptr, queries];
            args.extend(widened.unwrap_or(cache).map(Arg::Ptr).into_iter().chain(tables).chain(sizes));
            args.extend([Arg::Int(i32::from(causal)), Arg::Float(scale_log2)]);
            let grid = Grid { blocks: [n_rows.div_ceil(rows), heads.n_heads, spans.len()], threads: THREADS, shared_bytes };
            // SAFETY: as above; the kernel has no workspace.
            unsafe { self.launch(kernel, grid, &args) }
        })
    }

    /// Rows and heads below which a decode step splits contexts.
    fn decode_blocks(&self) -> usize {
        DECODE_BLOCKS * self.driver.n_multiprocessors()
    }

    /// Into how many parts a context is cut, so that `row_heads` pairs of a row and a head fill the device. If more than one, there are
    /// fewer than `decode_blocks` pairs and fewer than twice as many parts.
    fn n_splits(&self, row_heads: usize, context: usize) -> usize {
        self.decode_blocks().div_ceil(row_heads).min(context.div_ceil(SPLIT_TOKENS))
    }
}

impl Workspace {
    /// Where the counters of arrivals and the parts are. Launches are done in order: all have the same memory.
    fn addresses(&self, cuda: &Cuda) -> Result<(DevicePtr, DevicePtr)> {
        let (row_heads, n_parts) = (cuda.decode_blocks(), 2 * cuda.decode_blocks());
        let counter_bytes = (row_heads * 4).next_multiple_of(256);
        // A launch that panicked left it whole.
        let mut memory = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if memory.is_none() {
            // From here on each launch leaves the counters at zero.
            *memory = Some(cuda.zeroed(counter_bytes + n_parts * (MAX_HEAD_DIM + 2) * 4)?);
        }
        let ptr = memory.as_ref().expect("it was just made").ptr;
        Ok((ptr, ptr.offset(counter_bytes)))
    }
}

impl Widened {
    /// Where keys and values of `layer` have place.
    fn addresses(&self, cuda: &Cuda, layer: &KvLayer) -> Result<[DevicePtr; 2]> {
        let len = layer.k.len();
        // What panicked left it whole.
        let mut memory = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if memory.as_ref().is_none_or(|[k, _]| k.len() < len) {
            *memory = None;
            *memory = Some([cuda.zeros(&[len], cuda.dtype)?, cuda.zeros(&[len], cuda.dtype)?]);
        }
        let [k, v] = memory.as_ref().expect("it is there, or was just made");
        Ok([address("attention", "widened keys", k)?, address("attention", "widened values", v)?])
    }
}
