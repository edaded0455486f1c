//! Products with dense weights, by `kernels/gemm.cu`, `gemm_f32.cu`, `gemv.cu`, or a library; and [`Ops::linear`], which leads to them.
//!
//! [`Ops::linear`]: crate::ops::Ops::linear

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use super::Cuda;
use super::driver::{Arg, DevicePtr, Function, Grid, Launch, Matmul};
use super::launch::{Kernel, address, int};
use super::product::{GEMV_MAX_TOKENS, MAX_PARTS, Operands, Tile, plan};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{Epilogue, Run, Weight, check};
use crate::tensor::Tensor;

/// Who may make products of many tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Maker {
    /// A library if there is one that can, else our own kernels.
    Any,
    /// Our own kernels.
    Kernels,
}

/// Tensor cores do 1024 multiply-adds a clock. Small tiles read so much from shared memory that they come to two thirds of that.
const HALF_TILES: [Tile; 2] = [
    Tile {
        kernel: Kernel::Gemm,
        rows: 128,
        cols: 128,
        k_step: 32,
        shared_bytes: 4 * (128 + 128) * 32 * 2,
        clocks_per_k: 128 * 128 / 1024,
        fixed_clocks: 2000,
        clocks_per_part: 1024,
    },
    Tile {
        kernel: Kernel::GemmSmall,
        rows: 64,
        cols: 64,
        k_step: 64,
        shared_bytes: 3 * (64 + 64) * 64 * 2,
        clocks_per_k: 64 * 64 / 1024 * 3 / 2,
        fixed_clocks: 1200,
        clocks_per_part: 256,
    },
];

/// The other cores do 128; again small tiles wait for shared memory.
pub(super) const F32_TILES: [Tile; 2] = [
    Tile {
        kernel: Kernel::Gemm,
        rows: 64,
        cols: 64,
        k_step: 16,
        shared_bytes: 2 * 16 * (68 + 68) * 4 + 4,
        clocks_per_k: 64 * 64 / 128,
        fixed_clocks: 1200,
        clocks_per_part: 256,
    },
    Tile {
        kernel: Kernel::GemmSmall,
        rows: 32,
        cols: 32,
        k_step: 16,
        shared_bytes: 2 * 16 * (36 + 36) * 4 + 4,
        clocks_per_k: 32 * 32 / 128 * 3 / 2,
        fixed_clocks: 1000,
        clocks_per_part: 64,
    },
];

/// Products of the driver's library that were asked for; none for those that it has not.
#[derive(Default)]
pub(super) struct Library(Mutex<HashMap<Matmul, Option<Function>>>);

/// What the library wants addresses to be multiples of, for its fastest kernels.
const LIBRARY_ALIGNMENT: u64 = 256;

impl Cuda {
    /// [`Ops::linear`](crate::ops::Ops::linear)
    pub(super) fn linear(&self, y: &mut Tensor, x: &Tensor, w: &Weight, bias: Option<&Tensor>, epilogue: Epilogue) -> Result<()> {
        self.linear_by(Maker::Any, y, x, w, bias, epilogue)
    }

