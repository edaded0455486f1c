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

/// What a gradient by x is made of and where it goes, but for W.
#[derive(Clone, Copy)]
struct Dx {
    dx: DevicePtr,
    dy: Columns,
    tokens: usize,
    k: usize,
}

impl Dx {
    /// The product with W of `n` rows in each part, `matrices` in the order of the kernels' arguments; packed ones have a `group`.
    fn with(&self, n: &[usize], matrices: Vec<DevicePtr>, group: Option<usize>, update: Update) -> Product {
        let mut parts = [0; MAX_PARTS];
        parts[..n.len()].copy_from_slice(n);
        let sizes = [self.tokens, parts[0], parts[1], parts[2], self.k, self.dy.stride];
        let mut scalars = sizes.map(|n| Arg::Int(n as i32)).to_vec();
        scalars.push(Arg::Int(if update == Update::Set { Epilogue::Store } else { Epilogue::Add } as i32));
        scalars.extend(group.map(|group| Arg::Int(group as i32)));
        let pointers = [self.dx, self.dy.first].into_iter().chain(matrices).map(Arg::Ptr).collect();
        Product { pointers, size: Size { tokens: self.tokens, n: [self.k, 0, 0], k: n.iter().sum() }, scalars }
    }
}

/// dW\[n, k\] += dyᵀ·x, of x `[tokens, k]`: its rows are what tokens are of a forward product.
fn dw_product(dw: DevicePtr, dy: Columns, x: DevicePtr, [n, tokens, k]: [usize; 3]) -> Product {
    let pointers = [dw, dy.first, x].map(Arg::Ptr).to_vec();
    let scalars = [n, tokens, k, dy.stride].map(|n| Arg::Int(n as i32)).to_vec();
    Product { pointers, size: Size { tokens: n, n: [k, 0, 0], k: tokens }, scalars }
}

