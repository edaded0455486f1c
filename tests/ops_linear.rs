//! `linear` on every device against naive f64: hostile shapes, all epilogues, several parts, sentinels around what it may write.

mod reference;
mod support;

use std::sync::Arc;

use half::f16;
use llava_engine::dtype::DType;
use llava_engine::ops::packed::Format;
use llava_engine::ops::{Epilogue, Matrix, Packed, Weight};
use llava_engine::tensor::Tensor;
use reference::linear::{linear as exact, naive_f32};
use reference::{Errors, random};
use support::devices::{TestDevice, devices, kernel_devices, kernel_devices_with, rounded};

/// Stands in the columns that must stay as they are; a value that every dtype holds.
const SENTINEL: f32 = 12288.0;

/// Rows of x and of the old y repeat after so many: their results must be the same to the last bit, wherever in a tile they stand. It
/// divides no size of a tile, so that a row in the wrong place is noticed.
const PERIOD: usize = 7;

/// Results that the naive op's error is taken from, at least.
const MIN_SAMPLE: usize = 128;

const EPILOGUES: [(Epilogue, &str); 4] =
    [(Epilogue::Store, "store"), (Epilogue::Add, "add"), (Epilogue::QuickGelu, "quick_gelu"), (Epilogue::Gelu, "gelu")];

/// One product to test.
#[derive(Clone, Debug)]
struct Case {
    tokens: usize,
    parts: Vec<usize>,
    k: usize,
    epilogue: (Epilogue, &'static str),
    bias: bool,
    /// Whether y is f32, whatever the activations are.
    y_f32: bool,
    /// Columns of y before and after those that are written.
    margin: (usize, usize),
    /// How W is packed, if it is.
    format: Option<Format>,
    /// Whether x is rounded to 8 bits, and W is not rounded to x's dtype.
    w8a8: bool,
}

impl Case {
    fn new(tokens: usize, n: usize, k: usize) -> Self {
        Self {
            tokens,
            parts: vec![n],
            k,
            epilogue: EPILOGUES[0],
            bias: false,
            y_f32: false,
            margin: (0, 0),
            format: None,
            w8a8: false,
        }
    }

    /// The same with some choice of everything but the size; numbers from 0 on run through all of them.
    fn variant(mut self, i: usize) -> Self {
        let n = self.parts.iter().sum::<usize>();
        self.epilogue = EPILOGUES[i % 4];
        self.bias = i / 2 % 2 == 1;
        self.y_f32 = i % 3 == 1;
        self.margin = [(0, 0), (5, 3), (16, 0), (0, 8), (8, 8)][i % 5];
        if i % 7 < 3 && n > 2 {
            self.parts = vec![n / 3, 1, n - n / 3 - 1];
        }
        self
    }

    fn weight(&self, device: &TestDevice) -> Weight {
        let part = |(i, &n): (usize, &usize)| match self.format {
            None => Matrix::Dense(Arc::new(device.put(&[n, self.k], &random(n * self.k, 7 + i as u64)))),
            Some(format) => Matrix::Packed(Arc::new(packed(device, n, self.k, format, 7 + i as u64))),
        };
        let mut w = Weight::of(self.parts.iter().enumerate().map(part).collect()).unwrap();
        w.first_col = self.margin.0;
        w
    }

