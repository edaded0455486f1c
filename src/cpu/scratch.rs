//! Working memory of kernels: kept per thread, so that a step in its steady state allocates nothing.

use std::cell::RefCell;

use memmap2::MmapMut;

/// What buffers are made of: a huge page of x86-64 and of most others.
///
/// Packed matrices are walked from end to end for each block of the other; on pages of 4 KiB such a walk misses the address caches all
/// the time, and the processor's prefetching stops at each page.
const PAGE: usize = 2 << 20;

thread_local! {
    /// Buffers not in use, the one given back last on top: the same nesting of uses finds the same buffers again.
    static FREE: RefCell<Vec<Option<MmapMut>>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with `len` elements of this thread's scratch memory, aligned to a cache line, whose content is left over from other uses.
///
/// # Panics
/// If the system has no memory.
pub fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let buffer = FREE.with_borrow_mut(Vec::pop).flatten().filter(|buffer| buffer.len() >= len * size_of::<f32>());
    let mut buffer = buffer.unwrap_or_else(|| pages(len * size_of::<f32>()));
    let result = f(&mut bytemuck::cast_slice_mut(&mut buffer)[..len]);
    FREE.with_borrow_mut(|free| free.push(Some(buffer)));
    result
}

/// Zeros, on huge pages where the system grants them.
fn pages(bytes: usize) -> MmapMut {
    let buffer = MmapMut::map_anon(bytes.next_multiple_of(PAGE).max(PAGE)).expect("no memory for packed operands");
    #[cfg(target_os = "linux")]
    let _ = buffer.advise(memmap2::Advice::HugePage); // a system without huge pages is only slower
    buffer
}

/// Cuts the first `len` elements, rounded up to cache lines, off a buffer.
pub fn carve<'a>(rest: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (head, tail) = std::mem::take(rest).split_at_mut(padded(len));
    *rest = tail;
    &mut head[..len]
}

/// `len` rounded up to cache lines: what [`carve`] takes.
pub const fn padded(len: usize) -> usize {
    len.next_multiple_of(16)
}
