//! [`Driver`]: memory and launches, and nothing else. Everything above it is one code for a real GPU and for the simulator.

mod cublaslt;
mod demands;
#[cfg(llava_sim)]
mod faults;
mod nvidia;
#[cfg(llava_sim)]
mod simulator;

pub use demands::Version;
#[cfg(llava_sim)]
pub use faults::{Faults, NthLaunch};
pub use nvidia::Nvidia;
#[cfg(llava_sim)]
pub use simulator::Simulator;

use std::ffi::c_void;
use std::hash::{Hash, Hasher};

use crate::dtype::DType;
use crate::error::Result;

/// An address in a device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DevicePtr(pub u64);

impl DevicePtr {
    /// `bytes` further on.
    pub fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// A kernel of this driver, or a product of its library, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Function(pub usize);

/// How many blocks, of how many threads, with how much shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grid {
    /// Blocks in x, y and z.
    pub blocks: [usize; 3],
    /// Threads of a block.
    pub threads: usize,
    /// Bytes of shared memory of a block.
    pub shared_bytes: usize,
}

/// One argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    /// `T*`
    Ptr(DevicePtr),
    /// `int`
    Int(i32),
    /// `float`
    Float(f32),
}

impl Arg {
    /// The letter that the kernel's signature has for it.
    fn kind(self) -> char {
        match self {
            Self::Ptr(_) => 'p',
            Self::Int(_) => 'i',
            Self::Float(_) => 'f',
        }
    }

    /// Its bytes, from the low end of a word on.
    fn word(self) -> u64 {
        match self {
            Self::Ptr(p) => p.0,
            Self::Int(i) => u64::from(i as u32),
            Self::Float(f) => u64::from(f.to_bits()),
        }
    }
}

/// Equal in every bit: what is compared are launches, not numbers.
impl PartialEq for Arg {
    fn eq(&self, other: &Self) -> bool {
        (self.kind(), self.word()) == (other.kind(), other.word())
    }
}

impl Eq for Arg {}

impl Hash for Arg {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.kind(), self.word()).hash(state);
    }
}

/// A kernel with its grid and arguments.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Launch {
    /// Which kernel.
    pub function: Function,
    /// How many blocks, threads and bytes.
    pub grid: Grid,
    /// What it is called with.
    pub args: Vec<Arg>,
}

/// A product y = x·Wᵀ, or y += x·Wᵀ, of a library: x `[tokens, k]`, W `[n, k]`, y `[tokens, n]` with rows of `y_stride`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Matmul {
    /// Of x and W.
    pub dtype: DType,
    /// Of y.
    pub y_dtype: DType,
    /// Rows of x.
    pub tokens: usize,
    /// Rows of W.
    pub n: usize,
    /// Width of x and W.
    pub k: usize,
    /// From a row of y to the next, in elements.
    pub y_stride: usize,
    /// Whether y keeps what it had.
    pub add: bool,
}

/// A recorded sequence of launches, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GraphId(pub usize);

/// Arguments laid out as `cuLaunchKernel` takes them: an array of their addresses.
struct PackedArgs {
    words: Vec<u64>,
    addresses: Vec<*mut c_void>,
}

impl PackedArgs {
    fn new(args: &[Arg]) -> Self {
        // Little-endian, as every host of an NVIDIA GPU is: an int begins where its word does.
        let mut words: Vec<u64> = args.iter().map(|a| a.word()).collect();
        let addresses = words.iter_mut().map(|word| std::ptr::from_mut(word).cast()).collect();
        Self { words, addresses }
    }

    /// The array; it lives as long as `self`.
    fn as_mut_ptr(&mut self) -> *mut *mut c_void {
        debug_assert_eq!(self.words.len(), self.addresses.len());
        self.addresses.as_mut_ptr()
    }
}

/// How much work the probes of a device's peaks are given.
#[derive(Clone, Copy, Debug)]
pub struct ProbeSize {
    /// Bytes to read.
    pub read_bytes: usize,
    /// Rows and columns of the matrices to multiply.
    pub product: usize,
}

/// A GPU, or the simulator. Work is done in the order of the calls.
pub trait Driver: Send + Sync {
    /// What it is, for `info` and reports.
    fn name(&self) -> String;

    /// Streaming multiprocessors: how many blocks it takes to fill the device.
    fn n_multiprocessors(&self) -> usize;

    /// What it takes to reach its peaks: milliseconds of work, and more bytes than its caches hold.
    fn probe_size(&self) -> ProbeSize;

    /// The kernel of this name.
    ///
    /// # Errors
    /// If this build has none.
    fn function(&self, name: &str) -> Result<Function>;

    /// Products of one size by a library that may be faster than our kernels, launched with the arguments y, x, W, all 256-byte
    /// aligned; the grid is the library's matter. None where there is no library, or it has nothing for them.
    fn matmul(&self, matmul: &Matmul) -> Result<Option<Function>>;

    /// `bytes` of memory, 256-byte aligned, with anything in them.
    fn alloc(&self, bytes: usize) -> Result<DevicePtr>;

    /// Gives memory back.
    ///
    /// # Safety
    /// It came from `alloc`, and nothing that was launched or copied later than this call uses it.
    unsafe fn free(&self, ptr: DevicePtr);

    /// Copies from the host. `src` may be changed as soon as this returns.
    ///
    /// # Safety
    /// `dst` has room for it.
    unsafe fn upload(&self, dst: DevicePtr, src: &[u8]) -> Result<()>;

    /// Copies to the host, when all that was launched before is done.
    ///
    /// # Safety
    /// `src` has as many bytes.
    unsafe fn download(&self, dst: &mut [u8], src: DevicePtr) -> Result<()>;

    /// Fills with zero bytes.
    ///
    /// # Safety
    /// `dst` has as many bytes.
    unsafe fn clear(&self, dst: DevicePtr, bytes: usize) -> Result<()>;

    /// Records launches, to be made again as one.
    fn record(&self, launches: &[Launch]) -> Result<GraphId>;

    /// Makes recorded launches.
    ///
    /// # Errors
    /// As [`Driver::launch`].
    ///
    /// # Safety
    /// That of [`Driver::launch`] for each; the graph was not forgotten.
    unsafe fn replay(&self, graph: GraphId) -> Result<()>;

    /// Gives up a recording.
    fn forget(&self, graph: GraphId);

    /// Launches a kernel.
    ///
    /// # Errors
    /// If the launch is refused. What goes wrong within the kernel, a GPU reports with a later call.
    ///
    /// # Safety
    /// The arguments are what the kernel's contract asks for: right in number and type, pointers to memory of the sizes that the other arguments
    /// imply, which no other work in flight uses in conflict.
    unsafe fn launch(&self, launch: &Launch) -> Result<()>;

    /// Makes launches one after the other and waits for them. Returns the milliseconds from the beginning of the first to the end of the
    /// last, by the device's own clock if it has one.
    ///
    /// # Errors
    /// As [`Driver::launch`].
    ///
    /// # Safety
    /// That of [`Driver::launch`] for each.
    unsafe fn time(&self, launches: &[Launch]) -> Result<f64>;
}
