//! AVX2, FMA and F16C: 8 lanes, 16 registers.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Kernel, Simd};

/// Compiles `kernel` with these instructions.
///
/// # Safety
/// The machine has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's.
    unsafe { kernel.run::<Avx2>() }
}

/// The instruction set, as a type.
#[derive(Clone, Copy)]
pub struct Avx2;

/// `MASKS[8 - n..]` starts with n lanes of ones.
const MASKS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

/// The first `n` of 8 lanes.
#[inline(always)]
unsafe fn mask(n: usize) -> __m256i {
    debug_assert!(n <= 8);
    // SAFETY: n ≤ 8, so 8 elements follow in the table.
    unsafe { _mm256_loadu_si256(MASKS.as_ptr().add(8 - n).cast()) }
}

// SAFETY of every block below: the instructions are there and the pointers valid, which callers of `Simd` vouch for.
impl Simd for Avx2 {
    type V = __m256;
    type Square = [__m256; 8];
    type Bytes = __m256i;
    type Sums4 = __m256i; // 16 of 16 bits
    type Sums8 = __m256i;
    const LANES: usize = 8;
    const MR: usize = 6; // 6·2 accumulators + 2 columns + 1 broadcast = 15 of 16 registers
    const BF16_DOT: bool = false;
    const DOT8_UNSIGNED: bool = false;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> __m256 {
        // SAFETY: see above; lanes that are masked out are not read.
        unsafe { _mm256_maskload_ps(p, mask(n)) }
    }

    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m256) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_ps(p, v) }
    }

    #[inline(always)]
    unsafe fn store_part(p: *mut f32, v: __m256, n: usize) {
        // SAFETY: see above; lanes that are masked out are not written.
        unsafe { _mm256_maskstore_ps(p, mask(n), v) }
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())), 16)) }
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }

    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) }
    }

    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_sub_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn div(a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_div_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn min(a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_min_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_max_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn select_lt(a: __m256, b: __m256, x: __m256, y: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b)) }
    }

    #[inline(always)]
    unsafe fn round(a: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }

    /// By two factors 2^⌊n/2⌋ and 2^⌈n/2⌉, so that the result may be subnormal or infinite.
    #[inline(always)]
    unsafe fn scale2(a: __m256, n: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe {
            let n = _mm256_cvtps_epi32(n);
            let half = _mm256_srai_epi32::<1>(n);
            let bias = _mm256_set1_epi32(127);
            let lower = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
            let upper = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias));
            _mm256_mul_ps(_mm256_mul_ps(a, _mm256_castsi256_ps(lower)), _mm256_castsi256_ps(upper))
        }
    }

    #[inline(always)]
    unsafe fn reduce_add(a: __m256) -> f32 {
        // SAFETY: see above.
        unsafe {
            let v = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        }
    }

    #[inline(always)]
    unsafe fn reduce_max(a: __m256) -> f32 {
        // SAFETY: see above.
        unsafe {
            let v = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        }
    }

    #[inline(always)]
    unsafe fn transpose(square: &mut [__m256; 8]) {
        // SAFETY: see above.
        unsafe { transpose8(square) }
    }

    #[inline(always)]
    unsafe fn square() -> [__m256; 8] {
        // SAFETY: see above.
        [unsafe { _mm256_setzero_ps() }; 8]
    }

    #[inline(always)]
    unsafe fn load_bytes(p: *const u8) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }

    #[inline(always)]
    unsafe fn repeat_bytes<const N: usize>(p: *const i8) -> __m256i {
        // SAFETY: see above.
        unsafe { if N == 16 { _mm256_broadcastsi128_si256(_mm_loadu_si128(p.cast())) } else { _mm256_loadu_si256(p.cast()) } }
    }

    #[inline(always)]
    unsafe fn low4(a: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_and_si256(a, _mm256_set1_epi8(15)) }
    }

    #[inline(always)]
    unsafe fn high4(a: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_and_si256(_mm256_srli_epi16::<4>(a), _mm256_set1_epi8(15)) }
    }

    #[inline(always)]
    unsafe fn zero4() -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_setzero_si256() }
    }

    #[inline(always)]
    unsafe fn zero8() -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_setzero_si256() }
    }

    /// A product is at most 15·127, a pair 3810: 8 of them stay within 16 bits.
    #[inline(always)]
    unsafe fn dot4(c: __m256i, w: __m256i, x: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_add_epi16(c, _mm256_maddubs_epi16(w, x)) }
    }

    /// |w| times x with the sign of w: a pair is at most 2·128·127, within 16 bits.
    #[inline(always)]
    unsafe fn dot8(c: __m256i, w: __m256i, x: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe {
            let w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
            _mm256_add_epi32(c, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }

    #[inline(always)]
    unsafe fn sums4(c: __m256i) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_cvtepi32_ps(_mm256_madd_epi16(c, _mm256_set1_epi16(1))) }
    }

    #[inline(always)]
    unsafe fn sums8(c: __m256i) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_cvtepi32_ps(c) }
    }

    #[inline(always)]
    unsafe fn rows4<const N: usize>(_sums: &[Self::Sums4; N]) -> __m256 {
        unreachable!("there are 8 lanes")
    }

    #[inline(always)]
    unsafe fn rows8<const N: usize>(_sums: &[Self::Sums8; N]) -> __m256 {
        unreachable!("there are 8 lanes")
    }

    #[inline(always)]
    unsafe fn spread<const N: usize>(p: *const f32) -> __m256 {
        // SAFETY: see above.
        unsafe { if N == 4 { _mm256_set_m128(_mm_set1_ps(*p.add(1)), _mm_set1_ps(*p)) } else { _mm256_set1_ps(*p) } }
    }

    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }

    #[inline(always)]
    unsafe fn dot_bf16(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe {
            let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let (ai, bi) = (_mm256_castps_si256(a), _mm256_castps_si256(b));
            let (a0, b0) = (_mm256_slli_epi32::<16>(ai), _mm256_slli_epi32::<16>(bi));
            let (a1, b1) = (_mm256_and_si256(ai, high), _mm256_and_si256(bi, high));
            let c = _mm256_fmadd_ps(_mm256_castsi256_ps(a0), _mm256_castsi256_ps(b0), c);
            _mm256_fmadd_ps(_mm256_castsi256_ps(a1), _mm256_castsi256_ps(b1), c)
        }
    }
}

/// Rows of 8×8 to columns: pairs, then fours, then halves change places.
///
/// # Safety
/// The machine has AVX.
#[inline(always)]
pub unsafe fn transpose8(r: &mut [__m256; 8]) {
    // SAFETY: the caller's.
    unsafe {
        let mut pairs = *r;
        for i in [0, 2, 4, 6] {
            pairs[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
            pairs[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
        }
        let mut fours = pairs;
        for i in [0, 4] {
            fours[i] = _mm256_shuffle_ps::<0x44>(pairs[i], pairs[i + 2]);
            fours[i + 1] = _mm256_shuffle_ps::<0xee>(pairs[i], pairs[i + 2]);
            fours[i + 2] = _mm256_shuffle_ps::<0x44>(pairs[i + 1], pairs[i + 3]);
            fours[i + 3] = _mm256_shuffle_ps::<0xee>(pairs[i + 1], pairs[i + 3]);
        }
        for i in 0..4 {
            r[i] = _mm256_permute2f128_ps::<0x20>(fours[i], fours[i + 4]);
            r[i + 4] = _mm256_permute2f128_ps::<0x31>(fours[i], fours[i + 4]);
        }
    }
}
