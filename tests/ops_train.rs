//! What training needs beside products and attention, on every device that trains: gradients of the small ops against finite differences of
//! the naive ops in f64, the loss, dropout, and the optimizer.

mod reference;
mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use half::{bf16, f16};
use llava_engine::dtype::DType;
use llava_engine::ops::dropout::philox;
use llava_engine::ops::{Activation, AdamW, GradOps, Ops, RowCopy, Update, Weight};
use llava_engine::profile::Profiled;
use llava_engine::tensor::Tensor;
use reference::gradient::{Tolerance, dot, slope, wide};
use reference::linear::{gelu, quick_gelu};
use reference::random;
use reference::rows::exact;
use support::devices::{Shared, TestDevice, check_repeatable, grad_devices};

type Device = TestDevice<dyn GradOps>;

/// Rows, and their width: one, a block of rows and a bit, many; and widths that no vector divides.
const SHAPES: [(usize, usize); 11] =
    [(1, 1), (1, 8), (2, 3), (3, 111), (8, 16), (9, 577), (17, 33), (111, 24), (577, 40), (989, 5), (2, 1096)];

const EPS: f32 = 1e-5;

/// One part in f32: what a number of order one is rounded by.
const ULP: f64 = f32::EPSILON as f64;

fn plus(a: &[f64], old: &[f32]) -> Vec<f64> {
    a.iter().zip(old).map(|(a, &old)| a + f64::from(old)).collect()
}

/// Of x, w and b.
type NormOfRow = fn(&[f64], &[f64], &[f64]) -> Vec<f64>;

/// A norm and its backward, of which both are tested in the same way.
struct Norm {
    name: &'static str,
    has_bias: bool,
    /// y of one row.
    exact: NormOfRow,
}

const NORMS: [Norm; 2] = [
    Norm { name: "rms_norm", has_bias: false, exact: |x, w, _| exact::rms_norm(x, w, EPS) },
    Norm { name: "layer_norm", has_bias: true, exact: |x, w, b| exact::layer_norm(x, w, b, EPS) },
];

/// dx, dw and db of a norm on a device, added to `old`. Without `params`, dw and db are not asked for.
fn norm_backward(
    device: &Device,
    norm: &Norm,
    old: &[Vec<f32>; 3],
    dy: &[f32],
    x: &[f32],
    w: &[f32],
    params: bool,
) -> [Vec<f32>; 3] {
    let hidden = w.len();
    let shape = [x.len() / hidden, hidden];
    let [mut dx, dy, x] = [&old[0], dy, x].map(|t| device.put(&shape, t));
    let [mut dw, mut db, w] = [&old[1], &old[2], w].map(|t| device.put_f32(&[hidden], t));
    let ops = &device.ops;
    if norm.has_bias {
        ops.layer_norm_backward(&mut dx, params.then_some([&mut dw, &mut db]), &dy, &x, &w, EPS).unwrap();
    } else {
        ops.rms_norm_backward(&mut dx, params.then_some(&mut dw), &dy, &x, &w, EPS).unwrap();
    }
    [dx, dw, db].map(|t| device.get(&t))
}

