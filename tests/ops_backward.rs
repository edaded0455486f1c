//! Gradients of the ops that take the time, products and attention, against finite differences of the naive ops in f64 and against the chain
//! rule in f64; and that no number of threads changes them.

mod reference;
mod support;

use std::sync::Arc;

use llava_engine::dtype::DType;
use llava_engine::ops::packed::Format;
use llava_engine::ops::{GradOps, Heads, Matrix, Packed, RopeTable, Rotation, Span, Update, Weight};
use llava_engine::tensor::Tensor;
use reference::attention::{Sequence, exact as exact_attention, gradient as attention_gradient};
use reference::gradient::{Tolerance, dot, wide};
use reference::random;
use reference::rows::exact as exact_rows;
use support::devices::{Shared, TestDevice, cpu_with, grad_devices, grad_kernel_devices};

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
    for (tokens, n, k, margin) in
        [(577, 111, 300, (3, 4)), (989, 37, 129, (0, 0)), (3, 989, 577, (1, 0)), (111, 577, 989, (0, 0)), (1600, 19, 40, (0, 7))]
    {
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

/// What rows of no span hold before and after.
const SENTINEL: f32 = 1024.0;

/// One attention to test.
#[derive(Clone, Debug)]
struct Attention {
    /// Rows of each span; a row of none stands before each.
    sequences: Vec<usize>,
    heads: Heads,
    causal: bool,
    /// Size of queries and keys: what scores grow with.
    size: f32,
}

fn heads(n_heads: usize, n_kv_heads: usize, head_dim: usize) -> Heads {
    Heads { n_heads, n_kv_heads, head_dim }
}

/// Columns `range` of all rows.
fn columns<T: Copy>(rows: &[T], width: usize, range: std::ops::Range<usize>) -> Vec<T> {
    rows.chunks(width).flat_map(|row| row[range.clone()].to_vec()).collect()
}

/// Queries, keys and values of rows of `qkv`.
fn split<T: Copy>(qkv: &[T], heads: Heads) -> [Vec<T>; 3] {
    let (q, kv) = (heads.q_width(), heads.kv_width());
    [0..q, q..q + kv, q + kv..q + 2 * kv].map(|range| columns(qkv, heads.qkv_width(), range))
}

fn sequence<T>([q, k, v]: &[Vec<T>; 3], heads: Heads) -> Sequence<'_, T> {
    let Heads { n_heads, n_kv_heads, head_dim } = heads;
    Sequence { q, k, v, n_heads, n_kv_heads, head_dim }
}

impl Attention {
    fn new(sequences: &[usize], heads: Heads, causal: bool) -> Self {
        Self { sequences: sequences.to_vec(), heads, causal, size: 2.0 }
    }

    /// The spans, and how many rows there are with those of none.
    fn spans(&self) -> (Vec<Span<'static>>, usize) {
        let mut next = 0;
        let of = |&n_rows| {
            let first_row = next + 1;
            next = first_row + n_rows;
            Span { first_row, n_rows, past: 0, pages: &[] }
        };
        let spans = self.sequences.iter().map(of).collect();
        (spans, next + 1)
    }

