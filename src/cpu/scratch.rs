//! Working memory of kernels: kept per thread, so that a step in its steady state allocates nothing.

use std::cell::RefCell;

/// A cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

thread_local! {
    /// Buffers not in use, the one given back last on top: the same nesting of uses finds the same buffers again.
    static FREE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with `len` elements of this thread's scratch memory, aligned to a cache line, whose content is left over from other uses.
pub fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut buffer = FREE.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() * 16 < len {
        buffer.resize(len.div_ceil(16), Line([0.0; 16]));
    }
    let floats = buffer.as_mut_ptr().cast::<f32>();
    // SAFETY: a `Line` is 16 f32 without padding, and there are at least len/16 of them, all initialised.
    let result = f(unsafe { std::slice::from_raw_parts_mut(floats, len) });
    FREE.with_borrow_mut(|free| free.push(buffer));
    result
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