#[test]
fn norms() {
    let devices = grad_devices();
    for ((tokens, hidden), norm) in SHAPES.into_iter().flat_map(|shape| NORMS.iter().map(move |norm| (shape, norm))) {
        let mut expected = Shared::new();
        for device in &devices {
            let what = format!("{} {tokens}x{hidden} on {}", norm.name, device.name);
            // Sizes of rows differ, as those of tokens do; and rows are far from zero.
            let size = |i: usize| [1.0, 0.05, 30.0][i / hidden % 3];
            let x: Vec<f32> = random(tokens * hidden, 1).iter().enumerate().map(|(i, x)| (x + 0.5) * size(i)).collect();
            let (x, dy) = (device.round(&x), device.round(&random(tokens * hidden, 2)));
            let (w, b) = (random(hidden, 3), random(hidden, 4));
            let old = [device.round(&random(tokens * hidden, 5)), random(hidden, 6), random(hidden, 7)];
            let [dx, dw, db] = norm_backward(device, norm, &old, &dy, &x, &w, true);

            let [dx_exact, dw_exact, db_exact] = expected
                .get(device.dtype, || {
                    let (w, b, ones, zeros) = (wide(&w), wide(&b), vec![1.0; hidden], vec![0.0; hidden]);
                    let (mut dx, mut dw, mut db) = (Vec::new(), zeros.clone(), zeros.clone());
                    for (x, dy) in x.chunks(hidden).zip(dy.chunks(hidden)) {
                        let x = wide(x);
                        for i in 0..hidden {
                            dx.push(
                                slope(|h| {
                                    let mut moved = x.clone();
                                    // A step that is small beside the row.
                                    moved[i] += h * x[i].abs().max(0.05) * 0.1;
                                    dot(dy, &(norm.exact)(&moved, &w, &b))
                                }) / (x[i].abs().max(0.05) * 0.1),
                            );
                        }
                        // y is linear in w and b.
                        for (i, y) in (norm.exact)(&x, &ones, &zeros).into_iter().enumerate() {
                            dw[i] += f64::from(dy[i]) * y;
                            db[i] += f64::from(dy[i]);
                        }
                    }
                    [dx, dw, db]
                })
                .each_ref();
            // What cancels within a row is of the size of its rstd, at most 1/√eps; x − mean has lost what the mean is larger than it.
            for (t, row) in x.chunks(hidden).enumerate() {
                let square = |mean: f64| wide(row).iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / hidden as f64;
                let mean = if norm.has_bias { wide(row).iter().sum::<f64>() / hidden as f64 } else { 0.0 };
                let rstd = 1.0 / (square(mean) + f64::from(EPS)).sqrt();
                let rows = t * hidden..(t + 1) * hidden;
                let lost = 1.0 + mean.abs() * rstd;
                let tolerance = Tolerance::of_sums(hidden, device.epsilon()).and_abs(ULP * (8.0 * rstd * lost + 2.0));
                let expected = plus(&dx_exact[rows.clone()], &old[0][rows.clone()]);
                tolerance.check(&format!("dx of row {t} of {what}"), &dx[rows], &expected);
            }
            // Of one column, x̂ of layer_norm is zero but for rounding of the mean, times 1/√eps at most.
            let of_tokens =
                Tolerance::of_sums(tokens + hidden, device.epsilon()).and_abs(ULP * (2.0 + (tokens as f64).sqrt() * 8.0));
            of_tokens.check(&format!("dw of {what}"), &dw, &plus(dw_exact, &old[1]));
            let db_expected = if norm.has_bias { plus(db_exact, &old[2]) } else { wide(&old[2]) };
            of_tokens.check(&format!("db of {what}"), &db, &db_expected);

            let [dx_alone, dw_alone, db_alone] = norm_backward(device, norm, &old, &dy, &x, &w, false);
            assert_eq!(dx_alone, dx, "{what}: dx, where nothing else is wanted");
            assert!(dw_alone == old[1] && db_alone == old[2], "{what}");
        }
    }
}

#[test]
fn silu_mul() {
    for device in &grad_devices() {
        for (tokens, n) in SHAPES {
            let what = format!("silu_mul {tokens}x{n} on {}", device.name);
            let gate_up = device.round(&random(tokens * 2 * n, 1).iter().map(|x| x * 12.0).collect::<Vec<_>>());
            let dy = device.round(&random(tokens * n, 2));
            let mut d_gate_up = device.blank(&[tokens, 2 * n]);
            let (dy_there, gate_up_there) = (device.put(&[tokens, n], &dy), device.put(&[tokens, 2 * n], &gate_up));
            device.ops.silu_mul_backward(&mut d_gate_up, &dy_there, &gate_up_there).unwrap();
            let mut expected = Vec::new();
            for (t, row) in gate_up.chunks(2 * n).enumerate() {
                for i in 0..2 * n {
                    let (gate, up) = (f64::from(row[i % n]), f64::from(row[n + i % n]));
                    let of = |h: f64| {
                        let pair = if i < n { [gate + h, up] } else { [gate, up + h] };
                        exact::silu_mul(&pair, 1)[0]
                    };
                    expected.push(f64::from(dy[t * n + i % n]) * slope(of));
                }
            }
            // silu′ is within a few roundings of one, times a gate and an up of 12.
            Tolerance::of_sums(4, device.epsilon()).check(&what, &device.get(&d_gate_up), &expected);
        }
        // Where e^−gate has no f32.
        let gate_up = device.put(&[1, 8], &[-200.0, -90.0, 90.0, 200.0, 1.0, 1.0, 1.0, 1.0]);
        let mut d_gate_up = device.blank(&[1, 8]);
        device.ops.silu_mul_backward(&mut d_gate_up, &device.put(&[1, 4], &[1.0; 4]), &gate_up).unwrap();
        let far = Tolerance { relative: 0.0, abs: 1e-30 };
        far.check(&device.name, &device.get(&d_gate_up), &[0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 90.0, 200.0]);
    }
}

