//! The command line as users and scripts meet it: what is printed where, with which exit code, and that no input, however bad, gives
//! more than one clear line.

mod support;

use std::fs;
use std::io::{Cursor, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use support::{Bound, assert_close, fixture};
use zip::write::SimpleFileOptions;

const BINARY: &str = env!("CARGO_BIN_EXE_llava-engine");
/// After this a run hangs. Refusals take milliseconds and answers of the tiny models tens of them; the rest is for loaded machines.
const PATIENCE: Duration = Duration::from_secs(60);
/// The prompt of the first case of `hf_mha_f32`, asked about `square.png`.
const PROMPT: &str = "USER: <image>\nWhat is this? ASSISTANT:";

/// What a run left behind.
struct Ran {
    code: Option<i32>,
    stdout: Vec<u8>,
    stderr: String,
}

impl Ran {
    /// Standard output of a run that must have succeeded in silence.
    fn ok(self) -> String {
        assert_eq!((self.code, self.stderr.as_str()), (Some(0), ""));
        String::from_utf8(self.stdout).unwrap()
    }

    fn json(self) -> Value {
        // `from_str` refuses anything before or behind the one document.
        serde_json::from_str(&self.ok()).unwrap()
    }

    /// A failure as it has to be: nothing on standard output, one line on standard error that holds all of `parts`.
    fn refused(self, code: i32, parts: &[&str]) {
        let stderr = &self.stderr;
        assert_eq!((self.code, self.stdout.len()), (Some(code), 0), "{stderr}");
        assert!(stderr.starts_with("error: ") && stderr.ends_with('\n') && stderr.lines().count() == 1, "{stderr}");
        assert!(!stderr.contains("panic") && !stderr.trim_end().contains(char::is_control), "{stderr}");
        assert_holds(stderr, parts);
    }
}

fn assert_holds(text: &str, parts: &[&str]) {
    parts.iter().for_each(|part| assert!(text.contains(part), "`{part}` is not in: {text}"));
}

/// The binary, with none of the user's own settings and models, no network, and one thread: the tiny models have no use for more.
fn engine() -> Command {
    let mut command = Command::new(BINARY);
    command.env_clear().env("HOME", "/nowhere").env("HF_HUB_OFFLINE", "1").env("LLAVA_THREADS", "1");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Waits for the end, but not for ever.
fn finish(child: Child) -> Ran {
    let pid = child.id();
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || send.send(child.wait_with_output()));
    let Ok(output) = receive.recv_timeout(PATIENCE) else {
        signal("KILL", pid);
        panic!("still running after {PATIENCE:?}");
    };
    let output = output.unwrap();
    Ran { code: output.status.code(), stdout: output.stdout, stderr: String::from_utf8(output.stderr).unwrap() }
}

fn signal(name: &str, pid: u32) {
    assert!(Command::new("sh").args(["-c", &format!("kill -{name} {pid}")]).status().unwrap().success());
}

fn run_with_input(args: &[&str], input: &[u8]) -> Ran {
    let mut child = engine().args(args).spawn().unwrap();
    // A run that is refused does not read its input: the broken pipe is no failure.
    let _ = child.stdin.take().unwrap().write_all(input);
    finish(child)
}

fn run(args: &[&str]) -> Ran {
    run_with_input(args, b"")
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn checkpoint(name: &str) -> String {
    text(&fixture("checkpoints").join(name)).to_owned()
}

fn picture(name: &str) -> String {
    text(&fixture("images").join(name)).to_owned()
}

/// `generate` with a tiny model, always the most probable token.
fn greedy<'a>(model: &'a str, rest: &[&'a str]) -> Vec<&'a str> {
    [&["generate", "--model", model, "--temperature", "0"], rest].concat()
}

/// A copy of a checkpoint that a test may spoil; kept as long as the folder it comes with.
fn copy(name: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    for entry in fs::read_dir(checkpoint(name)).unwrap().map(Result::unwrap).filter(|e| e.path().is_file()) {
        fs::write(model.join(entry.file_name()), fs::read(entry.path()).unwrap()).unwrap();
    }
    (dir, model)
}

/// Opens `model` to say a word, which needs all of its weights.
fn open_model(model: &Path) -> Ran {
    run(&greedy(text(model), &["--raw-prompt", "a", "--max-new-tokens", "1"]))
}

#[test]
fn flags_that_make_no_sense_are_named() {
    let (model, image) = (checkpoint("hf_mha_f32"), picture("square.png"));
    let image = image.as_str();
    let table: &[(&[&str], &[&str])] = &[
        (&["--prompt", "a", "--template", "nope"], &["`nope`", "llava_v1"]),
        (&["--prompt", "a", "--device", "tpu"], &["`tpu`", "use auto, cpu, cuda"]),
        (&["--prompt", "a", "--device", "cuda:x"], &["`cuda:x`", "cuda:N"]),
        (&["--prompt", "a", "--dtype", "f8"], &["`f8`", "f32, f16 or bf16"]),
        (&["--prompt", "a", "--preprocess", "mine"], &["`mine`", "original or hf"]),
        (&["--prompt", "a", "--temperature", "-1"], &["temperature -1", "0 or more"]),
        (&["--prompt", "a", "--temperature", "NaN"], &["temperature NaN"]),
        (&["--prompt", "a", "--top-p", "0"], &["top-p 0", "above 0"]),
        (&["--prompt", "a", "--min-p", "-0.5"], &["min-p -0.5"]),
        (&["--prompt", "a", "--repetition-penalty", "0"], &["repetition penalty 0"]),
        (&["--prompt", "a", "--max-new-tokens", "0"], &["--max-new-tokens", "at least 1"]),
        (&["--prompt", "a", "--context", "100000"], &["100000", "512"]),
        (&["--prompt", "-", "--image", "-"], &["standard input", "both the prompt and an image"]),
        (&["--raw-prompt", "a", "--image", image], &["0 <image> marks", "1 images"]),
        (&["--raw-prompt", "a <image>"], &["1 <image> marks", "0 images"]),
        (&["--raw-prompt", "<image> a <image>", "--image", image], &["2 <image> marks", "1 images"]),
        (&["--prompt", "a", "--image", "ftp://host/cat.png"], &["ftp://", "only http:// and https://"]),
    ];
    for (flags, parts) in table {
        run(&[&["generate", "--model", &model][..], flags].concat()).refused(2, parts);
    }
    run(&["score", "--model", &model, "--raw-prompt", "-", "--image", "-"]).refused(2, &["both the prompt and an image"]);
    run(&["chat", "--model", &model, "--image", "-"]).refused(2, &["standard input", "as a file"]);
}

/// These are clap's own: it shows the usage too, so they have more than one line.
#[test]
fn flags_that_cannot_be_parsed_show_the_usage() {
    let table: &[(&[&str], &str)] = &[
        (&["generate"], "--prompt"),
        (&["generate", "--prompt", "a", "--raw-prompt", "a"], "cannot be used with"),
        (&["generate", "--prompt", "a", "--max-new-tokens", "many"], "'many'"),
        (&["score"], "--raw-prompt"),
        (&["answer"], "'answer'"),
        (&["completions", "tcsh"], "bash"),
        (&[], "Usage"),
    ];
    for (args, part) in table {
        let ran = run(args);
        assert_eq!((ran.code, ran.stdout.len()), (Some(2), 0), "{args:?}");
        assert!(ran.stderr.contains(part) && !ran.stderr.contains("panicked"), "{args:?}: {}", ran.stderr);
    }
}

#[test]
fn a_prompt_longer_than_the_context_says_how_long_it_is() {
    let model = checkpoint("hf_mha_f32");
    run(&greedy(&model, &["--raw-prompt", &"word ".repeat(600)])).refused(1, &["prompt has", "context is 512", "shorten"]);
    let short = ["--raw-prompt", PROMPT, "--image", &picture("square.png"), "--context", "45"];
    run(&greedy(&model, &short)).refused(1, &["45 tokens (16 of them from images)", "context is 45"]);
}

#[test]
fn pictures_that_are_none_are_named_with_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        text(&path).to_owned()
    };
    let png = fs::read(picture("square.png")).unwrap();
    let table = [
        (text(&dir.path().join("missing.png")).to_owned(), &["missing.png", "No such file"][..]),
        (text(dir.path()).to_owned(), &["is a folder"]),
        (file("note.jpg", b"Dear diary,\ntoday"), &["note.jpg", "but text", "PNG, JPEG"]),
        (file("page.png", b"<!DOCTYPE html><html>"), &["page.png", "a web page"]),
        (file("empty.png", b""), &["empty.png", "an empty file"]),
        (file("cut.png", &png[..png.len() / 2]), &["cut.png", "is a PNG", "cut off"]),
        (file("cut.jpg", &fs::read(picture("photo_444.jpg")).unwrap()[..600]), &["cut.jpg", "is a JPEG that was cut off"]),
        // A name from elsewhere must not reach the terminal as it is: neither as a second line nor as an escape.
        (text(&dir.path().join("a\nb\u{1b}[31m.png")).to_owned(), &["No such file"]),
    ];
    for (image, parts) in &table {
        for args in [&["generate", "--prompt", "a"][..], &["score", "--raw-prompt", "<image>"], &["chat"]] {
            run(&[args, &["--model", &checkpoint("hf_mha_f32"), "--image", image]].concat()).refused(1, parts);
        }
    }
    run_with_input(&greedy("unread", &["--prompt", "a", "--image", "-"]), b"Dear diary").refused(1, &["on standard input", "text"]);
}

/// 400 megapixels in a few kilobytes: refused by the header, in no time and no memory.
#[test]
fn a_decompression_bomb_is_refused_before_it_is_decoded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bomb.png");
    let mut png = png::Encoder::new(fs::File::create(&path).unwrap(), 20_000, 20_000);
    png.set_color(png::ColorType::Grayscale);
    png.set_depth(png::BitDepth::One);
    png.write_header().unwrap().write_image_data(&vec![0; 20_000 / 8 * 20_000]).unwrap();
    let args = ["generate", "--prompt", "a", "--model", &checkpoint("hf_mha_f32"), "--image", text(&path)];
    let parts = ["bomb.png", "20000 x 20000 pixels", "make it smaller"];
    let times = (0..5).map(|_| {
        let start = Instant::now();
        run(&args).refused(1, &parts);
        start.elapsed()
    });
    assert!(times.min() < Some(Duration::from_millis(100)));
    // All of its address space, binary and libraries included, has to fit into 50 MB, so what is resident does.
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -v 48828 && exec \"$0\" \"$@\"", BINARY]).args(args);
    limited.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    finish(limited.spawn().unwrap()).refused(1, &parts);
}

