//! The small ops against naive f64, on hostile shapes; and what they refuse. (`linear` and `attention`: `src/cpu/*_tests.rs`.)

mod reference;
mod support;

use half::{bf16, f16};
use llava_engine::cpu::Cpu;
use llava_engine::dtype::DType;
use llava_engine::ops::{Heads, KvLayer, Ops, RopeTable, RowCopy, Span};
use llava_engine::tensor::Tensor;
use support::{Bound, assert_close};

/// Rows, and their width: one, fewer than a task, a task and a bit, many; and widths that no vector divides.
const SHAPES: [(usize, usize); 8] = [(1, 1), (1, 8), (2, 3), (3, 111), (8, 16), (9, 577), (111, 24), (577, 40)];

/// A few roundings of f32 next to values of order one.
const F32: Bound = Bound { abs: 1e-6, rel_to_max: 4e-7 };

fn cpus() -> [Cpu; 2] {
    [1, 3].map(|threads| Cpu::new(threads, DType::F32).unwrap())
}

fn noise(shape: &[usize], seed: u64) -> Tensor {
    Tensor::from_slice(shape, &reference::random(shape.iter().product(), seed))
}

fn f64s(t: &Tensor) -> Vec<f64> {
    t.to_f32().into_iter().map(f64::from).collect()
}

fn f32s(values: impl IntoIterator<Item = f64>) -> Vec<f32> {
    values.into_iter().map(|v| v as f32).collect()
}

#[test]
fn rms_norm_is_the_equation() {
    for (tokens, hidden) in SHAPES {
        let (x, w) = (noise(&[tokens, hidden], 1), noise(&[hidden], 2));
        let (xs, ws) = (f64s(&x), f64s(&w));
        let expected = f32s(xs.chunks(hidden).flat_map(|row| {
            let rstd = 1.0 / (row.iter().map(|v| v * v).sum::<f64>() / hidden as f64 + 1e-5).sqrt();
            row.iter().zip(&ws).map(move |(x, w)| x * rstd * w)
        }));
        for cpu in cpus() {
            let mut y = Tensor::zeros(&[tokens, hidden], DType::F32);
            cpu.rms_norm(&mut y, &x, &w, 1e-5).unwrap();
            assert_close(&format!("rms_norm {tokens}x{hidden}"), y.as_slice(), &expected, F32);
        }
    }
}

#[test]
fn layer_norm_is_the_equation_even_far_from_zero() {
    for ((tokens, hidden), offset) in SHAPES.into_iter().flat_map(|s| [(s, 0.0f32), (s, 100.0)]) {
        let shifted: Vec<f32> = noise(&[tokens, hidden], 3).to_f32().iter().map(|v| v + offset).collect();
        let (x, w, b) = (Tensor::from_slice(&[tokens, hidden], &shifted), noise(&[hidden], 4), noise(&[hidden], 5));
        let (xs, ws, bs) = (f64s(&x), f64s(&w), f64s(&b));
        let expected = f32s(xs.chunks(hidden).flat_map(|row| {
            let mean = row.iter().sum::<f64>() / hidden as f64;
            let rstd = 1.0 / (row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / hidden as f64 + 1e-5).sqrt();
            row.iter().zip(&ws).zip(&bs).map(move |((x, w), b)| (x - mean) * rstd * w + b)
        }));
        // A mean of 100 is known to half a unit in its last place, 4e-6; rstd of such rows is below 4.
        let bound = if offset == 0.0 { F32 } else { Bound::abs(4e-5) };
        // One element: its variance is nothing but rounding, blown up by 1/sqrt(eps).
        let bound = if hidden == 1 { Bound::abs(2e-3) } else { bound };
        for cpu in cpus() {
            let mut y = Tensor::zeros(&[tokens, hidden], DType::F32);
            cpu.layer_norm(&mut y, &x, &w, &b, 1e-5).unwrap();
            assert_close(&format!("layer_norm {tokens}x{hidden} around {offset}"), y.as_slice(), &expected, bound);
        }
    }
}