#[test]
fn activations() {
    for device in &grad_devices() {
        for (f, exact) in [(Activation::Gelu, gelu as fn(f64) -> f64), (Activation::QuickGelu, quick_gelu)] {
            for shape in [[1, 1], [3, 111], [577, 40], [9, 4097]] {
                let n = shape[0] * shape[1];
                let what = format!("{f:?} of {shape:?} on {}", device.name);
                let x = device.round(&random(n, 1).iter().map(|x| x * 7.0).collect::<Vec<_>>());
                let dy = device.round(&random(n, 2));
                let (x_there, dy_there) = (device.put(&shape, &x), device.put(&shape, &dy));
                let (mut y, mut dx) = (device.blank(&shape), device.blank(&shape));
                device.ops.activate(&mut y, &x_there, f).unwrap();
                device.ops.activate_backward(&mut dx, &dy_there, &x_there, f).unwrap();
                let x = wide(&x);
                let y_exact: Vec<f64> = x.iter().map(|&x| exact(x)).collect();
                let dx_exact: Vec<f64> = x.iter().zip(&dy).map(|(&x, &dy)| f64::from(dy) * slope(|h| exact(x + h))).collect();
                let tolerance = Tolerance::of_sums(1, device.epsilon());
                tolerance.check(&what, &device.get(&y), &y_exact);
                tolerance.check(&format!("gradient of {what}"), &device.get(&dx), &dx_exact);
            }
            // Far out the slope is that of a line.
            let ends = device.put(&[4], &[-1e4, -100.0, 100.0, 1e4]);
            let mut dx = device.blank(&[4]);
            device.ops.activate_backward(&mut dx, &device.put(&[4], &[2.0; 4]), &ends, f).unwrap();
            let far = Tolerance { relative: 0.0, abs: 1e-30 };
            far.check(&format!("{f:?} on {}", device.name), &device.get(&dx), &[0.0, 0.0, 2.0, 2.0]);
        }
    }
}

#[test]
fn embed_backward_adds_up_rows_of_one_token() {
    for device in &grad_devices() {
        for (n_ids, vocab, hidden) in [(1, 1, 1), (3, 7, 5), (577, 3, 33), (989, 500, 8)] {
            let ids: Vec<u32> = random(n_ids, 1).iter().map(|r| ((r.abs() * vocab as f32) as u32).min(vocab as u32 - 1)).collect();
            let (dy, old) = (device.round(&random(n_ids * hidden, 2)), random(vocab * hidden, 3));
            let mut d_table = device.put_f32(&[vocab, hidden], &old);
            device.ops.embed_backward(&mut d_table, &device.put(&[n_ids, hidden], &dy), &ids).unwrap();
            let mut expected = wide(&old);
            for (&id, dy) in ids.iter().zip(dy.chunks(hidden)) {
                for i in 0..hidden {
                    expected[id as usize * hidden + i] += f64::from(dy[i]);
                }
            }
            let what = format!("embed_backward of {n_ids} of {vocab} on {}", device.name);
            Tolerance::of_sums(n_ids, 0.0).check(&what, &device.get(&d_table), &expected);
        }
        let refused = device.ops.embed_backward(&mut device.put_f32(&[7, 1], &[0.0; 7]), &device.blank(&[1, 1]), &[7]);
        assert_eq!(refused.unwrap_err().to_string(), "embed_backward: token id is 7, expected \"below 7\"");
    }
}

/// Forward and backward are transposed: Σ dy·forward(x) = Σ backward(dy)·x.
#[test]
fn clip_embed_and_its_gradient() {
    for device in &grad_devices() {
        for (images, n_patches, hidden) in [(1, 1, 1), (2, 3, 5), (19, 4, 33), (3, 577, 8)] {
            let what = format!("clip_embed {images}x{n_patches}x{hidden} on {}", device.name);
            let n = images * (n_patches + 1) * hidden;
            let dy = device.round(&random(n, 1));
            let (old_class, old_positions) = (random(hidden, 2), random((n_patches + 1) * hidden, 3));
            let mut d_patches = device.blank(&[images * n_patches, hidden]);
            let mut d_class = device.put_f32(&[hidden], &old_class);
            let mut d_positions = device.put_f32(&[n_patches + 1, hidden], &old_positions);
            let dy_there = device.put(&[images * (n_patches + 1), hidden], &dy);
            device.ops.clip_embed_backward(&mut d_patches, &mut d_class, &mut d_positions, &dy_there).unwrap();
            let (mut patches, mut class, mut positions) = (Vec::new(), wide(&old_class), wide(&old_positions));
            for dy in dy.chunks((n_patches + 1) * hidden) {
                patches.extend_from_slice(&dy[hidden..]);
                class.iter_mut().zip(dy).for_each(|(c, &dy)| *c += f64::from(dy));
                positions.iter_mut().zip(dy).for_each(|(p, &dy)| *p += f64::from(dy));
            }
            assert_eq!(device.get(&d_patches), patches, "{what}");
            let tolerance = Tolerance::of_sums(images, 0.0);
            tolerance.check(&what, &device.get(&d_class), &class);
            tolerance.check(&what, &device.get(&d_positions), &positions);
        }
        let (mut d_patches, dy) = (device.blank(&[4, 8]), device.blank(&[5, 8]));
        let (mut d_class, mut d_positions) = (device.put_f32(&[8], &[0.0; 8]), device.put_f32(&[3, 8], &[0.0; 24]));
        let refused = device.ops.clip_embed_backward(&mut d_patches, &mut d_class, &mut d_positions, &dy);
        assert!(refused.unwrap_err().to_string().contains("clip_embed_backward: dy"), "{}", device.name);
    }
}

