//! Launches of `kernels/gemm.cu`, `kernels/gemm_f32.cu` and `kernels/gemv.cu`.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use super::Cuda;
use super::driver::{Arg, DevicePtr, Function, Grid, Launch, Matmul};
use super::launch::{Kernel, address, int};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{Epilogue, Run, Weight, check};
use crate::tensor::Tensor;

/// Up to here a product's time is that of reading its weights, and `gemv.cu` does it.
pub(super) const GEMV_MAX_TOKENS: usize = 8;
/// Rows of W of a block of `gemv.cu`.
pub(super) const GEMV_ROWS: usize = 16;
/// Threads of a block there.
pub(super) const GEMV_THREADS: usize = 256;
/// One f32 for each warp, token and row.
pub(super) const GEMV_SHARED_BYTES: usize = GEMV_THREADS / 32 * GEMV_MAX_TOKENS * GEMV_ROWS * 4;

/// Threads of a block of the other two files.
const GEMM_THREADS: usize = 128;
/// More splits than this cost more in sums than they bring.
const MAX_SPLITS: usize = 8;

/// A kernel that makes `rows` x `cols` of y with a block, and what a multiprocessor that is full of blocks spends on one, in clocks.
#[derive(Debug, PartialEq, Eq)]
struct Tile {
    kernel: Kernel,
    rows: usize,
    cols: usize,
    /// What a block advances by along k.
    k_step: usize,
    shared_bytes: usize,
    /// For each of k.
    clocks_per_k: usize,
    /// To fill the pipeline and to write y.
    fixed_clocks: usize,
    /// To write or to read the tile in f32, where it is split.
    clocks_per_part: usize,
}

/// Who may make products of many tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Maker {
    /// A library if there is one that can, else our own kernels.
    Any,
    /// Our own kernels.
    Kernels,
}

/// Parts of a weight that one launch takes.
pub(super) const MAX_PARTS: usize = 3;

/// tokens × rows of each part × k of a product
#[derive(Clone, Copy)]
struct Size {
    tokens: usize,
    n: [usize; MAX_PARTS],
    k: usize,
}

impl Tile {
    /// Every part has tiles of its own.
    fn count(&self, size: Size) -> usize {
        size.tokens.div_ceil(self.rows) * size.n.iter().map(|n| n.div_ceil(self.cols)).sum::<usize>()
    }

