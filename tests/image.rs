//! Pictures against the numbers of Pillow and of the Hugging Face CLIP processor, and against files made to do harm.
//!
//! `tests/fixtures/images` holds files and what Pillow 13 reads from them, `resize.safetensors` what it resizes them to,
//! `checkpoints/*/expected.safetensors` what the processors of transformers and of the original LLaVA hand to the tower; all are
//! written by `tools/reference`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use llava_engine::image::{Fit, ImageSource, Limits, Preprocess, RgbImage, decode, preprocess, resize_bicubic};
use proptest::prelude::*;
use safetensors::SafeTensors;

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(path)
}

fn read(path: &str) -> Vec<u8> {
    let path = fixture(path);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn load(file: &str) -> RgbImage {
    decode(&read(file), file, &Limits::default()).unwrap()
}

/// A fixture of shape [h, w, 3].
fn picture(tensors: &SafeTensors, name: &str) -> RgbImage {
    let view = tensors.tensor(name).unwrap();
    RgbImage::new(view.shape()[1], view.shape()[0], view.data().to_vec()).unwrap()
}

/// A picture in which no two rows, columns or channels are alike.
fn patterned(width: usize, height: usize) -> RgbImage {
    let value = |i: usize| (i.wrapping_mul(2_654_435_761) >> 7) as u8;
    RgbImage::new(width, height, (0..width * height * 3).map(value).collect()).unwrap()
}

fn encode(image: &RgbImage, format: image::ImageFormat) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    image::RgbImage::from_raw(image.width() as u32, image.height() as u32, image.pixels().to_vec())
        .unwrap()
        .write_to(&mut bytes, format)
        .unwrap();
    bytes.into_inner()
}

/// A PNG of any colour type from its samples, rows of `row_bytes`.
fn encode_png(width: u32, height: u32, color: png::ColorType, depth: png::BitDepth, samples: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(color);
    encoder.set_depth(depth);
    encoder.write_header().unwrap().write_image_data(samples).unwrap();
    bytes
}

/// The message of an error that must be there, and must be one line.
fn refusal<T: std::fmt::Debug>(result: Result<T, llava_engine::error::Error>) -> String {
    let message = result.unwrap_err().to_string();
    assert!(!message.contains('\n') && message.len() < 400, "not a line: {message}");
    message
}

// --- decoding -------------------------------------------------------------------------------------------------------------------

/// How far a decoded file may be from Pillow's pixels, in levels: (largest difference, mean difference).
///
/// JPEG: zune-jpeg and libjpeg-turbo differ by a rounding of the inverse DCT (4:4:4, grey) and by how colour at half resolution is
/// interpolated (4:2:0); everything else is exact. Measured on these files: 444 max 2, mean 0.043; grey 1, 0.024; 420 11, 0.40;
/// progressive 420 30, 0.69.
fn tolerance(file: &str) -> (u8, f64) {
    match file {
        "photo_444.jpg" | "photo_grey.jpg" => (2, 0.05),
        _ if file.ends_with(".jpg") => (30, 0.7),
        _ => (0, 0.0),
    }
}

#[test]
fn decodes_what_pillow_decodes() {
    let bytes = read("images/pixels.safetensors");
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let mut n_files = 0;
    for name in expected.names() {
        let Some(file) = name.strip_suffix(".rgb") else { continue };
        let (got, expected) = (load(&format!("images/{file}")), picture(&expected, name));
        assert_eq!((got.width(), got.height()), (expected.width(), expected.height()), "{file}");
        let differences = || got.pixels().iter().zip(expected.pixels()).map(|(a, b)| a.abs_diff(*b));
        let mean = differences().map(f64::from).sum::<f64>() / got.pixels().len() as f64;
        let max = differences().max().unwrap();
        let (max_allowed, mean_allowed) = tolerance(file);
        assert!(max <= max_allowed && mean <= mean_allowed, "{file}: off by up to {max}, {mean:.4} on average");
        n_files += 1;
    }
    assert!(n_files >= 15, "only {n_files} fixtures");
}

