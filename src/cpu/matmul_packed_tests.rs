//! `linear` with packed weights against the equation of matmul_packed.rs in f64, and against x as it was before it was rounded.

use super::matmul::Output;
use super::matmul_packed::linear;
use super::pool::Pool;
use super::reference::random;
use super::simd::Isa;
use crate::dtype::DType;
use crate::ops::packed::{Format, GROUPS};
use crate::ops::{Epilogue, Packed};
use crate::tensor::Tensor;

const SENTINEL: f32 = 12345.678;

/// A matrix of any integers, with scales of one size and of both signs.
fn packed(n: usize, k: usize, format: Format, seed: u64) -> Packed {
    let (words, scales) = (format.words_shape(n, k), format.scales_shape(n, k));
    let numbers = |shape: &[usize], seed| random(shape.iter().product(), seed);
    let ints: Vec<i32> = numbers(&words, seed).iter().map(|x| x.to_bits().wrapping_mul(2_654_435_769) as i32).collect();
    let halves = |seed| Tensor::from_slice(&scales, &numbers(&scales, seed)).converted(DType::F16);
    let offsets = format.has_offsets.then(|| halves(seed + 2));
    Packed::new(n, k, Tensor::from_slice(&words, &ints), halves(seed + 1), offsets).unwrap()
}

/// p and a of a row of x, as the equation has them.
fn rounded(x: &[f32], group: usize) -> Vec<f64> {
    let of_group = |x: &[f32]| {
        let a = x.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
        let inverse = if a > 0.0 { 1.0 / a } else { 0.0 };
        x.iter().map(move |v| f64::from((v * inverse).round_ties_even()) * f64::from(a)).collect::<Vec<_>>()
    };
    x.chunks(group).flat_map(of_group).collect()
}

fn check(isa: Isa, tokens: usize, parts: &[usize], k: usize, format: Format) {
    let what = format!("{tokens} x {parts:?} x {k}, {format:?} on {isa}");
    let weights: Vec<_> = parts.iter().enumerate().map(|(i, &n)| packed(n, k, format, 10 * i as u64)).collect();
    let refs: Vec<_> = weights.iter().collect();
    let (n, margin) = (parts.iter().sum::<usize>(), 3);
    let y_stride = n + 2 * margin;
    let (x, bias) = (random(tokens * k, 5), random(n, 6));
    let run = |pool: &Pool, tokens: usize| {
        let mut y = vec![SENTINEL; tokens * y_stride];
        linear(isa, pool, Output::new(&mut y, y_stride, margin, Some(&bias), Epilogue::Store), &x[..tokens * k], tokens, &refs);
        y
    };
    let y = run(&Pool::new(2), tokens);
    assert_eq!(y, run(&Pool::new(1), tokens), "{what}: another number of threads");
    let fewer = tokens.div_ceil(2);
    assert_eq!(y[..fewer * y_stride], run(&Pool::new(2), fewer), "{what}: fewer rows");

    let w: Vec<f32> = weights.iter().flat_map(Packed::to_f32).collect();
    let (mut error, mut square) = (0.0, 0.0);
    for (t, y) in y.chunks(y_stride).enumerate() {
        assert!(y[..margin].iter().chain(&y[margin + n..]).all(|&s| s == SENTINEL), "{what}: written beside the result");
        let row = &x[t * k..][..k];
        let p = rounded(row, format.group);
        for j in 0..n {
            let w = &w[j * k..][..k];
            let sum = |x: &dyn Fn(usize) -> f64| (0..k).map(|i| f64::from(w[i]) * x(i)).sum::<f64>() + f64::from(bias[j]);
            let size: f64 = (0..k).map(|i| (f64::from(w[i]) * p[i]).abs()).sum();
            let (exact, got) = (sum(&|i| p[i]), f64::from(y[margin + j]));
            // Of f32 sums over groups, and w in f32.
            assert!((got - exact).abs() <= 2e-6 * size + 1e-6, "{what}: [{t}, {j}] is {got}, expected {exact}");
            let unrounded = sum(&|i| f64::from(row[i]));
            error += (got - unrounded).powi(2);
            square += unrounded.powi(2);
        }
    }
    if tokens * n >= 100 {
        assert!((error / square).sqrt() < 0.012, "{what}: 8 bits of x cost {}", (error / square).sqrt());
    }
}

fn formats() -> Vec<Format> {
    let of = |bits, has_offsets| GROUPS.map(|group| Format::new(bits, group, has_offsets).unwrap());
    [of(4, false), of(4, true), of(8, false)].concat()
}

#[test]
fn hostile_shapes() {
    for isa in Isa::tested() {
        for format in formats() {
            for tokens in [1, 2, 3, 4, 5, 6, 7, 9, 13, 25] {
                for n in [1, 15, 16, 17, 33] {
                    check(isa, tokens, &[n], format.group * [1, 3][tokens % 2], format);
                }
            }
        }
    }
}

/// Several tasks and several parts, the last block of each with rows to spare.
#[test]
fn parts_and_tasks() {
    for isa in Isa::tested() {
        for (i, format) in formats().into_iter().enumerate() {
            check(isa, [1, 4, 20][i % 3], &[111, 3, 577], 1024, format);
        }
    }
}

/// Rows that are zero, huge, or no numbers: zeros stay exact, what is no number spreads over its row and no further.
#[test]
fn rows_at_the_limits() {
    let format = Format::new(4, 32, false).unwrap();
    for isa in Isa::tested() {
        let w = packed(16, 64, format, 1);
        let mut x = random(4 * 64, 2);
        x[..64].fill(0.0);
        x[64..128].iter_mut().for_each(|v| *v *= 1e30);
        x[130] = f32::NAN;
        let mut y = vec![0.0; 4 * 16];
        linear(isa, &Pool::new(1), Output::new(&mut y, 16, 0, None, Epilogue::Store), &x, 4, &[&w]);
        assert!(y[..16].iter().all(|&v| v == 0.0), "{isa}");
        assert!(y[16..32].iter().all(|v| v.is_finite() && v.abs() > 1e20), "{isa}");
        assert!(y[32..48].iter().all(|v| v.is_nan()), "{isa}");
        assert!(y[48..].iter().all(|v| v.is_finite()), "{isa}");
    }
}
