//! Runs of `finetune` that are killed, stopped, or out of disk: each goes on and ends as if nothing had happened, bit for bit.

mod support;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Instant;

use rand_pcg::Pcg64;
use rand_pcg::rand_core::Rng;
use serde_json::Value;
use support::finetune::{MODEL, command, finetune, finetune_of, folder, log, rows, tensors};
use support::fixture;

/// 9 steps over 3 epochs of all parameters, each saved.
const RUN: [&str; 14] = [
    "--tune",
    "full",
    "--tune-vision",
    "full",
    "--epochs",
    "3",
    "--batch-size",
    "1",
    "--accumulation",
    "2",
    "--save-steps",
    "1",
    "--keep",
    "2",
];
const N_STEPS: usize = 9;

fn with(flags: &[&'static str]) -> Vec<&'static str> {
    [&RUN[..], flags].concat()
}

/// Steps of which there are checkpoints, and whatever else is there that looks like one.
fn checkpoints(output: &Path) -> Vec<String> {
    let names = fs::read_dir(output).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| name.contains("checkpoint-")).collect();
    names.sort();
    names
}

/// Asserts that a run has ended as `expected` has.
fn assert_as(expected: &Path, output: &Path) {
    assert!(tensors(output) == tensors(expected), "another result");
    let told = |folder: &Path| {
        let row = |row: serde_json::Value| (row["step"].clone(), row["loss"].clone(), row["lr"].clone(), row["grad_norm"].clone());
        log(folder).into_iter().map(row).collect::<Vec<_>>()
    };
    assert_eq!(told(output), told(expected));
    // As many events, one of which is another size where the speed of a step is.
    let events = |folder: &Path| fs::metadata(folder.join("tensorboard/events.out.tfevents")).unwrap().len();
    assert_eq!(events(output), events(expected));
}

#[test]
fn killed_runs_end_as_undisturbed_ones() {
    let folder = folder();
    let start = Instant::now();
    let done = finetune(folder.path(), "whole", &RUN);
    let whole_run = start.elapsed();
    assert!(done.ok, "{}", done.stderr);
    let whole = folder.path().join("whole");
    assert_eq!((log(&whole).len(), checkpoints(&whole)), (N_STEPS, vec!["checkpoint-7".to_owned(), "checkpoint-8".to_owned()]));

    let mut random = Pcg64::new(1, 2);
    let (mut n_kills, mut n_resumed) = (0, 0);
    for run in 0.. {
        let name = format!("run{run}");
        let output = folder.path().join(&name);
        loop {
            let mut child = command(&fixture(MODEL), folder.path(), &name, &with(&["--resume"]))
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            if n_kills < 50 {
                sleep(whole_run.mul_f64(random.next_u32() as f64 / f64::from(u32::MAX)));
                n_kills += usize::from(child.try_wait().unwrap().is_none());
                child.kill().unwrap();
            }
            let output = child.wait_with_output().unwrap();
            let said = String::from_utf8(output.stderr).unwrap();
            n_resumed += usize::from(said.contains("going on after step"));
            if output.status.success() {
                break;
            }
            assert_eq!(output.status.code(), None, "{said}");
        }
        assert_as(&whole, &output);
        let left = fs::read_dir(&output).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        assert_eq!(left.filter(|name| name.starts_with('.')).collect::<Vec<_>>(), [""; 0]);
        fs::remove_dir_all(output).unwrap();
        if n_kills == 50 {
            break;
        }
    }
    assert!(n_resumed >= 10, "{n_resumed} of 50 runs had a checkpoint to go on from");
}

/// A signal lets the step at hand end and saves.
#[test]
fn stopped_runs_save_first() {
    let folder = folder();
    assert!(finetune(folder.path(), "whole", &with(&["--save-steps", "0"])).ok);
    for (name, signal) in [("term", "-TERM"), ("int", "-INT")] {
        let output = folder.path().join(name);
        // Without checkpoints between steps: what is there then was made for the signal.
        let mut child = command(&fixture(MODEL), folder.path(), name, &with(&["--save-steps", "0"]))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.next().unwrap().unwrap().starts_with("step 1/9"));
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        assert!(lines.by_ref().all(|line| line.is_ok()));
        let ended = child.wait_with_output().unwrap();
        let said = String::from_utf8(ended.stderr).unwrap();
        assert!(ended.status.code() == Some(130) && said.contains("stopped after step") && said.contains("--resume"), "{said}");
        let n_done = log(&output).len();
        assert!(n_done < N_STEPS, "the run was over before the signal came");
        assert_eq!(checkpoints(&output), [format!("checkpoint-{n_done}")]);
        assert!(!output.join("config.json").exists());
        if name == "int" {
            // The model as it is by then.
            let done = finetune(folder.path(), name, &with(&["--save-steps", "0", "--resume", "--write-now"]));
            assert!(done.ok && log(&output).len() == n_done, "{}", done.stderr);
            assert!(tensors(&output) != tensors(&folder.path().join("whole")));
            continue;
        }
        let done = finetune(folder.path(), name, &with(&["--save-steps", "0", "--resume"]));
        assert!(done.ok && done.stderr.contains(&format!("going on after step {n_done} of 9")), "{}", done.stderr);
        assert_as(&folder.path().join("whole"), &output);
        let again = finetune(folder.path(), name, &with(&["--resume"]));
        assert!(again.ok && again.stderr.contains("complete"), "{}", again.stderr);
    }
    let done = finetune(folder.path(), "none", &with(&["--resume", "--write-now"]));
    assert!(!done.ok && done.stderr.contains("no checkpoint"), "{}", done.stderr);
}