#[test]
fn a_model_that_is_something_else_is_told_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let folder = |name: &str, files: &[&str]| {
        let path = dir.path().join(name);
        fs::create_dir(&path).unwrap();
        files.iter().for_each(|file| fs::write(path.join(file), "{}").unwrap());
        text(&path).to_owned()
    };
    let gguf = folder("gguf", &["a.gguf"]);
    let (_projector_dir, projector) = copy("orig_projector_over_base");
    let table = [
        (folder("empty", &[]), &["empty: an empty folder"][..]),
        (folder("lora", &["adapter_config.json"]), &["a LoRA adapter", "--lora"]),
        (folder("bare", &["config.json"]), &["model_type"]),
        (format!("{gguf}/a.gguf"), &["a.gguf", "not a GGUF file"]),
        (gguf, &["a.gguf", "not a GGUF file"]),
        (checkpoint("base-llama"), &["base-llama", "a LLaMA without a projector"]),
        (checkpoint("clip-tower"), &["clip-tower", "a CLIP model"]),
        (format!("{}/config.json", checkpoint("hf_mha_f32")), &["config.json", "a file, and no GGUF file: name the folder"]),
        (text(&dir.path().join("missing")).to_owned(), &["missing: no such folder", "org/name"]),
        ("org/not-in-the-cache".to_owned(), &["org/not-in-the-cache", "HF_HUB_OFFLINE is set"]),
        // The base model is not beside it any more.
        (text(&projector).to_owned(), &["a projector without its decoder", "../base-llama"]),
    ];
    for (model, parts) in &table {
        for command in [&["inspect"][..], &["generate", "--prompt", "a"], &["score", "--raw-prompt", "a"], &["chat"]] {
            run(&[command, &["--model", model]].concat()).refused(1, parts);
        }
    }
    run(&["inspect", "--model", text(&projector), "--model-base", "/nowhere"]).refused(1, &["/nowhere", "not a folder"]);
}

