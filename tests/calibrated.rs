//! `quantize` with calibration data: what GPTQ and AWQ gain, that the report is true, and what is refused.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use llava_engine::data::{self, Exchange, Row};
use llava_engine::device::Device;
use llava_engine::dtype::DType;
use llava_engine::engine::{Engine, EngineOptions, Turn};
use llava_engine::model::Slot;
use llava_engine::model::checkpoint::Checkpoint;
use llava_engine::ops::packed::Format;
use llava_engine::quantize::evaluate::evaluate;
use llava_engine::quantize::{Calibration, Method, Options, Written};
use llava_engine::text::Prompt;
use llava_engine::weights::Source;
use llava_engine::weights::recipe::Recipe;
use llava_engine::weights::write::{Planned, Writer};
use serde_json::{Value, json};
use support::program::{fail, quantize, succeed};
use support::{fixture, image, root};

fn demo() -> PathBuf {
    root().join("models/demo")
}

/// The demo model's calibration data.
fn rows() -> PathBuf {
    demo().join("calibration/rows.json")
}

fn open(model: &Path) -> Engine {
    Engine::open(model, &EngineOptions { device: Device::Cpu, threads: 2, ..Default::default() }).unwrap()
}

fn path(p: &Path) -> &str {
    p.to_str().unwrap()
}

/// The 40 scenes that the demo model is tested by: 160 answers that nobody was calibrated by.
fn unseen() -> Vec<Row> {
    let file = fixture("demo/questions.json");
    let scenes: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    let row = |(i, scene): (usize, &Value)| Row {
        file: file.clone(),
        number: i + 1,
        id: String::new(),
        images: vec![fixture("demo").join(text(&scene["image"]))],
        system: None,
        exchanges: (scene["turns"].as_array().unwrap().iter().enumerate())
            .map(|(i, t)| Exchange { question: text(&t["question"]), n_images: usize::from(i == 0), answer: text(&t["answer"]) })
            .collect(),
        n_words: 0, // of no use here
    };
    scenes.as_array().unwrap().iter().enumerate().map(row).collect()
}

/// With the decoder alone in 4 bits, both lose less than plain rounding: of the layers' outputs for calibration data, and in the loss of
/// answers about scenes that no one has seen.
///
/// The demo model knows its answers so well that rounding moves its loss by no more than chance does (0.0005 nats over these 910 tokens; in
/// groups of 128 RTN happens to gain some). KL, which does not depend on which answer is the right one, is surer. docs/PERFORMANCE.md has
/// figures of three times as many tokens.
#[test]
fn calibrated_rounding_loses_less() {
    let (mut dense, unseen) = (open(&demo()), unseen());
    let calibration = data::read(&rows(), &demo().join("calibration"), usize::MAX).unwrap();
    for group in [32, 128] {
        let mut measure = |method| {
            let dir = tempfile::tempdir().unwrap();
            let recipe = Recipe { decoder: Some(Format::new(4, group, false).unwrap()), ..Recipe::DENSE };
            let calibration = Calibration { rows: calibration.clone(), template: None, evaluate: false };
            let options = Options { recipe, method, calibration: Some(calibration), n_threads: 2 };
            let mut outputs = Vec::new();
            let keep = |w: &Written, _: usize| outputs.extend(w.output_loss.map(|loss| loss.relative()));
            let report = llava_engine::quantize::quantize(&demo(), None, dir.path(), &options, keep).unwrap();
            assert!(report.n_calibration_rows == 24 && report.evaluation.is_none());
            let evaluation = evaluate(&mut dense, &mut open(dir.path()), &unseen).unwrap();
            let output = outputs.iter().sum::<f64>() / outputs.len() as f64;
            println!("int4 in groups of {group}, {method}: outputs {output}, {evaluation:?}");
            (output, evaluation)
        };
        let [rtn, gptq, awq] = [Method::Rtn, Method::Gptq, Method::Awq].map(&mut measure);
        assert!(gptq.0 < 0.6 * rtn.0, "groups of {group}: outputs of gptq lose {}, of rtn {}", gptq.0, rtn.0);
        assert!(awq.0 < 0.96 * rtn.0, "groups of {group}: outputs of awq lose {}, of rtn {}", awq.0, rtn.0);
        let ([rtn, gptq, awq], what) = ([rtn.1, gptq.1, awq.1], format!("groups of {group}: {rtn:?}, {gptq:?}, {awq:?}"));
        assert!(gptq.kl < 0.8 * rtn.kl, "{what}");
        if group == 32 {
            assert!(gptq.quantized_loss < rtn.quantized_loss && awq.quantized_loss < rtn.quantized_loss, "{what}");
        } else {
            assert!(awq.kl < 0.8 * rtn.kl, "{what}");
        }
    }
}