    fn check(&self, devices: &[Device]) {
        let (heads, causal) = (self.heads, self.causal);
        let (spans, tokens) = self.spans();
        let (width, q_width) = (heads.qkv_width(), heads.q_width());
        let visible = |n_rows: usize| move |row: usize| if causal { row + 1 } else { n_rows };
        let mut exact = Shared::new();
        for device in devices {
            let what = format!("{self:?} on {}", device.name);
            let sized = |x: Vec<f32>| device.round(&x.iter().map(|x| x * self.size).collect::<Vec<_>>());
            let (qkv, d_out) = (sized(random(tokens * width, 11)), device.round(&random(tokens * q_width, 12)));
            let (qkv_there, d_out_there) = (device.put(&[tokens, width], &qkv), device.put(&[tokens, q_width], &d_out));
            let mut out = device.put(&[tokens, q_width], &vec![SENTINEL; tokens * q_width]);
            let mut lse = device.put_f32(&[tokens, heads.n_heads], &vec![SENTINEL; tokens * heads.n_heads]);
            device.ops.attention_lse(&mut out, &mut lse, &qkv_there, &spans, heads, causal).unwrap();
            let mut d_qkv = device.put(&[tokens, width], &vec![SENTINEL; tokens * width]);
            device.ops.attention_backward(&mut d_qkv, &qkv_there, &out, &d_out_there, &lse, &spans, heads, causal).unwrap();
            let (out, lse, d_qkv) = (device.get(&out), device.get(&lse), device.get(&d_qkv));

            let exact = exact.get(device.dtype, || {
                let of = |span: &Span<'_>| {
                    let rows = span.first_row..span.first_row + span.n_rows;
                    let parts = split(&qkv[rows.start * width..rows.end * width], heads);
                    let sequence = sequence(&parts, heads);
                    let d_out = &d_out[rows.start * q_width..rows.end * q_width];
                    (exact_attention(&sequence, visible(span.n_rows)), attention_gradient(&sequence, d_out, visible(span.n_rows)))
                };
                spans.iter().map(of).collect::<Vec<_>>()
            });
            let mut is_free = vec![true; tokens];
            for (span, (out_exact, gradient)) in spans.iter().zip(exact.iter()) {
                let rows = span.first_row..span.first_row + span.n_rows;
                is_free[rows.clone()].fill(false);
                // A score is a sum of head_dim products of size², rounded in the order of it, by which its probability is off; sums of
                // probabilities are of as many terms as there are rows.
                let score = f64::from(self.size * self.size) * (heads.head_dim as f64).sqrt() / 3.0;
                let mut tolerance = Tolerance::of_sums(heads.head_dim, device.epsilon());
                tolerance.relative *= 1.0 + score / 4.0;
                let out_rows = &out[rows.start * q_width..rows.end * q_width];
                let of_out = Tolerance::of_sums(heads.head_dim.max(span.n_rows), device.epsilon()).relative.max(tolerance.relative);
                Tolerance { relative: of_out, ..tolerance }.check(&format!("out of {what}"), out_rows, out_exact);
                let lse_rows = &lse[rows.start * heads.n_heads..rows.end * heads.n_heads];
                tolerance.check(&format!("lse of {what}"), lse_rows, &gradient.lse);
                let d_rows = &d_qkv[rows.start * width..rows.end * width];
                let got = split(d_rows, heads);
                // A row that sees itself alone has a gradient of zero by its query and key: what is left is rounding of dP − D, both of
                // which are sums of head_dim products of order `size`.
                let rounding = f64::from(f32::EPSILON) * f64::from(self.size) * (heads.head_dim as f64).sqrt();
                // D is of an out that is rounded to 16 bits, by as much as half an epsilon of numbers of `size`, and meets queries and keys of
                // `size`. Where gradients cancel, that was up to a 40th of epsilon·size² beyond the rest.
                let rounding = rounding + device.epsilon() * f64::from(self.size * self.size) / 32.0;
                let tolerance = tolerance.and_abs(rounding);
                for (name, got, exact) in
                    [("dq", &got[0], &gradient.dq), ("dk", &got[1], &gradient.dk), ("dv", &got[2], &gradient.dv)]
                {
                    tolerance.check(&format!("{name} of rows {rows:?} of {what}"), got, exact);
                }
                if span.n_rows * span.n_rows * q_width > MAX_DIFFERENCES {
                    continue;
                }
                let at: Vec<Vec<f64>> = split(&qkv[rows.start * width..rows.end * width], heads).iter().map(|t| wide(t)).collect();
                let d_out = &d_out[rows.start * q_width..rows.end * q_width];
                let loss = |at: &[Vec<f64>]| {
                    let parts = [at[0].clone(), at[1].clone(), at[2].clone()];
                    dot(d_out, &exact_attention(&sequence(&parts, heads), visible(span.n_rows)))
                };
                for (i, name) in ["dq", "dk", "dv"].into_iter().enumerate() {
                    tolerance.check_differences(&format!("{name} of rows {rows:?} of {what}"), &loss, &at, i, &got[i]);
                }
            }
            for row in (0..tokens).filter(|&row| is_free[row]) {
                let untouched = [(&out, q_width), (&lse, heads.n_heads), (&d_qkv, width)]
                    .iter()
                    .all(|(t, width)| t[row * width..(row + 1) * width].iter().all(|&x| x == SENTINEL));
                assert!(untouched, "{what}: row {row} belongs to no span, and was written");
            }
        }
    }
}

/// Few rows, and head widths from one vector to several tiles: one of each that kernels are made for, and one beyond a tensor core's.
#[test]
fn attention_of_few_rows() {
    let devices = grad_devices();
    for causal in [false, true] {
        for heads in [
            heads(1, 1, 8),
            heads(2, 2, 8),
            heads(4, 2, 8),
            heads(3, 1, 64),
            heads(2, 1, 80),
            heads(1, 1, 96),
            heads(2, 2, 128),
            heads(2, 1, 136),
        ] {
            for sequences in [&[1][..], &[2], &[3], &[1, 3, 2], &[17]] {
                Attention::new(sequences, heads, causal).check(&devices);
            }
        }
    }
}

