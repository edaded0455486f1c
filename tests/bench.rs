//! `bench`: that its document has what scripts rely on, and that its figures hang together.

mod support;

use std::process::Command;

use llava_engine::device::Device;
use llava_engine::dtype::DType;
use llava_engine::engine::open_grad_device;
use llava_engine::model::Slot;
use llava_engine::model::checkpoint::{Beside, Checkpoint};
use llava_engine::tensor::Tensor;
use llava_engine::train::config::Config;
use llava_engine::train::trial::Trial;
use support::fixture;

/// A token's keys and values in that checkpoint: 2 of 32 f32 in each of 2 layers.
const KV_BYTES: usize = 2 * 2 * 32 * 4;
/// A token's row of its embedding table.
const EMBEDDING_BYTES: usize = 32 * 4;

/// `bench` of a tiny checkpoint in f32, with a prompt of 40 tokens and answers of 5: what it prints.
fn bench(flags: &[&str]) -> Vec<u8> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_llava-engine"));
    command.env_clear().env("HOME", "/nowhere").env("HF_HUB_OFFLINE", "1");
    command.args(["bench", "--prompt-tokens", "40", "--new-tokens", "5", "--threads", "1"]).args(flags);
    let output = command.arg("--model").arg(fixture("checkpoints/hf_mha_f32")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn document(flags: &[&str]) -> serde_json::Value {
    serde_json::from_slice(&bench(&[&["--json"], flags].concat())).unwrap()
}

#[test]
fn the_document_is_as_the_contract_says() {
    let document = document(&["--repeat", "3", "--device", "cpu", "--batch-size", "1,3"]);
    let peaks = &document["machine"];
    assert!(peaks["read_gbps"].as_f64().unwrap() > 0.1 && peaks["peaks"]["f32_gflops"].as_f64().unwrap() > 0.1);
    assert!(cfg!(not(target_os = "linux")) || document["peak_memory_bytes"].as_u64().unwrap() > 1 << 20);
    let rows = document["rows"].as_array().unwrap();
    let of = |key: &str| rows.iter().map(|r| r[key].clone()).collect::<Vec<_>>();
    assert_eq!(of("phase"), ["encode", "prefill", "decode", "decode"]);
    assert_eq!(of("batch_size"), [1, 1, 1, 3]);
    assert_eq!(of("context"), [0, 40, 44, 44]);
    assert_eq!(of("tokens")[1..], [40, 4, 12]);
    for row in rows {
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key} in {row}"));
        assert!(number("ms_min") <= number("ms_median") && number("ms_median") <= number("ms_max"));
        assert!((number("tokens_per_second") * number("ms_median") / 1e3 / number("tokens") - 1.0).abs() < 1e-6);
        assert!(number("gbps") > 0.0 && number("tflops") > 0.0);
        assert!((0.0..110.0).contains(&number("percent_of_limit")), "{row}");
        assert!(number("limit_ms") > 0.0 && number("stored_bytes") > 0.0 && number("flops") > 0.0);
    }
    // Three sequences read the weights once, but each its own embedding row and cache, to which it adds a token.
    let stored = |row: usize| rows[row]["stored_bytes"].as_f64().unwrap();
    let of_a_sequence: usize = (41..=44).map(|context| KV_BYTES * (context + 1) + EMBEDDING_BYTES).sum();
    assert_eq!(stored(3) - stored(2), 2.0 * of_a_sequence as f64);
    assert_eq!(rows[3]["flops"].as_f64().unwrap(), 3.0 * rows[2]["flops"].as_f64().unwrap());
    let first_token = document["time_to_first_token"]["ms_min"].as_f64().unwrap();
    assert!(first_token >= rows[0]["ms_min"].as_f64().unwrap() + rows[1]["ms_min"].as_f64().unwrap() - 1e-6);
}

/// The same lines on the CUDA kernels, whose peaks are probed by kernels too.
#[cfg(llava_sim)]
#[test]
fn the_simulator_has_peaks_and_is_named() {
    let document = document(&["--repeat", "1", "--device", "sim", "--batch-size", "2"]);
    assert_eq!(document["machine"]["simulated"], true);
    let probes = document["machine"]["peaks"]["probes"].as_array().unwrap();
    assert!(probes.iter().any(|p| p["how"].as_str().unwrap().contains("our own GEMM")), "{document}");
    for row in document["rows"].as_array().unwrap() {
        assert!(row["percent_of_limit"].as_f64().unwrap() > 0.0, "{row}");
    }
}