/// Writes the packed checkpoint `packed`, made from `original`, with its matrices as the f32 numbers that they stand for.
fn dequantize(packed: &Path, original: &Path, to: &Path) {
    let (new, old) = (Checkpoint::open(packed, None).unwrap(), Checkpoint::open(original, None).unwrap());
    let mut tensors = Vec::new();
    for entry in new.weights.entries() {
        let canonical = entry.canonical.unwrap();
        let planned = |name: &str, shape: &[usize], dtype| Planned { name: name.to_owned(), shape: shape.to_vec(), dtype };
        if let Some(module) = canonical.strip_suffix(".words") {
            let shape = old.weights.shape(&format!("{module}.weight")).unwrap();
            let values = new.weights.packed(module, shape[0], shape[1]).unwrap().unwrap().to_f32();
            let name = entry.source.replace(".words", ".weight");
            tensors.push((planned(&name, shape, DType::F32), bytemuck::cast_slice(&values).to_vec()));
        } else if !canonical.ends_with(".scales") {
            let tensor = new.weights.tensor(&canonical, &entry.shape).unwrap();
            tensors.push((planned(&entry.source, &entry.shape, tensor.dtype()), tensor.as_bytes().to_vec()));
        }
    }
    tensors.sort_by_key(|(planned, _)| std::cmp::Reverse(planned.dtype.size()));
    fs::create_dir_all(to).unwrap();
    let plan: Vec<Planned> = tensors.iter().map(|(planned, _)| planned.clone()).collect();
    let mut writer = Writer::create(&to.join("model.safetensors"), &plan).unwrap();
    tensors.iter().for_each(|(planned, bytes)| writer.write(&planned.name, bytes).unwrap());
    writer.finish().unwrap();
    for entry in fs::read_dir(packed).unwrap() {
        let from = entry.unwrap().path();
        let copy = to.join(from.file_name().unwrap());
        if !copy.exists() {
            fs::copy(&from, copy).unwrap();
        }
    }
    let mut config: Value = serde_json::from_slice(&fs::read(to.join("config.json")).unwrap()).unwrap();
    config.as_object_mut().unwrap().remove("quantization_config").unwrap();
    fs::write(to.join("config.json"), config.to_string()).unwrap();
}

/// A row as the demo model's chat template writes it, up to its `n`-th answer, or to where that begins.
fn written(row: &Row, n: usize, with_answer: bool) -> String {
    let mut text = String::new();
    for (i, exchange) in row.exchanges[..=n].iter().enumerate() {
        let mark = if exchange.n_images > 0 { "<image>\n" } else { "" };
        text += &format!("{}USER: {mark}{} ASSISTANT:", if i > 0 { " " } else { "" }, exchange.question);
        if i < n || with_answer {
            text += &format!(" {}", exchange.answer);
        }
    }
    text
}

/// log p of each token of the vocabulary, in f64.
fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
    logits.iter().map(|&l| f64::from(l) - sum.ln()).collect()
}

