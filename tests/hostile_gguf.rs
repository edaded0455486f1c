//! GGUF files that lie. Each must give one typed error of one line, and never a panic, a hang or an allocation of what it claims.

mod support;

use std::fs;
use std::path::Path;

use llava_engine::error::Error;
use llava_engine::model::checkpoint::{Beside, Checkpoint};
use llava_engine::model::config::RopeScaling;
use llava_engine::text::Tokenizer;
use llava_engine::weights::gguf::{Gguf, Header};
use llava_engine::weights::names::Part;
use llava_engine::weights::{Source, Store};
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use support::fixture;

const U32: u32 = 4;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

fn string(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

fn key(name: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&string(name)[..], &kind.to_le_bytes(), value].concat()
}

fn array(kind: u32, n: u64, elements: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &n.to_le_bytes(), elements].concat()
}

fn tensor(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let dims = [&(dims.len() as u32).to_le_bytes()[..], &dims.iter().flat_map(|d| d.to_le_bytes()).collect::<Vec<_>>()].concat();
    [&string(name)[..], &dims, &kind.to_le_bytes(), &offset.to_le_bytes()].concat()
}

fn header(version: u32, n_tensors: u64, n_keys: u64, rest: &[Vec<u8>]) -> Vec<u8> {
    [b"GGUF", &version.to_le_bytes()[..], &n_tensors.to_le_bytes(), &n_keys.to_le_bytes(), &rest.concat()].concat()
}

/// A file of these keys and tensors, with `n_data` bytes of data.
fn file(keys: &[Vec<u8>], tensors: &[Vec<u8>], n_data: usize) -> Vec<u8> {
    let mut bytes = header(3, tensors.len() as u64, keys.len() as u64, &[keys, tensors].concat());
    bytes.resize(bytes.len().next_multiple_of(32) + n_data, 1);
    bytes
}

fn refused(what: &str, bytes: &[u8], why: &str) {
    let problem = Header::parse(bytes).map(|h| format!("{h:?}")).expect_err(what);
    assert!(problem.contains(why) && !problem.contains('\n'), "{what}: {problem}");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f.gguf");
    fs::write(&path, bytes).unwrap();
    let error = Gguf::open(&path).err().expect(what);
    assert!(matches!(error, Error::File { .. }) && error.to_string().contains("f.gguf"), "{what}: {error:?}");
}

