//! `attention` on every device against f64: pages, groups, odd lengths, masks, and decoding over long contexts.

mod reference;
mod support;

use llava_engine::dtype::DType;
use llava_engine::ops::{Heads, KvLayer, KvSource, Span, kv};
use llava_engine::tensor::Tensor;
use reference::attention::{Sequence, exact};
use reference::{Errors, random};
use support::devices::{TestDevice, devices, kernel_devices, rounded};

/// What rows of no span hold before and after; the same in all dtypes.
const SENTINEL: f32 = 1024.0;

/// One op to test.
#[derive(Clone, Debug)]
struct Case {
    /// (past, rows)
    sequences: Vec<(usize, usize)>,
    heads: Heads,
    causal: bool,
    /// Page length of the cache; none: the keys of the rows themselves.
    page_tokens: Option<usize>,
    /// Size of queries and keys: what scores grow with.
    size: f32,
    /// Whether the cache has 8 bits.
    is_i8: bool,
}

fn heads(n_heads: usize, n_kv_heads: usize, head_dim: usize) -> Heads {
    Heads { n_heads, n_kv_heads, head_dim }
}

/// A case of common size.
fn case(sequences: &[(usize, usize)], heads: Heads, causal: bool, page_tokens: Option<usize>) -> Case {
    Case { sequences: sequences.to_vec(), heads, causal, page_tokens, size: 3.0, is_i8: false }
}

/// The op step by step: scores and softmax in f32, probabilities in `dtype` before they meet V, as on tensor cores, and the result in it.
fn naive(s: &Sequence<'_>, visible: impl Fn(usize) -> usize, dtype: DType) -> Vec<f32> {
    let d = s.head_dim;
    let mut out = Vec::new();
    for (row, q) in s.q.chunks(s.n_heads * d).enumerate() {
        for (head, q) in q.chunks(d).enumerate() {
            let kv_head = head / (s.n_heads / s.n_kv_heads);
            let at = |token: usize| (token * s.n_kv_heads + kv_head) * d;
            let dot = |token| q.iter().zip(&s.k[at(token)..][..d]).fold(0.0, |sum, (q, k)| sum + q * k);
            let scores: Vec<f32> = (0..visible(row)).map(|token| dot(token) / (d as f32).sqrt()).collect();
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let (mut sum, mut acc) = (0.0, vec![0.0; d]);
            for (token, score) in scores.iter().enumerate() {
                let p = (score - max).exp();
                sum += p;
                let p = rounded(p, dtype);
                acc.iter_mut().zip(&s.v[at(token)..][..d]).for_each(|(acc, v)| *acc += p * v);
            }
            out.extend(acc.iter().map(|acc| rounded(acc / sum, dtype)));
        }
    }
    out
}

/// Keys, or values, of a cache: full of NaN, but for what was put there.
struct Pages {
    /// `[n_pages, n_kv_heads, page_tokens, head_dim]`
    shape: [usize; 4],
    values: Vec<f32>,
    ints: Vec<i8>,
    scales: Vec<f32>,
}

impl Pages {
    fn new(shape: [usize; 4]) -> Self {
        let len: usize = shape.iter().product();
        Self { shape, values: vec![f32::NAN; len], ints: vec![i8::MAX; len], scales: vec![f32::NAN; len / shape[3]] }
    }

    /// Puts a token's numbers of one head in slot `slot`; with 8 bits they become what it holds.
    fn put(&mut self, slot: usize, x: &mut [f32], is_i8: bool) {
        let place = slot * x.len()..(slot + 1) * x.len();
        if is_i8 {
            let q = &mut self.ints[place.clone()];
            let scale = kv::quantize(x, q);
            self.scales[slot] = scale;
            x.iter_mut().zip(q).for_each(|(x, q)| *x = scale * f32::from(*q));
        }
        self.values[place].copy_from_slice(x);
    }

    /// Elements and scales on a device.
    fn tensors(&self, device: &TestDevice, is_i8: bool) -> (Tensor, Option<Tensor>) {
        if !is_i8 {
            return (device.put(&self.shape, &self.values), None);
        }
        let ints = device.ops.upload(Tensor::from_slice(&self.shape, &self.ints)).unwrap();
        (ints, Some(device.put_f32(&self.shape[..3], &self.scales)))
    }
}

