//! Checkpoints of AutoGPTQ and AutoAWQ, against what those programs make of their own matrices (tools/reference/make_qweight.py).

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use half::f16;
use llava_engine::cpu::pool::Pool;
use llava_engine::device::Device;
use llava_engine::dtype::DType;
use llava_engine::engine::{Engine, EngineOptions};
use llava_engine::model::checkpoint::Checkpoint;
use llava_engine::ops::packed::Format;
use llava_engine::tensor::Tensor;
use llava_engine::text::Prompt;
use llava_engine::weights::Source;
use llava_engine::weights::qweight::{Layout, Matrix, Scheme, Stored};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use support::{fixture, image};

/// A matrix as it is stored and the scheme that its configuration says.
struct Case {
    scheme: Scheme,
    n: usize,
    k: usize,
    qweight: Vec<i32>,
    qzeros: Vec<i32>,
    scales: Vec<f16>,
    g_idx: Option<Vec<i32>>,
    /// `[n, k]`, as the program unpacks it.
    weight: Vec<f32>,
}

impl Case {
    fn open(name: &str) -> Self {
        let configs: Value = serde_json::from_slice(&fs::read(fixture("qweight/matrices.json")).unwrap()).unwrap();
        let config = &configs[name];
        let layout = match config["quant_method"].as_str() {
            Some("awq") => Layout::Awq,
            _ => Layout::Gptq { zeros_less_one: config["checkpoint_format"] != "gptq_v2" },
        };
        let group_size = usize::try_from(config["group_size"].as_i64().unwrap()).ok();
        let scheme = Scheme { layout, bits: config["bits"].as_u64().unwrap() as usize, group_size };
        let bytes = fs::read(fixture("qweight/matrices.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let of = |kind: &str| file.tensor(&format!("{name}.{kind}"));
        let ints = |kind: &str| bytemuck::pod_collect_to_vec(of(kind).unwrap().data());
        let weight = of("weight").unwrap();
        Self {
            scheme,
            n: weight.shape()[0],
            k: weight.shape()[1],
            qweight: ints("qweight"),
            qzeros: ints("qzeros"),
            scales: bytemuck::pod_collect_to_vec(of("scales").unwrap().data()),
            g_idx: of("g_idx").ok().map(|t| bytemuck::pod_collect_to_vec(t.data())),
            weight: bytemuck::pod_collect_to_vec(weight.data()),
        }
    }

    /// Its first `n` rows.
    fn rows(&self, n: usize) -> Self {
        let cut = |values: &[i32], old: usize, new: usize| values.chunks(old).flat_map(|row| row[..new].to_vec()).collect();
        let per_word = 32 / self.scheme.bits;
        let columns = if self.scheme.layout == Layout::Awq { per_word } else { 1 };
        Self {
            n,
            qweight: cut(&self.qweight, self.n / columns, n / columns),
            qzeros: cut(&self.qzeros, self.n / per_word, n / per_word),
            scales: self.scales.chunks(self.n).flat_map(|row| row[..n].to_vec()).collect(),
            g_idx: self.g_idx.clone(),
            weight: self.weight[..n * self.k].to_vec(),
            ..*self
        }
    }

    fn matrix(&self) -> Result<Matrix, String> {
        let per_word = 32 / self.scheme.bits;
        let shape = if self.scheme.layout == Layout::Awq { [self.k, self.n / 8] } else { [self.k / per_word, self.n] };
        let groups = self.scales.len() / self.n;
        let stored = Stored {
            qweight: Tensor::from_slice(&shape, &self.qweight),
            qzeros: Tensor::from_slice(&[groups, self.n / per_word], &self.qzeros),
            scales: Tensor::from_slice(&[groups, self.n], &self.scales),
            g_idx: self.g_idx.as_ref().map(|g| Tensor::from_slice(&[g.len()], g)),
        };
        Matrix::new(self.scheme, self.n, self.k, stored)
    }
}

#[test]
fn symmetric_matrices_are_packed_exactly() {
    for (name, bits, group) in [("gptq_symmetric", 4, 32), ("gptq_8_bits", 8, 32)] {
        for n in [64, 24, 8] {
            let case = Case::open(name).rows(n);
            let packed = case.matrix().unwrap().pack(&Pool::new(2)).unwrap().unwrap();
            assert_eq!(packed.format(), Format { bits, group, has_offsets: false }, "{name}");
            assert!(packed.to_f32() == case.weight, "{name}, {n} rows");
        }
    }
}

/// −zero·scale in f16: off by half of its last bit, 2⁻¹¹ of it at most; all else is exact.
#[test]
fn other_zeros_become_offsets_within_their_bound() {
    for (name, group) in [
        ("gptq_groups_of_64", 64),
        ("gptq_groups_of_96", 32),
        ("gptq_whole_rows", 128),
        ("gptq_v2", 32),
        ("awq", 32),
        ("awq_groups_of_128", 128),
    ] {
        for n in [64, 24, 8] {
            let case = Case::open(name).rows(n);
            let packed = case.matrix().unwrap().pack(&Pool::new(2)).unwrap().unwrap();
            assert_eq!(packed.format(), Format { bits: 4, group, has_offsets: true }, "{name}");
            let mut n_rounded = 0;
            for (i, (got, expected)) in packed.to_f32().iter().zip(&case.weight).enumerate() {
                let (scale, offset) = packed.scale_offset(i / case.k, i % case.k);
                let bound = offset.abs() / 2048.0 * 1.001 + scale * 1e-6;
                assert!((got - expected).abs() <= bound, "{name} {n} rows, {i}: {got}, not {expected}; scale {scale}");
                // An exact multiple of the scale away from an integer's weight: no integer is in a wrong place.
                n_rounded += usize::from(got != expected);
            }
            assert!(n_rounded > 0, "{name}: the bound is of something that does not happen");
        }
    }
    // The last row of a word has a zero of 0, stored as 15.
    let case = Case::open("gptq_groups_of_64");
    let packed = case.matrix().unwrap().pack(&Pool::new(1)).unwrap().unwrap();
    assert!((0..case.n).all(|row| (packed.scale_offset(row, 0).1 == 0.0) == (row % 8 == 7)));
}

#[test]
fn what_has_no_packed_form_becomes_dense() {
    for name in ["gptq_8_bits_with_zeros", "gptq_groups_of_16", "gptq_desc_act"] {
        for n in [64, 24] {
            let case = Case::open(name).rows(n);
            let matrix = case.matrix().unwrap();
            assert!(matrix.format().is_none() && matrix.pack(&Pool::new(1)).unwrap().is_none(), "{name}");
            let expected: Vec<f32> = case.weight.iter().map(|w| f16::from_f32(*w).to_f32()).collect();
            assert!(matrix.dense(&Pool::new(2)).unwrap().to_f32() == expected, "{name}, {n} rows");
        }
    }
    // The same by both ways, for one that can be packed.
    for name in ["awq", "gptq_v2", "gptq_symmetric"] {
        let case = Case::open(name);
        let expected: Vec<f32> = case.weight.iter().map(|w| f16::from_f32(*w).to_f32()).collect();
        assert!(case.matrix().unwrap().dense(&Pool::new(2)).unwrap().to_f32() == expected, "{name}");
    }
}

#[test]
fn tensors_that_are_no_such_matrix_are_refused() {
    type Spoil = fn(&mut Case);
    let refusals: &[(&str, &str, Spoil)] = &[
        ("gptq_symmetric", "qweight", |c| c.qweight.truncate(c.qweight.len() - c.n)),
        ("gptq_symmetric", "g_idx puts column 3", |c| c.g_idx.as_mut().unwrap()[3] = 4),
        ("gptq_symmetric", "g_idx puts column 0", |c| c.g_idx.as_mut().unwrap()[0] = -1),
        ("gptq_symmetric", "g_idx puts column 127", |c| c.g_idx.as_mut().unwrap()[127] = i32::MIN),
        ("gptq_symmetric", "its g_idx is", |c| _ = c.g_idx.as_mut().unwrap().pop()),
        ("gptq_symmetric", "its qzeros is", |c| c.scheme.group_size = Some(64)),
        ("gptq_symmetric", "no multiple of 48", |c| c.scheme.group_size = Some(48)),
        ("gptq_symmetric", "no multiple of 256", |c| c.scheme.group_size = Some(256)),
        ("gptq_symmetric", "no multiple of 0", |c| c.scheme.group_size = Some(0)),
        ("gptq_symmetric", "not a finite number", |c| c.scales[70] = f16::NAN),
        ("awq", "not a finite number", |c| c.scales[0] = f16::INFINITY),
        ("awq", "not a finite number", |c| c.scales.iter_mut().for_each(|s| *s = f16::MAX)), // zero times it is more than f16 holds
    ];
    for (name, why, spoil) in refusals {
        let mut case = Case::open(name);
        spoil(&mut case);
        // A shape that no longer fits its elements is another's; cut as whole rows it is a tensor still.
        let result = match *why {
            "qweight" => {
                let rows = case.qweight.len() / case.n;
                let stored = Stored {
                    qweight: Tensor::from_slice(&[rows, case.n], &case.qweight),
                    qzeros: Tensor::from_slice(&[4, case.n / 8], &case.qzeros),
                    scales: Tensor::from_slice(&[4, case.n], &case.scales),
                    g_idx: None,
                };
                Matrix::new(case.scheme, case.n, case.k, stored).map(|_| ())
            }
            _ => case.matrix().and_then(|m| m.pack(&Pool::new(1)).map(|_| ())),
        };
        let error = result.expect_err(why);
        assert!(error.contains(why) && !error.contains('\n'), "{name}: {error}");
    }
}

/// A whole checkpoint whose decoder is in the fixture `kind`.
fn checkpoint(kind: &str, quantization: Option<Value>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let twin = fixture("checkpoints/hf_mha_f32");
    for name in ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"] {
        fs::copy(twin.join(name), dir.path().join(name)).unwrap();
    }
    for (from, to) in [("rest", "model-00001-of-00002.safetensors"), (kind, "model-00002-of-00002.safetensors")] {
        fs::copy(fixture(&format!("qweight/{from}.safetensors")), dir.path().join(to)).unwrap();
    }
    let mut config: Value = serde_json::from_slice(&fs::read(twin.join("config.json")).unwrap()).unwrap();
    config["text_config"]["intermediate_size"] = 64.into();
    if let Some(quantization) = quantization {
        config["quantization_config"] = quantization;
    }
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

fn gptq() -> Value {
    json!({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": false, "sym": false, "damp_percent": 0.01})
}

fn awq() -> Value {
    json!({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": true, "version": "gemm", "modules_to_not_convert": null})
}

fn last_logits(folder: &Path) -> Vec<f32> {
    let mut engine = Engine::open(folder, &EngineOptions { device: Device::Cpu, threads: 2, ..Default::default() }).unwrap();
    let picture = image(&fixture("images/odd.png"));
    engine.score(&Prompt::raw("USER: <image>\nWhat is this? ASSISTANT:"), &[picture]).unwrap().last_logits
}

/// Runs the program; its exit code, and what it said.
fn llava(args: &[&str]) -> (i32, String) {
    let output =
        Command::new(env!("CARGO_BIN_EXE_llava-engine")).env_clear().env("LLAVA_THREADS", "2").args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap(), text)
}

#[test]
fn whole_checkpoints_answer_as_their_unpacked_twins() {
    for (kind, config, name) in [("gptq", gptq(), "GPTQ, 4 bits, groups of 32"), ("awq", awq(), "AWQ, 4 bits, groups of 32")] {
        let (packed, dense) = (checkpoint(kind, Some(config)), checkpoint(&format!("{kind}_dense"), None));
        let opened = Checkpoint::open(packed.path(), None).unwrap();
        assert_eq!((opened.dtype, opened.scheme.unwrap().to_string().as_str()), (DType::F16, name));
        let matrix = opened.weights.packed("llama.layers.1.mlp.down_proj", 32, 64).unwrap().unwrap();
        assert_eq!(matrix.format(), Format { bits: 4, group: 32, has_offsets: true });
        let (got, expected) = (last_logits(packed.path()), last_logits(dense.path()));
        let sum = |of: fn(f32, f32) -> f32| got.iter().zip(&expected).map(|(a, b)| of(*a, *b)).sum::<f32>();
        // Products round activations to 8 bits: 2 % here; one matrix in a wrong order gives about all of it.
        let share = (sum(|a, b| (a - b).powi(2)) / sum(|_, b| b * b)).sqrt();
        assert!(share < 0.06, "{kind}: logits are off by {share} of them");

        let model = packed.path().to_str().unwrap();
        let (code, text) = llava(&["inspect", "--model", model]);
        assert!(code == 0 && text.contains(name), "{text}");
        let inspected = |folder: &Path| -> Value {
            let (code, text) = llava(&["inspect", "--json", "--model", folder.to_str().unwrap()]);
            assert_eq!(code, 0, "{text}");
            serde_json::from_str(&text).unwrap()
        };
        // AutoGPTQ's biases of zeros are not packed.
        let biases = if kind == "gptq" { 2 * (4 * 32 + 2 * 64 + 32) } else { 0 };
        let (packed, dense) = (inspected(packed.path()), inspected(dense.path()));
        assert_eq!(packed["parameters"].as_u64().unwrap(), dense["parameters"].as_u64().unwrap() + biases);
        let out = tempfile::tempdir().unwrap();
        let (code, text) =
            llava(&["quantize", "--bits", "8", "--model", model, "--output", out.path().join("out").to_str().unwrap()]);
        assert!(code == 1 && text.contains("is packed already") && text.contains(name), "{text}");
    }
}

#[test]
fn configurations_are_read_where_they_are_and_refused_by_key() {
    let open = |dir: &tempfile::TempDir| Checkpoint::open(dir.path(), None).map(|c| c.scheme);
    let dir = checkpoint("gptq", None);
    let checkpoint_without = Checkpoint::open(dir.path(), None).unwrap();
    let error = checkpoint_without.weights.packed("llama.layers.0.mlp.up_proj", 64, 32).unwrap_err().to_string();
    assert!(error.contains("up_proj.qweight") && error.contains("quantization_config"), "{error}");
    // AutoGPTQ's own file, of before transformers knew of it.
    fs::write(dir.path().join("quantize_config.json"), r#"{"bits": 4, "group_size": 32, "desc_act": false, "sym": true}"#).unwrap();
    let gptq_v1 = Scheme { layout: Layout::Gptq { zeros_less_one: true }, bits: 4, group_size: Some(32) };
    assert_eq!(open(&dir).unwrap(), Some(gptq_v1));
    let edited = |base: fn() -> Value, key: &str, value: Value| {
        let mut config = base();
        let kind = config["quant_method"].as_str().unwrap().to_owned();
        config[key] = value;
        checkpoint(&kind, Some(config))
    };
    let v2 = edited(gptq, "checkpoint_format", json!("gptq_v2"));
    assert_eq!(open(&v2).unwrap().unwrap().layout, Layout::Gptq { zeros_less_one: false });
    assert_eq!(open(&edited(gptq, "group_size", json!(-1))).unwrap().unwrap().group_size, None);
    let old = json!({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM", "zero_point": true});
    assert_eq!(open(&checkpoint("awq", Some(old))).unwrap().unwrap().group_size, Some(64));
    for (base, key, value) in [
        (gptq as fn() -> Value, "bits", json!(3)),
        (gptq, "bits", Value::Null),
        (gptq, "bits", json!("4")),
        (gptq, "group_size", json!(0)),
        (gptq, "group_size", json!(-2)),
        (gptq, "group_size", Value::Null),
        (gptq, "checkpoint_format", json!("marlin")),
        (awq, "version", json!("gemv")),
        (awq, "bits", json!(8)),
        (awq, "zero_point", json!(false)),
        (awq, "group_size", json!(1.5)),
    ] {
        let dir = edited(base, key, value.clone());
        let error = open(&dir).expect_err(key).to_string();
        assert!(
            error.contains("quantization_config") && error.contains(key) && error.contains("config.json"),
            "{key} {value}: {error}"
        );
    }
    let mut config = gptq();
    config["quant_method"] = json!("bitsandbytes");
    assert!(open(&checkpoint("gptq", Some(config))).unwrap_err().to_string().contains("bitsandbytes"));
}

/// Columns in the order of their importance: taken, and said what they cost.
#[test]
fn desc_act_is_unpacked_and_said() {
    let dir = checkpoint("gptq", Some(gptq()));
    let path = dir.path().join("model-00002-of-00002.safetensors");
    let bytes = fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    // Two columns of the only matrix that has two groups change places.
    let name = "language_model.model.layers.0.mlp.down_proj.g_idx";
    let start = file.tensor(name).unwrap().data().as_ptr() as usize - bytes.as_ptr() as usize;
    let mut reordered = bytes.clone();
    for (column, group) in [(5, 1i32), (40, 0)] {
        reordered[start + 4 * column..][..4].copy_from_slice(&group.to_le_bytes());
    }
    fs::write(&path, reordered).unwrap();
    let engine = Engine::open(dir.path(), &EngineOptions { device: Device::Cpu, threads: 1, ..Default::default() }).unwrap();
    let notes = engine.notes().join(" ");
    assert!(notes.contains("1 matrix") && notes.contains("desc_act"), "{notes}");
    let (code, text) = llava(&[
        "generate",
        "--model",
        dir.path().to_str().unwrap(),
        "--device",
        "cpu",
        "--prompt",
        "What?",
        "--max-new-tokens",
        "2",
    ]);
    assert!(code == 0 && text.contains("desc_act"), "{text}");
    let engine =
        Engine::open(checkpoint("gptq", Some(gptq())).path(), &EngineOptions { device: Device::Cpu, ..Default::default() })
            .unwrap();
    assert!(engine.notes().is_empty(), "{:?}", engine.notes());
}

#[test]
fn a_bias_that_is_not_zero_is_refused() {
    let dir = checkpoint("gptq", Some(gptq()));
    let path = dir.path().join("model-00002-of-00002.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let name = "language_model.model.layers.1.self_attn.o_proj.bias";
    let start = file.tensor(name).unwrap().data().as_ptr() as usize - bytes.as_ptr() as usize;
    bytes[start + 6] = 1;
    fs::write(&path, bytes).unwrap();
    let error = Checkpoint::open(dir.path(), None).unwrap_err().to_string();
    assert!(error.contains(name) && error.contains("is a bias"), "{error}");
}