/// Loss, perplexity and KL of the report, computed in other ways: the loss by `score`, with answers told from the rest by the text here. They
/// are those of the packed model, and near those of the numbers that its integers stand for.
#[test]
fn the_report_is_that_of_the_weights() {
    for method in ["gptq", "awq"] {
        let dir = tempfile::tempdir().unwrap();
        let (packed, plain) = (dir.path().join("packed"), dir.path().join("plain"));
        // In groups of 128, so that there is something to be seen.
        let report = quantize(&demo(), &packed, &["--bits", "4", "--group-size", "128", "--method", method]);
        dequantize(&packed, &demo(), &plain);
        let mut engines = [&demo(), &packed, &plain].map(|model| open(model));
        let all = data::read(&rows(), &demo().join("calibration"), usize::MAX).unwrap();
        let held_out: Vec<&Row> = all.iter().skip(3).step_by(4).collect();
        let (mut losses, mut kls, mut n_tokens) = ([0.0; 3], [0.0; 3], 0);
        for row in &held_out {
            let images = [image(&row.images[0])];
            let last = row.exchanges.len() - 1;
            let whole = Prompt::raw(&written(row, last, true));
            let slots = engines[0].tokenize(&whole, 1).unwrap().slots;
            let n_slots = |text: &str| engines[0].tokenize(&Prompt::raw(text), 1).unwrap().slots.len();
            let answers: Vec<usize> =
                (0..=last).flat_map(|n| n_slots(&written(row, n, false))..n_slots(&written(row, n, true))).collect();
            let turns: Vec<_> =
                row.exchanges.iter().flat_map(|e| [Turn::user(&e.question, e.n_images), Turn::assistant(&e.answer)]).collect();
            let mut dense = Vec::new();
            for ((engine, loss), kl) in engines.iter_mut().zip(&mut losses).zip(&mut kls) {
                let score = engine.score(&whole, &images).unwrap();
                *loss -= answers.iter().map(|&i| f64::from(score.logprobs[i - 1])).sum::<f64>();
                let example = engine.example(None, &turns, 1).unwrap();
                assert_eq!(example.slots, slots, "row {}", row.number);
                let (mut tokens, mut got) = (Vec::new(), Vec::new());
                engine
                    .answer_logits(&example, &images, |token, logits| {
                        tokens.push(token);
                        got.push(log_softmax(logits));
                    })
                    .unwrap();
                assert_eq!(tokens, answers.iter().map(|&i| token(&slots[i])).collect::<Vec<_>>(), "row {}", row.number);
                if dense.is_empty() {
                    dense = got.clone();
                }
                *kl += dense.iter().flatten().zip(got.iter().flatten()).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
            }
            n_tokens += answers.len();
        }
        let evaluation = &report["evaluation"];
        assert_eq!((&evaluation["rows"], &evaluation["answer_tokens"]), (&json!(held_out.len()), &json!(n_tokens)));
        assert_eq!(report["calibration"]["rows"], json!(all.len() - held_out.len()));
        let [dense, packed, plain] = losses.map(|loss| loss / n_tokens as f64);
        let [_, packed_kl, plain_kl] = kls.map(|kl| kl / n_tokens as f64);
        println!("{method}: {losses:?} {kls:?} of {n_tokens}; {evaluation}");
        let near = |what: &str, got: &Value, expected: f64, share: f64| {
            let got = got.as_f64().unwrap();
            assert!((got - expected).abs() <= share * expected.abs(), "{method}: {what} is {got} in the report, {expected} here");
        };
        for (side, loss) in [("dense", dense), ("quantized", packed)] {
            near(side, &evaluation[side]["loss"], loss, 1e-4);
            near(side, &evaluation[side]["perplexity"], loss.exp(), 1e-5);
        }
        near("KL", &evaluation["kl"], packed_kl, 1e-4);
        // Packed products round activations to 8 bits, dense ones do not: of so small a KL that is a good part.
        near("loss of plain weights", &evaluation["quantized"]["loss"], plain, 0.15);
        near("perplexity of plain weights", &evaluation["quantized"]["perplexity"], plain.exp(), 0.01);
        assert!(packed_kl < 4.0 * plain_kl && plain_kl < 4.0 * packed_kl, "{method}: KL {packed_kl}, of plain weights {plain_kl}");
    }
}

fn token(slot: &Slot) -> u32 {
    match slot {
        Slot::Token(id) => *id,
        Slot::Image { .. } => panic!("an image within an answer"),
    }
}

/// In every template the tokens of answers are the words of the answers, and the token that ends them where the template writes it.
#[test]
fn answers_are_told_from_the_rest() {
    let turns = [
        Turn::user("What is this?", 1),
        Turn::assistant("A red square."),
        Turn::user("Is it </s> large?", 0),
        Turn::assistant("Yes. It is."),
    ];
    for (template, ends) in [
        (None, ["", ""]),
        (Some("hf"), ["</s>", "</s>"]),
        (Some("vicuna_v1"), ["</s>", "</s>"]),
        (Some("llava_v0"), ["###", "###"]),
        (Some("llava_llama_2"), [" </s>", " </s>"]),
        (Some("mpt"), ["<|im_end|>", "<|im_end|>"]),
    ] {
        let options = EngineOptions { device: Device::Cpu, template: template.map(str::to_owned), ..Default::default() };
        let engine = Engine::open(demo(), &options).unwrap();
        let example = engine.example(None, &turns, 1).unwrap();
        let mut answers: Vec<String> = Vec::new();
        for (i, is_answer) in example.is_answer.iter().enumerate() {
            assert_eq!(example.answer(i).is_some(), *is_answer);
            if *is_answer && (i == 0 || !example.is_answer[i - 1]) {
                answers.push(String::new());
            }
            if *is_answer {
                let id = example.answer(i).unwrap();
                *answers.last_mut().unwrap() += &engine.tokenizer().id_to_token(id).unwrap().replace('▁', " ");
            }
        }
        let expected = [1, 3].map(|i| turns[i].text.clone()).into_iter().zip(ends).map(|(text, end)| text + end);
        let got: Vec<String> = answers.iter().map(|a| a.trim_start().to_owned()).collect();
        assert_eq!(got, expected.collect::<Vec<_>>(), "{template:?}");
        let with_system = engine.example(Some("Be brief, please."), &turns, 1).unwrap();
        assert!(with_system.slots != example.slots && with_system.n_answer_tokens() == example.n_answer_tokens(), "{template:?}");
        assert_eq!(example.n_answer_tokens(), example.is_answer.iter().filter(|a| **a).count());
        for turns in [&turns[..1], &[], &turns[..3]] {
            assert!(engine.example(None, turns, 1).is_err(), "{template:?}: {} turns", turns.len());
        }
    }
}