    /// As [`Cuda::linear`], by `maker`.
    pub(super) fn linear_by(
        &self,
        maker: Maker,
        y: &mut Tensor,
        x: &Tensor,
        w: &Weight,
        bias: Option<&Tensor>,
        epilogue: Epilogue,
    ) -> Result<()> {
        const OP: &str = "linear";
        check::linear(y, x, w, bias)?;
        check::dtype(OP, "x", x, self.dtype)?;
        if y.dtype() != DType::F32 {
            check::dtype(OP, "y", y, self.dtype)?;
        }
        bias.map_or(Ok(()), |bias| check::dtype(OP, "bias", bias, DType::F32))?;
        let (tokens, k) = (x.rows(), w.k());
        // With the largest tile on top, so that no row or column of a tile is beyond the range of an int.
        int(OP, "tokens", tokens + 128)?;
        int(OP, "rows of W", w.n() + 128)?;
        int(OP, "width of x", k + 128)?;
        let operands = Operands {
            y: address(OP, "y", y)?,
            y_dtype: y.dtype(),
            y_stride: y.row_len(),
            x: address(OP, "x", x)?,
            bias: bias.map(|bias| address(OP, "bias", bias)).transpose()?,
            tokens,
            k,
            epilogue,
        };
        for (mut row, run) in w.runs() {
            match run {
                Run::Dense(parts) => {
                    for parts in parts.chunks(MAX_PARTS) {
                        let mut matrices = [None; MAX_PARTS];
                        for (i, part) in parts.iter().enumerate() {
                            check::dtype(OP, "W", part, self.dtype)?;
                            matrices[i] = Some((address(OP, "W", part)?, part.rows()));
                        }
                        // SAFETY: as below.
                        unsafe { self.dense(maker, &operands.at_column(w.first_col, row), matrices)? };
                        row += parts.iter().map(|part| part.rows()).sum::<usize>();
                    }
                }
                Run::Packed(parts) => {
                    for parts in parts.chunks(MAX_PARTS) {
                        // SAFETY: x has `tokens` rows of k, each part n rows of k, all of this device's dtype, or packed (`Packed::new`); y
                        // has `tokens` rows of `y_stride`, at least `first_col` and the rows of all parts, in this dtype or f32; the bias,
                        // if there is one, has an f32 for each row of all parts (`check::linear`, `check::dtype`). y is borrowed alone, so
                        // nothing else lies in it.
                        unsafe { self.packed(&operands.at_column(w.first_col, row), parts)? };
                        row += parts.iter().map(|part| part.n).sum::<usize>();
                    }
                }
            }
        }
        Ok(())
    }

    /// The product with matrices `[n, k]` of this device's dtype, at most [`MAX_PARTS`] of them.
    ///
    /// # Safety
    /// The operands are what they say; the matrices are where they say, of that many rows.
    pub(super) unsafe fn dense(
        &self,
        maker: Maker,
        operands: &Operands,
        matrices: [Option<(DevicePtr, usize)>; MAX_PARTS],
    ) -> Result<()> {
        let tokens = operands.tokens;
        let n = matrices.map(|m| m.map_or(0, |(_, n)| n));
        if tokens == 0 || n == [0; MAX_PARTS] {
            return Ok(());
        }
        let product = operands.with(n, matrices.map(|m| m.map_or(DevicePtr(0), |(w, _)| w)))?;
        // SAFETY: the caller's.
        unsafe {
            if tokens <= GEMV_MAX_TOKENS {
                self.gemv(Kernel::Gemv, &product)?;
            } else if maker == Maker::Kernels || !self.by_library(operands, matrices)? {
                let tiles = if self.dtype == DType::F32 { &F32_TILES } else { &HALF_TILES };
                let (tile, splits) = plan(tiles, product.size, self.driver.n_multiprocessors());
                self.gemm(&product, tile, splits)?;
            }
        }
        Ok(())
    }

    /// Makes a product by the driver's library, part for part. False if there is none, or it cannot: with f32, which it would round, with a
    /// bias, which it wants in the dtype of y, or with an activation, of which it has only an approximation.
    ///
    /// # Safety
    /// As [`Cuda::dense`].
    unsafe fn by_library(&self, operands: &Operands, matrices: [Option<(DevicePtr, usize)>; MAX_PARTS]) -> Result<bool> {
        let &Operands { y, y_dtype, y_stride, x, bias, tokens, k, epilogue } = operands;
        let has_epilogue = matches!(epilogue, Epilogue::Store | Epilogue::Add);
        if self.dtype == DType::F32 || bias.is_some() || !has_epilogue || k == 0 {
            return Ok(false);
        }
        let mut launches = Vec::new();
        let mut column = 0;
        for (w, n) in matrices.into_iter().flatten().filter(|&(_, n)| n > 0) {
            let y = y.offset(column * y_dtype.size());
            column += n;
            let add = epilogue == Epilogue::Add;
            let matmul = Matmul { dtype: self.dtype, y_dtype, tokens, n, k, y_stride, add };
            if [y, x, w].iter().any(|p| p.0 % LIBRARY_ALIGNMENT != 0) {
                return Ok(false);
            }
            let Some(function) = self.library_function(matmul)? else {
                return Ok(false);
            };
            let grid = Grid { blocks: [1; 3], threads: 1, shared_bytes: 0 };
            launches.push(Launch { function, grid, args: [y, x, w].map(Arg::Ptr).to_vec() });
        }
        for launch in launches {
            // SAFETY: the caller's.
            unsafe { self.queue.push(launch) };
        }
        Ok(true)
    }

