//! `export`: whatever the layout, the model stays what it is, bit for bit, and the engine answers as before. (What transformers and the
//! modules of LLaVA's own code make of the result, `tools/reference/check_export.py` asks.)

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;

use llava_engine::dtype::DType;
use llava_engine::engine::{Engine, EngineOptions, GenerateOptions, Score};
use llava_engine::export::{Exported, Options, SHARD_BYTES, Target, export};
use llava_engine::infer::sampler::SamplingOptions;
use llava_engine::model::checkpoint::{Checkpoint, Layout};
use llava_engine::tensor::Tensor;
use llava_engine::text::export::for_original;
use llava_engine::text::{ChatTemplate, Conversation, Message, PieceKind, Prompt, SentencePiece, Template, Tokenizer};
use llava_engine::weights::Source;
use serde_json::{Value, json};
use support::program::{copy_dir, fail, succeed};
use support::{fixture, image};

/// Ids of the tokenizer that all fixtures have, without `<image>` and `<pad>`.
const IDS: usize = 320;
/// Fixtures, and whether llava-hf has words for them.
const CHECKPOINTS: [(&str, bool); 9] = [
    ("hf_mha_f32", true),
    ("hf_gqa_bf16", true),
    ("hf_gqa_f16", true),
    ("hf_linear_rope_f32", true),
    ("orig_mha_f32", true),
    ("orig_gqa_bf16", true),
    ("orig_f16_safetensors", false),
    ("orig_projector_over_base", false),
    ("orig_identity_f16", false),
];

const OPTIONS: Options = Options { to: Target::Hf, dtype: None, max_shard_bytes: SHARD_BYTES, name: "llava-v1.5", template: None };

fn source(name: &str) -> PathBuf {
    fixture("checkpoints").join(name)
}

fn try_export(from: &Path, to: &Path, options: &Options) -> Result<Exported, String> {
    let checkpoint = Checkpoint::open(from, None).map_err(|e| e.to_string())?;
    export(from, &checkpoint, to, options).map_err(|e| e.to_string())
}

/// Exports with everything else as usual.
fn exported(from: &Path, to: &Path, target: Target) -> Exported {
    try_export(from, to, &Options { to: target, ..OPTIONS }).unwrap_or_else(|e| panic!("{}: {e}", from.display()))
}

/// Every tensor of a checkpoint, also those that the engine has no use for, by its canonical name or the end of the one it has.
fn tensors(folder: &Path) -> BTreeMap<String, Tensor> {
    let checkpoint = Checkpoint::open(folder, None).unwrap();
    let weights = &checkpoint.weights;
    let mut tensors = BTreeMap::new();
    for entry in weights.entries() {
        let (name, tensor) = match &entry.canonical {
            Some(canonical) => (canonical.clone(), weights.tensor(canonical, &entry.shape).unwrap()),
            None if entry.source.contains("post_layernorm") => {
                (entry.source.rsplit_once("post_layernorm").unwrap().1.to_owned(), weights.unused(&entry.source).unwrap())
            }
            None => continue,
        };
        assert!(tensors.insert(name, tensor).is_none());
    }
    tensors
}

fn is_vocabulary(name: &str) -> bool {
    ["llama.embed_tokens.weight", "llama.lm_head.weight"].contains(&name)
}

/// The same tensors to the last bit; of the vocabulary's, `rows`.
fn assert_equal(what: &str, got: &Path, expected: &Path, rows: usize) {
    let (got, expected) = (tensors(got), tensors(expected));
    assert!(got.keys().eq(expected.keys()), "{what}: {:?}, not {:?}", got.keys(), expected.keys());
    for (name, expected) in &expected {
        let got = &got[name];
        assert_eq!(got.dtype(), expected.dtype(), "{what}: {name}");
        if is_vocabulary(name) {
            let n = rows * expected.row_len() * expected.dtype().size();
            assert!(got.as_bytes()[..n] == expected.as_bytes()[..n], "{what}: rows of {name}");
        } else {
            assert_eq!(got.shape(), expected.shape(), "{what}: {name}");
            assert!(got.as_bytes() == expected.as_bytes(), "{what}: {name}");
        }
    }
}

