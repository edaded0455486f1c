//! The command line on other devices than the CPU: what it says where there is none or something is wrong with it, and that the simulated
//! kernels answer as the CPU does.

mod support;

use std::io::Write;
use std::process::{Command, Output, Stdio};

use support::fixture;

const PROMPT: &str = "USER: <image>\nWhat is this? ASSISTANT:";

/// A subcommand for a tiny model, unless `flags` name another, and a picture.
fn command(subcommand: &str, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_llava-engine"));
    command.env_clear().env("HOME", "/nowhere").env("HF_HUB_OFFLINE", "1").env("LLAVA_THREADS", "2");
    command.arg(subcommand).arg("--image").arg(fixture("images/square.png")).args(flags);
    if !flags.contains(&"--model") {
        command.arg("--model").arg(fixture("checkpoints/hf_mha_f32"));
    }
    command
}

/// `generate` in f32, greedily unless `flags` say otherwise.
fn generate_command(flags: &[&str]) -> Command {
    let mut command = command("generate", flags);
    command.args(["--json", "--max-new-tokens", "6", "--dtype", "f32", "--raw-prompt", PROMPT]);
    if !flags.contains(&"--temperature") {
        command.args(["--temperature", "0"]);
    }
    command
}

fn generate(flags: &[&str]) -> Output {
    generate_command(flags).output().unwrap()
}

/// `generate` on a simulated GPU with faults.
#[cfg(llava_sim)]
fn generate_with(faults: &str, flags: &[&str]) -> Output {
    generate_command(&[&["--device", "sim"], flags].concat()).env("LLAVA_SIM_FAULTS", faults).output().unwrap()
}

/// Checks that a run ended with `code`, no answer, and one line that has all of `words`.
fn refused(output: Output, code: i32, words: &[&str]) {
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), output.stdout.len(), stderr.lines().count()), (Some(code), 0, 1), "{stderr}");
    assert!(stderr.starts_with("error: ") && words.iter().all(|word| stderr.contains(word)), "{stderr}, expected {words:?}");
}

fn token_ids(output: &Output) -> serde_json::Value {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), &*stderr), (Some(0), ""));
    serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()["token_ids"].take()
}

/// Guesses and a cache of 8 bits are flags of any device; what they cannot be is said before anything is opened.
#[test]
fn guesses_and_small_caches() {
    let plain = generate(&["--device", "cpu"]);
    let guessed = generate(&["--device", "cpu", "--prompt-lookup", "3"]);
    assert_eq!(token_ids(&guessed), token_ids(&plain));
    let usage = |output: &Output| serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()["usage"].take();
    assert!(usage(&plain).get("drafted_tokens").is_none(), "nobody asked for guesses");
    assert!(["drafted_tokens", "accepted_tokens"].iter().all(|key| usage(&guessed)[key].is_u64()), "{}", usage(&guessed));
    assert_eq!(token_ids(&generate(&["--device", "cpu", "--kv-cache-dtype", "int8"])).as_array().unwrap().len(), 6);
    refused(generate(&["--prompt-lookup", "4"]), 2, &["--prompt-lookup 4", "at most 3"]);
    refused(generate(&["--kv-cache-dtype", "int4"]), 2, &["int4", "f32, f16, bf16 or int8"]);
}

#[test]
fn a_gpu_that_is_not_there_is_said_in_one_line() {
    if llava_engine::cuda::Cuda::has_driver() {
        println!("skipped: this machine has an NVIDIA driver");
        return;
    }
    refused(generate(&["--device", "cuda"]), 1, &[if cfg!(llava_cuda) { "no NVIDIA driver" } else { "no GPU kernels" }]);
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
    let small_cache = |flags: &[&str]| token_ids(&generate(&[&["--kv-cache-dtype", "int8"], flags].concat()));
    assert_eq!(small_cache(&["--device", "sim", "--check-ops"]), small_cache(&["--device", "cpu"]));
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

/// On the driver of `tests/support/fake_libcuda.c`, whose faults stand in the environment.
#[cfg(target_os = "linux")]
#[test]
fn a_gpu_that_cannot_be_used_is_said_with_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let library = dir.path().join("libcuda.so");
    let source = support::root().join("tests/support/fake_libcuda.c");
    let built = Command::new("cc").args(["-shared", "-fPIC", "-w", "-o"]).arg(&library).arg(source).status();
    if !built.is_ok_and(|status| status.success()) {
        println!("skipped: this machine has no C compiler");
        return;
    }
    let on = |device: &str, fault: &str| {
        let mut command = generate_command(&["--device", device]);
        command.env("LD_LIBRARY_PATH", dir.path()).envs(fault.split_once('=')).output().unwrap()
    };
    let cpu = token_ids(&generate(&["--device", "cpu"]));
    let unusable: &[(&str, &[&str])] = if cfg!(llava_cuda) {
        &[
            ("FAKE_DRIVER=11080", &["driver supports CUDA 11.8", "need 13.0", "580", "--device cpu"]),
            ("FAKE_CAPABILITY=75", &["Pretended GPU", "compute capability 7.5", "or later", "--device cpu"]),
        ]
    } else {
        &[("", &["no GPU kernels"])]
    };
    for (fault, words) in unusable {
        refused(on("cuda", fault), 1, words);
        // auto takes the CPU instead, and says why.
        let mut auto = on("auto", fault);
        let note = String::from_utf8(std::mem::take(&mut auto.stderr)).unwrap();
        assert!(note.starts_with("llava-engine: running on the CPU: ") && note.lines().count() == 1, "{note}");
        assert!(words.iter().all(|word| note.contains(word)), "{note}, expected {words:?}");
        assert_eq!(token_ids(&auto), cpu);
    }
    if cfg!(llava_cuda) {
        refused(on("cuda", "FAKE_MEMORY=102400"), 1, &["weights", "of 100.0 KiB are free", "--device cpu"]);
        refused(on("cuda", "FAKE_LAUNCH=701"), 1, &["resize_horizontal_u8", "too many resources"]);
        refused(on("cuda", "FAKE_WAIT=700"), 1, &["illegal memory access", "--check-nan"]);
    }
}