/// Rewrites the header of a safetensors file; the data stays.
fn edit_header(path: &Path, edit: impl Fn(&mut Value)) {
    let file = fs::read(path).unwrap();
    let end = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut header = serde_json::from_slice(&file[8..end]).unwrap();
    edit(&mut header);
    let header = header.to_string();
    fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &file[end..]].concat()).unwrap();
}

const HEAD: &str = "language_model.lm_head.weight"; // [328, 32]
const EMBED: &str = "language_model.model.embed_tokens.weight"; // [328, 32]
const NORM: &str = "language_model.model.norm.weight"; // [32]

/// A change to the header of a checkpoint, and what the message has to say.
type Lie = (fn(&mut Value), &'static [&'static str]);

#[test]
fn safetensors_that_lie_are_refused() {
    let lies: [Lie; 8] = [
        (|h| h[HEAD]["data_offsets"] = json!([0, 1u64 << 40]), &["not a valid safetensors file"]),
        (|h| h[HEAD]["data_offsets"] = h[NORM]["data_offsets"].clone(), &["not a valid safetensors file"]),
        (|h| h[HEAD]["data_offsets"] = h[EMBED]["data_offsets"].clone(), &["not a valid safetensors file"]),
        (|h| h[NORM]["dtype"] = json!("F64"), &["not a valid safetensors file"]),
        (|h| h[NORM]["dtype"] = json!("F99"), &["not a valid safetensors file"]),
        (|h| h[NORM]["dtype"] = json!("I32"), &[NORM, "is stored as i32"]),
        (|h| h[HEAD]["shape"] = json!([32, 328]), &[HEAD, "[32, 328]", "[328, 32]"]),
        (|h| h["something.else"] = h.as_object_mut().unwrap().remove(NORM).unwrap(), &[NORM, "missing"]),
    ];
    for (lie, parts) in lies {
        let (_dir, model) = copy("hf_mha_f32");
        edit_header(&model.join("model.safetensors"), lie);
        open_model(&model).refused(1, &[&["model"], parts].concat());
    }
    let (_dir, model) = copy("hf_mha_f32");
    let file = fs::read(model.join("model.safetensors")).unwrap();
    let lengths = [0, 10, file.len() as u64, 1 << 40, u64::MAX].map(|n| [&n.to_le_bytes(), &file[8..]].concat());
    for bytes in lengths.iter().map(Vec::as_slice).chain([&file[..file.len() - 1]]) {
        fs::write(model.join("model.safetensors"), bytes).unwrap();
        open_model(&model).refused(1, &["model.safetensors", "not a valid safetensors file"]);
    }
}

