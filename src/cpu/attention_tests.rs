//! `attention` against f64: pages, chunks, groups, and widths that no vector divides.

use half::bf16;

use super::attention::{DECODE_ROWS, attention};
use super::pool::Pool;
use super::reference::attention::{Sequence, exact, naive_f32};
use super::reference::{Errors, random};
use super::simd::Isa;
use crate::dtype::DType;
use crate::ops::{Heads, KvLayer, KvSource, Span, kv};
use crate::tensor::Tensor;

const SENTINEL: f32 = 12345.678;

/// One op to test: sequences of (past, rows).
#[derive(Clone, Debug)]
struct Case {
    sequences: Vec<(usize, usize)>,
    heads: Heads,
    causal: bool,
    /// Page length and dtype of the cache; none: the keys of the rows themselves.
    cache: Option<(usize, DType)>,
}

/// Heads of a width.
fn heads(n_heads: usize, n_kv_heads: usize, head_dim: usize) -> Heads {
    Heads { n_heads, n_kv_heads, head_dim }
}

impl Case {
    fn check(&self, isa: Isa) {
        let what = format!("{self:?} on {isa}");
        let Heads { n_heads, n_kv_heads, head_dim: d } = self.heads;
        let (qw, kvw, width) = (self.heads.q_width(), self.heads.kv_width(), self.heads.qkv_width());
        let n_rows: usize = self.sequences.iter().map(|&(_, rows)| rows).sum();
        // One row before and one after the spans, which stay as they are.
        let mut qkv = random((n_rows + 2) * width, 11);
        qkv.iter_mut().for_each(|x| *x *= 3.0);

        // Pages in an order that is not that of the sequences.
        let page_tokens = self.cache.map_or(1, |(tokens, _)| tokens);
        let n_pages: Vec<usize> = self.sequences.iter().map(|(past, rows)| (past + rows).div_ceil(page_tokens)).collect();
        let mut free: Vec<u32> = (0..n_pages.iter().sum::<usize>() as u32 + 3).rev().collect();
        let pages: Vec<Vec<u32>> = n_pages.iter().map(|&n| (0..n).map(|_| free.remove(free.len() / 2)).collect()).collect();
        let total = n_pages.iter().sum::<usize>() + 3;

        let round = |x: f32| match self.cache {
            Some((_, DType::Bf16)) => bf16::from_f32(x).to_f32(),
            Some((_, DType::F16)) => half::f16::from_f32(x).to_f32(),
            _ => x,
        };
        let shape = [total, n_kv_heads, page_tokens, d];
        let mut k_pages = vec![f32::NAN; shape.iter().product()];
        let mut v_pages = k_pages.clone();
        // What nobody wrote is the largest, with a scale that would be seen.
        let is_i8 = matches!(self.cache, Some((_, DType::I8)));
        let mut ints = [(); 2].map(|()| vec![i8::MAX; k_pages.len()]);
        let mut scales = [(); 2].map(|()| vec![f32::NAN; k_pages.len() / d]);
        let (mut exact_out, mut naive_out, mut spans) = (Vec::new(), Vec::new(), Vec::new());
        let mut first_row = 1;
        for (i, &(past, rows)) in self.sequences.iter().enumerate() {
            let context = past + rows;
            let (mut k, mut v) = (random(context * kvw, 100 + i as u64), random(context * kvw, 200 + i as u64));
            if self.cache.is_none() {
                for t in 0..context {
                    let row = &qkv[(first_row + t) * width..][..width];
                    k[t * kvw..][..kvw].copy_from_slice(&row[qw..qw + kvw]);
                    v[t * kvw..][..kvw].copy_from_slice(&row[qw + kvw..]);
                }
            } else {
                for t in 0..context {
                    for head in 0..n_kv_heads {
                        let page = pages[i][t / page_tokens] as usize;
                        let to = ((page * n_kv_heads + head) * page_tokens + t % page_tokens) * d;
                        for (i, (x, pages)) in [(&mut k, &mut k_pages), (&mut v, &mut v_pages)].into_iter().enumerate() {
                            let x = &mut x[t * kvw + head * d..][..d];
                            if is_i8 {
                                let q = &mut ints[i][to..][..d];
                                let scale = kv::quantize(x, q);
                                scales[i][to / d] = scale;
                                x.iter_mut().zip(q).for_each(|(x, q)| *x = scale * f32::from(*q));
                            }
                            x.iter_mut().for_each(|x| *x = round(*x));
                            pages[to..][..d].copy_from_slice(x);
                        }
                    }
                }
            }
            let q: Vec<f32> = (0..rows).flat_map(|r| qkv[(first_row + r) * width..][..qw].to_vec()).collect();
            let sequence = Sequence { q: &q, k: &k, v: &v, n_heads, n_kv_heads, head_dim: d };
            let visible = |row| if self.causal { past + row + 1 } else { context };
            exact_out.extend(exact(&sequence, visible));
            naive_out.extend(naive_f32(&sequence, visible));
            spans.push(Span { first_row, n_rows: rows, past, pages: &pages[i] });
            first_row += rows;
        }

        let layer = self.cache.map(|(_, dtype)| match dtype {
            DType::I8 => KvLayer {
                k: Tensor::from_slice(&shape, &ints[0]),
                v: Tensor::from_slice(&shape, &ints[1]),
                scales: Some(scales.each_ref().map(|scales| Tensor::from_slice(&shape[..3], scales))),
            },
            _ => KvLayer {
                k: Tensor::from_slice(&shape, &k_pages).converted(dtype),
                v: Tensor::from_slice(&shape, &v_pages).converted(dtype),
                scales: None,
            },
        });
        let source = layer.as_ref().map_or(KvSource::Own, KvSource::Paged);
        let run = |n_threads, spans: &[Span<'_>]| {
            let mut out = vec![SENTINEL; (n_rows + 2) * qw];
            attention(isa, &Pool::new(n_threads), &mut out, &qkv, source, spans, self.heads, self.causal);
            out
        };
        let out = run(2, &spans);
        assert_eq!(out, run(1, &spans), "{what}: another number of threads");
        if spans.len() > 1 {
            let alone = run(1, &spans[..1]);
            let rows = (1 + spans[0].n_rows) * qw;
            assert_eq!(out[..rows], alone[..rows], "{what}: without the other spans");
        }
        assert!(out[..qw].iter().chain(&out[(n_rows + 1) * qw..]).all(|&x| x == SENTINEL), "{what}: wrote beside the spans");
        let errors = Errors::of(&out[qw..(n_rows + 1) * qw], &exact_out);
        // Scales round each score and each probability once more: up to 4.4 times the naive errors were seen.
        let more = if is_i8 { 4.0 * f64::from(f32::EPSILON) } else { 0.0 };
        errors.check_twice_rounded(Errors::of(&naive_out, &exact_out), more, &what);
    }
}

