//! What integration tests share.
#![allow(dead_code)] // each test crate uses its own part

pub mod devices;
pub mod finetune;
pub mod program;
pub mod reference;

use std::path::{Path, PathBuf};

use llava_engine::data::RowFile;
use llava_engine::device::Device;
use llava_engine::image::{ImageSource, Limits, RgbImage};

/// The project's folder: where it was built, or, for a test that was carried to another machine, where `CARGO_MANIFEST_DIR` says.
pub fn root() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

/// A path within `tests/fixtures`.
pub fn fixture(path: &str) -> PathBuf {
    root().join("tests/fixtures").join(path)
}

/// The device that the kernels run on: what `LLAVA_TEST_DEVICE` names (`cuda` on a machine with a GPU, by tools/gpu_check.sh), or the
/// simulator where the build has it.
pub fn kernel_device() -> Option<Device> {
    match std::env::var("LLAVA_TEST_DEVICE") {
        Ok(name) => Some(name.parse().unwrap()),
        Err(_) => cfg!(llava_sim).then_some(Device::Sim),
    }
}

/// An image file.
pub fn image(path: &Path) -> RgbImage {
    ImageSource::parse(path.to_str().unwrap()).unwrap().load(&Limits::default()).unwrap()
}

/// How far `got` may be from `expected`: absolute, plus relative to the largest expected value.
#[derive(Clone, Copy, Debug)]
pub struct Bound {
    pub abs: f32,
    pub rel_to_max: f32,
}

impl Bound {
    pub const fn abs(abs: f32) -> Self {
        Self { abs, rel_to_max: 0.0 }
    }
}

/// Fails with the worst place if any element is off by more than `bound`, or is not finite.
pub fn assert_close(what: &str, got: &[f32], expected: &[f32], bound: Bound) {
    assert_eq!(got.len(), expected.len(), "{what}: number of elements");
    let max = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let limit = bound.abs + bound.rel_to_max * max;
    let worst = got.iter().zip(expected).enumerate().map(|(i, (g, e))| (i, (g - e).abs())).fold((0, 0.0), |a, b| {
        // NaN compares false: it must not pass for small.
        if b.1 <= a.1 { a } else { b }
    });
    assert!(
        worst.1 <= limit,
        "{what}: element {} is {} and should be {}: off by {}, allowed are {limit} (largest value {max})",
        worst.0,
        got[worst.0],
        expected[worst.0],
        worst.1
    );
}

/// a·b / (|a|·|b|)
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// A file of these rows, in a folder of its own.
pub fn rows(text: &str) -> (tempfile::TempDir, RowFile) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.json");
    std::fs::write(&path, text).unwrap();
    let file = RowFile::open(&path, folder.path()).unwrap();
    (folder, file)
}
