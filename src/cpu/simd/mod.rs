//! Vector instructions behind one small trait, chosen at run time.
//!
//! A kernel is written once over [`Simd`], whose methods are wrappers of one instruction (or of the shortest sequence that does the
//! same), and handed to [`Isa::run`], which compiles it for each instruction set. [`Scalar`] is the twin that runs everywhere; with 16
//! lanes and [`Simd::BF16_DOT`] it also stands in for AVX-512 in tests, so that all but the wrappers is tested on any machine.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod math;
mod scalar;

use std::fmt;

pub(crate) use math::{exp, gelu, quick_gelu};
pub use math::{gelu_backward_row, gelu_row, quick_gelu_backward_row, quick_gelu_row, silu_mul_backward_row, silu_mul_row};
pub use scalar::Scalar;

use crate::dtype::Element;
use crate::error::{Error, Result};

/// Bytes of a cache line, which is what [`Simd::prefetch`] asks for.
pub const LINE: usize = 64;
/// The most lanes of any [`Simd::V`].
pub const MAX_LANES: usize = 16;
/// Vectors side by side in a tile of a matrix product; a tile is `NV * LANES` wide.
pub const NV: usize = 2;

/// One vector register and what can be done with it.
///
/// # Safety
/// All methods need the instruction set that the implementing type names: they are called only below [`Isa::run`], which checks it.
/// Pointers must be valid for the elements that a method reads or writes; no alignment is needed.
#[allow(clippy::missing_safety_doc)] // stated for all of them above
pub trait Simd: Copy + 'static {
    /// A vector of [`Self::LANES`] f32.
    type V: Copy;
    /// `[V; LANES]`: a square block for [`Self::transpose`].
    type Square: AsMut<[Self::V]>;
    /// A vector of 4·LANES bytes.
    type Bytes: Copy;
    /// Sums of [`Self::dot4`].
    type Sums4: Copy;
    /// Sums of [`Self::dot8`].
    type Sums8: Copy;
    /// f32 in a vector.
    const LANES: usize;
    /// Rows of a full tile of a matrix product: as many as leave `MR * NV` accumulators, `NV` columns and one broadcast in registers.
    const MR: usize;
    /// Width of a tile.
    const NR: usize = NV * Self::LANES;
    /// Whether [`Self::dot_bf16`] is one instruction, worth rounding activations to bf16 for.
    const BF16_DOT: bool;
    /// Whether [`Self::dot8`] takes bytes q as they are; else as q − 128.
    const DOT8_UNSIGNED: bool;

    /// x in all lanes
    unsafe fn splat(x: f32) -> Self::V;
    /// LANES elements from `p`
    unsafe fn load(p: *const f32) -> Self::V;
    /// `n < LANES` elements from `p`, then zeros
    unsafe fn load_part(p: *const f32, n: usize) -> Self::V;
    /// LANES elements to `p`
    unsafe fn store(p: *mut f32, v: Self::V);
    /// the first `n < LANES` elements to `p`
    unsafe fn store_part(p: *mut f32, v: Self::V, n: usize);
    /// LANES bf16, widened
    unsafe fn load_bf16(p: *const half::bf16) -> Self::V;
    /// LANES f16, widened
    unsafe fn load_f16(p: *const half::f16) -> Self::V;
    /// LANES integers as f32
    unsafe fn load_i8(p: *const i8) -> Self::V;
    /// a + b
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    /// a − b
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    /// a·b
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// a/b
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// a·b + c
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// the smaller; b where one is NaN
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// the larger; b where one is NaN
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// x where a < b, else y
    unsafe fn select_lt(a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// the nearest integer, ties to even
    unsafe fn round(a: Self::V) -> Self::V;
    /// a·2ⁿ for integers n in −252..=254
    unsafe fn scale2(a: Self::V, n: Self::V) -> Self::V;
    /// Σ of the lanes
    unsafe fn reduce_add(a: Self::V) -> f32;
    /// max of the lanes
    unsafe fn reduce_max(a: Self::V) -> f32;
    /// rows to columns
    unsafe fn transpose(square: &mut Self::Square);
    /// a square of zeros
    unsafe fn square() -> Self::Square;
    /// c + a₀·b₀ + a₁·b₁, where each lane of a and b holds two bf16
    unsafe fn dot_bf16(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// 4·LANES bytes from `p`
    unsafe fn load_bytes(p: *const u8) -> Self::Bytes;
    /// `N` bytes from `p`, 16 or 32, as often as they fit
    unsafe fn repeat_bytes<const N: usize>(p: *const i8) -> Self::Bytes;
    /// the low 4 bits of each byte
    unsafe fn low4(a: Self::Bytes) -> Self::Bytes;
    /// the high 4 bits of each byte
    unsafe fn high4(a: Self::Bytes) -> Self::Bytes;
    /// no sums yet
    unsafe fn zero4() -> Self::Sums4;
    /// no sums yet
    unsafe fn zero8() -> Self::Sums8;
    /// In each of LANES lanes: c + Σ of four products of unsigned w ≤ 15 with signed x ≥ −127. Up to 8 times: c may be of 16 bits.
    unsafe fn dot4(c: Self::Sums4, w: Self::Bytes, x: Self::Bytes) -> Self::Sums4;
    /// In each of LANES lanes: c + Σ of four products of w, unsigned or less 128, with signed x ≥ −127.
    unsafe fn dot8(c: Self::Sums8, w: Self::Bytes, x: Self::Bytes) -> Self::Sums8;
    /// the sums as f32
    unsafe fn sums4(c: Self::Sums4) -> Self::V;
    /// the sums as f32
    unsafe fn sums8(c: Self::Sums8) -> Self::V;
    /// Where there are 16 lanes: lane 4·j + i is the sum of lanes 4·i .. 4·i + 4 of vector j, as f32.
    unsafe fn rows4<const N: usize>(sums: &[Self::Sums4; N]) -> Self::V;
    /// Where there are 16 lanes: lane 2·j + i is the sum of lanes 8·i .. 8·i + 8 of vector j, as f32.
    unsafe fn rows8<const N: usize>(sums: &[Self::Sums8; N]) -> Self::V;
    /// lane i is p\[i / N\], N = 4 or 8
    unsafe fn spread<const N: usize>(p: *const f32) -> Self::V;
    /// asks for the cache line of `p`, which need not be valid
    #[inline(always)]
    unsafe fn prefetch(_p: *const u8) {}
}

/// An element type that vectors are loaded from.
pub trait Stored: Element {
    /// LANES elements as f32.
    ///
    /// # Safety
    /// That of [`Simd`].
    unsafe fn load<S: Simd>(p: *const Self) -> S::V;

    /// `n < LANES` elements as f32, then zeros.
    ///
    /// # Safety
    /// That of [`Simd`].
    #[inline(always)]
    unsafe fn load_part<S: Simd>(p: *const Self, n: usize) -> S::V {
        let mut part = [Self::zeroed(); MAX_LANES];
        // SAFETY: `n` elements can be read, says the caller; `part` has more.
        unsafe {
            std::ptr::copy_nonoverlapping(p, part.as_mut_ptr(), n);
            Self::load::<S>(part.as_ptr())
        }
    }
}

impl Stored for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load(p) }
    }

    #[inline(always)]
    unsafe fn load_part<S: Simd>(p: *const Self, n: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load_part(p, n) }
    }
}