#[test]
fn the_model_is_the_same_to_the_last_bit_there_and_back() {
    for (name, has_hf) in CHECKPOINTS {
        let dir = tempfile::tempdir().unwrap();
        let [hf, original, back] = ["hf", "llava-original", "llava-back"].map(|part| dir.path().join(part));
        let is_hf = name.starts_with("hf");
        let report = exported(&source(name), &original, Target::Original);
        assert_eq!((report.rows, report.rows_before), (IDS, if is_hf { 328 } else { IDS }), "{name}");
        assert_equal(name, &original, &source(name), IDS);
        let opened = Checkpoint::open(&original, None).unwrap();
        assert!(matches!(opened.layout, Layout::Original { tower: Some(_), .. }), "{name}: {}", opened.layout);
        if !is_hf {
            // These fixtures have the names of LLaVA's own files.
            let names = |folder: &Path| -> BTreeSet<String> {
                let checkpoint = Checkpoint::open(folder, None).unwrap();
                let is_tower = |canonical: &str| canonical.starts_with("clip.");
                let entries = checkpoint.weights.entries().filter(|e| e.canonical.as_deref().is_some_and(|c| !is_tower(c)));
                entries.map(|entry| entry.source).collect()
            };
            assert_eq!(names(&original), names(&source(name)));
        }
        if !has_hf {
            continue;
        }
        let report = exported(&source(name), &hf, Target::Hf);
        assert_eq!(report.rows, if is_hf { 328 } else { 384 }, "{name}");
        assert_equal(name, &hf, &source(name), if is_hf { 328 } else { IDS });
        // And back: from the other layout, whichever that is.
        if is_hf {
            exported(&original, &back, Target::Hf);
            assert_equal(name, &back, &source(name), IDS);
        } else {
            exported(&hf, &back, Target::Original);
            assert_equal(name, &back, &original, IDS);
            assert_eq!(Checkpoint::open(&back, None).unwrap().config.text.vocab_size, IDS, "{name}");
            let model = |folder: &Path| fs::read(folder.join("tokenizer.model")).unwrap();
            assert!(model(&back) == model(&original), "{name}");
        }
        for folder in [&hf, &original] {
            assert!(!folder.join(".partial").exists());
        }
    }
}

/// What the decoder computes with is nothing but its configuration: all of it is there again.
#[test]
fn the_configuration_is_the_same() {
    for (name, has_hf) in CHECKPOINTS {
        let dir = tempfile::tempdir().unwrap();
        for (part, target) in [("llava-original", Target::Original), ("hf", Target::Hf)] {
            if target == Target::Hf && !has_hf {
                continue;
            }
            let folder = dir.path().join(part);
            exported(&source(name), &folder, target);
            let (got, mut expected) = (Checkpoint::open(&folder, None).unwrap(), Checkpoint::open(&source(name), None).unwrap());
            expected.config.text.vocab_size = got.config.text.vocab_size;
            expected.config.profile = got.config.profile;
            expected.config.image_token_index = got.config.image_token_index;
            assert_eq!(got.config, expected.config, "{name} to {part}");
            assert_eq!(
                (got.config.image_token_index, got.dtype),
                ((target == Target::Hf).then_some(320), expected.dtype),
                "{name}"
            );
        }
    }
}

