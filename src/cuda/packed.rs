//! Products with packed integer weights, by `kernels/gemv_packed.cu`, `gemm_packed.cu` and `gemm_f32.cu`.
//!
//! The integers become numbers of the device's dtype in registers, on their way to the products: W is in memory as it is in its file.

use super::Cuda;
use super::dense;
use super::driver::DevicePtr;
use super::launch::{Kernel, address, int};
use super::product::{GEMV_MAX_TOKENS, MAX_PARTS, Operands, Tile, plan};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::Packed;
use crate::ops::packed::SLAB;

const OP: &str = "linear";

/// Shared memory of a step of a tile (`Stage` in `kernels/packed_tile.cuh`): x; W, its scales and offsets for each slab.
pub(super) const fn stage_bytes(rows: usize, cols: usize, bits: usize, x_bytes: usize) -> usize {
    let slabs = K_STEP / SLAB;
    rows * K_STEP * x_bytes + slabs * cols * (SLAB * bits / 8 + 2 + 2)
}

/// What a block there advances by along k.
pub(super) const K_STEP: usize = 64;

/// Tensor cores do 1024 multiply-adds a clock; that operands are made of integers is taken to cost an eighth, on top of what it costs a small
/// tile to read x. (Estimates: nothing of this was timed.)
const fn half_tiles(bits: usize, large: Kernel, small: Kernel) -> [Tile; 2] {
    [
        Tile {
            kernel: large,
            rows: 128,
            cols: 128,
            k_step: K_STEP,
            shared_bytes: 3 * stage_bytes(128, 128, bits, 2),
            clocks_per_k: 128 * 128 / 1024 * 9 / 8,
            fixed_clocks: 2000,
            clocks_per_part: 1024,
        },
        Tile {
            kernel: small,
            rows: 64,
            cols: 64,
            k_step: K_STEP,
            shared_bytes: 4 * stage_bytes(64, 64, bits, 2),
            clocks_per_k: (64 * 64 / 1024 * 3 / 2 * 9usize).div_ceil(8),
            fixed_clocks: 1200,
            clocks_per_part: 256,
        },
    ]
}

static HALF_TILES: [[Tile; 2]; 2] =
    [half_tiles(4, Kernel::GemmPacked4, Kernel::GemmSmallPacked4), half_tiles(8, Kernel::GemmPacked8, Kernel::GemmSmallPacked8)];

/// As the tiles of dense weights.
static F32_TILES: [[Tile; 2]; 2] = [
    [Tile { kernel: Kernel::GemmPacked4, ..dense::F32_TILES[0] }, Tile { kernel: Kernel::GemmSmallPacked4, ..dense::F32_TILES[1] }],
    [Tile { kernel: Kernel::GemmPacked8, ..dense::F32_TILES[0] }, Tile { kernel: Kernel::GemmSmallPacked8, ..dense::F32_TILES[1] }],
];

/// Those of the kernels for a dtype of x and so many bits.
fn tiles(dtype: DType, bits: usize) -> &'static [Tile] {
    let of_dtype = if dtype == DType::F32 { &F32_TILES } else { &HALF_TILES };
    &of_dtype[usize::from(bits == 8)]
}

/// Where its words, scales and offsets lie; null if there are no offsets.
pub(super) fn pointers(op: &'static str, matrix: &Packed) -> Result<[DevicePtr; 3]> {
    let offsets = matrix.offsets.as_ref().map_or(Ok(DevicePtr(0)), |offsets| address(op, "offsets", offsets))?;
    Ok([address(op, "words", &matrix.words)?, address(op, "scales", &matrix.scales)?, offsets])
}