#[test]
fn rows_are_added_copy_after_copy() {
    for device in &grad_devices() {
        let (dst, src) = (device.round(&random(5 * 3, 1)), device.round(&random(4 * 3, 2)));
        let mut sum = device.put(&[5, 3], &dst);
        let copies =
            [RowCopy { dst: 3, src: 0, n_rows: 2 }, RowCopy { dst: 0, src: 2, n_rows: 1 }, RowCopy { dst: 3, src: 1, n_rows: 1 }];
        device.ops.add_rows(&mut sum, &device.put(&[4, 3], &src), &copies).unwrap();
        let mut expected = dst;
        for (to, from) in [(3, 0), (4, 1), (0, 2), (3, 1)] {
            (0..3).for_each(|i| expected[to * 3 + i] += src[from * 3 + i]);
        }
        // Rounded to a shorter dtype once.
        assert_eq!(device.get(&sum), device.round(&expected), "{}", device.name);
        let beyond = [RowCopy { dst: 4, src: 0, n_rows: 2 }];
        let refused = device.ops.add_rows(&mut sum, &device.put(&[4, 3], &src), &beyond);
        assert!(refused.unwrap_err().to_string().contains("add_rows: rows"));
    }
}

#[test]
fn clear_and_scale() {
    for device in &grad_devices() {
        let x = device.round(&random(4097, 1));
        let mut t = device.put(&[4097], &x);
        device.ops.scale(&mut t, 0.25).unwrap();
        assert_eq!(device.get(&t), x.iter().map(|x| x * 0.25).collect::<Vec<_>>(), "{}", device.name);
        // Of f32 on all devices.
        let mut t = device.put_f32(&[3], &[0.1, 1e30, -7.0]);
        device.ops.scale(&mut t, 0.25).unwrap();
        assert_eq!(device.get(&t), [0.1 * 0.25, 1e30 * 0.25, -1.75], "{}", device.name);
        let mut t = device.put(&[3], &[f32::NAN, f32::INFINITY, 1.0]);
        device.ops.clear(&mut t).unwrap();
        assert_eq!(device.get(&t), [0.0; 3], "{}", device.name);
    }
}

/// The loss of each row and its gradient, of few and of many logits, small and so large that exp(logit) is no f32.
#[test]
fn cross_entropy() {
    for device in &grad_devices() {
        for (rows, vocab) in [(1, 1), (1, 2), (2, 3), (3, 111), (9, 577), (111, 16), (577, 40), (3, 32003)] {
            for (size, offset) in [(3.0, 0.0), (40.0, 1000.0), (200.0, -5e4)] {
                let what = format!("cross_entropy {rows}x{vocab} of {size} around {offset} on {}", device.name);
                let logits: Vec<f32> = random(rows * vocab, 1).iter().map(|x| x * size + offset).collect();
                let labels: Vec<u32> = (0..rows).map(|r| ((r * 7919 + vocab - 1) % vocab) as u32).collect();
                let scale = 0.37;
                let (mut there, mut loss) = (device.put_f32(&[rows, vocab], &logits), device.put_f32(&[rows], &vec![7.0; rows]));
                device.ops.cross_entropy(&mut there, &mut loss, &labels, scale).unwrap();
                let of_row = |row: &[f64], label: u32| {
                    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    max + row.iter().map(|l| (l - max).exp()).sum::<f64>().ln() - row[label as usize]
                };
                let (mut loss_exact, mut d_exact) = (Vec::new(), Vec::new());
                for (row, &label) in logits.chunks(vocab).zip(&labels) {
                    let row = wide(row);
                    let at_label = row[label as usize];
                    let loss = of_row(&row, label);
                    loss_exact.push(loss);
                    // softmax_i = exp(logit_i − ln Σ exp)
                    let p = |i: usize| (row[i] - loss - at_label).exp() - f64::from(u8::from(i == label as usize));
                    d_exact.extend((0..vocab).map(|i| p(i) * f64::from(scale)));
                }
                let (got, d_got) = (device.get(&loss), device.get(&there));
                // Differences of logits are exact but for the rounding of the result; the rest is exp, within 2 ulp, and a sum of positive
                // numbers.
                let tolerance = Tolerance { relative: 6.0 * ULP, abs: 0.0 };
                tolerance.check(&format!("loss of {what}"), &got, &loss_exact);
                let tolerance = tolerance.and_abs(2.0 * ULP * f64::from(scale));
                tolerance.check(&what, &d_got, &d_exact);
                if rows * vocab > 4000 {
                    continue;
                }
                let f = |at: &[Vec<f64>]| {
                    f64::from(scale) * at[0].chunks(vocab).zip(&labels).map(|(row, &label)| of_row(row, label)).sum::<f64>()
                };
                // In f64 a logit near 5e4 moves by steps of 7e-12, 1e-8 of what it is moved by.
                tolerance.and_abs(1e-6).check_differences(&what, &f, &[wide(&logits)], 0, &d_got);
            }
        }
    }
}

