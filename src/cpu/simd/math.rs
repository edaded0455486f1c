//! exp and the activation functions, on vectors.

use std::marker::PhantomData;

use super::{Isa, Kernel, Simd};

/// eˣ within 2 ulp, subnormal results and infinity included; NaN stays NaN.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2, eˣ = 2ⁿ·eʳ; the polynomial for eʳ is that of Cephes' `expf`.
///
/// # Safety
/// That of [`Simd`].
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller's.
    unsafe {
        let x = S::max(S::splat(-105.0), S::min(S::splat(89.0), x)); // beyond: 0 and infinity, without leaving `scale2`'s range
        let n = S::round(S::mul(x, S::splat(std::f32::consts::LOG2_E)));
        // ln 2 in two parts, the first short enough that n times it is exact.
        let r = S::fma(n, S::splat(-0.693_359_4), x);
        let r = S::fma(n, S::splat(2.121_944_4e-4), r);
        let p = [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
        let mut y = S::splat(1.987_569_1e-4);
        for c in p {
            y = S::fma(y, r, S::splat(c));
        }
        let y = S::add(S::fma(S::mul(r, r), y, r), S::splat(1.0));
        S::scale2(y, n)
    }
}

/// x·σ(x·a) = x / (1 + exp(−a·x))
#[inline(always)]
unsafe fn swish<S: Simd>(x: S::V, a: f32) -> S::V {
    // SAFETY: the caller's.
    unsafe { S::div(x, S::add(S::splat(1.0), exp::<S>(S::mul(x, S::splat(-a))))) }
}

/// σ(z), and the derivative of [`swish`]: σ(z)·(1 + z·(1 − σ(z))), z = a·x.
///
/// 1 − σ(z) is e⁻ᶻ·σ(z): the difference would have few digits for large z. Below −80, where the slope is no more than 10⁻³³, e⁻ᶻ stays what
/// it is there, lest it be infinite.
#[inline(always)]
unsafe fn swish_slope<S: Simd>(x: S::V, a: f32) -> (S::V, S::V) {
    // SAFETY: the caller's.
    unsafe {
        let one = S::splat(1.0);
        let z = S::mul(x, S::splat(a));
        let e = exp::<S>(S::min(S::splat(80.0), S::mul(x, S::splat(-a))));
        let sigma = S::div(one, S::add(one, e));
        (sigma, S::mul(sigma, S::fma(z, S::mul(e, sigma), one)))
    }
}

/// x·σ(1.702 x): CLIP's activation.
///
/// # Safety
/// That of [`Simd`].
#[inline(always)]
pub(crate) unsafe fn quick_gelu<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller's.
    unsafe { swish::<S>(x, 1.702) }
}

/// x·Φ(x) = x/2·(1 + erf(x/√2)): the projector's activation, with the exact erf.
///
/// # Safety
/// That of [`Simd`].
#[inline(always)]
pub(crate) unsafe fn gelu<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller's.
    unsafe { S::mul(S::mul(x, S::splat(0.5)), twice_normal_cdf::<S>(x)) }
}

/// The derivative of [`gelu`]: Φ(x) + x·φ(x), φ(x) = exp(−x²/2)/√(2π)
#[inline(always)]
unsafe fn gelu_slope<S: Simd>(x: S::V) -> S::V {
    const INVERSE_SQRT_2_PI: f32 = 0.398_942_28;
    // SAFETY: the caller's.
    unsafe {
        let half = S::splat(0.5);
        let density = S::mul(S::splat(INVERSE_SQRT_2_PI), exp::<S>(S::mul(S::mul(x, S::splat(-0.5)), x)));
        S::fma(x, density, S::mul(half, twice_normal_cdf::<S>(x)))
    }
}

