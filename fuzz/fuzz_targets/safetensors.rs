//! Header of a safetensors file: whatever it says, each tensor that is found lies inside the file.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use llava_engine::weights::safetensors::header;

fuzz_target!(|bytes: &[u8]| {
    for (_, offset, shape, dtype) in header(Path::new("fuzz"), bytes).unwrap_or_default() {
        let n = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).expect("the reader checks the product");
        assert!(offset + dtype.bytes(n).expect("the reader checks this one too") <= bytes.len());
    }
});
