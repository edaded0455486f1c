//! Adapters over models that stay as they are, and merged into them, against PEFT's logits (tools/reference/make_lora.py); and adapters that
//! do not fit, or say what is not supported.

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use llava_engine::cpu::Cpu;
use llava_engine::device::Device;
use llava_engine::dtype::DType;
use llava_engine::engine::{Engine, EngineOptions};
use llava_engine::model::checkpoint::Checkpoint;
use llava_engine::model::merge::{Merged, merge};
use llava_engine::text::Prompt;
use llava_engine::weights::adapter::Adapter;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use support::program::{copy_dir, fail, quantize, succeed};
use support::reference::Reference;
use support::{Bound, assert_close, cosine, fixture, image, kernel_device};
use tempfile::TempDir;

/// As PEFT writes it; all linear layers, spelt as under transformers 4, in a pickle; as LLaVA's own trainer leaves it.
const FOLDERS: [&str; 3] = ["peft", "rslora", "official"];

/// What PEFT makes of a folder over a checkpoint.
struct Expected {
    folder: PathBuf,
    checkpoint: PathBuf,
    prompt: String,
    image: PathBuf,
    logits: Vec<f32>,
}

impl Expected {
    fn read(name: &str) -> Self {
        let folder = fixture("lora").join(name);
        let json: Value = serde_json::from_slice(&fs::read(folder.join("expected.json")).unwrap()).unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        Self {
            checkpoint: fixture("checkpoints").join(text(&json["checkpoint"])),
            prompt: text(&json["prompt"]),
            image: fixture("images").join(text(&json["images"][0])),
            logits: Reference::read(&format!("lora/{name}/expected.safetensors")).f32("logits"),
            folder,
        }
    }
}

/// Logits of all rows: of the whole prompt in one pass; of the last row alone, which the last layer is run for alone; and of the last row
/// in a pass of its own.
fn logits(model: &Path, lora: Option<&Path>, expected: &Expected, device: Device) -> [Vec<f32>; 3] {
    logits_in(DType::F32, model, lora, expected, device)
}

fn logits_in(dtype: DType, model: &Path, lora: Option<&Path>, expected: &Expected, device: Device) -> [Vec<f32>; 3] {
    let options = EngineOptions { device, dtype: Some(dtype), threads: 2, lora: lora.map(Path::to_owned), ..Default::default() };
    let mut engine = Engine::open(model, &options).unwrap();
    let slots = engine.tokenize(&Prompt::raw(&expected.prompt), 1).unwrap().slots;
    let pixels = engine.preprocess(&[image(&expected.image)]).unwrap();
    let features = engine.encode_image(&pixels).unwrap();
    let mut runner = engine.into_runner();
    let last = slots.len() - 1;
    let mut run = |passes: &[(usize, usize, usize)]| {
        let (mut table, mut all) = (runner.kv().sequence(), Vec::new());
        for &(past, end, first_output) in passes {
            let take = |logits: &[f32]| all.extend_from_slice(logits);
            runner.extend(&mut table, past, &slots[past..end], Some(&features), first_output, take).unwrap();
        }
        all
    };
    [run(&[(0, last + 1, 0)]), run(&[(0, last + 1, last)]), run(&[(0, last, last), (last, last + 1, 0)])]
}

/// Sums of f32 in another order than PyTorch's, as in tests/stages.rs, of values that an adapter has made larger.
const F32: Bound = Bound { abs: 2e-5, rel_to_max: 5e-5 };

#[test]
fn adapters_of_peft_and_of_llava_give_their_logits_unmerged() {
    for device in [Device::Cpu].into_iter().chain(kernel_device()) {
        for name in FOLDERS {
            let expected = Expected::read(name);
            let [whole, last, step] = logits(&expected.checkpoint, Some(&expected.folder), &expected, device);
            assert_close(&format!("{name} on {device}"), &whole, &expected.logits, F32);
            let row = &expected.logits[expected.logits.len() - last.len()..];
            assert_close(&format!("{name} on {device}: the last row alone"), &last, row, F32);
            assert_close(&format!("{name} on {device}: the last row in a step"), &step, row, F32);
            let [base, ..] = logits(&expected.checkpoint, None, &expected, device);
            let off = base.iter().zip(&expected.logits).map(|(b, e)| (b - e).abs()).fold(0.0, f32::max);
            assert!(off > 0.5, "{name}: without the adapter logits are the same to {off}");
        }
    }
}

/// In 16 bits factors are rounded, and sums after each product.
#[test]
fn adapters_run_in_16_bits() {
    for device in [Device::Cpu].into_iter().chain(kernel_device()) {
        for dtype in [DType::Bf16, DType::F16] {
            let expected = Expected::read("rslora");
            let [_, last, step] = logits_in(dtype, &expected.checkpoint, Some(&expected.folder), &expected, device);
            let row = &expected.logits[expected.logits.len() - last.len()..];
            for got in [last, step] {
                let cosine = cosine(&got, row);
                assert!(cosine > 0.999, "{dtype} on {device}: cosine {cosine}");
            }
        }
    }
}

