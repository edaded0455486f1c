//! Products on the integer tensor cores, by `kernels/gemm_w8a8.cu`: weights of 8 bits, activations rounded to 8 bits on the way.

use std::sync::{Mutex, PoisonError};

use super::Cuda;
use super::driver::{Arg, DevicePtr, Grid};
use super::launch::{Kernel, address, int};
use super::packed::{K_STEP, stage_bytes};
use super::product::{MAX_PARTS, Operands, Tile, plan};
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Tensor;

const OP: &str = "linear";

/// Threads of a block that rounds a row of x.
const ROUND_THREADS: usize = 128;

/// Tensor cores do 2048 multiply-adds of bytes a clock; that sums are scaled group by group is taken to cost as much as half the products,
/// and reading x once more in a small tile as much again. (Estimates: nothing of this was timed.)
const fn tile(kernel: Kernel, rows: usize, clocks_per_k: usize, fixed_clocks: usize) -> Tile {
    Tile {
        kernel,
        rows,
        cols: 64,
        k_step: K_STEP,
        shared_bytes: 4 * stage_bytes(rows, 64, 8, 1),
        clocks_per_k,
        fixed_clocks,
        clocks_per_part: rows * 64 / 16,
    }
}

static TILES: [Tile; 2] = [tile(Kernel::GemmW8a8, 128, 6, 1500), tile(Kernel::GemmSmallW8a8, 64, 4, 1200)];

/// Device memory for x in 8 bits and its scales. Launches are done in order, so all products share it.
#[derive(Default)]
pub(super) struct Rounded(Mutex<Option<[Tensor; 2]>>);

impl Cuda {
    /// The product with parts of n rows, 8 bits and symmetric, in the order of the kernels' arguments.
    ///
    /// # Safety
    /// As [`Cuda::packed`]; there are tokens and rows.
    pub(super) unsafe fn w8a8(
        &self,
        operands: &Operands,
        n: [usize; MAX_PARTS],
        matrices: [DevicePtr; 3 * MAX_PARTS],
        group: usize,
    ) -> Result<()> {
        let &Operands { tokens, k, x, .. } = operands;
        self.with_integers(tokens * k, tokens * (k / group), |p, scales| {
            let sizes = [int(OP, "tokens", tokens)?, int(OP, "width of x", k)?, int(OP, "group", group)?];
            let args = [&[p, scales, x].map(Arg::Ptr)[..], &sizes].concat();
            let grid = Grid { blocks: [tokens, 1, 1], threads: ROUND_THREADS, shared_bytes: 0 };
            // SAFETY: the arguments are the kernel's; x has `tokens` rows of k, as the caller says, and there is room for as many integers
            // and a scale for each of their groups.
            unsafe { self.launch(Kernel::RoundI8, grid, &args)? };
            let mut product = Operands { x: p, ..*operands }.with(n, matrices)?;
            product.scalars.extend([sizes[2], Arg::Ptr(scales)]);
            let (tile, splits) = plan(&TILES, product.size, self.driver.n_multiprocessors());
            // SAFETY: the caller vouches for all but x, which the launch before makes.
            unsafe { self.gemm(&product, tile, splits) }
        })
    }