#[test]
fn cross_entropy_of_broken_rows() {
    for device in &grad_devices() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        let mut logits = vec![0.5; 4 * 40];
        (logits[3], logits[40 + 39], logits[80 + 17]) = (nan, inf, -inf);
        let mut there = device.put_f32(&[4, 40], &logits);
        let mut loss = device.put_f32(&[4], &[0.0; 4]);
        device.ops.cross_entropy(&mut there, &mut loss, &[0, 0, 0, 0], 1.0).unwrap();
        let (loss, d) = (device.get(&loss), device.get(&there));
        assert!(loss[0].is_nan() && loss[1].is_nan(), "{}: {loss:?}", device.name);
        // A logit of −∞ has no probability, and no gradient.
        assert!((loss[2] - 39f32.ln()).abs() < 1e-6 && (loss[3] - 40f32.ln()).abs() < 1e-6, "{}: {loss:?}", device.name);
        assert!(d[80 + 17] == 0.0 && d[80..].iter().all(|d| d.is_finite()), "{}", device.name);
        let refused = |labels: &[u32]| {
            let (mut there, mut loss) = (device.put_f32(&[4, 40], &logits), device.put_f32(&[4], &[0.0; 4]));
            device.ops.cross_entropy(&mut there, &mut loss, labels, 1.0).unwrap_err().to_string()
        };
        assert_eq!(refused(&[0, 1, 40, 3]), "cross_entropy: label is 40, expected \"below 40\"");
        assert_eq!(refused(&[0, 1, 2]), "cross_entropy: number of labels is 3, expected 4");
    }
}

/// Element by element as the definition says, on every device; and as often as p says.
#[test]
fn dropout_is_the_definition() {
    for device in &grad_devices() {
        for (n, p, key) in [(1, 0.5, 0), (3, 0.1, 1), (4097, 0.05, 42), (100_003, 0.3, 0x0123_4567_89ab_cdef), (9999, 0.0, 7)] {
            let what = format!("dropout of {n} by {p} on {}", device.name);
            let x = device.round(&random(n, 1));
            let mut y = device.blank(&[n]);
            device.ops.dropout(&mut y, &device.put(&[n], &x), p, key).unwrap();
            let y = device.get(&y);
            let n_dropped = y.iter().zip(&x).filter(|(y, x)| **y == 0.0 && **x != 0.0).count();
            for i in 0..n {
                let bits = philox([i as u32 / 4, 0, 0, 0], [key as u32, (key >> 32) as u32])[i % 4];
                let is_dropped = f64::from(bits) < f64::from(p) * 2f64.powi(32);
                let expected = if is_dropped { 0.0 } else { f64::from(x[i]) / (1.0 - f64::from(p)) };
                let limit = (2.0 * ULP + device.epsilon()) * expected.abs();
                assert!((f64::from(y[i]) - expected).abs() <= limit, "{what}: element {i} is {}, expected {expected}", y[i]);
            }
            let expected = n as f64 * f64::from(p);
            // Five standard deviations.
            let limit = 5.0 * (expected * (1.0 - f64::from(p))).sqrt() + 1.0;
            assert!((n_dropped as f64 - expected).abs() <= limit, "{what}: {n_dropped} were dropped, {expected} expected");
        }
        // The backward drops the same: y and dx are x and dy times one mask. Another key has another.
        let drop = |values: &[f32], key| {
            let mut y = device.blank(&[200]);
            device.ops.dropout(&mut y, &device.put(&[200], values), 0.5, key).unwrap();
            device.get(&y)
        };
        let (ones, twos) = (drop(&[1.0; 200], 9), drop(&[2.0; 200], 9));
        assert_eq!(ones.iter().map(|y| y * 2.0).collect::<Vec<_>>(), twos, "{}", device.name);
        assert_ne!(ones, drop(&[1.0; 200], 10), "{}", device.name);
        // What is dropped is gone, whatever it was.
        assert!(drop(&[f32::INFINITY; 200], 9).iter().all(|y| !y.is_nan()), "{}", device.name);
        for p in [1.0, -0.1, f32::NAN] {
            let error = device.ops.dropout(&mut device.blank(&[1]), &device.blank(&[1]), p, 0).unwrap_err().to_string();
            assert!(error.contains("dropout: p is"), "{error}");
        }
    }
}