/// Keys of the original that llava-hf has no word for, and settings that are not the usual ones.
#[test]
fn settings_that_are_not_the_usual_ones_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    copy_dir(&source("orig_gqa_bf16"), &path("short"));
    edit(&path("short/config.json"), |json| {
        json["max_sequence_length"] = 100.into();
        json["eos_token_id"] = json!([2, 7]);
    });
    edit(&path("short/clip/preprocessor_config.json"), |json| {
        json["size"] = 60.into();
        json["image_mean"] = json!([0.5, 0.25, 0.1]);
    });
    fs::write(path("short/LICENSE"), "terms").unwrap();
    exported(&path("short"), &path("llava"), Target::Original);
    exported(&path("short"), &path("hf"), Target::Hf);
    let open = |name: &str| Checkpoint::open(&path(name), None).unwrap().config;
    assert_eq!(fs::read_to_string(path("hf/LICENSE")).unwrap(), "terms");
    let expected = open("short");
    assert_eq!((open("llava").context_tokens, open("hf").context_tokens), (100, 512));
    for config in [open("llava"), open("hf")] {
        assert_eq!((config.preprocess.shortest_edge, config.eos_token_ids.as_slice()), (60, &[2, 7][..]));
        assert_eq!(config.preprocess, expected.preprocess);
    }
    // Heads that are not the hidden size's share: LLaVA's own code cannot have them, and whoever exports is told.
    let options = Options { to: Target::Original, ..OPTIONS };
    let report = try_export(&source("hf_linear_rope_f32"), &path("heads"), &options).unwrap();
    for what in ["neither `head_dim`", "working directory", "are cropped", "`llava` in it"] {
        assert_eq!(report.notes.iter().filter(|note| note.contains(what)).count(), 1, "{what}: {:?}", report.notes);
    }
    let report = try_export(&source("orig_mha_f32"), &path("padded"), &OPTIONS).unwrap();
    assert!(report.notes.iter().any(|note| note.contains("LlavaImageProcessor")), "{:?}", report.notes);
}

/// Rows that llava-hf asks for are the mean of those there are, so that nothing of theirs is ever the best.
#[test]
fn added_rows_are_the_mean_of_all() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["orig_mha_f32", "orig_gqa_bf16"] {
        let folder = dir.path().join(name);
        exported(&source(name), &folder, Target::Hf);
        for (tensor, values) in tensors(&folder).iter().filter(|(tensor, _)| is_vocabulary(tensor)) {
            let (k, all) = (values.row_len(), values.to_f32());
            assert_eq!(values.rows(), 384);
            let (old, new) = all.split_at(IDS * k);
            let mean: Vec<f32> =
                (0..k).map(|i| (old.iter().skip(i).step_by(k).map(|&x| f64::from(x)).sum::<f64>() / IDS as f64) as f32).collect();
            let mean = Tensor::from_slice(&[k], &mean).converted(values.dtype()).to_f32();
            assert!(new.chunks(k).all(|row| row == mean), "{name}: {tensor}");
        }
    }
}

/// The prompts of a fixture with their pictures.
fn cases(name: &str) -> Vec<(String, Vec<PathBuf>)> {
    let folder = source(name);
    let file: Value = serde_json::from_slice(&fs::read(folder.join("expected.json")).unwrap()).unwrap();
    let case = |case: &Value| {
        let images = case["images"].as_array().unwrap().iter().map(|file| folder.join(file.as_str().unwrap())).collect();
        (case["prompt"].as_str().unwrap().to_owned(), images)
    };
    file["cases"].as_array().unwrap().iter().map(case).collect()
}

