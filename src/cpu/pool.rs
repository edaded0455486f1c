//! A fixed pool of threads that share the tasks of one op at a time.
//!
//! Decoding a token runs some two hundred ops of about 100 µs each, so a hand-over must cost about a microsecond: workers spin for
//! [`SPIN`] before they park, tasks are handed out by one atomic counter, and the caller works too. A worker that comes late, because the
//! system gave its core to somebody else, finds the job closed and is not waited for.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a worker looks for the next job before it parks. Longer than the gap between two ops of a decoding step.
const SPIN: Duration = Duration::from_micros(60);

/// A task function whose lifetime the pool vouches for: it stays borrowed until no worker is inside the job.
type Task = *const (dyn Fn(usize) + Sync);

/// Whether a job takes workers in, in [`Shared::state`].
const OPEN: u64 = 1 << 31;
/// One worker inside the job, in [`Shared::state`]; the bits below [`OPEN`] count them.
const INSIDE: u64 = 1;
/// One job, in [`Shared::state`]; the upper half counts them.
const JOB: u64 = 1 << 32;

/// What caller and workers share.
struct Shared {
    /// Job number, open flag, and workers inside, in one word, so that a worker enters a job only while it is open.
    state: AtomicU64,
    /// The job. Written by the caller while it is closed and nobody is inside; read by those who have entered.
    task: UnsafeCell<(Task, usize)>,
    /// The next task to hand out.
    next: AtomicUsize,
    /// The first panic of the job.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Workers that are parked or about to be.
    n_parked: AtomicUsize,
    park: Mutex<()>,
    wake: Condvar,
    quit: AtomicBool,
}

// SAFETY: `task` is the only part that is not `Sync` by itself; it is written by the one caller that holds `Pool::caller` before it
// opens the job (release) and read only by workers that entered the open job (acquire), and the caller waits for those to leave.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is to a `Sync` closure.
unsafe impl Send for Shared {}

/// Threads that run the tasks of one op at a time. Dropping it joins them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held by the caller whose job runs; others wait here.
    caller: Mutex<()>,
}

thread_local! {
    /// Whether this thread is inside a task: a pool used from there runs inline.
    static IN_TASK: Cell<bool> = const { Cell::new(false) };
}

