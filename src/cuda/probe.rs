//! What the device can do at best: reading memory by `kernels/probe.cu`, arithmetic by a large square product.
//!
//! Tensor cores have no probe that is simpler than a product: what bounds them is how operands come to them. So the limit of arithmetic is
//! the better of our own kernel and of cuBLASLt, where that is installed, and each is named.

use std::sync::Arc;

use super::Cuda;
use super::dense::Maker;
use super::driver::{Arg, Grid};
use super::launch::{Kernel, address, int};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::{ArithmeticPeak, Epilogue, Operands, Peaks, Weight, check};
use crate::tensor::Tensor;

/// Timings of which the best counts, after a call to warm up.
const RUNS: usize = 3;
/// Calls of a timing: their launches' own time is then little beside their work.
const CALLS: usize = 4;
/// Threads of a block of `probe_read_f32`.
const THREADS: usize = 256;
/// 16-byte vectors that such a block takes at a time.
const BLOCK_VECTORS: usize = THREADS * 4;
/// Such blocks that a multiprocessor runs at once.
const BLOCKS_AT_ONCE: usize = 8;
/// Rows that the operands of the product are made of, repeated.
const DISTINCT_ROWS: usize = 64;

impl Cuda {
    /// [`Ops::measure_peaks`](crate::ops::Ops::measure_peaks)
    pub(super) fn peaks(&self) -> Result<Peaks> {
        let size = self.driver.probe_size();
        Ok(Peaks { read_gbps: self.read_gbps(size.read_bytes)?, arithmetic: self.product_peaks(size.product)? })
    }

    /// GB/s of reading `bytes`, which are far more than a cache holds.
    fn read_gbps(&self, bytes: usize) -> Result<f64> {
        let x = self.zeros(&[bytes / DType::F32.size()], DType::F32)?;
        let most = self.driver.n_multiprocessors() * BLOCKS_AT_ONCE;
        let mut sums = self.zeros(&[(bytes / 16).div_ceil(BLOCK_VECTORS).min(most)], DType::F32)?;
        self.best_rate(bytes, || self.read_sums(&mut sums, &x))
    }

    /// sums\[b\] = Σ of the elements of x that block b reads: sums f32 `[blocks]`, x f32, a multiple of 4 elements.
    fn read_sums(&self, sums: &mut Tensor, x: &Tensor) -> Result<()> {
        const OP: &str = "probe_read";
        check::dtype(OP, "sums", sums, DType::F32)?;
        check::dtype(OP, "x", x, DType::F32)?;
        if sums.is_empty() || !x.len().is_multiple_of(4) {
            return Err(Error::shape(OP, "x and sums", "a multiple of 4 elements, and one at least", (x.shape(), sums.shape())));
        }
        let args = [Arg::Ptr(address(OP, "sums", sums)?), Arg::Ptr(address(OP, "x", x)?), int(OP, "vectors", x.len() / 4)?];
        let grid = Grid { blocks: [sums.len(), 1, 1], threads: THREADS, shared_bytes: THREADS / 32 * 4 };
        // SAFETY: the arguments are the kernel's; x has that many vectors and sums an element for each block (just checked); the arena's
        // memory is 256-byte aligned.
        unsafe { self.launch(Kernel::ProbeRead, grid, &args) }
    }

    /// Rates of y = x·Wᵀ with all three `[n, n]` in this device's dtype, by our own kernel and by the library if there is one.
    fn product_peaks(&self, n: usize) -> Result<Vec<ArithmeticPeak>> {
        // Numbers of all kinds: zeros let a GPU clock higher than any model does.
        let values: Vec<f32> = (0..DISTINCT_ROWS * n).map(|i| (i * 7919 % 4093) as f32 / 2046.5 - 1.0).collect();
        let rows = self.to_device(Tensor::from_slice(&[DISTINCT_ROWS, n], &values).converted(self.dtype))?.into();
        let [mut x, mut w, mut y] =
            [self.zeros(&[n, n], self.dtype)?, self.zeros(&[n, n], self.dtype)?, self.zeros(&[n, n], self.dtype)?];
        let ids = |step: usize| (0..n).map(|i| (i * step % DISTINCT_ROWS) as u32).collect::<Vec<_>>();
        self.embed(&mut x, &rows, &ids(1))?;
        self.embed(&mut w, &rows, &ids(7))?;
        let w = Weight::stacked(vec![Arc::new(w)])?;
        let mut peak = |maker, name| -> Result<ArithmeticPeak> {
            let gflops = self.best_rate(2 * n * n * n, || self.linear_by(maker, &mut y, &x, &w, None, Epilogue::Store))?;
            Ok(ArithmeticPeak { operands: Operands::Float(self.dtype), how: format!("{name}, {n} x {n} x {n}"), gflops })
        };
        let mut peaks = vec![peak(Maker::Kernels, "our own GEMM")?];
        if self.has_library(n)? {
            peaks.push(peak(Maker::Any, "cuBLASLt")?);
        }
        Ok(peaks)
    }

