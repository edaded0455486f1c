//! The paged KV cache: pages of a fixed number of tokens, lent to sequences and given back when these are dropped.
//!
//! Every layer's cache has the same pages, so that one table of page numbers serves all layers (Kwon et al., arXiv 2309.06180).

use std::sync::{Arc, Mutex};

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::{Heads, KvLayer, Ops};

/// Tokens of a page. A head's share of it, 64 · 128 · 2 bytes, is a run long enough to stream and small enough to stay in L1;
/// on average half a page per sequence is unused.
pub const PAGE_TOKENS: usize = 64;

/// Page numbers that no sequence holds.
type FreePages = Arc<Mutex<Vec<u32>>>;

/// The cache of all layers.
pub struct KvCache {
    /// One per decoder layer.
    pub layers: Vec<KvLayer>,
    free: FreePages,
}

impl KvCache {
    /// Room for `tokens` tokens. Memory is reserved, and taken page by page when first written.
    pub fn new(ops: &dyn Ops, n_layers: usize, heads: Heads, tokens: usize, dtype: DType) -> Result<Self> {
        let n_pages = tokens.div_ceil(PAGE_TOKENS);
        let layer = |_| KvLayer::new(ops, n_pages, PAGE_TOKENS, heads, dtype);
        let free = (0..u32::try_from(n_pages).map_err(|_| Error::usage("the context is too long"))?).rev().collect();
        Ok(Self { layers: (0..n_layers).map(layer).collect::<Result<_>>()?, free: Arc::new(Mutex::new(free)) })
    }

    /// A sequence that holds no pages yet.
    pub fn sequence(&self) -> PageTable {
        PageTable { pages: Vec::new(), free: self.free.clone() }
    }

    /// Pages that no sequence holds.
    pub fn n_free_pages(&self) -> usize {
        lock(&self.free).len()
    }

    /// Bytes that one token takes in all layers.
    pub fn bytes_per_token(n_layers: usize, heads: Heads, dtype: DType) -> usize {
        n_layers * KvLayer::bytes_per_token(heads, dtype)
    }
}

/// The list is a plain stack: a panic elsewhere cannot have left it half-changed.
fn lock(free: &FreePages) -> std::sync::MutexGuard<'_, Vec<u32>> {
    free.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Pages of one sequence, in order; they go back when it is dropped.
pub struct PageTable {
    pages: Vec<u32>,
    free: FreePages,
}

impl PageTable {
    /// Makes room for `tokens` tokens in all, or says how many there is room for.
    pub fn reserve(&mut self, tokens: usize) -> Result<()> {
        let mut free = lock(&self.free);
        let missing = tokens.div_ceil(PAGE_TOKENS).saturating_sub(self.pages.len());
        if missing > free.len() {
            let room = (self.pages.len() + free.len()) * PAGE_TOKENS;
            return Err(Error::Unsupported(format!("{tokens} tokens do not fit the KV cache: {room} do")));
        }
        let kept = free.len() - missing;
        self.pages.extend(free.drain(kept..).rev());
        Ok(())
    }

    /// Gives back the pages beyond those that hold `tokens` tokens.
    pub fn truncate(&mut self, tokens: usize) {
        let kept = tokens.div_ceil(PAGE_TOKENS).min(self.pages.len());
        lock(&self.free).extend(self.pages.drain(kept..).rev());
    }

    /// The page numbers, first page first.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }
}

impl Drop for PageTable {
    fn drop(&mut self) {
        self.truncate(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Cpu;

    fn cache(tokens: usize) -> KvCache {
        let heads = Heads { n_heads: 2, n_kv_heads: 1, head_dim: 8 };
        KvCache::new(&Cpu::new(1, DType::F32).unwrap(), 2, heads, tokens, DType::F32).unwrap()
    }

    #[test]
    fn pages_are_lent_once_and_come_back() {
        let cache = cache(4 * PAGE_TOKENS);
        let (mut a, mut b) = (cache.sequence(), cache.sequence());
        a.reserve(PAGE_TOKENS + 1).unwrap();
        b.reserve(1).unwrap();
        let mut lent = [a.pages(), b.pages()].concat();
        lent.sort_unstable();
        lent.dedup();
        assert_eq!(lent.len(), 3);
        assert!(b.reserve(3 * PAGE_TOKENS).unwrap_err().to_string().contains("128"));
        a.truncate(PAGE_TOKENS);
        assert_eq!((a.pages().len(), cache.n_free_pages()), (1, 2));
        drop((a, b));
        assert_eq!(cache.n_free_pages(), 4);
    }

    #[test]
    fn a_reservation_that_is_held_already_takes_nothing() {
        let cache = cache(2 * PAGE_TOKENS);
        let mut a = cache.sequence();
        a.reserve(PAGE_TOKENS).unwrap();
        let before = a.pages().to_vec();
        a.reserve(5).unwrap();
        assert_eq!(a.pages(), before);
    }
}
