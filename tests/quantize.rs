//! `quantize`: what it writes is the model that it read, rounded, in a folder that stands alone.

mod support;

use std::fs;
use std::path::Path;

use llava_engine::dtype::DType;
use llava_engine::model::checkpoint::Checkpoint;
use llava_engine::weights::Source;
use llava_engine::weights::write::{Planned, Writer};
use serde_json::Value;
use support::fixture;
use support::program::{break_weight, copy_dir, fail, quantize, succeed};

/// Log-probabilities of a prompt with a picture, on the CPU.
fn logprobs(model: &Path, flags: &[&str]) -> Vec<f64> {
    logprobs_on("cpu", model, flags)
}

fn logprobs_on(device: &str, model: &Path, flags: &[&str]) -> Vec<f64> {
    let image = fixture("images").join("square.png");
    let prompt = ["--raw-prompt", "USER: <image>\nWhat is this? ASSISTANT:", "--image", image.to_str().unwrap(), "--json"];
    let report = succeed(&[&["score", "--device", device, "--model", model.to_str().unwrap()], &prompt[..], flags].concat());
    let report: Value = serde_json::from_str(&report).unwrap();
    report["logprobs"].as_array().unwrap().iter().map(|l| l.as_f64().unwrap()).collect()
}

#[test]
fn every_layout_becomes_a_folder_that_stands_alone() {
    let dir = tempfile::tempdir().unwrap();
    let base = fixture("checkpoints/base-llama");
    let mut n_packed = 0;
    for (name, with_base) in [
        ("hf_mha_f32", false),
        ("hf_gqa_bf16", false),
        ("hf_gqa_f16", false),
        ("orig_mha_f32", false),
        ("orig_gqa_bf16", false),
        ("orig_f16_safetensors", false),
        ("orig_identity_f16", false),
        ("orig_projector_over_base", true),
    ] {
        let model = fixture("checkpoints").join(name);
        let output = dir.path().join(name);
        let base = if with_base { vec!["--model-base", base.to_str().unwrap()] } else { Vec::new() };
        let report = quantize(&model, &output, &[&["--bits", "8", "--group-size", "32"][..], &base].concat());
        let errors = report["tensors"].as_array().unwrap().iter().filter_map(|t| t["relative_error"].as_f64());
        n_packed += errors.clone().count();
        assert!(errors.clone().all(|e| e > 0.0 && e < 0.01), "{name}: {report}");
        // Elsewhere, and without what the old one leaned on.
        let moved = tempfile::tempdir().unwrap();
        copy_dir(&output, moved.path());
        let (before, after) = (logprobs(&model, &base), logprobs(moved.path(), &[]));
        assert_eq!(before.len(), after.len());
        // Of a tiny random model they spread over a dozen; rounding moves them by 2 to 4 % of that, a wrong matrix by more than the whole.
        let mean = before.iter().sum::<f64>() / before.len() as f64;
        let spread: f64 = before.iter().map(|a| (a - mean).powi(2)).sum();
        let moved: f64 = before.iter().zip(&after).map(|(a, b)| (a - b).powi(2)).sum();
        let share = (moved / spread).sqrt();
        assert!(share < 0.08, "{name}: log-probabilities moved by {share} of their spread");
        assert!(errors.count() == 0 || share > 0.0, "{name}: nothing was rounded");
    }
    assert!(n_packed > 50, "{n_packed}");
}