#[test]
fn every_png_depth_is_read_as_pillow_reads_it() {
    use png::{BitDepth, ColorType};
    let rgb = |bytes: Vec<u8>| decode(&bytes, "png", &Limits::default()).unwrap().pixels().to_vec();
    // 16-bit grey is cut off at 255 ...
    let grey16 = encode_png(4, 1, ColorType::Grayscale, BitDepth::Sixteen, &[0, 7, 0, 255, 1, 0, 255, 255]);
    assert_eq!(rgb(grey16), [[7; 3], [255; 3], [255; 3], [255; 3]].concat());
    // ... 16-bit colour, and grey with alpha, keep the high byte.
    let rgb16 = encode_png(1, 1, ColorType::Rgb, BitDepth::Sixteen, &[1, 200, 2, 0, 3, 99]);
    assert_eq!(rgb(rgb16), [1, 2, 3]);
    let grey_alpha16 = encode_png(1, 1, ColorType::GrayscaleAlpha, BitDepth::Sixteen, &[9, 255, 0, 0]);
    assert_eq!(rgb(grey_alpha16), [9; 3]);
    // Fewer bits are spread over 0..=255.
    assert_eq!(rgb(encode_png(3, 1, ColorType::Grayscale, BitDepth::One, &[0b0100_0000])), [[0; 3], [255; 3], [0; 3]].concat());
    assert_eq!(rgb(encode_png(3, 1, ColorType::Grayscale, BitDepth::Two, &[0b0110_1100])), [[85; 3], [170; 3], [255; 3]].concat());
    // Alpha is dropped: the colour under a transparent pixel shows.
    assert_eq!(rgb(encode_png(1, 1, ColorType::Rgba, BitDepth::Eight, &[10, 20, 30, 0])), [10, 20, 30]);
}

#[test]
fn a_gif_frame_lies_on_a_canvas_of_the_transparent_colour() {
    let palette = [1, 2, 3, 40, 50, 60, 7, 8, 9, 250, 240, 230];
    let mut bytes = Vec::new();
    let mut encoder = gif::Encoder::new(&mut bytes, 3, 2, &palette).unwrap();
    let frame = gif::Frame {
        width: 2,
        height: 1,
        left: 1,
        top: 1,
        transparent: Some(2),
        buffer: (&[1u8, 2][..]).into(),
        ..Default::default()
    };
    encoder.write_frame(&frame).unwrap();
    drop(encoder);
    let image = decode(&bytes, "gif", &Limits::default()).unwrap();
    let clear = [7, 8, 9];
    assert_eq!(image.pixels(), [clear, clear, clear, clear, [40, 50, 60], clear].concat());
}

#[test]
fn content_decides_and_never_the_name() {
    let image = patterned(5, 4);
    for format in [image::ImageFormat::Png, image::ImageFormat::Bmp, image::ImageFormat::WebP] {
        assert_eq!(decode(&encode(&image, format), "photo.jpg", &Limits::default()).unwrap(), image, "{format:?}");
    }
}

