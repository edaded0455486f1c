//! AVX-512 F, BW, VL, DQ and VNNI: 16 lanes, 32 registers; and the same with the bf16 dot product.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::avx2::{Avx2, transpose8};
use super::{Kernel, Simd};

/// Compiles `kernel` with these instructions.
///
/// # Safety
/// The machine has AVX2, FMA, F16C and AVX-512 F, BW, VL, DQ and VNNI.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's.
    unsafe { kernel.run::<Avx512<false>>() }
}

/// Compiles `kernel` with these instructions and AVX512-BF16.
///
/// # Safety
/// As [`run`], and the machine has AVX512-BF16.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")]
pub unsafe fn run_bf16<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's.
    unsafe { kernel.run::<Avx512<true>>() }
}

/// The instruction set, as a type; `DOT` says that there is AVX512-BF16.
#[derive(Clone, Copy)]
pub struct Avx512<const DOT: bool>;

/// The first `n` of 16 lanes.
#[inline(always)]
fn mask(n: usize) -> __mmask16 {
    ((1_u32 << n) - 1) as __mmask16
}

/// Lane 4·i + j is the sum of the four lanes of quarter i of vector j.
///
/// # Safety
/// That of [`Simd`].
#[inline(always)]
unsafe fn add_quarters(v: [__m512i; 4]) -> __m512i {
    // SAFETY: the caller's.
    unsafe {
        let a = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
        let b = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
        _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b))
    }
}

// SAFETY of every block below: the instructions are there and the pointers valid, which callers of `Simd` vouch for.
impl<const DOT: bool> Simd for Avx512<DOT> {
    type V = __m512;
    type Square = [__m512; 16];
    type Bytes = __m512i;
    type Sums4 = __m512i;
    type Sums8 = __m512i;
    const LANES: usize = 16;
    const MR: usize = 14; // 14·2 accumulators + 2 columns + 1 broadcast = 31 of 32 registers
    const BF16_DOT: bool = DOT;
    const DOT8_UNSIGNED: bool = true;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> __m512 {
        // SAFETY: see above; lanes that are masked out are not read.
        unsafe { _mm512_maskz_loadu_ps(mask(n), p) }
    }

    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(p, v) }
    }

    #[inline(always)]
    unsafe fn store_part(p: *mut f32, v: __m512, n: usize) {
        // SAFETY: see above; lanes that are masked out are not written.
        unsafe { _mm512_mask_storeu_ps(p, mask(n), v) }
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())))) }
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }

    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
    }

    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn select_lt(a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x) }
    }

    #[inline(always)]
    unsafe fn round(a: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }

    #[inline(always)]
    unsafe fn scale2(a: __m512, n: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_scalef_ps(a, n) }
    }

    #[inline(always)]
    unsafe fn reduce_add(a: __m512) -> f32 {
        // SAFETY: see above.
        unsafe { Avx2::reduce_add(_mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a))) }
    }

    #[inline(always)]
    unsafe fn reduce_max(a: __m512) -> f32 {
        // SAFETY: see above.
        unsafe { Avx2::reduce_max(_mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a))) }
    }

    /// As four squares of 8: the off-diagonal ones change places.
    #[inline(always)]
    unsafe fn transpose(square: &mut [__m512; 16]) {
        // SAFETY: see above.
        unsafe {
            let mut quarters = [[_mm256_setzero_ps(); 8]; 4]; // top left, top right, bottom left, bottom right
            for i in 0..8 {
                quarters[0][i] = _mm512_castps512_ps256(square[i]);
                quarters[1][i] = _mm512_extractf32x8_ps::<1>(square[i]);
                quarters[2][i] = _mm512_castps512_ps256(square[i + 8]);
                quarters[3][i] = _mm512_extractf32x8_ps::<1>(square[i + 8]);
            }
            let [a, b, c, d] = &mut quarters;
            transpose8(a);
            transpose8(b);
            transpose8(c);
            transpose8(d);
            for i in 0..8 {
                square[i] = _mm512_insertf32x8::<1>(_mm512_castps256_ps512(a[i]), c[i]);
                square[i + 8] = _mm512_insertf32x8::<1>(_mm512_castps256_ps512(b[i]), d[i]);
            }
        }
    }

    #[inline(always)]
    unsafe fn square() -> [__m512; 16] {
        // SAFETY: see above.
        [unsafe { _mm512_setzero_ps() }; 16]
    }

    #[inline(always)]
    unsafe fn load_bytes(p: *const u8) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }

    #[inline(always)]
    unsafe fn repeat_bytes<const N: usize>(p: *const i8) -> __m512i {
        // SAFETY: see above.
        unsafe {
            if N == 16 {
                _mm512_broadcast_i32x4(_mm_loadu_si128(p.cast()))
            } else {
                _mm512_broadcast_i64x4(_mm256_loadu_si256(p.cast()))
            }
        }
    }

    #[inline(always)]
    unsafe fn low4(a: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_and_si512(a, _mm512_set1_epi8(15)) }
    }

    #[inline(always)]
    unsafe fn high4(a: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_and_si512(_mm512_srli_epi16::<4>(a), _mm512_set1_epi8(15)) }
    }

    #[inline(always)]
    unsafe fn zero4() -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn zero8() -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn dot4(c: __m512i, w: __m512i, x: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_dpbusd_epi32(c, w, x) }
    }

    #[inline(always)]
    unsafe fn dot8(c: __m512i, w: __m512i, x: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_dpbusd_epi32(c, w, x) }
    }

    #[inline(always)]
    unsafe fn sums4(c: __m512i) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(c) }
    }

    #[inline(always)]
    unsafe fn sums8(c: __m512i) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(c) }
    }

    #[inline(always)]
    unsafe fn rows4<const N: usize>(sums: &[__m512i; N]) -> __m512 {
        // SAFETY: see above.
        unsafe {
            // Quarter i has rows i, 4 + i, 8 + i, 12 + i: a square to be transposed.
            let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            let sum = add_quarters([sums[0], sums[1], sums[2], sums[3]]);
            _mm512_cvtepi32_ps(_mm512_permutexvar_epi32(order, sum))
        }
    }

    #[inline(always)]
    unsafe fn rows8<const N: usize>(sums: &[__m512i; N]) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let low = add_quarters([sums[0], sums[1], sums[2], sums[3]]);
            let high = add_quarters([sums[4], sums[5], sums[6], sums[7]]);
            // A row's eight lanes were in two quarters.
            let sum = _mm512_add_epi32(_mm512_shuffle_i32x4::<0x88>(low, high), _mm512_shuffle_i32x4::<0xdd>(low, high));
            let order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
            _mm512_cvtepi32_ps(_mm512_permutexvar_epi32(order, sum))
        }
    }

    #[inline(always)]
    unsafe fn spread<const N: usize>(p: *const f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_insertf32x8::<1>(_mm512_castps256_ps512(Avx2::spread::<N>(p)), Avx2::spread::<N>(p.add(8 / N))) }
    }

    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }

    /// One instruction with AVX512-BF16; callers ask [`Simd::BF16_DOT`] first.
    #[inline(always)]
    unsafe fn dot_bf16(a: __m512, b: __m512, c: __m512) -> __m512 {
        assert!(DOT, "this instruction set has no bf16 dot product");
        // SAFETY: see above; a vector of 16 pairs of bf16 has the size of one of 16 f32.
        unsafe { _mm512_dpbf16_ps(c, std::mem::transmute::<__m512, __m512bh>(a), std::mem::transmute::<__m512, __m512bh>(b)) }
    }
}
