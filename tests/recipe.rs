//! The demo model's recipe, as far as two minutes go: from random weights to a model that tells what a picture shows, patch by patch.

mod support;

use std::path::PathBuf;
use std::process::Command;

use support::finetune::log;
use support::root;

/// A Python that can draw the pictures.
fn python() -> Option<PathBuf> {
    let named = std::env::var_os("PYTHON").map(PathBuf::from);
    named.into_iter().chain([root().join(".cuda-venv/bin/python"), "python3".into()]).find(|python| {
        let import = Command::new(python).args(["-c", "import numpy, PIL, tokenizers"]).output();
        import.is_ok_and(|output| output.status.success())
    })
}

#[test]
fn a_model_learns_to_see_from_nothing() {
    let Some(python) = python() else {
        let why = "no Python with tools/demo_model/data-requirements.txt";
        assert!(std::env::var_os("LLAVA_RECIPE").is_none_or(|v| v != "required"), "{why}");
        return println!("skipped: {why}");
    };
    let out = tempfile::tempdir().unwrap();
    let mut command = Command::new(root().join("tools/demo_model/train.sh"));
    command.arg(out.path()).arg("quick").env("PYTHON", python).env("LLAVA_ENGINE", env!("CARGO_BIN_EXE_llava-engine"));
    let done = command.output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let steps = log(&out.path().join("patches"));
    let last = steps.last().unwrap();
    let (first, loss) = (steps[0]["loss"].as_f64().unwrap(), last["eval_loss"].as_f64().unwrap());
    println!("loss {first:.2} of the first step, {loss:.3} of rows that were held out, in {} steps", steps.len());
    // Nobody knows anything: one of 768 tokens. Who knows how often each word comes, but sees nothing, has 0.87 (a fifth of the patches
    // show one of seven shapes, eight colours, two sizes).
    assert!((first - 768f64.ln()).abs() < 0.8, "{first}");
    assert!(loss < 0.35, "{loss}");
}
