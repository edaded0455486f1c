//! The CUDA backend: kernels of `kernels/*.cu`, driven on an NVIDIA GPU or by the kernel simulator.
//!
//! Activations have one dtype, f32, f16 or bf16, and matrices the same; norm weights, biases and sums are f32.
//! The modules beside this one hold one family of ops each: they check operands, choose the grid, and launch. Nobody else launches.

mod attention;
mod attention_grad;
mod dense;
pub mod driver;
mod elementwise;
mod grad;
mod image;
mod launch;
mod memory;
mod norm;
mod ops;
mod optim;
mod packed;
mod probe;
mod product;
mod product_grad;
mod queue;
mod rows;
mod rows_grad;
mod sample;
mod staging;
mod w8a8;

use std::sync::Arc;

use crate::dtype::DType;
use crate::error::Result;
use dense::Library;
use driver::Driver;
use launch::Functions;
use memory::Arena;
use product::SplitSums;
use queue::Queue;

/// A device that runs CUDA kernels.
pub struct Cuda {
    driver: Arc<dyn Driver>,
    functions: Functions,
    dtype: DType,
    queue: Queue,
    arena: Arc<Arena>,
    decode: attention::Workspace,
    widened: attention::Widened,
    split_sums: SplitSums,
    rounded: w8a8::Rounded,
    /// Whether x is rounded to 8 bits for products of many tokens with weights of 8 bits.
    rounds_x: bool,
    library: Library,
}

impl Cuda {
    /// Whether this machine has an NVIDIA driver: whether a user would expect a GPU to be used.
    pub fn has_driver() -> bool {
        driver::Nvidia::has_driver()
    }

    /// What kernels this build has, by the architectures they were compiled for; none if it was built without nvcc.
    pub fn architectures() -> Option<&'static str> {
        if cfg!(llava_cuda) { option_env!("LLAVA_CUDA_ARCHS") } else { None }
    }

    /// GPU number `ordinal`, with activations of `dtype`.
    ///
    /// # Errors
    /// If this build or this machine has none that can be used; the message says which of the two, and why.
    pub fn open(ordinal: usize, dtype: DType) -> Result<Self> {
        Self::on(Arc::new(driver::Nvidia::open(ordinal)?), dtype)
    }

    /// The simulator on `n_threads` threads (0: as many as the machine runs at once), with activations of `dtype`, and with the faults that
    /// the environment asks for.
    ///
    /// # Errors
    /// If they make it one that the kernels cannot run on.
    #[cfg(llava_sim)]
    pub fn simulated(n_threads: usize, dtype: DType) -> Result<Self> {
        Self::simulated_with(n_threads, dtype, driver::Faults::from_environment()?)
    }

    /// As [`Cuda::simulated`], with these faults.
    #[cfg(llava_sim)]
    pub fn simulated_with(n_threads: usize, dtype: DType, faults: driver::Faults) -> Result<Self> {
        Self::on(Arc::new(driver::Simulator::with_faults(n_threads, faults)?), dtype)
    }

    /// The same with products of more than 8 tokens with weights of 8 bits on the integer tensor cores, x rounded to 8 bits group by group
    /// (W8A8), if `w8a8`: to the very integers that the CPU makes of it.
    pub fn with_w8a8(self, w8a8: bool) -> Self {
        Self { rounds_x: w8a8, ..self }
    }

    /// A device behind a driver.
    fn on(driver: Arc<dyn Driver>, dtype: DType) -> Result<Self> {
        let functions = Functions::resolve(&*driver, dtype)?;
        Ok(Self {
            queue: Queue::new(driver.clone()),
            arena: Arena::new(driver.clone()),
            driver,
            functions,
            dtype,
            decode: Default::default(),
            widened: Default::default(),
            split_sums: Default::default(),
            rounded: Default::default(),
            rounds_x: false,
            library: Default::default(),
        })
    }
}

#[cfg(all(test, llava_sim))]
mod tests;
