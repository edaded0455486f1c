//! The small ops against naive f64 on every device, on hostile shapes; and what they refuse. (`linear` and `attention`:
//! `src/cpu/*_tests.rs`.)

mod reference;
mod support;

use llava_engine::checked::Checked;
use llava_engine::cpu::Cpu;
use llava_engine::dtype::DType;
use llava_engine::ops::{Heads, KvLayer, Ops, RopeTable, RowCopy, Span, kv};
use llava_engine::tensor::Tensor;
use reference::rows::{exact, naive_f32};
use reference::{Errors, random};
use support::devices::{TestDevice, devices, kernel_devices, rounded};
use support::{Bound, assert_close};

/// Rows, and their width: one, fewer than a task, a task and a bit, many; and widths that no vector divides.
const SHAPES: [(usize, usize); 8] = [(1, 1), (1, 8), (2, 3), (3, 111), (8, 16), (9, 577), (111, 24), (577, 40)];
/// One of more columns than a block of any kernel takes at once.
const WIDE: (usize, usize) = (2, 1096);

/// A few roundings of f32 next to values of order one.
const F32: Bound = Bound { abs: 1e-6, rel_to_max: 4e-7 };

/// Checks a result against the exact one: in f32 by `bound`, in 16 bits by twice the error of the naive f32 result rounded to them.
fn check(device: &TestDevice, what: &str, got: &[f32], exact: &[f64], naive: &[f32], bound: Bound) {
    let what = format!("{what} on {}", device.name);
    if device.dtype == DType::F32 {
        assert_close(&what, got, &exact.iter().map(|&v| v as f32).collect::<Vec<_>>(), bound);
    } else {
        let naive = Errors::of(&device.round(naive), exact);
        Errors::of(got, exact).check_twice_rounded(naive, device.epsilon(), &what);
    }
}

/// Without the many rows for the simulator: to kernels, each is a block of its own.
fn shapes(device: &TestDevice) -> impl Iterator<Item = (usize, usize)> {
    let most = if device.name.starts_with("sim") { 111 } else { usize::MAX };
    SHAPES.into_iter().chain([WIDE]).filter(move |&(rows, _)| rows <= most)
}

#[test]
fn rms_norm_is_the_equation() {
    for device in devices() {
        for (tokens, hidden) in shapes(&device) {
            let (x, w) = (device.round(&random(tokens * hidden, 1)), random(hidden, 2));
            let mut y = device.blank(&[tokens, hidden]);
            device.ops.rms_norm(&mut y, &device.put(&[tokens, hidden], &x), &device.put_f32(&[hidden], &w), 1e-5).unwrap();
            let (exact, naive) = (exact::rms_norm(&x, &w, 1e-5), naive_f32::rms_norm(&x, &w, 1e-5));
            check(&device, &format!("rms_norm {tokens}x{hidden}"), &device.get(&y), &exact, &naive, F32);
        }
    }
}

#[test]
fn layer_norm_is_the_equation_even_far_from_zero() {
    for device in devices() {
        for ((tokens, hidden), offset) in shapes(&device).flat_map(|s| [(s, 0.0f32), (s, 100.0)]) {
            let shifted: Vec<f32> = random(tokens * hidden, 3).iter().map(|v| v + offset).collect();
            let (x, w, b) = (device.round(&shifted), random(hidden, 4), random(hidden, 5));
            // A mean of 100 is known to half a unit in its last place, 4e-6; rstd of such rows is below 4.
            let bound = if offset == 0.0 { F32 } else { Bound::abs(4e-5) };
            // One element: its variance is nothing but rounding, blown up by 1/sqrt(eps).
            let bound = if hidden == 1 { Bound::abs(2e-3) } else { bound };
            let mut y = device.blank(&[tokens, hidden]);
            let (w_there, b_there) = (device.put_f32(&[hidden], &w), device.put_f32(&[hidden], &b));
            device.ops.layer_norm(&mut y, &device.put(&[tokens, hidden], &x), &w_there, &b_there, 1e-5).unwrap();
            let (exact, naive) = (exact::layer_norm(&x, &w, &b, 1e-5), naive_f32::layer_norm(&x, &w, &b, 1e-5));
            check(&device, &format!("layer_norm {tokens}x{hidden} around {offset}"), &device.get(&y), &exact, &naive, bound);
        }
    }
}