#[test]
fn answers_are_those_of_the_source() {
    let options = EngineOptions { dtype: Some(DType::F32), threads: 1, ..EngineOptions::default() };
    let generate =
        GenerateOptions { sampling: SamplingOptions::greedy(), max_new_tokens: 24, ignore_eos: true, ..GenerateOptions::default() };
    let mut n_compared = 0;
    for (name, has_hf) in CHECKPOINTS {
        let dir = tempfile::tempdir().unwrap();
        let mut before = Engine::open(source(name), &options).unwrap();
        for (part, target) in [("llava-original", Target::Original), ("hf", Target::Hf)] {
            if target == Target::Hf && !has_hf {
                continue;
            }
            let folder = dir.path().join(part);
            exported(&source(name), &folder, target);
            let mut after = Engine::open(&folder, &options).unwrap();
            for (prompt, images) in cases(name) {
                // Behind `</s>` llava-hf puts a space that a tokenizer which is not `legacy` does not.
                if name == "orig_mha_f32" && target == Target::Hf && prompt.contains("</s>") {
                    continue;
                }
                let images: Vec<_> = images.iter().map(|file| image(file)).collect();
                let what = format!("{name} to {part}: {prompt}");
                let prompt = Prompt::raw(&prompt);
                let (old, new) = (before.score(&prompt, &images).unwrap(), after.score(&prompt, &images).unwrap());
                assert_eq!(new.is_image, old.is_image, "{what}");
                let text = |score: &Score| -> Vec<i64> {
                    score.input_ids.iter().zip(&score.is_image).filter(|(_, is_image)| !**is_image).map(|(id, _)| *id).collect()
                };
                assert_eq!(text(&new), text(&old), "{what}");
                let pixels = |score: &Score| score.pixel_values.as_ref().map(|p| p.as_bytes().to_vec());
                assert!(pixels(&new) == pixels(&old), "{what}: pixels");
                assert!(new.last_logits[..IDS] == old.last_logits[..IDS], "{what}: logits");
                let answer = after.generate(&prompt, &images, &generate, &mut |_| ControlFlow::Continue(())).unwrap();
                let expected = before.generate(&prompt, &images, &generate, &mut |_| ControlFlow::Continue(())).unwrap().token_ids;
                // An id that the new vocabulary has not, or has as a mean row, may have been the best of random weights.
                let same = expected.iter().take_while(|id| (**id as usize) < IDS).count();
                assert_eq!(answer.token_ids[..same], expected[..same], "{what}");
                n_compared += same;
            }
        }
    }
    assert!(n_compared > 500, "{n_compared} greedy tokens");
}

#[test]
fn dtypes_are_kept_or_rounded_once() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("llava-bf16");
    let options = Options { to: Target::Original, dtype: Some(DType::Bf16), ..OPTIONS };
    try_export(&source("hf_mha_f32"), &folder, &options).unwrap();
    let (got, expected) = (tensors(&folder), tensors(&source("hf_mha_f32")));
    for (name, tensor) in &got {
        let rounded = expected[name].converted(DType::Bf16);
        assert!(tensor.dtype() == DType::Bf16 && tensor.as_bytes() == &rounded.as_bytes()[..tensor.bytes()], "{name}");
    }
    for file in ["config.json", "vision_tower/config.json"] {
        let config: Value = serde_json::from_slice(&fs::read(folder.join(file)).unwrap()).unwrap();
        assert_eq!(config["torch_dtype"], "bfloat16", "{file}");
    }
    // A tower in f32 beside a decoder in f16 stays so.
    let folder = dir.path().join("llava-mixed");
    exported(&source("orig_projector_over_base"), &folder, Target::Original);
    let dtypes: Vec<String> = ["config.json", "vision_tower/config.json"]
        .map(|file| serde_json::from_slice::<Value>(&fs::read(folder.join(file)).unwrap()).unwrap()["torch_dtype"].to_string())
        .into();
    assert_eq!(dtypes, ["\"float16\"", "\"float32\""]);
}

#[test]
fn large_checkpoints_come_in_files_of_a_size() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("hf");
    let args = ["export", "--json", "--to", "hf", "--max-shard-gb", "1e-4", "--model"];
    let (from, to) = (source("orig_mha_f32"), folder.to_str().unwrap());
    let report: Value = serde_json::from_str(&succeed(&[&args[..], &[from.to_str().unwrap(), "--output", to]].concat())).unwrap();
    let n_files = report["exported"]["n_files"].as_u64().unwrap();
    assert!(n_files > 2, "{report}");
    let index: Value = serde_json::from_slice(&fs::read(folder.join("model.safetensors.index.json")).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], report["exported"]["bytes"]);
    for k in 1..=n_files {
        let bytes = fs::read(folder.join(format!("model-{k:05}-of-{n_files:05}.safetensors"))).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert!(file.tensors().iter().map(|(_, t)| t.data().len()).sum::<usize>() <= 100_000);
    }
    assert_equal("shards", &folder, &from, IDS);
}