#[cfg(llava_sim)]
#[test]
fn a_simulated_gpu_that_cannot_be_used_is_said_with_numbers() {
    refused(generate_with("driver=11.8", &[]), 1, &["driver supports CUDA 11.8", "need 13.0", "580", "--device cpu"]);
    refused(generate_with("capability=7.5", &[]), 1, &["compute capability 7.5", "or later", "--device cpu"]);
    refused(generate_with("memory=much", &[]), 2, &["LLAVA_SIM_FAULTS", "memory=much", "memory=200MiB"]);
}

/// Each part of what a run needs, and that what the message advises helps.
#[cfg(llava_sim)]
#[test]
fn too_little_memory_is_said_with_numbers_and_what_to_change() {
    let weights = "out of device memory for the model's weights";
    refused(generate_with("memory=100KiB", &[]), 1, &[weights, "are needed", "of 100.0 KiB are free", "--dtype bf16"]);
    let chunk = "out of device memory for buffers of 512 tokens at once";
    refused(generate_with("memory=1MiB", &[]), 1, &[chunk, "KiB more", "KiB of 1.0 MiB are free", "shorter --context"]);
    let cache = "out of device memory for a KV cache of 512 tokens (256.0 KiB in all): 64.0 KiB more";
    refused(generate_with("memory=1900KiB", &[]), 1, &[cache, "KiB of 1.9 MiB are free", "shorter --context"]);
    let images = "out of device memory for encoding the images: 1.0 MiB more";
    refused(generate_with("memory=1MiB", &["--context", "128"]), 1, &[images, "KiB of 1.0 MiB are free", "fewer images"]);
    // What was advised helps.
    let expected = token_ids(&generate(&["--device", "cpu"]));
    assert_eq!(token_ids(&generate_with("memory=1900KiB", &["--context", "64"])), expected);
}

#[cfg(llava_sim)]
#[test]
fn a_failing_launch_names_its_kernel() {
    refused(generate_with("fail_launch=rms_norm", &[]), 1, &["rms_norm_fwd_f32: the launch is refused"]);
    refused(generate_with("fail_launch=gemv:9", &[]), 1, &["gemv_f32: the launch is refused"]);
    refused(generate_with("crash=silu_mul", &[]), 1, &["in a kernel that was launched before", "--check-nan"]);
}

/// What `chat` writes, to (standard output, standard error), when it is asked `questions` on a simulated GPU with faults.
#[cfg(llava_sim)]
fn chat(faults: &str, questions: &[&str]) -> (String, String) {
    let mut command = command("chat", &["--device", "sim", "--max-new-tokens", "6", "--temperature", "0"]);
    command.env("LLAVA_SIM_FAULTS", faults).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let lines: String = questions.iter().map(|question| format!("{question}\n")).collect();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let [stdout, stderr] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    (stdout, stderr)
}

/// A launch that was refused costs one answer; the device is as if nothing had been. One that lost the device is said each time.
#[cfg(llava_sim)]
#[test]
fn a_chat_goes_on_after_a_failing_launch() {
    let (expected, said) = chat("", &["Who are you?"]);
    assert!(!expected.trim().is_empty() && said.is_empty(), "{expected}{said}");
    // In the picture, in the prompt, at the first token, and in a step that is replayed.
    for launch in ["layer_norm", "rope_append", "sample", "sample:5"] {
        let (answer, said) = chat(&format!("fail_launch={launch}"), &["What is this?", "Who are you?"]);
        assert!(said.lines().count() == 1 && said.contains("the launch is refused"), "{launch}: {said}");
        assert!(answer.ends_with(&expected), "{launch}: {answer:?}, expected {expected:?}");
    }
    let (answer, said) = chat("crash=attention", &["What is this?", "Who are you?"]);
    assert!(answer.trim().is_empty(), "{answer}");
    assert!(said.lines().count() == 2 && said.lines().all(|line| line.contains("can use the device no more")), "{said}");
}