    /// Calls `launch` with memory for so many integers and scales.
    fn with_integers(&self, n: usize, n_scales: usize, launch: impl FnOnce(DevicePtr, DevicePtr) -> Result<()>) -> Result<()> {
        let mut rounded = self.rounded.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !rounded.as_ref().is_some_and(|[p, scales]| p.len() >= n && scales.len() >= n_scales) {
            let held = rounded.take().map_or([0; 2], |tensors| tensors.map(|t| t.len()));
            *rounded = Some([self.zeros(&[held[0].max(n)], DType::I8)?, self.zeros(&[held[1].max(n_scales)], DType::F32)?]);
        }
        let [p, scales] = rounded.as_ref().expect("it is there, or was just made");
        launch(address(OP, "x in 8 bits", p)?, address(OP, "its scales", scales)?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::product::Size;
    use super::*;

    #[test]
    fn the_case_table_takes_both_tiles_and_splits() {
        let planned = |tokens, n, k| {
            let (tile, splits) = plan(&TILES, Size { tokens, n: [n, 0, 0], k }, 132);
            (tile.rows, splits > 1)
        };
        assert_eq!(planned(300, 4096, 4096).0, 128);
        assert_eq!(planned(9, 16, 2176), (64, true));
    }

    /// Sums of small integers with scales that are powers of two, exact in any order: all tiles, splits within groups, more of them than steps.
    #[cfg(llava_sim)]
    #[test]
    fn every_tile_and_number_of_splits_gives_the_same() {
        use crate::ops::packed::Format;
        use crate::ops::{Epilogue, Packed};
        use half::f16;

        let [tokens, n] = [131, 70];
        for (group, k) in [(32, 224), (64, 320), (128, 384)] {
            let format = Format::new(8, group, false).unwrap();
            let bytes = |len: usize, step: usize, low: usize| (0..len).map(move |i| (i * step % 13 + low) as u8);
            let p: Vec<i8> = bytes(tokens * k, 5, 0).map(|x| x as i8 - 6).collect();
            let words = format.words_shape(n, k);
            let packed_bytes: Vec<u8> = bytes(words.iter().product::<usize>() * 4, 7, 122).collect();
            let words_of = |b: &[u8]| i32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            let words = Tensor::from_slice(&words, &packed_bytes.chunks_exact(4).map(words_of).collect::<Vec<_>>());
            let power = |i: usize| [1.0f32, 2.0, 0.5][i % 3];
            let powers = |len: usize| (0..len).map(power).collect::<Vec<_>>();
            let scales_shape = format.scales_shape(n, k);
            let halves: Vec<f16> = powers(scales_shape.iter().product()).into_iter().map(f16::from_f32).collect();
            let w = Packed::new(n, k, words, Tensor::from_slice(&scales_shape, &halves), None).unwrap();
            let (ws, x_scales) = (w.to_f32(), powers(k / group * tokens));
            let term = |t: usize, j: usize, i: usize| ws[j * k + i] * f32::from(p[t * k + i]) * x_scales[i / group * tokens + t];
            let expected: Vec<f32> = (0..tokens * n).map(|at| (0..k).map(|i| term(at / n, at % n, i)).sum()).collect();

            let cuda = Cuda::simulated(2, DType::F16).unwrap();
            let put = |tensor| cuda.to_device(tensor).unwrap();
            let (p, x_scales) =
                (put(Tensor::from_slice(&[tokens, k], &p)), put(Tensor::from_slice(&[k / group, tokens], &x_scales)));
            let Packed { words, scales, .. } = w;
            let (words, scales, y) = (put(words), put(scales), cuda.zeros(&[tokens, n], DType::F32).unwrap());
            let at = |tensor| address(OP, "operand", tensor).unwrap();
            let (y_dtype, epilogue) = (DType::F32, Epilogue::Store);
            let operands = Operands { y: at(&y), y_dtype, y_stride: n, x: at(&p), bias: None, tokens, k, epilogue };
            let mut pointers = [DevicePtr(0); 3 * MAX_PARTS];
            pointers[..2].copy_from_slice(&[at(&words), at(&scales)]);
            let mut product = operands.with([n, 0, 0], pointers).unwrap();
            product.scalars.extend([int(OP, "group", group).unwrap(), Arg::Ptr(at(&x_scales))]);
            for (tile, splits) in TILES.iter().flat_map(|tile| [1, 3, 8].map(|splits| (tile, splits))) {
                // SAFETY: the tensors are of those sizes, y of f32.
                unsafe { cuda.gemm(&product, tile, splits).unwrap() };
                assert!(cuda.to_host(&y).unwrap().to_f32() == expected, "{format}, {tile:?}, {splits} splits");
            }
        }
    }
}
