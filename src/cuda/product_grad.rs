//! Gradients of linear layers, by `kernels/gemm_bwd.cu` and `gemm_bwd_f32.cu`.

use super::Cuda;
use super::driver::{Arg, DevicePtr};
use super::launch::{Kernel, address, int};
use super::product::{MAX_PARTS, Product, Size, Tile, plan};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{Epilogue, Run, Update, Weight, check, check_grad};
use crate::tensor::Tensor;

/// The tiles of a product, large and small, on tensor cores. Two stages of both operands; the clocks are those of `gemm.cu` and a quarter more
/// for copies that pass through registers. (Estimates: nothing of this was timed.)
const fn half_tiles(large: Kernel, small: Kernel) -> [Tile; 2] {
    [
        Tile {
            kernel: large,
            rows: 128,
            cols: 128,
            k_step: 32,
            shared_bytes: 2 * (128 + 128) * 32 * 2,
            clocks_per_k: 128 * 128 / 1024 * 5 / 4,
            fixed_clocks: 2000,
            clocks_per_part: 1024,
        },
        Tile {
            kernel: small,
            rows: 64,
            cols: 64,
            k_step: 64,
            shared_bytes: 2 * (64 + 64) * 64 * 2,
            clocks_per_k: 64 * 64 / 1024 * 15 / 8,
            fixed_clocks: 1200,
            clocks_per_part: 256,
        },
    ]
}

/// ... and in f32: two stages of rows of 16 terms and of columns, each with 4 floats to spare, and a flag.
const fn f32_tiles(large: Kernel, small: Kernel) -> [Tile; 2] {
    const fn tile(kernel: Kernel, side: usize, clocks_per_k: usize, fixed_clocks: usize, clocks_per_part: usize) -> Tile {
        let shared_bytes = 2 * (side * 20 + 16 * (side + 4)) * 4 + 4;
        Tile { kernel, rows: side, cols: side, k_step: 16, shared_bytes, clocks_per_k, fixed_clocks, clocks_per_part }
    }
    [tile(large, 64, 64 * 64 / 128, 1200, 256), tile(small, 32, 32 * 32 / 128 * 3 / 2, 1000, 64)]
}

/// Tiles in 16 bits and in f32.
struct Tiles([[Tile; 2]; 2]);

impl Tiles {
    const fn new(large: Kernel, small: Kernel) -> Self {
        Self([half_tiles(large, small), f32_tiles(large, small)])
    }

    fn of(&'static self, dtype: DType) -> &'static [Tile] {
        &self.0[usize::from(dtype == DType::F32)]
    }
}

static DX: Tiles = Tiles::new(Kernel::LinearDx, Kernel::LinearDxSmall);
static DX_PACKED4: Tiles = Tiles::new(Kernel::LinearDxPacked4, Kernel::LinearDxSmallPacked4);
static DX_PACKED8: Tiles = Tiles::new(Kernel::LinearDxPacked8, Kernel::LinearDxSmallPacked8);
static DW: Tiles = Tiles::new(Kernel::LinearDw, Kernel::LinearDwSmall);

/// Columns of dy as a product reads them.
#[derive(Clone, Copy)]
struct Columns {
    first: DevicePtr,
    stride: usize,
}

impl Columns {
    /// From column `col` on.
    fn from(self, col: usize, dtype: DType) -> Self {
        Self { first: self.first.offset(col * dtype.size()), ..self }
    }
}

impl Cuda {
    /// [`GradOps::linear_dx`](crate::ops::GradOps::linear_dx)
    pub(super) fn linear_dx(&self, dx: &mut Tensor, dy: &Tensor, w: &Weight, update: Update) -> Result<()> {
        const OP: &str = "linear_dx";
        check_grad::linear_dx(dx, dy, w)?;
        check::dtype(OP, "dx", dx, self.dtype)?;
        let to = address(OP, "dx", dx)?;
        let (tokens, k) = (dx.rows(), w.k());
        fits(OP, [("tokens", tokens), ("rows of W", w.n()), ("width of dx", k), ("width of dy", dy.row_len())])?;
        if dx.is_empty() {
            return Ok(());
        }
        self.with_columns(OP, dy, w.first_col, w.n(), |dy| {
            // What the first product sets, the others add to.
            let mut epilogue = if update == Update::Set { Epilogue::Store } else { Epilogue::Add };
            let mut launch = |tiles: &'static Tiles, row: usize, n: &[usize], matrices: Vec<DevicePtr>, group: Option<usize>| {
                let mut parts = [0; MAX_PARTS];
                parts[..n.len()].copy_from_slice(n);
                let from = dy.from(row, self.dtype);
                let pointers = [to, from.first].into_iter().chain(matrices).map(Arg::Ptr).collect();
                let sizes = [tokens, parts[0], parts[1], parts[2], k, from.stride];
                let mut scalars = sizes.map(|n| Arg::Int(n as i32)).to_vec();
                scalars.push(Arg::Int(epilogue as i32));
                scalars.extend(group.map(|group| Arg::Int(group as i32)));
                epilogue = Epilogue::Add;
                let size = Size { tokens, n: [k, 0, 0], k: n.iter().sum() };
                let (tile, splits) = plan(tiles.of(self.dtype), size, self.driver.n_multiprocessors());
                // SAFETY: dx has `tokens` rows of k, dy as many with columns for the rows of these parts, which have k columns, all of this
                // device's dtype or packed (`check_grad::linear_dx`, `check::dtype`, `Packed::new`).
                unsafe { self.gemm(&Product { pointers, size, scalars }, tile, splits) }
            };
            for (mut row, run) in w.runs() {
                match run {
                    Run::Dense(parts) => {
                        for parts in parts.chunks(MAX_PARTS) {
                            let mut matrices = vec![DevicePtr(0); MAX_PARTS];
                            for (at, part) in matrices.iter_mut().zip(parts) {
                                check::dtype(OP, "W", part, self.dtype)?;
                                *at = address(OP, "W", part)?;
                            }
                            let n: Vec<_> = parts.iter().map(|part| part.rows()).collect();
                            launch(&DX, row, &n, matrices, None)?;
                            row += n.iter().sum::<usize>();
                        }
                    }
                    Run::Packed(parts) => {
                        for parts in parts.chunks(MAX_PARTS) {
                            let tiles = if parts[0].bits == 4 { &DX_PACKED4 } else { &DX_PACKED8 };
                            let n: Vec<_> = parts.iter().map(|part| part.n).collect();
                            let mut matrices = vec![DevicePtr(0); 3 * MAX_PARTS];
                            for (at, part) in matrices.chunks_mut(3).zip(parts) {
                                at[0] = address(OP, "words", &part.words)?;
                                at[1] = address(OP, "scales", &part.scales)?;
                                at[2] = part.offsets.as_ref().map_or(Ok(DevicePtr(0)), |t| address(OP, "offsets", t))?;
                            }
                            launch(tiles, row, &n, matrices, Some(parts[0].group))?;
                            row += n.iter().sum::<usize>();
                        }
                    }
                }
            }
            Ok(())
        })
    }