#[test]
fn merged_checkpoints_give_the_same_logits() {
    let ops = Cpu::new(2, DType::F32).unwrap();
    for (name, n_added, n_replaced) in [("peft", 14 + 1 + 12, 5), ("rslora", 14 + 24 + 2, 0), ("official", 14 + 12, 4)] {
        let expected = Expected::read(name);
        let output = tempfile::tempdir().unwrap();
        let checkpoint = Checkpoint::open(&expected.checkpoint, None).unwrap();
        let adapter = Adapter::open(&expected.folder).unwrap();
        let merged = merge(&ops, &expected.checkpoint, &checkpoint, &adapter, output.path()).unwrap();
        assert_eq!(merged, Merged { n_added, n_replaced }, "{name}");
        let [whole, ..] = logits(output.path(), None, &expected, Device::Cpu);
        assert_close(name, &whole, &expected.logits, F32);
        let error = merge(&ops, &expected.checkpoint, &checkpoint, &adapter, output.path()).unwrap_err().to_string();
        assert!(error.contains("not empty"), "{error}");
    }
}

#[test]
fn the_program_takes_adapters() {
    let Expected { folder, checkpoint, prompt, image, logits } = Expected::read("peft");
    let dir = tempfile::tempdir().unwrap();
    let (dump, merged) = (dir.path().join("dump.safetensors"), dir.path().join("merged"));
    let [folder, checkpoint, image, dump, merged] =
        [&folder, &checkpoint, &image, &dump, &merged].map(|path| path.to_str().unwrap());
    let report = succeed(&["merge", "--model", checkpoint, "--lora", folder, "--output", merged, "--json"]);
    assert_eq!(serde_json::from_str::<Value>(&report).unwrap()["merged"], json!({"n_added": 27, "n_replaced": 5}));
    for model in [&["--model", checkpoint, "--lora", folder][..], &["--model", merged]] {
        succeed(&[&["score", "--image", image, "--raw-prompt", &prompt, "--dump", dump, "--dtype", "f32"], model].concat());
        let bytes = fs::read(dump).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let got: Vec<f32> = bytemuck::pod_collect_to_vec(file.tensor("last_logits").unwrap().data());
        assert_close("score", &got, &logits[logits.len() - got.len()..], F32);
    }
    let bench = ["bench", "--prompt-tokens", "40", "--new-tokens", "2", "--repeat", "1", "--batch-size", "1", "--json"];
    succeed(&[&bench[..], &["--model", checkpoint, "--lora", folder]].concat());
    assert_eq!(fail(&[&bench[..], &["--lora", folder]].concat()).0, 2);
}

/// A copy of a folder of adapters.
fn copy(name: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy_dir(&fixture("lora").join(name), dir.path());
    dir
}

/// What is said of an adapter over a checkpoint.
fn refusal(lora: &Path, checkpoint: &str) -> String {
    let options = EngineOptions { device: Device::Cpu, lora: Some(lora.to_owned()), ..Default::default() };
    match Engine::open(fixture("checkpoints").join(checkpoint), &options) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("{} was taken over {checkpoint}", lora.display()),
    }
}

fn assert_says(error: &str, words: &[&str]) {
    assert!(words.iter().all(|word| error.contains(word)), "{error}: expected {words:?}");
}

/// Changes a key of a folder's configuration.
fn configure(dir: &Path, key: &str, value: Value) {
    let path = dir.join("adapter_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config[key] = value;
    fs::write(path, config.to_string()).unwrap();
}

#[test]
fn adapters_of_other_models_are_refused() {
    // Of a decoder of another width, whose projector has another too.
    let error = refusal(&fixture("lora/peft"), "hf_gqa_bf16");
    assert_says(&error, &["multi_modal_projector.linear_1.bias", "[32]", "[48]"]);
    let error = refusal(&fixture("lora/rslora"), "hf_gqa_bf16");
    assert_says(
        &error,
        &["multi_modal_projector.linear_1.lora_B", "has shape [32, 2]", "a matrix [48, 32] of this model", "[48, 2]"],
    );
    let dir = copy("peft");
    let path = dir.path().join("adapter_model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let renamed = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let text = replaced(&bytes, from, to);
        fs::write(&path, text).unwrap();
        refusal(dir.path(), "hf_mha_f32")
    };
    let error = renamed("language_model.layers.1.mlp.up_proj", "language_model.layers.7.mlp.up_proj");
    assert_says(&error, &["layers.7.mlp.up_proj.lora_A", "another model's"]);
    let error = renamed("layers.1.mlp.up_proj.lora_B", "layers.1.mlp.up_proj.lora_C");
    assert_says(&error, &["layers.1.mlp.up_proj.lora_C", "another kind"]);
    let error = renamed("layers.1.mlp.up_proj.lora", "layers.1.mlp.xx_proj.lora");
    assert_says(&error, &["layers.1.mlp.xx_proj.lora_A", "does not have"]);
    let error = renamed("multi_modal_projector.linear_2.bias", "multi_modal_projector.linear_9.bias");
    assert_says(&error, &["linear_9.bias", "another model's"]);
    let error = renamed("layers.1.mlp.up_proj.lora_B", "layers.9.mlp.up_proj.lora_B");
    assert_says(&error, &["layers.1.mlp.up_proj.lora_A", "counterpart"]);
    // A layer of the tower that is there and not run may have an addition, one that is not there may not.
    let error = renamed("encoder.layers.3.self_attn.q_proj", "encoder.layers.4.self_attn.q_proj");
    assert_says(&error, &["layers.4.self_attn.q_proj.lora_A", "another model's"]);
}

/// The bytes of a file with a text exchanged for one as long.
fn replaced(bytes: &[u8], from: &str, to: &str) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let places: Vec<_> = (0..bytes.len() - from.len()).filter(|&i| bytes[i..].starts_with(from.as_bytes())).collect();
    assert!(!places.is_empty(), "no {from}");
    places.into_iter().for_each(|i| bytes[i..i + to.len()].copy_from_slice(to.as_bytes()));
    bytes
}

