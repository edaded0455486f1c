//! Header of a GGUF file, and the tokenizer in it: whatever it says, each tensor that is found lies inside the file.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use llava_engine::text::Tokenizer;
use llava_engine::weights::gguf::Header;

fuzz_target!(|bytes: &[u8]| {
    let Ok(header) = Header::parse(bytes) else { return };
    for tensor in &header.tensors {
        let n = tensor.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).expect("the reader checks the product");
        let n_bytes = tensor.dtype.bytes(n).expect("the reader checks this one too");
        assert!(tensor.offset + n_bytes <= bytes.len());
    }
    if let Ok(tokenizer) = Tokenizer::from_gguf(Path::new("fuzz"), &header.metadata) {
        let _ = tokenizer.decode(&[0, 1, 2]);
    }
});
