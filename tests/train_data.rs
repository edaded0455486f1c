//! Data of fine-tuning: files of rows and what may be wrong with them, learning rates against transformers', settings, and
//! `finetune --check-data`.

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use llava_engine::data::{Fault, RowFile};
use llava_engine::error::Error;
use llava_engine::text::Template;
use llava_engine::train::config::{Config, PRESETS, SETTINGS};
use llava_engine::train::data::Dataset;
use llava_engine::train::schedule::{Decay, Schedule};
use serde_json::Value;
use support::{fixture, program, rows};

const GOOD: &str = r#"{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}"#;

#[test]
fn files_are_read_whatever_they_look_like() {
    // Brackets, quotes and escapes within texts; another order of keys; a mark of UTF-8; keys that nobody knows.
    let tricky = r#"{"x": [1, {"y": "]}\\"}], "conversations": [{"from":"human","value":"}]\"{[ \\\""},
        {"value":"\u00e9 😀\n,","from":"gpt"}], "id": 7, "model": null, "image": null}"#;
    let line = tricky.replace('\n', " ");
    for text in [
        format!("[{tricky},{GOOD}]"),
        format!("\u{feff} \n[\n {tricky}\n,\n{GOOD} ]\n\n"),
        format!("{line}\n{GOOD}"),
        format!("\u{feff}{line}\r\n\r\n  {GOOD}\r\n"),
    ] {
        let (_folder, file) = rows(&text);
        assert_eq!(file.n_rows(), 2, "{text}");
        // In any order, as often as one likes.
        for i in [1, 0, 1, 0] {
            let row = file.row(i).unwrap();
            assert_eq!(row.number, i + 1);
            let expected = [("}]\"{[ \\\"", "é 😀\n,"), ("q", "a")][i];
            assert_eq!((row.exchanges[0].question.as_str(), row.exchanges[0].answer.as_str()), expected);
        }
        assert_eq!((file.row(0).unwrap().n_words, file.row(1).unwrap().n_words), (5, 2));
    }
}

#[test]
fn rows_longer_than_what_is_read_at_once_are_whole() {
    for n in [1, 65_535, 65_536, 65_537, 200_000] {
        let long = GOOD.replace("\"a\"", &format!("\"{}\"", "x".repeat(n)));
        for text in [format!("[{GOOD},{long},{GOOD}]"), format!("{GOOD}\n{long}\n{GOOD}\n")] {
            let (_folder, file) = rows(&text);
            assert_eq!(file.n_rows(), 3);
            assert_eq!(file.row(1).unwrap().exchanges[0].answer.len(), n);
            assert_eq!(file.row(2).unwrap().exchanges[0].answer, "a");
        }
    }
}

#[test]
fn broken_files_are_named_with_row_and_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.json");
    for (text, expected) in [
        (String::new(), "there are no rows"),
        ("[]".to_owned(), "there are no rows"),
        (" \n\n".to_owned(), "there are no rows"),
        ("\nid,question".to_owned(), "line 2: neither a JSON array of rows nor one row a line"),
        (format!("[{GOOD},\n{GOOD}"), "line 2: invalid JSON: the file ends before the array does"),
        (format!("[{GOOD},\n{GOOD},"), "line 2: invalid JSON: the file ends before the array does"),
        (format!("[{GOOD},\n\n{}", &GOOD[..40]), "row 2, line 3: invalid JSON: the file ends within it"),
        (format!("[{GOOD}\n{GOOD}]"), "row 2, line 2: a comma is missing before it"),
        (format!("[{GOOD},\n7]"), "row 2, line 2: no row of the form"),
        (format!("[{GOOD},\n]"), "row 2, line 2: no row of the form"),
        (format!("[{GOOD}]\n{GOOD}"), "line 2: there is more behind the end of the array"),
    ] {
        fs::write(&path, &text).unwrap();
        let error = RowFile::open(&path, folder.path()).unwrap_err();
        assert_eq!(error.exit_code(), 1);
        let error = error.to_string();
        assert!(error.contains(expected) && error.contains("rows.json"), "{text}: {error}");
    }
    let missing = RowFile::open(&folder.path().join("none.json"), folder.path()).unwrap_err();
    assert!(matches!(missing, Error::Io { .. }) && missing.to_string().contains("none.json"));
}

