//! The twin of the vector instructions in plain Rust, which the compiler vectorises as far as its baseline allows.

#![allow(clippy::needless_range_loop)] // lanes, rows and columns are indexed alike, and unrolled

use half::{bf16, f16};

use super::Simd;

/// `L` lanes (8 or 16) as an array; with `DOT` it rounds activations to bf16 where AVX512-BF16 does.
#[derive(Clone, Copy)]
pub struct Scalar<const L: usize, const DOT: bool = false>;

/// Lane by lane.
#[inline(always)]
fn map2<const L: usize>(a: [f32; L], b: [f32; L], f: impl Fn(f32, f32) -> f32) -> [f32; L] {
    let mut r = [0.0; L];
    for i in 0..L {
        r[i] = f(a[i], b[i]);
    }
    r
}

/// The sum of each `N` lanes of `N` vectors.
#[inline(always)]
fn rows<const L: usize, const N: usize>(sums: &[[i32; L]; N]) -> [f32; L] {
    let mut v = [0.0; L];
    for i in 0..L {
        v[i] = sums.as_flattened()[i * N..][..N].iter().sum::<i32>() as f32;
    }
    v
}

// The pointers are valid, says the caller of each method; nothing else is unsafe here.
impl<const L: usize, const DOT: bool> Simd for Scalar<L, DOT> {
    type V = [f32; L];
    type Square = [[f32; L]; L];
    type Bytes = [[u8; 4]; L];
    type Sums4 = [i32; L];
    type Sums8 = [i32; L];
    const LANES: usize = L;
    const MR: usize = if L == 16 { 14 } else { 4 };
    const BF16_DOT: bool = DOT;
    const DOT8_UNSIGNED: bool = true;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; L]
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        // SAFETY: LANES elements can be read.
        unsafe { p.cast::<[f32; L]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> Self::V {
        let mut v = [0.0; L];
        // SAFETY: n < LANES elements can be read.
        unsafe { std::ptr::copy_nonoverlapping(p, v.as_mut_ptr(), n) };
        v
    }

    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        // SAFETY: LANES elements can be written.
        unsafe { p.cast::<[f32; L]>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn store_part(p: *mut f32, v: Self::V, n: usize) {
        // SAFETY: n < LANES elements can be written.
        unsafe { std::ptr::copy_nonoverlapping(v.as_ptr(), p, n) }
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> Self::V {
        // SAFETY: LANES elements can be read.
        unsafe { p.cast::<[bf16; L]>().read_unaligned() }.map(|x| f32::from_bits(u32::from(x.to_bits()) << 16))
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Self::V {
        // SAFETY: LANES elements can be read.
        unsafe { p.cast::<[f16; L]>().read_unaligned() }.map(f16::to_f32_const)
    }

    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self::V {
        // SAFETY: LANES elements can be read.
        unsafe { p.cast::<[i8; L]>().read() }.map(f32::from)
    }

    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a - b)
    }

    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a / b)
    }

    /// Rounds twice: a fused multiply-add is a function call in the baseline.
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        map2(map2(a, b, |a, b| a * b), c, |ab, c| ab + c)
    }

    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn select_lt(a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V {
        let mut r = y;
        for i in 0..L {
            if a[i] < b[i] {
                r[i] = x[i];
            }
        }
        r
    }

    #[inline(always)]
    unsafe fn round(a: Self::V) -> Self::V {
        // Adding 1.5·2²³ pushes the fraction out of the mantissa, with the hardware's rounding; larger numbers are integers already.
        const SHIFT: f32 = 12_582_912.0;
        a.map(|x| if x.abs() < 4_194_304.0 { (x + SHIFT) - SHIFT } else { x })
    }

    #[inline(always)]
    unsafe fn scale2(a: Self::V, n: Self::V) -> Self::V {
        map2(a, n, |a, n| {
            let n = n as i32;
            let half = n >> 1;
            a * f32::from_bits(((half + 127) << 23) as u32) * f32::from_bits(((n - half + 127) << 23) as u32)
        })
    }

    #[inline(always)]
    unsafe fn reduce_add(a: Self::V) -> f32 {
        let (mut v, mut n) = (a, L);
        while n > 1 {
            n /= 2;
            for i in 0..n {
                v[i] += v[i + n];
            }
        }
        v[0]
    }

    #[inline(always)]
    unsafe fn reduce_max(a: Self::V) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, |m, x| if x > m { x } else { m })
    }

    #[inline(always)]
    unsafe fn transpose(square: &mut Self::Square) {
        for i in 0..L {
            for j in 0..i {
                (square[i][j], square[j][i]) = (square[j][i], square[i][j]);
            }
        }
    }

    #[inline(always)]
    unsafe fn square() -> Self::Square {
        [[0.0; L]; L]
    }

    #[inline(always)]
    unsafe fn load_bytes(p: *const u8) -> Self::Bytes {
        // SAFETY: 4·LANES bytes can be read.
        unsafe { p.cast::<[[u8; 4]; L]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn repeat_bytes<const N: usize>(p: *const i8) -> Self::Bytes {
        let mut bytes = [[0; 4]; L];
        for i in 0..L {
            // SAFETY: N bytes can be read.
            bytes[i] = unsafe { p.cast::<u8>().add(4 * i % N).cast::<[u8; 4]>().read_unaligned() };
        }
        bytes
    }

    #[inline(always)]
    unsafe fn low4(a: Self::Bytes) -> Self::Bytes {
        a.map(|four| four.map(|b| b & 15))
    }

    #[inline(always)]
    unsafe fn high4(a: Self::Bytes) -> Self::Bytes {
        a.map(|four| four.map(|b| b >> 4))
    }

    #[inline(always)]
    unsafe fn zero4() -> Self::Sums4 {
        [0; L]
    }

    #[inline(always)]
    unsafe fn zero8() -> Self::Sums8 {
        [0; L]
    }

    #[inline(always)]
    unsafe fn dot4(mut c: Self::Sums4, w: Self::Bytes, x: Self::Bytes) -> Self::Sums4 {
        for i in 0..L {
            for j in 0..4 {
                c[i] += i32::from(w[i][j]) * i32::from(x[i][j] as i8);
            }
        }
        c
    }

    #[inline(always)]
    unsafe fn dot8(c: Self::Sums8, w: Self::Bytes, x: Self::Bytes) -> Self::Sums8 {
        // SAFETY: without instructions of its own.
        unsafe { Self::dot4(c, w, x) }
    }

    #[inline(always)]
    unsafe fn sums4(c: Self::Sums4) -> Self::V {
        c.map(|sum| sum as f32)
    }

    #[inline(always)]
    unsafe fn sums8(c: Self::Sums8) -> Self::V {
        c.map(|sum| sum as f32)
    }

    #[inline(always)]
    unsafe fn rows4<const N: usize>(sums: &[Self::Sums4; N]) -> Self::V {
        rows(sums)
    }

    #[inline(always)]
    unsafe fn rows8<const N: usize>(sums: &[Self::Sums8; N]) -> Self::V {
        rows(sums)
    }

    #[inline(always)]
    unsafe fn spread<const N: usize>(p: *const f32) -> Self::V {
        let mut v = [0.0; L];
        for i in 0..L {
            // SAFETY: LANES / N elements can be read.
            v[i] = unsafe { *p.add(i / N) };
        }
        v
    }

    #[inline(always)]
    unsafe fn dot_bf16(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        let low = |x: f32| f32::from_bits(x.to_bits() << 16);
        let high = |x: f32| f32::from_bits(x.to_bits() & 0xffff_0000);
        let c = map2(map2(a, b, |a, b| low(a) * low(b)), c, |ab, c| ab + c);
        map2(map2(a, b, |a, b| high(a) * high(b)), c, |ab, c| ab + c)
    }
}
