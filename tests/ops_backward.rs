//! Gradients of products, against finite differences of the naive op in f64 and against the chain rule in f64; and that no number of threads
//! changes them. (Attention: ops_attention_backward.rs.)

mod reference;
mod support;

use std::sync::Arc;

use llava_engine::dtype::DType;
use llava_engine::ops::packed::Format;
use llava_engine::ops::{GradOps, Matrix, Packed, Update, Weight};
use llava_engine::tensor::Tensor;
use reference::gradient::{Tolerance, dot, wide};
use reference::random;
use support::devices::{Shared, TestDevice, check_repeatable, grad_devices};

type Device = TestDevice<dyn GradOps>;

/// The most products of a function that is evaluated again and again for its differences.
const MAX_DIFFERENCES: usize = 1 << 21;

/// How the parts of a weight are stored.
#[derive(Clone, Copy, Debug)]
enum Storage {
    Dense(DType),
    Packed(usize, usize, bool),
}

/// One linear layer to test.
#[derive(Clone, Debug)]
struct Linear {
    tokens: usize,
    parts: Vec<(usize, Storage)>,
    k: usize,
    /// Columns of dy before and after those of the weight. They hold NaN, and must not be read.
    margin: (usize, usize),
}

impl Linear {
    fn new(tokens: usize, n: usize, k: usize) -> Self {
        Self { tokens, parts: vec![(n, Storage::Dense(DType::F32))], k, margin: (0, 0) }
    }

    fn n(&self) -> usize {
        self.parts.iter().map(|(n, _)| n).sum()
    }

    /// The weight, with the numbers that it stands for.
    fn weight(&self, device: &Device) -> (Weight, Vec<f32>) {
        let (mut parts, mut values) = (Vec::new(), Vec::new());
        for (i, &(n, storage)) in self.parts.iter().enumerate() {
            let part = match storage {
                Storage::Dense(dtype) => {
                    let dtype = device.ops.weight_dtype().unwrap_or(dtype);
                    let part = Tensor::from_slice(&[n, self.k], &random(n * self.k, 7 + i as u64)).converted(dtype);
                    Matrix::Dense(Arc::new(device.ops.upload(part).unwrap()))
                }
                Storage::Packed(bits, group, has_offsets) => {
                    let format = Format::new(bits, group, has_offsets).unwrap();
                    Matrix::Packed(Arc::new(packed(device, n, self.k, format, 7 + i as u64)))
                }
            };
            values.extend(device.matrix(&part));
            parts.push(part);
        }
        let mut w = Weight::of(parts).unwrap();
        w.first_col = self.margin.0;
        (w, values)
    }