#[test]
fn what_is_no_picture_is_named() {
    let cases: [(&[u8], &str); 10] = [
        (b"", "an empty file"),
        (b"hello, this is a note\n", "text"),
        ("grün und schön".as_bytes(), "text"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"{\"error\": \"not found\"}", "JSON text"),
        (b"<svg xmlns='...'/>", "an SVG drawing"),
        (b"\0\0\0\x20ftypheic\0\0\0\0", "a HEIC picture"),
        (b"II*\0\x08\0\0\0", "a TIFF picture"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        (b"\x01\x02\x03\0", "data of an unknown kind"),
    ];
    for (bytes, expected) in cases {
        let message = refusal(decode(bytes, "cat.jpg", &Limits::default()));
        assert!(message.starts_with("image cat.jpg: ") && message.contains(expected), "{message}");
    }
}

#[test]
fn a_file_that_was_cut_off_is_refused() {
    let photo = encode(&patterned(64, 48), image::ImageFormat::Jpeg);
    let progressive = read("images/photo_progressive.jpg");
    let files = [
        ("png", encode(&patterned(64, 48), image::ImageFormat::Png), 40),
        ("bmp", encode(&patterned(64, 48), image::ImageFormat::Bmp), 1),
        ("gif", encode(&patterned(64, 48), image::ImageFormat::Gif), 8),
        ("webp", encode(&patterned(64, 48), image::ImageFormat::WebP), 8),
        ("jpeg", photo, 1),
        ("progressive jpeg", progressive, 1),
    ];
    for (format, bytes, shortest_cut) in files {
        decode(&bytes, format, &Limits::default()).unwrap();
        for kept in [bytes.len() - shortest_cut, bytes.len() / 2, bytes.len() / 4, 20] {
            refusal(decode(&bytes[..kept], format, &Limits::default()));
        }
    }
}

// --- limits ---------------------------------------------------------------------------------------------------------------------

#[test]
fn limits_hold_at_their_edges() {
    let limits = Limits { max_bytes: 1000, max_side: 30, max_pixels: 600, max_alloc_bytes: 1800 };
    let png = |width: usize, height: usize| encode(&RgbImage::filled(width, height, [9, 9, 9]).unwrap(), image::ImageFormat::Png);
    for (width, height, refused) in [(30, 20, None), (31, 1, Some("30 that are allowed on a side")), (25, 25, Some("megapixels"))] {
        let result = decode(&png(width, height), "x", &limits);
        match refused {
            None => assert_eq!(result.unwrap().width(), width),
            Some(why) => assert!(refusal(result).contains(why), "{width} x {height}"),
        }
    }
    assert!(refusal(decode(&png(2, 2), "x", &Limits { max_bytes: 20, ..limits.clone() })).contains("has more than the 0.00002 MB"));
    assert!(refusal(decode(&png(30, 20), "x", &Limits { max_alloc_bytes: 1799, ..limits })).contains("bytes to decode"));
}

/// 20,000 x 20,000 pixels of one bit, in 50 kB: 1.2 GB as RGB.
#[test]
fn a_decompression_bomb_is_refused_before_it_is_decoded() {
    const CHILD: &str = "LLAVA_TEST_BOMB";
    if let Some(path) = std::env::var_os(CHILD) {
        // The peak is that of the whole process, so this runs in one of its own.
        let bytes = std::fs::read(path).unwrap();
        let start = Instant::now();
        let message = refusal(decode(&bytes, "bomb.png", &Limits::default()));
        assert!(start.elapsed() < Duration::from_millis(100), "refused after {:?}", start.elapsed());
        assert!(message.contains("20000 x 20000"), "{message}");
        if let Ok(status) = std::fs::read_to_string("/proc/self/status") {
            let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
            let peak_kb: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
            assert!(peak_kb < 50_000, "took {peak_kb} kB");
        }
        return;
    }
    const SIDE: u32 = 20_000;
    let bomb = encode_png(SIDE, SIDE, png::ColorType::Grayscale, png::BitDepth::One, &vec![0; (SIDE / 8 * SIDE) as usize]);
    assert!(bomb.len() < 200_000);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bomb.png");
    std::fs::write(&path, bomb).unwrap();
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_decompression_bomb_is_refused_before_it_is_decoded"])
        .env(CHILD, &path)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

// --- resizing -------------------------------------------------------------------------------------------------------------------

#[test]
fn resizes_byte_for_byte_like_pillow() {
    let bytes = read("resize.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut n_cases = 0;
    for name in tensors.names() {
        let Some(case) = name.strip_suffix(".input").filter(|case| case.starts_with("resize_")) else { continue };
        let expected = picture(&tensors, &format!("{case}.output"));
        let got = resize_bicubic(&picture(&tensors, name), expected.width(), expected.height()).unwrap();
        assert!(got == expected, "{case}");
        n_cases += 1;
    }
    assert!(n_cases >= 15, "only {n_cases} fixtures");
}

/// Sizes of real photos: the input by a formula, the output by its digest.
#[test]
fn resizes_large_pictures_like_pillow() {
    let json: serde_json::Value = serde_json::from_slice(&read("resize.json")).unwrap();
    let cases = json["large"].as_array().unwrap();
    for case in cases {
        let size = |key: &str| [0, 1].map(|i| case[key][i].as_u64().unwrap() as usize);
        let ([width, height], [to_width, to_height]) = (size("from"), size("to"));
        let value = |i: usize| {
            let (y, x, c) = (i / 3 / width, i / 3 % width, i % 3);
            ((31 * x + 17 * y + 101 * c + (x * y) % 251) % 256) as u8
        };
        let image = RgbImage::new(width, height, (0..width * height * 3).map(value).collect()).unwrap();
        let digest = sha256(resize_bicubic(&image, to_width, to_height).unwrap().pixels());
        assert_eq!(digest, case["sha256"], "{}", case["name"]);
    }
    assert!(cases.len() >= 8, "only {} fixtures", cases.len());
}

/// FIPS 180-4. Its constants are the first 32 bits of the fractions of square and cube roots of the first primes.
fn sha256(message: &[u8]) -> String {
    let primes: Vec<u32> = (2..312).filter(|n| (2..*n).all(|d| n % d != 0)).collect();
    // floor(root(p) 2^32) by bisection in integers, as f64 has too few bits; the integer part falls off.
    let root = |p: u32, degree: u32| -> u32 {
        let target = u128::from(p) << (32 * degree);
        let (mut low, mut high) = (0u128, 1 << 37);
        while high - low > 1 {
            let middle = (low + high) / 2;
            *(if middle.pow(degree) <= target { &mut low } else { &mut high }) = middle;
        }
        low as u32
    };
    let k: Vec<u32> = primes.iter().map(|&p| root(p, 3)).collect();
    let mut state: [u32; 8] = std::array::from_fn(|i| root(primes[i], 2));
    let mut padded = message.to_vec();
    padded.push(0x80);
    padded.resize((padded.len() + 8).next_multiple_of(64) - 8, 0);
    padded.extend((message.len() as u64 * 8).to_be_bytes());
    for block in padded.as_chunks::<64>().0 {
        let mut w: Vec<u32> = block.as_chunks::<4>().0.iter().map(|b| u32::from_be_bytes(*b)).collect();
        for i in 16..64 {
            let s0 = w[i - 15].rotate_right(7) ^ w[i - 15].rotate_right(18) ^ (w[i - 15] >> 3);
            let s1 = w[i - 2].rotate_right(17) ^ w[i - 2].rotate_right(19) ^ (w[i - 2] >> 10);
            w.push(w[i - 16].wrapping_add(s0).wrapping_add(w[i - 7]).wrapping_add(s1));
        }
        let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = state;
        for (k, w) in k.iter().zip(&w) {
            let s1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
            let t1 = h.wrapping_add(s1).wrapping_add((e & f) ^ (!e & g)).wrapping_add(*k).wrapping_add(*w);
            let s0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
            let t2 = s0.wrapping_add((a & b) ^ (a & c) ^ (b & c));
            (h, g, f, e, d, c, b, a) = (g, f, e, d.wrapping_add(t1), c, b, a, t1.wrapping_add(t2));
        }
        for (state, value) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
            *state = state.wrapping_add(value);
        }
    }
    state.iter().map(|word| format!("{word:08x}")).collect()
}

#[test]
fn resizing_one_colour_keeps_it() {
    for level in [0, 1, 127, 254, 255] {
        let image = RgbImage::filled(37, 11, [level, 255 - level, 9]).unwrap();
        for (width, height) in [(1, 1), (37, 5), (336, 336), (36, 12)] {
            let expected = RgbImage::filled(width, height, [level, 255 - level, 9]).unwrap();
            assert_eq!(resize_bicubic(&image, width, height).unwrap().pixels(), expected.pixels(), "{level} to {width} x {height}");
        }
    }
}

#[test]
fn resizing_to_nothing_is_refused() {
    for (width, height) in [(0, 5), (5, 0), (usize::MAX, 2), (usize::MAX / 3, 1)] {
        refusal(resize_bicubic(&patterned(3, 3), width, height));
    }
}

// --- preprocessing --------------------------------------------------------------------------------------------------------------

/// The pixel values in the fixtures of a checkpoint: of transformers' processor, or of the original `process_images`.
#[test]
fn pixel_values_are_those_of_the_references() {
    let mut n_images = 0;
    for checkpoint in std::fs::read_dir(fixture("checkpoints")).unwrap() {
        let folder = checkpoint.unwrap().path();
        let Ok(expected) = std::fs::read(folder.join("expected.safetensors")) else { continue };
        let expected = SafeTensors::deserialize(&expected).unwrap();
        let json =
            |file: &str| -> serde_json::Value { serde_json::from_slice(&std::fs::read(folder.join(file)).unwrap()).unwrap() };
        let is_padded = json("config.json")["image_aspect_ratio"] == "pad";
        for (i, case) in json("expected.json")["cases"].as_array().unwrap().iter().enumerate() {
            let files: Vec<_> = case["images"].as_array().unwrap().iter().map(|file| folder.join(file.as_str().unwrap())).collect();
            if files.is_empty() {
                continue;
            }
            let expected = expected.tensor(&format!("case{i}.pixel_values")).unwrap();
            let side = *expected.shape().last().unwrap();
            let config = Preprocess::clip(side, if is_padded { Fit::Pad } else { Fit::Crop });
            let load = |file: &PathBuf| ImageSource::File(file.clone()).load(&Limits::default()).unwrap();
            let got = preprocess(&files.iter().map(load).collect::<Vec<_>>(), &config).unwrap();
            assert_eq!(got.shape(), expected.shape());
            // One level of JPEG is 1/255/std = 0.015; what is not JPEG is exact.
            let is_jpeg = files.iter().any(|file| file.extension().is_some_and(|e| e == "jpg"));
            let bound = if is_jpeg { 0.05 } else { 0.0 };
            let expected = expected.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
            let worst = got.as_slice::<f32>().iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= bound, "{} case {i}: off by {worst}", folder.display());
            n_images += files.len();
        }
    }
    assert!(n_images >= 10, "only {n_images} images");
}

#[test]
fn padding_and_cropping_are_those_of_the_references() {
    let bytes = read("resize.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut n_cases = 0;
    for name in tensors.names() {
        let Some(case) = name.strip_suffix(".input") else { continue };
        let fit = match case {
            _ if case.starts_with("pad_") => Fit::Pad,
            _ if case.starts_with("crop_") => Fit::Crop,
            _ => continue,
        };
        let (input, expected) = (picture(&tensors, name), picture(&tensors, &format!("{case}.output")));
        // With an edge as it is, nothing is resized, and what comes out is the pad or the crop alone.
        let shortest_edge = if fit == Fit::Pad { input.width().max(input.height()) } else { input.width().min(input.height()) };
        let side = expected.width();
        let config = Preprocess { shortest_edge, std: [1.0; 3], rescale_factor: 1.0, ..Preprocess::clip(side, fit) };
        let got = preprocess(&[input], &config).unwrap();
        for (i, &level) in expected.pixels().iter().enumerate() {
            let (pixel, c) = (i / 3, i % 3);
            let got = got.as_slice::<f32>()[c * side * side + pixel];
            assert_eq!(got, f32::from(level) - config.mean[c], "{case}: pixel {pixel}, channel {c}");
        }
        n_cases += 1;
    }
    assert!(n_cases >= 10, "only {n_cases} fixtures");
}

#[test]
fn a_crop_larger_than_the_picture_is_black_around_it() {
    let config = Preprocess { crop_size: 5, mean: [0.0; 3], std: [1.0; 3], rescale_factor: 1.0, ..Preprocess::clip(2, Fit::Crop) };
    let got = preprocess(&[RgbImage::filled(2, 2, [200, 100, 50]).unwrap()], &config).unwrap();
    let row = |on: f32| [0.0, 0.0, on, on, 0.0];
    let plane = |on: f32| [row(0.0), row(0.0), row(on), row(on), row(0.0)].concat(); // the odd pixel goes to the left and the top
    assert_eq!(got.as_slice::<f32>(), [plane(200.0), plane(100.0), plane(50.0)].concat());
}

/// A picture of 1 x 16384 would be 336 x 5.5 million after resizing; only the crop is computed.
#[test]
fn extreme_proportions_cost_no_memory() {
    for (width, height) in [(1, 16_384), (16_384, 1)] {
        let image = RgbImage::filled(width, height, [10, 20, 30]).unwrap();
        for fit in [Fit::Crop, Fit::Pad] {
            let out = preprocess(std::slice::from_ref(&image), &Preprocess::clip(14, fit)).unwrap();
            assert_eq!(out.shape(), [1, 3, 14, 14]);
            assert!(out.as_slice::<f32>().iter().all(|x| x.is_finite()));
        }
    }
}

#[test]
fn constants_that_give_no_picture_are_refused() {
    let clip = Preprocess::clip(28, Fit::Crop);
    for config in [
        Preprocess { shortest_edge: 0, ..clip.clone() },
        Preprocess { crop_size: 0, ..clip.clone() },
        Preprocess { crop_size: 1 << 40, ..clip.clone() },
        Preprocess { std: [0.0, 1.0, 1.0], ..clip.clone() },
        Preprocess { mean: [f32::NAN, 0.0, 0.0], ..clip },
    ] {
        refusal(preprocess(&[patterned(3, 3)], &config));
    }
}

// --- sources --------------------------------------------------------------------------------------------------------------------

#[test]
fn sources_are_told_apart() {
    let parse = |text: &str| ImageSource::parse(text);
    assert_eq!(parse("-").unwrap(), ImageSource::Stdin);
    assert_eq!(parse("a/b.png").unwrap(), ImageSource::File("a/b.png".into()));
    assert_eq!(parse("C:\\b.png").unwrap(), ImageSource::File("C:\\b.png".into()));
    assert_eq!(parse("HTTPS://x/y").unwrap(), ImageSource::Url("HTTPS://x/y".into()));
    for text in ["", "ftp://x/y.png", "file:///etc/passwd", "gopher://x"] {
        assert!(matches!(parse(text), Err(llava_engine::error::Error::Usage(_))), "{text}");
    }
    let secret = parse("https://user:password@host/cat.png?token=secret#x").unwrap();
    assert_eq!(secret.name(), "https://host/cat.png");
}

#[test]
fn a_file_is_read_up_to_the_limit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.png");
    std::fs::write(&path, [7; 100]).unwrap();
    let source = ImageSource::File(path);
    let limits = |max_bytes| Limits { max_bytes, ..Limits::default() };
    assert_eq!(source.read(&limits(100)).unwrap().0, [7; 100]);
    assert!(refusal(source.read(&limits(99))).contains("allowed"));
    refusal(ImageSource::File(folder.path().join("missing")).read(&limits(99)));
    assert!(refusal(ImageSource::File(folder.path().to_owned()).read(&limits(99))).contains("is a folder"));
    #[cfg(unix)]
    assert!(refusal(ImageSource::File("/dev/zero".into()).read(&limits(99))).contains("allowed"));
}

#[cfg(feature = "hub")]
mod url {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;

    /// A server that gives each connection the next of `answers`; returns its address.
    fn serve(answers: Vec<Vec<u8>>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for answer in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 4096];
                let _ = stream.read(&mut request);
                // The client hangs up as soon as it has seen enough.
                let _ = stream.write_all(&answer);
            }
        });
        format!("http://{address}/cat.png?secret")
    }

    fn answer(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
        [format!("HTTP/1.1 {status}\r\nConnection: close\r\n{headers}\r\n").as_bytes(), body].concat()
    }

    #[test]
    fn a_url_is_fetched() {
        let png = encode(&patterned(6, 5), image::ImageFormat::Png);
        let redirect = answer("302 Found", "Location: /other\r\n", b"");
        let url = serve(vec![redirect, answer("200 OK", &format!("Content-Length: {}\r\n", png.len()), &png)]);
        let source = ImageSource::parse(&url).unwrap();
        assert_eq!(source.load(&Limits::default()).unwrap(), patterned(6, 5));
        assert!(!source.name().contains("secret"));
    }

    #[test]
    fn a_url_that_goes_wrong_is_refused() {
        let fetch = |answers: Vec<Vec<u8>>, max_bytes| {
            refusal(ImageSource::parse(&serve(answers)).unwrap().read(&Limits { max_bytes, ..Limits::default() }))
        };
        let redirect = answer("302 Found", "Location: /again\r\n", b"");
        assert!(fetch(vec![redirect; 5], 1000).contains("more than 3 redirects"));
        assert!(fetch(vec![answer("404 Not Found", "Content-Length: 0\r\n", b"")], 1000).contains("status 404"));
        // Too large by its own word, and too large without one.
        assert!(fetch(vec![answer("200 OK", "Content-Length: 99999999\r\n", &[0; 10])], 1000).contains("allowed"));
        assert!(fetch(vec![answer("200 OK", "", &[0; 50_000])], 1000).contains("allowed"));
        // Ends before its announced length.
        assert!(fetch(vec![answer("200 OK", "Content-Length: 500\r\n", &[0; 10])], 1000).contains("cannot be read"));
        assert!(fetch(vec![answer("302 Found", "Location: file:///etc/passwd\r\n", b"")], 1000).contains("cannot be fetched"));
    }
}

