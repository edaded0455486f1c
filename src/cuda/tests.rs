//! Kernels in the simulator. (The ops as such are tested from one case table for all devices: tests/ops.rs.)

use std::sync::Arc;

use super::Cuda;
use super::driver::GraphId;
use super::queue::MAX_RECORDED;
use crate::dtype::DType;
use crate::image::{Fit, Preprocess, RgbImage, preprocess};
use crate::ops::{Draw, Epilogue, Ops, Weight};
use crate::tensor::Tensor;

#[test]
fn rms_norm_runs() {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let cuda = Cuda::simulated(2, dtype).unwrap();
        let host: Vec<f32> = (0..3 * 111).map(|i| (i % 17) as f32 - 5.0).collect();
        let x = cuda.to_device(Tensor::from_slice(&[3, 111], &host).converted(dtype)).unwrap();
        let w = cuda.to_device(Tensor::from_slice(&[111], &[1.0f32; 111])).unwrap();
        let mut y = cuda.zeros(&[3, 111], dtype).unwrap();
        cuda.rms_norm(&mut y, &x, &w, 1e-5).unwrap();
        let y = cuda.to_host(&y).unwrap().to_f32();
        for (y, x) in y.chunks(111).zip(host.chunks(111)) {
            let rms = (x.iter().map(|v| v * v).sum::<f32>() / 111.0).sqrt();
            assert!(y.iter().zip(x).all(|(y, x)| (y - x / rms).abs() < 0.01), "{dtype}: {y:?}");
        }
    }
}

/// The same launches four times, on other rows of a table each time: made one by one, then recorded, then replayed.
#[test]
fn launches_that_come_again_are_replayed_with_new_tables() {
    let rows = [3.0f32, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0, 5.0, 3.0, 5.0, 8.0];
    let round_ids = [[0, 1], [2, 0], [1, 2], [0, 0]];
    let run = |flush_each: bool| {
        let cuda = Cuda::simulated(1, DType::F32).unwrap();
        let w = cuda.to_device(Tensor::from_slice(&[4], &[1.0f32; 4])).unwrap();
        let table = cuda.to_device(Tensor::from_slice(&[3, 4], &rows)).unwrap().into();
        let [mut x, mut y] = [0, 0].map(|_| cuda.zeros(&[2, 4], DType::F32).unwrap());
        let between = || {
            if flush_each {
                cuda.queue.flush().unwrap()
            }
        };
        let mut results = Vec::new();
        for (round, ids) in round_ids.iter().enumerate() {
            cuda.embed(&mut x, &table, ids).unwrap();
            between();
            for _ in 0..5 {
                cuda.rms_norm(&mut y, &x, &w, 0.5).unwrap();
                between();
                cuda.rms_norm(&mut x, &y, &w, 0.25).unwrap();
                between();
            }
            results.push(cuda.to_host(&x).unwrap().to_f32());
            assert_eq!(cuda.queue.n_replays(), if flush_each { 0 } else { round });
        }
        results
    };
    let expected = run(true);
    assert!(expected[0] != expected[1] && expected[1] != expected[2] && expected[2] != expected[3]);
    assert_eq!(run(false), expected);
}

/// Tables of one flush have places of their own, and the same table has one.
#[test]
fn tables_are_staged_side_by_side() {
    let cuda = Cuda::simulated(1, DType::F32).unwrap();
    let table = cuda.queue.stage(vec![7; 3]).unwrap();
    assert_ne!(cuda.queue.stage(vec![-1]).unwrap(), table);
    assert_eq!(cuda.queue.stage(vec![7; 3]).unwrap(), table);
}