    /// Whether a library makes plain products of `[n, n]` by `[n, n]` in this device's dtype.
    pub(super) fn has_library(&self, n: usize) -> Result<bool> {
        let matmul = Matmul { dtype: self.dtype, y_dtype: self.dtype, tokens: n, n, k: n, y_stride: n, add: false };
        Ok(self.dtype != DType::F32 && self.library_function(matmul)?.is_some())
    }

    fn library_function(&self, matmul: Matmul) -> Result<Option<Function>> {
        let mut known = self.library.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&function) = known.get(&matmul) {
            return Ok(function);
        }
        let function = self.driver.matmul(&matmul)?;
        known.insert(matmul, function);
        Ok(function)
    }
}

#[cfg(test)]
mod tests {
    #[cfg(llava_sim)]
    use std::sync::Arc;

    use super::super::product::Size;
    use super::*;

    fn size([tokens, n, k]: [usize; 3]) -> Size {
        Size { tokens, n: [n, 0, 0], k }
    }

    fn planned(sizes: [usize; 3]) -> (Kernel, usize) {
        let (tile, splits) = plan(&HALF_TILES, size(sizes), 132);
        (tile.kernel, splits)
    }

    #[test]
    fn products_that_fill_the_device_are_not_split() {
        assert_eq!(planned([640, 22016, 4096]), (Kernel::Gemm, 1));
        assert_eq!(planned([16 * 577, 1024, 1024]), (Kernel::Gemm, 1));
    }

    #[test]
    fn products_that_leave_multiprocessors_idle_are_split() {
        assert_eq!(planned([577, 1024, 4096]).0, Kernel::Gemm);
        assert!(planned([577, 1024, 4096]).1 > 1);
        assert!(planned([640, 4096, 4096]).1 > 1);
        assert!(planned([16, 4096, 4096]).1 > 1);
    }

    #[test]
    fn the_large_products_of_the_case_table_take_large_tiles() {
        for k in [41, 72] {
            assert_eq!(planned([577, 1700, k]).0, Kernel::Gemm);
            assert_eq!(plan(&F32_TILES, size([257, 1100, k]), 132).0.kernel, Kernel::Gemm);
        }
    }

    #[test]
    fn small_products_take_small_tiles() {
        assert_eq!(planned([9, 64, 8]), (Kernel::GemmSmall, 1));
        assert_eq!(planned([9, 64, 0]), (Kernel::GemmSmall, 1));
    }