#[test]
fn silu_mul_is_the_equation() {
    for (tokens, n) in SHAPES {
        let gate_up =
            Tensor::from_slice(&[tokens, 2 * n], &noise(&[tokens, 2 * n], 6).to_f32().iter().map(|v| 20.0 * v).collect::<Vec<_>>());
        let expected = f32s(f64s(&gate_up).chunks(2 * n).flat_map(|row| {
            let (gate, up) = row.split_at(n);
            gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect::<Vec<_>>()
        }));
        for cpu in cpus() {
            let mut y = Tensor::zeros(&[tokens, n], DType::F32);
            cpu.silu_mul(&mut y, &gate_up).unwrap();
            assert_close(&format!("silu_mul {tokens}x{n}"), y.as_slice(), &expected, F32);
        }
    }
}

#[test]
fn embed_gathers_rows_of_any_dtype() {
    let table = noise(&[7, 5], 7);
    let ids = [6, 0, 3, 3];
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let table = table.converted(dtype);
        let mut y = Tensor::zeros(&[4, 5], DType::F32);
        cpus()[0].embed(&mut y, &table, &ids).unwrap();
        let expected: Vec<f32> = ids.iter().flat_map(|&id| table.to_f32()[id as usize * 5..][..5].to_vec()).collect();
        assert_eq!(y.as_slice::<f32>(), expected);
    }
    let error = cpus()[0].embed(&mut Tensor::zeros(&[1, 5], DType::F32), &table, &[7]).unwrap_err();
    assert_eq!(error.to_string(), "embed: token id is 7, expected \"below 7\"");
}

#[test]
fn patchify_lays_a_patch_out_by_channel_row_column() {
    let (images, side, patch) = (2, 6, 3);
    let pixels = noise(&[images, 3, side, side], 8);
    let at = |image: usize, c: usize, y: usize, x: usize| pixels.as_slice::<f32>()[((image * 3 + c) * side + y) * side + x];
    let mut got = Tensor::zeros(&[images * 4, 27], DType::F32);
    cpus()[0].patchify(&mut got, &pixels, patch).unwrap();
    for (row, values) in got.as_slice::<f32>().chunks(27).enumerate() {
        let (image, top, left) = (row / 4, row % 4 / 2 * patch, row % 2 * patch);
        for (i, &value) in values.iter().enumerate() {
            assert_eq!(value, at(image, i / 9, top + i / 3 % 3, left + i % 3));
        }
    }
    assert!(cpus()[0].patchify(&mut got, &pixels, 4).is_err());
}

#[test]
fn clip_embed_puts_the_class_token_first() {
    let (patches, class, positions) = (noise(&[6, 4], 9), noise(&[4], 10), noise(&[4, 4], 11));
    let mut y = Tensor::zeros(&[8, 4], DType::F32);
    cpus()[0].clip_embed(&mut y, &patches, &class, &positions).unwrap();
    let (p, c, pos) = (patches.to_f32(), class.to_f32(), positions.to_f32());
    for (row, values) in y.as_slice::<f32>().chunks(4).enumerate() {
        let (image, token) = (row / 4, row % 4);
        for (i, &value) in values.iter().enumerate() {
            let base = if token == 0 { c[i] } else { p[(image * 3 + token - 1) * 4 + i] };
            assert_eq!(value, base + pos[token * 4 + i]);
        }
    }
}

#[test]
fn copy_rows_touches_only_its_rows() {
    let src = noise(&[5, 3], 12);
    let mut dst = Tensor::from_slice(&[6, 3], &[7.0f32; 18]);
    let copies = [RowCopy { dst: 4, src: 0, n_rows: 2 }, RowCopy { dst: 1, src: 3, n_rows: 1 }];
    cpus()[0].copy_rows(&mut dst, &src, &copies).unwrap();
    let (got, s) = (dst.as_slice::<f32>(), src.as_slice::<f32>());
    assert_eq!((&got[12..], &got[3..6]), (&s[..6], &s[9..12]));
    assert!(got[..3].iter().chain(&got[6..12]).all(|&v| v == 7.0));
    assert!(cpus()[0].copy_rows(&mut dst, &src, &[RowCopy { dst: 5, src: 0, n_rows: 2 }]).is_err());
}