/// A table that has grown gets another place before it is copied.
#[test]
fn a_table_outgrows_its_place() {
    let cuda = Cuda::simulated(1, DType::F32).unwrap();
    let rows: Vec<f32> = (0..5 * 4).map(|i| i as f32).collect();
    let table = cuda.to_device(Tensor::from_slice(&[5, 4], &rows)).unwrap().into();
    for n in [3, 700, 4, 300] {
        let ids: Vec<u32> = (0..n).map(|i| i * 3 % 5).collect();
        let mut y = cuda.zeros(&[ids.len(), 4], DType::F32).unwrap();
        cuda.embed(&mut y, &table, &ids).unwrap();
        let expected: Vec<f32> = ids.iter().flat_map(|&id| rows[id as usize * 4..][..4].to_vec()).collect();
        assert_eq!(cuda.to_host(&y).unwrap().to_f32(), expected, "{n} ids");
    }
}

/// Of too many sequences the one that was used longest ago is forgotten, with its graph: it comes again as a new one.
#[test]
fn the_sequence_that_was_used_longest_ago_is_forgotten() {
    let cuda = Cuda::simulated(1, DType::F32).unwrap();
    let x = cuda.to_device(Tensor::from_slice(&[1, 4], &[2.0f32; 4])).unwrap();
    let w = cuda.to_device(Tensor::from_slice(&[4], &[1.0f32; 4])).unwrap();
    let mut y = cuda.zeros(&[1, 4], DType::F32).unwrap();
    // One sequence for each number; what is returned is how often any was replayed.
    let mut make = |number: usize| {
        (0..8).for_each(|_| cuda.rms_norm(&mut y, &x, &w, number as f32).unwrap());
        cuda.queue.flush().unwrap();
        cuda.queue.n_replays()
    };
    assert_eq!([0, 0, 1, 1, 0].map(&mut make), [0, 1, 1, 2, 3]);
    for number in 2..=MAX_RECORDED {
        assert_eq!(make(number), 3, "{number} is new");
    }
    assert_eq!([0, 1, 1].map(&mut make), [4, 4, 5]);
    // SAFETY: a graph of launches whose tensors are still there; the simulator refuses one that was forgotten.
    let forgotten = |graph| unsafe { cuda.driver.replay(GraphId(graph)) }.is_err();
    assert_eq!([0, 1, 2].map(forgotten), [false, true, false]);
}

#[test]
fn what_is_on_the_device_is_not_copied_again() {
    let cuda = Cuda::simulated(1, DType::F32).unwrap();
    let x = cuda.to_device(Tensor::from_slice(&[3], &[1.0f32, 2.0, 3.0])).unwrap();
    let address = x.device_address();
    let x = cuda.to_device(x).unwrap();
    assert_eq!(x.device_address(), address);
    assert_eq!(cuda.to_host(&x).unwrap().to_f32(), [1.0, 2.0, 3.0]);
}

#[test]
fn memory_is_handed_on() {
    let cuda = Cuda::simulated(1, DType::F32).unwrap();
    let a = cuda.zeros(&[3, 5], DType::F32).unwrap();
    let address = a.device_address();
    drop(a);
    assert_ne!(cuda.zeros(&[3, 6], DType::F32).unwrap().device_address(), address);
    let b = cuda.zeros(&[15], DType::F32).unwrap();
    assert_eq!(b.device_address(), address);
    let c = cuda.zeros(&[15], DType::F32).unwrap();
    assert_ne!(c.device_address(), address);
}

