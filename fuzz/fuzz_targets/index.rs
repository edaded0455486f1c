//! Index of a sharded checkpoint: no name that it gives can lead out of the folder. Names of tensors are read along with it.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use llava_engine::weights::{files::shard_names, hub::Id, names};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(serde_json::Value::Object(index)) = serde_json::from_slice(bytes) {
        for name in shard_names(&index).unwrap_or_default() {
            assert_eq!(Path::new("folder").join(&name).parent(), Some(Path::new("folder")));
            assert!(name != ".." && name != ".");
        }
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        if let Some(canonical) = names::canonical(text) {
            assert!(canonical == "image_newline" || names::spellings(&canonical).iter().any(|spelling| spelling == text));
        }
        assert!(Id::parse(text).is_none_or(|_| !text.contains("..")));
    }
});