/// A vocabulary that has other tokens behind llava-hf's two keeps them all.
#[test]
fn tokens_that_somebody_added_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (model, original) = (dir.path().join("model"), dir.path().join("llava"));
    copy_dir(&source("hf_mha_f32"), &model);
    let added = json!({"id": 322, "content": "<click>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": false});
    edit(&model.join("tokenizer.json"), |json| json["added_tokens"].as_array_mut().unwrap().push(added.clone()));
    let report = exported(&model, &original, Target::Original);
    assert_eq!((report.rows, report.rows_before), (323, 328));
    assert_equal("added", &original, &model, 323);
    let tokenizer = Tokenizer::open(&original).unwrap();
    assert_eq!([320, 321, 322].map(|id| tokenizer.id_to_token(id).unwrap()), ["<image>", "<pad>", "<click>"]);
    // In its own layout it also keeps the token that it pads with.
    edit(&model.join("tokenizer_config.json"), |json| json["pad_token"] = "</s>".into());
    let report = exported(&model, &dir.path().join("same"), Target::Hf);
    let tokenizer = Tokenizer::open(dir.path().join("same")).unwrap();
    assert_eq!((report.rows, tokenizer.n_ids(), tokenizer.pad()), (328, 323, Some(2)));
    // And an id that nobody has is not to be invented.
    edit(&model.join("tokenizer.json"), |json| json["added_tokens"][5]["id"] = 324.into());
    let error = try_export(&model, &dir.path().join("hf"), &OPTIONS).unwrap_err();
    assert!(error.contains("id 324, and none 322"), "{error}");
}

/// The tokenizer.model of a tokenizer.json is the one that that was made of; and what cannot be one is refused.
#[test]
fn a_sentencepiece_model_is_made_of_merges() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    copy_dir(&source("hf_mha_f32"), &model);
    exported(&model, &dir.path().join("llava"), Target::Original);
    let parse = |path: &Path| SentencePiece::parse(&fs::read(path).unwrap()).unwrap();
    let (got, expected) = (parse(&dir.path().join("llava/tokenizer.model")), parse(&fixture("tokenizer/tokenizer.model")));
    let told = |model: &SentencePiece| model.pieces.iter().map(|p| (p.text.clone(), p.kind)).collect::<Vec<_>>();
    assert_eq!(told(&got), told(&expected));
    assert!(got.pieces.iter().any(|piece| piece.kind == PieceKind::Byte) && got.byte_fallback && got.add_dummy_prefix);
    assert_eq!(got.merges().unwrap(), expected.merges().unwrap());
    assert_eq!((got.unk_id, got.bos_id, got.eos_id, got.pad_id), (0, Some(1), Some(2), None));
    assert_eq!(SentencePiece::parse(&expected.to_bytes()).unwrap(), expected);
}