/// A [`Span`] that has its pages.
struct OwnedSpan {
    first_row: usize,
    n_rows: usize,
    past: usize,
    pages: Vec<u32>,
}

impl OwnedSpan {
    fn borrowed(&self) -> Span<'_> {
        Span { first_row: self.first_row, n_rows: self.n_rows, past: self.past, pages: &self.pages }
    }
}

/// Inputs of a case as one dtype holds them, and what should come out.
struct Prepared {
    /// `[1 + rows of the spans, each followed by a row of none, qkv_width]`
    qkv: Vec<f32>,
    spans: Vec<OwnedSpan>,
    n_rows: usize,
    k_pages: Pages,
    v_pages: Pages,
    exact: Vec<f64>,
    naive: Vec<f32>,
}

impl Case {
    fn prepare(&self, dtype: DType) -> Prepared {
        let Heads { n_heads, n_kv_heads, head_dim: d } = self.heads;
        let (qw, kvw, width) = (self.heads.q_width(), self.heads.kv_width(), self.heads.qkv_width());
        let noise = |n, size: f32, seed| random(n, seed).into_iter().map(|x| rounded(x * size, dtype)).collect::<Vec<_>>();

        // Pages in an order that is not that of the sequences, and some that nobody has: full of NaN, as the ends of last pages are.
        let page_tokens = self.page_tokens.unwrap_or(1);
        let n_pages: Vec<usize> = self.sequences.iter().map(|(past, rows)| (past + rows).div_ceil(page_tokens)).collect();
        let total = n_pages.iter().sum::<usize>() + 3;
        let mut free: Vec<u32> = (0..total as u32).rev().collect();
        let cache_shape = [if self.page_tokens.is_some() { total } else { 0 }, n_kv_heads, page_tokens, d];
        let n_rows = 1 + self.sequences.iter().map(|(_, rows)| rows + 1).sum::<usize>();
        let mut p = Prepared {
            qkv: vec![f32::NAN; n_rows * width],
            spans: Vec::new(),
            n_rows,
            k_pages: Pages::new(cache_shape),
            v_pages: Pages::new(cache_shape),
            exact: Vec::new(),
            naive: Vec::new(),
        };
        let mut first_row = 1;
        for (i, &(past, rows)) in self.sequences.iter().enumerate() {
            let (context, seed) = (past + rows, 10 * i as u64);
            let q = noise(rows * qw, self.size, seed);
            let (mut k, mut v) = (noise(context * kvw, self.size, seed + 1), noise(context * kvw, 1.0, seed + 2));
            for row in 0..rows {
                p.qkv[(first_row + row) * width..][..qw].copy_from_slice(&q[row * qw..][..qw]);
            }
            let pages: Vec<u32> = (0..n_pages[i]).map(|_| free.remove(free.len() / 2)).collect();
            for t in 0..context {
                if self.page_tokens.is_none() {
                    let row = &mut p.qkv[(first_row + t) * width..][..width];
                    row[qw..][..kvw].copy_from_slice(&k[t * kvw..][..kvw]);
                    row[qw + kvw..].copy_from_slice(&v[t * kvw..][..kvw]);
                    continue;
                }
                for head in 0..n_kv_heads {
                    let slot = (pages[t / page_tokens] as usize * n_kv_heads + head) * page_tokens + t % page_tokens;
                    let from = t * kvw + head * d;
                    p.k_pages.put(slot, &mut k[from..][..d], self.is_i8);
                    p.v_pages.put(slot, &mut v[from..][..d], self.is_i8);
                }
            }
            let sequence = Sequence { q: &q, k: &k, v: &v, n_heads, n_kv_heads, head_dim: d };
            let visible = |row| if self.causal { past + row + 1 } else { context };
            p.exact.extend(exact(&sequence, visible));
            // Kernels for several rows bring integers to the dtype of activations.
            let is_widened = self.is_i8 && self.sequences.iter().any(|(_, rows)| *rows != 1);
            let [wide_k, wide_v] =
                [&k, &v].map(|x| x.iter().map(|&x| if is_widened { rounded(x, dtype) } else { x }).collect::<Vec<_>>());
            p.naive.extend(naive(&Sequence { k: &wide_k, v: &wide_v, ..sequence }, visible, dtype));
            p.spans.push(OwnedSpan { first_row, n_rows: rows, past, pages });
            first_row += rows + 1;
        }
        p
    }