    fn check(&self, devices: &[Device]) {
        let (tokens, n, k, (before, after)) = (self.tokens, self.n(), self.k, self.margin);
        let stride = before + n + after;
        let mut exact = Shared::new();
        for device in devices {
            let what = format!("{self:?} on {}", device.name);
            let (w, w_values) = self.weight(device);
            let (x, dy_inner) = (device.round(&random(tokens * k, 1)), device.round(&random(tokens * n, 2)));
            let mut dy = vec![f32::NAN; tokens * stride];
            for (dy, inner) in dy.chunks_mut(stride).zip(dy_inner.chunks(n)) {
                dy[before..before + n].copy_from_slice(inner);
            }
            let (old_dx, old_dw) = (device.round(&random(tokens * k, 3)), random(n * k, 4));
            let old_db = random(n, 5);

            let (x_there, dy_there) = (device.put(&[tokens, k], &x), device.put(&[tokens, stride], &dy));
            let mut dx_set = device.put(&[tokens, k], &vec![f32::NAN; tokens * k]);
            let mut dx_add = device.put(&[tokens, k], &old_dx);
            device.ops.linear_dx(&mut dx_set, &dy_there, &w, Update::Set).unwrap();
            device.ops.linear_dx(&mut dx_add, &dy_there, &w, Update::Add).unwrap();
            let (mut dw, mut db, mut row) = (Vec::new(), Vec::new(), 0);
            for &(n, _) in &self.parts {
                let mut dw_part = device.put_f32(&[n, k], &old_dw[row * k..(row + n) * k]);
                let mut db_part = device.put_f32(&[n], &old_db[row..row + n]);
                device.ops.linear_dw(&mut dw_part, &dy_there, before + row, &x_there).unwrap();
                device.ops.bias_backward(&mut db_part, &dy_there, before + row).unwrap();
                dw.extend(device.get(&dw_part));
                db.extend(device.get(&db_part));
                row += n;
            }

            // Of all devices with the same numbers the same.
            let numbers = (device.dtype, device.ops.weight_dtype());
            let [dx_exact, dw_exact, db_exact] = exact.get(numbers, || self.exact(&x, &w_values, &dy_inner)).each_ref();
            let plus = |exact: &[f64], old: &[f32]| exact.iter().zip(old).map(|(e, &o)| e + f64::from(o)).collect::<Vec<_>>();
            // A sum and what it is added to.
            let of_sums = |n| Tolerance::of_sums(n + 1, device.epsilon());
            let of_tokens = Tolerance::of_sums(tokens + 1, 0.0);
            of_sums(n).check(&format!("dx of {what}"), &device.get(&dx_set), dx_exact);
            of_sums(n).check(&format!("dx += of {what}"), &device.get(&dx_add), &plus(dx_exact, &old_dx));
            of_tokens.check(&format!("dW of {what}"), &dw, &plus(dw_exact, &old_dw));
            of_tokens.check(&format!("db of {what}"), &db, &plus(db_exact, &old_db));

            if tokens * n * k > MAX_DIFFERENCES {
                continue;
            }
            let at = [wide(&x), wide(&w_values), vec![0.0; n]];
            let loss = |at: &[Vec<f64>]| dot(&dy_inner, &linear(&at[0], &at[1], &at[2]));
            let minus = |got: Vec<f32>, old: &[f32]| got.iter().zip(old).map(|(g, o)| g - o).collect::<Vec<_>>();
            of_sums(n).check_differences(&format!("dx of {what}"), &loss, &at, 0, &device.get(&dx_set));
            // What was there was of order one, and has rounded the sum to that.
            let of_tokens = of_tokens.and_abs(2.0 * f64::from(f32::EPSILON) * (1.0 + (tokens as f64).sqrt()));
            of_tokens.check_differences(&format!("dW of {what}"), &loss, &at, 1, &minus(dw, &old_dw));
            of_tokens.check_differences(&format!("db of {what}"), &loss, &at, 2, &minus(db, &old_db));
        }
    }

    /// dx = dy·W, dW = dyᵀ·x, db = Σ_t dy.
    fn exact(&self, x: &[f32], w: &[f32], dy: &[f32]) -> [Vec<f64>; 3] {
        let (n, k) = (self.n(), self.k);
        let [mut dx, mut dw, mut db] = [vec![0.0; x.len()], vec![0.0; w.len()], vec![0.0; n]];
        for (t, dy) in dy.chunks(n).enumerate() {
            for (j, &dy) in dy.iter().enumerate() {
                let dy = f64::from(dy);
                db[j] += dy;
                for i in 0..k {
                    dx[t * k + i] += dy * f64::from(w[j * k + i]);
                    dw[j * k + i] += dy * f64::from(x[t * k + i]);
                }
            }
        }
        [dx, dw, db]
    }
}

/// y = x·Wᵀ + b
fn linear(x: &[f64], w: &[f64], b: &[f64]) -> Vec<f64> {
    let k = w.len() / b.len();
    let row = |x: &[f64]| w.chunks(k).zip(b).map(|(w, b)| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>() + b).collect::<Vec<_>>();
    x.chunks(k).flat_map(row).collect()
}

/// Any integers, with scales that make weights about as large as x.
fn packed(device: &Device, n: usize, k: usize, format: Format, seed: u64) -> Packed {
    let scales_shape = format.scales_shape(n, k);
    let words_shape = format.words_shape(n, k);
    // The product of two, lest low bits be those of f32.
    let bits = |x: &f32| (f64::from(*x) * f64::from(i32::MAX)) as i32;
    let n_words = words_shape.iter().product();
    let words: Vec<i32> =
        random(n_words, seed).iter().zip(&random(n_words, seed + 50)).map(|(a, b)| bits(a) ^ bits(b) << 13).collect();
    let largest = (1 << (format.bits - 1)) as f32;
    let scales: Vec<f32> = random(scales_shape.iter().product(), seed + 60).iter().map(|s| (0.5 + s.abs()) / largest).collect();
    let halves = |values: &[f32]| Tensor::from_slice(&scales_shape, values).converted(DType::F16);
    let offsets: Vec<f32> = scales.iter().map(|s| -s * (largest - 0.6)).collect();
    let offsets = format.has_offsets.then(|| halves(&offsets));
    let packed = Packed::new(n, k, Tensor::from_slice(&words_shape, &words), halves(&scales), offsets).unwrap();
    packed.map(|t| device.ops.upload(copy(t))).unwrap()
}

