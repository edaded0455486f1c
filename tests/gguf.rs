//! GGUF checkpoints, against those that they were made from (tools/reference/make_gguf.py) and the `gguf` package's own dequantization.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use half::f16;
use llava_engine::device::Device;
use llava_engine::dtype::DType;
use llava_engine::engine::{Engine, EngineOptions, Score, Turn};
use llava_engine::model::checkpoint::{Beside, Checkpoint};
use llava_engine::model::config::{Activation, Fit, ProjectorConfig, RopeScaling};
use llava_engine::ops::Packed;
use llava_engine::ops::packed::Format;
use llava_engine::text::{Prompt, PromptPart};
use llava_engine::weights::gguf::Gguf;
use llava_engine::weights::names::Part;
use llava_engine::weights::{Source, Store};
use safetensors::SafeTensors;
use serde_json::Value;
use support::{Bound, assert_close, fixture, image, kernel_device};

fn open(model: &Path, device: Device, dtype: Option<DType>) -> Engine {
    let options = EngineOptions { device, dtype, threads: 2, ..Default::default() };
    Engine::open(model, &options).unwrap_or_else(|e| panic!("{} on {device}: {e}", model.display()))
}

fn score(engine: &mut Engine, images: &[&str], prompt: &str) -> Score {
    let images: Vec<_> = images.iter().map(|name| image(&fixture("images").join(name))).collect();
    engine.score(&Prompt::raw(prompt), &images).unwrap()
}

/// Tensors of a safetensors file as f32.
fn floats(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.iter()
        .filter(|(_, t)| t.dtype() == safetensors::Dtype::F32)
        .map(|(n, t)| (n.to_owned(), bytemuck::pod_collect_to_vec(t.data())))
        .collect()
}

