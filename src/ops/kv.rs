//! [`KvLayer`]: keys and values of one layer, in pages.

use super::{Heads, Ops};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Keys and values of one layer, in pages: both are `[n_pages, n_kv_heads, page_tokens, head_dim]`.
///
/// A head's tokens lie together within a page, so that decoding streams them.
///
/// In 8 bits the head_dim numbers of a token and head share a scale, as of symmetric rounding to the nearest: x ≈ s·q, s = max |x| / 127.
#[derive(Debug)]
pub struct KvLayer {
    /// Keys, already rotated: f32, f16, bf16, or i8 with scales.
    pub k: Tensor,
    /// Values, in the dtype of the keys.
    pub v: Tensor,
    /// s of keys and of values, if they are integers: f32 `[n_pages, n_kv_heads, page_tokens]` each.
    pub scales: Option<[Tensor; 2]>,
}

/// q of a token's numbers for one head and their scale; NaN and infinity make the scale NaN, which all of them become when read.
pub fn quantize(x: &[f32], q: &mut [i8]) -> f32 {
    // As bits, which order magnitudes and put NaN on top.
    let largest = f32::from_bits(x.iter().fold(0, |m, v| m.max(v.to_bits() & 0x7fff_ffff)));
    if !largest.is_finite() {
        q.fill(1);
        return f32::NAN;
    }
    let scale = largest / 127.0;
    // Of a scale below the normal numbers there may be no inverse: then all are zero.
    let inverse = if scale >= f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 };
    q.iter_mut().zip(x).for_each(|(q, x)| *q = (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i8);
    scale
}

/// The dtype of a cache by its name on the command line; none for `auto`, which is what the model computes in.
pub fn dtype(name: &str) -> Result<Option<DType>> {
    match name {
        "auto" => Ok(None),
        "int8" => Ok(Some(DType::I8)),
        _ => {
            let known = name.parse().map_err(|_| Error::usage(format!("unknown cache dtype `{name}`: use f32, f16, bf16 or int8")));
            known.map(Some)
        }
    }
}

impl KvLayer {
    /// An empty cache.
    pub fn new(ops: &dyn Ops, n_pages: usize, page_tokens: usize, heads: Heads, dtype: DType) -> Result<Self> {
        let shape = [n_pages, heads.n_kv_heads, page_tokens, heads.head_dim];
        let scale = || ops.alloc(&shape[..3], DType::F32);
        let scales = if dtype == DType::I8 { Some([scale()?, scale()?]) } else { None };
        Ok(Self { k: ops.alloc(&shape, dtype)?, v: ops.alloc(&shape, dtype)?, scales })
    }

    /// Bytes that a token takes.
    pub fn bytes_per_token(heads: Heads, dtype: DType) -> usize {
        let scale = if dtype == DType::I8 { DType::F32.size() } else { 0 };
        2 * heads.n_kv_heads * (heads.head_dim * dtype.size() + scale)
    }

    /// Tokens of one page.
    pub fn page_tokens(&self) -> usize {
        self.k.shape()[2]
    }

    /// The same elsewhere: each tensor as `f` moves it.
    pub fn map(&self, mut f: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let scales = self.scales.as_ref().map(|[k, v]| Ok::<_, Error>([f(k)?, f(v)?])).transpose()?;
        Ok(Self { k: f(&self.k)?, v: f(&self.v)?, scales })
    }

    /// The same in f32. Of tensors on the host.
    pub fn to_f32(&self) -> Self {
        let of = |x: &Tensor, scales: Option<&Tensor>| match scales {
            None => x.converted(DType::F32),
            Some(scales) => {
                let rows = x.as_slice::<i8>().chunks_exact(x.shape()[3]).zip(scales.as_slice::<f32>());
                let values: Vec<f32> = rows.flat_map(|(row, &s)| row.iter().map(move |&q| s * f32::from(q))).collect();
                Tensor::from_slice(x.shape(), &values)
            }
        };
        let [k, v] = self.scales.as_ref().map_or([None, None], |[k, v]| [Some(k), Some(v)]);
        Self { k: of(&self.k, k), v: of(&self.v, v), scales: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_the_nearest_and_what_is_no_number_stays_none() {
        let mut q = [0; 4];
        assert_eq!(quantize(&[0.0, 1.0, -2.54, 0.031], &mut q), 0.02);
        assert_eq!(q, [0, 50, -127, 2]);
        assert_eq!((quantize(&[0.0; 4], &mut q), q), (0.0, [0; 4]));
        assert_eq!((quantize(&[1e-38, 0.0, -1e-38, 0.0], &mut q), q), (1e-38 / 127.0, [0; 4]));
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(quantize(&[1.0, bad, 0.0, 0.0], &mut q).is_nan() && q.iter().all(|&q| q != 0));
        }
    }
}
