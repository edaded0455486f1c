//! Pictures on every device: the pixels are the host's, bit for bit, whatever the size. (That the host's are Pillow's: `image.rs`.)

mod support;

use llava_engine::dtype::DType;
use llava_engine::image::{Fit, Preprocess, RgbImage, preprocess};
use llava_engine::ops::Ops;
use llava_engine::tensor::Tensor;
use support::devices::{TestDevice, devices, kernel_devices};

/// Levels that look like noise, so that sums leave 0 to 255 on both sides.
fn noise(width: usize, height: usize) -> RgbImage {
    let value = |i: usize| match (i.wrapping_mul(2_654_435_761) >> 7) as u8 {
        v if v < 64 => 0,
        v if v > 192 => 255,
        v => v,
    };
    RgbImage::new(width, height, (0..width * height * 3).map(value).collect()).unwrap()
}

/// The pixels on a device, in tensors that were not zero before.
fn on_device(ops: &dyn Ops, images: &[RgbImage], config: &Preprocess) -> Vec<u32> {
    let shape = [images.len(), 3, config.crop_size, config.crop_size];
    let mut pixels = ops.upload(Tensor::from_slice(&shape, &vec![77.0f32; shape.iter().product()])).unwrap();
    ops.preprocess(&mut pixels, images, config).unwrap();
    ops.download(&pixels).unwrap().iter().map(|v| v.to_bits()).collect()
}

fn assert_same(images: &[RgbImage], config: &Preprocess, devices: &[TestDevice]) {
    let expected: Vec<u32> = preprocess(images, config).unwrap().as_slice::<f32>().iter().map(|v| v.to_bits()).collect();
    for device in devices {
        let got = on_device(&*device.ops, images, config);
        let off = got.iter().zip(&expected).filter(|(a, b)| a != b).count();
        assert_eq!(off, 0, "{} of {} pixels on {}: {images:?}, {config:?}", off, expected.len(), device.name);
    }
}

#[test]
fn pixels_are_the_hosts() {
    // One pixel, lines, no resize, one pixel more and less; and higher than twice the width, where columns come first.
    let sizes =
        [(1, 1), (1, 111), (111, 1), (2, 3), (28, 28), (29, 27), (30, 28), (300, 17), (577, 40), (31, 989), (40, 81), (40, 80)];
    let images: Vec<_> = sizes.map(|(width, height)| noise(width, height)).into();
    let devices = devices();
    for fit in [Fit::Crop, Fit::Pad] {
        assert_same(&images, &Preprocess::clip(28, fit), &devices);
        // A crop that cuts, and one that the picture does not fill.
        assert_same(&images[3..], &Preprocess { crop_size: 15, ..Preprocess::clip(28, fit) }, &devices);
        assert_same(&images[3..], &Preprocess { shortest_edge: 9, ..Preprocess::clip(28, fit) }, &devices);
    }
}

#[test]
fn pixels_are_the_hosts_at_the_size_of_the_tower() {
    // The kernels are the same whatever activations are.
    let devices: Vec<_> = devices().into_iter().filter(|device| device.dtype == DType::F32).collect();
    for (width, height) in [(336, 336), (337, 335), (989, 1), (340, 690)] {
        for fit in [Fit::Crop, Fit::Pad] {
            assert_same(&[noise(width, height)], &Preprocess::clip(336, fit), &devices);
        }
    }
    for (width, height) in [(3000, 17), (1, 989)] {
        assert_same(&[noise(width, height)], &Preprocess::clip(336, Fit::Crop), &devices);
    }
}

#[test]
fn no_pictures_are_no_pixels() {
    for device in devices() {
        assert!(on_device(&*device.ops, &[], &Preprocess::clip(28, Fit::Pad)).is_empty(), "{}", device.name);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    for device in devices() {
        let (images, config) = ([noise(3, 2)], Preprocess::clip(14, Fit::Crop));
        let refusal = |shape: &[usize], dtype, config: &Preprocess| {
            let mut pixels = device.ops.alloc(shape, dtype).unwrap();
            device.ops.preprocess(&mut pixels, &images, config).unwrap_err().to_string()
        };
        assert!(refusal(&[2, 3, 14, 14], DType::F32, &config).contains("preprocess: pixels"));
        assert!(refusal(&[1, 3, 14, 15], DType::F32, &config).contains("preprocess: pixels"));
        assert!(refusal(&[1, 3, 14, 14], DType::F16, &config).contains("dtype of pixels"));
        let no_std = Preprocess { std: [0.0; 3], ..config };
        assert!(refusal(&[1, 3, 14, 14], DType::F32, &no_std).contains("std"));
    }
    for device in kernel_devices() {
        let mut on_host = Tensor::zeros(&[1, 3, 14, 14], DType::F32);
        let result = device.ops.preprocess(&mut on_host, &[noise(3, 2)], &Preprocess::clip(14, Fit::Crop));
        assert!(result.unwrap_err().to_string().contains("on the device"), "{}", device.name);
    }
}
