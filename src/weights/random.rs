//! Weights that nobody trained, for measuring models of any size without their files.

use std::hash::{DefaultHasher, Hash, Hasher};

use half::{bf16, f16};

use super::Source;
use super::recipe::Recipe;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::Packed;
use crate::tensor::Tensor;

/// Distinct numbers that all tensors are cut from; far more than a cache holds.
const BLOCK: usize = 1 << 22;
/// Standard deviation of the weights, as LLaMA's initial one: hidden states keep their size over the layers.
const STD: f32 = 0.02;

/// Any tensor of any shape: ones for the weights of norms, small random numbers for all else; the same for the same name.
///
/// Matrices may be packed: made up in that form, so that a large model needs no more memory than it has when it runs.
pub struct Random {
    dtype: DType,
    recipe: Recipe,
    block: Tensor,
}

impl Random {
    /// Weights stored in `dtype`.
    pub fn new(dtype: DType) -> Self {
        Self::packed(dtype, Recipe::DENSE)
    }

    /// As [`Self::new`], but packed as `recipe` says.
    pub fn packed(dtype: DType, recipe: Recipe) -> Self {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        // The sum of four uniform numbers is near enough to normal; its variance is 4/12.
        let mut uniform = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        let values: Vec<f32> = (0..BLOCK).map(|_| (uniform() + uniform() + uniform() + uniform()) * STD * 3f32.sqrt()).collect();
        Self { dtype, recipe, block: Tensor::from_slice(&[BLOCK], &values).converted(dtype) }
    }
}

impl Source for Random {
    fn tensor(&self, canonical: &str, shape: &[usize]) -> Result<Tensor> {
        let mut tensor = Tensor::zeros(shape, self.dtype);
        if canonical.contains("norm") && canonical.ends_with(".weight") {
            match self.dtype {
                DType::F32 => tensor.as_mut_slice::<f32>().fill(1.0),
                DType::F16 => tensor.as_mut_slice::<f16>().fill(f16::ONE),
                _ => tensor.as_mut_slice::<bf16>().fill(bf16::ONE),
            }
            return Ok(tensor);
        }
        self.fill(canonical, &mut tensor);
        Ok(tensor)
    }

    fn packed(&self, module: &str, n: usize, k: usize) -> Result<Option<Packed>> {
        let Some(format) = self.recipe.format(module, k) else { return Ok(None) };
        let mut words = Tensor::zeros(&format.words_shape(n, k), DType::I32);
        self.fill(module, &mut words);
        // The block's numbers crowd round zero, and their bits with them; a multiplication spreads what differs over the word.
        for word in words.as_mut_slice::<i32>() {
            let mixed = (*word as u32).wrapping_mul(0x9e37_79b1);
            *word = (mixed ^ mixed >> 16) as i32;
        }
        let shape = format.scales_shape(n, k);
        let constant = |value: f32| Tensor::from_slice(&shape, &vec![f16::from_f32(value); shape.iter().product()]);
        // Uniform integers have a standard deviation of 2^bits / √12.
        let scale = STD * 12f32.sqrt() / (1 << format.bits) as f32;
        let offsets = format.has_offsets.then(|| constant(-(format.zero() as f32) * scale));
        Packed::new(n, k, words, constant(scale), offsets).map(Some)
    }
}

impl Random {
    /// Bits from the block, from a place that the name tells.
    fn fill(&self, name: &str, tensor: &mut Tensor) {
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        let start = hasher.finish() as usize % BLOCK * self.dtype.size();
        let block = self.block.as_bytes();
        let mut rest = tensor.as_mut_bytes();
        let mut from = &block[start..];
        while !rest.is_empty() {
            let n = from.len().min(rest.len());
            let (now, later) = rest.split_at_mut(n);
            now.copy_from_slice(&from[..n]);
            (rest, from) = (later, block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_depend_on_their_names_alone_and_have_the_right_spread() {
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let source = Random::new(dtype);
            let [a, again, b] = ["a.weight", "a.weight", "b.weight"].map(|n| source.tensor(n, &[3, BLOCK / 2]).unwrap().to_f32());
            assert!(a == again && a != b);
            let std = (a.iter().map(|x| x * x).sum::<f32>() / a.len() as f32).sqrt();
            assert!((std / STD - 1.0).abs() < 0.01, "{std}");
            let ones = source.tensor("llama.norm.weight", &[5]).unwrap();
            assert_eq!((ones.dtype(), ones.to_f32()), (dtype, vec![1.0; 5]));
        }
    }

    #[test]
    fn packed_weights_have_the_spread_of_dense_ones() {
        for (dtype, bits) in [(DType::Bf16, 4), (DType::Bf16, 8), (DType::F32, 4), (DType::F16, 8)] {
            let source = Random::packed(dtype, Recipe::of_bits(bits, 128).unwrap());
            let packed = source.packed("llama.layers.0.mlp.up_proj", 512, 1024).unwrap().expect("a matrix of the decoder");
            let w = packed.to_f32();
            let mean = w.iter().sum::<f32>() / w.len() as f32;
            let std = (w.iter().map(|x| x * x).sum::<f32>() / w.len() as f32).sqrt();
            // Of 4 bits, −8 has no counterpart: half a step is a seventh of the deviation.
            let step = STD * 12f32.sqrt() / (1 << bits) as f32;
            assert!((mean + step / 2.0).abs() < 0.01 * STD, "{dtype}, {bits} bits: mean {mean}");
            assert!((std / STD - 1.0).abs() < 0.03, "{dtype}, {bits} bits: standard deviation {std}");
        }
    }
}