/// A poisoned lock only says that a task panicked, which is reported by other means.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// A pool of `n_threads` threads, the caller's among them; zero counts as one.
    pub fn new(n_threads: usize) -> Self {
        let idle: Task = &|_| {};
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            task: UnsafeCell::new((idle, 0)),
            next: AtomicUsize::new(0),
            panic: Mutex::new(None),
            n_parked: AtomicUsize::new(0),
            park: Mutex::new(()),
            wake: Condvar::new(),
            quit: AtomicBool::new(false),
        });
        let workers = (1..n_threads)
            .map(|i| {
                let shared = shared.clone();
                let worker = std::thread::Builder::new().name(format!("llava-cpu-{i}"));
                worker.spawn(move || shared.serve()).expect("the system refuses to start a thread")
            })
            .collect();
        Self { shared, workers, caller: Mutex::new(()) }
    }

    /// Threads that work on a job, the caller's among them.
    pub fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(i)` once for each i < `n_tasks`, in no order, and returns when all are done.
    ///
    /// A panic of a task is raised again here, after the others have stopped. From inside a task it runs inline.
    pub fn run(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() || n_tasks <= 1 || IN_TASK.get() {
            return (0..n_tasks).for_each(task);
        }
        let caller = lock(&self.caller);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; `run` does not return before every worker has left the job, so that the closure outlives
        // its use.
        let task: Task = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Task>(task) };
        // SAFETY: the last job is closed and empty (we waited for that below), and `caller` keeps other callers out.
        unsafe { *shared.task.get() = (task, n_tasks) };
        shared.next.store(0, Ordering::Relaxed);
        let job = (shared.state.load(Ordering::Relaxed) & !(JOB - 1)).wrapping_add(JOB);
        shared.state.store(job | OPEN, Ordering::SeqCst);
        if shared.n_parked.load(Ordering::SeqCst) > 0 {
            drop(lock(&shared.park)); // a worker between its last look and its wait has the lock
            shared.wake.notify_all();
        }

        shared.work();

        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut patience = 0;
        while shared.state.load(Ordering::Acquire) & (OPEN - 1) != 0 {
            relax(&mut patience);
        }
        let panic = lock(&shared.panic).take();
        drop(caller);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }

    /// Calls `f(first_row, rows)` for disjoint chunks of at most `rows_per_task` rows of `row_len` elements.
    ///
    /// # Panics
    /// If `out` is not a whole number of rows.
    pub fn for_rows(&self, out: &mut [f32], row_len: usize, rows_per_task: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
        if out.is_empty() {
            return;
        }
        assert_eq!(out.len() % row_len, 0, "{} elements are not rows of {row_len}", out.len());
        let (n_rows, rows_per_task) = (out.len() / row_len, rows_per_task.max(1));
        let out = Disjoint::new(out);
        self.run(n_rows.div_ceil(rows_per_task), &|i| {
            let first = i * rows_per_task;
            let rows = rows_per_task.min(n_rows - first);
            // SAFETY: tasks have different `i`, hence ranges that do not overlap.
            f(first, unsafe { out.slice(first * row_len, rows * row_len) });
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.park));
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // Workers catch the panics of tasks, so there is none to report here.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Life of a worker: enter each job that is open, work, leave, wait.
    fn serve(&self) {
        let mut last_job = 0;
        while !self.quit.load(Ordering::Relaxed) {
            let state = self.state.load(Ordering::Acquire);
            if !is_new(state, last_job) {
                self.wait(last_job);
            } else if self.state.compare_exchange_weak(state, state + INSIDE, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                last_job = state / JOB;
                self.work();
                self.state.fetch_sub(INSIDE, Ordering::Release);
            }
        }
    }

    /// Spins for a while, then parks, until there is a job after `last_job` or the pool ends.
    fn wait(&self, last_job: u64) {
        let news = || is_new(self.state.load(Ordering::SeqCst), last_job) || self.quit.load(Ordering::Relaxed);
        let start = Instant::now();
        while start.elapsed() < SPIN {
            for _ in 0..32 {
                if news() {
                    return;
                }
                std::hint::spin_loop();
            }
        }
        let mut guard = lock(&self.park);
        self.n_parked.fetch_add(1, Ordering::SeqCst);
        while !news() {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.n_parked.fetch_sub(1, Ordering::SeqCst);
    }

    /// Takes tasks until there are none left. Called by those inside the job, the caller among them.
    fn work(&self) {
        // SAFETY: the job cannot change while we are inside; entering it acquired what the caller wrote.
        let (task, n_tasks) = unsafe { *self.task.get() };
        // SAFETY: `run` keeps the closure borrowed until we have left.
        let task = unsafe { &*task };
        IN_TASK.set(true);
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= n_tasks {
                break;
            }
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| task(i))) {
                self.next.store(n_tasks, Ordering::Relaxed);
                lock(&self.panic).get_or_insert(payload);
            }
        }
        IN_TASK.set(false);
    }
}

/// Whether `state` is of an open job that is not `last_job`.
fn is_new(state: u64, last_job: u64) -> bool {
    state & OPEN != 0 && state / JOB != last_job
}

/// Passes time while another thread finishes: first on the core, then by giving it away, in case that thread needs it.
fn relax(patience: &mut u32) {
    *patience += 1;
    if *patience < 2000 { std::hint::spin_loop() } else { std::thread::yield_now() }
}

/// A mutable slice of which tasks write parts that do not overlap.
pub struct Disjoint<'a, T> {
    ptr: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it hands out parts only through `unsafe` methods whose callers keep them apart.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    /// Elements of the slice.
    pub fn n_elements(&self) -> usize {
        self.len
    }

    /// Takes the slice for as long as tasks write to it.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { ptr: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// Elements `start..start + len`.
    ///
    /// # Safety
    /// While the result lives, nobody else may use any of these elements.
    ///
    /// # Panics
    /// If the range leaves the slice.
    #[allow(clippy::mut_from_ref)] // that is its purpose; see Safety
    pub unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "elements {start}..+{len} of {}", self.len);
        // SAFETY: inside the slice (just checked); not shared, says the caller.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(start), len) }
    }

    /// The slice again, when all tasks are done.
    pub fn into_inner(self) -> &'a mut [T] {
        // SAFETY: it was borrowed for 'a, and parts handed out borrowed `self`, which is gone.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }

    /// Pointer to element `start`, for kernels that write columns of several rows.
    pub fn ptr(&self, start: usize) -> *mut T {
        assert!(start <= self.len, "element {start} of {}", self.len);
        self.ptr.wrapping_add(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for n_threads in [0, 1, 2, 3, 8] {
            let pool = Pool::new(n_threads);
            assert_eq!(pool.n_threads(), n_threads.max(1));
            for n_tasks in [0, 1, 2, 7, 1000] {
                let counts: Vec<AtomicUsize> = (0..n_tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(n_tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{n_threads} threads, {n_tasks} tasks");
            }
        }
    }

    #[test]
    fn many_short_jobs_with_pauses_that_let_workers_park() {
        let pool = Pool::new(3);
        let sum = AtomicUsize::new(0);
        for round in 0..3000 {
            pool.run(4, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.swap(0, Ordering::Relaxed), 6, "round {round}");
            if round % 300 == 0 {
                std::thread::sleep(SPIN * 3);
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        for n_bad in [0, 50, 99] {
            let result = catch_unwind(AssertUnwindSafe(|| pool.run(100, &|i| assert_ne!(i, n_bad, "task {i}"))));
            let payload = result.unwrap_err();
            assert!(payload.downcast_ref::<String>().unwrap().contains(&format!("task {n_bad}")));
        }
        let n = AtomicUsize::new(0);
        pool.run(10, &|_| {
            n.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(n.into_inner(), 10);
    }

    #[test]
    fn nested_and_concurrent_runs() {
        let pool = Pool::new(2);
        let n = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        pool.run(3, &|_| {
                            pool.run(5, &|_| {
                                n.fetch_add(1, Ordering::Relaxed);
                            })
                        });
                    }
                });
            }
        });
        assert_eq!(n.into_inner(), 4 * 50 * 15);
    }

    #[test]
    fn rows_are_split_without_gaps() {
        let pool = Pool::new(2);
        for (n_rows, rows_per_task) in [(0, 1), (1, 4), (7, 2), (8, 3), (5, 100), (6, 0)] {
            let mut out = vec![0.0; n_rows * 3];
            pool.for_rows(&mut out, 3, rows_per_task, |first, rows| {
                for (i, row) in rows.chunks_mut(3).enumerate() {
                    row.iter_mut().for_each(|x| *x += (first + i) as f32);
                }
            });
            assert!(out.iter().enumerate().all(|(i, &x)| x == (i / 3) as f32), "{n_rows} rows by {rows_per_task}");
        }
    }
}
