//! [`Simulator`]: runs the very kernels of `kernels/*.cu` on the host, thread by thread, and checks what they do (`kernels/sim/`).
//!
//! The blocks of a grid are shared out among the threads of a pool. Within a block each CUDA thread is a coroutine, which gives its turn
//! away at barriers and warp collectives.

use std::cell::{Cell, RefCell};
use std::ffi::{CStr, c_char, c_long, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use corosensei::stack::{DefaultStack, Stack};
use corosensei::{Coroutine, CoroutineResult, Yielder};

use super::faults::{self, Faults};
use super::{Arg, DevicePtr, Driver, Function, GraphId, Grid, Launch, Matmul, PackedArgs, ProbeSize};
use crate::cpu::pool::Pool;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Stack of a CUDA thread: what a kernel would keep in registers, many times over.
const STACK_BYTES: usize = 64 << 10;
/// The most threads of a block, on any GPU.
const MAX_THREADS: usize = 1024;
/// As the GPU that the kernels are tuned for (H100 and H200), so that they are cut up as they would be there.
const MULTIPROCESSORS: usize = 132;

/// `dim3`
#[repr(C)]
struct Dim3 {
    x: u32,
    y: u32,
    z: u32,
}

/// State of a block, in C++.
#[repr(C)]
struct BlockState {
    _opaque: [u8; 0],
}

// kernels/sim/sim.cpp
unsafe extern "C" {
    fn llava_sim_init(suspend: extern "C" fn());
    fn llava_sim_n_kernels() -> usize;
    fn llava_sim_kernel_name(i: usize) -> *const c_char;
    fn llava_sim_kernel_signature(i: usize) -> *const c_char;
    fn llava_sim_invoke(i: usize, arguments: *mut *mut c_void);
    fn llava_sim_alloc(bytes: usize) -> *mut c_void;
    fn llava_sim_free(pointer: *mut c_void);
    fn llava_sim_block_new() -> *mut BlockState;
    fn llava_sim_block_free(block: *mut BlockState);
    fn llava_sim_max_shared() -> usize;
    fn llava_sim_begin(
        block: *mut BlockState,
        kernel: *const c_char,
        grid: *const Dim3,
        size: *const Dim3,
        index: *const Dim3,
        shared_bytes: usize,
    );
    fn llava_sim_next(block: *mut BlockState) -> c_long;
    fn llava_sim_enter(block: *mut BlockState, number: u32, stack_low: usize, stack_high: usize);
    fn llava_sim_exit(block: *mut BlockState);
    fn llava_sim_error(block: *mut BlockState) -> *const c_char;
}

thread_local! {
    /// The yielder of the coroutine that runs on this thread.
    static YIELDER: Cell<*const Yielder<(), ()>> = const { Cell::new(std::ptr::null()) };
    /// What this thread keeps from block to block.
    static WORKSPACE: RefCell<Workspace> = RefCell::new(Workspace::new());
}

/// Ends the turn of the CUDA thread that runs.
extern "C" fn suspend() {
    let yielder = YIELDER.get();
    // SAFETY: kernels run inside coroutines only, and whoever resumes one has set its yielder, which lives until the coroutine ends.
    unsafe { (*yielder).suspend(()) };
}

/// A block's state and the stacks of its threads.
struct Workspace {
    block: *mut BlockState,
    stacks: Vec<DefaultStack>,
}

impl Workspace {
    fn new() -> Self {
        // SAFETY: no precondition.
        Self { block: unsafe { llava_sim_block_new() }, stacks: Vec::new() }
    }

    fn stack(&mut self) -> DefaultStack {
        self.stacks.pop().unwrap_or_else(|| DefaultStack::new(STACK_BYTES).expect("the system refuses memory for a stack"))
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        // SAFETY: it came from `llava_sim_block_new` and nobody else has it.
        unsafe { llava_sim_block_free(self.block) }
    }
}

/// A CUDA thread under way.
struct SimThread {
    coroutine: Coroutine<(), (), (), DefaultStack>,
    yielder: *const Yielder<(), ()>,
    stack: (usize, usize),
}

/// A kernel, and the letters of its arguments.
struct KernelInfo {
    name: &'static CStr,
    signature: &'static str,
}

/// The host as a GPU.
pub struct Simulator {
    pool: Pool,
    kernels: Vec<KernelInfo>,
    graphs: Mutex<Vec<Option<Arc<[Launch]>>>>,
    /// Products that were asked for, numbered after the kernels; none if there is no library.
    matmuls: Option<Mutex<Vec<Matmul>>>,
    faults: faults::State,
}

impl Simulator {
    /// A simulator that runs blocks on `n_threads` threads (0: as many as the machine runs at once).
    pub fn new(n_threads: usize) -> Self {
        Self::with_faults(n_threads, Faults::default()).expect("nothing is wrong with it")
    }

    /// As [`Simulator::new`], of a GPU with faults.
    ///
    /// # Errors
    /// If it, or its driver, is too old for the kernels.
    pub fn with_faults(n_threads: usize, faults: Faults) -> Result<Self> {
        let faults = faults::State::open("the simulated GPU", faults)?;
        let n_threads = if n_threads == 0 { std::thread::available_parallelism().map_or(1, usize::from) } else { n_threads };
        // SAFETY: kernels are registered before main begins, and what the registry holds are literals.
        let kernels = unsafe {
            llava_sim_init(suspend);
            let text = |p| CStr::from_ptr(p);
            let info = |i| KernelInfo {
                name: text(llava_sim_kernel_name(i)),
                signature: text(llava_sim_kernel_signature(i)).to_str().expect("signatures are ASCII"),
            };
            (0..llava_sim_n_kernels()).map(info).collect()
        };
        Ok(Self { pool: Pool::new(n_threads), kernels, graphs: Mutex::default(), matmuls: None, faults })
    }

    /// As [`Simulator::new`], with a library for products, whose sums are exact where f64 is: for tests of what leads to it.
    pub fn with_library(n_threads: usize) -> Self {
        Self { matmuls: Some(Mutex::default()), ..Self::new(n_threads) }
    }

    fn graphs(&self) -> MutexGuard<'_, Vec<Option<Arc<[Launch]>>>> {
        self.graphs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refuse(&self, function: Function, problem: impl std::fmt::Display) -> Error {
        Error::device(self.kernels[function.0].name.to_string_lossy(), problem)
    }
}

impl Driver for Simulator {
    fn name(&self) -> String {
        format!("kernel simulator ({} threads)", self.pool.n_threads())
    }

    fn n_multiprocessors(&self) -> usize {
        MULTIPROCESSORS
    }

    /// The host's rates mean nothing for a GPU: as much as it takes to run every line.
    fn probe_size(&self) -> ProbeSize {
        ProbeSize { read_bytes: 256 << 10, product: 128 }
    }

    fn function(&self, name: &str) -> Result<Function> {
        let found = self.kernels.iter().position(|k| k.name.to_bytes() == name.as_bytes());
        found.map(Function).ok_or_else(|| Error::device(name, "this build has no such kernel"))
    }

    fn matmul(&self, matmul: &Matmul) -> Result<Option<Function>> {
        let Some(matmuls) = &self.matmuls else {
            return Ok(None);
        };
        let mut matmuls = matmuls.lock().unwrap_or_else(PoisonError::into_inner);
        matmuls.push(matmul.clone());
        Ok(Some(Function(self.kernels.len() + matmuls.len() - 1)))
    }

    fn alloc(&self, bytes: usize) -> Result<DevicePtr> {
        self.faults.alloc(bytes, || {
            // SAFETY: no precondition.
            let pointer = unsafe { llava_sim_alloc(bytes) };
            if pointer.is_null() {
                return Err(Error::device("alloc", format!("the host has no memory for {bytes} bytes")));
            }
            Ok(DevicePtr(pointer as u64))
        })
    }

    unsafe fn free(&self, ptr: DevicePtr) {
        self.faults.freed(ptr);
        // SAFETY: the caller's; launches are done when they return.
        unsafe { llava_sim_free(ptr.0 as *mut c_void) }
    }

    unsafe fn upload(&self, dst: DevicePtr, src: &[u8]) -> Result<()> {
        self.faults.check_lost("upload")?;
        // SAFETY: the caller's; device memory is the host's.
        unsafe { std::ptr::copy_nonoverlapping(src.as_ptr(), dst.0 as *mut u8, src.len()) };
        Ok(())
    }

    unsafe fn download(&self, dst: &mut [u8], src: DevicePtr) -> Result<()> {
        self.faults.check_lost("download")?;
        // SAFETY: the caller's.
        unsafe { std::ptr::copy_nonoverlapping(src.0 as *const u8, dst.as_mut_ptr(), dst.len()) };
        Ok(())
    }

    unsafe fn clear(&self, dst: DevicePtr, bytes: usize) -> Result<()> {
        self.faults.check_lost("clear")?;
        // SAFETY: the caller's.
        unsafe { std::ptr::write_bytes(dst.0 as *mut u8, 0, bytes) };
        Ok(())
    }

    fn record(&self, launches: &[Launch]) -> Result<GraphId> {
        let mut graphs = self.graphs();
        graphs.push(Some(launches.into()));
        Ok(GraphId(graphs.len() - 1))
    }

    unsafe fn replay(&self, graph: GraphId) -> Result<()> {
        let launches = self.graphs()[graph.0].clone().ok_or_else(|| Error::device("replay", "the graph was forgotten"))?;
        // SAFETY: the caller's.
        launches.iter().try_for_each(|launch| unsafe { self.launch(launch) })
    }

    fn forget(&self, graph: GraphId) {
        self.graphs()[graph.0] = None;
    }

    unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        let Launch { function, grid, ref args } = *launch;
        if let (Some(i), Some(matmuls)) = (function.0.checked_sub(self.kernels.len()), &self.matmuls) {
            let matmul = matmuls.lock().unwrap_or_else(PoisonError::into_inner)[i].clone();
            // SAFETY: the caller's.
            return unsafe { multiply(&matmul, args) };
        }
        let kernel = &self.kernels[function.0];
        let signature: String = args.iter().map(|a| a.kind()).collect();
        if signature != kernel.signature {
            return Err(self.refuse(function, format!("is launched with arguments ({signature}), it has ({})", kernel.signature)));
        }
        if !self.faults.launch(&kernel.name.to_string_lossy())? {
            return Ok(());
        }
        // SAFETY: no precondition.
        let max_shared = unsafe { llava_sim_max_shared() };
        if grid.blocks.contains(&0) || grid.blocks[1].max(grid.blocks[2]) > 65535 || grid.threads == 0 || grid.threads > MAX_THREADS
        {
            return Err(self.refuse(function, format!("cannot be launched as {grid:?}")));
        }
        if grid.shared_bytes > max_shared {
            return Err(
                self.refuse(function, format!("asks for {} bytes of shared memory, {max_shared} are there", grid.shared_bytes))
            );
        }
        let first_error = Mutex::new(None);
        let n_blocks = grid.blocks.iter().product();
        self.pool.run(n_blocks, &|i| {
            if first_error.lock().is_ok_and(|e| e.is_some()) {
                return;
            }
            let index = [i % grid.blocks[0], i / grid.blocks[0] % grid.blocks[1], i / grid.blocks[0] / grid.blocks[1]];
            if let Err(problem) = WORKSPACE.with_borrow_mut(|w| run_block(w, function.0, kernel.name, grid, index, args)) {
                *first_error.lock().expect("nobody panics with it") = Some(problem);
            }
        });
        match first_error.into_inner().expect("nobody panics with it") {
            None => Ok(()),
            Some(problem) => Err(self.refuse(function, problem)),
        }
    }

    unsafe fn time(&self, launches: &[Launch]) -> Result<f64> {
        let start = Instant::now();
        // SAFETY: the caller's.
        launches.iter().try_for_each(|launch| unsafe { self.launch(launch) })?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }
}

