//! Ids and text against SentencePiece and transformers (`tools/reference`): on the tiny tokenizer of the fixtures, on LLaMA's own
//! where it lies beside the repository, and on the prompts of every checkpoint.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use llava_engine::error::Error;
use llava_engine::text::{Conversation, Piece, Prompt, PromptPart, Reading, StreamDecoder, Style, Template, Tokenizer};
use proptest::prelude::*;
use safetensors::SafeTensors;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// A folder that holds a `tokenizer.model` and these other files.
fn folder(model: &Path, files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(model, folder.path().join("tokenizer.model")).unwrap();
    for (name, content) in files {
        fs::write(folder.path().join(name), content).unwrap();
    }
    folder
}

fn tiny_model() -> PathBuf {
    fixtures().join("tokenizer/tokenizer.model")
}

/// LLaMA's own model, which is not ours to publish.
fn llama_model() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/llama-tokenizer.model");
    if !path.exists() {
        println!("skipped: {} is not there", path.display());
        return None;
    }
    Some(path)
}

fn ids_of(pieces: &[Piece]) -> Vec<u32> {
    let ids = |p: &Piece| match p {
        Piece::Tokens(ids) => ids.clone(),
        Piece::Image => panic!("an image in {pieces:?}"),
    };
    pieces.iter().flat_map(ids).collect()
}

/// Lines and their ids by three tokenizers, see `tools/reference/make_tokenizer_ids.py`.
struct Oracle {
    lines: Vec<String>,
    slow_legacy: Vec<Vec<u32>>,
    /// Lines that differ from `slow_legacy`.
    slow: HashMap<usize, Vec<u32>>,
    /// With `<image>` and `<pad>` added to the vocabulary: transformers 4's `tokenizer.json`, and 5's with its pre-tokenizer.
    json: HashMap<usize, Vec<u32>>,
    metaspace: HashMap<usize, Vec<u32>>,
    /// Lines that decoding `slow_legacy` does not give back.
    decoded: HashMap<usize, String>,
}

impl Oracle {
    fn read(name: &str) -> Self {
        let lines = fs::read_to_string(fixtures().join("tokenizer/lines.jsonl")).unwrap();
        let bytes = fs::read(fixtures().join("tokenizer").join(name)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let u16s = |name: &str| -> Vec<u32> {
            let data = file.tensor(name).unwrap();
            data.data().chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]]))).collect()
        };
        let indices = |name: &str| -> Vec<usize> {
            let data = file.tensor(name).unwrap();
            data.data().chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap()) as usize).collect()
        };
        let rows = |set: &str| -> Vec<Vec<u32>> {
            let (ids, mut at) = (u16s(&format!("{set}.ids")), 0);
            let cut = |n: u32| {
                at += n as usize;
                ids[at - n as usize..at].to_vec()
            };
            u16s(&format!("{set}.lengths")).into_iter().map(cut).collect()
        };
        let differing = |set: &str| indices(&format!("{set}.lines")).into_iter().zip(rows(set)).collect();
        let text = String::from_utf8(file.tensor("decoded.text").unwrap().data().to_vec()).unwrap();
        Self {
            lines: lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect(),
            slow_legacy: rows("slow_legacy"),
            slow: differing("slow"),
            json: differing("json"),
            metaspace: differing("metaspace"),
            decoded: indices("decoded.lines").into_iter().zip(text.split('\0').map(str::to_owned)).collect(),
        }
    }

    fn expected<'a>(&'a self, set: &'a HashMap<usize, Vec<u32>>, line: usize) -> &'a [u32] {
        set.get(&line).unwrap_or(&self.slow_legacy[line])
    }
}

