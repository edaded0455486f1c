//! `finetune`, from rows to a checkpoint that answers.

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::Value;
use support::finetune::{MODEL, finetune, folder, log, rows};
use support::fixture;
use support::program::succeed;

/// The bytes of each tensor of a folder, by its name.
fn tensors(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "safetensors") && path.file_name().unwrap() != "expected.safetensors" {
            let bytes = std::fs::read(path).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            all.extend(file.tensors().into_iter().map(|(name, view)| (name, view.data().to_vec())));
        }
    }
    all
}

const ALL: [&str; 4] = ["--tune", "full", "--tune-vision", "full"];

#[test]
fn a_model_learns_its_rows_and_is_written_in_its_layout() {
    let folder = folder();
    let done = finetune(folder.path(), "out", &[&ALL[..], &["--epochs", "30", "--json"]].concat());
    assert!(done.ok, "{}", done.stderr);
    let summary: Value = serde_json::from_str(&done.stdout).unwrap();
    assert_eq!(summary["last_step"]["step"], 30, "{summary}");
    let out = folder.path().join("out");
    let steps = log(&out);
    let loss = |i: usize| steps[i]["loss"].as_f64().unwrap();
    assert_eq!(steps.len(), 30);
    assert!(loss(29) < 0.2 * loss(0), "{} to {}", loss(0), loss(29));
    assert!(steps.iter().all(|s| s["grad_norm"].as_f64().unwrap() > 0.0 && s["n_learned"].as_u64().unwrap() > 10));
    // One step of warm-up, then half a wave to zero.
    assert_eq!(steps[0]["lr"], 0.0);
    assert_eq!(steps[1]["lr"], 3e-3);

    let (before, after) = (tensors(&fixture(MODEL)), tensors(&out));
    assert!(after.keys().all(|name| before[name].len() == after[name].len()));
    // All but the layers of the tower that LLaVA never runs; a key's bias moves nothing, so that its steps may be lost in bf16.
    let same: Vec<_> = after.iter().filter(|(name, bytes)| before[*name] == **bytes).map(|(name, _)| name.as_str()).collect();
    let is_unused = |name: &&str| name.contains("post_layernorm") || name.contains("encoder.layers.4.");
    assert!(same.iter().all(|name| is_unused(name) || name.ends_with("k_proj.bias")), "{same:?}");
    assert!(same.iter().filter(|name| is_unused(name)).count() > 10, "{same:?}");
    let answer = succeed(&[
        "generate",
        "--model",
        out.to_str().unwrap(),
        "--image",
        fixture("images/square.png").to_str().unwrap(),
        "--prompt",
        "Describe it.",
        "--temperature",
        "0",
        "--template",
        "v1",
        "--dtype",
        "f32",
    ]);
    assert_eq!(answer.trim(), "It has four sides.");
}

/// The projector alone: nothing else changes by a bit.
#[test]
fn what_is_not_trained_stays() {
    let folder = folder();
    let done =
        finetune(folder.path(), "out", &["--tune", "projector", "--max-steps", "3", "--epochs", "4", "--grouping", "packed"]);
    assert!(done.ok, "{}", done.stderr);
    assert!(done.stdout.starts_with("step 1/3  loss "), "{}", done.stdout);
    let (before, after) = (tensors(&fixture(MODEL)), tensors(&folder.path().join("out")));
    for (name, bytes) in &after {
        assert_eq!(before[name] != *bytes, name.contains("projector"), "{name}");
    }
}

/// Neither another number of threads, nor layers that are run again, nor a second run changes a bit.
#[test]
fn runs_are_the_same() {
    let folder = folder();
    let result = |name: &str, flags: &[&str]| {
        let done = finetune(
            folder.path(),
            name,
            &[&ALL[..], &["--max-steps", "4", "--epochs", "9", "--grouping", "none"], flags].concat(),
        );
        assert!(done.ok, "{}", done.stderr);
        tensors(&folder.path().join(name))
    };
    let expected = result("a", &["--threads", "2"]);
    assert!(result("b", &["--threads", "2"]) == expected);
    assert!(result("c", &["--threads", "1"]) == expected);
    assert!(result("d", &["--recompute", "selective"]) == expected);
    assert!(result("e", &["--seed", "43"]) != expected);
}

