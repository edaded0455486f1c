//! Header of a safetensors file: whatever it says, each tensor that is found lies inside the file.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use llava_engine::weights::StoredDType;
use llava_engine::weights::safetensors::header;

fuzz_target!(|bytes: &[u8]| {
    for (_, offset, shape, dtype) in header(Path::new("fuzz"), bytes).unwrap_or_default() {
        let bits = match dtype {
            StoredDType::Known(dtype) => 8 * dtype.size(),
            StoredDType::Other { bits, .. } => bits,
        };
        let n_bits = shape.iter().try_fold(bits, |n, d| n.checked_mul(*d)).expect("the reader checks the product");
        assert!(offset + n_bits / 8 <= bytes.len());
    }
});
