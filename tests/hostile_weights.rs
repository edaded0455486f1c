//! Weight files that lie. Each must give one typed error of one line, and never a panic, a hang or an allocation of what it claims.

use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

use llava_engine::error::Error;
use llava_engine::weights::names::Part;
use llava_engine::weights::pickle::{PickleError, state_dict};
use llava_engine::weights::{Source, Store, files, safetensors, torch_zip};
use proptest::prelude::*;
use zip::write::SimpleFileOptions;

const Q_PROJ: &str = "model.layers.0.self_attn.q_proj.weight";
const CANONICAL: &str = "llama.layers.0.self_attn.q_proj.weight";

/// Opens `bytes` as a weight file; the error, if there is one, is checked to be typed and of one line.
fn open(name: &str, bytes: &[u8]) -> Result<Store, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    let mut store = Store::new(dir.path());
    match store.add(&path, &[Part::Llama]) {
        Ok(()) => Ok(store),
        Err(e) => {
            assert!(matches!(e, Error::File { .. } | Error::Tensor { .. }), "{e:?}");
            let text = e.to_string();
            assert!(!text.contains('\n') && text.contains(name), "{text}");
            Err(text)
        }
    }
}

fn refused(name: &str, bytes: &[u8]) -> String {
    open(name, bytes).err().unwrap_or_else(|| panic!("{name} was accepted"))
}

// ---------------------------------------------------------------- safetensors