    /// A decoder's products of many tokens go to the library, in parts as well; what it has not comes from our own kernels, and so
    /// do parts of which one begins where the library takes no tensor.
    #[cfg(llava_sim)]
    #[test]
    fn a_library_makes_what_it_can() {
        let [tokens, k] = [9, 24];
        for n in [128, 96] {
            let driver = Arc::new(super::super::driver::Simulator::with_library(1));
            let cuda = Cuda::on(driver, DType::Bf16).unwrap();
            let integers = |len: usize, step: usize| (0..len).map(|i| (i * step % 13) as f32 - 6.0).collect::<Vec<_>>();
            let (xs, ws, old) = (integers(tokens * k, 5), integers(2 * n * k, 7), integers(tokens * 2 * n, 3));
            let put =
                |shape: &[usize], values: &[f32]| cuda.to_device(Tensor::from_slice(shape, values).converted(DType::Bf16)).unwrap();
            let x = put(&[tokens, k], &xs);
            let parts = ws.chunks(n * k).map(|part| Arc::new(put(&[n, k], part)));
            let w = Weight::stacked(parts.collect()).unwrap();
            let bias = cuda.to_device(Tensor::from_slice(&[2 * n], &integers(2 * n, 2))).unwrap();
            for (epilogue, bias) in [(Epilogue::Store, None), (Epilogue::Add, None), (Epilogue::Store, Some(&bias))] {
                let mut y = cuda.to_device(Tensor::from_slice(&[tokens, 2 * n], &old)).unwrap();
                cuda.linear(&mut y, &x, &w, bias, epilogue).unwrap();
                let expected = (0..tokens * 2 * n).map(|i| {
                    let (t, j) = (i / (2 * n), i % (2 * n));
                    let product = (0..k).map(|i| xs[t * k + i] * ws[j * k + i]).sum::<f32>();
                    product + if epilogue == Epilogue::Add { old[i] } else { 0.0 } + bias.map_or(0.0, |_| integers(2 * n, 2)[j])
                });
                assert_eq!(
                    cuda.to_host(&y).unwrap().to_f32(),
                    expected.collect::<Vec<_>>(),
                    "{n} rows, {epilogue:?}, bias {}",
                    bias.is_some()
                );
            }
            // A plain product and one that adds; two parts of one size have one plan.
            assert_eq!(cuda.library.0.lock().unwrap().len(), 2, "{n} rows");
        }
    }

    /// Products of small integers, whose sums are exact in any order: all tiles, more splits than steps included, twice with one workspace.
    #[cfg(llava_sim)]
    #[test]
    fn every_tile_and_number_of_splits_gives_the_same() {
        let [tokens, n, k] = [131, 137, 200];
        let integers = |len: usize, step: usize| (0..len).map(|i| (i * step % 13) as f32 - 6.0).collect::<Vec<_>>();
        let (xs, ws) = (integers(tokens * k, 5), integers(n * k, 7));
        let dot = |t: usize, j: usize| (0..k).map(|i| xs[t * k + i] * ws[j * k + i]).sum::<f32>();
        let expected: Vec<f32> = (0..tokens * n).map(|i| dot(i / n, i % n)).collect();
        for (dtype, tiles) in [(DType::F32, &F32_TILES), (DType::F16, &HALF_TILES), (DType::Bf16, &HALF_TILES)] {
            let cuda = Cuda::simulated(2, dtype).unwrap();
            let put = |rows, values: &[f32]| cuda.to_device(Tensor::from_slice(&[rows, k], values).converted(dtype)).unwrap();
            let (x, w, y) = (put(tokens, &xs), put(n, &ws), cuda.zeros(&[tokens, n], DType::F32).unwrap());
            let at = |tensor| address("linear", "operand", tensor).unwrap();
            let (y_dtype, epilogue) = (DType::F32, Epilogue::Store);
            let operands = Operands { y: at(&y), y_dtype, y_stride: n, x: at(&x), bias: None, tokens, k, epilogue };
            let product = operands.with([n, 0, 0], [at(&w), DevicePtr(0), DevicePtr(0)]).unwrap();
            for (tile, splits) in tiles.iter().flat_map(|tile| [3, 2, 1, 8].map(|splits| (tile, splits))) {
                // SAFETY: the tensors are of those sizes, y of f32, and the tile is one of their dtype.
                unsafe { cuda.gemm(&product, tile, splits).unwrap() };
                assert_eq!(cuda.to_host(&y).unwrap().to_f32(), expected, "{dtype}, {tile:?}, {splits} splits");
            }
        }
    }
}