#[test]
fn headers_that_lie_are_refused() {
    let good = file(&[key("a", U32, &7u32.to_le_bytes())], &[tensor("t", &[32, 2], 2, 0), tensor("u", &[4], 0, 64)], 96);
    let parsed = Header::parse(&good).unwrap();
    assert_eq!((parsed.metadata["a"].as_u64(), &parsed.tensors[0].shape[..], parsed.tensors.len()), (Some(7), &[2, 32][..], 2));
    let f32s = |dims: &[u64], offset| file(&[], &[tensor("t", dims, 0, offset)], 64);
    let huge = u64::MAX.to_le_bytes();
    let nested = (0..50).fold(array(U32, 0, &[]), |inner, _| array(ARRAY, 1, &inner));
    for (what, bytes, why) in [
        ("no magic", b"GGML\x03\0\0\0".to_vec(), "not a GGUF file"),
        ("version 1", header(1, 0, 0, &[]), "version 1"),
        ("version 4", header(4, 0, 0, &[]), "version 4"),
        ("version 0", header(0, 0, 0, &[]), "version 0"),
        ("big-endian", header(3u32.swap_bytes(), 0, 0, &[]), "big-endian"),
        ("2^64 keys", header(3, 0, u64::MAX, &[]), "ends inside its header"),
        ("2^64 tensors", header(3, u64::MAX, 0, &[]), "ends inside its header"),
        ("a key of 2^64 bytes", header(3, 0, 1, &[huge.to_vec()]), "ends inside its header"),
        ("a key of 2^63 bytes", header(3, 0, 1, &[(1u64 << 63).to_le_bytes().to_vec()]), "ends inside its header"),
        ("an empty key", file(&[key("", U32, &[0; 4])], &[], 0), "without a name"),
        ("a long key", file(&[key(&"k".repeat(5000), U32, &[0; 4])], &[], 0), "a name of 5000 bytes"),
        ("a key that is no text", header(3, 0, 1, &[[&2u64.to_le_bytes()[..], &[0xff, 0xfe]].concat()]), "not UTF-8"),
        ("a key twice", file(&[key("a", U32, &[0; 4]), key("a", U32, &[0; 4])], &[], 0), "the key `a` twice"),
        ("an unknown type", file(&[key("a", 13, &[0; 8])], &[], 0), "`a`: is of the type 13"),
        ("a truth value of 2", file(&[key("a", 7, &[2])], &[], 0), "2 is no truth value"),
        ("a string of 2^64 bytes", file(&[key("a", STRING, &huge)], &[], 0), "ends inside its header"),
        ("an array of 2^64", file(&[key("a", ARRAY, &array(U32, u64::MAX, &[]))], &[], 0), "elements, more than the file"),
        ("an array of 2^40", file(&[key("a", ARRAY, &array(U32, 1 << 40, &[]))], &[], 0), "elements, more than the file"),
        ("an array past the end", file(&[key("a", ARRAY, &array(U32, 9, &[0; 4]))], &[], 0), "ends inside its header"),
        ("arrays in arrays", file(&[key("a", ARRAY, &nested)], &[], 0), "arrays in arrays"),
        ("an alignment of 0", file(&[key("general.alignment", U32, &[0; 4])], &[], 0), "general.alignment"),
        ("an alignment of 24", file(&[key("general.alignment", U32, &24u32.to_le_bytes())], &[], 0), "general.alignment"),
        ("an alignment of 2^31", file(&[key("general.alignment", U32, &(1u32 << 31).to_le_bytes())], &[], 0), "general.alignment"),
        ("an alignment of text", file(&[key("general.alignment", STRING, &string("32"))], &[], 0), "general.alignment"),
        ("5 dimensions", f32s(&[1; 5], 0), "5 dimensions"),
        ("2^32 dimensions", header(3, 1, 0, &[string("t"), vec![0xff; 4]]), "4294967295 dimensions"),
        ("dimensions that overflow", f32s(&[1 << 32, 1 << 32], 0), "not inside the file"),
        ("bytes that overflow", f32s(&[1 << 62], 0), "not inside the file"),
        ("too large", f32s(&[17], 0), "not inside the file"),
        ("past the end", f32s(&[16], 32), "not inside the file"),
        ("an offset of 2^64", f32s(&[1], u64::MAX - 31), "not inside the file"),
        ("misaligned", f32s(&[1], 4), "misaligned"),
        ("an unknown ggml type", file(&[], &[tensor("t", &[32], 99, 0)], 64), "the ggml type 99"),
        ("half a block", file(&[], &[tensor("t", &[16], 2, 0)], 64), "no whole blocks of Q4_0"),
        ("a scalar in blocks", file(&[], &[tensor("t", &[], 2, 0)], 64), "no whole blocks"),
        ("rows that are half blocks", file(&[], &[tensor("t", &[16, 2], 8, 0)], 64), "no whole blocks of Q8_0"),
        ("blocks past the end", file(&[], &[tensor("t", &[256, 1], 12, 0)], 143), "not inside the file"),
        ("a tensor twice", file(&[], &[tensor("t", &[1], 0, 0), tensor("t", &[1], 0, 32)], 64), "the tensor `t` twice"),
        ("a tensor without a name", file(&[], &[tensor("", &[1], 0, 0)], 64), "without a name"),
    ] {
        refused(what, &bytes, why);
    }
    // Many arrays, each small enough, are one large one.
    let many: Vec<_> = (0..9).map(|i| key(&i.to_string(), ARRAY, &array(0, 1 << 19, &vec![0; 1 << 19]))).collect();
    refused("5 M elements", &file(&many, &[], 0), "elements, more than the file or this program");
    Header::parse(&file(&many[..8], &[], 0)).unwrap();
}

#[test]
fn a_truncated_file_is_refused_wherever_it_ends() {
    let good = file(
        &[key("a", STRING, &string("b")), key("c", ARRAY, &array(STRING, 2, &[string("d"), string("e")].concat()))],
        &[tensor("t", &[32, 2], 8, 0)],
        68,
    );
    Header::parse(&good).unwrap();
    for end in 0..good.len() {
        assert!(Header::parse(&good[..end]).is_err(), "cut at {end} of {}", good.len());
    }
    let real = fs::read(fixture("gguf/mha_q/model.gguf")).unwrap();
    for end in (0..real.len()).step_by(61) {
        assert!(Header::parse(&real[..end]).is_err(), "cut at {end} of {}", real.len());
    }
}