impl Stored for half::bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load_bf16(p) }
    }
}

impl Stored for i8 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load_i8(p) }
    }
}

impl Stored for half::f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load_f16(p) }
    }
}

/// A computation that [`Isa::run`] compiles for each instruction set.
pub trait Kernel {
    /// What it returns.
    type Output;

    /// Does it. Implementations are `#[inline(always)]`, and so is what they call, or else it is compiled without the instructions.
    ///
    /// # Safety
    /// The machine has the instructions of `S`.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

/// An instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What the compiler's baseline has.
    Scalar,
    /// AVX2, FMA and F16C: 8 lanes.
    Avx2,
    /// AVX-512 F, BW, VL, DQ and VNNI: 16 lanes.
    Avx512,
    /// [`Isa::Avx512`] and its bf16 dot product.
    Avx512Bf16,
    /// The twin of [`Isa::Avx512`]: the same tiles in plain Rust.
    #[cfg(test)]
    Wide,
    /// The twin of [`Isa::Avx512Bf16`].
    #[cfg(test)]
    WideBf16,
}

impl Isa {
    /// All of them, narrowest first.
    pub const ALL: [Self; 4] = [Self::Scalar, Self::Avx2, Self::Avx512, Self::Avx512Bf16];

    /// The widest that this machine has.
    pub fn detect() -> Self {
        Self::ALL.into_iter().rfind(|isa| isa.is_supported()).unwrap_or(Self::Scalar)
    }