#[test]
fn own_keys() {
    for isa in Isa::tested() {
        for head_dim in [8, 24, 64, 80, 128] {
            for rows in [1, 2, 4, 5, 17, 111, 130, 300] {
                for causal in [false, true] {
                    Case { sequences: vec![(0, rows), (0, 7)], heads: heads(2, 2, head_dim), causal, cache: None }.check(isa);
                }
            }
        }
    }
}

#[test]
fn a_picture() {
    for isa in Isa::tested() {
        Case { sequences: vec![(0, 577)], heads: heads(1, 1, 64), causal: false, cache: None }.check(isa);
    }
}

#[test]
fn pages_and_chunks_and_groups() {
    for isa in Isa::tested() {
        for (n_heads, n_kv_heads) in [(2, 2), (2, 1), (4, 1), (4, 2)] {
            for page_tokens in [1, 16, 63, 64] {
                for (past, rows) in [(0, 1), (15, 1), (16, 1), (17, 1), (63, 4), (0, 64), (64, 65), (130, 127), (200, 3)] {
                    for causal in [false, true] {
                        let sequences = vec![(past, rows), (3, 2), (5, 9)];
                        Case { sequences, heads: heads(n_heads, n_kv_heads, 24), causal, cache: Some((page_tokens, DType::F32)) }
                            .check(isa);
                    }
                }
            }
        }
    }
}

#[test]
fn dtypes_of_the_cache() {
    for isa in Isa::tested() {
        for dtype in [DType::F32, DType::F16, DType::Bf16, DType::I8] {
            for head_dim in [8, 24, 64, 80, 128] {
                for rows in [1, DECODE_ROWS, DECODE_ROWS + 1, 40] {
                    let sequences = vec![(90, rows), (0, rows)];
                    Case { sequences, heads: heads(4, 2, head_dim), causal: true, cache: Some((32, dtype)) }.check(isa);
                }
            }
        }
    }
}

#[test]
fn long_contexts() {
    for isa in Isa::tested() {
        for rows in [1, 2, 6] {
            let sequences = vec![(1500, rows), (511, rows), (512, rows)];
            Case { sequences, heads: heads(2, 2, 64), causal: true, cache: Some((64, DType::Bf16)) }.check(isa);
        }
    }
}