#[test]
fn silu_mul_is_the_equation() {
    for device in devices() {
        for (tokens, n) in shapes(&device) {
            let gate_up = device.round(&random(tokens * 2 * n, 6).iter().map(|v| 20.0 * v).collect::<Vec<_>>());
            let mut y = device.blank(&[tokens, n]);
            device.ops.silu_mul(&mut y, &device.put(&[tokens, 2 * n], &gate_up)).unwrap();
            let (exact, naive) = (exact::silu_mul(&gate_up, n), naive_f32::silu_mul(&gate_up, n));
            check(&device, &format!("silu_mul {tokens}x{n}"), &device.get(&y), &exact, &naive, F32);
        }
        // Where e^−gate has no f32.
        let mut y = device.blank(&[1, 4]);
        device.ops.silu_mul(&mut y, &device.put(&[1, 8], &[-200.0, -90.0, 90.0, 200.0, 1.0, 1.0, 1.0, 1.0])).unwrap();
        assert_eq!(device.get(&y), [0.0, 0.0, 90.0, 200.0], "{}", device.name);
    }
}

#[test]
fn embed_gathers_rows() {
    for device in devices() {
        for hidden in [1, 5, 8, 24, 1096] {
            let table = device.round(&random(7 * hidden, 7));
            let ids = [6, 0, 3, 3];
            let mut y = device.blank(&[4, hidden]);
            device.ops.embed(&mut y, &device.put(&[7, hidden], &table).into(), &ids).unwrap();
            let expected: Vec<f32> = ids.iter().flat_map(|&id| &table[id as usize * hidden..][..hidden]).copied().collect();
            assert_eq!(device.get(&y), expected, "{} {hidden}", device.name);
        }
        let error = device.ops.embed(&mut device.blank(&[1, 5]), &device.blank(&[7, 5]).into(), &[7]).unwrap_err();
        assert_eq!(error.to_string(), "embed: token id is 7, expected \"below 7\"");
    }
}

/// The CPU reads tables as checkpoints store them; other devices have them in their own dtype.
#[test]
fn the_cpu_embeds_from_tables_of_any_dtype() {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let table = Tensor::from_slice(&[7, 5], &random(35, 7)).converted(dtype);
        let values = table.to_f32();
        let mut y = Tensor::zeros(&[2, 5], DType::F32);
        Cpu::new(1, DType::F32).unwrap().embed(&mut y, &table.into(), &[6, 2]).unwrap();
        assert_eq!(y.as_slice::<f32>(), [&values[30..35], &values[10..15]].concat());
    }
}

#[test]
fn patchify_lays_a_patch_out_by_channel_row_column() {
    for device in devices() {
        for (height, width, patch) in [(6, 6, 3), (4, 12, 4), (28, 14, 14)] {
            let (images, columns, n) = (2, width / patch, 3 * patch * patch);
            let n_patches = height / patch * columns;
            let pixels = random(images * 3 * height * width, 8);
            let at = |image: usize, c: usize, y: usize, x: usize| pixels[((image * 3 + c) * height + y) * width + x];
            let there = device.put_f32(&[images, 3, height, width], &pixels);
            let mut got = device.blank(&[images * n_patches, n]);
            device.ops.patchify(&mut got, &there, 0..images, patch).unwrap();
            for (row, values) in device.get(&got).chunks(n).enumerate() {
                let (image, top, left) = (row / n_patches, row % n_patches / columns * patch, row % columns * patch);
                for (i, &value) in values.iter().enumerate() {
                    let (c, y, x) = (i / (patch * patch), top + i / patch % patch, left + i % patch);
                    assert_eq!(value, rounded(at(image, c, y, x), device.dtype), "{}: {row}, {i}", device.name);
                }
            }
            let mut last = device.blank(&[n_patches, n]);
            device.ops.patchify(&mut last, &there, 1..2, patch).unwrap();
            assert_eq!(device.get(&last), device.get(&got)[n_patches * n..], "{}: the second picture alone", device.name);
            assert!(device.ops.patchify(&mut got, &there, 0..images, 5).is_err());
            assert!(device.ops.patchify(&mut got, &there, 1..3, patch).is_err());
        }
    }
}