/// What a device may take for its own.
fn copy(t: &Tensor) -> Tensor {
    let mut copy = Tensor::zeros(t.shape(), t.dtype());
    copy.as_mut_bytes().copy_from_slice(t.as_bytes());
    copy
}

/// Around the sizes of vectors and tiles, and far from all of them.
#[test]
fn linear_of_hostile_shapes() {
    let devices = grad_devices();
    for (i, tokens) in [1, 2, 3, 13, 17, 111].into_iter().enumerate() {
        for (j, n) in [1, 2, 5, 17, 111].into_iter().enumerate() {
            for (l, k) in [1, 3, 8, 33, 111].into_iter().enumerate() {
                let margin = [(0, 0), (5, 3), (0, 1), (16, 0)][(i + j + l) % 4];
                Linear { margin, ..Linear::new(tokens, n, k) }.check(&devices);
            }
        }
    }
}

/// Several blocks of steps and of rows, and odd ends of all.
#[test]
fn linear_of_several_blocks() {
    let devices = grad_devices();
    for (tokens, n, k, margin) in [
        (577, 111, 300, (3, 4)),
        (989, 37, 129, (0, 0)),
        (3, 989, 577, (1, 0)),
        (111, 577, 989, (0, 0)),
        (1600, 19, 40, (0, 7)),
        (40, 300, 1100, (0, 0)),
        (31, 509, 40, (3, 0)),
    ] {
        Linear { margin, ..Linear::new(tokens, n, k) }.check(&devices);
    }
}

/// A weight's parts are summed over in dx, and have gradients of their own.
#[test]
fn linear_of_parts_and_dtypes() {
    let devices = grad_devices();
    let dense = Storage::Dense;
    for tokens in [1, 3, 30, 111] {
        for (parts, k) in [
            (vec![(32, dense(DType::F32)), (7, dense(DType::F32)), (41, dense(DType::F32))], 77),
            (vec![(300, dense(DType::Bf16)), (1, dense(DType::Bf16)), (19, dense(DType::Bf16))], 45),
            (vec![(33, dense(DType::F16))], 64),
            (vec![(9, dense(DType::F16)), (5, dense(DType::F32)), (8, dense(DType::Bf16))], 31),
        ] {
            Linear { parts, margin: (2, 3), ..Linear::new(tokens, 0, k) }.check(&devices);
        }
    }
}

/// QLoRA's base: what comes through is the gradient by the numbers that the integers stand for.
#[test]
fn linear_of_packed_parts() {
    let devices = grad_devices();
    let packed = |bits, group, has_offsets| Storage::Packed(bits, group, has_offsets);
    for tokens in [1, 17, 111] {
        for (parts, k) in [
            (vec![(1, packed(4, 32, false))], 32),
            (vec![(37, packed(4, 64, true)), (16, packed(4, 64, true)), (300, packed(4, 64, true))], 320),
            (vec![(48, packed(4, 128, false))], 1152),
            (vec![(19, packed(8, 32, false)), (5, Storage::Dense(DType::F32)), (40, packed(4, 32, true))], 96),
            (vec![(270, packed(8, 128, false))], 384),
        ] {
            Linear { parts, margin: (3, 0), ..Linear::new(tokens, 0, k) }.check(&devices);
        }
    }
}

#[test]
fn linear_of_nothing() {
    for device in grad_devices() {
        let case = Linear::new(1, 4, 3);
        let (w, _) = case.weight(&device);
        let (none_x, none_y) = (device.put(&[0, 3], &[]), device.put(&[0, 4], &[]));
        device.ops.linear_dx(&mut device.put(&[0, 3], &[]), &none_y, &w, Update::Set).unwrap();
        let mut dw = device.put_f32(&[4, 3], &[2.0; 12]);
        device.ops.linear_dw(&mut dw, &none_y, 0, &none_x).unwrap();
        let mut db = device.put_f32(&[4], &[3.0; 4]);
        device.ops.bias_backward(&mut db, &none_y, 0).unwrap();
        assert_eq!((device.get(&dw), device.get(&db)), (vec![2.0; 12], vec![3.0; 4]), "{}", device.name);
        // Rows of no weight: sums of nothing.
        let w = Weight::stacked(vec![Arc::new(device.put(&[0, 3], &[]))]).unwrap();
        let (mut dx, dy) = (device.put(&[1, 3], &[7.0; 3]), device.put(&[1, 4], &[1.0; 4]));
        device.ops.linear_dx(&mut dx, &dy, &w, Update::Add).unwrap();
        assert_eq!(device.get(&dx), [7.0; 3], "{}", device.name);
        device.ops.linear_dx(&mut dx, &dy, &w, Update::Set).unwrap();
        assert_eq!(device.get(&dx), [0.0; 3], "{}", device.name);
    }
}