/// Every kind of broken row, each alone between good ones, in an array and in lines.
#[test]
fn broken_rows_are_named_with_row_and_line() {
    let turn = |from: &str, value: &str| format!(r#"{{"from": "{from}", "value": "{value}"}}"#);
    let of = |turns: &[String]| format!(r#"{{"id": "x", "conversations": [{}]}}"#, turns.join(", "));
    let (q, a) = (turn("human", "q"), turn("gpt", "a"));
    let with_image = |turns: &[String]| of(turns).replace(r#""id": "x""#, r#""id": "x", "image": "i.png""#);
    let cases = [
        (of(&[]), Fault::Empty, "it has no turns"),
        (of(std::slice::from_ref(&q)), Fault::NoAnswer, "no turn of `gpt` answers"),
        (of(std::slice::from_ref(&a)), Fault::NoAnswer, "no turn of `gpt` answers"),
        (of(&[turn("user", "s"), q.clone(), a.clone()]), Fault::Roles, "a turn is from `user`"),
        (of(&[q.clone(), turn("GPT", "a")]), Fault::Roles, "a turn is from `GPT`"),
        (of(&[q.clone(), q.clone(), a.clone()]), Fault::Roles, "turns must alternate"),
        (of(&[q.clone(), a.clone(), a.clone()]), Fault::Roles, "turns must alternate"),
        (of(&[a.clone(), a.clone(), q.clone(), a.clone()]), Fault::Roles, "turns must alternate"),
        (of(&[q.clone(), a.clone(), q.clone()]), Fault::Roles, "its last question has no answer"),
        (of(&[q.clone(), turn("system", "s"), a.clone()]), Fault::Roles, "a turn is from `system` behind the first"),
        (of(&[turn("system", "s"), turn("system", "s"), q.clone(), a.clone()]), Fault::Roles, "from `system` behind the first"),
        (of(&[turn("system", "s")]), Fault::Empty, "it has no turns"),
        (with_image(&[turn("system", "<image>"), q.clone(), a.clone()]), Fault::Marks, "a mark <image> is in its system prompt"),
        (of(&[turn("system", "s"), q.clone()]), Fault::NoAnswer, "nothing to learn"),
        (with_image(&[q.clone(), a.clone()]), Fault::Marks, "1 pictures, but its text has 0 marks <image>"),
        (of(&[turn("human", "<image> q"), a.clone()]), Fault::Marks, "0 pictures, but its text has 1 marks <image>"),
        (with_image(&[turn("human", "<image><image>"), a.clone()]), Fault::Marks, "1 pictures, but its text has 2 marks"),
        (with_image(&[q.clone(), turn("gpt", "<image>")]), Fault::Marks, "a mark <image> is in an answer"),
        (r#"{"id": "x"}"#.to_owned(), Fault::Json, "missing field `conversations`"),
        (of(&[q.clone(), r#"{"from": "gpt"}"#.to_owned()]), Fault::Json, "missing field `value`"),
        (of(&[q.clone(), a.replace("\"a\"", "7")]), Fault::Json, "invalid type: integer `7`, expected a string"),
        (of(&[q.clone(), a.clone()]).replace("\"x\"", ""), Fault::Json, "invalid JSON: expected value"),
        (of(&[q.clone(), a.clone()]).replace("\"a\"", "\"\\x\""), Fault::Json, "invalid JSON: invalid escape"),
    ];
    for (row, fault, expected) in &cases {
        for (text, line) in [(format!("[{GOOD},\n{row},\n{GOOD}]"), 2), (format!("{GOOD}\n\n{row}\n{GOOD}"), 3)] {
            let (_folder, file) = rows(&text);
            assert_eq!(file.n_rows(), 3, "{text}");
            assert!(file.row(0).is_ok() && file.row(2).is_ok());
            let error = file.row(1).unwrap_err();
            let message = error.error.to_string();
            assert_eq!((error.fault, error.number), (*fault, 2), "{row}: {message}");
            assert!(message.contains(expected) && message.contains("rows.json: row 2"), "{row}: {message}");
            assert_eq!(message.contains(&format!("row 2, line {line}: ")), *fault == Fault::Json, "{message}");
        }
    }
    // Where a row has several lines, its own counts.
    let (_folder, file) = rows(&format!("[\n{GOOD},\n{{\n\"id\": 1,\n\"image\": 5,\n\"conversations\": []}}]"));
    let message = file.row(1).unwrap_err().error.to_string();
    assert!(message.contains("row 2, line 5: ") || message.contains("row 2, line 6: "), "{message}");
    // A row without pictures may write about marks in its answer.
    assert!(rows(&of(&[q, turn("gpt", "write <image>")])).1.row(0).is_ok());
}

#[test]
fn white_space_goes_where_python_strips_it() {
    let row = |value: &str, image: &str| {
        format!(r#"{{{image}"conversations": [{{"from": "human", "value": "{value}"}}, {{"from": "gpt", "value": "a"}}]}}"#)
    };
    for (value, image, expected) in [
        (r" q\n", "", " q\n"),
        (r"<image>\n q \n", r#""image": "i", "#, "q"),
        (r"q <image>", r#""image": "i", "#, "q"),
        (r"\u001c<image>\u001f\u00a0q\u2028", r#""image": "i", "#, "q"),
        (r"\u200b<image>q", r#""image": "i", "#, "\u{200b}q"),
        (r"a<image>b", r#""image": "i", "#, "ab"),
    ] {
        let (_folder, file) = rows(&row(value, image));
        assert_eq!(file.row(0).unwrap().exchanges[0].question, expected, "{value}");
    }
}

#[test]
fn held_out_rows_are_the_same_for_the_same_seed() {
    let folder = tempfile::tempdir().unwrap();
    let files: Vec<PathBuf> = (0..2).map(|i| folder.path().join(format!("{i}.jsonl"))).collect();
    files.iter().for_each(|path| fs::write(path, format!("{GOOD}\n").repeat(50)).unwrap());
    let open = || Dataset::open(&files, None).unwrap();
    let places = |data: &Dataset| (0..data.n_rows()).map(|i| (data.place(i).0.to_owned(), data.place(i).1)).collect::<Vec<_>>();
    let split = |share, seed| {
        let mut data = open();
        let held = data.hold_out(share, seed);
        (places(&data), places(&held))
    };
    let (kept, held) = split(0.1, 5);
    assert_eq!((kept.len(), held.len()), (90, 10));
    assert_eq!((kept.clone(), held.clone()), split(0.1, 5));
    assert_ne!(held, split(0.1, 6).1);
    let mut all = [kept, held].concat();
    all.sort();
    assert_eq!(all, places(&open()));
    assert_eq!(split(0.0, 5).1, []);
    let error = Dataset::open(&[], None).unwrap_err();
    assert!(error.to_string().contains("--data") && error.exit_code() == 2);
    let row = open().row(60).unwrap();
    assert!(row.number == 11 && row.file.ends_with("1.jsonl"));
}

#[test]
fn learning_rates_are_transformers() {
    let schedules: Value = serde_json::from_slice(&fs::read(fixture("masks/schedules.json")).unwrap()).unwrap();
    let mut n = 0;
    for case in schedules["cases"].as_array().unwrap() {
        let decay: Decay = serde_json::from_value(case["kind"].clone()).unwrap();
        let size = |key: &str| case[key].as_u64().unwrap() as usize;
        let schedule = Schedule::new(decay, size("steps"), size("warmup_steps"), case["warmup_ratio"].as_f64().unwrap());
        assert_eq!(schedule.n_warmup(), size("n_warmup"), "{case}");
        for (step, factor) in case["at"].as_array().unwrap().iter().zip(case["factors"].as_array().unwrap()) {
            let (step, factor) = (step.as_u64().unwrap() as usize, factor.as_f64().unwrap());
            // Both compute in f64; an order of operations apart.
            assert!((schedule.factor(step) - factor).abs() < 1e-12, "{case}: {} at {step}", schedule.factor(step));
            n += 1;
        }
    }
    assert!(n > 100, "{n}");
}

fn flags(pairs: &[(&str, &str)]) -> toml::Table {
    let parse = |(key, value): &(&str, &str)| {
        let setting = SETTINGS.iter().find(|s| s.key == *key).unwrap();
        ((*key).to_owned(), (setting.parse)(&[value]).unwrap())
    };
    pairs.iter().map(parse).collect()
}

fn resolve(file: &str, pairs: &[(&str, &str)]) -> Result<Config, Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    fs::write(&path, file).unwrap();
    Config::resolve(Some(&path), flags(pairs))
}

/// FORMATS of the official scripts, number by number.
#[test]
fn presets_are_the_official_scripts() {
    let official = [
        // name, stage, tune, template, lr, projector lr, rows of a step, r, alpha, bits, aspect ratio, grouping, save
        ("llava-1.5-pretrain", "pretrain", "projector", "plain", 1e-3, None, 256, None, 16, "square", "none", 24_000),
        ("llava-1.5-finetune", "instruct", "full", "v1", 2e-5, None, 128, None, 16, "pad", "modality", 50_000),
        ("llava-1.5-lora", "instruct", "lora", "v1", 2e-4, Some(2e-5), 128, Some((128, 256.0)), 16, "pad", "modality", 50_000),
        ("llava-1.5-task-lora", "instruct", "lora", "v1", 2e-4, Some(2e-5), 128, Some((128, 256.0)), 16, "pad", "modality", 50_000),
        ("llava-1-pretrain", "pretrain", "projector", "plain", 2e-3, None, 128, None, 16, "square", "none", 24_000),
        ("llava-1-qlora", "instruct", "lora", "v1", 2e-5, None, 128, Some((64, 16.0)), 4, "square", "none", 50_000),
    ];
    assert_eq!(official.map(|o| o.0), PRESETS.map(|(name, _)| name));
    for (name, stage, tune, template, lr, projector_lr, rows, lora, bits, aspect, grouping, save) in official {
        let c = Config::resolve(None, flags(&[("preset", name)])).unwrap();
        let word = |value: toml::Value| value.as_str().unwrap().to_owned();
        let table: toml::Table = toml::from_str(&c.to_toml()).unwrap();
        let words = ["stage", "tune", "template", "image_aspect_ratio", "grouping", "schedule", "dtype", "tune_vision"]
            .map(|k| word(table[k].clone()));
        assert_eq!(words, [stage, tune, template, aspect, grouping, "cosine", "bf16", "off"], "{name}");
        assert_eq!(
            (c.lr, c.projector_lr, c.batch_size * c.accumulation, c.base_bits, c.save_steps),
            (lr, projector_lr, rows, bits, save),
            "{name}"
        );
        if let Some((r, alpha)) = lora {
            assert_eq!((c.lora_r, c.lora_alpha, c.lora_dropout, c.lora_targets.len()), (r, alpha, 0.05, 7), "{name}");
        }
        assert_eq!(
            (c.weight_decay, c.warmup_ratio, c.epochs, c.max_tokens, c.keep, c.log_steps),
            (0.0, 0.03, 1.0, 2048, 1, 1),
            "{name}"
        );
        assert_eq!((c.beta1, c.beta2, c.adam_eps, c.max_grad_norm), (0.9, 0.999, 1e-8, 1.0), "{name}");
    }
    let error = Config::resolve(None, flags(&[("preset", "llava-1.5")])).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("llava-1.5-task-lora"), "{error}");
}

#[test]
fn flags_count_more_than_the_file_and_the_file_more_than_the_preset() {
    let file = "preset = \"llava-1.5-pretrain\"\nlr = 5e-4\nbatch_size = 4\ndata = [\"a.json\", \"b.json\"]\n";
    let c = resolve(file, &[("batch_size", "2")]).unwrap();
    assert_eq!((c.lr, c.batch_size, c.accumulation, c.template.as_deref()), (5e-4, 2, 8, Some("plain")));
    assert_eq!(c.data, [PathBuf::from("a.json"), PathBuf::from("b.json")]);
    let c = resolve(file, &[("preset", "llava-1.5-lora")]).unwrap();
    assert_eq!((c.lr, c.projector_lr, c.batch_size), (5e-4, Some(2e-5), 4));
    // Without a preset the numbers are those of the stage, for a checkpoint of any kind.
    let c = resolve("stage = \"pretrain\"", &[]).unwrap();
    assert_eq!((c.lr, c.batch_size, c.template.as_deref(), c.preset.as_deref()), (1e-3, 32, None, None));
    assert_eq!(c.template().unwrap().map(Template::name), Some("plain"));
    assert_eq!(resolve("tune = \"full\"", &[]).unwrap().lr, 2e-5);
    // Where the projector learns alone, the common rate is its own.
    let c = resolve("tune = \"projector\"", &[("lr", "1e-3")]).unwrap();
    assert_eq!((c.lr, c.projector_lr), (1e-3, None));
    assert_eq!(resolve("", &[("lr", "1")]).unwrap().lr, 1.0);
    assert_eq!(resolve("lr = 1", &[]).unwrap().lr, 1.0);
    // What is written is what is read.
    let c = resolve(file, &[("vision_lr", "1e-6"), ("image_folder", "2026-01-01"), ("lora_targets", "q_proj,v_proj")]).unwrap();
    assert_eq!(Config::from_toml(Path::new("x"), &c.to_toml()).unwrap(), c);
    assert_eq!((c.image_folder, c.lora_targets.len()), (Some("2026-01-01".into()), 2));
}

#[test]
fn settings_that_make_no_sense_are_refused_by_name() {
    for (key, value, expected) in [
        ("lr", "nan", "lr = NaN makes no sense: it must be a number above 0"),
        ("lr", "-1e-4", "lr = -0.0001 makes no sense"),
        ("lr", "0", "lr = 0 makes no sense"),
        ("lr", "inf", "lr = inf makes no sense"),
        ("projector_lr", "nan", "projector_lr = NaN"),
        ("vision_lr", "-1", "vision_lr = -1"),
        ("lora_r", "0", "lora_r = 0 makes no sense: it must be at least 1"),
        ("lora_alpha", "0", "lora_alpha = 0"),
        ("lora_dropout", "1", "lora_dropout = 1"),
        ("lora_targets", "q_proj,lm_head", "no matrix is called `lm_head`"),
        ("lora_targets", "", "lora_targets is empty"),
        ("weight_decay", "-0.1", "weight_decay = -0.1"),
        ("beta1", "1", "beta1 = 1"),
        ("beta2", "nan", "beta2 = NaN"),
        ("adam_eps", "0", "adam_eps = 0"),
        ("max_grad_norm", "-1", "max_grad_norm = -1"),
        ("warmup_ratio", "1.5", "warmup_ratio = 1.5"),
        ("epochs", "0", "epochs = 0"),
        ("batch_size", "0", "batch_size = 0"),
        ("accumulation", "0", "accumulation = 0"),
        ("max_tokens", "0", "max_tokens = 0"),
        ("log_steps", "0", "log_steps = 0"),
        ("keep", "0", "keep = 0"),
        ("eval_share", "1", "eval_share = 1"),
        ("eval_steps", "5", "eval_steps is set, but there is nothing to evaluate by"),
        ("pack_tokens", "5", "pack_tokens is set, but nothing is packed"),
        ("base_bits", "5", "base_bits = 5"),
        ("template", "vicuna", "no conversation template `vicuna`"),
        ("stage", "rlhf", "unknown variant `rlhf`"),
        ("schedule", "step", "unknown variant `step`"),
    ] {
        let error = resolve("", &[(key, value)]).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{key}: {error}");
        assert!(error.to_string().contains(expected), "{key} = {value}: {error}");
    }
    for (file, expected) in [
        ("stage = \"pretrain\"\ntune = \"lora\"", "stage = pretrain trains the projector alone"),
        ("tune = \"full\"\nbase_bits = 4", "take tune = lora"),
        ("eval_share = 0.1\neval_data = [\"x\"]", "eval_share and eval_data are both set"),
    ] {
        let error = resolve(file, &[]).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains(expected), "{error}");
    }
    // In the file, with its line.
    for (file, expected) in [
        ("lr = 1e-4\nlearning_rate = 1e-4\n", "run.toml: line 2: unknown field `learning_rate`, expected one of `preset`"),
        ("lr = \"fast\"", "run.toml: line 1: invalid type: string \"fast\", expected f64"),
        ("seed = -1", "run.toml: line 1: invalid value: integer `-1`"),
        ("lr = 1e-4\nlr = 2e-4", "run.toml: line 2: duplicate key"),
        ("[lora]\nr = 8", "run.toml: line 1: unknown field `lora`"),
    ] {
        let error = resolve(file, &[]).unwrap_err().to_string();
        assert!(error.contains(expected) && !error.contains('\n'), "{error} lacks {expected}");
    }
    for (key, value) in [("lr", "fast"), ("seed", "-1"), ("batch_size", "1.5")] {
        let setting = SETTINGS.iter().find(|s| s.key == key).unwrap();
        assert!((setting.parse)(&[value]).unwrap_err().contains(value));
    }
    assert!(Config { seed: u64::MAX, ..Config::default() }.validate().unwrap_err().to_string().contains("18446744073709551615"));
}

#[test]
fn differences_are_listed() {
    let here = resolve("lr = 1e-4\ndata = [\"a\"]", &[]).unwrap();
    let there = resolve("data = [\"a\"]\nvision_lr = 1e-6\ntune_vision = \"lora\"", &[]).unwrap();
    let expected =
        ["tune_vision: \"lora\" there, \"off\" here", "lr: 0.0002 there, 0.0001 here", "vision_lr: 0.000001 there, unset here"];
    assert_eq!(here.differences(&there, &[]), expected);
    assert!(here.differences(&here.clone(), &[]).is_empty());
}

/// Pictures and rows of the demo model, one of each fault among them.
fn faulty_data(folder: &Path) -> PathBuf {
    let demo = support::root().join("models/demo/calibration");
    fs::copy(demo.join("0002.png"), folder.join("good.png")).unwrap();
    let bytes = fs::read(demo.join("0002.png")).unwrap();
    fs::write(folder.join("cut.png"), &bytes[..bytes.len() / 2]).unwrap();
    fs::write(folder.join("text.png"), "no picture").unwrap();
    let row = |id: &str, image: &str, answer: &str| {
        format!(
            r#"{{"id": "{id}", "image": "{image}", "conversations": [{{"from": "human", "value": "<image>\nWhat is this?"}}, {{"from": "gpt", "value": "{answer}"}}]}}"#
        )
    };
    let rows = [
        row("good", "good.png", "A star."),
        row("missing", "none.png", "A star."),
        row("text", "text.png", "A star."),
        row("empty", "good.png", ""),
        row("cut", "cut.png", "A star."),
        row("marks", "good.png", "A star.").replace("<image>", ""),
        row("roles", "good.png", "A star.").replace("human", "user"),
        r#"{"id": "broken""#.to_owned(),
    ];
    let path = folder.join("rows.jsonl");
    fs::write(&path, rows.join("\n")).unwrap();
    path
}

#[test]
fn check_data_counts_and_names_bad_rows() {
    let folder = tempfile::tempdir().unwrap();
    let path = faulty_data(folder.path());
    let path = path.to_str().unwrap();
    let check = |flags: &[&str]| program::llava(&[&["finetune", "--check-data", "--data", path][..], flags].concat());
    let report = |flags: &[&str]| -> Value { serde_json::from_slice(&check(&[&["--json"], flags].concat()).stdout).unwrap() };
    let all = report(&[]);
    let bad = |report: &Value| -> Vec<(u64, String)> {
        let rows = report["bad_rows"].as_array().unwrap().iter();
        rows.map(|bad| (bad["row"].as_u64().unwrap(), bad["fault"].as_str().unwrap().to_owned())).collect()
    };
    let expected = [
        (2, "missing images"),
        (3, "broken images"),
        (4, "nothing to learn"),
        (6, "wrong count of <image>"),
        (7, "role errors"),
        (8, "invalid JSON"),
    ];
    assert_eq!(bad(&all), expected.map(|(row, fault)| (row, fault.to_owned())));
    assert_eq!(
        (&all["rows"], &all["faults"]["missing images"], &all["faults"]["empty conversations"]),
        (&8.into(), &1.into(), &0.into())
    );
    assert!(all["bad_rows"][5]["message"].as_str().unwrap().contains("row 8, line 8: invalid JSON"), "{all}");
    // A header alone does not tell that a picture was cut off.
    assert_eq!(bad(&report(&["--decode-images"])).iter().filter(|(_, fault)| fault == "broken images").count(), 2);

    let output = check(&["--show-rows", "1"]);
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!(output.status.code(), Some(1));
    assert!(err.contains("6 of 8 rows are bad, 0 are allowed (--max-bad-rows); the first:"), "{err}");
    assert!(err.contains("row 2 (id missing): its picture"), "{err}");
    assert!(out.contains("row 1 (id good): template hf") && out.contains("What is this? ASSISTANT:{{ A star.</s>}}"), "{out}");
    assert!(!out.contains('\x1b'), "no colours where there is no terminal: {out:?}");
    for line in
        ["rows                              8", "role errors                       1", "broken images                     1"]
    {
        assert!(out.contains(line), "{out}");
    }
    assert_eq!(check(&["--max-bad-rows", "6"]).status.code(), Some(0));
    assert_eq!(check(&["--max-bad-rows", "5"]).status.code(), Some(1));
}

#[test]
fn check_data_measures_lengths() {
    let demo = support::root().join("models/demo/calibration/rows.json");
    let check = |flags: &[&str]| -> Value {
        let out = program::succeed(&[&["finetune", "--check-data", "--json", "--data", demo.to_str().unwrap()], flags].concat());
        serde_json::from_str(&out).unwrap()
    };
    let whole = check(&[]);
    let n = |v: &Value| v.as_u64().unwrap();
    assert!(whole["bad_rows"].as_array().unwrap().is_empty() && n(&whole["rows"]) > 10 && n(&whole["truncated"]) == 0);
    let (half, longest) = (n(&whole["tokens"]["p50"]), n(&whole["tokens"]["p100"]));
    let cut = check(&["--max-tokens", &(half - 1).to_string(), "--max-bad-rows", "1000"]);
    assert!(2 * n(&cut["truncated"]) >= n(&cut["rows"]) && n(&cut["tokens"]["p100"]) <= longest, "{cut}");
    assert!(n(&cut["supervised_tokens"]["p100"]) < n(&whole["supervised_tokens"]["p100"]));
    // The other template and stage: captions only.
    let plain = program::llava(&["finetune", "--check-data", "--json", "--stage", "pretrain", "--data", demo.to_str().unwrap()]);
    let plain: Value = serde_json::from_slice(&plain.stdout).unwrap();
    assert_eq!(plain["template"], "plain");
    assert!(n(&plain["faults"]["not for the template"]) > 0);
}

#[test]
fn wrong_usage_of_finetune_is_told_before_anything_is_read() {
    for (flags, expected) in [
        (&["--data", "x.json"][..], "Name a new folder with --output"),
        (&["--check-data"], "no data: name a file of rows with --data"),
        (&["--check-data", "--lr", "nan"], "lr = NaN makes no sense"),
        (&["--check-data", "--lora-r", "0"], "lora_r = 0 makes no sense"),
        (&["--check-data", "--lr", "fast"], "--lr: `fast` is not a number"),
        (&["--check-data", "--preset", "x"], "no preset `x`; there are: llava-1.5-pretrain"),
        (&["--check-data", "--learning-rate", "1"], "unexpected argument '--learning-rate'"),
    ] {
        let (code, error) = program::fail(&[&["finetune"], flags].concat());
        assert_eq!(code, 2, "{flags:?}: {error}");
        assert!(error.contains(expected), "{flags:?}: {error}");
    }
    let help = program::succeed(&["finetune", "--help"]);
    for setting in SETTINGS {
        assert!(help.contains(&format!("--{}", setting.key.replace('_', "-"))), "{}", setting.key);
    }
}