/// What a draw needs stands in a table: steps that end with one are replayed, each with its own random bits.
#[test]
fn steps_that_draw_are_replayed() {
    let (vocab, hidden) = (111, 16);
    let cuda = Cuda::simulated(1, DType::F32).unwrap();
    let values = |n: usize, salt: usize| -> Vec<f32> { (0..n).map(|i| ((i * 37 + salt) % 101) as f32 * 0.02 - 1.0).collect() };
    let there = |shape: &[usize], salt| cuda.to_device(Tensor::from_slice(shape, &values(shape.iter().product(), salt))).unwrap();
    let (table, norm) = (there(&[vocab, hidden], 1).into(), there(&[hidden], 2));
    let head = Weight::stacked(vec![Arc::new(there(&[vocab, hidden], 3))]).unwrap();
    let zeros = |shape: &[usize], dtype| cuda.zeros(shape, dtype).unwrap();
    let [mut x, mut y] = [0, 0].map(|_| zeros(&[1, hidden], DType::F32));
    let mut logits = zeros(&[1, vocab], DType::F32);
    let (mut ids, mut seen) = (zeros(&[1], DType::I32), zeros(&[1, vocab.div_ceil(32)], DType::I32));
    let mut answer = Vec::new();
    for step in 0..12 {
        cuda.embed(&mut x, &table, &[answer.last().map_or(0, |&id| id as u32)]).unwrap();
        for _ in 0..4 {
            cuda.rms_norm(&mut y, &x, &norm, 0.5).unwrap();
            cuda.rms_norm(&mut x, &y, &norm, 0.25).unwrap();
        }
        cuda.linear(&mut logits, &x, &head, None, Epilogue::Store).unwrap();
        let random = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(step + 1);
        let draw = Draw { repetition_penalty: 2.0, temperature: 1.0, top_k: 90, top_p: 0.95, min_p: 0.01, random };
        cuda.sample(&mut ids, &logits, &mut seen, &[draw]).unwrap();
        answer.extend(cuda.download_i32(&ids).unwrap());
        assert_eq!(cuda.queue.n_replays(), step as usize);
    }
    let mut occurred = vec![0; vocab.div_ceil(32)];
    answer.iter().for_each(|&id| occurred[id as usize / 32] |= 1 << (id % 32));
    assert_eq!(cuda.download_i32(&seen).unwrap(), occurred, "{answer:?}");
    assert!(occurred.iter().map(|word: &i32| word.count_ones()).sum::<u32>() > 6, "draws repeat: {answer:?}");
}

/// Pictures come in strips: as one row of the first pass needs at least, and however long the whole is.
#[test]
fn strips_of_a_picture_make_the_whole() {
    let cuda = Cuda::simulated(2, DType::F32).unwrap();
    for (width, height) in [(50, 40), (23, 70), (70, 9)] {
        let levels = (0..width * height * 3).map(|i: usize| (i.wrapping_mul(2_654_435_761) >> 9) as u8).collect();
        let images = [RgbImage::new(width, height, levels).unwrap()];
        for fit in [Fit::Crop, Fit::Pad] {
            let config = Preprocess::clip(14, fit);
            let expected = preprocess(&images, &config).unwrap();
            for strip_bytes in [1, 1000, 5000, usize::MAX] {
                let mut pixels = cuda.zeros(expected.shape(), DType::F32).unwrap();
                cuda.preprocess_in_strips(&mut pixels, &images, &config, strip_bytes).unwrap();
                let pixels = cuda.to_host(&pixels).unwrap();
                assert!(pixels.as_bytes() == expected.as_bytes(), "{width} x {height}, {fit:?}, {strip_bytes}");
            }
        }
    }
}

/// A device holds a strip and what the first pass made, however large the picture and however many of them come.
#[test]
fn pictures_do_not_fill_the_device() {
    let cuda = Cuda::simulated(2, DType::F32).unwrap();
    let most = 128 << 10;
    for (width, height) in [(300, 400), (310, 400), (700, 200), (200, 500)] {
        let images = [RgbImage::filled(width, height, [9, 99, 199]).unwrap()];
        assert!(images[0].pixels().len() > 2 * most);
        for fit in [Fit::Crop, Fit::Pad] {
            let mut pixels = cuda.zeros(&[1, 3, 14, 14], DType::F32).unwrap();
            // As many rows as one output of the columns-first pass needs take more than this.
            cuda.preprocess_in_strips(&mut pixels, &images, &Preprocess::clip(14, fit), 4000).unwrap();
        }
    }
    let held = cuda.arena.free_bytes();
    assert!(held <= most, "{held} bytes");
}