// --- anything at all ------------------------------------------------------------------------------------------------------------

/// Small, so that a header that promises much is refused soon.
fn small_limits() -> Limits {
    Limits { max_side: 512, max_pixels: 1 << 16, ..Limits::default() }
}

/// The start of a file of each format, for bytes that get past the first check.
fn magic() -> impl Strategy<Value = &'static [u8]> {
    prop::sample::select(vec![
        &b""[..],
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"\xff\xd8\xff",
        b"GIF89a",
        b"BM",
        b"RIFF\x40\0\0\0WEBPVP8 ",
    ])
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(magic in magic(), rest in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = decode(&[magic, &rest].concat(), "fuzz", &small_limits());
    }

    #[test]
    fn damaged_files_never_panic(
        file in prop::sample::select(vec![
            "odd.png", "palette.png", "photo_420.jpg", "photo_progressive.jpg", "single.gif", "plain.bmp", "lossless.webp",
        ]),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        keep in any::<prop::sample::Index>(),
        cut in any::<bool>(),
    ) {
        let mut bytes = read(&format!("images/{file}"));
        for (at, value) in damage {
            *at.get_mut(&mut bytes[..]) = value;
        }
        if cut {
            bytes.truncate(keep.index(bytes.len()));
        }
        if let Ok(image) = decode(&bytes, file, &small_limits()) {
            prop_assert_eq!(image.pixels().len(), image.width() * image.height() * 3);
        }
    }

    #[test]
    fn any_size_becomes_any_size(
        (width, height) in (1usize..=64, 1usize..=64),
        (to_width, to_height) in (1usize..=64, 1usize..=64),
        (shortest_edge, crop_size) in (1usize..=64, 1usize..=64),
    ) {
        let image = patterned(width, height);
        let resized = resize_bicubic(&image, to_width, to_height).unwrap();
        prop_assert_eq!((resized.width(), resized.height()), (to_width, to_height));
        for fit in [Fit::Crop, Fit::Pad] {
            let config = Preprocess { shortest_edge, ..Preprocess::clip(crop_size, fit) };
            let out = preprocess(&[image.clone(), image.clone()], &config).unwrap();
            prop_assert_eq!(out.shape(), [2, 3, crop_size, crop_size]);
            prop_assert!(out.as_slice::<f32>().iter().all(|x| x.is_finite()));
        }
    }
}
