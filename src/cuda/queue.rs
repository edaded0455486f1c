//! Launches are queued until something needs their results, and then made at once: as one recorded graph where the same launches were made
//! before.
//!
//! A decoding step is some four hundred launches, the same from token to token, since what changes (token ids, lengths, pages) stands in
//! tables on the device. Launched one by one they leave the GPU idle in between; recorded as a graph they do not. The queue finds such
//! steps by itself: nobody above knows of graphs.
//!
//! The order is that of the calls: whoever copies from or to the device flushes first. Tables of one flush have places of their own, so
//! that all of them are there before the first launch of a graph.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::driver::{DevicePtr, Driver, GraphId, Launch};
use crate::error::Result;

/// Fewer launches than this are not worth a graph.
const MIN_GRAPH: usize = 8;
/// Sequences of launches that are remembered; the one that was used longest ago makes place.
pub(super) const MAX_RECORDED: usize = 64;
/// Ints of the smallest table, so that slots seldom grow.
const MIN_WORDS: usize = 256;

/// Launches under way to a driver.
pub(super) struct Queue {
    driver: Arc<dyn Driver>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    pending: Vec<Launch>,
    slots: Vec<Slot>,
    /// Slots that pending launches read.
    n_used: usize,
    /// Launches that have their table and are not queued yet.
    n_expected: usize,
    /// Sequences seen before, the latest last.
    recorded: VecDeque<Recorded>,
    n_replays: usize,
}

/// A place for a table of ints.
struct Slot {
    ptr: DevicePtr,
    capacity: usize,
    words: Vec<i32>,
}

/// A sequence of launches that was seen before, as a graph from the second time on.
struct Recorded {
    hash: u64,
    launches: Vec<Launch>,
    graph: Option<GraphId>,
}

impl State {
    /// The launches to be made now. Tables that are staged from here on may take the places of theirs.
    fn take_pending(&mut self) -> Vec<Launch> {
        // Memory must be made before a table is staged, not between that and its launch.
        assert_eq!(self.n_expected, 0, "flushed while a launch has its table and is not queued");
        self.n_used = 0;
        std::mem::take(&mut self.pending)
    }
}

impl Queue {
    pub fn new(driver: Arc<dyn Driver>) -> Self {
        Self { driver, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whoever panicked here left launches unmade: the next to ask for results makes them, or sees them fail.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a launch.
    ///
    /// # Safety
    /// That of [`Driver::launch`], at the time of the next flush: memory in the arguments is not given back to the driver before.
    pub unsafe fn push(&self, launch: Launch) {
        self.lock().pending.push(launch);
    }

    /// Brings a table of ints to the device and calls `launch`, which queues what reads it.
    pub fn with_table<R>(&self, words: Vec<i32>, launch: impl FnOnce(DevicePtr) -> Result<R>) -> Result<R> {
        let ptr = self.stage(words)?;
        self.lock().n_expected += 1;
        let result = launch(ptr);
        self.lock().n_expected -= 1;
        result
    }

    /// Brings a table of ints to the device. It stays there until the next flush.
    pub(super) fn stage(&self, words: Vec<i32>) -> Result<DevicePtr> {
        let mut state = self.lock();
        let n_used = state.n_used;
        // All layers of a pass bring the same table.
        if let Some(slot) = state.slots[..n_used].iter().find(|slot| slot.words == words) {
            return Ok(slot.ptr);
        }
        if state.slots.get(n_used).is_none_or(|slot| slot.capacity < words.len()) {
            let capacity = words.len().next_power_of_two().max(MIN_WORDS);
            let slot = Slot { ptr: self.driver.alloc(capacity * 4)?, capacity, words: Vec::new() };
            if n_used < state.slots.len() {
                let old = std::mem::replace(&mut state.slots[n_used], slot);
                // SAFETY: no pending launch reads this slot, and what was launched before comes first.
                unsafe { self.driver.free(old.ptr) };
            } else {
                state.slots.push(slot);
            }
        }
        let slot = &mut state.slots[n_used];
        if slot.words != words {
            slot.words.clear(); // in case the copy fails
            // SAFETY: the slot has room for `capacity` words; only launches made by earlier flushes read it, which come first.
            unsafe { self.driver.upload(slot.ptr, bytemuck::cast_slice(&words))? };
            slot.words = words;
        }
        let ptr = slot.ptr;
        state.n_used += 1;
        Ok(ptr)
    }

    /// Makes all launches that are queued.
    pub fn flush(&self) -> Result<()> {
        let mut state = self.lock();
        let launches = state.take_pending();
        if launches.len() < MIN_GRAPH {
            return self.launch_all(&launches);
        }
        let mut hasher = DefaultHasher::new();
        launches.hash(&mut hasher);
        let hash = hasher.finish();
        let seen = state.recorded.iter().position(|r| r.hash == hash && r.launches == launches);
        let Some(mut recorded) = seen.and_then(|i| state.recorded.remove(i)) else {
            self.launch_all(&launches)?;
            state.recorded.push_back(Recorded { hash, launches, graph: None });
            if state.recorded.len() > MAX_RECORDED {
                let oldest = state.recorded.pop_front();
                oldest.and_then(|r| r.graph).into_iter().for_each(|graph| self.driver.forget(graph));
            }
            return Ok(());
        };
        let graph = match recorded.graph {
            Some(graph) => graph,
            None => self.driver.record(&recorded.launches)?,
        };
        recorded.graph = Some(graph);
        state.recorded.push_back(recorded);
        state.n_replays += 1;
        // SAFETY: the same launches are queued now, so that whoever queued them vouches for the arguments.
        unsafe { self.driver.replay(graph) }
    }

    /// Makes all launches that are queued, one by one, and waits for them. Returns the milliseconds that they took on the device.
    pub fn flush_timed(&self) -> Result<f64> {
        let launches = self.lock().take_pending();
        // SAFETY: whoever queued them vouches for the arguments.
        unsafe { self.driver.time(&launches) }
    }

    fn launch_all(&self, launches: &[Launch]) -> Result<()> {
        // SAFETY: whoever queued them vouches for the arguments.
        launches.iter().try_for_each(|launch| unsafe { self.driver.launch(launch) })
    }

    /// How often a graph was replayed.
    #[cfg(test)]
    pub fn n_replays(&self) -> usize {
        self.lock().n_replays
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        for graph in state.recorded.iter().filter_map(|r| r.graph) {
            self.driver.forget(graph);
        }
        for slot in &state.slots {
            // SAFETY: launches that would have read it were made before, or are dropped with the queue.
            unsafe { self.driver.free(slot.ptr) };
        }
    }
}