/// Merges that no SentencePiece model implies stay in a tokenizer.json, which LLaVA's code can be told to read.
#[test]
fn other_merges_stay_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let vocab: Value = ["<unk>", "<s>", "</s>", "a", "b", "c", "ab", "bc", "abc"].iter().zip(0..).map(|(p, id)| (*p, id)).collect();
    for (merges, is_model) in [
        (json!(["a b", "b c", "ab c", "a bc"]), true),
        (json!([["b", "c"], ["a", "b"], ["a", "bc"], ["ab", "c"]]), true),
        (json!(["a b", "b c", "ab c"]), false),
        (json!(["a b", "ab c", "b c", "a bc"]), false),
    ] {
        let file = json!({
            "model": {"type": "BPE", "unk_token": "<unk>", "vocab": vocab, "merges": merges},
            "decoder": {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            "added_tokens": [{"id": 0, "content": "<unk>", "special": true}, {"id": 9, "content": "<image>", "special": true}],
        });
        fs::write(dir.path().join("tokenizer.json"), file.to_string()).unwrap();
        let files: BTreeMap<_, _> = for_original(dir.path(), true, None).unwrap().into_iter().collect();
        assert_eq!(
            (files.contains_key("tokenizer.model"), files.contains_key("tokenizer.json")),
            (is_model, !is_model),
            "{merges}"
        );
        match files.get("tokenizer.model") {
            Some(bytes) => {
                let first = merges[0].as_str().map_or("bc", |_| "ab");
                let model = SentencePiece::parse(bytes).unwrap();
                let best = model.pieces.iter().filter(|p| p.kind == PieceKind::Normal).max_by(|a, b| a.score.total_cmp(&b.score));
                assert_eq!(best.unwrap().text, first);
                assert!(!model.add_dummy_prefix && !model.byte_fallback);
            }
            None => {
                let json: Value = serde_json::from_slice(&files["tokenizer.json"]).unwrap();
                assert_eq!((&json["model"]["merges"], json["added_tokens"].as_array().unwrap().len()), (&merges, 1));
                let config: Value = serde_json::from_slice(&files["tokenizer_config.json"]).unwrap();
                assert_eq!(config["tokenizer_class"], "PreTrainedTokenizerFast");
            }
        }
    }
    // A tokenizer.model beside counts only if it is of the same vocabulary.
    let model = fixture("tokenizer/tokenizer.model");
    fs::copy(&model, dir.path().join("tokenizer.model")).unwrap();
    assert!(for_original(dir.path(), true, None).unwrap().iter().all(|(name, _)| *name != "tokenizer.model"));
    fs::copy(source("hf_mha_f32").join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    let files: BTreeMap<_, _> = for_original(dir.path(), true, None).unwrap().into_iter().collect();
    assert!(files["tokenizer.model"] == fs::read(model).unwrap());
    // The demo model's are of that kind.
    let (demo, original, back) = (support::root().join("models/demo"), dir.path().join("llava"), dir.path().join("back"));
    exported(&demo, &original, Target::Original);
    exported(&original, &back, Target::Hf);
    assert!(original.join("tokenizer.json").exists() && !original.join("tokenizer.model").exists());
    let question = "USER: <image>\nWhat colour is the circle? ASSISTANT:";
    let ids = |folder: &Path| {
        let mut engine = Engine::open(folder, &EngineOptions { threads: 1, ..EngineOptions::default() }).unwrap();
        engine.score(&Prompt::raw(question), &[image(&fixture("images/square.png"))]).unwrap()
    };
    let [source, original, back] = [&demo, &original, &back].map(|folder| ids(folder));
    for other in [&original, &back] {
        let text = |score: &Score| score.input_ids.iter().copied().filter(|id| ![-200, 710].contains(id)).collect::<Vec<_>>();
        assert_eq!(text(other), text(&source));
        assert!(other.last_logits[..710] == source.last_logits[..710]);
    }
}

/// A template as Jinja says what the template says.
#[test]
fn chat_templates_are_those_of_the_conversation() {
    let tokenizer = Tokenizer::open(source("hf_mha_f32")).unwrap();
    let mut without = Vec::new();
    for name in Template::names() {
        let template = Template::by_name(name).unwrap();
        let Some(jinja) = template.to_jinja() else {
            without.push(name);
            continue;
        };
        let jinja = ChatTemplate::parse(name, &jinja).unwrap();
        for system in [None, Some("Be \"brief\".")] {
            let mut conversation = Conversation::new(template);
            let mut messages = Vec::new();
            if let Some(words) = system {
                conversation = conversation.with_system(words);
                messages.push(Message::new("system", 0, words));
            }
            for (i, (text, n_images)) in [("What?", 2), ("A cat's\nhat {{ x }}", 0), ("And here", 1)].into_iter().enumerate() {
                if i % 2 == 0 {
                    conversation.add_user(text, n_images)
                } else {
                    conversation.add_assistant(text)
                };
                messages.push(Message::new(if i % 2 == 0 { "user" } else { "assistant" }, n_images, text));
            }
            let rendered = jinja.render(&messages, &tokenizer, true).unwrap();
            assert_eq!(rendered.to_string(), conversation.prompt().to_string(), "{name} {system:?}");
            assert_eq!(rendered.n_images(), 3);
        }
    }
    // One that comes with the checkpoint goes there and back; what a killed export left is in nobody's way.
    let (dir, demo) = (tempfile::tempdir().unwrap(), support::root().join("models/demo"));
    let [there, back] = ["llava-v1", "back"].map(|name| dir.path().join(name));
    exported(&demo, &there, Target::Original);
    fs::create_dir_all(back.join(".partial/x")).unwrap();
    exported(&there, &back, Target::Hf);
    let own = |folder: &Path| Checkpoint::open(folder, None).unwrap().chat_template.unwrap();
    assert_eq!(own(&back), own(&demo));
    let others = ["v1_mmtag", "v0", "default", "v0_mmtag", "llava_llama_2", "llama_2", "mistral_instruct", "plain", "v0_plain"];
    assert_eq!(without, others);
}

#[test]
fn an_exported_folder_is_asked_as_the_source_was() {
    let dir = tempfile::tempdir().unwrap();
    let (model, hf) = (dir.path().join("llava-v1-tuned"), dir.path().join("hf"));
    copy_dir(&source("orig_gqa_bf16"), &model);
    let [from, to] = [&model, &hf].map(|path| path.to_str().unwrap());
    succeed(&["export", "--model", from, "--to", "hf", "--output", to]);
    let file = fixture("images/square.png");
    let ask = |model: &str| -> Value {
        let args = ["generate", "--json", "--temperature", "0", "--max-new-tokens", "9", "--prompt", "Where?", "--image"];
        let rest = [file.to_str().unwrap(), "--dtype", "f32", "--model", model];
        serde_json::from_str(&succeed(&[&args[..], &rest].concat())).unwrap()
    };
    let (before, after) = (ask(from), ask(to));
    assert_eq!(after["token_ids"], before["token_ids"]);
    assert_eq!(after["usage"]["prompt_tokens"], before["usage"]["prompt_tokens"]);
    let chat = |name: &str| fs::read_to_string(dir.path().join(name).join("chat_template.jinja"));
    assert!(chat("hf").unwrap().contains("ASSISTANT"));
    succeed(&["export", "--model", from, "--to", "hf", "--template", "mpt", "--output", dir.path().join("mpt").to_str().unwrap()]);
    assert!(chat("mpt").unwrap().contains("<|im_start|>"));
    // One that Jinja is not written for is left out, and that is said.
    let report = try_export(&model, &dir.path().join("none"), &Options { name: "llava-llama-2-13b", ..OPTIONS }).unwrap();
    assert!(chat("none").is_err() && report.notes.iter().any(|note| note.contains("no chat template")), "{:?}", report.notes);
}

/// Changes a JSON file.
fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut json: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

#[test]
fn what_cannot_be_exported_says_why_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let output = path("output");
    let refused = |model: &Path, options: &Options, what: &str| {
        let error = try_export(model, &output, options).unwrap_err();
        assert!(error.contains(what) && !error.contains('\n'), "{error}");
        assert!(!output.exists(), "{error}");
    };
    let original = Options { to: Target::Original, ..OPTIONS };
    for (name, what) in [
        ("orig_f16_safetensors", "a projector `linear` in llava-hf"),
        ("orig_projector_over_base", "a projector `mlp3x_gelu` in llava-hf"),
        ("orig_identity_f16", "a projector `identity` in llava-hf"),
    ] {
        refused(&source(name), &OPTIONS, what);
    }
    copy_dir(&source("hf_mha_f32"), &path("quick"));
    edit(&path("quick/config.json"), |json| json["projector_hidden_act"] = "quick_gelu".into());
    refused(&path("quick"), &original, "LLaVA's own code has gelu there");

    // Not whole: a tensor, the tower, the end of a file.
    copy_dir(&source("hf_mha_f32"), &path("layers"));
    edit(&path("layers/config.json"), |json| json["text_config"]["num_hidden_layers"] = 3.into());
    refused(&path("layers"), &original, "llama.layers.2.");
    edit(&path("layers/config.json"), |json| {
        json["text_config"]["num_hidden_layers"] = 2.into();
        json["text_config"]["vocab_size"] = 329.into();
    });
    refused(&path("layers"), &original, "[328, 32], but the configuration says [329, 32]");
    copy_dir(&source("orig_mha_f32"), &path("towerless"));
    refused(&path("towerless"), &OPTIONS, "the vision tower");
    copy_dir(&source("hf_gqa_f16"), &path("cut"));
    let weights = fs::read(path("cut/model.safetensors")).unwrap();
    fs::write(path("cut/model.safetensors"), &weights[..weights.len() - 1]).unwrap();
    refused(&path("cut"), &original, "model.safetensors");

    // Packed, by us and by others.
    let [from, to] = [source("hf_gqa_bf16"), path("packed")].map(|path| path.to_str().unwrap().to_owned());
    succeed(&["quantize", "--model", &from, "--output", &to, "--bits", "8", "--group-size", "32"]);
    refused(&path("packed"), &original, "is packed already (by quantize");
    refused(&fixture("gguf/mha_q/model.gguf"), &OPTIONS, "is packed already (a GGUF file)");
    let no_jinja = Options { template: Some("plain"), ..OPTIONS };
    refused(&source("orig_mha_f32"), &no_jinja, "the template plain cannot be written as a chat template");

    // Beyond f16.
    copy_dir(&source("hf_mha_f32"), &path("large"));
    let file = path("large/model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&70000f32.to_le_bytes());
    fs::write(&file, bytes).unwrap();
    let error = try_export(&path("large"), &output, &Options { dtype: Some(DType::F16), ..original }).unwrap_err();
    assert!(error.contains("beyond 65504"), "{error}");
    assert_eq!(fs::read_dir(&output).unwrap().count(), 0, "what was begun is gone");

    fs::write(output.join("notes.txt"), "mine").unwrap();
    let error = try_export(&source("hf_mha_f32"), &output, &original).unwrap_err();
    assert!(error.contains("is not empty (it has notes.txt)"), "{error}");
    assert_eq!(fs::read_dir(&output).unwrap().count(), 1);
}

#[test]
fn wrong_usage_is_told_before_anything_is_read() {
    let run = |flags: &[&str]| fail(&[&["export", "--model", "/nowhere", "--output", "/nowhere/else"], flags].concat());
    for (flags, what) in [
        (&["--to", "gguf"][..], "[possible values: hf, original]"),
        (&[], "--to"),
        (&["--to", "hf", "--dtype", "int8"], "use f32, f16 or bf16"),
        (&["--to", "hf", "--max-shard-gb", "0"], "expected a positive number"),
        (&["--to", "hf", "--max-shard-gb", "nan"], "expected a positive number"),
        (&["--to", "original", "--template", "v1"], "--template goes with --to hf"),
        (&["--to", "hf", "--template", "v9"], "no conversation template `v9`"),
    ] {
        let (code, message) = run(flags);
        assert!(code == 2 && message.contains(what), "{flags:?}: {code} {message}");
    }
    assert_eq!(run(&["--to", "hf"]).0, 1);
}

/// A disk that is full, by a limit on the size of files: the error names the file, and nothing is left of what was written before it.
#[test]
fn a_full_disk_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("llava");
    let script = format!(
        "trap '' XFSZ; ulimit -f 200; '{}' export --to original --model '{}' --output '{}'; echo code $?",
        env!("CARGO_BIN_EXE_llava-engine"),
        source("hf_mha_f32").display(),
        output.display()
    );
    let ran = Command::new("sh").args(["-c", &script]).output().unwrap();
    let (out, message) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(out.contains("code 1") && message.contains("model.safetensors") && message.contains("too large"), "{out} {message}");
    assert_eq!(fs::read_dir(&output).unwrap().count(), 0);
    exported(&source("hf_mha_f32"), &output, Target::Original);
}