/// Types that are known by size only, integers where weights belong, and scales that are no numbers.
#[test]
fn tensors_say_what_is_wrong_with_them_when_they_are_asked_for() {
    let name = "blk.0.attn_v.weight";
    let store = |bytes: &[u8]| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f.gguf");
        fs::write(&path, bytes).unwrap();
        let mut store = Store::new(&path);
        store.add_gguf(&path, &Gguf::open(&path).unwrap(), &[Part::Llama], Some(8)).unwrap();
        store
    };
    let (module, weight) = ("llama.layers.0.self_attn.v_proj", "llama.layers.0.self_attn.v_proj.weight");
    let q3 = store(&file(&[], &[tensor(name, &[256, 2], 11, 0)], 220));
    for error in [q3.packed(module, 2, 256).unwrap_err(), q3.tensor(weight, &[2, 256]).unwrap_err()] {
        assert!(error.to_string().contains(name) && error.to_string().contains("is stored as Q3_K"), "{error}");
    }
    let i8s = store(&file(&[], &[tensor(name, &[32, 2], 24, 0)], 64));
    assert!(i8s.packed(module, 2, 32).unwrap().is_none());
    assert!(i8s.tensor(weight, &[2, 32]).unwrap_err().to_string().contains("is stored as i8"));
    // All bits set: an f16 that is NaN.
    for (number, k, n_bytes) in
        [(2, 32, 18), (3, 32, 20), (6, 32, 22), (7, 32, 24), (8, 32, 34), (12, 256, 144), (13, 256, 176), (14, 256, 210)]
    {
        let mut bytes = file(&[], &[tensor(name, &[k, 1], number, 0)], n_bytes);
        let n = bytes.len();
        bytes[n - n_bytes..].fill(0xff);
        let nan = store(&bytes);
        for error in [nan.packed(module, 1, k as usize).unwrap_err(), nan.tensor(weight, &[1, k as usize]).unwrap_err()] {
            assert!(error.to_string().contains("row 0 has") && error.to_string().contains(name), "{number}: {error}");
        }
    }
    // Queries whose rows are no whole heads.
    let q = store(&file(&[], &[tensor("blk.0.attn_q.weight", &[32, 12], 2, 0)], 12 * 18));
    assert!(q.packed("llama.layers.0.self_attn.q_proj", 12, 32).unwrap_err().to_string().contains("heads of 8"));
}

/// A file with its header's keys changed, its tensors as they were.
fn edited(path: &Path, to: &Path, edit: impl Fn(&mut Map<String, Value>)) {
    let bytes = fs::read(path).unwrap();
    let mut header = Header::parse(&bytes).unwrap();
    edit(&mut header.metadata);
    let value = |v: &Value| -> (u32, Vec<u8>) {
        let number =
            |v: &Value| v.as_u64().map(|n| (10, n.to_le_bytes().to_vec())).or(v.as_i64().map(|n| (11, n.to_le_bytes().to_vec())));
        let scalar = |v: &Value| match v {
            Value::String(s) => (STRING, string(s)),
            Value::Bool(b) => (7, vec![u8::from(*b)]),
            v => number(v).unwrap_or_else(|| (12, v.as_f64().unwrap().to_le_bytes().to_vec())),
        };
        match v {
            Value::Array(list) => {
                let kind = list.first().map_or(U32, |v| scalar(v).0);
                let elements: Vec<u8> = list.iter().flat_map(|v| scalar(v).1).collect();
                (ARRAY, array(kind, list.len() as u64, &elements))
            }
            v => scalar(v),
        }
    };
    let keys: Vec<_> = header
        .metadata
        .iter()
        .map(|(k, v)| {
            let (kind, bytes) = value(v);
            key(k, kind, &bytes)
        })
        .collect();
    let data = header.tensors.iter().map(|t| t.offset).min().unwrap();
    let tensors: Vec<_> = header
        .tensors
        .iter()
        .map(|t| {
            let dims: Vec<u64> = t.shape.iter().rev().map(|d| *d as u64).collect();
            let number = match t.dtype.to_string().as_str() {
                "f32" => 0,
                "f16" => 1,
                "bf16" => 30,
                "Q4_0" => 2,
                "Q8_0" => 8,
                other => panic!("{other}"),
            };
            tensor(&t.name, &dims, number, (t.offset - data) as u64)
        })
        .collect();
    let mut out = file(&keys, &tensors, 0);
    out.extend(&bytes[data..]);
    fs::write(to, out).unwrap();
}

