//! Kernels in the simulator. (The ops as such are tested from one case table for all devices: tests/ops.rs.)

use super::Cuda;
use crate::dtype::DType;
use crate::image::{Fit, Preprocess, RgbImage, preprocess};
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
        let table = cuda.to_device(Tensor::from_slice(&[3, 4], &rows)).unwrap();
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

#[test]
fn argmax_takes_the_first_of_the_largest() {
    let cuda = Cuda::simulated(2, DType::F32).unwrap();
    for vocab in [1, 3, 111, 4096, 8193] {
        let at = |i: usize| i % vocab;
        let low = |peaks: &[usize], peak: f32| {
            let mut row: Vec<f32> = (0..vocab).map(|i| (i * 37 % 64) as f32 * -0.25 - 1.0).collect();
            peaks.iter().for_each(|&i| row[i] = peak);
            row
        };
        let rows = [
            low(&[at(7)], 5.0),
            low(&[at(1), vocab - 1, vocab / 2], 0.5),
            low(&[vocab - 1], f32::INFINITY),
            vec![f32::NEG_INFINITY; vocab],
            // Equal, whatever their bits.
            low(&[], 0.0)
                .iter()
                .enumerate()
                .map(|(i, &x)| {
                    if i == 0 {
                        -0.0
                    } else if i == 1 {
                        0.0
                    } else {
                        x
                    }
                })
                .collect(),
            low(&[vocab / 2], f32::NAN),
        ];
        let expected = [at(7), at(1).min(vocab / 2), vocab - 1, 0, 0].map(|i| i as i32);
        let logits = cuda.to_device(Tensor::from_slice(&[rows.len(), vocab], &rows.concat())).unwrap();
        let mut ids = cuda.zeros(&[rows.len()], DType::I32).unwrap();
        cuda.argmax(&mut ids, &logits).unwrap();
        let ids = cuda.to_host(&ids).unwrap();
        assert_eq!(ids.as_slice::<i32>(), [&expected[..], &[-1]].concat(), "{vocab}");
    }
    let mut ids = cuda.zeros(&[1], DType::I32).unwrap();
    assert!(cuda.argmax(&mut ids, &cuda.zeros(&[1, 0], DType::F32).unwrap()).is_err());
    assert!(cuda.argmax(&mut ids, &cuda.zeros(&[2, 5], DType::F32).unwrap()).is_err());
    assert!(cuda.argmax(&mut ids, &cuda.zeros(&[1, 5], DType::F16).unwrap()).is_err());
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