#[test]
fn the_table_has_a_row_for_each_batch_size() {
    let table = String::from_utf8(bench(&["--repeat", "1", "--device", "cpu", "--batch-size", "2,1"])).unwrap();
    let decodes: Vec<_> = table.lines().filter(|l| l.starts_with("| decode")).collect();
    assert!(decodes.len() == 2 && decodes[0].starts_with("| decode | 2 | 8 | 44 |"), "{table}");
    assert!(table.contains("time to first token") && table.contains("GB/s read") && !table.contains("simulated"), "{table}");
}

/// Steps of training on rows of 40 + 5 tokens: how much is learned says what their arithmetic comes to.
#[test]
fn training_is_measured_too() {
    let row = |device: &str, settings: &[&str]| {
        let settings = settings.iter().flat_map(|s| ["--train", s]);
        let flags: Vec<_> = ["--repeat", "2", "--device", device, "--batch-size", "2"].into_iter().chain(settings).collect();
        let document = document(&flags);
        let rows = document["rows"].as_array().unwrap();
        assert!(rows.len() == 1 && document["time_to_first_token"].is_null(), "{document}");
        assert_eq!((&rows[0]["phase"], &rows[0]["tokens"], &rows[0]["context"]), (&"train".into(), &90.into(), &45.into()));
        assert!(rows[0]["percent_of_limit"].as_f64().unwrap() > 0.0 && rows[0]["gbps"].as_f64().unwrap() > 0.0, "{document}");
        rows[0]["flops"].as_f64().unwrap()
    };
    let full = ["tune=full", "tune_vision=full", "dtype=f32", "recompute=selective"];
    let projector = ["tune=projector", "dtype=f32"];
    let learned = [&projector[..], &["tune=lora", "lora_r=2", "dtype=f32"], &["tune=lora", "lora_r=8", "dtype=f32"], &full];
    let flops = learned.map(|settings| row("cpu", settings));
    assert!(flops.is_sorted_by(|a, b| a < b), "{flops:?}");
    if cfg!(llava_sim) {
        assert_eq!(row("sim", &full), flops[3]);
    }
    let table =
        String::from_utf8(bench(&["--repeat", "1", "--device", "cpu", "--batch-size", "1", "--train", "tune=lora"])).unwrap();
    assert!(table.contains("| train | 1 | 45 | 45 |") && !table.contains("first token"), "{table}");
}

/// The steps that are timed are steps of training: a row that is learned again and again is known better each time.
#[test]
fn steps_that_are_measured_learn() {
    let settings = "tune = 'full'\ntune_vision = 'full'\ndtype = 'f32'\nlr = 1e-3".parse().unwrap();
    let checkpoint = Checkpoint::open(&fixture("checkpoints/hf_mha_f32"), Beside { model_base: None, mmproj: None }).unwrap();
    let (ops, _) = open_grad_device(Device::Cpu, 2, DType::F32).unwrap();
    let mut trial = Trial::new(ops, Config::resolve(None, settings).unwrap(), &checkpoint.config, &checkpoint.weights).unwrap();
    let (n, side) = (checkpoint.config.tokens_per_image(), checkpoint.config.vision.image_size);
    let prompt: Vec<Slot> = (0..n).map(|feature_row| Slot::Image { feature_row }).collect();
    let pixels = Tensor::from_slice(&[2, 3, side, side], &vec![0.5f32; 2 * 3 * side * side]);
    let mut rows = trial.rows(pixels, &prompt, &[5, 9, 5, 7]).unwrap();
    let losses: Vec<f64> = (0..6).map(|_| trial.step(&mut rows).unwrap()).collect();
    assert!(losses.is_sorted_by(|a, b| a > b), "{losses:?}");
}

#[test]
fn shapes_and_sizes_that_make_no_sense_are_refused() {
    for (flags, part) in [
        (&["--shape", "llava-9-900b"][..], "llava-1.5-7b"),
        (&["--new-tokens", "1"], "at least 2"),
        (&["--weights", "int3"], "int3"),
        (&["--repeat", "0"], "at least 1"),
        (&["--batch-size", "1,0"], "from 1 to"),
        (&["--batch-size", "1,100000"], "from 1 to"),
        (&["--batch-size", "many"], "many"),
        (&["--mmproj", "mmproj.gguf"], "--model"),
        (&["--train", "lora"], "KEY=VALUE"),
        (&["--train", "rank=8"], "KEY=VALUE"),
        (&["--train", "tune=most"], "most"),
        (&["--train", "lora_r=few"], "few"),
        (&["--train", "tune=lora", "--layers", "1", "--prompt-tokens", "64"], "--prompt-tokens 64: a picture alone takes 576"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_llava-engine")).arg("bench").args(flags).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && stderr.contains(part), "{flags:?}: {stderr}");
    }
}