    /// All rows of `out`, in which no span's had been written before.
    fn run(&self, p: &Prepared, device: &TestDevice) -> Vec<f32> {
        let qw = self.heads.q_width();
        let spans: Vec<Span<'_>> = p.spans.iter().map(OwnedSpan::borrowed).collect();
        let mut out = device.put(&[p.n_rows, qw], &vec![SENTINEL; p.n_rows * qw]);
        let qkv = device.put(&[p.n_rows, self.heads.qkv_width()], &p.qkv);
        let layer = self.page_tokens.map(|_| {
            let [(k, k_scales), (v, v_scales)] = [&p.k_pages, &p.v_pages].map(|pages| pages.tensors(device, self.is_i8));
            KvLayer { k, v, scales: k_scales.zip(v_scales).map(|(k, v)| [k, v]) }
        });
        let source = layer.as_ref().map_or(KvSource::Own, KvSource::Paged);
        device
            .ops
            .attention(&mut out, &qkv, source, &spans, self.heads, self.causal)
            .unwrap_or_else(|e| panic!("{self:?} on {}: {e}", device.name));
        device.get(&out)
    }

    /// With a cache in the dtype of activations and in 8 bits, if there is one.
    fn check(&self, devices: &[TestDevice]) {
        self.check_as_it_is(devices);
        if self.page_tokens.is_some() {
            Self { is_i8: true, ..self.clone() }.check_as_it_is(devices);
        }
    }

    fn check_as_it_is(&self, devices: &[TestDevice]) {
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let devices: Vec<_> = devices.iter().filter(|d| d.dtype == dtype).collect();
            if devices.is_empty() {
                continue;
            }
            let p = self.prepare(dtype);
            let qw = self.heads.q_width();
            for device in devices {
                let what = format!("{self:?} on {}", device.name);
                let out = self.run(&p, device);
                let mut got = Vec::new();
                let mut next_row = 0;
                for &OwnedSpan { first_row, n_rows, .. } in &p.spans {
                    assert!(
                        out[next_row * qw..first_row * qw].iter().all(|&x| x == SENTINEL),
                        "{what}: wrote before row {first_row}"
                    );
                    next_row = first_row + n_rows;
                    got.extend_from_slice(&out[first_row * qw..next_row * qw]);
                }
                assert!(out[next_row * qw..].iter().all(|&x| x == SENTINEL), "{what}: wrote after the last span");
                Errors::of(&got, &p.exact).check_twice(Errors::of(&p.naive, &p.exact), &what);
            }
        }
    }
}

#[test]
fn own_keys() {
    let devices = devices();
    let odd = [1, 2, 3, 63, 64, 65, 111].map(|rows| (0, rows));
    for causal in [false, true] {
        for head_dim in [8, 16] {
            case(&odd, heads(2, 1, head_dim), causal, None).check(&devices);
        }
        for head_dim in [64, 80, 96, 128] {
            case(&[(0, 3), (0, 65)], heads(2, 2, head_dim), causal, None).check(&devices);
        }
    }
    // More than two tiles, the last of one row.
    case(&[(0, 193)], heads(1, 1, 64), false, None).check(&devices);
}

#[test]
fn pages() {
    let devices = devices();
    for causal in [false, true] {
        let odd = [(0, 1), (15, 2), (63, 3), (1, 63), (64, 64), (62, 65), (130, 111)];
        case(&odd, heads(4, 2, 8), causal, Some(16)).check(&devices);
        case(&odd[..4], heads(2, 1, 16), causal, Some(64)).check(&devices);
        case(&[(130, 11)], heads(1, 1, 8), causal, Some(128)).check(&devices);
        for head_dim in [64, 80, 128] {
            case(&[(70, 3), (5, 66)], heads(2, 1, head_dim), causal, Some(7)).check(&devices);
        }
    }
}

#[test]
fn one_row_over_a_long_context() {
    let devices = devices();
    let contexts = [1, 2, 64, 65, 577].map(|context| (context - 1, 1));
    for head_dim in [8, 16, 80, 128] {
        case(&contexts, heads(2, 1, head_dim), true, Some(64)).check(&devices);
    }
    case(&contexts, heads(4, 4, 64), true, Some(16)).check(&devices);
    case(&contexts[3..], heads(3, 1, 24), false, Some(5)).check(&devices);
}