/// A row's system prompt is read with it: with the words of a template that has them, a row is as that template writes it.
#[test]
fn the_system_prompt_of_a_row_counts() {
    let open_as = |template: &str| {
        let template = Some(template.to_owned());
        Engine::open(demo(), &EngineOptions { device: Device::Cpu, threads: 2, template, ..Default::default() }).unwrap()
    };
    let plain = unseen().remove(0);
    let text = open_as("vicuna_v1").prompt(None, &[Turn::user("q", 0)]).unwrap().to_string();
    let system = text.split(" USER:").next().map(str::to_owned);
    assert!(system.as_ref().is_some_and(|words| words.len() > 100), "{text}");
    let (same, other) = (Row { system, ..plain.clone() }, Row { system: Some("It is a game.".to_owned()), ..plain.clone() });
    let loss = |template: &str, row: &Row| {
        let [mut dense, mut quantized] = [open_as(template), open_as(template)];
        evaluate(&mut dense, &mut quantized, std::slice::from_ref(row)).unwrap().dense_loss
    };
    assert_eq!(loss("hf", &same), loss("vicuna_v1", &plain));
    assert_ne!(loss("hf", &other), loss("hf", &same));
}

/// A file of rows about pictures of the fixtures, and without.
fn write_rows(dir: &Path, rows: &[Value]) -> PathBuf {
    let file = dir.join("rows.json");
    fs::write(&file, serde_json::to_vec(rows).unwrap()).unwrap();
    file
}

fn row(id: &str, image: Option<&str>) -> Value {
    let mark = if image.is_some() { "<image>\n" } else { "" };
    let mut row = json!({"id": id, "conversations": [
        {"from": "human", "value": format!("{mark}What is this?")}, {"from": "gpt", "value": "A square and a cat."},
        {"from": "human", "value": "Are you sure?"}, {"from": "gpt", "value": "Yes, it is."}]});
    if let Some(image) = image {
        row["image"] = json!(image);
    }
    row
}

