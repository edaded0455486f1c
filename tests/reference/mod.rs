//! Naive implementations in f64, with no cleverness, that the devices are tested against; and the bound of their errors.
#![allow(dead_code)] // each test crate uses some of it

pub mod attention;
pub mod gradient;
pub mod linear;
pub mod rows;

/// Numbers that look random, in −1..1, the same for the same seed.
pub fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
    let mut next = || {
        // SplitMix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) >> 40
    };
    (0..n).map(|_| next() as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// How far a result is from the exact one.
#[derive(Clone, Copy, Debug)]
pub struct Errors {
    /// Largest |got − exact|.
    pub max: f64,
    /// Σ (got − exact)² / Σ exact²
    pub nmse: f64,
    /// Largest |exact|.
    pub scale: f64,
}

impl Errors {
    /// Of a result that must be finite.
    pub fn of(got: &[f32], exact: &[f64]) -> Self {
        assert_eq!(got.len(), exact.len());
        let mut errors = Self { max: 0.0, nmse: 0.0, scale: 0.0 };
        let mut square = 0.0;
        for (i, (&got, &exact)) in got.iter().zip(exact).enumerate() {
            assert!(got.is_finite(), "element {i} is {got}, exactly {exact}");
            let error = (f64::from(got) - exact).abs();
            errors.max = errors.max.max(error);
            errors.nmse += error * error;
            errors.scale = errors.scale.max(exact.abs());
            square += exact * exact;
        }
        errors.nmse /= square.max(f64::MIN_POSITIVE);
        errors
    }

    /// Checks that these are at most twice the errors of the naive operation in f32, or 3 units in the last place of the largest value,
    /// where that one happens to be exact.
    pub fn check_twice(self, naive: Self, what: &str) {
        self.check_twice_rounded(naive, 0.0, what);
    }

    /// The same for results in a shorter dtype, `naive` rounded to it too. `epsilon` is the distance from 1 to its next number (0: the
    /// result is f32); one rounding, half of that, is allowed beside the rest, where the naive result happens to be one of its numbers.
    pub fn check_twice_rounded(self, naive: Self, epsilon: f64, what: &str) {
        let slack = 3.0 * f64::from(f32::EPSILON) + epsilon / 2.0;
        let max = 2.0 * naive.max + slack * self.scale;
        let nmse = 4.0 * naive.nmse + slack * slack;
        assert!(self.max <= max && self.nmse <= nmse, "{what}: {self:?}, naive: {naive:?}");
    }
}