    /// What `LLAVA_ISA` asks for, or [`Isa::detect`] where it is not set.
    pub fn from_env() -> Result<Self> {
        match std::env::var("LLAVA_ISA") {
            Ok(name) => Self::named(&name),
            Err(std::env::VarError::NotPresent) => Ok(Self::detect()),
            Err(std::env::VarError::NotUnicode(name)) => Self::named(&name.to_string_lossy()),
        }
    }

    /// The one of this name, if this machine has it.
    fn named(name: &str) -> Result<Self> {
        let Some(isa) = Self::ALL.into_iter().find(|isa| isa.name() == name) else {
            return Err(Error::usage(format!(
                "LLAVA_ISA: unknown instruction set `{name}`: use scalar, avx2, avx512 or avx512bf16"
            )));
        };
        if !isa.is_supported() {
            return Err(Error::Unsupported(format!("LLAVA_ISA: this machine has no {name}; its widest is {}", Self::detect())));
        }
        Ok(isa)
    }

    /// Its name, as `LLAVA_ISA` takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
            #[cfg(test)]
            Self::Wide => "wide",
            #[cfg(test)]
            Self::WideBf16 => "widebf16",
        }
    }

    /// Whether this machine has it.
    pub fn is_supported(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            match self {
                Self::Scalar => true,
                Self::Avx2 => has!("avx2") && has!("fma") && has!("f16c"),
                Self::Avx512 => {
                    let has_base = has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq");
                    Self::Avx2.is_supported() && has_base && has!("avx512vnni")
                }
                Self::Avx512Bf16 => Self::Avx512.is_supported() && has!("avx512bf16"),
                #[cfg(test)]
                Self::Wide | Self::WideBf16 => true,
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            !matches!(self, Self::Avx2 | Self::Avx512 | Self::Avx512Bf16)
        }
    }

    /// What tests run on: all that this machine has, and the twins. Says what is left out.
    #[cfg(test)]
    pub fn tested() -> Vec<Self> {
        let (mut tested, skipped): (Vec<_>, Vec<_>) = Self::ALL.into_iter().partition(|isa| isa.is_supported());
        if !skipped.is_empty() {
            println!("not on this machine, skipped: {skipped:?}");
        }
        tested.extend([Self::Wide, Self::WideBf16]);
        tested
    }

    /// Runs `kernel` with these instructions.
    ///
    /// # Panics
    /// If this machine does not have them.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        assert!(self.is_supported(), "this machine has no {self}");
        match self {
            // SAFETY: `Scalar` needs no instructions beyond the baseline.
            Self::Scalar => unsafe { kernel.run::<Scalar<8>>() },
            // SAFETY: the machine has them, as just checked.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2::run(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512::run(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => unsafe { avx512::run_bf16(kernel) },
            // SAFETY: as for `Scalar`.
            #[cfg(test)]
            Self::Wide => unsafe { kernel.run::<Scalar<16>>() },
            // SAFETY: as for `Scalar`.
            #[cfg(test)]
            Self::WideBf16 => unsafe { kernel.run::<Scalar<16, true>>() },
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("not supported on this architecture"),
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every wrapper against what its documentation says, lane by lane.
    struct Wrappers;

    impl Kernel for Wrappers {
        type Output = ();

        #[inline(always)]
        unsafe fn run<S: Simd>(self) {
            let x: Vec<f32> = (0..64).map(|i| (i as f32 - 20.3) * 0.7).collect();
            let y: Vec<f32> = (0..64).map(|i| (i as f32 - 7.9) * -1.3).collect();
            let lanes = |v| {
                let mut out = vec![0.0; S::LANES];
                // SAFETY: LANES elements.
                unsafe { S::store(out.as_mut_ptr(), v) };
                out
            };
            let expect = |name: &str, got, f: &dyn Fn(usize) -> f32| {
                assert_eq!(lanes(got), (0..S::LANES).map(f).collect::<Vec<_>>(), "{name}");
            };
            // SAFETY: the instructions are there, says the caller; all buffers have 64 elements.
            unsafe {
                let (a, b) = (S::load(x.as_ptr()), S::load(y.as_ptr()));
                expect("splat", S::splat(3.5), &|_| 3.5);
                expect("add", S::add(a, b), &|i| x[i] + y[i]);
                expect("sub", S::sub(a, b), &|i| x[i] - y[i]);
                expect("mul", S::mul(a, b), &|i| x[i] * y[i]);
                expect("div", S::div(a, b), &|i| x[i] / y[i]);
                expect("min", S::min(a, b), &|i| x[i].min(y[i]));
                expect("max", S::max(a, b), &|i| x[i].max(y[i]));
                expect("min of NaN", S::min(S::splat(f32::NAN), b), &|i| y[i]);
                expect("max of NaN", S::max(S::splat(f32::NAN), b), &|i| y[i]);
                expect("select_lt", S::select_lt(a, b, S::splat(1.0), a), &|i| if x[i] < y[i] { 1.0 } else { x[i] });
                expect("round", S::round(a), &|i| x[i].round_ties_even());
                expect("round of ties", S::round(S::splat(2.5)), &|_| 2.0);
                expect("fma", S::fma(S::splat(3.0), S::splat(5.0), S::splat(-7.0)), &|_| 8.0);
                expect("scale2", S::scale2(a, S::splat(-140.0)), &|i| (f64::from(x[i]) * 2f64.powi(-140)) as f32);
                for n in 0..S::LANES {
                    expect("load_part", S::load_part(x.as_ptr(), n), &|i| if i < n { x[i] } else { 0.0 });
                    let mut out = vec![-1.0; S::LANES];
                    S::store_part(out.as_mut_ptr(), a, n);
                    assert!((0..S::LANES).all(|i| out[i] == if i < n { x[i] } else { -1.0 }), "store_part");
                }
                let bf: Vec<half::bf16> = x.iter().map(|&x| half::bf16::from_f32(x)).collect();
                let hf: Vec<half::f16> = x.iter().map(|&x| half::f16::from_f32(x * 1e-6)).collect();
                expect("load_bf16", S::load_bf16(bf.as_ptr()), &|i| bf[i].to_f32());
                expect("load_f16", S::load_f16(hf.as_ptr()), &|i| hf[i].to_f32());
                let ints: [i8; MAX_LANES] = std::array::from_fn(|i| (i * 37) as i8);
                expect("load_i8", S::load_i8(ints.as_ptr()), &|i| f32::from(ints[i]));
                let whole: Vec<f32> = (0..64).map(|i| (i * i) as f32).collect();
                let v = S::load(whole.as_ptr());
                assert_eq!(S::reduce_add(v), whole[..S::LANES].iter().sum::<f32>(), "reduce_add");
                assert_eq!(S::reduce_max(S::sub(S::splat(0.0), v)), 0.0, "reduce_max");
                let mut square = S::square();
                for (i, row) in square.as_mut().iter_mut().enumerate() {
                    *row = S::add(S::load(whole.as_ptr()), S::splat(1000.0 * i as f32));
                }
                S::transpose(&mut square);
                for (i, &row) in square.as_mut().iter().enumerate() {
                    expect("transpose", row, &|j| whole[i] + 1000.0 * j as f32);
                }
                self.integers::<S>(&lanes);
                if S::BF16_DOT {
                    let pair = |low: f32, high: f32| f32::from_bits(high.to_bits() & 0xffff_0000 | low.to_bits() >> 16);
                    let (a, b) = (S::splat(pair(2.0, 3.0)), S::splat(pair(5.0, 7.0)));
                    expect("dot_bf16", S::dot_bf16(a, b, S::splat(0.5)), &|_| 2.0 * 5.0 + 3.0 * 7.0 + 0.5);
                }
            }
        }
    }

    impl Wrappers {
        #[inline(always)]
        unsafe fn integers<S: Simd>(&self, lanes: &dyn Fn(S::V) -> Vec<f32>) {
            let n = 4 * S::LANES;
            let w: Vec<u8> = (0..64).map(|i| (i * 37 % 256) as u8).collect();
            let x: Vec<i8> = (0..64).map(|i| (i * 91 % 255 - 127) as i8).collect();
            let nibble = |i: usize, high: bool| i32::from(if high { w[i] >> 4 } else { w[i] & 15 });
            // SAFETY: the instructions are there, says the caller; all buffers have 64 elements.
            unsafe {
                let (bytes, low, high) = {
                    let bytes = S::load_bytes(w.as_ptr());
                    (bytes, S::low4(bytes), S::high4(bytes))
                };
                let (x16, x32) = (S::repeat_bytes::<16>(x.as_ptr()), S::repeat_bytes::<32>(x.as_ptr()));
                let four = |lane: usize, f: &dyn Fn(usize) -> i32| (4 * lane..4 * lane + 4).map(f).sum::<i32>() as f32;
                for (half, is_high) in [(low, false), (high, true)] {
                    let got = lanes(S::sums4(S::dot4(S::zero4(), half, x16)));
                    for lane in 0..S::LANES {
                        assert_eq!(got[lane], four(lane, &|i| nibble(i, is_high) * i32::from(x[i % 16])), "dot4, high {is_high}");
                    }
                }
                let zero = if S::DOT8_UNSIGNED { 0 } else { 128 };
                let got = lanes(S::sums8(S::dot8(S::dot8(S::zero8(), bytes, x32), bytes, x32)));
                for lane in 0..S::LANES {
                    let once = four(lane, &|i| (i32::from(w[i]) - zero) * i32::from(x[i % 32]));
                    assert_eq!(got[lane], 2.0 * once, "dot8");
                }
                // The largest sums there are, of both signs.
                let (w, ones) = (vec![0xff_u8; n], [127i8; 32]);
                let bytes = S::load_bytes(w.as_ptr());
                for sign in [1i8, -1] {
                    let x = S::repeat_bytes::<32>(ones.map(|x| x * sign).as_ptr());
                    let (mut sums, mut w) = (S::zero4(), S::low4(bytes));
                    for _ in 0..8 {
                        sums = S::dot4(sums, w, x);
                        w = S::high4(bytes);
                    }
                    assert_eq!(lanes(S::sums4(sums))[0], f32::from(sign) * 8.0 * 4.0 * 15.0 * 127.0);
                    for (byte, q) in [(0xff_u8, 255), (0, 0), (128, 128)] {
                        let w = vec![byte; n];
                        let sums = S::dot8(S::zero8(), S::load_bytes(w.as_ptr()), x);
                        assert_eq!(lanes(S::sums8(sums))[0], f32::from(sign) * 4.0 * (q - zero) as f32 * 127.0, "{byte}");
                    }
                }
                let p = [1.0, 2.0, 3.0, 4.0];
                let (fours, eights) = (lanes(S::spread::<4>(p.as_ptr())), lanes(S::spread::<8>(p.as_ptr())));
                for lane in 0..S::LANES {
                    assert_eq!((fours[lane], eights[lane]), (p[lane / 4], p[lane / 8]));
                }
            }
        }
    }

    #[test]
    fn wrappers() {
        Isa::tested().into_iter().for_each(|isa| isa.run(Wrappers));
    }

    #[test]
    fn names() {
        assert_eq!(Isa::named("scalar").unwrap(), Isa::Scalar);
        assert!(Isa::named("sse9").unwrap_err().to_string().contains("use scalar, avx2, avx512 or avx512bf16"));
        for isa in Isa::ALL {
            assert_eq!(Isa::named(isa.name()).is_ok(), isa.is_supported());
            assert_eq!(isa.to_string(), isa.name());
        }
        assert!(Isa::detect().is_supported());
    }
}