/// Every line by every tokenizer; returns how many comparisons were made.
fn compare(model: &Path, oracle: &Oracle) -> usize {
    let legacy = folder(model, &[]);
    let legacy = Tokenizer::open(legacy.path()).unwrap();
    let newer = folder(model, &[("tokenizer_config.json", r#"{"legacy": false}"#)]);
    let newer = Tokenizer::open(newer.path()).unwrap();
    let mut n = 0;
    for (i, line) in oracle.lines.iter().enumerate().take(oracle.slow_legacy.len()) {
        // The bare model has no such tokens: to it they are text.
        if line.contains("<image>") || line.contains("<pad>") {
            continue;
        }
        let fast = oracle.expected(&oracle.metaspace, i);
        assert_eq!(newer.encode(line, Reading::Special).unwrap(), fast, "metaspace, line {i} {line:?}");
        n += 1;
        let slow = |tokenizer: &Tokenizer| ids_of(&tokenizer.tokenize_prompt(&Prompt::raw(line), Style::Original).unwrap());
        assert_eq!(slow(&legacy)[1..], oracle.slow_legacy[i], "slow, legacy, line {i} {line:?}");
        assert_eq!(&slow(&newer)[1..], oracle.expected(&oracle.slow, i), "slow, line {i} {line:?}");
        n += 2;
        // transformers decodes special tokens by rules of its own; ours leave no trace.
        if oracle.slow_legacy[i].iter().all(|&id| id > 2) {
            let text = oracle.decoded.get(&i).unwrap_or(line);
            assert_eq!(&legacy.decode(&oracle.slow_legacy[i]), text, "decode, line {i}");
            n += 1;
        }
    }
    n
}

#[test]
fn ids_of_the_tiny_model_are_sentencepieces() {
    assert!(compare(&tiny_model(), &Oracle::read("tiny.safetensors")) > 2_000);
}

#[test]
fn ids_of_a_tokenizer_json_are_the_references() {
    let oracle = Oracle::read("tiny.safetensors");
    for (file, set) in [("tokenizer.json", &oracle.json), ("tokenizer_metaspace.json", &oracle.metaspace)] {
        let folder = tempfile::tempdir().unwrap();
        fs::copy(fixtures().join("tokenizer").join(file), folder.path().join("tokenizer.json")).unwrap();
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        for (i, line) in oracle.lines.iter().enumerate().take(oracle.slow_legacy.len()) {
            assert_eq!(tokenizer.encode(line, Reading::Special).unwrap(), oracle.expected(set, i), "{file}, line {i} {line:?}");
        }
    }
}

#[test]
fn ids_of_the_llama_model_are_sentencepieces() {
    let Some(model) = llama_model() else { return };
    assert!(compare(&model, &Oracle::read("llama.safetensors")) > 19_000);
}

#[test]
fn prompts_of_every_checkpoint_have_the_references_ids() {
    let mut n_cases = 0;
    for entry in fs::read_dir(fixtures().join("checkpoints")).unwrap() {
        let path = entry.unwrap().path();
        let Ok(expected) = fs::read(path.join("expected.json")) else { continue };
        let expected: serde_json::Value = serde_json::from_slice(&expected).unwrap();
        let has_tokenizer = path.join("tokenizer.json").exists() || path.join("tokenizer.model").exists();
        let tokenizer = Tokenizer::open(if has_tokenizer { path.clone() } else { path.join("../base-llama") }).unwrap();
        let style = if expected["profile"] == "hf" { Style::Hf } else { Style::Original };
        let bytes = fs::read(path.join("expected.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        for (k, case) in expected["cases"].as_array().unwrap().iter().enumerate() {
            let ids = tensors.tensor(&format!("case{k}.input_ids")).unwrap();
            let ids: Vec<i64> = ids.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect();
            let image_id = expected["image_token_id"].as_i64().unwrap();
            let n_images = case["images"].as_array().unwrap().len();
            let tokens_per_image = ids.iter().filter(|&&id| id == image_id).count().checked_div(n_images).unwrap_or(0);
            let prompt = Prompt::raw(case["prompt"].as_str().unwrap());
            assert_eq!(prompt.n_images(), n_images);
            let pieces = tokenizer.tokenize_prompt(&prompt, style).unwrap();
            let ours: Vec<i64> = pieces
                .iter()
                .flat_map(|piece| match piece {
                    Piece::Tokens(ids) => ids.iter().map(|&id| i64::from(id)).collect(),
                    Piece::Image => vec![image_id; tokens_per_image],
                })
                .collect();
            assert_eq!(ours, ids, "{} {}", path.display(), case["name"]);
            n_cases += 1;
        }
    }
    assert!(n_cases >= 20, "{n_cases} cases");
}

#[test]
fn streamed_text_is_the_decoded_text_and_never_half_a_character() {
    let oracle = Oracle::read("tiny.safetensors");
    let tokenizer = Tokenizer::open(folder(&tiny_model(), &[]).path()).unwrap();
    for (line, ids) in oracle.lines.iter().zip(&oracle.slow_legacy) {
        let mut stream = StreamDecoder::new(&tokenizer);
        let chunks: Vec<String> = ids.iter().map(|&id| stream.push(id)).collect();
        let end = stream.finish();
        assert_eq!(chunks.concat() + &end, tokenizer.decode(ids));
        if !line.contains('\u{fffd}') {
            assert!(!chunks.concat().contains('\u{fffd}') && end.is_empty(), "{line:?} {chunks:?}");
        }
    }
}

/// What a user may type to be taken for somebody else.
const FORGERIES: &[&str] = &[
    "<image>",
    "</s>",
    "<s>",
    "<unk>",
    "<pad>",
    "<image",
    ">",
    "\n",
    "[INST]",
    "USER:",
    "<|im_end|>",
    "<|im_start|>system\n",
    " ",
    "a",
    "### ",
    "{{ 1 }}",
    "\u{2581}",
    "\u{2581}</s>",
    "\u{f8f0}0\u{f8f1}",
    "<0x0A>",
];

fn forgery() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(FORGERIES), 0..8).prop_map(|parts| parts.concat())
}

/// A tokenizer that knows the marks of all templates, flagged special or not.
fn tokenizer_with_marks(special: bool) -> Tokenizer {
    let marks = ["<image>", "<pad>", "<|im_start|>", "<|im_end|>"];
    let token = |(i, mark): (usize, &&str)| format!(r#""{}": {{"content": "{mark}", "special": {special}}}"#, 320 + i);
    let decoder: Vec<String> = marks.iter().enumerate().map(token).collect();
    let config = format!(r#"{{"added_tokens_decoder": {{{}}}}}"#, decoder.join(", "));
    Tokenizer::open(folder(&tiny_model(), &[("tokenizer_config.json", &config)]).path()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_a_user_types_is_text(system in forgery(), first in forgery(), answer in forgery(), second in forgery(), n_images in 0usize..3) {
        for special in [true, false] {
            let tokenizer = tokenizer_with_marks(special);
            let control: Vec<u32> = tokenizer.control_tokens().map(|t| tokenizer.token_to_id(t).unwrap()).collect();
            for name in Template::names() {
                let mut conversation = Conversation::new(Template::by_name(name).unwrap()).with_system(&system);
                conversation.add_user(&first, n_images).add_assistant(&answer).add_user(&second, 0);
                let prompt = conversation.prompt();
                prop_assert_eq!(prompt.n_images(), n_images);
                let written = prompt.parts().unwrap().iter().filter(|p| matches!(p, PromptPart::Special(_))).count();
                for style in [Style::Hf, Style::Original] {
                    let pieces = tokenizer.tokenize_prompt(&prompt, style).unwrap();
                    let images = pieces.iter().filter(|p| **p == Piece::Image).count();
                    prop_assert_eq!(images, n_images);
                    let ids = pieces.iter().flat_map(|p| if let Piece::Tokens(ids) = p { ids.clone() } else { Vec::new() });
                    let ids: Vec<u32> = ids.collect();
                    prop_assert_eq!(ids[0], tokenizer.bos().unwrap());
                    let specials = ids[1..].iter().filter(|id| control.contains(id)).count();
                    prop_assert_eq!(specials, written, "{} {:?} {:?}", name, style, prompt.to_string());
                }
            }
        }
    }

    #[test]
    fn plain_text_comes_back(text in "\\PC{0,40}") {
        let tokenizer = tokenizer_with_marks(true);
        let ids = tokenizer.encode(&text, Reading::Plain).unwrap();
        prop_assert_eq!(tokenizer.decode(&ids), text.replace('\u{2581}', " "));
    }

    #[test]
    fn a_tokenizer_of_any_bytes_is_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(Tokenizer::from_bytes(&bytes).is_err());
    }

    #[test]
    fn a_damaged_model_is_no_panic(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20)) {
        let mut bytes = fs::read(tiny_model()).unwrap();
        for (at, byte) in flips {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(tokenizer) = Tokenizer::from_bytes(&bytes) {
            let ids = tokenizer.encode("the dog\n世 <s>", Reading::Special).unwrap_or_default();
            tokenizer.decode(&ids);
        }
    }

    #[test]
    fn a_damaged_json_is_no_panic(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let mut bytes = fs::read(fixtures().join("checkpoints/hf_mha_f32/tokenizer.json")).unwrap();
        for (at, byte) in flips {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(tokenizer) = Tokenizer::from_bytes(&bytes) {
            let ids = tokenizer.encode("the dog\n世 <s>", Reading::Special).unwrap_or_default();
            tokenizer.decode(&ids);
        }
    }
}

#[test]
fn a_truncated_model_is_an_error_or_smaller() {
    let bytes = fs::read(tiny_model()).unwrap();
    let mut opened = 0;
    for n in 0..bytes.len() {
        opened += usize::from(Tokenizer::from_bytes(&bytes[..n]).is_ok());
    }
    // The trainer's settings, which say that it is BPE, come after the pieces.
    assert!(opened < 100, "{opened} of {} prefixes opened", bytes.len());
}

#[test]
fn a_folder_without_a_tokenizer_says_so() {
    let empty = tempfile::tempdir().unwrap();
    let error = Tokenizer::open(empty.path()).err().unwrap();
    assert!(matches!(&error, Error::File { path, .. } if path == empty.path()));
    assert!(error.to_string().contains("no tokenizer.json and no tokenizer.model"), "{error}");
}

#[test]
fn errors_name_the_file() {
    for (name, content, says) in [
        ("tokenizer_config.json", "[1]", "tokenizer_config.json: not a JSON object"),
        ("tokenizer.json", "{", "tokenizer.json: not a JSON object"),
        ("tokenizer.json", r#"{"model": {"type": "Unigram"}}"#, "tokenizer.json: a Unigram model"),
        ("added_tokens.json", r#"{"<x>": -1}"#, "added_tokens.json: the id of `<x>` is -1"),
        ("special_tokens_map.json", r#"{"bos_token": "<begin>"}"#, "bos_token is `<begin>`, which it does not have"),
        (
            "tokenizer_config.json",
            r#"{"added_tokens_decoder": {"9": {"content": "</s>"}}}"#,
            "`</s>` is 2 in the vocabulary and 9 as",
        ),
        ("tokenizer_config.json", r#"{"added_tokens_decoder": {"4294967295": {"content": "<x>"}}}"#, "`<x>` has no id below"),
    ] {
        let error = Tokenizer::open(folder(&tiny_model(), &[(name, content)]).path()).err().unwrap().to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn the_files_beside_a_vocabulary_are_honoured() {
    let plain = Tokenizer::open(folder(&tiny_model(), &[]).path()).unwrap();
    assert_eq!((plain.bos(), plain.eos(), plain.unk(), plain.pad(), plain.image()), (Some(1), Some(2), Some(0), None, None));
    assert_eq!(plain.n_ids(), 320);
    let full = folder(
        &tiny_model(),
        &[
            ("added_tokens.json", r#"{"<image>": 320, "[PAD]": 321}"#),
            ("special_tokens_map.json", r#"{"pad_token": {"content": "[PAD]"}}"#),
            ("tokenizer_config.json", r#"{"add_bos_token": false}"#),
        ],
    );
    let full = Tokenizer::open(full.path()).unwrap();
    assert_eq!((full.pad(), full.image(), full.n_ids()), (Some(321), Some(320), 322));
    assert!(full.is_special(321) && !full.is_special(320));
    assert_eq!(full.id_to_token(320).as_deref(), Some("<image>"));
    assert_eq!(full.id_to_token(322), None);
    let pieces = full.tokenize_prompt(&Prompt::raw("a[PAD]"), Style::Hf).unwrap();
    assert_eq!(ids_of(&pieces), [261, 321], "no BOS");
}

#[test]
fn bos_written_by_a_template_is_not_doubled() {
    let tokenizer = tokenizer_with_marks(true);
    let mut prompt = Prompt::new();
    prompt.special("<s>");
    prompt.text("a");
    for style in [Style::Hf, Style::Original] {
        let ids = ids_of(&tokenizer.tokenize_prompt(&prompt, style).unwrap());
        assert_eq!(ids.iter().filter(|&&id| id == 1).count(), 1, "{style:?} {ids:?}");
        // A raw prompt is not interpreted: the references put BOS in front of it whatever it begins with.
        let ids = ids_of(&tokenizer.tokenize_prompt(&Prompt::raw("<s>a"), style).unwrap());
        assert_eq!(ids[..2], [1, 1], "{style:?}");
    }
}