/// The very weights of two original checkpoints: what transformers makes of those is what these must make.
#[test]
fn files_of_known_weights_answer_as_transformers_does() {
    for (name, original) in [("mha_f32", "orig_mha_f32"), ("gqa_bf16", "orig_gqa_bf16")] {
        let folder = fixture("checkpoints").join(original);
        let cases: Value = serde_json::from_slice(&fs::read(folder.join("expected.json")).unwrap()).unwrap();
        let expected = floats(&folder.join("expected.safetensors"));
        let file = fs::read(folder.join("expected.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&file).unwrap();
        for device in [Device::Cpu].into_iter().chain(kernel_device()) {
            let mut engine = open(&fixture("gguf").join(name), device, Some(DType::F32));
            let mut n_compared = 0;
            for (i, case) in cases["cases"].as_array().unwrap().iter().enumerate() {
                let prompt = case["prompt"].as_str().unwrap();
                // llama.cpp puts a space behind </s>, which that checkpoint (legacy: false) does not.
                if name == "mha_f32" && prompt.contains("</s>") {
                    continue;
                }
                let images: Vec<_> =
                    case["images"].as_array().unwrap().iter().map(|i| i.as_str().unwrap().rsplit('/').next().unwrap()).collect();
                let got = score(&mut engine, &images, prompt);
                let what = |what: &str| format!("{name} case {i} on {device}: {what}");
                let ids: Vec<i64> = bytemuck::pod_collect_to_vec(file.tensor(&format!("case{i}.input_ids")).unwrap().data());
                assert_eq!(got.input_ids, ids, "{}", what("ids"));
                let of = |kind: &str| &expected[&format!("case{i}.{kind}")];
                if let Some(pixels) = &got.pixel_values {
                    assert_close(&what("pixels"), pixels.as_slice(), of("pixel_values"), Bound::abs(1e-6));
                    let bound = Bound { abs: 2e-5, rel_to_max: 2e-5 };
                    assert_close(&what("features"), &got.image_features.as_ref().unwrap().to_f32(), of("image_features"), bound);
                }
                assert_close(&what("logprobs"), &got.logprobs, of("logprobs"), Bound::abs(1e-3));
                assert_close(&what("last logits"), &got.last_logits, of("last_logits"), Bound::abs(1e-3));
                n_compared += 1;
            }
            assert!(n_compared >= 2, "{name}");
        }
    }
}

#[test]
fn metadata_becomes_a_configuration() {
    let of = |name| Checkpoint::open(&fixture("gguf").join(name), None).unwrap();
    let (old, new) = (of("mha_f32"), of("gqa_bf16"));
    let original = Checkpoint::open(&fixture("checkpoints/orig_mha_f32"), None).unwrap().config;
    let (mut text, mut vision) = (old.config.text.clone(), old.config.vision.clone());
    assert_eq!((text.max_position_embeddings, old.config.context_tokens), (512, 512));
    text.max_position_embeddings = original.text.max_position_embeddings;
    vision.n_layers = original.vision.n_layers; // the file has but those that are needed
    assert_eq!((&text, &vision, &old.config.preprocess), (&original.text, &original.vision, &original.preprocess));
    assert_eq!((old.config.n_vision_layers, new.config.n_vision_layers, new.config.vision.n_layers), (3, 3, 4));
    assert_eq!((old.config.preprocess.fit, new.config.preprocess.fit), (Fit::Pad, Fit::Crop));
    let text = &new.config.text;
    assert_eq!((text.n_heads, text.n_kv_heads, text.rope_theta, text.tie_word_embeddings), (4, 2, 1e6, false));
    assert_eq!(text.rope_scaling, RopeScaling::Divisors(vec![2.0; 4]));
    assert_eq!(new.config.projector, ProjectorConfig::Mlp { n_linear: 2, activation: Activation::Gelu });
    assert_eq!((new.config.vision.activation, new.config.eos_token_ids.as_slice()), (Activation::QuickGelu, &[2][..]));
    let layout = old.layout.to_string();
    assert!(layout.starts_with("GGUF, ") && layout.contains("model.gguf") && layout.contains("mmproj.gguf"), "{layout}");
}

/// The checkpoint that `mha_q` is of, in f32, as its blocks are defined.
fn dense_twin() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let original = fixture("checkpoints/orig_mha_f32");
    for name in ["tokenizer.model", "tokenizer_config.json"] {
        fs::copy(original.join(name), dir.path().join(name)).unwrap();
    }
    fs::copy(fixture("gguf/mha_q/dense.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(original.join("config.json")).unwrap()).unwrap();
    config["mm_vision_tower"] = fixture("checkpoints/clip-tower").to_str().unwrap().into();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

#[test]
fn q4_0_and_q8_0_are_packed_exactly() {
    let twin = dense_twin();
    let (packed, dense) = (Checkpoint::open(&fixture("gguf/mha_q"), None).unwrap(), Checkpoint::open(twin.path(), None).unwrap());
    let mut n = BTreeMap::<String, usize>::new();
    for entry in packed.weights.entries() {
        let Some(name) = &entry.canonical else { continue };
        let expected = dense.weights.tensor(name, &entry.shape).unwrap().to_f32();
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let matrix = match entry.shape.as_slice() {
            [rows, k] => packed.weights.packed(module, *rows, *k).unwrap(),
            _ => None,
        };
        let stored = entry.dtype.to_string();
        *n.entry(stored.clone()).or_default() += 1;
        match matrix {
            Some(matrix) => {
                let bits = if stored == "Q4_0" { 4 } else { 8 };
                assert_eq!(matrix.format(), Format { bits, group: 32, has_offsets: false }, "{name}");
                assert!(matrix.to_f32() == expected, "{name} ({stored})");
            }
            None => {
                let got = packed.weights.tensor(name, &entry.shape).unwrap().to_f32();
                assert!(got == expected, "{name} ({stored})");
            }
        }
    }
    // Matrices of rows of 48 are in f16, all norms and biases in f32.
    assert!(n["Q4_0"] == 1 + 2 * 5 && n["Q8_0"] > 10 && n["f16"] > 5 && n["f32"] > 20, "{n:?}");

    let (mut packed, mut dense) =
        (open(&fixture("gguf/mha_q"), Device::Cpu, None), open(twin.path(), Device::Cpu, Some(DType::F32)));
    assert_eq!(packed.compute_dtype(), DType::F16);
    let prompt = "USER: <image>\nWhat is in the image? ASSISTANT:";
    let (packed, dense) = (score(&mut packed, &["odd.png"], prompt), score(&mut dense, &["odd.png"], prompt));
    let of = |of: fn((f64, f64)) -> f64| -> f64 {
        packed.last_logits.iter().zip(&dense.last_logits).map(|(a, b)| of((f64::from(*a), f64::from(*b)))).sum()
    };
    // Products round activations to 8 bits: 3 % here; one matrix in a wrong order gives about all of it.
    let share = (of(|(a, b)| (a - b).powi(2)) / of(|(_, b)| b * b)).sqrt();
    assert!(share < 0.06, "logits are off by {share} of them");
}

/// The tensors of `blocks.gguf`, in heads of 8 rows, and what they should be.
fn blocks() -> (Store, BTreeMap<String, Vec<f32>>) {
    let path = fixture("gguf/blocks.gguf");
    let mut store = Store::new(&path);
    store.add_gguf(&path, &Gguf::open(&path).unwrap(), &[Part::Llama], Some(8)).unwrap();
    (store, floats(&fixture("gguf/blocks.safetensors")))
}

/// Rows of heads of 8 from llama.cpp's pairs back to halves.
fn unpaired(rows: &[f32], k: usize) -> Vec<f32> {
    let row = |r: usize| r / 8 * 8 + [0, 2, 4, 6, 1, 3, 5, 7][r % 8];
    (0..rows.len() / k).flat_map(|r| rows[row(r) * k..][..k].to_vec()).collect()
}

fn packed_block(store: &Store, module: &str, n: usize, k: usize) -> Packed {
    store.packed(module, n, k).unwrap().unwrap_or_else(|| panic!("{module} is not packed"))
}

#[test]
fn q4_k_is_packed_with_offsets_within_its_bound() {
    let (store, expected) = blocks();
    for (module, name, n, k) in [
        ("llama.layers.0.self_attn.v_proj", "blk.0.attn_v.weight", 19, 512),
        ("llama.layers.0.self_attn.q_proj", "blk.0.attn_q.weight", 16, 256),
    ] {
        let packed = packed_block(&store, module, n, k);
        assert_eq!(packed.format(), Format { bits: 4, group: 32, has_offsets: true });
        let expected = if name.contains("attn_q") { unpaired(&expected[name], k) } else { expected[name].clone() };
        let mut n_rounded = 0;
        for (i, (got, expected)) in packed.to_f32().into_iter().zip(expected).enumerate() {
            let (scale, offset) = packed.scale_offset(i / k, i % k);
            let parts = scale * f32::from(packed.q(i / k, i % k)) - offset;
            let bound = parts * (1.0 + 2e-3) / 2048.0 + 1.0 / f32::from(1u16 << 15) / 64.0;
            assert!((got - expected).abs() <= bound, "{module} {i}: {got}, not {expected}; {bound} is allowed");
            n_rounded += usize::from(got != expected);
        }
        assert!(n_rounded > 0, "the bound is of something that does not happen");
    }
}

#[test]
fn what_has_no_equal_is_rounded_to_8_bits_by_half_a_step_at_most() {
    let (store, expected) = blocks();
    for (module, name, n, k) in [
        ("llama.layers.0.mlp.down_proj", "blk.0.ffn_down.weight", 19, 512),
        ("llama.layers.1.mlp.down_proj", "blk.1.ffn_down.weight", 19, 512), // Q5_K
        ("llama.layers.1.mlp.up_proj", "blk.1.ffn_up.weight", 19, 96),      // Q5_1
        ("llama.layers.0.self_attn.k_proj", "blk.0.attn_k.weight", 16, 256),
        ("llama.lm_head", "output.weight", 5, 256),
    ] {
        let packed = packed_block(&store, module, n, k);
        assert_eq!(packed.format(), Format { bits: 8, group: 32, has_offsets: false });
        let expected = if name.contains("attn_k") { unpaired(&expected[name], k) } else { expected[name].clone() };
        let got = packed.to_f32();
        for (g, (got, expected)) in got.chunks(32).zip(expected.chunks(32)).enumerate() {
            let (scale, _) = packed.scale_offset(g * 32 / k, g * 32 % k);
            let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            assert!((scale - largest / 127.0).abs() <= scale / 1024.0, "{module} group {g}: scale {scale}, largest {largest}");
            for (got, expected) in got.iter().zip(expected) {
                assert!((got - expected).abs() <= 0.501 * scale, "{module} group {g}: {got}, not {expected}; scale {scale}");
            }
        }
    }
}

#[test]
fn other_blocks_of_more_rows_than_a_tile_are_exact() {
    let (store, expected) = blocks();
    for (module, name, bits, has_offsets) in [
        ("llama.layers.0.mlp.up_proj", "blk.0.ffn_up.weight", 4, false),
        ("llama.layers.0.mlp.gate_proj", "blk.0.ffn_gate.weight", 8, false),
        ("llama.layers.1.self_attn.v_proj", "blk.1.attn_v.weight", 4, true), // Q4_1
        ("llama.layers.1.self_attn.o_proj", "blk.1.attn_output.weight", 8, false), // Q5_0
    ] {
        let packed = packed_block(&store, module, 19, 96);
        assert_eq!(packed.format(), Format { bits, group: 32, has_offsets }, "{module}");
        assert!(packed.to_f32() == expected[name], "{module}");
    }
    // Whatever it is in, a tensor may be asked for dense.
    for entry in store.entries() {
        let dense = store.tensor(entry.canonical.as_ref().unwrap(), &entry.shape).unwrap().to_f32();
        let expected = match entry.source.as_str() {
            name @ ("blk.0.attn_q.weight" | "blk.0.attn_k.weight") => unpaired(&expected[name], entry.shape[1]),
            name => expected[name].clone(),
        };
        assert!(dense.iter().zip(expected).all(|(got, w)| *got == f16::from_f32(w).to_f32()), "{}", entry.source);
    }
    let error = store.packed("llama.lm_head", 5, 512).unwrap_err().to_string();
    assert!(error.contains("`output.weight`") && error.contains("[5, 256]"), "{error}");
    let error = store.tensor("llama.layers.7.mlp.up_proj.weight", &[19, 96]).unwrap_err().to_string();
    assert!(error.contains("no file has any of `blk.7.ffn_up.weight`"), "{error}");
}

#[test]
fn the_template_is_vicunas_unless_the_file_tells_another() {
    let engine = open(&fixture("gguf/mha_f32"), Device::Cpu, None);
    assert_eq!(engine.template_name(), "vicuna_v1");
    let prompt = engine.prompt(None, &[Turn::user("Hi", 1)]).unwrap();
    let text: String = prompt.parts().unwrap().iter().map(|p| if let PromptPart::Text(t) = p { t.as_str() } else { "|" }).collect();
    assert!(text.ends_with("USER: |\nHi ASSISTANT:"), "{text}");
}

/// Runs the program; its exit code, and what it said.
fn llava(args: &[&str]) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_llava-engine"));
    let output = command.env_clear().env("HF_HUB_OFFLINE", "1").env("LLAVA_THREADS", "2").args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap(), text)
}

#[test]
fn files_are_found_by_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| -> PathBuf { dir.path().join(name) };
    let copy = |from: &str, to: &str| fs::copy(fixture("gguf").join(from), at(to)).map(|_| ()).unwrap();
    let refusal =
        |path: &Path, mmproj: Option<&Path>| Checkpoint::open(path, Beside { model_base: None, mmproj }).unwrap_err().to_string();
    copy("mha_f32/model.gguf", "ggml-model-f32.gguf");
    assert!(refusal(dir.path(), None).contains("name one with --mmproj FILE"));
    copy("mha_f32/mmproj.gguf", "a.gguf");
    let opened = |path: &Path| Checkpoint::open(path, None).unwrap().layout.to_string();
    assert!(opened(dir.path()).contains("ggml-model-f32.gguf, vision tower and projector in"));
    assert!(opened(&at("ggml-model-f32.gguf")).contains("a.gguf"));
    assert!(refusal(&at("a.gguf"), None).contains("name the language model with --model"));
    let error = refusal(&at("ggml-model-f32.gguf"), Some(&at("ggml-model-f32.gguf")));
    assert!(error.contains("general.architecture") && error.contains("clip"), "{error}");
    copy("mha_q/model.gguf", "q.gguf");
    let error = refusal(dir.path(), None);
    assert!(error.contains("2 files") && error.contains("q.gguf") && error.contains("--model FILE"), "{error}");
    assert!(opened(&at("q.gguf")).contains("a.gguf"));
    copy("gqa_bf16/mmproj.gguf", "b.gguf");
    assert!(refusal(&at("q.gguf"), None).contains("2 files"));
    Checkpoint::open(&at("q.gguf"), Beside { model_base: None, mmproj: Some(&at("a.gguf")) }).unwrap();
    // Under a name that says nothing, as in a cache.
    copy("mha_q/model.gguf", "blob");
    Checkpoint::open(&at("blob"), Beside { model_base: None, mmproj: Some(&at("a.gguf")) }).unwrap();
    let error = Checkpoint::open(&fixture("checkpoints/orig_mha_f32"), Beside { model_base: None, mmproj: Some(&at("a.gguf")) })
        .unwrap_err();
    assert!(error.to_string().contains("--mmproj belongs to a GGUF file"), "{error}");
}

#[test]
fn the_program_takes_them_and_does_not_pack_them_twice() {
    let model = fixture("gguf/mha_q/model.gguf");
    let (model, mmproj, picture) = (model.to_str().unwrap(), fixture("gguf/mha_q/mmproj.gguf"), fixture("images/odd.png"));
    let flags = ["--model", model, "--mmproj", mmproj.to_str().unwrap()];
    let (code, text) = llava(
        &[
            &["generate", "--image", picture.to_str().unwrap(), "--prompt", "What?", "--max-new-tokens", "4", "--device", "cpu"],
            &flags[..],
        ]
        .concat(),
    );
    assert_eq!(code, 0, "{text}");
    let (code, text) = llava(&[&["inspect"], &flags[..]].concat());
    assert!(code == 0 && text.contains("GGUF") && text.contains("Q4_0") && text.contains("Q8_0"), "{text}");
    // A model whose mmproj lies elsewhere.
    let dir = tempfile::tempdir().unwrap();
    let alone = dir.path().join("alone.gguf");
    fs::copy(model, &alone).unwrap();
    let bench = ["bench", "--prompt-tokens", "40", "--new-tokens", "2", "--repeat", "1", "--batch-size", "1", "--device", "cpu"];
    let bench = [&bench[..], &["--threads", "1", "--model", alone.to_str().unwrap()]].concat();
    let (code, text) = llava(&bench);
    assert!(code == 1 && text.contains("--mmproj"), "{text}");
    let (code, text) = llava(&[&bench, &flags[2..]].concat());
    assert!(code == 0 && text.contains("alone.gguf"), "{text}");
    let (code, text) = llava(&["quantize", "--bits", "8", "--model", model, "--output", dir.path().join("out").to_str().unwrap()]);
    assert!(code == 1 && text.contains("is packed already") && !dir.path().join("out").exists(), "{text}");
}
