//! The command line on other devices than the CPU: what it says where there is none, and that the simulated kernels answer as the CPU does.

mod support;

use std::process::{Command, Output};

use support::fixture;

/// `generate` of a tiny model about a picture, in f32, greedily unless `flags` say otherwise.
fn generate(flags: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_llava-engine"));
    command.env_clear().env("HOME", "/nowhere").env("HF_HUB_OFFLINE", "1").env("LLAVA_THREADS", "2");
    command.args(["generate", "--json", "--max-new-tokens", "6", "--dtype", "f32"]);
    command.args(["--raw-prompt", "USER: <image>\nWhat is this? ASSISTANT:"]);
    command.arg("--model").arg(fixture("checkpoints/hf_mha_f32")).arg("--image").arg(fixture("images/square.png"));
    if !flags.contains(&"--temperature") {
        command.args(["--temperature", "0"]);
    }
    command.args(flags).output().unwrap()
}

fn token_ids(output: &Output) -> serde_json::Value {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), &*stderr), (Some(0), ""));
    serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()["token_ids"].take()
}

#[test]
fn a_gpu_that_is_not_there_is_said_in_one_line() {
    if llava_engine::cuda::Cuda::has_driver() {
        println!("skipped: this machine has an NVIDIA driver");
        return;
    }
    let output = generate(&["--device", "cuda"]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), output.stdout.len(), stderr.lines().count()), (Some(1), 0, 1), "{stderr}");
    let reason = if cfg!(llava_cuda) { "no NVIDIA driver" } else { "no GPU kernels" };
    assert!(stderr.starts_with("error: ") && stderr.contains(reason), "{stderr}");
    // Where nothing suggests a GPU, auto is the CPU and says nothing.
    assert_eq!(token_ids(&generate(&["--device", "auto"])), token_ids(&generate(&["--device", "cpu"])));
}

#[cfg(llava_sim)]
#[test]
fn simulated_kernels_answer_as_the_cpu() {
    let cpu = token_ids(&generate(&["--device", "cpu"]));
    assert!(cpu.as_array().is_some_and(|ids| !ids.is_empty()), "{cpu}");
    assert_eq!(token_ids(&generate(&["--device", "sim"])), cpu);
    // Every op once more on the CPU: no difference is found.
    assert_eq!(token_ids(&generate(&["--device", "sim", "--check-ops"])), cpu);
}

/// The same seed draws the same tokens on every device.
#[cfg(llava_sim)]
#[test]
fn simulated_kernels_draw_as_the_cpu() {
    let drawn = |device, seed| {
        let flags = ["--temperature", "1.5", "--top-k", "50", "--top-p", "0.95", "--min-p", "0.001", "--repetition-penalty", "1.2"];
        token_ids(&generate(&[&flags[..], &["--seed", seed, "--device", device, "--check-ops"]].concat()))
    };
    for seed in ["1", "2"] {
        assert_eq!(drawn("sim", seed), drawn("cpu", seed), "seed {seed}");
    }
    assert_ne!(drawn("cpu", "1"), drawn("cpu", "2"));
}