#[test]
fn adapters_that_are_not_whole_are_refused() {
    for (name, removed, words) in [
        ("peft", "adapter_config.json", &["no adapter_config.json", "a folder without it"][..]),
        ("official", "adapter_config.json", &["no adapter_config.json", "a checkpoint"]),
        ("peft", "adapter_model.safetensors", &["no adapter_model.safetensors and no .bin"]),
        ("official", "non_lora_trainables.bin", &["non_lora_trainables.bin is missing", "projector"]),
    ] {
        let dir = copy(name);
        fs::remove_file(dir.path().join(removed)).unwrap();
        assert_says(&refusal(dir.path(), "hf_mha_f32"), words);
    }
    assert_says(&refusal(Path::new("/nowhere"), "hf_mha_f32"), &["/nowhere"]);
    for (name, file) in
        [("peft", "adapter_model.safetensors"), ("rslora", "adapter_model.bin"), ("official", "non_lora_trainables.bin")]
    {
        let dir = copy(name);
        let path = dir.path().join(file);
        let bytes = fs::read(&path).unwrap();
        for n in [0, 7, 100, bytes.len() / 2, bytes.len() - 1] {
            fs::write(&path, &bytes[..n]).unwrap();
            let checkpoint = if name == "official" { "orig_mha_f32" } else { "hf_mha_f32" };
            assert_says(&refusal(dir.path(), checkpoint), &[file]);
        }
    }
    let dir = copy("peft");
    fs::write(dir.path().join("adapter_config.json"), "{\"r\": 3").unwrap();
    assert_says(&refusal(dir.path(), "hf_mha_f32"), &["adapter_config.json"]);
}

#[test]
fn settings_without_an_equal_are_refused_by_name() {
    for (key, value, words) in [
        ("r", json!(0), &["`r` is 0"][..]),
        ("r", json!(5), &["lora_A", "rank 5"]),
        ("rank_pattern", json!({}), &["down_proj.lora_A", "rank 3"]),
        ("lora_alpha", Value::Null, &["adapter_config.json"]),
        ("use_dora", json!(true), &["`use_dora`"]),
        ("init_lora_weights", json!("pissa"), &["`init_lora_weights`", "pissa"]),
        ("bias", json!("lora_only"), &["`bias`", "lora_only"]),
        ("alpha_pattern", json!({"^model.*": 4}), &["`alpha_pattern`", "regular expressions"]),
        ("peft_type", json!("LOHA"), &["LOHA"]),
    ] {
        let dir = copy("peft");
        configure(dir.path(), key, value);
        assert_says(&refusal(dir.path(), "hf_mha_f32"), words);
    }
}

/// A checkpoint of integers has no room for sums; it takes adapters over it.
#[test]
fn packed_checkpoints_take_adapters_and_are_not_merged() {
    let Expected { folder, checkpoint, image, .. } = Expected::read("peft");
    let dir = tempfile::tempdir().unwrap();
    let (packed, merged) = (dir.path().join("packed"), dir.path().join("merged"));
    quantize(&checkpoint, &packed, &["--bits", "8"]);
    let [folder, packed, merged, image] = [&folder, &packed, &merged, &image].map(|path| path.to_str().unwrap());
    let prompt = ["--image", image, "--prompt", "What is this?", "--max-new-tokens", "2"];
    succeed(&[&["generate", "--model", packed, "--lora", folder][..], &prompt].concat());
    let (code, error) = fail(&["merge", "--model", packed, "--lora", folder, "--output", merged]);
    assert_eq!(code, 1);
    assert_says(&error, &["is packed", "by quantize"]);
    assert!(!Path::new(merged).exists());
    // An adapter is no model.
    let (_, error) = fail(&[&["generate", "--model", folder][..], &prompt].concat());
    assert_says(&error, &["a LoRA adapter", "--lora"]);
}
