//! Files of torch.save, as an archive and as the bare pickle in it: each tensor that is found lies inside its storage and the file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use llava_engine::weights::pickle::{PickledTensor, state_dict};
use llava_engine::weights::torch_zip::tensors;

/// Elements from the first to the last, both included.
fn extent(tensor: &PickledTensor) -> usize {
    match tensor.n_elements() {
        Some(0) => 0,
        _ => 1 + tensor.shape.iter().zip(&tensor.strides).map(|(n, stride)| (n - 1) * stride).sum::<usize>(),
    }
}

fuzz_target!(|bytes: &[u8]| {
    for (_, tensor) in state_dict(bytes).unwrap_or_default() {
        assert!(tensor.offset + extent(&tensor) <= tensor.storage_len);
    }
    for (_, offset, tensor) in tensors(bytes).unwrap_or_default() {
        assert!(offset + extent(&tensor) * tensor.dtype.size() <= bytes.len());
    }
});