#[test]
fn what_cannot_be_done_is_said() {
    let folder = folder();
    let fails = |output: &str, flags: &[&str], expected: &[&str]| {
        let done = finetune(folder.path(), output, flags);
        assert!(!done.ok && expected.iter().all(|text| done.stderr.contains(text)), "{flags:?}: {}", done.stderr);
        assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
    };
    fails("x", &["--tune", "lora", "--base-bits", "4"], &["base_bits is 4", "bf16", "quantize --bits 4"]);
    fails("x", &["--tune", "full", "--tune-vision", "lora"], &["tune_vision", "tune = lora"]);
    fails("x", &["--tune", "lora", "--lora-r", "0"], &["lora_r"]);
    fails("x", &["--tune", "lora", "--lora-targets", "lm_head"], &["lora_targets", "lm_head", "q_proj"]);
    fails("x", &["--tune", "full", "--recompute", "none"], &["recompute", "selective"]);
    fails("x", &["--tune", "full", "--eval-share", "0.5"], &["eval"]);
    fails("x", &["--tune", "full", "--save-steps", "1", "--epochs", "5"], &["save_steps"]);
    fails("x", &["--tune", "full", "--lr", "nan"], &["lr"]);
    assert!(!folder.path().join("x").exists(), "nothing is written before it is known that there is something to write");
    std::fs::create_dir(folder.path().join("full")).unwrap();
    std::fs::write(folder.path().join("full/file"), "").unwrap();
    fails("full", &["--tune", "full", "--epochs", "1"], &["full", "not empty"]);
    // Numbers that leave all bounds stop the run at a step that is named, and leave no checkpoint.
    let done = finetune(folder.path(), "nan", &["--tune", "full", "--lr", "1e38", "--max-grad-norm", "0", "--epochs", "9"]);
    assert!(!done.ok && done.stderr.contains("step "), "{}", done.stderr);
    assert!(!folder.path().join("nan/config.json").exists());
}

#[test]
fn bad_rows_stop_a_run_or_are_left_out() {
    let folder = folder();
    let mut rows = rows();
    rows[3]["image"] = "nowhere.png".into();
    std::fs::write(folder.path().join("rows.json"), rows.to_string()).unwrap();
    let with = |output: &str, flags: &[&str]| {
        let flags = [&["--tune", "projector", "--epochs", "2"], flags].concat();
        finetune(folder.path(), output, &flags)
    };
    let done = with("a", &[]);
    assert!(!done.ok && done.stderr.contains("row 4 (id d)") && done.stderr.contains("nowhere.png"), "{}", done.stderr);
    let done = with("b", &["--max-bad-rows", "1"]);
    assert!(done.ok, "{}", done.stderr);
    assert_eq!(done.stderr.matches("left out: ").count(), 1, "{}", done.stderr);
    // One after the other, in whatever order they come.
    rows[0]["image"] = "neither.png".into();
    std::fs::write(folder.path().join("rows.json"), rows.to_string()).unwrap();
    for seed in ["1", "2", "3", "4"] {
        let one_by_one = ["--max-bad-rows", "2", "--seed", seed, "--grouping", "none", "--batch-size", "1", "--accumulation", "1"];
        let done = with(&format!("seed{seed}"), &one_by_one);
        assert!(done.ok && done.stderr.matches("left out: ").count() == 2, "{}", done.stderr);
        assert!(done.stderr.contains("nowhere.png") && done.stderr.contains("neither.png"), "{}", done.stderr);
    }
}

/// A batch of rows is what its rows are by themselves: each sees its own pictures and no other row.
#[test]
fn losses_of_rows_add_up() {
    let folder = folder();
    let steps = |name: &str, batch: &str, accumulation: &str| {
        let sizes = ["--batch-size", batch, "--accumulation", accumulation, "--lr", "1e-30", "--tune", "projector"];
        let done = finetune(folder.path(), name, &sizes);
        assert!(done.ok, "{}", done.stderr);
        let of = |step: &Value| (step["loss"].as_f64().unwrap(), step["n_learned"].as_f64().unwrap());
        log(&folder.path().join(name)).iter().map(of).collect::<Vec<_>>()
    };
    let rows = steps("rows", "1", "1");
    assert_eq!(rows.len(), 5);
    let n_learned: f64 = rows.iter().map(|r| r.1).sum();
    let whole = steps("whole", "5", "1");
    let mean = rows.iter().map(|(loss, n)| loss * n).sum::<f64>() / n_learned;
    assert!((whole[0].0 - mean).abs() < 1e-5 * mean && whole[0].1 == n_learned, "{whole:?} is not the mean of {rows:?}");
    let accumulated = steps("accumulated", "1", "5");
    let mean = rows.iter().map(|r| r.0).sum::<f64>() / 5.0;
    assert!((accumulated[0].0 - mean).abs() < 1e-5 * mean, "{accumulated:?} is not the mean of {rows:?}");
    // Steps of two and of two batches, and one of what is left.
    assert_eq!(steps("steps", "1", "2").len(), 3);
}