/// 2·Φ(x) = 1 + erf(x/√2)
///
/// Near zero erf is an odd polynomial; beyond, erfc is exp of one, so that the left tail, where 1 + erf cancels, is right to 1e-10.
/// Polynomials by N. Juffa, each within 1 ulp of erf.
#[inline(always)]
unsafe fn twice_normal_cdf<S: Simd>(x: S::V) -> S::V {
    const EDGE: f32 = 0.927_734_4; // 475/512
    const NEAR: [f32; 5] = [4.991_194_2e-3, -2.676_813_5e-2, 1.128_199_25e-1, -3.761_253_4e-1, 1.283_791_7e-1];
    const TAIL: [f32; 6] = [3.831_971_3e-4, -3.883_964_4e-3, 2.425_462_2e-2, -1.067_778_8e-1, -6.348_467e-1, -1.287_175_1e-1];
    // SAFETY: the caller's.
    unsafe {
        let (zero, one, two) = (S::splat(0.0), S::splat(1.0), S::splat(2.0));
        let z = S::mul(x, S::splat(std::f32::consts::FRAC_1_SQRT_2));
        let t = S::max(z, S::sub(zero, z));
        let z2 = S::mul(z, z);

        let mut near = S::splat(-5.967_617e-4);
        for c in NEAR {
            near = S::fma(near, z2, S::splat(c));
        }
        let near = S::add(one, S::fma(near, z, z)); // 1 + erf z

        let t = S::min(S::splat(10.5), t); // erfc is zero in f32 from 10.1 on
        let mut tail = S::fma(S::splat(-1.728_534_7e-5), t, S::splat(TAIL[0]));
        tail = S::fma(tail, S::mul(t, t), S::fma(S::splat(TAIL[1]), t, S::splat(TAIL[2])));
        for &c in &TAIL[3..] {
            tail = S::fma(tail, t, S::splat(c));
        }
        let tail = exp::<S>(S::sub(S::mul(tail, t), t)); // erfc t

        let far = S::select_lt(z, zero, tail, S::sub(two, tail));
        S::select_lt(t, S::splat(EDGE), near, far)
    }
}

/// A function of vectors, applied to a row.
trait Map {
    /// f(a, b), where b is only read if the row has a second operand.
    unsafe fn map<S: Simd>(a: S::V, b: S::V) -> S::V;
}

/// y\[i\] = f(a\[i\], b\[i\])
struct Row<'a, F> {
    y: &'a mut [f32],
    a: &'a [f32],
    b: &'a [f32],
    f: PhantomData<F>,
}

impl<F: Map> Kernel for Row<'_, F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { y, a, b, .. } = self;
        let n = y.len();
        assert!(a.len() == n && b.len() == n, "rows of {n}, {} and {} elements", a.len(), b.len());
        let whole = n - n % S::LANES;
        let (y, a, b) = (y.as_mut_ptr(), a.as_ptr(), b.as_ptr());
        // SAFETY: all three rows have n elements; whole + LANES > n.
        unsafe {
            for i in (0..whole).step_by(S::LANES) {
                S::store(y.add(i), F::map::<S>(S::load(a.add(i)), S::load(b.add(i))));
            }
            if whole < n {
                let (a, b) = (S::load_part(a.add(whole), n - whole), S::load_part(b.add(whole), n - whole));
                S::store_part(y.add(whole), F::map::<S>(a, b), n - whole);
            }
        }
    }
}

/// Rows of one operand are handed in twice.
macro_rules! map {
    ($name:ident, $a:ident, $b:ident, $S:ident => $value:expr) => {
        struct $name;
        impl Map for $name {
            #[inline(always)]
            unsafe fn map<$S: Simd>($a: $S::V, $b: $S::V) -> $S::V {
                // SAFETY: the caller's.
                unsafe { $value }
            }
        }
    };
}
map!(SiluMul, gate, up, S => S::mul(swish::<S>(gate, 1.0), up));
map!(Gelu, x, _y, S => gelu::<S>(x));
map!(QuickGelu, x, _y, S => quick_gelu::<S>(x));
map!(GeluBackward, x, dy, S => S::mul(dy, gelu_slope::<S>(x)));
map!(QuickGeluBackward, x, dy, S => S::mul(dy, swish_slope::<S>(x, 1.702).1));