    /// Bytes of the sums that `splits` blocks of each tile leave for the last one.
    fn partial_bytes(&self, size: Size, splits: usize) -> usize {
        if splits == 1 { 0 } else { self.count(size) * splits * self.rows * self.cols * 4 }
    }
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
const F32_TILES: [Tile; 2] = [
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

/// Time until the last split of a tile knows that it is the last, in clocks.
const JOIN_CLOCKS: usize = 700;

/// The tile and the number of splits that should take the least time on so many multiprocessors.
fn plan(tiles: &'static [Tile], size: Size, n_multiprocessors: usize) -> (&'static Tile, usize) {
    let k = size.k;
    let time = |tile: &Tile, splits: usize| {
        // The multiprocessor with the most blocks is the last to finish. A block that is alone on one leaves it idle while it waits, a
        // quarter of the time or so.
        let blocks = (tile.count(size) * splits).div_ceil(n_multiprocessors);
        let thirds = blocks / 2 * 6 + blocks % 2 * 4;
        let steps = k.div_ceil(tile.k_step).div_ceil(splits);
        let join = if splits == 1 { 0 } else { JOIN_CLOCKS + (1 + splits) * tile.clocks_per_part };
        thirds * (steps * tile.k_step * tile.clocks_per_k + tile.fixed_clocks + join)
    };
    let splits_of = |tile: &Tile| 1..=MAX_SPLITS.min(k.div_ceil(tile.k_step)).max(1);
    let all = tiles.iter().flat_map(|tile| splits_of(tile).map(move |splits| (tile, splits)));
    all.min_by_key(|&(tile, splits)| time(tile, splits)).expect("there are tiles")
}

/// Device memory in which the splits of a product leave their sums. Launches are done in order, so all products share it.
#[derive(Default)]
pub(super) struct SplitSums(Mutex<Option<Sums>>);

struct Sums {
    /// Of f32, as many as any product needed yet.
    partial: Tensor,
    /// How many splits of a tile are done: zero between launches.
    arrived: Tensor,
}

/// Products of the driver's library that were asked for; none for those that it has not.
#[derive(Default)]
pub(super) struct Library(Mutex<HashMap<Matmul, Option<Function>>>);

/// What the library wants addresses to be multiples of, for its fastest kernels.
const LIBRARY_ALIGNMENT: u64 = 256;

/// What a product is made of and where it goes, but for W.
#[derive(Clone, Copy)]
pub(super) struct Operands {
    /// The first element of the first row.
    pub y: DevicePtr,
    pub y_dtype: DType,
    pub y_stride: usize,
    pub x: DevicePtr,
    pub bias: Option<DevicePtr>,
    pub tokens: usize,
    pub k: usize,
    pub epilogue: Epilogue,
}

impl Operands {
    /// The same for the rows of W from `row` on, of which the first has column `first_col` of y.
    fn at_column(&self, first_col: usize, row: usize) -> Self {
        let y = self.y.offset((first_col + row) * self.y_dtype.size());
        Self { y, bias: self.bias.map(|bias| bias.offset(row * DType::F32.size())), ..*self }
    }
}

/// A product, as every kernel of this module takes it.
struct Product {
    y: DevicePtr,
    x: DevicePtr,
    /// The parts; what there is not is null.
    w: [DevicePtr; MAX_PARTS],
    bias: DevicePtr,
    size: Size,
    /// The last arguments: tokens, rows of each part, k, y_stride, epilogue, y_is_f32.
    scalars: [Arg; 5 + MAX_PARTS],
}

impl Product {
    /// The first arguments: y, x, the parts of W, bias.
    fn pointers(&self) -> [Arg; 3 + MAX_PARTS] {
        let [w0, w1, w2] = self.w;
        [self.y, self.x, w0, w1, w2, self.bias].map(Arg::Ptr)
    }
}

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
                    for part in parts {
                        // SAFETY: x has `tokens` rows of k, each part n rows of k, all of this device's dtype, or packed (`Packed::new`); y
                        // has `tokens` rows of `y_stride`, at least `first_col` and the rows of all parts, in this dtype or f32; the bias,
                        // if there is one, has an f32 for each row of all parts (`check::linear`, `check::dtype`). y is borrowed alone, so
                        // nothing else lies in it.
                        unsafe { self.packed(maker, &operands.at_column(w.first_col, row), part)? };
                        row += part.n;
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
        const OP: &str = "linear";
        let &Operands { y, y_dtype, y_stride, x, bias, tokens, k, epilogue } = operands;
        let n = matrices.map(|m| m.map_or(0, |(_, n)| n));
        if tokens == 0 || n == [0; MAX_PARTS] {
            return Ok(());
        }
        let product = Product {
            y,
            x,
            w: matrices.map(|m| m.map_or(DevicePtr(0), |(w, _)| w)),
            bias: bias.unwrap_or(DevicePtr(0)),
            size: Size { tokens, n, k },
            scalars: [
                int(OP, "tokens", tokens)?,
                int(OP, "rows of W", n[0])?,
                int(OP, "rows of W", n[1])?,
                int(OP, "rows of W", n[2])?,
                int(OP, "width of x", k)?,
                int(OP, "width of y", y_stride)?,
                Arg::Int(epilogue as i32),
                Arg::Int((y_dtype == DType::F32).into()),
            ],
        };
        // SAFETY: the caller's.
        unsafe {
            if tokens <= GEMV_MAX_TOKENS {
                self.gemv(&product)?;
            } else if maker == Maker::Kernels || !self.by_library(&product, y_dtype, y_stride, epilogue)? {
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
    /// Every pointer of the product leads to what its scalars say, on this device.
    unsafe fn by_library(&self, product: &Product, y_dtype: DType, y_stride: usize, epilogue: Epilogue) -> Result<bool> {
        let &Product { y, x, w, bias, size: Size { tokens, n, k }, .. } = product;
        let has_epilogue = matches!(epilogue, Epilogue::Store | Epilogue::Add);
        if self.dtype == DType::F32 || bias != DevicePtr(0) || !has_epilogue || k == 0 {
            return Ok(false);
        }
        let mut launches = Vec::new();
        let mut column = 0;
        for (&w, &n) in w.iter().zip(&n).filter(|(_, n)| **n > 0) {
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

    /// # Safety
    /// Every pointer of the product leads to what its scalars say, on this device; there are tokens, at most [`GEMV_MAX_TOKENS`], and
    /// rows of W.
    unsafe fn gemv(&self, product: &Product) -> Result<()> {
        let args = [product.pointers().as_slice(), &product.scalars].concat();
        let blocks = product.size.n.iter().map(|n| n.div_ceil(GEMV_ROWS)).sum();
        let grid = Grid { blocks: [blocks, 1, 1], threads: GEMV_THREADS, shared_bytes: GEMV_SHARED_BYTES };
        // SAFETY: the arguments are the kernel's, and the caller vouches for them.
        unsafe { self.launch(Kernel::Gemv, grid, &args) }
    }

    /// # Safety
    /// Every pointer of the product leads to what its scalars say, on this device; there are tokens and rows of W. The tile is one of this
    /// dtype.
    unsafe fn gemm(&self, product: &Product, tile: &Tile, splits: usize) -> Result<()> {
        let n_tiles = tile.count(product.size);
        let grid = Grid { blocks: [n_tiles, splits, 1], threads: GEMM_THREADS, shared_bytes: tile.shared_bytes };
        let launch = |partial, arrived| {
            let args = [product.pointers().as_slice(), &[partial, arrived].map(Arg::Ptr), &product.scalars].concat();
            // SAFETY: the arguments are the kernel's, and the caller vouches for those of the product. With one split the kernel touches
            // neither `partial` nor `arrived`; with several they are as large as their tiles need.
            unsafe { self.launch(tile.kernel, grid, &args) }
        };
        if splits == 1 {
            return launch(DevicePtr(0), DevicePtr(0));
        }
        self.with_split_sums(tile.partial_bytes(product.size, splits), n_tiles, launch)
    }

    /// Calls `launch` with memory for `partial_bytes` of sums and with the counters of `n_tiles` tiles, all of them zero.
    fn with_split_sums(
        &self,
        partial_bytes: usize,
        n_tiles: usize,
        launch: impl FnOnce(DevicePtr, DevicePtr) -> Result<()>,
    ) -> Result<()> {
        let mut sums = self.split_sums.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !sums.as_ref().is_some_and(|s| s.partial.bytes() >= partial_bytes && s.arrived.len() >= n_tiles) {
            let held = sums.take().map_or((0, 0), |s| (s.partial.len(), s.arrived.len()));
            *sums = Some(Sums {
                partial: self.zeros(&[held.0.max(partial_bytes.div_ceil(4))], DType::F32)?,
                arrived: self.zeros(&[held.1.max(n_tiles)], DType::I32)?,
            });
        }
        let Sums { partial, arrived } = sums.as_ref().expect("it is there, or was just made");
        launch(address("linear", "partial sums", partial)?, address("linear", "counters", arrived)?)
    }
}

#[cfg(test)]
mod tests {
    #[cfg(llava_sim)]
    use std::sync::Arc;

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
            let scalars = [tokens, n, 0, 0, k, n, Epilogue::Store as usize, 1].map(|s| Arg::Int(s as i32));
            let none = DevicePtr(0);
            let product =
                Product { y: at(&y), x: at(&x), w: [at(&w), none, none], bias: none, size: size([tokens, n, k]), scalars };
            for (tile, splits) in tiles.iter().flat_map(|tile| [3, 2, 1, 8].map(|splits| (tile, splits))) {
                // SAFETY: the tensors are of those sizes, y of f32, and the tile is one of their dtype.
                unsafe { cuda.gemm(&product, tile, splits).unwrap() };
                assert_eq!(cuda.to_host(&y).unwrap().to_f32(), expected, "{dtype}, {tile:?}, {splits} splits");
            }
        }
    }
}