    /// Runs it and checks the error, that equal rows are equal, and the columns around the result.
    fn check(&self, device: &TestDevice) {
        let what = format!("{self:?} on {}", device.name);
        let (k, tokens, distinct) = (self.k, self.tokens, self.tokens.min(PERIOD));
        let n = self.parts.iter().sum::<usize>();
        let y_stride = self.margin.0 + n + self.margin.1;
        let y_dtype = if self.y_f32 { DType::F32 } else { device.dtype };
        let repeated = |rows: &[f32], width: usize| rows.iter().copied().cycle().take(tokens * width).collect::<Vec<_>>();
        // Few results may be near the exact ones by chance, or all near zero: errors are those of a sample, which the naive op fills up.
        let n_sample = distinct.max(MIN_SAMPLE.div_ceil(n));
        let x_sample = random(n_sample * k, 1);
        let old_sample: Vec<f32> = random(n_sample * n, 2).into_iter().map(|v| rounded(v, y_dtype)).collect();
        let (x, old) = (&x_sample[..distinct * k], &old_sample[..distinct * n]);
        let bias = self.bias.then(|| random(n, 3));

        let mut y = vec![SENTINEL; tokens * y_stride];
        for (y, old) in y.chunks_mut(y_stride).zip(repeated(old, n).chunks(n)) {
            y[self.margin.0..][..n].copy_from_slice(old);
        }
        let mut y = device.ops.upload(Tensor::from_slice(&[tokens, y_stride], &y).converted(y_dtype)).unwrap();
        let w = self.weight(device);
        let bias_tensor = bias.as_deref().map(|b| device.put_f32(&[n], b));
        let x_tensor = device.put(&[tokens, k], &repeated(x, k));
        let done = device.ops.linear(&mut y, &x_tensor, &w, bias_tensor.as_ref(), self.epilogue.0);
        done.unwrap_or_else(|e| panic!("{what}: {e}"));

        let mut result: Vec<f32> = Vec::new();
        for (row, y) in device.get(&y).chunks(y_stride).enumerate() {
            let (before, rest) = y.split_at(self.margin.0);
            let (r, after) = rest.split_at(n);
            assert!(before.iter().chain(after).all(|&s| s == SENTINEL), "{what}: row {row} was written beside the result");
            if row < distinct {
                result.extend_from_slice(r);
            } else {
                assert_eq!(r, &result[row % PERIOD * n..][..n], "{what}: row {row} differs from an equal one");
            }
        }
        let mut x = device.round(&x_sample);
        let mut weights: Vec<f32> = w.parts.iter().flat_map(|part| device.matrix(part)).collect();
        match self.format {
            Some(format) if self.w8a8 => x.chunks_mut(format.group).for_each(round_to_8_bits),
            _ => weights = device.round(&weights),
        }
        let exact = exact(&x, &weights, bias.as_deref(), &old_sample, k, self.epilogue.1);
        let naive = naive_f32(&x, &weights, bias.as_deref(), &old_sample, k, self.epilogue.1);
        let naive: Vec<f32> = naive.into_iter().map(|v| rounded(v, y_dtype)).collect();
        result.extend_from_slice(&naive[result.len()..]);
        Errors::of(&result, &exact).check_twice(Errors::of(&naive, &exact), &what);
    }
}

/// Any integers, with scales that make weights about as large as x.
fn packed(device: &TestDevice, n: usize, k: usize, format: Format, seed: u64) -> Packed {
    let (words_shape, scales_shape) = (format.words_shape(n, k), format.scales_shape(n, k));
    let bits = |x: f32| (f64::from(x) * f64::from(i32::MAX)) as i32;
    let n_words = words_shape.iter().product();
    // The product of two, lest low bits be those of f32.
    let words =
        random(n_words, seed).into_iter().zip(random(n_words, seed + 50)).map(|(a, b)| bits(a) ^ bits(b) << 13).collect::<Vec<_>>();
    let largest = (1 << (format.bits - 1)) as f32;
    let scales: Vec<f32> = random(scales_shape.iter().product(), seed + 60).iter().map(|s| (0.5 + s.abs()) / largest).collect();
    let halves = |values: Vec<f32>| Tensor::from_slice(&scales_shape, &values.into_iter().map(f16::from_f32).collect::<Vec<_>>());
    // Weights around zero, and all of one sign, down to offsets that are nothing beside the scale.
    let of_scale = [0.6 - largest, -1.3, 0.01, 0.6 - largest, 0.0];
    let offsets = format.has_offsets.then(|| halves(scales.iter().zip(of_scale.iter().cycle()).map(|(s, o)| s * o).collect()));
    let packed = Packed::new(n, k, Tensor::from_slice(&words_shape, &words), halves(scales), offsets).unwrap();
    let up = |t: &Tensor| {
        let mut copy = Tensor::zeros(t.shape(), t.dtype());
        copy.as_mut_bytes().copy_from_slice(t.as_bytes());
        device.ops.upload(copy)
    };
    packed.map(up).unwrap()
}

/// Packed weights of every format on the kernels, which multiply them as numbers of the device's dtype. (Those of the CPU round x as well:
/// src/cpu/matmul_packed_tests.rs.)
#[test]
fn packed_weights() {
    for device in kernel_devices() {
        let mut i = 0;
        for (bits, group, has_offsets) in
            [(4, 32, false), (4, 64, true), (4, 128, false), (4, 128, true), (8, 32, false), (8, 128, false)]
        {
            let format = Some(Format::new(bits, group, has_offsets).unwrap());
            for tokens in [1, 2, 5, 8, 9, 17, 64, 111] {
                for (n, k) in [(1, group), (16, 3 * group), (111, 1152), (37, 640)] {
                    Case { format, ..Case::new(tokens, n, k).variant(i) }.check(&device);
                    i += 1;
                }
            }
        }
    }
}

/// Around the sizes of vectors, warps and tiles, and far from all of them.
#[test]
fn hostile_shapes() {
    for device in devices() {
        let mut i = 0;
        for tokens in [1, 2, 3, 7, 8, 9, 17, 111] {
            for n in [1, 2, 5, 9, 111, 130] {
                for k in [1, 3, 8, 17, 64, 111, 577] {
                    Case::new(tokens, n, k).variant(i).check(&device);
                    i += 1;
                }
            }
        }
    }
}

/// With as many steps along k as there are stages: the last reads are of the memory that the end of the kernel uses otherwise.
#[test]
fn every_variant() {
    for device in devices() {
        for i in 0..60 {
            Case::new([3, 33][i / 4 % 2], 75, 192).variant(i).check(&device);
        }
    }
}

/// Few tiles and a long k: several blocks make one sum. Twice, for what the first may have left behind.
#[test]
fn split_sums() {
    for device in devices() {
        for (i, (tokens, n, k)) in
            [(9, 64, 1024), (70, 65, 1032), (70, 65, 1032), (65, 33, 1999), (12, 40, 960)].into_iter().enumerate()
        {
            Case::new(tokens, n, k).variant(i).check(&device);
        }
    }
}

/// So much of y that tiles are large, with tails in both directions, as k % 8 allows vectors and as it does not.
#[test]
fn large_tiles() {
    for device in kernel_devices() {
        // src/cuda/dense.rs tests that these are large enough.
        let (tokens, n) = if device.dtype == DType::F32 { (257, 1100) } else { (577, 1700) };
        for (i, k) in [72, 41].into_iter().enumerate() {
            Case::new(tokens, n, k).variant(i).check(&device);
        }
    }
}

/// The same with large tiles, with tails in both directions and of the last step.
#[test]
fn large_tiles_of_packed_weights() {
    for device in kernel_devices() {
        // src/cuda/packed.rs tests that these are large enough.
        let (tokens, n) = if device.dtype == DType::F32 { (257, 1100) } else { (577, 1700) };
        for (i, (bits, has_offsets)) in [(4, true), (8, false)].into_iter().enumerate() {
            let format = Some(Format::new(bits, 32, has_offsets).unwrap());
            Case { format, ..Case::new(tokens, n, 96) }.variant(i + 2).check(&device);
        }
    }
}

/// More parts than a launch takes, some of them of one row: each has its own tiles and columns.
#[test]
fn many_parts() {
    for device in devices() {
        for (i, tokens) in [1, 9, 70].into_iter().enumerate() {
            let case = Case { parts: vec![5, 130, 1, 64, 17], bias: i % 2 == 0, margin: (3, 5), ..Case::new(tokens, 1, 40) };
            case.check(&device);
            if device.ops.weight_dtype().is_some() {
                let format = Some(Format::new(4, 32, i == 1).unwrap());
                Case { k: 96, format, ..case }.check(&device);
            }
        }
    }
}

/// A group of x as products with 8-bit activations take it: whole multiples of a 127th of its largest.
fn round_to_8_bits(group: &mut [f32]) {
    let scale = group.iter().fold(0.0, |m: f32, x| m.max(x.abs())) / 127.0;
    group.iter_mut().for_each(|x| *x = (*x * (1.0 / scale)).round_ties_even() * scale);
}

/// 8-bit weights and activations: but for the rounding of x, which is known, results are as exact as f32 sums are.
#[test]
fn w8a8() {
    for device in kernel_devices_with(true) {
        let mut i = 0;
        for group in [32, 64, 128] {
            let format = Some(Format::new(8, group, false).unwrap());
            // One token more than gemv_packed.cu takes, tiles that are not full, one row of W, one group; more steps of k than stages.
            for (tokens, n, groups) in [(9, 3, 1), (9, 17, 5), (64, 64, 2), (65, 130, 3), (16, 1, 11), (130, 33, 7)] {
                Case { format, w8a8: true, ..Case::new(tokens, n, group * groups) }.variant(i).check(&device);
                i += 1;
            }
        }
        // Large tiles, and many splits.
        let case = |tokens, n, k, group| Case {
            format: Some(Format::new(8, group, false).unwrap()),
            w8a8: true,
            ..Case::new(tokens, n, k)
        };
        case(300, 700, 96, 32).variant(1).check(&device);
        case(9, 16, 2176, 128).check(&device);
        // Others are as they are without: few tokens, 4 bits.
        Case { w8a8: false, ..case(8, 19, 64, 32) }.check(&device);
        Case { format: Some(Format::new(4, 32, false).unwrap()), ..Case::new(9, 19, 64) }.check(&device);
    }
}

/// The integers are those of the CPU: in f32, results differ by the order of a few sums. What is not finite stays in its row.
#[test]
fn w8a8_is_the_cpus_product() {
    let Some(kernels) = kernel_devices_with(true).into_iter().find(|device| device.dtype == DType::F32) else { return };
    let [cpu, ..] = &devices()[..] else { unreachable!("the CPU is a device") };
    let (tokens, n, k) = (23, 37, 1152);
    let mut x = random(tokens * k, 5);
    x[4 * k..5 * k].fill(0.0);
    x[7 * k + 130] = f32::NAN;
    x[8 * k + 1151] = f32::INFINITY;
    // A group of numbers that have no scale.
    x[9 * k..9 * k + 128].fill(1e-41);
    let results = [cpu, &kernels].map(|device| {
        let w = Weight::of(vec![Matrix::Packed(Arc::new(packed(device, n, k, Format::new(8, 128, false).unwrap(), 3)))]).unwrap();
        let mut y = device.blank(&[tokens, n]);
        device.ops.linear(&mut y, &device.put(&[tokens, k], &x), &w, None, Epilogue::Store).unwrap();
        device.get(&y)
    });
    let [expected, got] = results;
    for (row, (expected, got)) in expected.chunks(n).zip(got.chunks(n)).enumerate() {
        if row == 7 || row == 8 {
            assert!(got.iter().all(|y| y.is_nan()), "row {row}: {got:?}");
            continue;
        }
        for (expected, got) in expected.iter().zip(got) {
            // The CPU takes 128·Σp apart, so that it adds 18 terms of some tens; an integer off by one makes 5e-3.
            assert!((expected - got).abs() <= 1e-4, "row {row}: {got}, not {expected}");
        }
    }
}

/// Rows of a packed table are what its integers mean, rounded once: the reference is `Packed::to_f32`.
#[test]
fn packed_tables() {
    for device in devices() {
        for (bits, group, has_offsets, hidden) in
            [(8, 32, false, 32), (8, 128, false, 1152), (4, 64, false, 192), (4, 32, false, 96), (4, 32, true, 160)]
        {
            let format = Format::new(bits, group, has_offsets).unwrap();
            let table = Matrix::Packed(Arc::new(packed(&device, 35, hidden, format, 3)));
            let ids = [34, 0, 16, 15, 16];
            let mut y = device.blank(&[ids.len(), hidden]);
            device.ops.embed(&mut y, &table, &ids).unwrap();
            let values = device.matrix(&table);
            let expected = ids.iter().flat_map(|&id| &values[id as usize * hidden..][..hidden]);
            for (i, (got, expected)) in device.get(&y).into_iter().zip(expected).enumerate() {
                // On kernels, an offset that is small beside the scale loses 2^-20 of that (kernels/packed.cuh); scales are below 0.2 here.
                let is_exact = !has_offsets || device.name.starts_with("cpu");
                let bound = if is_exact { 0.0 } else { 2e-7 + device.epsilon() as f32 * expected.abs() };
                let expected = rounded(*expected, device.dtype);
                assert!((got - expected).abs() <= bound, "{format}, {i} on {}: {got}, not {expected}", device.name);
            }
            device.ops.embed(&mut device.blank(&[0, hidden]), &table, &[]).unwrap();
            let error = device.ops.embed(&mut device.blank(&[1, hidden]), &table, &[35]).unwrap_err().to_string();
            assert_eq!(error, "embed: token id is 35, expected \"below 35\"");
            let error = device.ops.embed(&mut device.blank(&[1, hidden + 1]), &table, &[3]).unwrap_err().to_string();
            assert!(error.contains("embed: y is"), "{error}");
        }
    }
}

#[test]
fn no_tokens() {
    for device in devices() {
        let case = Case::new(0, 4, 4);
        let mut y = device.put(&[0, 4], &[]);
        device.ops.linear(&mut y, &device.put(&[0, 4], &[]), &case.weight(&device), None, Epilogue::Store).unwrap();
        let packed = Case { format: Some(Format::new(4, 32, false).unwrap()), ..Case::new(0, 4, 32) };
        device.ops.linear(&mut y, &device.put(&[0, 32], &[]), &packed.weight(&device), None, Epilogue::Store).unwrap();
        // It is now that launches are made.
        assert!(device.get(&y).is_empty());
    }
}

/// Sums of nothing: the bias is left.
#[test]
fn no_terms() {
    for device in kernel_devices() {
        for tokens in [2, 9] {
            let mut y = device.ops.alloc(&[tokens, 3], device.dtype).unwrap();
            let w = Weight::stacked(vec![Arc::new(device.put(&[3, 0], &[]))]).unwrap();
            let bias = device.put_f32(&[3], &[1.0, 2.0, 3.0]);
            device.ops.linear(&mut y, &device.put(&[tokens, 0], &[]), &w, Some(&bias), Epilogue::Store).unwrap();
            assert_eq!(device.get(&y), [1.0, 2.0, 3.0].repeat(tokens), "{tokens} tokens on {}", device.name);
        }
    }
}

#[test]
fn other_dtypes_are_refused() {
    for device in kernel_devices().into_iter().filter(|d| d.dtype != DType::F32) {
        let (mut y, x) = (device.put(&[2, 4], &[0.0; 8]), device.put(&[2, 3], &[0.0; 6]));
        let w = Case::new(2, 4, 3).weight(&device);
        let f32s = |shape: &[usize]| device.put_f32(shape, &vec![0.0; shape.iter().product()]);
        let error = device.ops.linear(&mut y, &f32s(&[2, 3]), &w, None, Epilogue::Store).unwrap_err();
        assert!(error.to_string().contains("dtype of x"), "{error}");
        let half_bias = device.put(&[4], &[0.0; 4]);
        let error = device.ops.linear(&mut y, &x, &w, Some(&half_bias), Epilogue::Store).unwrap_err();
        assert!(error.to_string().contains("dtype of bias"), "{error}");
        let f32_weight = Weight::stacked(vec![Arc::new(f32s(&[4, 3]))]).unwrap();
        let error = device.ops.linear(&mut y, &x, &f32_weight, None, Epilogue::Store).unwrap_err();
        assert!(error.to_string().contains("dtype of W"), "{error}");
        let wrong_half = if device.dtype == DType::F16 { DType::Bf16 } else { DType::F16 };
        let mut y = device.ops.alloc(&[2, 4], wrong_half).unwrap();
        let error = device.ops.linear(&mut y, &x, &w, None, Epilogue::Store).unwrap_err();
        assert!(error.to_string().contains("dtype of y"), "{error}");
    }
}