#[test]
fn sq_norm_is_the_sum_of_squares() {
    for device in &grad_devices() {
        let sizes = [1, 15, 17, 16384, 16385, 100_003];
        let values: Vec<Vec<f32>> = sizes.iter().map(|&n| random(n, n as u64)).collect();
        let tensors: Vec<Tensor> = values.iter().map(|v| device.put_f32(&[v.len()], v)).collect();
        let exact: f64 = values.iter().flatten().map(|&x| f64::from(x).powi(2)).sum();
        let got = device.ops.sq_norm(&tensors.iter().collect::<Vec<_>>()).unwrap();
        // Squares of f32 are exact in f64, and so are sums of them nearly.
        assert!((got / exact - 1.0).abs() < 1e-12, "{}: {got}, exactly {exact}", device.name);
        // Squares beyond what f32 holds.
        let large = device.put_f32(&[2], &[1e30, 1e-30]);
        assert!((device.ops.sq_norm(&[&large]).unwrap() / f64::from(1e30f32).powi(2) - 1.0).abs() < 1e-12, "{}", device.name);
        assert_eq!(device.ops.sq_norm(&[]).unwrap(), 0.0);
        for broken in [f32::NAN, f32::INFINITY] {
            let t = device.put_f32(&[3], &[1.0, broken, 1.0]);
            assert!(!device.ops.sq_norm(&[&tensors[0], &t]).unwrap().is_finite(), "{}", device.name);
        }
    }
}

/// `torch.optim.AdamW`, as its documentation writes it, in f64.
fn adamw(param: &mut [f64], m: &mut [f64], v: &mut [f64], grad: &[f64], o: &AdamW) {
    for i in 0..param.len() {
        let g = o.grad_scale * grad[i];
        param[i] -= o.lr * o.weight_decay * param[i];
        m[i] = o.beta1 * m[i] + (1.0 - o.beta1) * g;
        v[i] = o.beta2 * v[i] + (1.0 - o.beta2) * g * g;
        let m_hat = m[i] / (1.0 - o.beta1.powi(o.step as i32));
        let v_hat = v[i] / (1.0 - o.beta2.powi(o.step as i32));
        param[i] -= o.lr * m_hat / (v_hat.sqrt() + o.eps);
    }
}