/// Scales that AWQ folds into norms, into V (where heads do not share it) and into up leave the model as it was: in 8 bits nothing but
/// rounding is left to see. Rows without a picture are calibrated by as well.
#[test]
fn every_layout_is_calibrated() {
    let dir = tempfile::tempdir().unwrap();
    let images = fixture("images");
    let rows = write_rows(
        dir.path(),
        &[row("a", Some("square.png")), row("b", None), row("c", Some("odd.png")), row("d", Some("grey.png")), row("e", None)],
    );
    let flags = ["--bits", "8", "--group-size", "32", "--calibration", path(&rows), "--image-folder", path(&images)];
    for name in ["hf_mha_f32", "hf_gqa_bf16", "orig_f16_safetensors", "orig_identity_f16"] {
        let model = fixture("checkpoints").join(name);
        let mut engine = open(&model);
        let prompt = Prompt::raw("USER: <image>\nWhat is this? ASSISTANT:");
        let image = [image(&images.join("square.png"))];
        let before = engine.score(&prompt, &image).unwrap().logprobs;
        for method in ["rtn", "gptq", "awq"] {
            let output = dir.path().join(format!("{name} {method}"));
            let report = quantize(&model, &output, &[&flags[..], &["--method", method]].concat());
            assert_eq!((&report["calibration"]["rows"], &report["evaluation"]["rows"]), (&json!(4), &json!(1)), "{name}");
            let tensors = report["tensors"].as_array().unwrap();
            let outputs: Vec<f64> = tensors.iter().filter_map(|t| t["relative_output_error"].as_f64()).collect();
            // Most of the tiny models have rows that are no groups of 32.
            assert!(!outputs.is_empty() || name != "hf_mha_f32", "{name}, {method}: nothing was packed");
            assert!(outputs.iter().all(|&e| e > 0.0 && e < 0.02), "{name}, {method}: {outputs:?}");
            let after = open(&output).score(&prompt, &image).unwrap().logprobs;
            let mean = before.iter().sum::<f32>() / before.len() as f32;
            let spread: f32 = before.iter().map(|a| (a - mean).powi(2)).sum();
            let moved: f32 = before.iter().zip(&after).map(|(a, b)| (a - b).powi(2)).sum();
            let share = (moved / spread).sqrt();
            println!("{name}, {method}: {share}");
            assert!(share > 0.0 && share < 0.08, "{name}, {method}: log-probabilities moved by {share} of their spread");
        }
        let weight = |output: &str, canonical: &str| {
            let checkpoint = Checkpoint::open(&dir.path().join(format!("{name} {output}")), None).unwrap();
            let shape = checkpoint.weights.shape(canonical).unwrap().to_vec();
            checkpoint.weights.tensor(canonical, &shape).unwrap().to_f32()
        };
        let norm = "llama.layers.1.post_attention_layernorm.weight";
        let folded = ["hf_mha_f32", "orig_identity_f16"].contains(&name);
        assert_eq!(weight("awq", norm) != weight("rtn", norm), folded, "{name}: whether a scale was folded into a norm");
        assert_eq!(weight("gptq", norm), weight("rtn", norm), "{name}: GPTQ changes matrices only");
    }
}

/// Plain rounding is the same with data to judge it by.
#[test]
fn data_changes_nothing_of_plain_rounding() {
    let dir = tempfile::tempdir().unwrap();
    let [with, without] = ["with", "without"].map(|name| dir.path().join(name));
    let file = rows();
    let report = quantize(&demo(), &with, &["--bits", "4", "--calibration", path(&file), "--calibration-rows", "8"]);
    assert_eq!((&report["calibration"]["rows"], &report["evaluation"]["rows"]), (&json!(6), &json!(2)));
    let report = quantize(&demo(), &without, &["--bits", "4"]);
    assert!(report["evaluation"].is_null() && report["calibration"]["rows"] == 0);
    let read = |dir: &Path| fs::read(dir.join("model.safetensors")).unwrap();
    assert!(read(&with) == read(&without), "the weights differ");
    let output = dir.path().join("text");
    let args = ["quantize", "--output", path(&output), "--bits", "4", "--method", "gptq", "--no-evaluation"];
    let text = succeed(&args);
    assert!(text.contains("output, %") && !text.contains("perplexity"), "{text}");
}

