//! Bytes to pixels: whatever the file says, decoding ends with a picture within the limits or with an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use llava_engine::image::{Fit, Limits, Preprocess, decode, preprocess};

fuzz_target!(|bytes: &[u8]| {
    let limits = Limits { max_side: 1024, max_pixels: 1 << 18, ..Limits::default() };
    let Ok(image) = decode(bytes, "fuzz", &limits) else { return };
    assert!(image.width() <= limits.max_side && image.width() * image.height() <= limits.max_pixels);
    for fit in [Fit::Crop, Fit::Pad] {
        let pixels = preprocess(std::slice::from_ref(&image), &Preprocess::clip(28, fit)).expect("any picture can be preprocessed");
        assert!(pixels.as_slice::<f32>().iter().all(|x| x.is_finite()));
    }
});