/// What is read back is what was written, to half a step of its scale.
#[test]
fn packed_matrices_are_those_of_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let model = fixture("checkpoints/hf_mha_f32");
    let four = ["--bits", "4", "--embedding-bits", "4", "--head-bits", "4"];
    quantize(&model, dir.path(), &[&four[..], &["--vision-bits", "16", "--group-size", "32"]].concat());
    let (before, after) = (Checkpoint::open(&model, None).unwrap(), Checkpoint::open(dir.path(), None).unwrap());
    assert_eq!(before.config, after.config);
    let (text, vision) = (&before.config.text, &before.config.vision);
    let square = [text.hidden_size, text.hidden_size];
    for (module, [n, k]) in [
        ("llama.embed_tokens", [text.vocab_size, text.hidden_size]),
        ("llama.layers.0.self_attn.q_proj", square),
        ("llama.layers.1.mlp.up_proj", [text.intermediate_size, text.hidden_size]),
        ("llama.lm_head", [text.vocab_size, text.hidden_size]),
    ] {
        let packed = after.weights.packed(module, n, k).unwrap().unwrap_or_else(|| panic!("{module} is not packed"));
        let dense = before.weights.tensor(&format!("{module}.weight"), &[n, k]).unwrap().to_f32();
        for (i, (w, got)) in dense.iter().zip(packed.to_f32()).enumerate() {
            let (scale, _) = packed.scale_offset(i / k, i % k);
            // Half a step, unless its integer is an end of the range: there the largest of a group may be cut off, by as much as the widest
            // candidate for its scale leaves out (8 of 6.8 steps, and what least squares make of that).
            let is_end = [0, 15].contains(&packed.q(i / k, i % k));
            let bound = if is_end { 1.4 } else { 0.5001 };
            assert!((w - got).abs() <= bound * scale.abs(), "{module} {i}: {w} became {got}, scale {scale}");
        }
    }
    let report = |flags: &[&str]| succeed(&[&["inspect", "--model", dir.path().to_str().unwrap()], flags].concat());
    let json: Value = serde_json::from_str(&report(&["--json"])).unwrap();
    assert_eq!(json["packed_by"], "llava-engine quantize, rtn");
    // Of two layers Q, K, V, the output, gate and up; the projector keeps its default of 8 bits.
    let [four, eight] = [4, 8].map(|bits| format!("int{bits} in groups of 32"));
    for (part, format, n) in [("decoder", &four, 12), ("embeddings", &four, 2), ("projector", &eight, 2)] {
        assert_eq!(json["parts"][part]["packed"], serde_json::json!({ format.as_str(): n }), "{part}");
    }
    assert_eq!(json["parts"]["vision"]["packed"], serde_json::json!({}));
    let printed = report(&[]);
    let parts = ["packed by llava-engine quantize, rtn", &format!("12 matrices in {four}")];
    assert!(parts.iter().all(|part| printed.contains(part)), "{printed}");
    // Rows of 48 are no groups of 32; the tower was to stay.
    for (name, shape) in [
        ("llama.layers.0.mlp.down_proj", [text.hidden_size, text.intermediate_size]),
        ("clip.layers.0.self_attn.q_proj", [vision.hidden_size, vision.hidden_size]),
    ] {
        assert!(after.weights.packed(name, shape[0], shape[1]).unwrap().is_none(), "{name}");
        let tensor = |c: &Checkpoint| c.weights.tensor(&format!("{name}.weight"), &shape).unwrap().to_f32();
        assert_eq!(tensor(&before), tensor(&after), "{name}");
    }
}

/// The kernels with `--w8a8` round activations as the CPU does, so that they come nearer to it than without.
#[test]
fn rounded_activations_are_the_cpus() {
    let Some(device) = support::kernel_device() else { return println!("skipped: neither a GPU nor the simulator") };
    let dir = tempfile::tempdir().unwrap();
    quantize(&fixture("checkpoints/hf_mha_f32"), dir.path(), &["--bits", "8", "--group-size", "32"]);
    let cpu = logprobs(dir.path(), &[]);
    let distance = |flags: &[&str]| -> f64 {
        let got = logprobs_on(&device.to_string(), dir.path(), flags);
        cpu.iter().zip(&got).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
    };
    let (rounded, exact) = (distance(&["--w8a8"]), distance(&[]));
    assert!(rounded < 0.5 * exact, "{rounded} with 8-bit activations, {exact} without");
}

#[test]
fn a_refused_run_leaves_no_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let model = fixture("checkpoints/hf_mha_f32");
    let path = |p: &Path| p.to_str().unwrap().to_owned();
    let run = |model: &Path, output: &Path, flags: &[&str]| {
        fail(&[&["quantize", "--model", &path(model), "--output", &path(output)], flags].concat())
    };

    let output = dir.path().join("new");
    let nothing = ["--bits", "16", "--embedding-bits", "16", "--head-bits", "16", "--projector-bits", "16", "--vision-bits", "16"];
    for flags in [&["--bits", "5"][..], &["--bits", "4", "--group-size", "48"], &nothing] {
        let (code, message) = run(&model, &output, flags);
        assert!(code == 2 && !output.exists(), "{flags:?}: {code} {message}");
    }
    let (code, message) = run(&model, &model, &["--bits", "4"]);
    assert!(code == 1 && message.contains("not empty"), "{message}");

    // Packed already.
    quantize(&model, &output, &["--bits", "4"]);
    let (code, message) = run(&output, &dir.path().join("again"), &["--bits", "4"]);
    assert!(code == 1 && message.contains("packed already"), "{message}");

    // A weight that is no number, late in the file, or in its first tensor.
    for name in ["up_proj", "embed_tokens"] {
        let broken = dir.path().join(format!("broken {name}"));
        copy_dir(&model, &broken);
        break_weight(&broken, &format!("{name}.weight"));
        let output = dir.path().join(format!("from broken {name}"));
        let (code, message) = run(&broken, &output, &["--bits", "4"]);
        let parts = [name, "row 1, column 3", "NaN"];
        assert!(code == 1 && parts.iter().all(|part| message.contains(part)), "{message}");
        assert_eq!(fs::read_dir(&output).unwrap().count(), 0, "a file stayed behind");
    }
}