/// Blocks of queries and keys with odd ends, several spans, heads that share keys.
#[test]
fn attention_of_many_rows() {
    let devices = grad_devices();
    for causal in [false, true] {
        for (sequences, heads) in [
            (&[111][..], heads(2, 1, 80)),
            (&[577], heads(1, 1, 64)),
            (&[989], heads(2, 1, 8)),
            (&[128, 1, 129, 64], heads(4, 2, 24)),
            (&[3, 257], heads(3, 1, 128)),
        ] {
            Attention::new(sequences, heads, causal).check(&devices);
        }
    }
}

/// Scores so large that probabilities are all of a few tokens, and that their exponentials by themselves are no f32.
#[test]
fn attention_with_large_scores() {
    let devices = grad_devices();
    for causal in [false, true] {
        Attention { size: 12.0, ..Attention::new(&[9, 140], heads(2, 1, 64), causal) }.check(&devices);
    }
}

/// What inference computes: to the last bit, for spans that it takes in blocks too.
#[test]
fn attention_lse_is_attention() {
    for device in grad_devices() {
        let (heads, tokens) = (heads(4, 2, 24), 141);
        let spans =
            [Span { first_row: 0, n_rows: 9, past: 0, pages: &[] }, Span { first_row: 9, n_rows: 132, past: 0, pages: &[] }];
        let qkv = device.put(&[tokens, heads.qkv_width()], &random(tokens * heads.qkv_width(), 1));
        let mut lse = device.put_f32(&[tokens, 4], &[0.0; 4 * 141]);
        let [mut a, mut b] = [(); 2].map(|()| device.blank(&[tokens, heads.q_width()]));
        device.ops.attention_lse(&mut a, &mut lse, &qkv, &spans, heads, true).unwrap();
        device.ops.attention(&mut b, &qkv, llava_engine::ops::KvSource::Own, &spans, heads, true).unwrap();
        assert_eq!(device.get(&a), device.get(&b), "{}", device.name);
    }
}