#[test]
fn metadata_that_is_wrong_or_unsupported_is_refused_by_key() {
    let text: &[(&str, Option<Value>)] = &[
        ("general.architecture", Some(json!("qwen2"))),
        ("general.architecture", None),
        ("split.count", Some(json!(3))),
        ("llama.embedding_length", None),
        ("llama.embedding_length", Some(json!(0))),
        ("llama.embedding_length", Some(json!(u64::MAX))),
        ("llama.block_count", Some(json!(1_000_000))),
        ("llama.attention.head_count", Some(json!(5))),
        ("llama.attention.head_count", Some(json!([4, 4]))),
        ("llama.attention.head_count_kv", Some(json!(3))),
        ("llama.attention.layer_norm_rms_epsilon", Some(json!(-1.5))),
        ("llama.context_length", None),
        ("llama.rope.dimension_count", Some(json!(4))),
        ("llama.rope.scaling.type", Some(json!("yarn"))),
        ("llama.rope.scaling.factor", Some(json!("2"))),
        ("llama.expert_count", Some(json!(8))),
        ("llama.vocab_size", Some(json!(0))),
        ("tokenizer.ggml.eos_token_id", Some(json!(-1))),
    ];
    let tower: &[(&str, Option<Value>)] = &[
        ("general.architecture", Some(json!("llama"))),
        ("clip.projector_type", Some(json!("ldp"))),
        ("clip.has_llava_projector", Some(json!(false))),
        ("clip.use_silu", Some(json!(true))),
        ("clip.vision.patch_size", Some(json!(13))),
        ("clip.vision.block_count", None),
        ("clip.vision.attention.head_count", Some(json!(5))),
        ("clip.vision.image_std", Some(json!([1.5, 0.0, 1.5]))),
        ("clip.vision.image_mean", Some(json!([1.5]))),
        ("clip.vision.feature_layer", Some(json!([1, 2]))),
        ("clip.vision.feature_layer", Some(json!([9]))),
        ("clip.vision.mm_patch_merge_type", Some(json!("spatial_unpad"))),
        ("clip.vision.image_grid_pinpoints", Some(json!([336, 672]))),
        ("clip.vision.image_aspect_ratio", Some(json!("anyres"))),
    ];
    for (file, edits) in [("model.gguf", text), ("mmproj.gguf", tower)] {
        for (key, value) in edits {
            let dir = tempfile::tempdir().unwrap();
            for name in ["model.gguf", "mmproj.gguf"] {
                let changed = |keys: &mut Map<String, Value>| match value {
                    _ if name != file => {}
                    Some(value) => {
                        keys.insert((*key).to_owned(), value.clone());
                        if *key == "llama.rope.scaling.factor" {
                            keys.insert("llama.rope.scaling.type".to_owned(), json!("linear"));
                        }
                    }
                    None => _ = keys.remove(*key),
                };
                edited(&fixture("gguf/mha_q").join(name), &dir.path().join(name), changed);
            }
            let (model, mmproj) = (dir.path().join("model.gguf"), dir.path().join("mmproj.gguf"));
            let beside = Beside { model_base: None, mmproj: Some(&mmproj) };
            let error = Checkpoint::open(&model, beside).map(|c| c.layout.to_string()).unwrap_err();
            assert!(matches!(error, Error::File { .. } | Error::Unsupported(_)), "{key}: {error:?}");
            let error = error.to_string();
            let key = if *key == "split.count" { "one of several parts" } else { key };
            assert!(error.contains(key) && error.contains(file) && !error.contains('\n'), "{key} = {value:?}: {error}");
        }
    }
}

