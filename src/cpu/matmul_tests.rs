//! `linear` against f64, on hostile shapes, with sentinels around what it may write.

use half::bf16;

use super::matmul::{Output, SKINNY, linear};
use super::pool::Pool;
use super::reference::linear::{linear as exact, naive_f32};
use super::reference::{Errors, random};
use super::simd::Isa;
use crate::dtype::DType;
use crate::ops::Epilogue;
use crate::tensor::Tensor;

const SENTINEL: f32 = 12345.678;

/// One product to test.
#[derive(Clone, Debug)]
struct Case {
    tokens: usize,
    parts: Vec<usize>,
    k: usize,
    dtype: DType,
    epilogue: Epilogue,
    bias: bool,
    /// Columns of y before and after those that are written.
    margin: (usize, usize),
}

impl Case {
    fn new(tokens: usize, n: usize, k: usize) -> Self {
        Self { tokens, parts: vec![n], k, dtype: DType::F32, epilogue: Epilogue::Store, bias: false, margin: (0, 0) }
    }

    fn weights(&self) -> Vec<Tensor> {
        let part = |(i, &n): (usize, &usize)| {
            let values = random(n * self.k, 7 + i as u64);
            Tensor::from_slice(&[n, self.k], &values).converted(self.dtype)
        };
        self.parts.iter().enumerate().map(part).collect()
    }

    /// Runs it and checks the error, the columns around the result, and that other threads and other rows change nothing.
    fn check(&self, isa: Isa) {
        let what = format!("{self:?} on {isa}");
        let parts = self.weights();
        let (n, k, tokens) = (self.parts.iter().sum::<usize>(), self.k, self.tokens);
        let y_stride = self.margin.0 + n + self.margin.1;
        let x = random(tokens * k, 1);
        let old = random(tokens * n, 2);
        let bias = self.bias.then(|| random(n, 3));

        let run = |pool: &Pool, tokens: usize| {
            let mut y = vec![SENTINEL; tokens * y_stride];
            for (y, old) in y.chunks_mut(y_stride).zip(old.chunks(n)) {
                y[self.margin.0..][..n].copy_from_slice(old);
            }
            let out = Output::new(&mut y, y_stride, self.margin.0, bias.as_deref(), self.epilogue);
            linear(isa, pool, out, &x[..tokens * k], tokens, &parts.iter().collect::<Vec<_>>());
            y
        };
        let y = run(&Pool::new(2), tokens);
        assert_eq!(y, run(&Pool::new(1), tokens), "{what}: another number of threads");
        let fewer = tokens - tokens / 3;
        if tokens > 1 && (fewer <= SKINNY) == (tokens <= SKINNY) {
            assert_eq!(y[..fewer * y_stride], run(&Pool::new(1), fewer), "{what}: fewer rows");
        }

        let mut result = Vec::new();
        for (row, y) in y.chunks(y_stride).enumerate() {
            let (before, rest) = y.split_at(self.margin.0);
            let (r, after) = rest.split_at(n);
            assert!(before.iter().chain(after).all(|&s| s == SENTINEL), "{what}: row {row} was written beside the result");
            result.extend_from_slice(r);
        }
        let epilogue = match self.epilogue {
            Epilogue::Store => "store",
            Epilogue::Add => "add",
            Epilogue::QuickGelu => "quick_gelu",
            Epilogue::Gelu => "gelu",
        };
        let weights: Vec<f32> = parts.iter().flat_map(Tensor::to_f32).collect();
        let exact = exact(&x, &weights, bias.as_deref(), &old, k, epilogue);
        let rounds_x = matches!(isa, Isa::Avx512Bf16 | Isa::WideBf16) && self.dtype == DType::Bf16 && tokens > SKINNY;
        let x = if rounds_x { x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect() } else { x };
        let naive = naive_f32(&x, &weights, bias.as_deref(), &old, k, epilogue);
        Errors::of(&result, &exact).check_twice(Errors::of(&naive, &exact), &what);
    }
}

#[test]
fn hostile_shapes() {
    for isa in Isa::tested() {
        for tokens in [1, 2, 3, 5, 7, 8, 9, 17] {
            for n in [1, 2, 5, 9, 17, 111] {
                for k in [1, 3, 7, 8, 17, 111, 577] {
                    Case::new(tokens, n, k).check(isa);
                }
            }
        }
    }
}

#[test]
fn every_height_of_a_tile() {
    for isa in Isa::tested() {
        for tokens in SKINNY + 1..SKINNY + 30 {
            Case::new(tokens, 33, 19).check(isa);
        }
    }
}

#[test]
fn several_blocks() {
    for isa in Isa::tested() {
        for (tokens, n, k) in [
            (577, 111, 989),
            (111, 577, 513),
            (989, 70, 300),
            (9, 989, 1025),
            (3, 989, 2051),
            (33, 1100, 300),
            (40, 1040, 600),
            (45, 33, 512),
        ] {
            for dtype in [DType::F32, DType::Bf16] {
                Case { dtype, bias: true, ..Case::new(tokens, n, k) }.check(isa);
            }
        }
    }
}

#[test]
fn dtypes_and_epilogues_and_parts() {
    for isa in Isa::tested() {
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            for epilogue in [Epilogue::Store, Epilogue::Add, Epilogue::QuickGelu, Epilogue::Gelu] {
                for tokens in [1, 2, 3, 4, 6, 8, 9, 33] {
                    for (bias, margin) in [(true, (0, 0)), (false, (5, 3)), (true, (16, 0))] {
                        let parts = vec![32, 7, 41];
                        Case { parts, dtype, epilogue, bias, margin, ..Case::new(tokens, 0, 77) }.check(isa);
                    }
                }
            }
        }
    }
}

#[test]
fn nothing_to_do() {
    let pool = Pool::new(2);
    let case = Case::new(0, 4, 4);
    let out = Output::new(&mut [], 4, 0, None, Epilogue::Store);
    linear(Isa::Scalar, &pool, out, &[], 0, &case.weights().iter().collect::<Vec<_>>());
}