/// A run as a kill would leave it, after `step` steps that were saved.
fn cut_off(folder: &Path, name: &str) -> std::path::PathBuf {
    let done = finetune(folder, name, &RUN);
    assert!(done.ok, "{}", done.stderr);
    let output = folder.join(name);
    fs::remove_file(output.join("config.json")).unwrap();
    fs::remove_file(output.join("model.safetensors")).unwrap();
    output
}

#[test]
fn broken_checkpoints_are_passed_over() {
    let folder = folder();
    assert!(finetune(folder.path(), "whole", &RUN).ok);
    let output = cut_off(folder.path(), "run");
    fs::create_dir(output.join(".checkpoint-9.partial")).unwrap();
    fs::create_dir_all(output.join(".checkpoint-3.old/dir")).unwrap();
    let resume = || finetune(folder.path(), "run", &with(&["--resume"]));
    let state = output.join("checkpoint-8/state.safetensors");
    let bytes = fs::read(&state).unwrap();
    let flipped: Vec<u8> = bytes.iter().enumerate().map(|(i, b)| if i == bytes.len() - 9 { b ^ 4 } else { *b }).collect();
    for broken in [&flipped[..], &bytes[..1000], &[]] {
        fs::write(&state, broken).unwrap();
        let done = resume();
        assert!(done.ok && done.stderr.contains("going on after step 7 of 9"), "{}", done.stderr);
        assert!(done.stderr.contains("state.safetensors: is not what was written"), "{}", done.stderr);
        assert_as(&folder.path().join("whole"), &output);
        assert_eq!(checkpoints(&output), ["checkpoint-7", "checkpoint-8"]);
        assert!(fs::read(&state).unwrap() == bytes, "the broken one was not replaced");
        fs::remove_file(output.join("config.json")).unwrap();
    }
    // One that is broken does not count among those that are kept.
    let sparse = |flags: &[&'static str]| finetune(folder.path(), "sparse", &[&RUN[..10], flags].concat());
    let output_of_sparse = folder.path().join("sparse");
    assert!(sparse(&["--save-steps", "4", "--keep", "2"]).ok);
    assert_eq!(checkpoints(&output_of_sparse), ["checkpoint-4", "checkpoint-8"]);
    fs::remove_file(output_of_sparse.join("config.json")).unwrap();
    fs::write(output_of_sparse.join("checkpoint-8/settings.toml"), "lr = 1").unwrap();
    assert!(sparse(&["--save-steps", "3", "--keep", "1", "--resume"]).ok);
    assert_eq!(checkpoints(&output_of_sparse), ["checkpoint-6"]);

    for step in [7, 8] {
        fs::write(output.join(format!("checkpoint-{step}/manifest.json")), "{").unwrap();
    }
    let done = resume();
    assert!(!done.ok && done.stderr.contains("manifest.json"), "{}", done.stderr);
}

/// A run of low-rank additions drops what it would have dropped.
#[test]
fn adapters_go_on_too() {
    let folder = folder();
    let flags = |more: &[&'static str]| {
        let lora = ["--tune", "lora", "--tune-vision", "lora", "--lora-r", "4", "--lora-dropout", "0.3"];
        [&lora[..], &RUN[4..], more].concat()
    };
    let whole = finetune(folder.path(), "run", &flags(&[]));
    assert!(whole.ok, "{}", whole.stderr);
    let (output, expected) = (folder.path().join("run"), tensors(&folder.path().join("run")));
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::remove_file(output.join(name)).unwrap();
    }
    fs::remove_dir_all(output.join("checkpoint-8")).unwrap();
    let done = finetune(folder.path(), "run", &flags(&["--resume"]));
    assert!(done.ok && done.stderr.contains("going on after step 7 of 9"), "{}", done.stderr);
    assert!(tensors(&output) == expected, "another result");
    let again = finetune(folder.path(), "run", &flags(&["--resume"]));
    assert!(again.ok && again.stderr.contains("complete"), "{}", again.stderr);
}