/// Two sequences whose pages lie in no order, one of them with a past that ends within a page.
#[test]
fn rope_append_rotates_in_place_and_fills_the_pages() {
    let heads = Heads { n_heads: 4, n_kv_heads: 2, head_dim: 8 };
    let (page_tokens, n_pages) = (4, 5);
    let angle = |position: usize, i: usize| position as f64 * 10f64.powf(-(i as f64) / 4.0);
    let angles = || (0..16).flat_map(|p| (0..4).map(move |i| (p, i)));
    let table = |f: fn(f64) -> f64| Tensor::from_slice(&[16, 4], &f32s(angles().map(|(p, i)| f(angle(p, i)))));
    let rope = RopeTable { cos: table(f64::cos), sin: table(f64::sin) };
    let spans =
        [Span { first_row: 0, n_rows: 3, past: 3, pages: &[4, 1] }, Span { first_row: 3, n_rows: 9, past: 0, pages: &[0, 3, 2] }];
    let before = noise(&[12, heads.qkv_width()], 13);
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let shape = [n_pages, heads.n_kv_heads, page_tokens, heads.head_dim];
        let mut kv = KvLayer { k: Tensor::zeros(&shape, dtype), v: Tensor::zeros(&shape, dtype) };
        let mut qkv = Tensor::from_slice(before.shape(), before.as_slice::<f32>());
        cpus()[1].rope_append(&mut qkv, &mut kv, &rope, &spans, heads).unwrap();
        let rounded = |v: f64| match dtype {
            DType::F16 => f16::from_f64(v).to_f64(),
            DType::Bf16 => bf16::from_f64(v).to_f64(),
            _ => v,
        };
        // Where rounding to the cache's dtype may fall to the other side.
        let ulp = if dtype == DType::F32 { 1e-6 } else { 0.01 };
        let (x, y, k, v) = (f64s(&before), f64s(&qkv), f64s(&kv.k), f64s(&kv.v));
        let mut written = 0;
        for span in &spans {
            for r in 0..span.n_rows {
                let (position, row) = (span.past + r, (span.first_row + r) * heads.qkv_width());
                for head in 0..6 {
                    for i in 0..4 {
                        let (a, b) = (x[row + head * 8 + i], x[row + head * 8 + 4 + i]);
                        let (sin, cos) = angle(position, i).sin_cos();
                        let turned = [(i, a * cos - b * sin), (i + 4, b * cos + a * sin)];
                        for (at, expected) in turned {
                            assert!((y[row + head * 8 + at] - expected).abs() < 2e-6);
                            if head >= 4 {
                                let slot = ((span.pages[position / 4] as usize * 2 + head - 4) * 4 + position % 4) * 8 + at;
                                let value = x[row + 32 + 16 + (head - 4) * 8 + at];
                                assert!((k[slot] - rounded(expected)).abs() < ulp && v[slot] == rounded(value), "{dtype}");
                                written += 1;
                            }
                        }
                    }
                }
            }
        }
        assert_eq!(
            y.chunks(64).flat_map(|r| &r[48..]).collect::<Vec<_>>(),
            x.chunks(64).flat_map(|r| &r[48..]).collect::<Vec<_>>()
        );
        assert!(v.iter().filter(|v| **v != 0.0).count() <= written, "something was written outside the sequences");
    }
    let short = [Span { first_row: 0, n_rows: 12, past: 0, pages: &[0, 1] }];
    let mut kv = KvLayer { k: Tensor::zeros(&[5, 2, 4, 8], DType::F32), v: Tensor::zeros(&[5, 2, 4, 8], DType::F32) };
    let mut qkv = Tensor::from_slice(before.shape(), before.as_slice::<f32>());
    let error = cpus()[0].rope_append(&mut qkv, &mut kv, &rope, &short, heads).unwrap_err();
    assert!(error.to_string().contains("pages of a span"), "{error}");
}