// ---------------------------------------------------------------- --check-nan

/// The tiny model with one element of a tensor replaced.
fn damaged(tensor: &str, element: usize, value: f32) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture("checkpoints/hf_mha_f32")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = dir.path().join("model.safetensors");
    let mut file = std::fs::read(&path).unwrap();
    let header = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&file[8..8 + header]).unwrap();
    assert_eq!(json[tensor]["dtype"], "F32", "{tensor}");
    let at = 8 + header + json[tensor]["data_offsets"][0].as_u64().unwrap() as usize + 4 * element;
    file[at..at + 4].copy_from_slice(&value.to_le_bytes());
    std::fs::write(&path, file).unwrap();
    dir
}

/// The devices that `--check-nan` is tried on.
const CHECKED: &[&str] = if cfg!(llava_sim) { &["cpu", "sim"] } else { &["cpu"] };

/// A weight that is no number is found in its own layer and op, at the place where it first shows.
#[test]
fn a_damaged_weight_is_found_in_its_layer() {
    let (decoder, vision) = ("language_model.model", "vision_tower.vision_model");
    let cases = [
        (
            format!("{decoder}.layers.1.input_layernorm.weight"),
            17,
            f32::NAN,
            "decoder layer 1, rms_norm",
            "NaN at row 0, column 17",
        ),
        (format!("{decoder}.layers.0.self_attn.v_proj.weight"), 5 * 32, f32::NAN, "decoder layer 0, linear", "column 69"),
        (
            format!("{decoder}.layers.1.mlp.up_proj.weight"),
            0,
            f32::NEG_INFINITY,
            "decoder layer 1, linear",
            "inf at row 0, column 48",
        ),
        (format!("{decoder}.norm.weight"), 3, f32::NAN, "decoder head, rms_norm", "column 3"),
        (format!("{vision}.encoder.layers.2.layer_norm2.bias"), 9, f32::NAN, "vision layer 2, layer_norm", "[17, 32] has NaN"),
        (format!("{vision}.embeddings.class_embedding"), 8, f32::NAN, "vision embeddings, clip_embed", "row 0, column 8"),
        (
            "multi_modal_projector.linear_2.bias".to_owned(),
            31,
            f32::NAN,
            "projector, linear",
            "[16, 32] has NaN at row 0, column 31",
        ),
    ];
    for (tensor, element, value, place, found) in &cases {
        let dir = damaged(tensor, *element, *value);
        let model = ["--model", dir.path().to_str().unwrap()];
        for device in CHECKED {
            let flags = [&model[..], &["--device", device, "--check-nan"]].concat();
            refused(generate(&flags), 1, &[&format!("error: {place}: output"), found]);
        }
    }
}

/// Where it came from is asked for: without the flag, the error says so.
#[test]
fn nan_in_logits_hints_at_the_flag() {
    let dir = damaged("language_model.model.norm.weight", 3, f32::NAN);
    let model = ["--model", dir.path().to_str().unwrap()];
    let score = |flags: &[&str]| command("score", &[&model[..], &["--raw-prompt", PROMPT], flags].concat()).output().unwrap();
    for device in CHECKED {
        refused(generate(&[&model[..], &["--device", device]].concat()), 1, &["NaN for a logit", "--check-nan names the layer"]);
        refused(score(&["--device", device]), 1, &["NaN for a logit", "--check-nan names the layer"]);
        refused(score(&["--device", device, "--check-nan"]), 1, &["decoder head, rms_norm"]);
    }
}

/// Also after a failed launch, with the op that it belongs to.
#[cfg(llava_sim)]
#[test]
fn a_kernel_that_goes_wrong_is_named_by_its_op() {
    refused(generate_with("crash=silu_mul", &["--check-nan"]), 1, &["error: decoder layer 0, silu_mul: "]);
    refused(generate_with("fail_launch=attention:5", &["--check-nan"]), 1, &["error: decoder layer 1, attention: ", "is refused"]);
}

#[test]
fn a_sound_model_answers_the_same_when_it_is_checked() {
    let expected = token_ids(&generate(&["--device", "cpu"]));
    for device in CHECKED {
        assert_eq!(token_ids(&generate(&["--device", device, "--check-nan"])), expected, "{device}");
    }
    assert_eq!(token_ids(&generate(&["--device", "cpu", "--check-nan", "--check-ops"])), expected);
}
