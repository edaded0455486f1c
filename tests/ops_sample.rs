//! `Ops::sample` on every device against sorting, token for token; and how often each token is drawn.

mod reference;
mod support;

use llava_engine::dtype::DType;
use llava_engine::ops::Draw;
use llava_engine::ops::sample::weight;
use llava_engine::tensor::Tensor;
use reference::random;
use support::devices::{TestDevice, devices};

/// Logits do not depend on the dtype of activations: one device of each kind.
fn f32_devices() -> impl Iterator<Item = TestDevice> {
    devices().into_iter().filter(|d| d.dtype == DType::F32 && d.name != "cpu with 3 threads")
}

/// The token drawn from one row by sorting it, −1 if there is NaN; `seen` are the tokens that have occurred.
fn sample(logits: &[f32], seen: &[bool], draw: &Draw) -> i32 {
    let penalized = |(&l, &seen): (&f32, &bool)| match (seen, l > 0.0) {
        (false, _) => l,
        (true, true) => l / draw.repetition_penalty,
        (true, false) => l * draw.repetition_penalty,
    };
    let logits: Vec<f32> = logits.iter().zip(seen).map(penalized).collect();
    if logits.iter().any(|l| l.is_nan()) {
        return -1;
    }
    let mut by_logit: Vec<usize> = (0..logits.len()).collect();
    by_logit.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap()); // stable: equal ones stay in order
    if draw.scale().is_infinite() {
        return by_logit[0] as i32;
    }
    let max = logits[by_logit[0]];
    // (weight, index), the most probable first
    let mut kept: Vec<(u128, usize)> = logits.iter().map(|&l| weight(l, max, draw.scale()).into()).zip(0..).collect();
    kept.sort_by_key(|&(w, _)| std::cmp::Reverse(w));
    if draw.top_k > 0 {
        kept.truncate(draw.top_k);
    }
    if draw.top_p < 1.0 {
        let total: u128 = kept.iter().map(|k| k.0).sum();
        let mut sum = 0;
        // sum / total ≥ p, exactly: p has 24 bits, but those below 2⁻⁶⁴ do not count.
        let p = (f64::from(draw.top_p) * 2f64.powi(64)) as u128;
        let n_before = kept.iter().take_while(|k| {
            sum += k.0;
            sum << 64 < p * total
        });
        let n = n_before.count() + 1;
        kept.truncate(n);
    }
    let most = kept[0].0 as f64;
    kept.retain(|k| k.0 as f64 >= f64::from(draw.min_p) * most);
    kept.sort_by_key(|&(_, i)| i);
    let total: u128 = kept.iter().map(|k| k.0).sum();
    let mut sum = 0;
    let drawn = kept.iter().find(|k| {
        sum += k.0;
        sum > (total * u128::from(draw.random)) >> 64
    });
    drawn.unwrap().1 as i32
}

/// SplitMix64
struct Bits(u64);

impl Bits {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[(self.next() % choices.len() as u64) as usize]
    }
}

/// Rows that are smooth, peaked, full of ties, and extreme.
fn row(kind: usize, vocab: usize, seed: u64) -> Vec<f32> {
    let mut row: Vec<f32> = random(vocab, seed);
    let (first, middle) = (seed as usize % vocab, vocab / 2);
    match kind {
        0 => row.iter_mut().for_each(|l| *l *= 10.0),
        1 => row.iter_mut().for_each(|l| *l = 30.0 * *l * *l * *l - 20.0),
        2 => row.iter_mut().for_each(|l| *l = (*l * 3.0).round()),
        3 => row.fill(-1.5),
        4 => row.iter_mut().filter(|l| **l < 0.3).for_each(|l| *l = f32::NEG_INFINITY),
        5 => row.fill(f32::NEG_INFINITY),
        6 => (row[first], row[middle]) = (f32::INFINITY, f32::INFINITY),
        7 => row[first] = f32::NAN,
        8 => row.iter_mut().for_each(|l| *l *= f32::MAX),
        _ => row.iter_mut().for_each(|l| *l = if *l < 0.0 { -0.0 } else { 0.0 }),
    }
    row
}
const KINDS: usize = 10;