#[test]
fn more_rows_and_heads_than_are_split() {
    // 41 · 16 blocks fill the device: no context is split, and the workspace has no room for that many parts.
    let sequences: Vec<_> = (0..41).map(|i| (3 * i, 1)).collect();
    case(&sequences, heads(16, 4, 8), true, Some(32)).check(&kernel_devices());
}

#[test]
fn wide_heads() {
    let kernels = kernel_devices();
    for head_dim in [136, 256] {
        case(&[(0, 19), (0, 1)], heads(2, 1, head_dim), true, None).check(&kernels);
        case(&[(70, 1), (2, 1)], heads(2, 1, head_dim), true, Some(16)).check(&kernels);
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let devices = devices();
    // Scores of ±10⁴: exp of none of them is a number in f32.
    for (sequences, page_tokens) in [([(0, 5), (0, 70)], None), ([(3, 5), (62, 4)], Some(16)), ([(70, 1), (200, 1)], Some(16))] {
        let usual = case(&sequences, heads(2, 2, 64), true, page_tokens);
        Case { size: 150.0, ..usual }.check(&devices);
    }
}

#[test]
fn results_are_the_same_from_run_to_run() {
    // Also: the counters of arrivals are back at zero, whatever the lengths were.
    for device in kernel_devices() {
        for is_i8 in [false, true] {
            let of = |past| Case { is_i8, ..case(&[(past, 1)], heads(2, 1, 64), true, Some(64)) };
            let (long, short) = (of(576), of(64));
            let (prepared_long, prepared_short) = (long.prepare(device.dtype), short.prepare(device.dtype));
            let first = (long.run(&prepared_long, &device), short.run(&prepared_short, &device));
            for _ in 0..3 {
                let again = (long.run(&prepared_long, &device), short.run(&prepared_short, &device));
                assert_eq!(first, again, "{}", device.name);
            }
        }
    }
}

#[test]
fn a_sequence_does_not_know_its_batch() {
    for device in kernel_devices() {
        let of = |sequences: &[(usize, usize)]| {
            let case = case(sequences, heads(2, 1, 16), true, Some(16));
            let p = case.prepare(device.dtype);
            let rows = sequences[0].1 * case.heads.q_width();
            case.run(&p, &device)[case.heads.q_width()..][..rows].to_vec()
        };
        assert_eq!(of(&[(20, 50)]), of(&[(20, 50), (3, 130), (0, 1)]), "{}", device.name);
    }
}

#[test]
fn no_rows_are_no_work() {
    for device in devices() {
        let case = case(&[(0, 0)], heads(2, 1, 8), true, Some(16));
        let p = case.prepare(device.dtype);
        assert!(case.run(&p, &device).iter().all(|&x| x == SENTINEL), "{}", device.name);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    for device in kernel_devices() {
        let refusal = |heads: Heads, past: usize, cache_dtype: Option<DType>| {
            let mut out = device.put(&[2, heads.q_width()], &vec![0.0; 2 * heads.q_width()]);
            let qkv = device.put(&[2, heads.qkv_width()], &vec![0.0; 2 * heads.qkv_width()]);
            let layer = cache_dtype.map(|dtype| {
                let page = || device.ops.alloc(&[1, heads.n_kv_heads, 16, heads.head_dim], dtype).unwrap();
                KvLayer { k: page(), v: page(), scales: None }
            });
            let spans = [Span { first_row: 0, n_rows: 2, past, pages: &[0] }];
            let source = layer.as_ref().map_or(KvSource::Own, KvSource::Paged);
            device.ops.attention(&mut out, &qkv, source, &spans, heads, true).unwrap_err().to_string()
        };
        let other = if device.dtype == DType::F16 { DType::Bf16 } else { DType::F16 };
        assert!(refusal(heads(1, 1, 8), 0, Some(other)).contains("dtype of key cache"));
        assert!(refusal(heads(1, 1, 8), 1, None).contains("past"));
        assert!(refusal(heads(1, 1, 12), 0, None).contains("head_dim"));
        assert!(refusal(heads(1, 1, 264), 0, None).contains("head_dim"));
        assert!(refusal(heads(1, 1, 8), 15, Some(device.dtype)).contains("pages of a span"));
    }
}
