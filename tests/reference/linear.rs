//! y = epilogue(x·Wᵀ + bias)

/// Of x `[tokens, k]`, W `[n, k]`, bias `[n]`, old y `[tokens, n]`, in f64.
pub fn linear(x: &[f32], w: &[f32], bias: Option<&[f32]>, old: &[f32], k: usize, epilogue: &str) -> Vec<f64> {
    let n = w.len() / k;
    let mut y = Vec::new();
    for (x, old) in x.chunks(k).zip(old.chunks(n)) {
        for j in 0..n {
            let dot: f64 = (0..k).map(|i| f64::from(x[i]) * f64::from(w[j * k + i])).sum();
            let r = dot + bias.map_or(0.0, |b| f64::from(b[j]));
            y.push(match epilogue {
                "store" => r,
                "add" => r + f64::from(old[j]),
                "quick_gelu" => quick_gelu(r),
                "gelu" => gelu(r),
                _ => panic!("{epilogue}"),
            });
        }
    }
    y
}

/// x·σ(1.702 x)
pub fn quick_gelu(x: f64) -> f64 {
    x / (1.0 + (-1.702 * x).exp())
}

/// x·Φ(x)
pub fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + erf(x / 2f64.sqrt()))
}

/// The same in f32, one operation after the other.
pub fn naive_f32(x: &[f32], w: &[f32], bias: Option<&[f32]>, old: &[f32], k: usize, epilogue: &str) -> Vec<f32> {
    let n = w.len() / k;
    let mut y = Vec::new();
    for (x, old) in x.chunks(k).zip(old.chunks(n)) {
        for j in 0..n {
            let dot = (0..k).fold(0.0, |sum, i| sum + x[i] * w[j * k + i]);
            let r = dot + bias.map_or(0.0, |b| b[j]);
            y.push(match epilogue {
                "store" => r,
                "add" => r + old[j],
                "quick_gelu" => r / (1.0 + (-1.702 * r).exp()),
                "gelu" => 0.5 * r * (1.0 + erf(f64::from(r) / 2f64.sqrt()) as f32),
                _ => panic!("{epilogue}"),
            });
        }
    }
    y
}

/// The error function: its series near zero, the continued fraction of erfc (Lentz) beyond.
pub fn erf(x: f64) -> f64 {
    if x.abs() < 2.5 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        return sum * std::f64::consts::FRAC_2_SQRT_PI;
    }
    let z = x.abs();
    let fraction = (1..200).rev().fold(0.0, |f, n| f64::from(n) / 2.0 / (z + f));
    (1.0 - (-z * z).exp() / ((z + fraction) * std::f64::consts::PI.sqrt())).copysign(x)
}