/// y = silu(gate) ⊙ up, silu(x) = x·σ(x)
///
/// # Panics
/// If the rows differ in length.
pub fn silu_mul_row(isa: Isa, y: &mut [f32], gate: &[f32], up: &[f32]) {
    isa.run(Row { y, a: gate, b: up, f: PhantomData::<SiluMul> });
}

/// y = x·Φ(x)
///
/// # Panics
/// If the rows differ in length.
pub fn gelu_row(isa: Isa, y: &mut [f32], x: &[f32]) {
    isa.run(Row { y, a: x, b: x, f: PhantomData::<Gelu> });
}

/// y = x·σ(1.702 x)
///
/// # Panics
/// If the rows differ in length.
pub fn quick_gelu_row(isa: Isa, y: &mut [f32], x: &[f32]) {
    isa.run(Row { y, a: x, b: x, f: PhantomData::<QuickGelu> });
}

/// The gradient of [`silu_mul_row`]: both factors share one σ.
struct SiluMulBackward<'a> {
    d_gate: &'a mut [f32],
    d_up: &'a mut [f32],
    dy: &'a [f32],
    gate: &'a [f32],
    up: &'a [f32],
}

impl Kernel for SiluMulBackward<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { d_gate, d_up, dy, gate, up } = self;
        let n = dy.len();
        assert!([d_gate.len(), d_up.len(), gate.len(), up.len()] == [n; 4], "rows of {n} elements and others");
        let whole = n - n % S::LANES;
        let (d_gate, d_up) = (d_gate.as_mut_ptr(), d_up.as_mut_ptr());
        let (dy, gate, up) = (dy.as_ptr(), gate.as_ptr(), up.as_ptr());
        // SAFETY: all rows have n elements; whole + LANES > n.
        unsafe {
            for i in (0..whole).step_by(S::LANES) {
                let (of_gate, of_up) = silu_slopes::<S>(S::load(dy.add(i)), S::load(gate.add(i)), S::load(up.add(i)));
                S::store(d_gate.add(i), of_gate);
                S::store(d_up.add(i), of_up);
            }
            let rest = n - whole;
            if rest > 0 {
                let (dy, gate) = (S::load_part(dy.add(whole), rest), S::load_part(gate.add(whole), rest));
                let (of_gate, of_up) = silu_slopes::<S>(dy, gate, S::load_part(up.add(whole), rest));
                S::store_part(d_gate.add(whole), of_gate, rest);
                S::store_part(d_up.add(whole), of_up, rest);
            }
        }
    }
}

/// (dy·up·silu′(gate), dy·silu(gate))
#[inline(always)]
unsafe fn silu_slopes<S: Simd>(dy: S::V, gate: S::V, up: S::V) -> (S::V, S::V) {
    // SAFETY: the caller's.
    unsafe {
        let (sigma, slope) = swish_slope::<S>(gate, 1.0);
        (S::mul(S::mul(dy, up), slope), S::mul(dy, S::mul(gate, sigma)))
    }
}

/// d_gate = dy ⊙ up ⊙ silu′(gate), d_up = dy ⊙ silu(gate)
///
/// # Panics
/// If the rows differ in length.
pub fn silu_mul_backward_row(isa: Isa, [d_gate, d_up]: [&mut [f32]; 2], dy: &[f32], [gate, up]: [&[f32]; 2]) {
    isa.run(SiluMulBackward { d_gate, d_up, dy, gate, up });
}

/// dx = dy ⊙ gelu′(x)
///
/// # Panics
/// If the rows differ in length.
pub fn gelu_backward_row(isa: Isa, dx: &mut [f32], dy: &[f32], x: &[f32]) {
    isa.run(Row { y: dx, a: x, b: dy, f: PhantomData::<GeluBackward> });
}