#[test]
fn clip_embed_puts_the_class_token_first() {
    for device in devices() {
        for (images, n_patches, hidden) in [(2, 3, 4), (1, 1, 1), (3, 2, 111), (2, 5, 1096)] {
            let (class, pos) = (random(hidden, 10), random((n_patches + 1) * hidden, 11));
            let p = device.round(&random(images * n_patches * hidden, 9));
            let patches = device.put(&[images * n_patches, hidden], &p);
            let positions = device.put_f32(&[n_patches + 1, hidden], &pos);
            let mut y = device.blank(&[images * (n_patches + 1), hidden]);
            device.ops.clip_embed(&mut y, &patches, &device.put_f32(&[hidden], &class), &positions).unwrap();
            for (row, values) in device.get(&y).chunks(hidden).enumerate() {
                let (image, token) = (row / (n_patches + 1), row % (n_patches + 1));
                for (i, &value) in values.iter().enumerate() {
                    let base = if token == 0 { class[i] } else { p[(image * n_patches + token - 1) * hidden + i] };
                    assert_eq!(value, rounded(base + pos[token * hidden + i], device.dtype), "{}: {row}, {i}", device.name);
                }
            }
        }
    }
}

#[test]
fn copy_rows_touches_only_its_rows() {
    for device in devices() {
        for width in [1, 3, 8, 1096] {
            let values = device.round(&random(5 * width, 12));
            let src = device.put(&[5, width], &values);
            let mut dst = device.blank(&[6, width]);
            // The first row of the first copy is overwritten by the last.
            let copies = [
                RowCopy { dst: 4, src: 0, n_rows: 2 },
                RowCopy { dst: 1, src: 3, n_rows: 1 },
                RowCopy { dst: 0, src: 0, n_rows: 0 },
                RowCopy { dst: 4, src: 4, n_rows: 1 },
            ];
            device.ops.copy_rows(&mut dst, &src, &copies).unwrap();
            let (got, row) = (device.get(&dst), |i: usize| &values[i * width..(i + 1) * width]);
            assert_eq!(got[width..2 * width], *row(3), "{}", device.name);
            assert_eq!(got[4 * width..], [row(4), row(1)].concat(), "{}", device.name);
            assert!(got[..width].iter().chain(&got[2 * width..4 * width]).all(|&v| v == 77.0));
            assert!(device.ops.copy_rows(&mut dst, &src, &[RowCopy { dst: 5, src: 0, n_rows: 2 }]).is_err());
        }
    }
}

/// Rotary embedding on a device, with a cache of `dtype`.
struct Rope<'a> {
    heads: Heads,
    page_tokens: usize,
    dtype: DType,
    spans: &'a [Span<'a>],
}