#[test]
fn rotary_scaling_is_read_from_either_key() {
    let dir = tempfile::tempdir().unwrap();
    let (model, tower) = (dir.path().join("model.gguf"), fixture("gguf/mha_q/mmproj.gguf"));
    let scaling = |model: &Path| {
        let beside = Beside { model_base: None, mmproj: Some(&tower) };
        Checkpoint::open(model, beside).map(|c| c.config.text.rope_scaling)
    };
    let with = |keys: &[(&str, Value)]| {
        edited(&fixture("gguf/mha_q/model.gguf"), &model, |metadata| {
            metadata.extend(keys.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        });
        scaling(&model)
    };
    let linear = [("llama.rope.scaling.type", json!("linear")), ("llama.rope.scaling.factor", json!(2.5))];
    assert_eq!(with(&linear).unwrap(), RopeScaling::Linear { factor: 2.5 });
    assert_eq!(with(&[("llama.rope.scale_linear", json!(1.5))]).unwrap(), RopeScaling::Linear { factor: 1.5 });
    assert_eq!(with(&[("llama.rope.scaling.type", json!("none"))]).unwrap(), RopeScaling::None);
    edited(&fixture("gguf/gqa_bf16/model.gguf"), &model, |_| {});
    assert_eq!(scaling(&model).unwrap(), RopeScaling::Divisors(vec![2.0; 4]));
    edited(&fixture("gguf/gqa_bf16/model.gguf"), &model, |metadata| {
        metadata.extend(linear.clone().map(|(k, v)| (k.to_owned(), v)))
    });
    assert!(scaling(&model).unwrap_err().to_string().contains("rope_freqs.weight"));
    let mut bytes = fs::read(fixture("gguf/gqa_bf16/model.gguf")).unwrap();
    let at = Header::parse(&bytes).unwrap().tensors.into_iter().find(|t| t.name == "rope_freqs.weight").unwrap().offset;
    bytes[at..at + 4].copy_from_slice(&(-2.0f32).to_le_bytes());
    fs::write(&model, bytes).unwrap();
    assert!(scaling(&model).unwrap_err().to_string().contains("other numbers than positive ones"));
}

#[test]
fn tokenizers_that_are_wrong_or_unsupported_are_refused() {
    let path = fixture("gguf/mha_q/model.gguf");
    let metadata = Gguf::open(&path).unwrap().header.metadata;
    let good = Tokenizer::from_gguf(&path, &metadata).unwrap();
    let folder = Tokenizer::open(fixture("checkpoints/orig_gqa_bf16")).unwrap();
    for text in ["What is this?", " two  spaces", "naïve привет 世界 🦙", "</s>a<s> b"] {
        for reading in [llava_engine::text::Reading::Plain, llava_engine::text::Reading::Special] {
            assert_eq!(good.encode(text, reading).unwrap(), folder.encode(text, reading).unwrap(), "{text}");
        }
    }
    let n = metadata["tokenizer.ggml.tokens"].as_array().unwrap().len();
    for (name, value, why) in [
        ("model", json!("gpt2"), "`tokenizer.ggml.model` is \"gpt2\""),
        ("model", Value::Null, "tokenizer.ggml.model"),
        ("add_eos_token", json!(true), "add_eos_token"),
        ("remove_extra_whitespaces", json!(true), "normalises"),
        ("precompiled_charsmap", json!([1, 2]), "normalises"),
        ("tokens", json!("a"), "tokenizer.ggml.tokens"),
        ("tokens", json!([]), "0 tokens"),
        ("tokens", json!(["a"]), "1 tokens, 320 scores"),
        ("tokens", json!(vec!["a"; n]), "are both `a`"),
        ("tokens", json!(vec![7; n]), "token 0 is no text"),
        ("tokens", json!(vec![""; n]), "token 0 is no text"),
        ("tokens", json!(vec!["x".repeat(300); n]), "token 0 is no text"),
        ("scores", json!(vec!["1"; n]), "the score of token 0"),
        ("scores", json!(vec![Value::Null; n]), "the score of token 0"),
        ("token_type", json!(vec![9; n]), "the type of token 0"),
        ("bos_token_id", json!(n), "bos_id 320 is outside"),
        ("eos_token_id", json!(-1), "tokenizer.ggml.eos_token_id"),
    ] {
        let mut metadata = metadata.clone();
        metadata.insert(format!("tokenizer.ggml.{name}"), value);
        let error = Tokenizer::from_gguf(&path, &metadata).err().unwrap_or_else(|| panic!("{name}: {why}")).to_string();
        assert!(error.contains(why) && error.contains("model.gguf") && !error.contains('\n'), "{name}: {error}");
    }
    // Without a space in front of a text, where the file says so.
    let mut without = metadata.clone();
    without.insert("tokenizer.ggml.add_space_prefix".to_owned(), json!(false));
    let without = Tokenizer::from_gguf(&path, &without).unwrap();
    let plain = llava_engine::text::Reading::Plain;
    assert_eq!(without.encode(" the", plain).unwrap(), good.encode("the", plain).unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// Bytes of a real file, some of them changed.
    #[test]
    fn changed_bytes_give_an_error_or_tensors_inside_the_file(changes in prop::collection::vec((0usize..4096, any::<u8>()), 1..6)) {
        let mut bytes = fs::read(fixture("gguf/blocks.gguf")).unwrap();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        if let Ok(header) = Header::parse(&bytes) {
            for tensor in header.tensors {
                let n = tensor.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).unwrap();
                prop_assert!(tensor.offset + tensor.dtype.bytes(n).unwrap() <= bytes.len());
            }
        }
    }
}
