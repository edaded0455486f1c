//! Gradients of attention and of its rotations, against finite differences of the naive ops in f64 and against the chain rule in f64; and that
//! no number of threads changes them.

mod reference;
mod support;

use llava_engine::ops::{GradOps, Heads, RopeTable, Rotation, Span};
use reference::attention::{Sequence, exact as exact_attention, gradient as attention_gradient};
use reference::gradient::{Tolerance, dot, wide};
use reference::random;
use reference::rows::exact as exact_rows;
use support::devices::{Shared, TestDevice, check_repeatable, grad_cpus, grad_devices};

type Device = TestDevice<dyn GradOps>;

/// The most products of a function that is evaluated again and again for its differences.
const MAX_DIFFERENCES: usize = 1 << 21;

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
    /// What is added to queries and taken from keys: scores are as far below zero as its square says.
    apart: f32,
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
        Self { sequences: sequences.to_vec(), heads, causal, size: 2.0, apart: 0.0 }
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
            let moved = |column: usize| match column {
                _ if column < q_width => self.apart,
                _ if column < q_width + heads.kv_width() => -self.apart,
                _ => 0.0,
            };
            let qkv =
                random(tokens * width, 11).iter().enumerate().map(|(i, x)| x * self.size + moved(i % width)).collect::<Vec<_>>();
            let (qkv, d_out) = (device.round(&qkv), device.round(&random(tokens * q_width, 12)));
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
                let [size, apart] = [self.size, self.apart].map(f64::from);
                let score = (size * size / 3.0 + apart * apart) * (heads.head_dim as f64).sqrt();
                let size = size + apart;
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
                let rounding = f64::from(f32::EPSILON) * size * (heads.head_dim as f64).sqrt();
                // D is of an out that is rounded to 16 bits, by as much as half an epsilon of numbers of `size`, and meets queries and keys of
                // `size`. Where gradients cancel, that was up to a 40th of epsilon·size² beyond the rest.
                let rounding = rounding + device.epsilon() * f64::from(self.size) * size / 32.0;
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

/// Blocks of queries and keys with odd ends, several spans, heads that share keys; the longest of them on the CPU alone, since a simulator
/// takes minutes.
#[test]
fn attention_of_many_rows() {
    let (devices, cpus) = (grad_devices(), grad_cpus());
    for causal in [false, true] {
        for (devices, sequences, heads) in [
            (&devices, &[111][..], heads(2, 1, 80)),
            (&cpus, &[577], heads(1, 1, 64)),
            (&cpus, &[989], heads(2, 1, 8)),
            (&devices, &[128, 1, 129, 64], heads(4, 2, 24)),
            (&devices, &[3, 257], heads(3, 1, 128)),
        ] {
            Attention::new(sequences, heads, causal).check(devices);
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

/// Scores so far below zero that exp(−lse), the probability of a score of zero, is no f32: no such score may come of tokens that are not there.
#[test]
fn attention_with_scores_below_zero() {
    let devices = grad_devices();
    for causal in [false, true] {
        Attention { size: 1.0, apart: 4.0, ..Attention::new(&[9, 33], heads(2, 1, 64), causal) }.check(&devices);
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
        assert!(refused(4, 32, &[span(2, 2, 0), span(0, 3, 0)], heads).contains("rows of two spans"));
        assert!(refused(4, 32, &whole, Heads { n_kv_heads: 0, ..heads }).contains("heads"));
        assert!(refused(4, 32, &whole, Heads { head_dim: 12, ..heads }).contains("heads"));
        let mut wrong = device.put_f32(&[4, 3], &[0.0; 12]);
        let error = device.ops.attention_lse(&mut t(4, 16), &mut wrong, &t(4, 32), &whole, heads, true).unwrap_err();
        assert!(error.to_string().contains("attention_lse: lse"), "{error}");
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
/// What attention of some hundred rows gives.
fn results(device: &Device) -> [Vec<f32>; 3] {
    let attention = Attention::new(&[300, 5, 171], heads(4, 2, 24), true);
    let (spans, tokens) = attention.spans();
    let (width, q_width) = (attention.heads.qkv_width(), attention.heads.q_width());
    let qkv = device.put(&[tokens, width], &random(tokens * width, 3));
    let d_out = device.put(&[tokens, q_width], &random(tokens * q_width, 4));
    let (mut out, mut d_qkv) = (device.blank(&[tokens, q_width]), device.blank(&[tokens, width]));
    let mut lse = device.put_f32(&[tokens, 4], &vec![77.0; tokens * 4]);
    device.ops.attention_lse(&mut out, &mut lse, &qkv, &spans, attention.heads, true).unwrap();
    device.ops.attention_backward(&mut d_qkv, &qkv, &out, &d_out, &lse, &spans, attention.heads, true).unwrap();
    [out, lse, d_qkv].map(|t| device.get(&t))
}

/// Bit for bit, and from run to run.
#[test]
fn threads_change_nothing() {
    check_repeatable(results);
}