impl Rope<'_> {
    const ROWS: usize = 14;
    const POSITIONS: usize = 16;
    const N_PAGES: usize = 17;

    fn check(&self, device: &TestDevice) {
        let Heads { n_heads, n_kv_heads, head_dim: d } = self.heads;
        let (half, width, q_width) = (d / 2, self.heads.qkv_width(), self.heads.q_width());
        let what = format!("{:?}, pages of {} in {} on {}", self.heads, self.page_tokens, self.dtype, device.name);
        let angle = |f: fn(f64) -> f64| -> Vec<f32> {
            let angles =
                (0..Self::POSITIONS).flat_map(|p| (0..half).map(move |i| p as f64 * 10f64.powf(-(i as f64) / half as f64)));
            angles.map(|a| f(a) as f32).collect()
        };
        let (cos, sin) = (angle(f64::cos), angle(f64::sin));
        let table = |values: &[f32]| device.put_f32(&[Self::POSITIONS, half], values);
        let rope = RopeTable { cos: table(&cos), sin: table(&sin) };
        let shape = [Self::N_PAGES, n_kv_heads, self.page_tokens, d];
        let blank = vec![77.0; shape.iter().product()];
        let is_i8 = self.dtype == DType::I8;
        let up = |t: Tensor| device.ops.upload(t).unwrap();
        let cache = || match is_i8 {
            true => up(Tensor::from_slice(&shape, &vec![77i8; blank.len()])),
            false => up(Tensor::from_slice(&shape, &blank).converted(self.dtype)),
        };
        let scale = || up(Tensor::from_slice(&shape[..3], &vec![1f32; blank.len() / d]));
        let mut kv = KvLayer { k: cache(), v: cache(), scales: is_i8.then(|| [scale(), scale()]) };
        let before = device.round(&random(Self::ROWS * width, 13));
        let mut qkv = device.put(&[Self::ROWS, width], &before);
        device.ops.rope_append(&mut qkv, &mut kv, &rope, self.spans, self.heads).unwrap();
        let after = device.get(&qkv);

        let (mut turned, mut exactly, mut naively) = (Vec::new(), Vec::new(), Vec::new());
        // What should be in all other places, and in the cache.
        let (mut rest, mut k, mut v) = (before.clone(), blank.clone(), blank);
        for span in self.spans {
            for r in 0..span.n_rows {
                let (position, row) = (span.past + r, (span.first_row + r) * width);
                let angles = position * half..(position + 1) * half;
                for head in 0..n_heads + n_kv_heads {
                    let x = row + head * d..row + (head + 1) * d;
                    turned.extend(&after[x.clone()]);
                    exactly.extend(exact::rotate(&before[x.clone()], &cos[angles.clone()], &sin[angles.clone()]));
                    naively.extend(naive_f32::rotate(&before[x.clone()], &cos[angles.clone()], &sin[angles.clone()]));
                    rest[x.clone()].copy_from_slice(&after[x]);
                }
                let page = span.pages[position / self.page_tokens] as usize;
                for head in 0..n_kv_heads {
                    let slot = ((page * n_kv_heads + head) * self.page_tokens + position % self.page_tokens) * d;
                    let key = row + q_width + head * d;
                    let stored = |x: &[f32], to: &mut [f32]| {
                        let mut q = vec![0; d];
                        let scale = kv::quantize(x, &mut q);
                        let stored = |(x, q): (&f32, i8)| if is_i8 { scale * f32::from(q) } else { rounded(*x, self.dtype) };
                        to.iter_mut().zip(x.iter().zip(q)).for_each(|(to, x)| *to = stored(x));
                    };
                    stored(&after[key..][..d], &mut k[slot..][..d]);
                    stored(&before[key + self.heads.kv_width()..][..d], &mut v[slot..][..d]);
                }
            }
        }
        check(device, &what, &turned, &exactly, &naively, Bound::abs(2e-6));
        assert!(after == rest, "{what}: values, or rows of no span, were touched");
        let kv = kv.map(|t| device.ops.to_host(t)).unwrap().to_f32();
        assert!(kv.k.as_slice::<f32>() == k, "{what}: keys");
        assert!(kv.v.as_slice::<f32>() == v, "{what}: values");
    }
}

/// Sequences whose pages lie in no order, one with a past that ends within a page, one empty; and rows of none.
#[test]
fn rope_append_rotates_in_place_and_fills_the_pages() {
    let pages: [&[u32]; 3] = [&[4, 1], &[0, 3, 2], &[16, 2, 5, 3, 15, 0, 1, 12, 11]];
    let by_fours = [
        Span { first_row: 1, n_rows: 3, past: 3, pages: pages[0] },
        Span { first_row: 4, n_rows: 0, past: 0, pages: &[] },
        Span { first_row: 4, n_rows: 9, past: 0, pages: pages[1] },
    ];
    let by_one = [Span { first_row: 5, n_rows: 7, past: 2, pages: pages[2] }];
    let heads = |n_heads, n_kv_heads, head_dim| Heads { n_heads, n_kv_heads, head_dim };
    for device in devices() {
        let is_cpu = device.name.starts_with("cpu");
        let floats = if is_cpu { vec![DType::F32, DType::F16, DType::Bf16] } else { vec![device.dtype] };
        for dtype in [floats, vec![DType::I8]].concat() {
            for heads in [heads(4, 2, 8), heads(1, 1, 16), heads(3, 1, 24), heads(2, 2, 80), heads(8, 8, 128)] {
                Rope { heads, page_tokens: 4, dtype, spans: &by_fours }.check(&device);
                Rope { heads, page_tokens: 1, dtype, spans: &by_one }.check(&device);
            }
        }
    }
}