impl Cuda {
    /// [`GradOps::linear_dx`](crate::ops::GradOps::linear_dx)
    pub(super) fn linear_dx(&self, dx: &mut Tensor, dy: &Tensor, w: &Weight, mut update: Update) -> Result<()> {
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
            for (mut row, run) in w.runs() {
                let n: Vec<_> = match &run {
                    Run::Dense(parts) => parts.iter().map(|part| part.rows()).collect(),
                    Run::Packed(parts) => parts.iter().map(|part| part.n).collect(),
                };
                let (mut matrices, mut tiles, mut group) = (Vec::new(), &DX, None);
                match run {
                    Run::Dense(parts) => {
                        for part in parts {
                            check::dtype(OP, "W", part, self.dtype)?;
                            matrices.push(vec![address(OP, "W", part)?]);
                        }
                    }
                    Run::Packed(parts) => {
                        (tiles, group) = (if parts[0].bits == 4 { &DX_PACKED4 } else { &DX_PACKED8 }, Some(parts[0].group));
                        for part in parts {
                            let offsets = part.offsets.as_ref().map_or(Ok(DevicePtr(0)), |t| address(OP, "offsets", t))?;
                            matrices.push(vec![address(OP, "words", &part.words)?, address(OP, "scales", &part.scales)?, offsets]);
                        }
                    }
                }
                for (n, matrices) in n.chunks(MAX_PARTS).zip(matrices.chunks(MAX_PARTS)) {
                    let mut pointers = matrices.concat();
                    pointers.resize(MAX_PARTS * matrices[0].len(), DevicePtr(0));
                    let operands = Dx { dx: to, dy: dy.from(row, self.dtype), tokens, k };
                    let product = operands.with(n, pointers, group, update);
                    let (tile, splits) = plan(tiles.of(self.dtype), product.size, self.driver.n_multiprocessors());
                    // SAFETY: dx has `tokens` rows of k, dy as many with columns for the rows of these parts, which have k columns, all of
                    // this device's dtype or packed (`check_grad::linear_dx`, `check::dtype`, `Packed::new`).
                    unsafe { self.gemm(&product, tile, splits)? };
                    // What the first product sets, the others add to.
                    update = Update::Add;
                    row += n.iter().sum::<usize>();
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
            let product = dw_product(to, dy, x_ptr, [n, tokens, k]);
            let (tile, splits) = plan(DW.of(self.dtype), product.size, self.driver.n_multiprocessors());
            // SAFETY: dW has n rows of k in f32, x `tokens` rows of k, dy as many with n columns, of this device's dtype (just checked).
            unsafe { self.gemm(&product, tile, splits) }
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

#[cfg(all(test, llava_sim))]
mod tests {
    use super::*;
    use crate::ops::Packed;
    use crate::ops::packed::Format;

    /// Products of small integers, whose sums are exact in any order: all tiles, more splits than steps included, twice with one workspace.
    #[test]
    fn every_tile_and_number_of_splits_gives_the_same() {
        // W in two parts, neither of which ends with a step.
        let ([tokens, k], parts) = ([131, 160], [45, 90]);
        let n = parts[0] + parts[1];
        let integers =
            |len: usize, step: usize, below: usize| (0..len).map(move |i| (i * step % below) as f32 - (below / 2) as f32);
        let (dys, xs): (Vec<_>, Vec<_>) = (integers(tokens * n, 5, 5).collect(), integers(tokens * k, 7, 7).collect());
        let old: Vec<f32> = integers(tokens * k, 3, 9).collect();
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let cuda = Cuda::simulated(2, dtype).unwrap();
            let at = |tensor: &Tensor| address("linear", "operand", tensor).unwrap();
            let put = |shape: &[usize], values: &[f32]| cuda.to_device(Tensor::from_slice(shape, values).converted(dtype)).unwrap();
            let (dy, x) = (put(&[tokens, n], &dys), put(&[tokens, k], &xs));
            let columns = Columns { first: at(&dy), stride: n };

            let dw = cuda.zeros(&[n, k], DType::F32).unwrap();
            let product = dw_product(at(&dw), columns, at(&x), [n, tokens, k]);
            let expected = |i: usize| (0..tokens).map(|t| dys[t * n + i / k] * xs[t * k + i % k]).sum::<f32>();
            let expected: Vec<_> = (0..n * k).map(expected).collect();
            let mut times = 0.0;
            for (tile, splits) in DW.of(dtype).iter().flat_map(|tile| [3, 2, 1, 8].map(|splits| (tile, splits))) {
                // SAFETY: the tensors are of those sizes, dW of f32, and the tile is one of their dtype.
                unsafe { cuda.gemm(&product, tile, splits).unwrap() };
                times += 1.0;
                let expected: Vec<_> = expected.iter().map(|e| e * times).collect();
                assert_eq!(cuda.to_host(&dw).unwrap().to_f32(), expected, "{dtype}, {tile:?}, {splits} splits");
            }

            for format in [None, Some((4, false)), Some((4, true)), Some((8, false))] {
                let format = format.map(|(bits, has_offsets)| Format::new(bits, 32, has_offsets).unwrap());
                // Sums that the dtype holds.
                let (mut ws, mut kept, mut pointers) = (Vec::new(), Vec::new(), Vec::new());
                for n in parts {
                    let Some(format) = format else {
                        ws.extend(integers(n * k, 11, 3));
                        kept.push(put(&[n, k], &ws[ws.len() - n * k..]));
                        pointers.push(at(&kept[kept.len() - 1]));
                        continue;
                    };
                    let part = small_integers(n, k, format);
                    ws.extend(part.to_f32());
                    let Packed { words, scales, offsets, .. } = part;
                    for tensor in [Some(words), Some(scales), offsets] {
                        let tensor = tensor.map(|t| cuda.to_device(t).unwrap());
                        pointers.push(tensor.as_ref().map_or(DevicePtr(0), at));
                        kept.extend(tensor);
                    }
                }
                pointers.resize(pointers.len() / 2 * 3, DevicePtr(0));
                let expected = |i: usize| old[i] + (0..n).map(|j| dys[i / k * n + j] * ws[j * k + i % k]).sum::<f32>();
                let expected: Vec<_> = (0..tokens * k).map(expected).collect();
                let tiles = match format.map(|format| format.bits) {
                    None => &DX,
                    Some(4) => &DX_PACKED4,
                    _ => &DX_PACKED8,
                };
                for (tile, splits) in tiles.of(dtype).iter().flat_map(|tile| [3, 2, 1, 8].map(|splits| (tile, splits))) {
                    let dx = put(&[tokens, k], &old);
                    let operands = Dx { dx: at(&dx), dy: columns, tokens, k };
                    let product = operands.with(&parts, pointers.clone(), format.map(|format| format.group), Update::Add);
                    // SAFETY: the tensors are of those sizes, and the tile is one of their dtype and format.
                    unsafe { cuda.gemm(&product, tile, splits).unwrap() };
                    let rounded = Tensor::from_slice(&[tokens, k], &expected).converted(dtype).to_f32();
                    let format = format.map(|format| format.to_string());
                    assert_eq!(cuda.to_host(&dx).unwrap().to_f32(), rounded, "{format:?}, {dtype}, {tile:?}, {splits} splits");
                }
            }
        }
    }

    /// Integers near their zero, with scales that are powers of two.
    fn small_integers(n: usize, k: usize, format: Format) -> Packed {
        let (words_shape, scales_shape) = (format.words_shape(n, k), format.scales_shape(n, k));
        let n_bytes = words_shape.iter().product::<usize>() * 4;
        let byte = |i: usize| match format.bits {
            4 => (6 + i * 7 % 5) as u8 | ((6 + i * 3 % 5) as u8) << 4,
            _ => (126 + i * 7 % 5) as u8,
        };
        let bytes: Vec<u8> = (0..n_bytes).map(byte).collect();
        let words: Vec<i32> = bytes.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let scales: Vec<f32> = (0..scales_shape.iter().product()).map(|i| [1.0, 2.0, 0.5][i % 3]).collect();
        let halves = |values: &[f32]| Tensor::from_slice(&scales_shape, values).converted(DType::F16);
        let offsets: Vec<f32> = scales.iter().enumerate().map(|(i, s)| -s * (7.0 + (i % 3) as f32)).collect();
        let offsets = format.has_offsets.then(|| halves(&offsets));
        Packed::new(n, k, Tensor::from_slice(&words_shape, &words), halves(&scales), offsets).unwrap()
    }
}