    /// The highest rate of `call`, which queues launches that are `work` bytes or operations, in billions a second.
    fn best_rate(&self, work: usize, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
        call()?;
        self.queue.flush()?;
        let mut best = 0.0;
        for _ in 0..RUNS {
            (0..CALLS).try_for_each(|_| call())?;
            let ms = self.queue.flush_timed()?;
            best = f64::max(best, (work * CALLS) as f64 / ms / 1e6);
        }
        Ok(best)
    }
}

#[cfg(all(test, llava_sim))]
mod tests {
    use super::*;
    use crate::cuda::driver::Simulator;

    /// Small integers, whose sum is exact: with fewer and with more blocks than there is work for, and work that ends within a block.
    #[test]
    fn every_element_is_read_once() {
        let cuda = Cuda::simulated(2, DType::Bf16).unwrap();
        for n in [4, 8, 444, 4 * BLOCK_VECTORS, 4 * BLOCK_VECTORS * 3 + 4 * 989] {
            let values: Vec<f32> = (0..n).map(|i| (i % 13) as f32 - 4.0).collect();
            let x = cuda.to_device(Tensor::from_slice(&[n], &values)).unwrap();
            for blocks in [1, 2, 3, 7] {
                let mut sums = cuda.to_device(Tensor::from_slice(&[blocks], &vec![f32::NAN; blocks])).unwrap();
                cuda.read_sums(&mut sums, &x).unwrap();
                let sum: f32 = cuda.to_host(&sums).unwrap().to_f32().iter().sum();
                assert_eq!(sum, values.iter().sum::<f32>(), "{n} elements, {blocks} blocks");
            }
        }
        let mut sums = cuda.zeros(&[1], DType::F32).unwrap();
        assert!(cuda.read_sums(&mut sums, &cuda.zeros(&[6], DType::F32).unwrap()).is_err());
        assert!(cuda.read_sums(&mut sums, &cuda.zeros(&[8], DType::Bf16).unwrap()).is_err());
    }

    #[test]
    fn peaks_say_what_was_run() {
        let how = |cuda: Cuda| {
            let peaks = cuda.peaks().unwrap();
            assert!(peaks.read_gbps > 0.0 && peaks.arithmetic.iter().all(|p| p.gflops > 0.0), "{peaks:?}");
            peaks.arithmetic.into_iter().map(|p| (p.operands, p.how)).collect::<Vec<_>>()
        };
        let own = |dtype| (Operands::Float(dtype), "our own GEMM, 128 x 128 x 128".to_owned());
        for dtype in [DType::F32, DType::Bf16] {
            assert_eq!(how(Cuda::simulated(2, dtype).unwrap()), [own(dtype)]);
        }
        let with_library = |dtype| Cuda::on(Arc::new(Simulator::with_library(2)), dtype).unwrap();
        assert_eq!(how(with_library(DType::F32)), [own(DType::F32)]);
        let library = (Operands::Float(DType::Bf16), "cuBLASLt, 128 x 128 x 128".to_owned());
        assert_eq!(how(with_library(DType::Bf16)), [own(DType::Bf16), library]);
    }

    /// What is timed is made, once, in its place in the queue.
    #[test]
    fn a_timed_flush_makes_what_is_queued() {
        let cuda = Cuda::simulated(1, DType::F32).unwrap();
        let x = cuda.to_device(Tensor::from_slice(&[8], &[1.0f32; 8])).unwrap();
        let mut sums = cuda.zeros(&[1], DType::F32).unwrap();
        cuda.read_sums(&mut sums, &x).unwrap();
        assert!(cuda.queue.flush_timed().unwrap() > 0.0);
        assert_eq!(cuda.to_host(&sums).unwrap().to_f32(), [8.0]);
    }
}