/// In 16 bits the state is f32 as well, and that of the loss scale goes on.
#[test]
fn runs_in_16_bits_go_on_too() {
    for dtype in ["bf16", "f16"] {
        let folder = folder();
        let run = |name: &str, flags: &[&'static str]| finetune(folder.path(), name, &with(&[&["--dtype", dtype], flags].concat()));
        let whole = run("whole", &[]);
        assert!(whole.ok, "{}", whole.stderr);
        let [whole, output] = ["whole", "run"].map(|name| folder.path().join(name));
        let manifest = |output: &Path, step: usize| -> Value {
            serde_json::from_slice(&fs::read(output.join(format!("checkpoint-{step}/manifest.json"))).unwrap()).unwrap()
        };
        let expected = manifest(&whole, 8);
        let scale = serde_json::json!({"scale": 65536.0, "n_good": 8});
        assert_eq!(expected["loss_scale"], if dtype == "f16" { scale } else { Value::Null });
        support::program::copy_dir(&whole, &output);
        let cut_off = |gone: &[&str]| {
            gone.iter().for_each(|name| fs::remove_file(output.join(name)).unwrap());
            fs::remove_dir_all(output.join("checkpoint-8")).unwrap();
        };
        cut_off(&["config.json", "model.safetensors"]);
        let done = run("run", &["--resume"]);
        assert!(done.ok && done.stderr.contains("going on after step 7 of 9"), "{}", done.stderr);
        assert_as(&whole, &output);
        assert_eq!(manifest(&output, 8)["loss_scale"], expected["loss_scale"]);
        assert_eq!(manifest(&output, 8)["files"]["state.safetensors"], expected["files"]["state.safetensors"], "another hash");
        if dtype == "bf16" {
            continue;
        }
        // A scale that no gradient can bear: two steps are skipped, and the model is that of step 7.
        cut_off(&["config.json", "model.safetensors"]);
        let path = output.join("checkpoint-7/manifest.json");
        let mut changed = manifest(&output, 7);
        changed["loss_scale"]["scale"] = f32::MAX.into();
        fs::write(path, changed.to_string()).unwrap();
        support::program::copy_dir(&output, &folder.path().join("of_7"));
        assert!(run("of_7", &["--resume", "--write-now"]).ok);
        let done = run("run", &["--resume"]);
        assert!(done.ok && done.stdout.matches("skipped").count() == 2, "{} {}", done.stdout, done.stderr);
        assert!(tensors(&output) == tensors(&folder.path().join("of_7")));
        assert_eq!(manifest(&output, 8)["n_updates"], 7);
        let rows = log(&output);
        let told: Vec<_> =
            rows[6..].iter().map(|row| (row["loss_scale"].as_f64().unwrap() as f32, row["is_skipped"].is_boolean())).collect();
        assert_eq!(told, [(65536.0, false), (f32::MAX, true), (f32::MAX / 2.0, true)]);
    }
}

#[test]
fn another_run_is_not_gone_on_with() {
    let folder = folder();
    let output = cut_off(folder.path(), "run");
    let fails = |flags: &[&'static str], expected: &[&str]| {
        let done = finetune(folder.path(), "run", &with(&[&["--resume"], flags].concat()));
        assert!(!done.ok && expected.iter().all(|text| done.stderr.contains(text)), "{flags:?}: {}", done.stderr);
    };
    fails(&["--lr", "1e-3", "--seed", "7"], &["step 8", "lr: 0.003 there, 0.001 here", "seed: 42 there, 7 here"]);
    fails(&["--epochs", "4"], &["epochs: 3.0 there, 4.0 here"]);
    fails(&["--tune-vision", "off"], &["tune_vision"]);
    let other = fixture("checkpoints/hf_mha_f32");
    let done = finetune_of(&other, folder.path(), "run", &with(&["--resume"]));
    assert!(!done.ok && done.stderr.contains("another model"), "{}", done.stderr);
    let mut other_rows = rows();
    other_rows[4]["conversations"][0]["value"] = "Say it.".into();
    fs::write(folder.path().join("rows.json"), other_rows.to_string()).unwrap();
    fails(&[], &["other rows"]);
    fs::write(folder.path().join("rows.json"), rows().to_string()).unwrap();
    // A new run does not begin where another is.
    let done = finetune(folder.path(), "run", &RUN);
    assert!(!done.ok && done.stderr.contains("not empty"), "{}", done.stderr);
    // Nor does one go on where none was, least of all in the model's own folder; nor where another is at work.
    fs::create_dir(folder.path().join("other")).unwrap();
    fs::write(folder.path().join("other/notes.txt"), "").unwrap();
    let done = finetune(folder.path(), "other", &with(&["--resume"]));
    assert!(!done.ok && done.stderr.contains("no run of finetune was here"), "{}", done.stderr);
    let model = folder.path().join("model");
    support::program::copy_dir(&fixture(MODEL), &model);
    let done = finetune_of(&model, folder.path(), "model", &with(&["--resume"]));
    assert!(!done.ok && done.stderr.contains("the model's own folder"), "{}", done.stderr);
    let done = finetune_of(&fixture(MODEL), folder.path(), "model", &with(&["--resume"]));
    assert!(!done.ok && done.stderr.contains("no run of finetune was here"), "{}", done.stderr);
    let lock = fs::File::create(output.join(".lock")).unwrap();
    lock.lock().unwrap();
    fails(&[], &["another run"]);
    drop(lock);
    // A manifest of another folder is none of this one's.
    fs::rename(output.join("checkpoint-8"), output.join("checkpoint-80")).unwrap();
    let done = finetune(folder.path(), "run", &with(&["--resume", "--lr", "1e-3"]));
    assert!(!done.ok && done.stderr.contains("not of this folder") && done.stderr.contains("step 7"), "{}", done.stderr);
    fs::rename(output.join("checkpoint-80"), output.join("checkpoint-8")).unwrap();
    // What has no influence may be another.
    let done = finetune(folder.path(), "run", &with(&["--resume", "--log-steps", "2", "--keep", "1", "--recompute", "selective"]));
    assert!(done.ok, "{}", done.stderr);
    assert_eq!(log(&output).len(), N_STEPS);
}

/// What ends a run by itself costs no steps either: it goes on when that is mended.
#[test]
fn errors_save_first() {
    let folder = folder();
    let flags = |more: &[&'static str]| with(&[&["--save-steps", "0", "--grouping", "none", "--seed", "2"], more].concat());
    assert!(finetune(folder.path(), "whole", &flags(&[])).ok);
    // A picture that is gone, which the first steps do not need.
    let pictures = folder.path().join("pictures");
    support::program::copy_dir(&fixture("images"), &pictures);
    let run = |more: &[&'static str]| {
        let mut run = command(&fixture(MODEL), folder.path(), "run", &flags(more));
        let args: Vec<_> = run.get_args().map(|arg| arg.to_owned()).collect();
        let images = fixture("images").into_os_string();
        run = Command::new(run.get_program());
        run.args(args.iter().map(|arg| if *arg == images { pictures.as_os_str() } else { arg })).env("LLAVA_THREADS", "2");
        run.output().unwrap()
    };
    fs::rename(pictures.join("odd.png"), pictures.join("away.png")).unwrap();
    let stopped = run(&[]);
    let said = String::from_utf8(stopped.stderr).unwrap();
    assert!(!stopped.status.success() && said.contains("odd.png") && said.contains("stopped after step"), "{said}");
    let n_done = log(&folder.path().join("run")).len();
    assert_eq!(checkpoints(&folder.path().join("run")), [format!("checkpoint-{n_done}")]);
    fs::rename(pictures.join("away.png"), pictures.join("odd.png")).unwrap();
    let resumed = run(&["--resume"]);
    assert!(resumed.status.success(), "{}", String::from_utf8_lossy(&resumed.stderr));
    assert_as(&folder.path().join("whole"), &folder.path().join("run"));
}

/// A row that was left out stays so, is named once and counted once.
#[test]
fn bad_rows_are_remembered() {
    let folder = folder();
    let mut rows = rows();
    rows[3]["image"] = "nowhere.png".into();
    fs::write(folder.path().join("rows.json"), rows.to_string()).unwrap();
    let flags = ["--max-bad-rows", "1", "--json"];
    let whole = finetune(folder.path(), "run", &with(&flags));
    assert!(whole.ok && whole.stderr.matches("nowhere.png").count() == 1, "{}", whole.stderr);
    let output = folder.path().join("run");
    fs::remove_file(output.join("config.json")).unwrap();
    let resumed = finetune(folder.path(), "run", &with(&[&flags[..], &["--resume"]].concat()));
    assert!(resumed.ok && !resumed.stderr.contains("nowhere.png"), "{}", resumed.stderr);
    let left_out = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap()["left_out"].clone();
    assert_eq!((left_out(&whole.stdout), left_out(&resumed.stdout)), (1.into(), 1.into()));
}

/// A disk that is full, and a limit on the size of files: an error that names the file; the checkpoint before it serves.
#[test]
fn a_full_disk_costs_steps_and_no_more() {
    let folder = folder();
    assert!(finetune(folder.path(), "whole", &RUN).ok);
    let state = fs::metadata(folder.path().join("whole/checkpoint-8/state.safetensors")).unwrap().len();
    let room = folder.path().join("room");
    fs::create_dir(&room).unwrap();
    let shell = |before: &str, after: &str, flags: &[&'static str]| {
        let run = command(&fixture(MODEL), folder.path(), "room/run", &with(flags));
        let program = run.get_program().to_str().unwrap().to_owned();
        let words = run.get_args().map(|word| format!("'{}'", word.to_str().unwrap()));
        let line = std::iter::once(program).chain(words).collect::<Vec<_>>().join(" ");
        let mut shell = Command::new(if before.contains("mount") { "unshare" } else { "sh" });
        if before.contains("mount") {
            shell.args(["--user", "--map-root-user", "--mount", "sh"]);
        }
        let output =
            shell.args(["-c", &format!("{before}\n{line}; echo code $?; {after}")]).env("LLAVA_THREADS", "2").output().unwrap();
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let run = room.join("run");
    // Not even one checkpoint may be written.
    let limit = format!("trap '' XFSZ; ulimit -f {}", state / 512 / 2);
    let (out, message) = shell(&limit, "", &[]);
    assert!(out.contains("code 1") && message.contains("state.safetensors") && message.contains("too large"), "{out} {message}");
    assert_eq!(checkpoints(&run), [""; 0]);
    assert!(finetune(folder.path(), "room/run", &with(&["--resume"])).ok);
    assert_as(&folder.path().join("whole"), &run);
    fs::remove_dir_all(&run).unwrap();
    // One fits, and the next does not. It goes on where there is room.
    let (size, kept) = (state * 3 / 2 / 1024, folder.path().join("kept"));
    let mount = format!("mount -t tmpfs -o size={size}k none '{}' || exit 99", room.display());
    let keep = format!("cp -r '{}' '{}'", run.display(), kept.display());
    let (out, message) = shell(&mount, &keep, &[]);
    if out.is_empty() {
        println!("skipped: no small disk may be mounted here: {message}");
        return;
    }
    assert!(
        out.contains("code 1") && message.contains("state.safetensors") && message.contains("No space left"),
        "{out} {message}"
    );
    assert_eq!(checkpoints(&kept), ["checkpoint-1"]);
    let done = finetune(folder.path(), "kept", &with(&["--resume"]));
    assert!(done.ok && done.stderr.contains("going on after step 1 of 9"), "{}", done.stderr);
    assert_as(&folder.path().join("whole"), &kept);
}