/// The gradient by logits, which is f32 on all devices, counts as it is rounded to the dtype of activations.
#[test]
fn linear_of_logits() {
    for device in grad_devices() {
        let (tokens, n, k) = (17, 37, 24);
        let case = Linear { margin: (3, 2), ..Linear::new(tokens, n, k) };
        let (w, _) = case.weight(&device);
        let logits = random(tokens * (n + 5), 2);
        let x = device.put(&[tokens, k], &random(tokens * k, 1));
        let run = |dy: &Tensor| {
            let (mut dx, mut dw) = (device.blank(&[tokens, k]), device.put_f32(&[n, k], &vec![0.5; n * k]));
            device.ops.linear_dx(&mut dx, dy, &w, Update::Set).unwrap();
            device.ops.linear_dw(&mut dw, dy, 3, &x).unwrap();
            [dx, dw].map(|t| device.get(&t))
        };
        let shape = [tokens, n + 5];
        assert_eq!(run(&device.put_f32(&shape, &logits)), run(&device.put(&shape, &logits)), "{}", device.name);
    }
}

#[test]
fn linear_refuses_what_does_not_fit() {
    for device in grad_devices() {
        let (w, _) = Linear { margin: (2, 0), ..Linear::new(1, 4, 3) }.weight(&device);
        let t = |rows, width: usize| device.blank(&[rows, width]);
        let f32s = |shape: &[usize]| device.put_f32(shape, &vec![0.0; shape.iter().product()]);
        let dx = |dx_width, dy_width| device.ops.linear_dx(&mut t(5, dx_width), &t(5, dy_width), &w, Update::Set);
        assert!(dx(3, 6).is_ok());
        assert!(dx(3, 5).unwrap_err().to_string().contains("linear_dx: width of dy is 5"), "{}", device.name);
        assert!(dx(4, 6).unwrap_err().to_string().contains("linear_dx: dx"));
        let dw = |first_col, tokens| device.ops.linear_dw(&mut f32s(&[4, 3]), &t(5, 6), first_col, &t(tokens, 3));
        assert!(dw(2, 5).is_ok());
        assert!(dw(3, 5).unwrap_err().to_string().contains("linear_dw: width of dy is 6"));
        assert!(dw(usize::MAX, 5).unwrap_err().to_string().contains("linear_dw: width of dy"));
        assert!(dw(2, 4).unwrap_err().to_string().contains("linear_dw: x"));
        let halves = Tensor::zeros(&[4, 3], DType::F16);
        let mut halves = device.ops.upload(halves).unwrap();
        assert!(device.ops.linear_dw(&mut halves, &t(5, 6), 2, &t(5, 3)).unwrap_err().to_string().contains("dtype of dw"));
        assert!(device.ops.bias_backward(&mut f32s(&[4]), &t(5, 6), 3).unwrap_err().to_string().contains("width of dy"));
        assert!(device.ops.bias_backward(&mut f32s(&[4, 1]), &t(5, 6), 2).unwrap_err().to_string().contains("one dimension"));
    }
}
/// What products of some hundred rows give.
fn results(device: &Device) -> [Vec<f32>; 3] {
    let case = Linear { margin: (3, 1), ..Linear::new(577, 130, 300) };
    let (w, _) = case.weight(device);
    let (x, dy) = (device.put(&[577, 300], &random(577 * 300, 1)), device.put(&[577, 134], &random(577 * 134, 2)));
    let mut dx = device.blank(&[577, 300]);
    let [mut dw, mut db] = [&[130, 300][..], &[130]].map(|shape| device.put_f32(shape, &vec![77.0; shape.iter().product()]));
    device.ops.linear_dx(&mut dx, &dy, &w, Update::Add).unwrap();
    device.ops.linear_dw(&mut dw, &dy, 3, &x).unwrap();
    device.ops.bias_backward(&mut db, &dy, 3).unwrap();
    [dx, dw, db].map(|t| device.get(&t))
}

/// Bit for bit, and from run to run.
#[test]
fn threads_change_nothing() {
    check_repeatable(results);
}