/// Integers and scales of keys and values are those of [`kv::quantize`] to the last bit, where it has special cases too.
#[test]
fn rope_append_rounds_what_is_no_number_or_tiny_as_the_cpu_does() {
    let heads = Heads { n_heads: 1, n_kv_heads: 1, head_dim: 16 };
    for device in devices() {
        let of = |values: [f32; 3]| (0..16).map(move |i| if i == 11 { values[0] } else { values[1 + i % 2] });
        let heads_of_values: Vec<f32> = [
            [f32::NAN, 1.0, 2.0],
            [f32::NEG_INFINITY, -1.0, 0.0],
            [1e-38, 0.0, -5e-39],
            [3e-37, 0.0, -2e-38],
            [0.0; 3],
            [-3.0, 1.5, 0.25],
        ]
        .into_iter()
        .flat_map(of)
        .collect();
        let values = device.round(&heads_of_values);
        let rows = values.chunks(16).map(|v| [&[1.0; 16], v, v].concat()).collect::<Vec<_>>();
        let n = rows.len();
        let mut qkv = device.put(&[n, 48], &rows.concat());
        // Angles of zero: keys are kept as they are.
        let rope = RopeTable { cos: device.put_f32(&[n, 8], &vec![1.0; n * 8]), sin: device.put_f32(&[n, 8], &vec![0.0; n * 8]) };
        let mut kv = KvLayer::new(&*device.ops, 1, n, heads, DType::I8).unwrap();
        let span = Span { first_row: 0, n_rows: n, past: 0, pages: &[0] };
        device.ops.rope_append(&mut qkv, &mut kv, &rope, &[span], heads).unwrap();
        let kv = kv.map(|t| device.ops.to_host(t)).unwrap();
        let scales = kv.scales.as_ref().unwrap();
        for (what, cache, scales, is_key) in [("keys", &kv.k, &scales[0], true), ("values", &kv.v, &scales[1], false)] {
            for (row, x) in values.chunks(16).enumerate() {
                // One infinity makes two keys of no number: ∞·0.
                let mut q = [0; 16];
                let scale = kv::quantize(x, &mut q);
                let what = format!("{what} of row {row} on {}", device.name);
                let got = scales.as_slice::<f32>()[row];
                assert!(got == scale || got.is_nan() && scale.is_nan(), "{what}: {got}, not {scale}");
                if scale.is_finite() || !is_key {
                    assert_eq!(cache.as_slice::<i8>()[row * 16..][..16], q, "{what}");
                }
            }
        }
    }
}

#[test]
fn rope_append_refuses_spans_without_room() {
    let heads = Heads { n_heads: 4, n_kv_heads: 2, head_dim: 8 };
    for device in devices() {
        let mut kv = KvLayer { k: device.blank(&[5, 2, 4, 8]), v: device.blank(&[5, 2, 4, 8]), scales: None };
        let mut qkv = device.blank(&[12, heads.qkv_width()]);
        let table = |positions: usize| RopeTable {
            cos: device.put_f32(&[positions, 4], &vec![1.0; positions * 4]),
            sin: device.put_f32(&[positions, 4], &vec![0.0; positions * 4]),
        };
        let mut refused = |positions: usize, pages: &[u32]| {
            let spans = [Span { first_row: 0, n_rows: 12, past: 0, pages }];
            device.ops.rope_append(&mut qkv, &mut kv, &table(positions), &spans, heads).unwrap_err().to_string()
        };
        assert!(refused(16, &[0, 1]).contains("pages of a span"));
        assert!(refused(16, &[0, 1, 5]).contains("page is 5"));
        assert!(refused(11, &[0, 1, 2]).contains("cos"));
        let span = |first_row, page: &'static [u32]| Span { first_row, n_rows: 2, past: 0, pages: page };
        let spans = [span(4, &[0]), span(0, &[1]), span(5, &[2])];
        let shared = device.ops.rope_append(&mut qkv, &mut kv, &table(4), &spans, heads).unwrap_err().to_string();
        assert!(shared.contains("rows of two spans"), "{shared}");
    }
}