fn draw(bits: &mut Bits, vocab: usize) -> Draw {
    Draw {
        repetition_penalty: bits.of(&[1.0, 1.0, 1.3, 0.5, 1e30]),
        temperature: bits.of(&[0.0, 1e-40, 0.2, 1.0, 1.0, 3.0, 1e30]),
        top_k: bits.of(&[0, 0, 1, 2, 40, vocab, usize::MAX]),
        top_p: bits.of(&[1e-45, 1e-6, 0.1, 0.5, 0.9, 0.999_999_94, 1.0, 1.0]),
        min_p: bits.of(&[0.0, 0.0, 1e-9, 0.05, 0.5, 1.0]),
        random: match bits.next() % 8 {
            0 => 0,
            1 => u64::MAX,
            _ => bits.next(),
        },
    }
}

#[test]
fn every_device_draws_what_sorting_draws() {
    for (vocab, rows) in
        [(1, 40), (2, 60), (3, 80), (31, 60), (33, 60), (111, 150), (989, 80), (1025, 60), (32000, 40), (32001, 40)]
    {
        let mut bits = Bits(vocab as u64);
        let logits: Vec<Vec<f32>> = (0..rows).map(|r| row(r % KINDS, vocab, bits.next() >> 8)).collect();
        let draws: Vec<Draw> = (0..rows).map(|_| draw(&mut bits, vocab)).collect();
        let n_words = vocab.div_ceil(32);
        let mut seen: Vec<i32> = (0..rows * n_words).map(|_| (bits.next() & bits.next()) as i32).collect();
        let occurred =
            |seen: &[i32], r: usize| -> Vec<bool> { (0..vocab).map(|i| seen[r * n_words + i / 32] >> (i % 32) & 1 != 0).collect() };
        let expected: Vec<i32> = (0..rows).map(|r| sample(&logits[r], &occurred(&seen, r), &draws[r])).collect();
        let seen_before = seen.clone();
        for (r, &id) in expected.iter().enumerate().filter(|(_, id)| **id >= 0) {
            seen[r * n_words + id as usize / 32] |= 1 << (id % 32);
        }
        for device in f32_devices() {
            let there = device.put_f32(&[rows, vocab], &logits.concat());
            let mut seen_there = device.ops.upload(Tensor::from_slice(&[rows, n_words], &seen_before)).unwrap();
            let mut ids = device.ops.alloc(&[rows], DType::I32).unwrap();
            device.ops.sample(&mut ids, &there, &mut seen_there, &draws).unwrap();
            for (r, (got, &expected)) in device.ops.download_i32(&ids).unwrap().into_iter().zip(&expected).enumerate() {
                assert_eq!(got, expected, "{}: kind {} of {vocab}, {:?}", device.name, r % KINDS, draws[r]);
            }
            assert!(device.ops.download_i32(&seen_there).unwrap() == seen, "{}: what has occurred, of {vocab}", device.name);
        }
    }
}

/// Two tokens, the first of weight w: the least random bits that draw the second one, and one less. A weight that is off by one shows.
#[test]
fn weights_are_the_same_to_the_last_unit() {
    let rows = 600;
    let draw = |i: usize| Draw {
        repetition_penalty: [1.0, 1.1][i / 2 % 2],
        temperature: 0.7,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        random: 0,
    };
    let mut draws: Vec<Draw> = (0..rows).map(draw).collect();
    let mut logits = Vec::new();
    for (i, distance) in random(rows / 2, 6).iter().enumerate() {
        // From a hair to beyond 2⁻³⁰, on both sides of 0.
        let row = [3.0 - 7.5 * (distance + 1.0).powi(2).min(2.0), 3.0];
        let penalized =
            row.map(|l| if l > 0.0 { l / draws[2 * i].repetition_penalty } else { l * draws[2 * i].repetition_penalty });
        let [w, other] = penalized.map(|l| u128::from(weight(l, penalized[1], draws[2 * i].scale())));
        let least = (w << 64).div_ceil(w + other) as u64;
        (draws[2 * i].random, draws[2 * i + 1].random) = (least, least.saturating_sub(1));
        logits.extend([row, row].concat());
    }
    for device in f32_devices() {
        let mut ids = device.ops.alloc(&[rows], DType::I32).unwrap();
        let mut seen = device.ops.upload(Tensor::from_slice(&[rows, 1], &vec![3; rows])).unwrap();
        device.ops.sample(&mut ids, &device.put_f32(&[rows, 2], &logits), &mut seen, &draws).unwrap();
        for (i, id) in device.ops.download_i32(&ids).unwrap().into_iter().enumerate() {
            // Where the first has no weight, nothing draws it.
            assert_eq!(id, i32::from(i % 2 == 0 || draws[i].random == 0), "{}: {:?}", device.name, &logits[2 * i..][..2]);
        }
    }
}

