//! `finetune --plan`: what it says of a run is what the run takes.

mod support;

use std::path::Path;

use serde_json::Value;
use support::program::{fail, succeed};
use support::root;

/// Flags of a run of the demo model on its calibration rows, each four times.
fn flags(dir: &Path) -> Vec<String> {
    let folder = root().join("models/demo/calibration");
    let rows: Vec<Value> = serde_json::from_slice(&std::fs::read(folder.join("rows.json")).unwrap()).unwrap();
    let data = dir.join("rows.json");
    std::fs::write(&data, serde_json::to_string(&[&rows[..]; 4].concat()).unwrap()).unwrap();
    let mut flags = vec!["--data".to_owned(), data.display().to_string(), "--image-folder".into(), folder.display().to_string()];
    flags.extend(["--accumulation", "2", "--max-steps", "2", "--epochs", "9", "--template", "hf"].map(String::from));
    flags
}

fn run(flags: &[String], more: &[&str]) -> Value {
    let args: Vec<&str> =
        ["finetune", "--json"].into_iter().chain(flags.iter().map(String::as_str)).chain(more.iter().copied()).collect();
    serde_json::from_str(&succeed(&args)).unwrap()
}

/// The most memory that a run has resident is within 5 % of what is planned.
#[test]
fn a_run_takes_what_was_planned() {
    let dir = tempfile::tempdir().unwrap();
    let flags = flags(dir.path());
    let settings: [&[&str]; 9] = [
        &["--tune", "full", "--tune-vision", "full", "--recompute", "selective", "--batch-size", "16"],
        &["--tune", "full", "--tune-vision", "full", "--recompute", "full", "--batch-size", "32"],
        &["--tune", "full", "--recompute", "selective", "--batch-size", "24", "--eval-share", "0.1"],
        &["--tune", "lora", "--lora-r", "64", "--tune-vision", "lora", "--recompute", "selective", "--batch-size", "24"],
        &["--tune", "projector", "--recompute", "full", "--batch-size", "32", "--grouping", "none"],
        &["--tune", "full", "--recompute", "full", "--grouping", "packed", "--pack-tokens", "3000"],
        &["--tune", "full", "--tune-vision", "full", "--recompute", "none", "--batch-size", "16"],
        &["--tune", "full", "--recompute", "none", "--batch-size", "24", "--dtype", "bf16"],
        &["--tune", "lora", "--lora-r", "512", "--recompute", "full", "--batch-size", "4", "--dtype", "f16"],
    ];
    for (i, setting) in settings.iter().enumerate() {
        let dtype = if setting.contains(&"--dtype") { &[][..] } else { &["--dtype", "f32"] };
        let setting = &[*setting, dtype].concat();
        let plan = run(&flags, &[&setting[..], &["--plan"]].concat());
        let output = dir.path().join(format!("out{i}")).display().to_string();
        let done = run(&flags, &[&setting[..], &["--output", &output]].concat());
        let [planned, measured] = [&plan["bytes"], &done["peak_memory_bytes"]].map(|bytes| bytes.as_f64().unwrap());
        println!("{setting:?}: {:.1} MB planned, {:.1} MB measured", planned / 1e6, measured / 1e6);
        assert!((measured / planned - 1.0).abs() < 0.05, "{setting:?}: {measured} is not {planned}: {plan}");
        // What it says of steps is what the log has.
        let log = std::fs::read_to_string(Path::new(&output).join("log.jsonl")).unwrap();
        let steps: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let sum = |key: &str| steps.iter().map(|step| step[key].as_f64().unwrap()).sum::<f64>();
        assert_eq!((plan["plan"]["n_steps"].as_u64(), plan["plan"]["n_tokens"].as_f64()), (Some(2), Some(sum("n_tokens"))));
        assert!((plan["plan"]["tflop"].as_f64().unwrap() / sum("tflop") - 1.0).abs() < 1e-9);
    }
}

#[test]
fn a_plan_needs_no_output_and_loads_no_weights() {
    let dir = tempfile::tempdir().unwrap();
    let flags = flags(dir.path());
    let text = succeed(
        &["finetune", "--plan"].into_iter().chain(flags.iter().map(String::as_str)).chain(["--tune", "full"]).collect::<Vec<_>>(),
    );
    assert!(text.starts_with("128 rows, 2 steps, ") && text.contains("at most"), "{text}");
    let (code, message) =
        fail(&["finetune", "--plan", "--check-data"].into_iter().chain(flags.iter().map(String::as_str)).collect::<Vec<_>>());
    assert!(code == 2 && message.contains("--check-data"), "{message}");
}