#[test]
fn nothing_is_done_for_no_rows() {
    let heads = Heads { n_heads: 1, n_kv_heads: 1, head_dim: 8 };
    for device in devices() {
        let (none, w) = (|width| device.put(&[0, width], &[]), device.put_f32(&[8], &[1.0; 8]));
        let ops = &device.ops;
        ops.rms_norm(&mut none(8), &none(8), &w, 1e-5).unwrap();
        ops.layer_norm(&mut none(8), &none(8), &w, &w, 1e-5).unwrap();
        ops.silu_mul(&mut none(8), &none(16)).unwrap();
        ops.embed(&mut none(8), &device.blank(&[3, 8]).into(), &[]).unwrap();
        ops.patchify(&mut none(12), &device.put_f32(&[0, 3, 4, 4], &[]), 0..0, 2).unwrap();
        ops.clip_embed(&mut none(8), &none(8), &w, &device.put_f32(&[2, 8], &[0.0; 16])).unwrap();
        ops.copy_rows(&mut none(8), &none(8), &[]).unwrap();
        let mut kv = KvLayer { k: device.blank(&[1, 1, 4, 8]), v: device.blank(&[1, 1, 4, 8]), scales: None };
        let rope = RopeTable { cos: device.put_f32(&[1, 4], &[1.0; 4]), sin: device.put_f32(&[1, 4], &[0.0; 4]) };
        ops.rope_append(&mut none(24), &mut kv, &rope, &[], heads).unwrap();
    }
}

/// Kernels would read such tensors as what they are not.
#[test]
fn kernels_are_not_launched_on_other_dtypes_or_host_tensors() {
    for device in kernel_devices() {
        let other = if device.dtype == DType::F16 { DType::Bf16 } else { DType::F16 };
        let there = |shape: &[usize], dtype| device.ops.alloc(shape, dtype).unwrap();
        let (own, own2) = (device.dtype, || there(&[4, 16], device.dtype));
        let (w, w_other) = (there(&[16], DType::F32), there(&[16], other));
        let host = || Tensor::zeros(&[4, 16], own);
        let refused = |result: llava_engine::error::Result<()>, word: &str| {
            let error = result.unwrap_err().to_string();
            assert!(error.contains(word), "{}: {error}", device.name);
        };
        let ops = &device.ops;
        refused(ops.rms_norm(&mut own2(), &own2(), &w_other, 1e-5), "dtype of w");
        refused(ops.rms_norm(&mut own2(), &host(), &w, 1e-5), "of the host");
        refused(ops.silu_mul(&mut there(&[4, 8], other), &own2()), "dtype of y");
        refused(ops.silu_mul(&mut there(&[4, 8], own), &host()), "of the host");
        refused(ops.embed(&mut there(&[2, 16], own), &there(&[4, 16], other).into(), &[0, 1]), "dtype of table");
        refused(ops.patchify(&mut there(&[1, 12], own), &there(&[1, 3, 2, 2], other), 0..1, 2), "dtype of pixels");
        refused(ops.clip_embed(&mut own2(), &there(&[2, 16], own), &w_other, &there(&[2, 16], DType::F32)), "dtype of class");
        refused(ops.copy_rows(&mut there(&[4, 16], other), &there(&[4, 16], other), &[]), "dtype of dst");
        refused(ops.copy_rows(&mut host(), &own2(), &[]), "of the host");
        let heads = Heads { n_heads: 1, n_kv_heads: 1, head_dim: 8 };
        let mut kv = KvLayer { k: there(&[1, 1, 4, 8], other), v: there(&[1, 1, 4, 8], other), scales: None };
        let rope = RopeTable { cos: there(&[4, 4], DType::F32), sin: there(&[4, 4], DType::F32) };
        refused(ops.rope_append(&mut there(&[4, 24], own), &mut kv, &rope, &[], heads), "dtype of key cache");
    }
}

/// Of a result, what is no finite number is found where an op has written it, and nowhere else.
#[test]
fn checks_look_at_what_an_op_has_written() {
    for device in devices() {
        let values = [f32::NAN, 1.0, 2.0, 4.0, 3.0, f32::INFINITY];
        let (mut dst, src) = (device.put(&[3, 2], &values), device.put(&[3, 2], &values));
        let checked = Checked::new(device.ops, None, true);
        let mut copy_to_row_1 = |src_row| checked.copy_rows(&mut dst, &src, &[RowCopy { dst: 1, src: src_row, n_rows: 1 }]);
        let found = [0, 2].map(|row| copy_to_row_1(row).unwrap_err().to_string());
        let [nan, inf] =
            ["NaN at row 1, column 0", "inf at row 1, column 1"].map(|at| format!("copy_rows: output dst [3, 2] has {at}"));
        assert_eq!(found, [nan, inf], "{}", device.name);
        // The rows around it are not this op's.
        copy_to_row_1(1).unwrap();
    }
}