/// Draws of 64 even shares of the total, as good as random ones: each token comes as often as its share says, to within two.
#[test]
fn tokens_are_drawn_as_often_as_they_are_probable() {
    let (vocab, rows) = (7, 64);
    let logits: Vec<f32> = random(vocab, 5).iter().map(|l| 3.0 * l).collect();
    let exp: Vec<f64> = logits.iter().map(|&l| f64::from(l / 0.8).exp()).collect();
    for device in f32_devices() {
        let draw = |i: u64| Draw {
            repetition_penalty: 1.0,
            temperature: 0.8,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            random: i << 58 | 1 << 57,
        };
        let draws: Vec<Draw> = (0..rows as u64).map(draw).collect();
        let mut ids = device.ops.alloc(&[rows], DType::I32).unwrap();
        let mut seen = device.ops.alloc(&[rows, 1], DType::I32).unwrap();
        device.ops.sample(&mut ids, &device.put_f32(&[rows, vocab], &logits.repeat(rows)), &mut seen, &draws).unwrap();
        let ids = device.ops.download_i32(&ids).unwrap();
        assert!(ids.is_sorted(), "{}: the draw is in the order of indices: {ids:?}", device.name);
        for i in 0..vocab {
            let expected = rows as f64 * exp[i] / exp.iter().sum::<f64>();
            let count = ids.iter().filter(|&&id| id as usize == i).count();
            assert!((count as f64 - expected).abs() <= 1.0, "{}: {i} came {count} times, expected {expected}", device.name);
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let draw = draw(&mut Bits(1), 5);
    for device in f32_devices() {
        let there = |shape: &[usize], dtype| device.ops.alloc(shape, dtype).unwrap();
        let refused = |ids: &[usize], logits: Tensor, seen: &[usize], n_draws: usize, word: &str| {
            let (mut ids, mut seen) = (there(ids, DType::I32), there(seen, DType::I32));
            let error = device.ops.sample(&mut ids, &logits, &mut seen, &vec![draw; n_draws]).unwrap_err().to_string();
            assert!(error.contains(word), "{}: {error}", device.name);
        };
        refused(&[2], there(&[2, 0], DType::F32), &[2, 0], 2, "vocabulary");
        refused(&[1], there(&[2, 33], DType::F32), &[2, 2], 2, "ids");
        refused(&[2], there(&[2, 33], DType::F32), &[2, 1], 2, "seen");
        refused(&[2], there(&[2, 33], DType::F32), &[2, 2], 1, "draws");
        refused(&[2], there(&[2, 33], DType::F16), &[2, 2], 2, "dtype of logits");
        assert!(device.ops.download_i32(&there(&[2], DType::F32)).is_err());
        // Nothing to do is nothing wrong.
        let (mut ids, mut seen) = (there(&[0], DType::I32), there(&[0, 2], DType::I32));
        device.ops.sample(&mut ids, &there(&[0, 33], DType::F32), &mut seen, &[]).unwrap();
        if !device.name.starts_with("cpu") {
            refused(&[1], Tensor::zeros(&[1, 33], DType::F32), &[1, 2], 1, "of the host");
        }
    }
}
