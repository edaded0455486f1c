//! Draws tokens as [`crate::ops::sample`] defines it.

use std::cmp::Reverse;

use super::scratch::{carve, padded, with_scratch};
use crate::ops::Draw;
use crate::ops::sample::{penalized, reaches, share_of, weight};
use crate::tensor::Tensor;

/// ids\[r\] = the token drawn from row r of logits `[rows, vocab]`, −1 if that holds NaN; its bit is set in seen `[rows, ⌈vocab/32⌉]`.
pub fn sample(ids: &mut [i32], logits: &Tensor, seen: &mut Tensor, draws: &[Draw]) {
    let (vocab, n_words) = (logits.row_len(), seen.row_len());
    let rows = logits.as_slice::<f32>().chunks_exact(vocab).zip(seen.as_mut_slice::<i32>().chunks_exact_mut(n_words));
    for ((id, draw), (logits, seen)) in ids.iter_mut().zip(draws).zip(rows) {
        let drawn = with_scratch(2 * padded(vocab) + 2 * vocab, |scratch| sample_row(logits, seen, draw, scratch));
        *id = drawn.map_or(-1, |i| i as i32);
        if let Some(i) = drawn {
            seen[i / 32] |= 1 << (i % 32);
        }
    }
}

/// The token drawn from one row, none if it holds NaN. `scratch` has room for 2·vocab elements in cache lines and 2·vocab more.
fn sample_row(logits: &[f32], seen: &[i32], draw: &Draw, mut scratch: &mut [f32]) -> Option<usize> {
    let vocab = logits.len();
    let penalized_logits = carve(&mut scratch, vocab);
    penalized_logits.copy_from_slice(logits);
    if draw.repetition_penalty != 1.0 {
        for (_, logit) in penalized_logits.iter_mut().enumerate().filter(|(i, _)| seen[i / 32] >> (i % 32) & 1 != 0) {
            *logit = penalized(*logit, draw.repetition_penalty);
        }
    }
    if penalized_logits.iter().any(|l| l.is_nan()) {
        return None;
    }
    let max = penalized_logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if draw.scale().is_infinite() {
        return penalized_logits.iter().position(|&l| l == max);
    }
    let (weights, scale) = (bytemuck::cast_slice_mut::<_, u32>(carve(&mut scratch, vocab)), draw.scale());
    for (w, &logit) in weights.iter_mut().zip(&*penalized_logits) {
        *w = weight(logit, max, scale);
    }
    let last = last_kept(weights, draw, bytemuck::cast_slice_mut(&mut scratch[..2 * vocab]));
    let min_weight = draw.min_weight();
    for (i, w) in weights.iter_mut().enumerate() {
        let kept = key(i, *w) >= last && *w >= min_weight;
        *w = if kept { *w } else { 0 };
    }
    let mut left = share_of(weights.iter().map(|&w| u64::from(w)).sum(), draw.random);
    weights.iter().position(|&w| {
        let drawn = left < u64::from(w);
        left = left.saturating_sub(w.into());
        drawn
    })
}

/// A number that is larger for a more probable token, and of equally probable ones for the one with the lower index.
fn key(index: usize, weight: u32) -> u64 {
    u64::from(weight) << 32 | u64::from(!(index as u32))
}

/// Sum of the weights in keys.
fn total(keys: &[u64]) -> u64 {
    keys.iter().map(|key| key >> 32).sum()
}

/// The key of the least probable token that top-k and top-p keep. `keys` has room for one of each token.
fn last_kept(weights: &[u32], draw: &Draw, keys: &mut [u64]) -> u64 {
    let top_k = if draw.top_k == 0 { weights.len() } else { draw.top_k.min(weights.len()) };
    let top_p = draw.top_p_bits();
    if top_k == weights.len() && top_p == 0 {
        return 0;
    }
    for (i, (key, &w)) in keys.iter_mut().zip(weights).enumerate() {
        *key = self::key(i, w);
    }
    if top_k < keys.len() {
        keys.select_nth_unstable_by_key(top_k - 1, |&key| Reverse(key));
    }
    let mut among = &mut keys[..top_k];
    if top_p == 0 {
        return among[top_k - 1];
    }
    // The last one that is needed to reach the sum, found by halving what it is among.
    let mut missing = reaches(total(among), top_p);
    while among.len() > 1 {
        let half = among.len() / 2;
        among.select_nth_unstable_by_key(half, |&key| Reverse(key));
        let (first, rest) = among.split_at_mut(half);
        let sum = total(first);
        if sum >= missing {
            among = first;
        } else {
            missing -= sum;
            among = rest;
        }
    }
    among[0]
}
