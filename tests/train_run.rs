//! `finetune`, from rows to a checkpoint that answers.

mod support;

use llava_engine::dtype::DType;
use llava_engine::weights::names::Part;
use llava_engine::weights::{Source, Store};
use serde_json::Value;
use support::finetune::{MODEL, finetune, finetune_of, folder, log, rows, tensors};
use support::program::{break_weight, copy_dir, succeed};
use support::{fixture, kernel_device};

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
    let svg = std::fs::read_to_string(out.join("loss.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("smoothed") && !svg.contains("NaN"), "{svg}");
    // A file of events: its version, and one for each step.
    let events = std::fs::read(out.join("tensorboard/events.out.tfevents")).unwrap();
    let (mut at, mut n_events) = (0, 0);
    while at < events.len() {
        at += 16 + u64::from_le_bytes(events[at..at + 8].try_into().unwrap()) as usize;
        n_events += 1;
    }
    assert_eq!((at, n_events), (events.len(), 31));
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
    assert!(
        done.stdout.starts_with("step 1/3  loss ") && !done.stderr.contains("nothing will be"),
        "{} {}",
        done.stdout,
        done.stderr
    );
    // A run of one step is all warm-up, and says so.
    let done = finetune(folder.path(), "idle", &["--tune", "projector"]);
    assert!(done.ok && done.stderr.contains("nothing will be learned: the run is all warm-up"), "{}", done.stderr);
    assert!(tensors(&folder.path().join("idle")) == tensors(&fixture(MODEL)));
    let (before, after) = (tensors(&fixture(MODEL)), tensors(&folder.path().join("out")));
    for (name, bytes) in &after {
        assert_eq!(before[name] != *bytes, name.contains("projector"), "{name}");
    }
    assert_eq!(after.len(), before.len(), "what LLaVA has no use for is written again too");
    // The projector by itself, as the original's first stage leaves it for the second.
    let mut projector = Store::new(folder.path());
    projector.add(&folder.path().join("out/mm_projector.bin"), &[Part::Projector]).unwrap();
    let sources: Vec<_> = projector.entries().map(|entry| (entry.source, entry.canonical.unwrap(), entry.shape)).collect();
    assert_eq!(sources.len(), 4);
    for (source, canonical, shape) in sources {
        assert!(source.starts_with("model.mm_projector."), "{source}");
        let (_, whole) = after.iter().find(|(name, _)| name.ends_with(&format!("multi_modal_{canonical}"))).unwrap();
        assert!(projector.tensor(&canonical, &shape).unwrap().converted(DType::Bf16).as_bytes() == whole, "{canonical}");
    }
}

/// Neither another number of threads, nor layers that are run again, nor evaluation, nor a second run changes a bit.
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
    assert!(result("n", &["--recompute", "none"]) == expected);
    assert!(result("e", &["--seed", "43"]) != expected);
    let file = folder.path().join("rows.json").into_os_string().into_string().unwrap();
    assert!(result("f", &["--eval-data", &file, "--eval-steps", "1"]) == expected, "evaluation teaches");
}

/// The CUDA kernels take the same steps, of a whole decoder and of additions to it. (`tests/gradients.rs` has the vision tower.)
#[test]
fn kernels_train_as_the_cpu_does() {
    let Some(device) = kernel_device() else { return println!("skipped: neither a GPU nor the simulator") };
    let (folder, device) = (folder(), device.to_string());
    for (name, tune) in [("full", &["--tune", "full"][..]), ("lora", &["--tune", "lora", "--lora-r", "4", "--lora-dropout", "0.2"])]
    {
        let losses = |device: &str| {
            let flags = ["--max-steps", "2", "--batch-size", "1", "--accumulation", "1", "--warmup-ratio", "0", "--device", device];
            let output = format!("{name}_{device}");
            let done = finetune(folder.path(), &output, &[tune, &flags[..]].concat());
            assert!(done.ok, "{}", done.stderr);
            log(&folder.path().join(output)).iter().map(|row| row["loss"].as_f64().unwrap()).collect::<Vec<_>>()
        };
        let (cpu, kernels) = (losses("cpu"), losses(&device));
        assert!(
            cpu.len() == 2 && cpu.iter().zip(&kernels).all(|(c, k)| (c - k).abs() < 2e-4 * c),
            "{name}: {kernels:?} is not {cpu:?}"
        );
    }
}