#[test]
fn attention_refuses_what_does_not_fit() {
    for device in grad_devices() {
        let heads = heads(2, 1, 8);
        let t = |rows, width: usize| device.blank(&[rows, width]);
        let span = |first_row, n_rows, past| Span { first_row, n_rows, past, pages: &[] };
        let refused = |lse_rows, d_width, spans: &[Span<'_>], heads: Heads| {
            let lse = device.put_f32(&[lse_rows, 2], &vec![0.0; 2 * lse_rows]);
            let (mut d_qkv, qkv) = (t(4, d_width), t(4, 32));
            let result = device.ops.attention_backward(&mut d_qkv, &qkv, &t(4, 16), &t(4, 16), &lse, spans, heads, true);
            result.unwrap_err().to_string()
        };
        let whole = [span(0, 4, 0)];
        assert!(refused(3, 32, &whole, heads).contains("attention_backward: d_qkv"), "{}", device.name);
        assert!(refused(4, 31, &whole, heads).contains("attention_backward: d_qkv"));
        assert!(refused(4, 32, &[span(1, 4, 0)], heads).contains("rows of a span"));
        assert!(refused(4, 32, &[span(0, 4, 3)], heads).contains("past of a span is 3, expected 0"));
        assert!(refused(4, 32, &[span(2, 2, 0), span(0, 3, 0)], heads).contains("first row of a span"));
        assert!(refused(4, 32, &whole, Heads { n_kv_heads: 0, ..heads }).contains("heads"));
        assert!(refused(4, 32, &whole, Heads { head_dim: 12, ..heads }).contains("heads"));
        let mut wrong = device.put_f32(&[4, 3], &[0.0; 12]);
        let error = device.ops.attention_lse(&mut t(4, 16), &mut wrong, &t(4, 32), &whole, heads, true).unwrap_err();
        assert!(error.to_string().contains("attention_lse: lse"), "{error}");
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

/// Turning back is the transposed matrix, and undoes turning.
#[test]
fn rope_turns_gradients_back() {
    let positions = 40;
    for device in grad_devices() {
        for heads in [heads(1, 1, 8), heads(3, 1, 16), heads(4, 2, 80)] {
            let (width, half, tokens) = (heads.qkv_width(), heads.head_dim / 2, 24);
            let angles: Vec<f32> = (0..positions * half).map(|i| (i / half) as f32 * 0.7f32.powi((i % half) as i32)).collect();
            let [cos, sin] = [f32::cos, f32::sin].map(|f| angles.iter().map(|&a| f(a)).collect::<Vec<f32>>());
            let there = |values: &[f32]| device.put_f32(&[positions, half], values);
            let table = RopeTable { cos: there(&cos), sin: there(&sin) };
            let spans = [(0, 1, 0), (2, 17, 0), (20, 3, 37)];
            let spans = spans.map(|(first_row, n_rows, past)| Span { first_row, n_rows, past, pages: &[] });
            let (x, dy) = (device.round(&random(tokens * width, 1)), device.round(&random(tokens * width, 2)));
            let run = |values: &[f32], rotation| {
                let mut t = device.put(&[tokens, width], values);
                device.ops.rope(&mut t, &table, &spans, heads, rotation).unwrap();
                device.get(&t)
            };
            // Of each row of a span: its queries and keys.
            let rotated = heads.q_width() + heads.kv_width();
            let exact = |x: &[f64]| -> Vec<f64> {
                let mut y = x.to_vec();
                for span in &spans {
                    for r in 0..span.n_rows {
                        let at = (span.past + r) * half..(span.past + r + 1) * half;
                        let row = (span.first_row + r) * width;
                        for head in (row..row + rotated).step_by(heads.head_dim) {
                            let turned = exact_rows::rotate(&x[head..head + heads.head_dim], &cos[at.clone()], &sin[at.clone()]);
                            y[head..head + heads.head_dim].copy_from_slice(&turned);
                        }
                    }
                }
                y
            };
            let what = format!("rope {heads:?} on {}", device.name);
            let tolerance = Tolerance::of_sums(2, device.epsilon());
            let y = run(&x, Rotation::Forward);
            tolerance.check(&what, &y, &exact(&wide(&x)));
            let dx = run(&dy, Rotation::Inverse);
            tolerance.check_differences(&what, &|at| dot(&dy, &exact(&at[0])), &[wide(&x)], 0, &dx);
            tolerance.check(&format!("{what}, there and back"), &run(&y, Rotation::Inverse), &wide(&x));
            let refused = device.ops.rope(&mut device.blank(&[22, width]), &table, &spans, heads, Rotation::Forward);
            assert!(refused.unwrap_err().to_string().contains("rope: rows of a span"), "{what}");
            let beyond = [Span { past: 38, ..spans[2] }];
            let refused = device.ops.rope(&mut device.blank(&[tokens, width]), &table, &beyond, heads, Rotation::Forward);
            assert!(refused.unwrap_err().to_string().contains("rope: cos"), "{what}");
        }
    }
}

/// What products and attention of some hundred rows give.
fn results(device: &Device) -> [Vec<f32>; 6] {
    let case = Linear { margin: (3, 1), ..Linear::new(577, 130, 300) };
    let (w, _) = case.weight(device);
    let (x, dy) = (device.put(&[577, 300], &random(577 * 300, 1)), device.put(&[577, 134], &random(577 * 134, 2)));
    let mut dx = device.blank(&[577, 300]);
    let [mut dw, mut db] = [&[130, 300][..], &[130]].map(|shape| device.put_f32(shape, &vec![77.0; shape.iter().product()]));
    device.ops.linear_dx(&mut dx, &dy, &w, Update::Add).unwrap();
    device.ops.linear_dw(&mut dw, &dy, 3, &x).unwrap();
    device.ops.bias_backward(&mut db, &dy, 3).unwrap();

    let attention = Attention::new(&[300, 5, 171], heads(4, 2, 24), true);
    let (spans, tokens) = attention.spans();
    let (width, q_width) = (attention.heads.qkv_width(), attention.heads.q_width());
    let qkv = device.put(&[tokens, width], &random(tokens * width, 3));
    let d_out = device.put(&[tokens, q_width], &random(tokens * q_width, 4));
    let (mut out, mut d_qkv) = (device.blank(&[tokens, q_width]), device.blank(&[tokens, width]));
    let mut lse = device.put_f32(&[tokens, 4], &vec![77.0; tokens * 4]);
    device.ops.attention_lse(&mut out, &mut lse, &qkv, &spans, attention.heads, true).unwrap();
    device.ops.attention_backward(&mut d_qkv, &qkv, &out, &d_out, &lse, &spans, attention.heads, true).unwrap();
    [dx, dw, db, out, lse, d_qkv].map(|t| device.get(&t))
}

/// Bit for bit, and from run to run.
#[test]
fn threads_change_nothing() {
    for isa in llava_engine::cpu::simd::Isa::ALL.into_iter().filter(|isa| isa.is_supported()) {
        let one = results(&cpu_with(isa, 1));
        for threads in [1, 2, 3, 7] {
            assert!(results(&cpu_with(isa, threads)) == one, "{isa} with {threads} threads");
        }
    }
    for device in grad_kernel_devices() {
        assert!(results(&device) == results(&device), "{}", device.name);
    }
}