/// Opens a quantized checkpoint whose weight file was changed, and expects to be told so.
#[test]
fn files_that_are_no_packed_model_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let good = dir.path().join("good");
    quantize(&fixture("checkpoints/hf_mha_f32"), &good, &["--bits", "4", "--group-size", "32"]);
    let file = fs::read(good.join("model.safetensors")).unwrap();
    let whole = safetensors::SafeTensors::deserialize(&file).unwrap();
    let words = "language_model.model.layers.0.self_attn.q_proj.words";
    let words = whole
        .names()
        .into_iter()
        .find(|n| n.ends_with("layers.0.self_attn.q_proj.words") && !n.contains("vision"))
        .unwrap_or(words);
    let scales = words.replace(".words", ".scales");
    type Change<'a> = Box<dyn Fn(&str, &mut Vec<usize>, &mut DType, &mut Vec<u8>) -> bool + 'a>;
    let changes: [(&str, Change); 4] = [
        ("scales are missing", Box::new(|name, _, _, _| name != scales)),
        (
            "words is",
            Box::new(|name, shape, _, bytes| {
                if name == words {
                    shape[0] += 1;
                    bytes.resize(bytes.len() + shape[1..].iter().product::<usize>() * 4, 0);
                }
                true
            }),
        ),
        (
            "4 bits, or 8",
            Box::new(|name, shape, _, _| {
                if name == words {
                    (shape[1], shape[3]) = (shape[1] * 2, shape[3] / 2);
                }
                true
            }),
        ),
        (
            "dtype of scales is",
            Box::new(|name, _, dtype, _| {
                if name == scales {
                    *dtype = DType::Bf16;
                }
                true
            }),
        ),
    ];
    for (i, (expected, change)) in changes.iter().enumerate() {
        let bad = dir.path().join(format!("bad {i}"));
        copy_dir(&good, &bad);
        let mut tensors = Vec::new();
        for (name, view) in whole.tensors() {
            let dtype = match view.dtype() {
                safetensors::Dtype::I32 => DType::I32,
                safetensors::Dtype::F16 => DType::F16,
                _ => DType::F32,
            };
            let (mut shape, mut dtype, mut bytes) = (view.shape().to_vec(), dtype, view.data().to_vec());
            if change(&name, &mut shape, &mut dtype, &mut bytes) {
                tensors.push((Planned { name, shape, dtype }, bytes));
            }
        }
        fs::remove_file(bad.join("model.safetensors")).unwrap();
        let plan: Vec<Planned> = tensors.iter().map(|(p, _)| p.clone()).collect();
        let mut writer = Writer::create(&bad.join("model.safetensors"), &plan).unwrap();
        tensors.iter().for_each(|(p, bytes)| writer.write(&p.name, bytes).unwrap());
        writer.finish().unwrap();
        let (code, message) = fail(&["generate", "--device", "cpu", "--model", bad.to_str().unwrap(), "--prompt", "Hello"]);
        assert!(code == 1 && message.contains(expected) && message.contains("q_proj"), "{i}: {code} {message}");
    }
    let mut config: Value = serde_json::from_slice(&fs::read(good.join("config.json")).unwrap()).unwrap();
    for (key, value) in [("version", Value::from(2)), ("quant_method", Value::from("bitsandbytes"))] {
        let before = std::mem::replace(&mut config["quantization_config"][key], value);
        fs::write(good.join("config.json"), config.to_string()).unwrap();
        let (code, message) = fail(&["inspect", "--model", good.to_str().unwrap()]);
        assert!(code == 1 && message.contains(key), "{message}");
        config["quantization_config"][key] = before;
    }
}
