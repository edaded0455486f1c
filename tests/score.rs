//! What `score` makes of a whole prompt: its sum and perplexity run over the tokens of text, whatever else the prompt has.

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use support::fixture;

/// Runs `score` with a tiny model; standard output if it succeeds, else standard error.
fn score(model: &Path, rest: &[&str]) -> Result<String, String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_llava-engine"));
    command.env_clear().env("HF_HUB_OFFLINE", "1").env("LLAVA_THREADS", "1").arg("score").arg("--model").arg(model).args(rest);
    let output = command.output().unwrap();
    let [stdout, stderr] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    if output.status.success() { Ok(stdout) } else { Err(stderr) }
}

/// The same, as the JSON document that it prints.
fn score_json(model: &Path, rest: &[&str]) -> Value {
    serde_json::from_str(&score(model, &[rest, &["--json"]].concat()).unwrap()).unwrap()
}

#[test]
fn sum_and_perplexity_are_those_of_the_text() {
    let image = fixture("images").join("square.png");
    let flags = ["--raw-prompt", "USER: <image>\nWhat is this? ASSISTANT:", "--image", image.to_str().unwrap()];
    // One layout whose image token has an id of its own, one whose image positions have none.
    for (checkpoint, image_token) in [("hf_mha_f32", 320), ("orig_mha_f32", -200)] {
        let model = fixture("checkpoints").join(checkpoint);
        let report = score_json(&model, &flags);
        let [ids, logprobs] = ["input_ids", "logprobs"].map(|key| report[key].as_array().unwrap().as_slice());
        assert_eq!(logprobs.len() + 1, ids.len());
        let texts: Vec<f64> =
            ids[1..].iter().zip(logprobs).filter(|(id, _)| **id != image_token).map(|(_, l)| l.as_f64().unwrap()).collect();
        assert!(!texts.is_empty() && texts.len() < logprobs.len(), "{checkpoint}: the prompt has both");
        let (sum, n): (f64, usize) = (texts.iter().sum(), texts.len());
        for (key, expected) in [("sum", sum), ("perplexity", (-sum / n as f64).exp())] {
            let got = report[key].as_f64().unwrap();
            assert!((got - expected).abs() <= 1e-9 * expected.abs(), "{checkpoint}: {key} {got}, expected {expected}");
        }
        assert_eq!(report["text_tokens"], n);
        let text = score(&model, &flags).unwrap();
        assert!(
            text.ends_with(&format!("\nsum {sum:.4}, perplexity {:.4} over {n} tokens of text\n", (-sum / n as f64).exp())),
            "{text}"
        );
    }
}

/// A prompt of BOS alone is a prompt, but nothing in it is predicted.
#[test]
fn one_token_has_no_perplexity() {
    let model = fixture("checkpoints").join("hf_mha_f32");
    assert_eq!(score(&model, &["--raw-prompt", ""]).unwrap(), "sum 0.0000, perplexity none over 0 tokens of text\n");
    let expected = json!({"input_ids": [1], "logprobs": [], "sum": 0.0, "text_tokens": 0, "perplexity": null});
    assert_eq!(score_json(&model, &["--raw-prompt", ""]), expected);
}

/// Without BOS nothing is left of an empty prompt.
#[test]
fn no_token_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture("checkpoints").join("hf_mha_f32")).unwrap().map(Result::unwrap) {
        if entry.path().is_file() {
            fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
    }
    let path = dir.path().join("tokenizer_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["add_bos_token"] = json!(false);
    fs::write(&path, config.to_string()).unwrap();
    assert_eq!(score(dir.path(), &["--raw-prompt", ""]).unwrap_err(), "error: the prompt is empty\n");
}