/// A product of the library.
///
/// # Safety
/// The arguments lead to y, x and W of the sizes of `matmul`.
unsafe fn multiply(matmul: &Matmul, args: &[Arg]) -> Result<()> {
    let &Matmul { dtype, y_dtype, tokens, n, k, y_stride, add } = matmul;
    let &[Arg::Ptr(y), Arg::Ptr(x), Arg::Ptr(w)] = args else {
        return Err(Error::device("library", "a product takes y, x and W"));
    };
    if [y, x, w].iter().any(|p| p.0 % 256 != 0) {
        return Err(Error::device("library", "a product takes tensors that are 256-byte aligned"));
    }
    let read = |at: DevicePtr, rows: usize, width: usize, dtype: DType| {
        let mut copy = Tensor::zeros(&[rows, width], dtype);
        let bytes = copy.as_mut_bytes();
        // SAFETY: the caller's; device memory is the host's.
        unsafe { std::ptr::copy_nonoverlapping(at.0 as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        copy.to_f32()
    };
    let (x, w) = (read(x, tokens, k, dtype), read(w, n, k, dtype));
    for token in 0..tokens {
        let to = y.offset(token * y_stride * y_dtype.size());
        let mut row = if add { read(to, 1, n, y_dtype) } else { vec![0.0; n] };
        for (j, r) in row.iter_mut().enumerate() {
            let product: f64 = (0..k).map(|i| f64::from(x[token * k + i]) * f64::from(w[j * k + i])).sum();
            *r = (f64::from(*r) + product) as f32;
        }
        let row = Tensor::from_slice(&[n], &row).converted(y_dtype);
        // SAFETY: as above: y has `tokens` rows of `y_stride` elements, n of them from its pointer on.
        unsafe { std::ptr::copy_nonoverlapping(row.as_bytes().as_ptr(), to.0 as *mut u8, row.bytes()) };
    }
    Ok(())
}

/// Runs one block to its end; an error is what the simulator found wrong.
fn run_block(
    workspace: &mut Workspace,
    kernel: usize,
    name: &CStr,
    grid: Grid,
    index: [usize; 3],
    args: &[Arg],
) -> std::result::Result<(), String> {
    let dim3 = |d: [usize; 3]| Dim3 { x: d[0] as u32, y: d[1] as u32, z: d[2] as u32 };
    let (size, block) = (dim3([grid.threads, 1, 1]), workspace.block);
    let mut packed = PackedArgs::new(args);
    let arguments = packed.as_mut_ptr();
    let mut threads: Vec<Option<SimThread>> = (0..grid.threads).map(|_| None).collect();
    // SAFETY: `block` is this OS thread's own; pointers live through the call; the sizes were checked.
    unsafe { llava_sim_begin(block, name.as_ptr(), &dim3(grid.blocks), &size, &dim3(index), grid.shared_bytes) };
    let outcome = loop {
        // SAFETY: the block has begun.
        let next = unsafe { llava_sim_next(block) };
        let Ok(number) = usize::try_from(next) else {
            break next;
        };
        let thread = threads[number].get_or_insert_with(|| {
            let stack = workspace.stack();
            let bounds = (stack.limit().get(), stack.base().get());
            let coroutine = Coroutine::with_stack(stack, move |yielder: &Yielder<(), ()>, ()| {
                YIELDER.set(yielder);
                // SAFETY: the caller of `launch` vouches for the arguments, their number and types were compared with the signature.
                unsafe { llava_sim_invoke(kernel, arguments) };
            });
            SimThread { coroutine, yielder: std::ptr::null(), stack: bounds }
        });
        // SAFETY: `number` came from the block.
        unsafe { llava_sim_enter(block, number as u32, thread.stack.0, thread.stack.1) };
        YIELDER.set(thread.yielder);
        match thread.coroutine.resume(()) {
            CoroutineResult::Yield(()) => thread.yielder = YIELDER.get(),
            CoroutineResult::Return(()) => {
                // SAFETY: the thread that was entered has returned.
                unsafe { llava_sim_exit(block) };
                let done = threads[number].take().expect("it has just run");
                workspace.stacks.push(done.coroutine.into_stack());
            }
        }
    };
    // What an error left unfinished: kernels own nothing that must be dropped.
    for mut thread in threads.into_iter().flatten() {
        // SAFETY: frames of kernels hold plain values only.
        unsafe { thread.coroutine.force_reset() };
        workspace.stacks.push(thread.coroutine.into_stack());
    }
    if outcome == -1 {
        return Ok(());
    }
    // SAFETY: the text lives until the block begins again.
    Err(unsafe { CStr::from_ptr(llava_sim_error(block)) }.to_string_lossy().into_owned())
}