    /// [`GradOps::linear_dw`](crate::ops::GradOps::linear_dw)
    pub(super) fn linear_dw(&self, dw: &mut Tensor, dy: &Tensor, first_col: usize, x: &Tensor) -> Result<()> {
        const OP: &str = "linear_dw";
        check_grad::linear_dw(dw, dy, first_col, x)?;
        check::dtype(OP, "x", x, self.dtype)?;
        let [to, x_ptr] = [address(OP, "dw", dw)?, address(OP, "x", x)?];
        let (n, tokens, k) = (dw.rows(), x.rows(), x.row_len());
        fits(OP, [("tokens", tokens), ("rows of dw", n), ("width of x", k), ("width of dy", dy.row_len())])?;
        if dw.is_empty() || tokens == 0 {
            return Ok(());
        }
        self.with_columns(OP, dy, first_col, n, |dy| {
            let pointers = [to, dy.first, x_ptr].map(Arg::Ptr).to_vec();
            let scalars = [n, tokens, k, dy.stride].map(|n| Arg::Int(n as i32)).to_vec();
            // Its rows are what tokens are of a forward product.
            let size = Size { tokens: n, n: [k, 0, 0], k: tokens };
            let (tile, splits) = plan(DW.of(self.dtype), size, self.driver.n_multiprocessors());
            // SAFETY: dW has n rows of k in f32, x `tokens` rows of k, dy as many with n columns, of this device's dtype (just checked).
            unsafe { self.gemm(&Product { pointers, size, scalars }, tile, splits) }
        })
    }

    /// Calls `f` with columns `first .. first + n` of dy in this device's dtype: rounded to it where they are f32, as those of logits are.
    fn with_columns<R>(
        &self,
        op: &'static str,
        dy: &Tensor,
        first: usize,
        n: usize,
        f: impl FnOnce(Columns) -> Result<R>,
    ) -> Result<R> {
        if dy.dtype() == DType::F32 && self.dtype != DType::F32 {
            return self.with_rounded(op, dy, first, n, |ptr| f(Columns { first: ptr, stride: n }));
        }
        check::dtype(op, "dy", dy, self.dtype)?;
        f(Columns { first: address(op, "dy", dy)?, stride: dy.row_len() }.from(first, self.dtype))
    }
}

/// With the largest tile on top, so that no row or column of a tile is beyond the range of an int.
fn fits<const N: usize>(op: &'static str, sizes: [(&str, usize); N]) -> Result<()> {
    sizes.into_iter().try_for_each(|(what, n)| int(op, what, n + 128).map(|_| ()))
}
