//! What [`Ops::sample`](super::Ops::sample) draws: a definition in integers, so that every device draws the same token from the same logits.
//!
//! Each token gets a [`weight`], a whole number that is proportional to its probability. All decisions after that are comparisons and sums
//! of whole numbers, which have no rounding and therefore no order: threads may share a row as they like.
//!
//! Weights also say which of two tokens is the more probable one; of equal ones the lower index comes first. A filter is a cut in this
//! order, and of several filters the narrowest cut holds. The draw takes the first token, by index, at which the running sum of the
//! weights that are left exceeds `random`'s share of their total.

/// The largest weight, that of the most probable token.
///
/// 30 bits are more than f32 logits can tell apart near the top, and what is below 2⁻³⁰ of the most probable token is never drawn: in a
/// vocabulary of 32000 that takes at most 3·10⁻⁵ of the probability away. Sums of 2³⁰ weights still fit 64 bits.
pub const MAX_WEIGHT: u32 = (1 << WEIGHT_BITS) - 1;

const WEIGHT_BITS: u32 = 30;

/// (2^−f − 1)/f on 0..1, lowest power first: interpolated at Chebyshev nodes; 10⁻⁸ off, less than f32 rounds.
const EXP2: [f32; 6] = [-std::f32::consts::LN_2, 0.240_226_09, -0.055_499_23, 0.009_597_035, -0.001_291_636_8, 0.000_114_919_95];

/// How the token after one row of logits is chosen. The filters work in the order of the fields, as in HF's `generate`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Divides positive and multiplies other logits of tokens that have occurred; 1 changes none (Keskar et al., arXiv 1909.05858).
    pub repetition_penalty: f32,
    /// Divides the logits; 0, and what is so small that it has no inverse in f32, takes the first of the largest.
    pub temperature: f32,
    /// Keeps this many of the most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest of the most probable tokens that together reach this share of what top-k has kept; 1 keeps all.
    pub top_p: f32,
    /// Drops tokens less probable than this share of the most probable one; 0 drops none.
    pub min_p: f32,
    /// 64 random bits: a uniform share of the weights that are left.
    pub random: u64,
}

impl Draw {
    /// log₂(e)/temperature, by which differences of logits become powers of two; infinite where the largest logit is to be taken.
    pub fn scale(&self) -> f32 {
        std::f32::consts::LOG2_E / self.temperature
    }

    /// The smallest weight that min-p keeps.
    pub fn min_weight(&self) -> u32 {
        (f64::from(self.min_p) * f64::from(MAX_WEIGHT)).ceil().min(f64::from(MAX_WEIGHT)) as u32
    }

    /// top-p as a fraction of 2⁶⁴, at least 1; 0 where it keeps all.
    pub fn top_p_bits(&self) -> u64 {
        if self.top_p < 1.0 { ((f64::from(self.top_p) * 2f64.powi(64)) as u64).max(1) } else { 0 }
    }
}

/// l / penalty if l > 0, else l·penalty.
pub fn penalized(logit: f32, penalty: f32) -> f32 {
    if logit > 0.0 { logit / penalty } else { logit * penalty }
}

/// ⌊2^(30 − t)⌋, at most [`MAX_WEIGHT`], t = (max − logit)·scale.
///
/// f32 operations in this order, each rounded to nearest: none may be fused with the next, or devices differ.
pub fn weight(logit: f32, max: f32, scale: f32) -> u32 {
    // Infinite ones are equal too, and have no difference.
    let t = if logit == max { 0.0 } else { (max - logit) * scale };
    let t = t.min(WEIGHT_BITS as f32 + 1.0); // gives 0, as does NaN: 0·∞, of two infinite extremes
    let octaves = t as i32;
    let f = t - octaves as f32;
    let q = EXP2.iter().rev().fold(0.0, |q, &c| q * f + c);
    let power = f32::from_bits(((127 + WEIGHT_BITS as i32 - octaves) as u32) << 23); // 2^(30 − octaves)
    (((q * f + 1.0) * power) as u32).min(MAX_WEIGHT)
}

/// ⌊share·total / 2⁶⁴⌋
pub fn share_of(total: u64, share: u64) -> u64 {
    ((u128::from(total) * u128::from(share)) >> 64) as u64
}

/// The least sum that top-p accepts: ⌈share·total / 2⁶⁴⌉
pub fn reaches(total: u64, share: u64) -> u64 {
    ((u128::from(total) * u128::from(share)).div_ceil(1 << 64)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// e^((l − max)/T)·2³⁰ in f64, within the rounding of t and of 2^−f.
    #[test]
    fn weights_are_the_exponential() {
        for (max, temperature) in [(0.0f32, 1.0f32), (17.3, 0.2), (-5.0, 3.0), (1e4, 50.0)] {
            let scale = Draw { temperature, ..GREEDY }.scale();
            let mut previous = MAX_WEIGHT;
            for i in 0..200_000 {
                let logit = max - i as f32 * 1.2e-4 * temperature;
                let t = (f64::from(max) - f64::from(logit)) / f64::from(temperature) * std::f64::consts::LOG2_E;
                let exact = (30.0 - t).exp2();
                let w = weight(logit, max, scale);
                assert!((f64::from(w) - exact).abs() <= 1.0 + exact * (4e-7 + t * 2e-7), "{logit} of {max}: {w}, exactly {exact}");
                assert!(w == 0 || exact > 0.999, "{logit} of {max} can be drawn: {w}, exactly {exact}");
                assert!(f64::from(w) <= f64::from(previous) * (1.0 + 4e-7) && w <= MAX_WEIGHT);
                previous = w;
            }
        }
    }

    #[test]
    fn weights_of_extremes_are_in_range() {
        let (inf, most) = (f32::INFINITY, f32::MAX);
        for scale in [0.0, f32::MIN_POSITIVE, 1.0, most, inf] {
            for max in [-inf, -most, 0.0, most, inf] {
                assert_eq!(weight(max, max, scale), MAX_WEIGHT);
                for logit in [-inf, -most, -1.0, 0.0, most].into_iter().filter(|&l| l < max) {
                    let w = weight(logit, max, scale);
                    assert!(logit > -inf || w == 0, "-inf of {max} by {scale}: {w}");
                    assert!(w <= MAX_WEIGHT && (scale < 1.0 || w <= 1 << 29), "{logit} of {max} by {scale}: {w}");
                }
            }
        }
    }

    #[test]
    fn bounds_are_what_they_say() {
        let draw = |top_p, min_p| Draw { top_p, min_p, ..GREEDY };
        assert_eq!([draw(1.0, 0.0).top_p_bits(), draw(0.5, 0.0).top_p_bits(), draw(1e-45, 0.0).top_p_bits()], [0, 1 << 63, 1]);
        assert_eq!(
            [draw(1.0, 0.0).min_weight(), draw(1.0, 0.5).min_weight(), draw(1.0, 1.0).min_weight()],
            [0, 1 << 29, MAX_WEIGHT]
        );
        assert_eq!([reaches(10, 1 << 63), reaches(11, 1 << 63), reaches(11, 1)], [5, 6, 1]);
        assert_eq!([share_of(10, u64::MAX), share_of(10, 0), share_of(1, u64::MAX)], [9, 0, 0]);
        assert!(GREEDY.scale().is_infinite());
    }

    const GREEDY: Draw = Draw { repetition_penalty: 1.0, temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, random: 0 };
}
