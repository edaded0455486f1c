//! What the products with dense and with packed weights share: how they are cut into tiles and splits, and their launches.

use std::sync::{Mutex, PoisonError};

use super::Cuda;
use super::driver::{Arg, DevicePtr, Grid};
use super::launch::{Kernel, address, int};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::Epilogue;
use crate::tensor::Tensor;

const OP: &str = "linear";

/// Up to here a product's time is that of reading its weights, and `gemv.cu` or `gemv_packed.cu` does it.
pub(super) const GEMV_MAX_TOKENS: usize = 8;
/// Rows of W of a block there.
const GEMV_ROWS: usize = 16;
/// Threads of a block there.
const GEMV_THREADS: usize = 256;
/// One f32 for each warp, token and row.
const GEMV_SHARED_BYTES: usize = GEMV_THREADS / 32 * GEMV_MAX_TOKENS * GEMV_ROWS * 4;

/// Threads of a block of the other kernels.
const GEMM_THREADS: usize = 128;
/// More splits than this cost more in sums than they bring.
const MAX_SPLITS: usize = 8;

/// Parts of a weight that one launch takes.
pub(super) const MAX_PARTS: usize = 3;

/// tokens × rows of each part × k of a product
#[derive(Clone, Copy)]
pub(super) struct Size {
    pub tokens: usize,
    pub n: [usize; MAX_PARTS],
    pub k: usize,
}

/// A kernel that makes `rows` x `cols` of y with a block, and what a multiprocessor that is full of blocks spends on one, in clocks.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Tile {
    pub kernel: Kernel,
    pub rows: usize,
    pub cols: usize,
    /// What a block advances by along k.
    pub k_step: usize,
    pub shared_bytes: usize,
    /// For each of k.
    pub clocks_per_k: usize,
    /// To fill the pipeline and to write y.
    pub fixed_clocks: usize,
    /// To write or to read the tile in f32, where it is split.
    pub clocks_per_part: usize,
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

/// Time until the last split of a tile knows that it is the last, in clocks.
const JOIN_CLOCKS: usize = 700;

/// The tile and the number of splits that should take the least time on so many multiprocessors.
pub(super) fn plan(tiles: &'static [Tile], size: Size, n_multiprocessors: usize) -> (&'static Tile, usize) {
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
    pub fn at_column(&self, first_col: usize, row: usize) -> Self {
        let y = self.y.offset((first_col + row) * self.y_dtype.size());
        Self { y, bias: self.bias.map(|bias| bias.offset(row * DType::F32.size())), ..*self }
    }

    /// The product with W of as many rows in each part as `n` says, `matrices` in the order of the kernels' arguments.
    pub fn with(&self, n: [usize; MAX_PARTS], matrices: impl IntoIterator<Item = DevicePtr>) -> Result<Product> {
        let &Self { y, y_dtype, y_stride, x, bias, tokens, k, epilogue } = self;
        let bias = bias.unwrap_or(DevicePtr(0));
        let scalars = vec![
            int(OP, "tokens", tokens)?,
            int(OP, "rows of W", n[0])?,
            int(OP, "rows of W", n[1])?,
            int(OP, "rows of W", n[2])?,
            int(OP, "width of x", k)?,
            int(OP, "width of y", y_stride)?,
            Arg::Int(epilogue as i32),
            Arg::Int((y_dtype == DType::F32).into()),
        ];
        let pointers = [y, x].into_iter().chain(matrices).chain([bias]).map(Arg::Ptr).collect();
        Ok(Product { pointers, size: Size { tokens, n, k }, scalars })
    }
}

/// A product, as every kernel takes it.
pub(super) struct Product {
    pub size: Size,
    /// The first arguments: y, x, the parts of W, bias.
    pub pointers: Vec<Arg>,
    /// The last arguments: tokens, rows of each part, k, y_stride, epilogue, y_is_f32, and what only some kernels take.
    pub scalars: Vec<Arg>,
}

impl Cuda {
    /// By a kernel for few tokens.
    ///
    /// # Safety
    /// Every pointer of the product leads to what its scalars say, on this device; there are tokens, at most [`GEMV_MAX_TOKENS`], and
    /// rows of W. The product's arguments are the kernel's.
    pub(super) unsafe fn gemv(&self, kernel: Kernel, product: &Product) -> Result<()> {
        let args = [&product.pointers[..], &product.scalars].concat();
        let blocks = product.size.n.iter().map(|n| n.div_ceil(GEMV_ROWS)).sum();
        let grid = Grid { blocks: [blocks, 1, 1], threads: GEMV_THREADS, shared_bytes: GEMV_SHARED_BYTES };
        // SAFETY: the arguments are the kernel's, and the caller vouches for them.
        unsafe { self.launch(kernel, grid, &args) }
    }

    /// By the kernel of a tile, for any number of tokens.
    ///
    /// # Safety
    /// Every pointer of the product leads to what its scalars say, on this device; there are tokens and rows of W. The tile is one of this
    /// dtype, and the product's arguments are its kernel's, but for those of splits.
    pub(super) unsafe fn gemm(&self, product: &Product, tile: &Tile, splits: usize) -> Result<()> {
        let n_tiles = tile.count(product.size);
        let grid = Grid { blocks: [n_tiles, splits, 1], threads: GEMM_THREADS, shared_bytes: tile.shared_bytes };
        let launch = |partial, arrived| {
            let args = [&product.pointers[..], &[partial, arrived].map(Arg::Ptr), &product.scalars].concat();
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
        launch(address(OP, "partial sums", partial)?, address(OP, "counters", arrived)?)
    }
}