impl Cuda {
    /// The product with packed matrices of one format, at most [`MAX_PARTS`] of them.
    ///
    /// # Safety
    /// The operands are what they say, and the matrices have their k columns.
    pub(super) unsafe fn packed(&self, operands: &Operands, parts: &[&Packed]) -> Result<()> {
        let mut n = [0; MAX_PARTS];
        let mut at = [DevicePtr(0); 3 * MAX_PARTS];
        for (i, part) in parts.iter().enumerate() {
            n[i] = part.n;
            at[3 * i..3 * i + 3].copy_from_slice(&pointers(OP, part)?);
        }
        if operands.tokens == 0 || n == [0; MAX_PARTS] {
            return Ok(());
        }
        let (bits, group) = (parts[0].bits, parts[0].group);
        if self.rounds_x && bits == 8 && operands.tokens > GEMV_MAX_TOKENS {
            // SAFETY: the caller vouches for the operands, `Packed::new` for the matrices, which are symmetric in 8 bits.
            return unsafe { self.w8a8(operands, n, at, group) };
        }
        let mut product = operands.with(n, at)?;
        product.scalars.push(int(OP, "group", group)?);
        if operands.tokens <= GEMV_MAX_TOKENS {
            let kernel = if bits == 4 { Kernel::GemvPacked4 } else { Kernel::GemvPacked8 };
            // SAFETY: the caller vouches for the operands, `Packed::new` for the matrices; there are as many tokens as the kernel takes.
            return unsafe { self.gemv(kernel, &product) };
        }
        let (tile, splits) = plan(tiles(self.dtype, bits), product.size, self.driver.n_multiprocessors());
        // SAFETY: as above; the tile is of this dtype and of kernels with these arguments.
        unsafe { self.gemm(&product, tile, splits) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::product::Size;
    use super::*;

    #[test]
    fn the_large_products_of_the_case_table_take_large_tiles() {
        for bits in [4, 8] {
            for (dtype, tokens, n, k) in [(DType::F16, 577, 1700, 96), (DType::F32, 257, 1100, 96)] {
                let (tile, _) = plan(tiles(dtype, bits), Size { tokens, n: [n, 0, 0], k }, 132);
                assert_eq!(tile.rows, if dtype == DType::F32 { 64 } else { 128 }, "{bits} bits, {dtype}");
            }
        }
    }

    /// Products of small integers, whose sums are exact in any order: all tiles, more splits than steps included, twice with one workspace.
    #[cfg(llava_sim)]
    #[test]
    fn every_tile_and_number_of_splits_gives_the_same() {
        use super::super::Cuda;
        use crate::ops::Epilogue;
        use crate::ops::packed::Format;
        use crate::tensor::Tensor;
        use half::f16;

        // 7 slabs: the last step has one.
        let [tokens, n, k, group] = [131, 137, 224, 32];
        let integers = |len: usize, step: usize| (0..len).map(move |i| i * step % 13);
        let xs: Vec<f32> = integers(tokens * k, 5).map(|x| x as f32 - 6.0).collect();
        for (bits, has_offsets) in [(4, false), (4, true), (8, false)] {
            let format = Format::new(bits, group, has_offsets).unwrap();
            let (words_shape, scales_shape) = (format.words_shape(n, k), format.scales_shape(n, k));
            let bytes = integers(words_shape.iter().product::<usize>() * 4, 7).map(|i| match bits {
                // Integers near their zero, so that sums stay exact.
                4 => (i + 2) as u8 | ((i * 5 % 16) as u8) << 4,
                _ => (i + 122) as u8,
            });
            let words: Vec<i32> =
                bytes.collect::<Vec<_>>().chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
            let scale = |i: usize| [1.0f32, 2.0, 0.5][i % 3];
            let n_scales = scales_shape.iter().product();
            let halves = |f: &dyn Fn(usize) -> f32| {
                Tensor::from_slice(&scales_shape, &(0..n_scales).map(|i| f16::from_f32(f(i))).collect::<Vec<_>>())
            };
            let packed = || {
                let offsets = has_offsets.then(|| halves(&|i| scale(i) * -(7.0 + (i % 4) as f32)));
                Packed::new(n, k, Tensor::from_slice(&words_shape, &words), halves(&scale), offsets).unwrap()
            };
            let ws = packed().to_f32();
            let dot = |t: usize, j: usize| (0..k).map(|i| xs[t * k + i] * ws[j * k + i]).sum::<f32>();
            let expected: Vec<f32> = (0..tokens * n).map(|i| dot(i / n, i % n)).collect();
            for dtype in [DType::F32, DType::F16, DType::Bf16] {
                let cuda = Cuda::simulated(2, dtype).unwrap();
                let x = cuda.to_device(Tensor::from_slice(&[tokens, k], &xs).converted(dtype)).unwrap();
                let Packed { words, scales, offsets, .. } = packed();
                let [words, scales] = [words, scales].map(|t| cuda.to_device(t).unwrap());
                let offsets = offsets.map(|t| cuda.to_device(t).unwrap());
                let y = cuda.zeros(&[tokens, n], DType::F32).unwrap();
                let at = |tensor| address("linear", "operand", tensor).unwrap();
                let (y_dtype, epilogue) = (DType::F32, Epilogue::Store);
                let operands = Operands { y: at(&y), y_dtype, y_stride: n, x: at(&x), bias: None, tokens, k, epilogue };
                let mut pointers = [DevicePtr(0); 3 * MAX_PARTS];
                pointers[..2].copy_from_slice(&[at(&words), at(&scales)]);
                pointers[2] = offsets.as_ref().map_or(DevicePtr(0), at);
                let mut product = operands.with([n, 0, 0], pointers).unwrap();
                product.scalars.push(int("linear", "group", group).unwrap());
                for (tile, splits) in tiles(dtype, bits).iter().flat_map(|tile| [3, 2, 1, 8].map(|splits| (tile, splits))) {
                    // SAFETY: the tensors are of those sizes, y of f32, and the tile is one of their dtype and bits.
                    unsafe { cuda.gemm(&product, tile, splits).unwrap() };
                    assert_eq!(cuda.to_host(&y).unwrap().to_f32(), expected, "{format}, {dtype}, {tile:?}, {splits} splits");
                }
            }
        }
    }
}