#[test]
fn adamw_is_the_equation() {
    for device in &grad_devices() {
        for (n, weight_decay) in [(1, 0.0), (111, 0.1), (16385, 0.01)] {
            let start = random(n, 1);
            let [mut param, mut m, mut v] = [start.clone(), vec![0.0; n], vec![0.0; n]].map(|t| device.put_f32(&[n], &t));
            let [mut param_exact, mut m_exact, mut v_exact] = [wide(&start), vec![0.0; n], vec![0.0; n]];
            let mut rounded = device.ops.upload(Tensor::zeros(&[n], DType::Bf16)).unwrap();
            let mut halves = device.ops.upload(Tensor::zeros(&[n], DType::F16)).unwrap();
            for step in 1..=50 {
                // As large as gradients are, and some that are far below eps.
                let grad: Vec<f32> = random(n, 100 + step).iter().enumerate().map(|(i, g)| g * [1e-2, 3.0, 1e-9][i % 3]).collect();
                let lr = 1e-2 * (1.0 - step as f64 / 60.0);
                let options = AdamW { lr, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay, step, grad_scale: 0.3 };
                let there = device.put_f32(&[n], &grad);
                let to = if step % 2 == 0 { Some(&mut rounded) } else { Some(&mut halves) };
                device.ops.adamw(&mut param, &mut m, &mut v, &there, to, &options).unwrap();
                adamw(&mut param_exact, &mut m_exact, &mut v_exact, &wide(&grad), &options);
                let param = device.get(&param);
                let what = format!("{n} parameters after {step} steps on {}", device.name);
                // Each step rounds a few times.
                let tolerance = Tolerance { relative: 4.0 * ULP * (step as f64).sqrt(), abs: 0.0 };
                tolerance.check(&what, &param, &param_exact);
                // Gradients of both signs cancel, and leave their roundings.
                let of_m = tolerance.and_abs(ULP * if n == 1 { 1e-2 } else { 1.0 });
                of_m.check(&format!("m of {what}"), &device.get(&m), &m_exact);
                tolerance.check(&format!("v of {what}"), &device.get(&v), &v_exact);
                if step % 2 == 0 {
                    let expected: Vec<f32> = param.iter().map(|&p| bf16::from_f32(p).to_f32()).collect();
                    assert_eq!(device.get(&rounded), expected, "bf16 of {what}");
                } else {
                    let expected: Vec<f32> = param.iter().map(|&p| f16::from_f32(p).to_f32()).collect();
                    assert_eq!(device.get(&halves), expected, "f16 of {what}");
                }
            }
        }
        let t = |n: usize| device.put_f32(&[n], &vec![0.0; n]);
        let options = AdamW { lr: 1.0, beta1: 0.9, beta2: 0.9, eps: 1e-8, weight_decay: 0.0, step: 0, grad_scale: 1.0 };
        let refused = device.ops.adamw(&mut t(2), &mut t(2), &mut t(2), &t(2), None, &options).unwrap_err().to_string();
        assert_eq!(refused, "adamw: step is 0, expected \"counted from 1\"");
        let options = AdamW { step: 1, ..options };
        let refused = device.ops.adamw(&mut t(2), &mut t(2), &mut t(3), &t(2), None, &options).unwrap_err().to_string();
        assert!(refused.contains("adamw: v is [3]"), "{refused}");
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    for device in &grad_devices() {
        let ops = &device.ops;
        let t = |rows, width: usize| device.blank(&[rows, width]);
        let v = |n: usize| device.put_f32(&[n], &vec![0.0; n]);
        let says = |result: llava_engine::error::Result<()>, word: &str| {
            let error = result.unwrap_err().to_string();
            assert!(error.contains(word), "{}: {error} lacks {word}", device.name);
        };
        says(ops.rms_norm_backward(&mut t(2, 3), None, &t(2, 4), &t(2, 3), &v(3), EPS), "rms_norm_backward: dy");
        says(ops.rms_norm_backward(&mut t(2, 3), Some(&mut v(2)), &t(2, 3), &t(2, 3), &v(3), EPS), "rms_norm_backward: dw");
        let (mut dw, mut db) = (v(3), v(4));
        let refused = ops.layer_norm_backward(&mut t(2, 3), Some([&mut dw, &mut db]), &t(2, 3), &t(2, 3), &v(3), EPS);
        says(refused, "layer_norm_backward: db");
        says(ops.layer_norm_backward(&mut t(1, 3), None, &t(2, 3), &t(2, 3), &v(3), EPS), "layer_norm_backward: dx");
        says(ops.silu_mul_backward(&mut t(2, 6), &t(2, 3), &t(2, 5)), "silu_mul_backward: gate_up");
        says(ops.silu_mul_backward(&mut t(2, 5), &t(2, 3), &t(2, 6)), "silu_mul_backward: d_gate_up");
        says(ops.activate(&mut t(2, 3), &t(3, 2), Activation::Gelu), "activate: y");
        says(ops.activate_backward(&mut t(2, 3), &t(2, 3), &t(2, 4), Activation::Gelu), "activate_backward: d");
        says(ops.dropout(&mut t(2, 3), &t(2, 4), 0.1, 0), "dropout: y");
        let halves = ops.upload(Tensor::zeros(&[3], DType::F16)).unwrap();
        says(ops.sq_norm(&[&halves]).map(|_| ()), "sq_norm: dtype");
        says(ops.rms_norm_backward(&mut t(2, 3), None, &t(2, 3), &t(2, 3), &halves, EPS), "rms_norm_backward: dtype of w");
    }
}

#[test]
fn nothing_is_done_for_no_rows() {
    for device in &grad_devices() {
        let (ops, none, w) = (&device.ops, |width| device.put(&[0, width], &[]), device.put_f32(&[8], &[1.0; 8]));
        let mut dw = device.put_f32(&[8], &[3.0; 8]);
        ops.rms_norm_backward(&mut none(8), Some(&mut dw), &none(8), &none(8), &w, EPS).unwrap();
        let mut db = device.put_f32(&[8], &[4.0; 8]);
        ops.layer_norm_backward(&mut none(8), Some([&mut dw, &mut db]), &none(8), &none(8), &w, EPS).unwrap();
        assert_eq!((device.get(&dw), device.get(&db)), (vec![3.0; 8], vec![4.0; 8]), "{}", device.name);
        ops.silu_mul_backward(&mut none(16), &none(8), &none(16)).unwrap();
        ops.activate(&mut none(8), &none(8), Activation::Gelu).unwrap();
        ops.activate_backward(&mut none(8), &none(8), &none(8), Activation::QuickGelu).unwrap();
        ops.embed_backward(&mut device.put_f32(&[3, 8], &[0.0; 24]), &none(8), &[]).unwrap();
        ops.cross_entropy(&mut device.put_f32(&[0, 8], &[]), &mut device.put_f32(&[0], &[]), &[], 1.0).unwrap();
        ops.dropout(&mut none(8), &none(8), 0.5, 1).unwrap();
        ops.add_rows(&mut none(8), &none(8), &[]).unwrap();
        let mut positions = device.put_f32(&[3, 8], &[5.0; 24]);
        ops.clip_embed_backward(&mut none(8), &mut dw, &mut positions, &none(8)).unwrap();
        assert_eq!(device.get(&positions), [5.0; 24], "{}", device.name);
        let options = AdamW { lr: 1.0, beta1: 0.9, beta2: 0.9, eps: 1e-8, weight_decay: 0.0, step: 1, grad_scale: 1.0 };
        let nothing = || device.put_f32(&[0], &[]);
        ops.adamw(&mut nothing(), &mut nothing(), &mut nothing(), &nothing(), None, &options).unwrap();
        assert_eq!(ops.sq_norm(&[&nothing()]).unwrap(), 0.0);
    }
}

/// Timed ops do what they do, and count what the equations say.
#[test]
fn profiled_ops_are_counted() {
    for device in grad_devices() {
        let w = Weight::stacked(vec![Arc::new(device.put(&[8, 4], &random(32, 1)))]).unwrap();
        let (dy, x) = (device.put(&[3, 8], &random(24, 2)), device.put(&[3, 4], &random(12, 3)));
        let (mut dx, mut profiled_dx) = (device.blank(&[3, 4]), device.blank(&[3, 4]));
        device.ops.linear_dx(&mut dx, &dy, &w, Update::Add).unwrap();
        let mut dw = device.put_f32(&[8, 4], &[0.0; 32]);
        let profiled: Profiled<dyn GradOps> = Profiled::new(device.ops);
        profiled.linear_dx(&mut profiled_dx, &dy, &w, Update::Add).unwrap();
        assert_eq!(profiled.download(&profiled_dx).unwrap(), profiled.download(&dx).unwrap());
        profiled.linear_dw(&mut dw, &dy, 0, &x).unwrap();
        assert!(profiled.download(&dw).unwrap().iter().any(|&d| d != 0.0));
        assert!(profiled.sq_norm(&[&dw]).unwrap() > 0.0);
        let records: BTreeMap<_, _> = profiled.records().snapshot().into_iter().collect();
        let size = device.dtype.size() as f64;
        let counted = |op: &str| (records[op].calls, records[op].flops, records[op].bytes);
        assert_eq!(counted("linear_dx"), (1, 192.0, size * (32.0 + 24.0 + 2.0 * 12.0)), "{}", device.name);
        assert_eq!(counted("linear_dw"), (1, 192.0, 2.0 * 4.0 * 32.0 + size * (24.0 + 12.0)), "{}", device.name);
        assert_eq!(counted("sq_norm"), (1, 64.0, 4.0 * 32.0), "{}", device.name);
        assert_eq!(records["linear_dx"].stored_bytes, size * 32.0);
    }
}

/// What the ops with sums in them give of some hundred rows, and dropout.
fn results(device: &Device) -> (Vec<Vec<f32>>, f64) {
    let t = |seed| device.put(&[577, 33], &random(577 * 33, seed));
    let f32s = |shape: &[usize], seed| device.put_f32(shape, &random(shape.iter().product(), seed));
    let old = [random(577 * 33, 1), random(33, 2), random(33, 3)];
    let mut results = Vec::new();
    for norm in &NORMS {
        let [dy, x, w] = [(577 * 33, 4), (577 * 33, 5), (33, 6)].map(|(n, seed)| random(n, seed));
        results.extend(norm_backward(device, norm, &old, &dy, &x, &w, true));
    }
    let ids: Vec<u32> = (0..577).map(|i| i * i % 5).collect();
    let (mut d_table, mut logits, mut loss) = (f32s(&[5, 33], 7), f32s(&[577, 33], 9), f32s(&[577], 13));
    device.ops.embed_backward(&mut d_table, &t(8), &ids).unwrap();
    device.ops.cross_entropy(&mut logits, &mut loss, &ids, 0.1).unwrap();
    let (mut d_class, mut d_positions) = (f32s(&[33], 14), f32s(&[2, 33], 15));
    let (mut d_patches, dy) = (device.blank(&[288, 33]), device.put(&[576, 33], &random(576 * 33, 1)));
    device.ops.clip_embed_backward(&mut d_patches, &mut d_class, &mut d_positions, &dy).unwrap();
    let mut dropped = device.blank(&[577, 33]);
    device.ops.dropout(&mut dropped, &t(10), 0.4, 3).unwrap();
    results.extend([d_table, loss, logits, d_patches, d_class, d_positions, dropped].map(|t| device.get(&t)));
    (results, device.ops.sq_norm(&[&f32s(&[100_003], 11), &f32s(&[577, 33], 12)]).unwrap())
}

/// Bit for bit, and from run to run.
#[test]
fn threads_change_nothing() {
    check_repeatable(results);
}