/// dx = dy ⊙ quick_gelu′(x)
///
/// # Panics
/// If the rows differ in length.
pub fn quick_gelu_backward_row(isa: Isa, dx: &mut [f32], dy: &[f32], x: &[f32]) {
    isa.run(Row { y: dx, a: x, b: dy, f: PhantomData::<QuickGeluBackward> });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::reference::linear::erf as exact_erf;

    map!(Exp, x, _y, S => exp::<S>(x));

    fn apply<F: Map>(isa: Isa, x: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; x.len()];
        isa.run(Row { y: &mut y, a: x, b: x, f: PhantomData::<F> });
        y
    }

    /// Numbers across `range`, a length that no vector divides.
    fn across(low: f32, high: f32) -> Vec<f32> {
        (0..100_003).map(|i| low + (high - low) * i as f32 / 100_002.0).collect()
    }

    #[test]
    fn exp_is_within_2_ulp() {
        for isa in Isa::tested() {
            let x = across(-87.0, 88.7);
            for (x, y) in x.iter().zip(apply::<Exp>(isa, &x)) {
                let exact = f64::from(*x).exp();
                assert!(
                    (f64::from(y) - exact).abs() <= 2.0 * exact * f64::from(f32::EPSILON),
                    "{isa}: exp({x}) = {y}, exactly {exact}"
                );
            }
            let ends = apply::<Exp>(isa, &[0.0, f32::NEG_INFINITY, -200.0, 89.0, f32::INFINITY, f32::NAN, -100.0]);
            assert_eq!(ends[..5], [1.0, 0.0, 0.0, f32::INFINITY, f32::INFINITY], "{isa}");
            assert!(ends[5].is_nan() && ends[6] > 0.0 && ends[6] < f32::MIN_POSITIVE, "{isa}: {ends:?}");
        }
    }

    /// x·Φ(x) for x < −4, where 1 + erf has few digits even in f64: by the continued fraction of erfc.
    fn exact_gelu_tail(x: f64) -> Option<f64> {
        let z = -x / 2f64.sqrt();
        let fraction = (1..200).rev().fold(0.0, |f, n| f64::from(n) / 2.0 / (z + f));
        (x < -4.0).then(|| 0.5 * x * (-z * z).exp() / ((z + fraction) * std::f64::consts::PI.sqrt()))
    }

    #[test]
    fn activations() {
        for isa in Isa::tested() {
            let x = across(-20.0, 20.0);
            let up: Vec<f32> = x.iter().map(|x| x.cos()).collect();
            let (mut silu, mut quick) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            silu_mul_row(isa, &mut silu, &x, &up);
            quick_gelu_row(isa, &mut quick, &x);
            let mut exact_gelu = vec![0.0; x.len()];
            gelu_row(isa, &mut exact_gelu, &x);
            for i in 0..x.len() {
                let z = f64::from(x[i]);
                let close = |got: f32, exact: f64| (f64::from(got) - exact).abs() <= 3e-7 * exact.abs().max(1.0);
                assert!(close(silu[i], z / (1.0 + (-z).exp()) * f64::from(up[i])), "{isa}: silu({z}) = {}", silu[i]);
                assert!(close(quick[i], z / (1.0 + (-1.702 * z).exp())), "{isa}: quick_gelu({z}) = {}", quick[i]);
                let exact = 0.5 * z * (1.0 + exact_erf(z / 2f64.sqrt()));
                let tail = exact_gelu_tail(z).unwrap_or(exact);
                let error = (f64::from(exact_gelu[i]) - tail).abs();
                // The polynomial is fitted to erf: of erfc, far down the tail, it has four digits (measured: 6.5e-5 at −4.97).
                assert!(
                    close(exact_gelu[i], exact) && error <= 1e-10 + 1e-4 * tail.abs(),
                    "{isa}: gelu({z}) = {}, exactly {exact}",
                    exact_gelu[i]
                );
            }
        }
    }
}