#[test]
fn an_index_stays_in_its_folder() {
    let (_dir, model) = copy("hf_gqa_bf16");
    let shard = "model-00002-of-00003.safetensors";
    // It is there, and would be read by whoever follows the name.
    fs::rename(model.join(shard), model.join("..").join(shard)).unwrap();
    open_model(&model).refused(1, &["model.safetensors.index.json", shard, "cannot be opened"]);
    let index = model.join("model.safetensors.index.json");
    let honest = fs::read_to_string(&index).unwrap();
    for outside in [format!("../{shard}"), "/etc/passwd".to_owned(), format!("./../{shard}")] {
        fs::write(&index, honest.replace(shard, &outside)).unwrap();
        open_model(&model).refused(1, &["model.safetensors.index.json", &outside, "a plain file name in the same folder"]);
    }
}

/// A `torch.save` archive with this pickle and one storage of 64 floats.
fn archive(pickle: &[u8]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let stored = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in [("model/data.pkl", pickle), ("model/data/0", &[0; 256])] {
        zip.start_file(name, stored).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

/// `{"lm_head.weight": value}`, where `value` is what these instructions leave on the stack.
fn pickle(value: &[u8]) -> Vec<u8> {
    [b"\x80\x02}(X\x0e\0\0\0lm_head.weight", value, b"u."].concat()
}

/// A tensor of 8 x 8 floats in the storage, with these strides.
fn pickled_tensor(strides: [u8; 2]) -> Vec<u8> {
    let storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x40tQ";
    let shape_and_strides = [b'K', 8, b'K', 8, 0x86, b'K', strides[0], b'K', strides[1], 0x86];
    let hooks = b"\x89ccollections\nOrderedDict\n)R";
    [b"ctorch._utils\n_rebuild_tensor_v2\n(", &storage[..], b"K\0", &shape_and_strides, hooks, b"tR"].concat()
}

#[test]
fn pickles_are_data_and_never_run() {
    let (dir, model) = copy("orig_gqa_bf16");
    let marker = dir.path().join("executed");
    let command = format!("touch {}", marker.display());
    let argument = [b"X", &(command.len() as u32).to_le_bytes()[..], command.as_bytes(), b"\x85R"].concat();
    let memo_bomb: Vec<u8> = (0..(1u32 << 20) + 1).flat_map(|slot| [b"Nr", &slot.to_le_bytes()[..], b"0"].concat()).collect();
    // Each list holds the one before ten times: 10^60 elements to whoever copies them. Here they are no tensors, and that is all.
    let laughs: Vec<u8> = (1..60).flat_map(|n| [b"](", &[b'h', n - 1].repeat(10)[..], &[b'e', b'q', n, b'0']].concat()).collect();
    let table: [(Vec<u8>, &[&str]); 7] = [
        (pickle(&[b"cos\nsystem\n", &argument[..]].concat()), &["os.system", "nothing in it was run"]),
        (pickle(&[b"cbuiltins\neval\n", &argument[..]].concat()), &["builtins.eval", "nothing in it was run"]),
        (pickle(&memo_bomb), &["a million memo entries"]),
        (pickle(&[b"]q\x000", &laughs[..], b"h\x3b"].concat()), &[]),
        (pickle(&b"(".repeat(1000)), &["64 levels"]),
        (pickle(&pickled_tensor([9, 1])), &["malformed"]),
        (pickle(&pickled_tensor([255, 255])), &["malformed"]),
    ];
    for (pickle, parts) in &table {
        fs::write(model.join("pytorch_model.bin"), archive(pickle)).unwrap();
        let start = Instant::now();
        open_model(&model).refused(1, &[&["pytorch_model.bin"], *parts].concat());
        assert!(start.elapsed() < Duration::from_secs(10), "{parts:?}");
    }
    assert!(!marker.exists());
    // With honest strides the archive is read, so it was the strides: what is amiss then is all the rest of a model.
    fs::write(model.join("pytorch_model.bin"), archive(&pickle(&pickled_tensor([8, 1])))).unwrap();
    assert!(!open_model(&model).stderr.contains("malformed"));
}

#[derive(serde::Deserialize)]
struct Case {
    name: String,
    images: Vec<String>,
    prompt: String,
    greedy_text: String,
}

fn cases(model: &str) -> Vec<Case> {
    let mut expected: Value = serde_json::from_slice(&fs::read(Path::new(model).join("expected.json")).unwrap()).unwrap();
    serde_json::from_value(expected["cases"].take()).unwrap()
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn greedy_answers_are_the_references() {
    let model = checkpoint("orig_mha_f32");
    for case in cases(&model).iter().filter(|c| !c.images.iter().any(|i| i.ends_with(".jpg"))) {
        let mut args = greedy(&model, &["--raw-prompt", &case.prompt, "--max-new-tokens", "24"]);
        let images: Vec<_> = case.images.iter().map(|i| format!("{model}/{i}")).collect();
        args.extend(images.iter().flat_map(|i| ["--image", i.as_str()]));
        assert_eq!(run(&args).ok(), format!("{}\n", case.greedy_text), "{}", case.name);
    }
}

#[test]
fn the_json_of_generate_has_the_fields_of_the_contract() {
    let (model, image) = (checkpoint("hf_mha_f32"), picture("square.png"));
    let args = greedy(&model, &["--raw-prompt", PROMPT, "--image", &image, "--max-new-tokens", "24"]);
    let text = run(&args).ok();
    let answer = run(&[&args[..], &["--json"]].concat()).json();
    assert_eq!(keys(&answer), ["text", "finish_reason", "token_ids", "usage", "timings"]);
    assert_eq!(keys(&answer["usage"]), ["prompt_tokens", "image_tokens", "completion_tokens"]);
    let timings = "load_ms image_ms encode_ms prefill_ms decode_ms prefill_tokens_per_second decode_tokens_per_second";
    assert_eq!(keys(&answer["timings"]).join(" "), timings);
    assert!(answer["timings"].as_object().unwrap().values().all(|v| v.as_f64().is_some_and(|v| v > 0.0)), "{answer}");
    // Ids, not the text: transformers writes a byte that begins no character differently, and this answer has some.
    let expected = fs::read(Path::new(&model).join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&expected).unwrap();
    let ids: Vec<i64> = bytemuck::pod_collect_to_vec(expected.tensor("case0.greedy").unwrap().data());
    assert_eq!(answer["token_ids"], json!(ids));
    assert_eq!(answer["finish_reason"], "length");
    assert_eq!(answer["usage"], json!({"prompt_tokens": 45, "image_tokens": 16, "completion_tokens": 24}));
    assert_eq!(format!("{}\n", answer["text"].as_str().unwrap()), text);
}

#[test]
fn standard_input_is_as_good_as_a_file_or_a_flag() {
    let (model, image) = (checkpoint("hf_mha_f32"), picture("square.png"));
    let say = |flag: &str, prompt: &str, image: &str, input: &[u8]| {
        run_with_input(&greedy(&model, &[flag, prompt, "--image", image, "--max-new-tokens", "8"]), input).ok()
    };
    let expected = say("--prompt", "What is this?", &image, b"");
    assert_eq!(say("--prompt", "What is this?", "-", &fs::read(&image).unwrap()), expected);
    assert_eq!(say("--prompt", "-", &image, b"What is this?\n"), expected);
    // The checkpoint's own template is what the raw prompt spells out.
    assert_eq!(say("--raw-prompt", PROMPT, &image, b""), expected);
}

#[test]
fn stop_texts_end_an_answer_and_are_no_part_of_it() {
    let model = checkpoint("orig_mha_f32");
    let case = cases(&model).into_iter().find(|c| c.images.is_empty()).unwrap();
    let stop = "ho";
    assert!(case.greedy_text.contains(stop));
    let args = greedy(&model, &["--raw-prompt", &case.prompt, "--max-new-tokens", "24", "--stop", stop, "--json"]);
    let answer = run(&args).json();
    assert_eq!(answer["text"], case.greedy_text.split(stop).next().unwrap());
    assert_eq!(answer["finish_reason"], "stop");
}

#[test]
fn a_seed_gives_one_answer_and_another_seed_another() {
    let model = checkpoint("hf_mha_f32");
    let with_seed = |seed: &str| {
        let args = ["generate", "--model", &model, "--raw-prompt", "a", "--temperature", "1.5", "--max-new-tokens", "24"];
        run(&[&args[..], &["--json", "--seed", seed]].concat()).json()["token_ids"].to_string()
    };
    assert_eq!(with_seed("1"), with_seed("1"));
    let answers = ["1", "2", "3", "18446744073709551615"].map(with_seed);
    assert!(answers[1..].iter().all(|a| *a != answers[0]), "{answers:?}");
}

#[test]
fn the_profile_is_no_part_of_the_answer() {
    let model = checkpoint("hf_mha_f32");
    let args = greedy(&model, &["--raw-prompt", "a", "--max-new-tokens", "4"]);
    let ran = run(&[&args[..], &["--profile"]].concat());
    assert_eq!((ran.code, ran.stdout), (Some(0), run(&args).stdout));
    assert_holds(&ran.stderr, &["op", "calls", "ms", "GB/s", "GFLOP/s", "% peak", "linear", "attention", "measured peaks"]);
}

#[test]
fn a_score_and_its_dump_are_the_references() {
    let (model, dir) = (checkpoint("hf_mha_f32"), tempfile::tempdir().unwrap());
    let reference = fs::read(Path::new(&model).join("expected.safetensors")).unwrap();
    let reference = SafeTensors::deserialize(&reference).unwrap();
    for (i, case) in cases(&model).iter().enumerate() {
        let path = dir.path().join("dump.safetensors");
        let mut args = vec!["score", "--model", &model, "--raw-prompt", &case.prompt, "--dump", text(&path), "--json"];
        let images: Vec<_> = case.images.iter().map(|i| format!("{model}/{i}")).collect();
        args.extend(images.iter().flat_map(|i| ["--image", i.as_str()]));
        let score = run(&args).json();
        assert_eq!(keys(&score), ["input_ids", "logprobs", "sum", "text_tokens", "perplexity"]);
        let dump = fs::read(&path).unwrap();
        let dump = SafeTensors::deserialize(&dump).unwrap();
        let ids = dump.tensor("input_ids").unwrap();
        let expected_ids = reference.tensor(&format!("case{i}.input_ids")).unwrap();
        assert_eq!((ids.dtype(), ids.shape(), ids.data()), (Dtype::I64, expected_ids.shape(), expected_ids.data()));
        assert_eq!(score["input_ids"], json!(bytemuck::pod_collect_to_vec::<u8, i64>(ids.data())));
        // A prompt without images has none of their tensors.
        let floats = ["logprobs", "last_logits", "pixel_values", "image_features"];
        let floats = if images.is_empty() { &floats[..2] } else { &floats };
        assert_eq!(dump.len(), 1 + floats.len(), "{:?}", dump.names());
        for name in floats {
            let (got, expected) = (dump.tensor(name).unwrap(), reference.tensor(&format!("case{i}.{name}")).unwrap());
            assert_eq!((got.dtype(), got.shape()), (Dtype::F32, expected.shape()), "{name}");
            let [got, expected] = [got, expected].map(|t| bytemuck::pod_collect_to_vec::<u8, f32>(t.data()));
            assert_close(name, &got, &expected, Bound::abs(1e-3));
        }
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "a partial file was left");
    run(&["score", "--model", &model, "--raw-prompt", "a", "--dump", "/nowhere/x.safetensors"]).refused(1, &["/nowhere/x"]);
    assert_holds(&run(&["score", "--model", &model, "--raw-prompt", "How many?"]).ok(), &["\nsum -", "perplexity"]);
}

/// Turns come one per line; what goes wrong in one of them ends nothing.
#[test]
fn a_chat_goes_on_until_exit() {
    let (model, image) = (checkpoint("hf_mha_f32"), picture("square.png"));
    let talk = "What is this?\nAnd then?\n/image nowhere.png\n/dance\n\n/reset\nHow many?\n/exit\nnever asked\n";
    let flags = ["chat", "--model", &model, "--image", &image, "--temperature", "0", "--max-new-tokens", "6"];
    let ran = run_with_input(&flags, talk.as_bytes());
    assert_eq!((ran.code, ran.stderr.lines().count()), (Some(0), 2), "{}", ran.stderr);
    assert_holds(&ran.stderr, &["error: nowhere.png: No such file", "\nunknown command /dance"]);
    // The first turn and the one after the reset are what `generate` says; a second one lies between.
    let alone = |rest: &[&str]| run(&greedy(&model, &[rest, &["--max-new-tokens", "6"]].concat())).ok().into_bytes();
    let first = alone(&["--prompt", "What is this?", "--image", &image]);
    let last = alone(&["--prompt", "How many?"]);
    assert!(ran.stdout.starts_with(&first) && ran.stdout.ends_with(&last) && ran.stdout.len() > first.len() + last.len());
    // The end of the input is as good as /exit, and a picture may come later.
    let later = format!("/image {image}\nWhat is this?\n");
    assert_eq!(run_with_input(&[&flags[..3], &flags[5..]].concat(), later.as_bytes()).ok().into_bytes(), first);
}

/// The tiny model with a context so long that an answer takes seconds: there is time to interrupt it.
fn talkative() -> (tempfile::TempDir, Child) {
    let (dir, model) = copy("hf_mha_f32");
    let config = fs::read_to_string(model.join("config.json")).unwrap();
    fs::write(model.join("config.json"), config.replace("embeddings\": 512", "embeddings\": 50000")).unwrap();
    let image = picture("square.png");
    let args = greedy(text(&model), &["--raw-prompt", PROMPT, "--image", &image, "--max-new-tokens", "40000"]);
    let mut child = engine().args(args).spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 4]).unwrap();
    (dir, child)
}

#[test]
#[cfg(unix)]
fn ctrl_c_and_a_reader_that_has_seen_enough_end_an_answer() {
    let (_dir, child) = talkative();
    signal("INT", child.id());
    let ran = finish(child);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(130), ""));
    assert!(ran.stdout.ends_with(b"\n"), "the shell's prompt would come behind the answer");
    let (_dir, mut child) = talkative();
    drop(child.stdout.take());
    let ran = finish(child);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
}

