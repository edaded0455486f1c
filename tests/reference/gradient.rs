//! Gradients by finite differences of naive ops in f64.

use super::random;

/// Step of the differences: the four-point formula is off by about h⁴ = 1e-12 of the fifth derivative, and by 1e-16/h of rounding.
const H: f64 = 1e-3;

/// Up to so many elements are checked one by one; of more, sums over random directions, in which each element counts.
const MAX_ELEMENTS: usize = 128;
/// Such directions.
const N_DIRECTIONS: u64 = 2;

/// f′(0) by four points: (8·(f(h) − f(−h)) − (f(2h) − f(−2h)))/12h
pub fn slope(f: impl Fn(f64) -> f64) -> f64 {
    (8.0 * (f(H) - f(-H)) - (f(2.0 * H) - f(-2.0 * H))) / (12.0 * H)
}

/// How far a gradient may be off.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// Of its largest element.
    pub relative: f64,
    /// Beside that: the rounding of what has cancelled.
    pub abs: f64,
}

impl Tolerance {
    /// Of sums of `n` products in f32: roundings have random signs, and so come to about √n of them; and of results with an `epsilon`, the
    /// distance from 1 to the next number of a shorter dtype (0: f32).
    pub fn of_sums(n: usize, epsilon: f64) -> Self {
        Self { relative: epsilon + (4.0 + (n as f64).sqrt()) * f64::from(f32::EPSILON), abs: 0.0 }
    }

    /// The same with an absolute part.
    pub fn and_abs(self, abs: f64) -> Self {
        Self { abs, ..self }
    }

    /// Checks a gradient against an exact one, element by element.
    pub fn check(self, what: &str, got: &[f32], exact: &[f64]) {
        assert_eq!(got.len(), exact.len(), "{what}: number of elements");
        let scale = exact.iter().fold(0.0f64, |max, e| max.max(e.abs()));
        let limit = self.relative * scale + self.abs;
        for (i, (&got, exact)) in got.iter().zip(exact).enumerate() {
            // NaN compares false.
            let is_close = (f64::from(got) - exact).abs() <= limit;
            assert!(is_close, "{what}: element {i} is {got}, exactly {exact}; allowed are {limit:e} (largest: {scale})");
        }
    }

    /// Checks `got`, the gradient of `f` by its input number `i` at `at`, against differences of f: each element, or, of many, sums of them
    /// with random signs. An error of one element is as large in such a sum, while roundings come to √n of one.
    pub fn check_differences(self, what: &str, f: &dyn Fn(&[Vec<f64>]) -> f64, at: &[Vec<f64>], i: usize, got: &[f32]) {
        let n = at[i].len();
        assert_eq!(got.len(), n, "{what}: number of elements");
        let along = |direction: &dyn Fn(usize) -> f64| {
            slope(|h| {
                let mut moved = at.to_vec();
                moved[i].iter_mut().enumerate().for_each(|(j, x)| *x += h * direction(j));
                f(&moved)
            })
        };
        if n <= MAX_ELEMENTS {
            let exact: Vec<f64> = (0..n).map(|element| along(&|j| if j == element { 1.0 } else { 0.0 })).collect();
            return self.check(&format!("{what}, by differences"), got, &exact);
        }
        for seed in 0..N_DIRECTIONS {
            let signs: Vec<f64> = random(n, 900 + seed).iter().map(|r| f64::from(r.signum())).collect();
            let exact = along(&|j| signs[j]);
            let sum: f64 = got.iter().zip(&signs).map(|(&g, s)| f64::from(g) * s).sum();
            let limit =
                self.relative * got.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt() + self.abs * (n as f64).sqrt();
            let is_close = (sum - exact).abs() <= limit;
            assert!(is_close, "{what}: along direction {seed} it is {sum}, by differences {exact}; allowed are {limit:e}");
        }
    }
}

/// Numbers in f64.
pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

/// Σ a·b: a loss whose gradient by b is a.
pub fn dot(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(&a, b)| f64::from(a) * b).sum()
}