/// In 16 bits a model learns its rows as well, on the CPU, and begins as kernels do; nothing of weights that come in f32 is lost.
#[test]
fn models_learn_in_16_bits() {
    let folder = folder();
    for dtype in ["bf16", "f16"] {
        let done = finetune(folder.path(), dtype, &[&ALL[..], &["--dtype", dtype, "--epochs", "30"]].concat());
        assert!(done.ok && done.stdout.contains("loss scale 65536") == (dtype == "f16"), "{} {}", done.stdout, done.stderr);
        let steps = log(&folder.path().join(dtype));
        let loss = |i: usize| steps[i]["loss"].as_f64().unwrap();
        assert!(loss(29) < 0.2 * loss(0), "{dtype}: {} to {}", loss(0), loss(29));
    }
    let Some(device) = kernel_device() else { return println!("skipped: neither a GPU nor the simulator") };
    let (device, model) = (device.to_string(), fixture("checkpoints/hf_mha_f32"));
    let run = |name: &str, flags: &[&str]| {
        let one = ["--batch-size", "1", "--accumulation", "1", "--device"];
        let done = finetune_of(&model, folder.path(), name, &[&one[..], flags].concat());
        assert!(done.ok, "{}", done.stderr);
        log(&folder.path().join(name)).iter().map(|row| row["loss"].as_f64().unwrap()).collect::<Vec<_>>()
    };
    // A step of warm-up alone: the model is written as it came.
    run("idle", &[&device, "--tune", "full", "--dtype", "bf16", "--max-steps", "1"]);
    assert!(tensors(&folder.path().join("idle")) == tensors(&model));
    // Matrices that stay as they are come in the device's dtype. Both steps in f16 are skipped: gradients of activations are in f16 there, and
    // overflow until the scale has fallen.
    for (dtype, is_skipped) in [("bf16", false), ("f16", true)] {
        let lora = ["--tune", "lora", "--lora-r", "4", "--lora-dropout", "0.2", "--warmup-ratio", "0", "--max-steps", "2"];
        let losses = |device: &str| run(&format!("{dtype}_{device}"), &[&[device, "--dtype", dtype], &lora[..]].concat());
        let (cpu, kernels) = (losses("cpu"), losses(&device));
        println!("{dtype}: {kernels:?}, on the CPU {cpu:?}");
        assert!((cpu[0] - kernels[0]).abs() < 0.01 * cpu[0], "{dtype}: {kernels:?} is not {cpu:?}");
        assert!(is_skipped || (cpu[1] - kernels[1]).abs() < 0.02 * cpu[1], "{dtype}: {kernels:?} is not {cpu:?}");
        let rows = log(&folder.path().join(format!("{dtype}_{device}")));
        assert!(rows.iter().all(|row| row["is_skipped"].is_boolean() == is_skipped), "{rows:?}");
    }
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
    fails("x", &["--tune", "full", "--eval-share", "0.01"], &["eval_share", "none"]);
    fails("x", &["--tune", "full", "--eval-data", "nowhere.json"], &["nowhere.json"]);
    fails("x", &["--tune", "full", "--lr", "nan"], &["lr"]);
    fails("x", &["--tune", "full", "--device", "gpu"], &["gpu", "cuda"]);
    fails("x", &["--tune", "full", "--accumulation", "1000000000"], &["accumulation", "65536"]);
    fails("x", &["--tune", "lora", "--lora-r", "1000000000000"], &["lora_r", "65536"]);
    assert!(!folder.path().join("x").exists(), "nothing is written before it is known that there is something to write");
    std::fs::create_dir(folder.path().join("full")).unwrap();
    std::fs::write(folder.path().join("full/file"), "").unwrap();
    fails("full", &["--tune", "full", "--epochs", "1"], &["full", "not empty"]);
    // Numbers that leave all bounds stop the run at a step that is named, and leave no checkpoint.
    let flags = ["--tune", "full", "--lr", "1e38", "--max-grad-norm", "0", "--epochs", "9", "--save-steps", "1"];
    let done = finetune(folder.path(), "nan", &flags);
    assert!(!done.ok && done.stderr.contains("step 3, ") && done.stderr.contains("finite"), "{}", done.stderr);
    assert!(!folder.path().join("nan/config.json").exists());
    assert!(folder.path().join("nan/checkpoint-2/manifest.json").exists(), "the last checkpoint stays");
    // Layers are named from the front, counted from 0.
    let model = folder.path().join("broken");
    copy_dir(&fixture("checkpoints/hf_mha_f32"), &model);
    break_weight(&model, "language_model.model.layers.1.mlp.down_proj.weight");
    let done = finetune_of(&model, folder.path(), "layer", &["--tune", "projector"]);
    assert!(!done.ok && done.stderr.contains("step 1, decoder layer 1: the loss is NaN"), "{}", done.stderr);
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

/// Rows that are held out are not learnt, and say when a model only remembers.
#[test]
fn held_out_rows_are_not_learnt() {
    let folder = folder();
    let flags = [&ALL[..], &["--eval-share", "0.4", "--eval-steps", "10", "--epochs", "60", "--batch-size", "3"]].concat();
    let done = finetune(folder.path(), "out", &flags);
    assert!(done.ok && done.stdout.contains("of the rows to evaluate by"), "{} {}", done.stdout, done.stderr);
    let steps = log(&folder.path().join("out"));
    let last = steps.last().unwrap();
    assert!(last["loss"].as_f64().unwrap() < 0.1 && last["eval_loss"].as_f64().unwrap() > 1.0, "{last}");
    assert_eq!(steps.iter().filter(|row| row["eval_loss"].is_number()).count(), 6);
    // One that cannot be used is found before the first step.
    let mut rows = rows();
    rows.as_array_mut()
        .unwrap()
        .iter_mut()
        .filter(|row| row["image"].is_string())
        .for_each(|row| row["image"] = "nowhere.png".into());
    std::fs::write(folder.path().join("bad.json"), rows.to_string()).unwrap();
    let bad = folder.path().join("bad.json").into_os_string().into_string().unwrap();
    let flags = ["--tune", "projector", "--eval-data", &bad, "--max-bad-rows"];
    let done = finetune(folder.path(), "bad", &[&flags[..], &["2"]].concat());
    assert!(!done.ok && done.stdout.is_empty() && done.stderr.contains("nowhere.png"), "{}", done.stderr);
    let done = finetune(folder.path(), "put_up_with", &[&flags[..], &["3"]].concat());
    assert!(done.ok && done.stderr.matches("left out: ").count() == 3, "{}", done.stderr);
}

/// A batch of rows is what its rows are by themselves: each sees its own pictures and no other row.
#[test]
fn losses_of_rows_add_up() {
    let folder = folder();
    let file = folder.path().join("rows.json").into_os_string().into_string().unwrap();
    let steps = |name: &str, batch: &str, accumulation: &str| {
        let sizes = ["--batch-size", batch, "--accumulation", accumulation, "--lr", "1e-30", "--tune", "projector"];
        let done = finetune(folder.path(), name, &[&sizes[..], &["--eval-data", &file, "--eval-steps", "2"]].concat());
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
    // So are those that a model is evaluated by, whatever the batches; after each second step and the last.
    for (name, evaluated) in [("rows", &[2, 4, 5][..]), ("whole", &[1])] {
        let rows = log(&folder.path().join(name));
        let found = rows.iter().filter_map(|row| Some((row["step"].as_u64()?, row["eval_loss"].as_f64()?)));
        let found: Vec<_> = found.collect();
        assert_eq!(found.iter().map(|(step, _)| *step).collect::<Vec<_>>(), evaluated);
        assert!(found.iter().all(|(_, loss)| (loss - mean).abs() < 1e-5 * mean), "{found:?} is not {mean}");
    }
    let accumulated = steps("accumulated", "1", "5");
    let mean = rows.iter().map(|r| r.0).sum::<f64>() / 5.0;
    assert!((accumulated[0].0 - mean).abs() < 1e-5 * mean, "{accumulated:?} is not the mean of {rows:?}");
    // A batch of which nothing can be used does not count.
    let mut bad = support::finetune::rows();
    bad[3]["image"] = "nowhere.png".into();
    std::fs::write(folder.path().join("rows.json"), bad.to_string()).unwrap();
    let done = finetune(
        folder.path(),
        "bad",
        &["--batch-size", "1", "--accumulation", "5", "--lr", "1e-30", "--tune", "projector", "--max-bad-rows", "1"],
    );
    assert!(done.ok, "{}", done.stderr);
    let loss = log(&folder.path().join("bad"))[0]["loss"].as_f64().unwrap();
    let by_loss: Vec<f64> = rows.iter().map(|r| r.0).collect();
    let without_one = by_loss.iter().map(|left_out| (by_loss.iter().sum::<f64>() - left_out) / 4.0);
    assert!(without_one.into_iter().any(|mean| (loss - mean).abs() < 1e-5 * mean), "{loss} is no mean of four of {by_loss:?}");
    std::fs::write(folder.path().join("rows.json"), support::finetune::rows().to_string()).unwrap();
    // Steps of two and of two batches, and one of what is left.
    assert_eq!(steps("steps", "1", "2").len(), 3);
}