#[test]
fn inspect_names_the_layout_and_adds_up() {
    for (name, layout) in [
        ("hf_mha_f32", "llava-hf, 1 safetensors file"),
        ("hf_gqa_bf16", "llava-hf, 3 safetensors files"),
        ("orig_mha_f32", "original LLaVA, 2 pickle files, vision tower in"),
        ("orig_gqa_bf16", "original LLaVA, 1 pickle file, vision tower inside"),
        ("orig_projector_over_base", "projector of the original LLaVA over"),
    ] {
        let model = checkpoint(name);
        let report = run(&["inspect", "--model", &model, "--json"]).json();
        assert!(report["layout"].as_str().unwrap().starts_with(layout), "{report}");
        let parts = report["parts"].as_object().unwrap();
        assert_eq!(parts.keys().collect::<Vec<_>>(), ["decoder", "embeddings", "projector", "vision"]);
        for total in ["parameters", "bytes"] {
            assert_eq!(report[total], parts.values().map(|p| p[total].as_u64().unwrap()).sum::<u64>(), "{name}");
        }
        assert!(name != "hf_mha_f32" || report["parameters"] == 90_144, "{report}");
        let kv = ["kv_bytes_per_token", "kv_bytes_full_context", "context_tokens"].map(|key| report[key].as_u64().unwrap());
        assert_eq!(kv[0] * kv[2], kv[1], "{name}");
        let text = run(&["inspect", "--model", &model]).ok();
        assert_holds(&text, &[layout, "total", "to run:", "context    512 tokens", &report["parameters"].to_string()]);
    }
}

#[test]
fn info_says_what_this_is() {
    assert_holds(&run(&["info"]).ok(), &[env!("CARGO_PKG_VERSION"), "SIMD paths", "scalar", "CUDA"]);
    let info = run(&["info", "--json", "--threads", "1"]).json();
    assert_eq!((&info["version"], &info["threads"]), (&json!(env!("CARGO_PKG_VERSION")), &json!(1)));
    assert!(info["device"].as_str().unwrap().starts_with("cpu") && info["cuda"].is_boolean(), "{info}");
}

#[test]
fn help_shows_an_example_and_completions_know_the_subcommands() {
    let subcommands = ["generate", "chat", "score", "inspect", "info", "bench", "completions"];
    for subcommand in subcommands {
        assert_holds(&run(&[subcommand, "--help"]).ok(), &["Example", &format!("  llava-engine {subcommand} ")]);
    }
    for shell in ["bash", "zsh", "fish"] {
        assert_holds(&run(&["completions", shell]).ok(), &subcommands);
    }
    assert_eq!(run(&["--version"]).ok(), format!("llava-engine {}\n", env!("CARGO_PKG_VERSION")));
}