fn safetensors_file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn one_tensor(dtype: &str, shape: &str, offsets: &str, data: &[u8]) -> Vec<u8> {
    safetensors_file(&format!(r#"{{"{Q_PROJ}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#), data)
}

#[test]
fn a_safetensors_header_that_lies_is_refused() {
    let good = one_tensor("F32", "[2]", "[0,8]", &[0; 8]);
    open("good.safetensors", &good).unwrap();
    let with_length = |n: u64| [&n.to_le_bytes(), &good[8..]].concat();
    let two = |a: &str, b: &str, data: &[u8]| {
        let tensor = |name: &str, offsets: &str| format!(r#""{name}":{{"dtype":"F32","shape":[2],"data_offsets":{offsets}}}"#);
        safetensors_file(&format!("{{{},{}}}", tensor("a", a), tensor("b", b)), data)
    };
    let bad: [(&str, Vec<u8>); 24] = [
        ("length 2^64", with_length(u64::MAX)),
        ("length 2^63", with_length(1 << 63)),
        ("length over the cap", with_length(100_000_001)),
        ("length past the end", with_length(good.len() as u64)),
        ("length too short", with_length(10)),
        ("length zero", with_length(0)),
        ("offsets past the end", one_tensor("F32", "[4]", "[0,16]", &[0; 8])),
        ("offsets at 2^64", one_tensor("F32", "[2]", "[18446744073709551608,18446744073709551615]", &[0; 8])),
        ("offsets reversed", one_tensor("F32", "[2]", "[8,0]", &[0; 8])),
        ("negative offset", one_tensor("F32", "[2]", "[-8,0]", &[0; 8])),
        ("offsets not from zero", one_tensor("F32", "[2]", "[4,12]", &[0; 12])),
        ("shape larger than data", one_tensor("F32", "[3]", "[0,8]", &[0; 8])),
        ("dtype larger than data", one_tensor("F64", "[2]", "[0,8]", &[0; 8])),
        ("unknown dtype", one_tensor("F33", "[2]", "[0,8]", &[0; 8])),
        ("shape that overflows", one_tensor("F32", "[4294967296,4294967296,4294967296]", "[0,8]", &[0; 8])),
        ("negative shape", one_tensor("F32", "[-2]", "[0,8]", &[0; 8])),
        ("trailing data", one_tensor("F32", "[2]", "[0,8]", &[0; 9])),
        ("overlap", two("[0,8]", "[4,12]", &[0; 12])),
        ("same place", two("[0,8]", "[0,8]", &[0; 8])),
        ("hole", two("[0,8]", "[12,20]", &[0; 20])),
        ("no object", safetensors_file("[]", &[])),
        ("no JSON", safetensors_file("{", &[])),
        ("no text", [&4u64.to_le_bytes()[..], &[0xff; 4]].concat()),
        ("deep JSON", safetensors_file(&"[".repeat(100_000), &[])),
    ];
    for (name, bytes) in bad {
        assert!(refused(name, &bytes).contains("not a valid safetensors file"), "{name}");
    }
}

#[test]
fn a_truncated_file_is_refused_wherever_it_ends() {
    for (name, good) in
        [("f.safetensors", one_tensor("F32", "[64]", "[0,256]", &[1; 256])), ("f.bin", archive(&good_pickle(), &[1; 256]))]
    {
        open(name, &good).unwrap();
        for end in 0..good.len() {
            refused(name, &good[..end]);
        }
    }
}

#[test]
fn misaligned_tensors_are_copied_and_others_are_not() {
    for pad in 0..4 {
        let header = format!(r#"{{"{Q_PROJ}":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}{}}}"#, " ".repeat(pad));
        let data: Vec<u8> = [1.5f32, -2.5].iter().flat_map(|x| x.to_le_bytes()).collect();
        let tensor = open("f.safetensors", &safetensors_file(&header, &data)).unwrap().tensor(CANONICAL, &[2]).unwrap();
        assert_eq!(tensor.as_slice::<f32>(), [1.5, -2.5]);
        assert_eq!(tensor.is_mapped(), (8 + header.len()).is_multiple_of(4), "{pad}");
    }
}

#[test]
fn a_tensor_says_what_is_wrong_with_it_when_it_is_asked_for() {
    let store = open("f.safetensors", &one_tensor("I64", "[2]", "[0,16]", &[0; 16])).unwrap();
    let error = store.tensor(CANONICAL, &[2]).unwrap_err().to_string();
    assert!(error.contains("is stored as i64: weights are f32, f16 or bf16"), "{error}");
    let error = store.tensor(CANONICAL, &[2, 3]).unwrap_err().to_string();
    assert!(error.contains("has shape [2], but the configuration says [2, 3]") && error.contains(Q_PROJ), "{error}");
    let error = store.tensor("llama.norm.weight", &[2]).unwrap_err().to_string();
    for part in [
        "`llama.norm.weight`: missing",
        "`language_model.model.norm.weight`",
        "`model.language_model.norm.weight`",
        "`model.norm.weight`",
    ] {
        assert!(error.contains(part), "{error}");
    }
    let i32s = open("f.safetensors", &one_tensor("I32", "[2]", "[0,8]", &[0; 8])).unwrap();
    assert!(i32s.tensor(CANONICAL, &[2]).is_err());
}

#[test]
fn one_tensor_in_two_places_is_refused() {
    let header = r#"{"lm_head.weight":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},
                     "language_model.lm_head.weight":{"dtype":"F16","shape":[1],"data_offsets":[2,4]}}"#;
    let error = refused("f.safetensors", &safetensors_file(header, &[0; 4]));
    assert!(error.contains("llama.lm_head.weight") && error.contains("remove one of them"), "{error}");
}

#[test]
fn files_that_are_something_else_are_named() {
    for (bytes, what) in [
        (&b"GGUF\x03\0\0\0"[..], "a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
        (b"", "the file is empty"),
        (b"\x80\x02}q\x00.", "a bare pickle"),
        (b"<html>404</html>", "not a valid safetensors file"),
    ] {
        let error = refused("pytorch_model.bin", bytes);
        assert!(error.contains(what), "{error}");
    }
}

// ---------------------------------------------------------------- pickles

/// `X`: a string.
fn text(s: &str) -> Vec<u8> {
    [b"X", &(s.len() as u32).to_le_bytes()[..], s.as_bytes()].concat()
}

/// `LONG1`: an integer of 64 bits.
fn int(n: i64) -> Vec<u8> {
    [&[0x8a, 8][..], &n.to_le_bytes()].concat()
}

fn tuple(items: &[Vec<u8>]) -> Vec<u8> {
    [b"(", &items.concat()[..], b"t"].concat()
}

fn ints(numbers: &[i64]) -> Vec<u8> {
    tuple(&numbers.iter().map(|n| int(*n)).collect::<Vec<_>>())
}

fn storage(len: i64) -> Vec<u8> {
    let class = b"ctorch\nFloatStorage\n".to_vec();
    [tuple(&[text("storage"), class, text("0"), text("cpu"), int(len)]), b"Q".to_vec()].concat()
}

/// A tensor over a storage of 64 floats.
fn tensor(offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    let hooks = b"ccollections\nOrderedDict\n)R".to_vec();
    let arguments = tuple(&[storage(64), int(offset), ints(shape), ints(strides), b"\x89".to_vec(), hooks]);
    [b"ctorch._utils\n_rebuild_tensor_v2\n", &arguments[..], b"R"].concat()
}

fn dict_of(value: &[u8]) -> Vec<u8> {
    [b"\x80\x02}(", &text(Q_PROJ)[..], value, b"u."].concat()
}

fn good_pickle() -> Vec<u8> {
    dict_of(&tensor(0, &[8, 8], &[8, 1]))
}

#[test]
fn a_plain_state_dictionary_is_read() {
    let tensors = state_dict(&good_pickle()).unwrap();
    assert_eq!((tensors.len(), tensors[0].0.as_str(), tensors[0].1.shape.as_slice()), (1, Q_PROJ, &[8, 8][..]));
}

#[test]
fn nothing_outside_the_allowed_names_is_accepted() {
    for (module, name) in [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("__builtin__", "exec"),
        ("subprocess", "Popen"),
        ("torch", "load"),
        ("torch", "Storage"),
        ("torch.storage", "_load_from_bytes"),
        ("torch._utils", "_rebuild_tensor"),
        ("torch._utils", "_rebuild_wrapper_subclass"),
        ("torch.serialization", "load"),
        ("collections", "OrderedDict.fromkeys"),
        ("collections", "orderedDict"),
        ("Collections", "OrderedDict"),
        ("", ""),
        ("os\u{1b}[31m", "system"),
    ] {
        let by_line = dict_of(&[format!("c{module}\n{name}\n").as_bytes(), &tuple(&[text("id")]), b"R"].concat());
        let by_stack = dict_of(&[&text(module)[..], &text(name), b"\x93", &tuple(&[text("id")]), b"R"].concat());
        for pickle in [by_line, by_stack] {
            assert!(matches!(state_dict(&pickle), Err(PickleError::Global(_))), "{module}.{name}");
            let error = refused("pytorch_model.bin", &archive(&pickle, &[0; 256]));
            assert!(error.contains("nothing in it was run") && !error.contains('\u{1b}'), "{error}");
        }
    }
}

#[test]
fn calls_that_torch_does_not_write_are_refused() {
    let ordered = "ccollections\nOrderedDict\n";
    let rebuild = "ctorch._utils\n_rebuild_tensor_v2\n";
    for pickle in [
        dict_of(format!("{ordered})R)R)R").as_bytes()),
        dict_of(&[ordered.as_bytes(), &tuple(&[text("a")]), b"R"].concat()),
        dict_of(format!("{ordered}{ordered}R").as_bytes()),
        dict_of(format!("{rebuild})R").as_bytes()),
        dict_of(b"ctorch\nFloatStorage\n)R"),
        dict_of(b"N)R"),
        dict_of(b"]}b"),
        dict_of(&[b"N", &b"Q"[..]].concat()),
        dict_of(&[&tuple(&[text("module"), text("a")])[..], b"Q"].concat()),
        dict_of(&[&tuple(&[text("storage"), text("a"), text("0"), text("cpu"), int(1)])[..], b"Q"].concat()),
    ] {
        assert!(matches!(state_dict(&pickle), Err(PickleError::Malformed { .. })), "{pickle:?}");
    }
}

#[test]
fn instructions_outside_the_subset_are_refused() {
    for opcode in 0..=255u8 {
        // INST, OBJ, NEWOBJ, NEWOBJ_EX, EXT1..4, PERSID and the like never do more than be refused.
        let subset = b".0(1NGJKMXU)t]ae}suqrhjcQRb";
        let binary = [0x80, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x8c, 0x93, 0x94, 0x95];
        if !subset.contains(&opcode) && !binary.contains(&opcode) {
            let result = state_dict(&dict_of(&[opcode]));
            assert!(matches!(result, Err(PickleError::Opcode { opcode: o, .. }) if o == opcode), "{opcode:#x}: {result:?}");
        }
    }
}

#[test]
fn bombs_are_stopped() {
    let start = std::time::Instant::now();
    // Ten references to the level below, 60 levels: 10^60 elements if anything were copied.
    let mut billion_laughs = b"]q\x000".to_vec();
    for level in 1..60u8 {
        billion_laughs.extend(b"](");
        billion_laughs.extend([b'h', level - 1].repeat(10));
        billion_laughs.extend([b'e', b'q', level, b'0']);
    }
    billion_laughs.extend(b"h\x3b");
    assert_eq!(state_dict(&dict_of(&billion_laughs)), Ok(vec![]));
    let nested = |n: usize| [b"]".repeat(n), b"a".repeat(n - 1)].concat();
    assert_eq!(state_dict(&dict_of(&nested(60))), Ok(vec![]));
    let mut memo = Vec::new();
    for slot in 0..(1 << 20) + 1u32 {
        memo.extend([b"Nr", &slot.to_le_bytes()[..], b"0"].concat());
    }
    for (pickle, limit) in [
        (dict_of(&nested(100)), "64 levels"),
        (dict_of(&b"(".repeat(100)), "64 levels"),
        (dict_of(&[&b"N"[..], &b"\x85".repeat(100)].concat()), "64 levels"),
        (dict_of(&memo), "a million memo entries"),
        (dict_of(&b"N".repeat(10_000_001)), "10 million elements"),
        (vec![b'N'; (64 << 20) + 1], "64 MiB"),
    ] {
        let error = state_dict(&pickle).unwrap_err();
        assert!(matches!(error, PickleError::Limit(_)) && error.to_string().contains(limit), "{error}");
    }
    assert!(start.elapsed().as_secs() < 20);
}

#[test]
fn tensors_outside_their_storage_are_refused() {
    let max = i64::MAX;
    for (offset, shape, strides) in [
        (0, &[8, 9][..], &[8, 1][..]), // more elements than there are
        (1, &[8, 8], &[8, 1]),         // ends one past the end
        (64, &[1], &[1]),
        (65, &[0], &[1]),
        (-1, &[1], &[1]),
        (0, &[-1], &[1]),
        (0, &[2], &[-1]),
        (0, &[8, 8], &[9, 1]), // rows too far apart
        (0, &[2], &[64]),
        (0, &[8, 8, 8], &[0, 8, 1]), // expanded
        (0, &[max, max], &[0, 0]),
        (0, &[max], &[max]),
        (max, &[2], &[max]),
        (0, &[2, 2], &[max, max]),
        (0, &[8, 8], &[8]), // one stride missing
        (0, &[1; 9], &[1; 9]),
    ] {
        let result = state_dict(&dict_of(&tensor(offset, shape, strides)));
        assert!(matches!(result, Err(PickleError::Malformed { .. })), "{offset} {shape:?} {strides:?}: {result:?}");
    }
    for (offset, shape, strides) in
        [(0, &[8, 8][..], &[1, 8][..]), (63, &[1], &[1]), (64, &[0], &[1]), (0, &[], &[]), (0, &[1, 64], &[max, 1])]
    {
        state_dict(&dict_of(&tensor(offset, shape, strides))).unwrap_or_else(|e| panic!("{offset} {shape:?} {strides:?}: {e}"));
    }
}

// ---------------------------------------------------------------- archives

fn zip_of(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let stored = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in entries {
        zip.start_file(*name, stored).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn archive(pickle: &[u8], data: &[u8]) -> Vec<u8> {
    zip_of(&[("model/data.pkl", pickle), ("model/data/0", data)])
}

/// Overwrites the `field` bytes at `offset` of every header that starts with `signature`.
fn patched(zip: &[u8], signature: &[u8], offset: usize, field: &[u8]) -> Vec<u8> {
    let mut zip = zip.to_vec();
    for i in 0..zip.len().saturating_sub(46) {
        if zip[i..].starts_with(signature) {
            zip[i + offset..i + offset + field.len()].copy_from_slice(field);
        }
    }
    zip
}

const LOCAL: &[u8] = b"PK\x03\x04";
const CENTRAL: &[u8] = b"PK\x01\x02";

#[test]
fn archives_that_lie_are_refused() {
    let (pickle, data) = (good_pickle(), [0u8; 256]);
    let good = archive(&pickle, &data);
    open("good.bin", &good).unwrap().tensor(CANONICAL, &[8, 8]).unwrap();
    let deflated = patched(&patched(&good, LOCAL, 8, &[8, 0]), CENTRAL, 10, &[8, 0]);
    let encrypted = patched(&patched(&good, LOCAL, 6, &[1, 0]), CENTRAL, 8, &[1, 0]);
    for (name, bytes) in [
        ("compressed", deflated),
        ("compressed in the directory only", patched(&good, CENTRAL, 10, &[8, 0])),
        ("encrypted", encrypted),
        ("size 2^32 - 2", patched(&good, CENTRAL, 20, &[0xfe, 0xff, 0xff, 0xff, 0xfe, 0xff, 0xff, 0xff])),
        ("sizes that ask for zip64 fields that are not there", patched(&good, CENTRAL, 20, &[0xff; 8])),
        ("sizes that differ", patched(&good, CENTRAL, 24, &[0, 1, 0, 0])),
        ("entries in one place", patched(&good, CENTRAL, 42, &[0; 4])),
        ("entries past the end", patched(&good, CENTRAL, 42, &[0xfe, 0xff, 0xff, 0x7f])),
        ("no pickle", zip_of(&[("model/data/0", &data)])),
        ("two pickles", zip_of(&[("a/data.pkl", &pickle), ("b/data.pkl", &pickle), ("a/data/0", &data)])),
        ("no storage", zip_of(&[("model/data.pkl", &pickle)])),
        ("storage too short", archive(&pickle, &data[..252])),
        ("storage too long", archive(&pickle, &[0; 260])),
        ("a way out", zip_of(&[("model/data.pkl", &pickle), ("model/data/0", &data), ("model/../../x", b"")])),
        ("an absolute name", zip_of(&[("model/data.pkl", &pickle), ("model/data/0", &data), ("/etc/x", b"")])),
        ("big-endian", zip_of(&[("model/data.pkl", &pickle), ("model/data/0", &data), ("model/byteorder", b"big")])),
        ("no tensors", archive(b"\x80\x02}.", &data)),
        ("not a dictionary", archive(b"\x80\x02].", &data)),
        ("a tensor twice", {
            let entry = [&text(Q_PROJ)[..], &tensor(0, &[8, 8], &[8, 1])].concat();
            archive(&[b"}(", &entry[..], &entry, b"u."].concat(), &data)
        }),
    ] {
        refused(name, &bytes);
    }
}

/// Values of a tensor that the archive holds in another order than row by row.
#[test]
fn strided_tensors_are_gathered() {
    let data: Vec<u8> = (0..64).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let store = open("t.bin", &archive(&dict_of(&tensor(3, &[2, 3], &[1, 20])), &data)).unwrap();
    let tensor = store.tensor(CANONICAL, &[2, 3]).unwrap();
    assert_eq!(tensor.as_slice::<f32>(), [3.0, 23.0, 43.0, 4.0, 24.0, 44.0]);
}

// ---------------------------------------------------------------- what torch itself writes

fn pickle_fixture(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests/fixtures/pickles", name].iter().collect()
}

fn store_of(path: &Path) -> Store {
    let mut store = Store::new(path);
    store.add(path, &[Part::Llama, Part::Projector]).unwrap_or_else(|e| panic!("{e}"));
    store
}

#[test]
fn what_torch_saves_is_what_safetensors_saves() {
    for (pickle, twin) in
        [("views.bin", "views.safetensors"), ("protocol4.bin", "views.safetensors"), ("state_dict.bin", "state_dict.safetensors")]
    {
        let (store, twin) = (store_of(&pickle_fixture(pickle)), store_of(&pickle_fixture(twin)));
        assert_eq!(store.entries().count(), twin.entries().count());
        for entry in twin.entries() {
            let canonical = entry.canonical.unwrap();
            assert_eq!(store.dtype(&canonical), Some(&entry.dtype), "{canonical}");
            assert_eq!(store.shape(&canonical), Some(entry.shape.as_slice()), "{canonical}");
            match (store.tensor(&canonical, &entry.shape), twin.tensor(&canonical, &entry.shape)) {
                (Ok(a), Ok(b)) => assert_eq!(a.as_bytes(), b.as_bytes(), "{canonical}"),
                (a, b) => assert!(a.is_err() && b.is_err() && entry.dtype.to_string() == "i64", "{canonical}"),
            }
        }
    }
}

#[test]
fn what_torch_saves_and_we_cannot_take_is_refused_with_advice() {
    for (name, what) in [
        ("legacy.bin", "convert it once"),
        ("expanded.bin", "impossible arguments"),
        ("module.bin", "torch.nn.modules.linear.Linear"),
    ] {
        let path = pickle_fixture(name);
        let error = Store::new(&path).add(&path, &[Part::Llama]).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
}

// ---------------------------------------------------------------- anything at all

/// A good file with some bytes changed and the end cut off: it passes the first checks and fails somewhere behind them.
fn mutated(good: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let n = good.len();
    (prop::collection::vec((0..n, any::<u8>()), 0..6), 0..=n).prop_map(move |(changes, cut)| {
        let mut bytes = good.clone();
        for (i, byte) in changes {
            bytes[i] = byte;
        }
        // Most files stay whole, or truncation would hide everything else.
        if cut < n / 8 {
            bytes.truncate(n - cut);
        }
        bytes
    })
}

/// Whatever the reader accepts must be readable in full.
fn load_all(store: &Store) {
    for entry in store.entries() {
        if let Some(canonical) = entry.canonical {
            let _ = store.tensor(&canonical, &entry.shape);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn parsers_survive_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = state_dict(&bytes);
        let _ = torch_zip::tensors(&[torch_zip::ZIP_MAGIC, &bytes].concat());
        let _ = safetensors::header(Path::new("f"), &bytes);
        if let Ok(serde_json::Value::Object(index)) = serde_json::from_slice(&bytes) {
            let _ = files::shard_names(&index);
        }
    }

    #[test]
    fn mutated_pickles_keep_their_tensors_inside(bytes in mutated(good_pickle())) {
        for (_, tensor) in state_dict(&bytes).unwrap_or_default() {
            let last: Option<usize> = tensor.shape.iter().zip(&tensor.strides).try_fold(tensor.offset, |at, (n, s)| at.checked_add(n.checked_sub(1)?.checked_mul(*s)?));
            prop_assert!(tensor.n_elements() == Some(0) || last.is_some_and(|last| last < tensor.storage_len));
        }
    }

    #[test]
    fn mutated_archives_are_refused_or_read(bytes in mutated(archive(&good_pickle(), &[7; 256]))) {
        if let Ok(tensors) = torch_zip::tensors(&bytes) {
            for (_, offset, tensor) in tensors {
                prop_assert!(offset + tensor.n_elements().unwrap() * tensor.dtype.size() <= bytes.len() || !tensor.is_contiguous());
            }
        }
    }

    #[test]
    fn mutated_headers_are_refused_or_inside(bytes in mutated(one_tensor("F32", "[8, 8]", "[0,256]", &[7; 256]))) {
        if let Ok(tensors) = safetensors::header(Path::new("f"), &bytes) {
            prop_assert!(tensors.iter().all(|(_, offset, ..)| *offset <= bytes.len()));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_files_are_refused_or_loaded(
        zip in mutated(archive(&dict_of(&tensor(3, &[2, 3], &[1, 20])), &[7; 256])),
        header in mutated(one_tensor("F32", "[8, 8]", "[0,256]", &[7; 256])),
    ) {
        for (name, bytes) in [("f.bin", zip), ("f.safetensors", header)] {
            if let Ok(store) = open(name, &bytes) {
                load_all(&store);
            }
        }
    }
}