#[test]
fn what_cannot_be_calibrated_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (images, output) = (fixture("images"), dir.path().join("output"));
    let demo = demo();
    let run = |model: &Path, flags: &[&str]| {
        let paths = ["quantize", "--bits", "4", "--model", path(model), "--output", path(&output)];
        fail(&[&paths[..], flags].concat())
    };
    // Wrong usage, which is seen before anything is opened.
    for (flags, expected) in [
        (&["--method", "magic"][..], "rtn, gptq, awq"),
        (&["--method", "gptq", "--group-size", "48"], "48 columns"),
        (&["--image-folder", path(&images)], "--calibration"),
        (&["--method", "awq", "--template", "nobody"], "nobody"),
    ] {
        let (code, message) = run(&demo, flags);
        assert!(code == 2 && message.contains(expected) && !output.exists(), "{flags:?}: {code} {message}");
    }
    let args = ["quantize", "--bits", "16", "--model", path(&demo), "--output", path(&output), "--method", "gptq"];
    let (code, message) = fail(&args);
    assert!(code == 2 && message.contains("gptq rounds the decoder's matrices"), "{message}");

    // Rows.
    let with_image = |name: &str| row("x7", Some(name));
    fs::write(dir.path().join("broken.png"), b"no picture").unwrap();
    let broken = dir.path().join("broken.png");
    let mut two_marks = with_image("square.png");
    two_marks["conversations"][2]["value"] = json!("<image> And this?");
    let mut long = row("x7", None);
    long["conversations"][1]["value"] = json!("It is. ".repeat(2000));
    for (bad, parts) in [
        (with_image("nowhere.png"), &["row 2 (id x7)", "nowhere.png", "not there"][..]),
        (with_image(path(&broken)), &["row 2 (id x7)", "broken.png"]),
        (two_marks, &["row 2 (id x7)", "1 pictures", "2 marks"]),
        (long, &["row 2 (id x7)", "context"]),
        (json!({"id": "x7"}), &["row 2", "conversations"]),
    ] {
        let file = write_rows(dir.path(), &[row("good", None), bad]);
        let flags = ["--method", "gptq", "--calibration", path(&file), "--image-folder", path(&images)];
        let (code, message) = run(&demo, &flags);
        let all = parts.iter().all(|part| message.contains(part)) && message.contains("rows.json");
        assert!(code == 1 && all && message.lines().count() == 1, "{parts:?}: {code} {message}");
        assert!(!output.exists() || fs::read_dir(&output).unwrap().count() == 0, "{parts:?}: a file stayed behind");
        let _ = fs::remove_dir(&output);
    }

    // Weights.
    let tiny = fixture("checkpoints/hf_mha_f32");
    let file = write_rows(dir.path(), &[row("a", None)]);
    for method in ["gptq", "awq"] {
        let flags = ["--method", method, "--calibration", path(&file)];
        let broken = dir.path().join("broken");
        support::program::copy_dir(&tiny, &broken);
        support::program::break_weight(&broken, "mlp.up_proj.weight");
        let (code, message) = run(&broken, &flags);
        let parts = ["up_proj", "row 1, column 3", "NaN"];
        assert!(code == 1 && parts.iter().all(|part| message.contains(part)), "{method}: {message}");
        assert_eq!(fs::read_dir(&output).unwrap().count(), 0, "a file stayed behind");
        // What is not packed may be broken too: then it is seen by what comes of it.
        support::program::copy_dir(&tiny, &broken);
        support::program::break_weight(&broken, "embed_tokens.weight");
        let (code, message) = run(&broken, &[&flags[..], &["--embedding-bits", "16"]].concat());
        assert!(code == 1 && message.contains("q_proj") && message.contains("no finite number"), "{method}: {message}");
        fs::remove_dir_all(&output).unwrap();

        quantize(&tiny, &output, &["--bits", "8", "--group-size", "32"]);
        let again = dir.path().join("again");
        let args = ["quantize", "--bits", "4", "--model", path(&output), "--output", path(&again), "--method", method];
        let (code, message) = fail(&[&args[..], &["--calibration", path(&file)]].concat());
        assert!(code == 1 && message.contains("packed already") && !again.exists(), "{message}");
        fs::remove_dir_all(&output).unwrap();
    }
}

/// A disk that is full midway, and a limit on the size of files: an error that names the file, and no file.
#[test]
fn a_full_disk_leaves_no_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let run = |method: &str, before: &str| {
        let output = dir.path().join("output");
        // What is there afterwards is listed where the small disk is still mounted.
        let script = format!(
            "{before}\n'{}' quantize --bits 4 --method {method} --model '{}' --output '{o}'; echo code $?; ls -A '{o}'",
            env!("CARGO_BIN_EXE_llava-engine"),
            demo().display(),
            o = output.display()
        );
        let mut command = if before.contains("mount") { Command::new("unshare") } else { Command::new("sh") };
        if before.contains("mount") {
            command.args(["--user", "--map-root-user", "--mount", "sh"]);
        }
        let ran = command.args(["-c", &script]).env("LLAVA_THREADS", "2").output().unwrap();
        let _ = fs::remove_dir_all(&output);
        (String::from_utf8(ran.stdout).unwrap(), String::from_utf8(ran.stderr).unwrap())
    };
    for method in ["rtn", "gptq"] {
        let (out, message) = run(method, "trap '' XFSZ; ulimit -f 100");
        assert!(out == "code 1\n" && message.contains("model.safetensors") && message.contains("too large"), "{out} {message}");
        // The model takes 3 MB.
        let mount = format!("mount -t tmpfs -o size=2m none '{0}' && cd '{0}' || exit 99", dir.path().display());
        let (out, message) = run(method, &mount);
        if out.is_empty() {
            println!("skipped: no small disk may be mounted here: {message}");
            continue;
        }
        assert!(out == "code 1\n" && message.contains("model.safetensors") && message.contains("No space left"), "{out} {message}");
    }
}
