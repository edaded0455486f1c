//! `finetune --init random`: a model from its configuration alone.

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use llava_engine::model::start;
use llava_engine::weights::names::Part;
use llava_engine::weights::{Entry, Store};
use support::finetune::{finetune_of, folder, log, tensors};
use support::program::{copy_dir, succeed};
use support::{fixture, root};

/// The demo model's folder without its weights, whose configuration names this dtype.
fn shape(folder: &Path, dtype: &str) -> String {
    let shape = folder.join("shape");
    copy_dir(&root().join("models/demo"), &shape);
    std::fs::remove_file(shape.join("model.safetensors")).unwrap();
    let config = shape.join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    assert!(text.contains("float16"));
    std::fs::write(config, text.replace("float16", dtype)).unwrap();
    shape.to_str().unwrap().to_owned()
}

/// What the tensors of a folder are called here, or, those that LLaVA has no use for, by the end of their own name; and their shapes.
fn entries(folder: &Path) -> BTreeMap<String, Vec<usize>> {
    let mut store = Store::new(folder);
    store.add(&folder.join("model.safetensors"), &[Part::Clip, Part::Projector, Part::Llama]).unwrap();
    let name = |e: &Entry| e.canonical.clone().unwrap_or_else(|| e.source[e.source.find("post_").unwrap()..].to_owned());
    store.entries().map(|e| (name(&e), e.shape)).collect()
}

/// Mean and standard deviation of each tensor of a folder.
fn moments(folder: &Path) -> BTreeMap<String, [f64; 2]> {
    let moments = |bytes: Vec<u8>| {
        let values: Vec<f64> = bytes.as_chunks().0.iter().map(|x| f64::from(f32::from_le_bytes(*x))).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        [mean, (values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt()]
    };
    tensors(folder).into_iter().map(|(name, bytes)| (name, moments(bytes))).collect()
}

/// The demo model's file, which transformers wrote, says which tensors there are; the deviations are those that transformers 5.24 gave such a
/// model, measured.
#[test]
fn a_start_has_the_tensors_and_the_spread_of_transformers() {
    let folder = tempfile::tempdir().unwrap();
    let shape = shape(folder.path(), "float32");
    let [first, again, other] = ["first", "again", "other"].map(|name| folder.path().join(name));
    for (to, seed) in [(&first, 7), (&again, 7), (&other, 8)] {
        start::write(Path::new(&shape), Some(seed), to).unwrap();
    }
    assert_eq!(entries(&first), entries(&root().join("models/demo")));
    assert_eq!(tensors(&first), tensors(&again));
    let (first, other) = (moments(&first), moments(&other));
    let is_constant = |name: &str| name.ends_with(".bias") || name.contains("norm");
    for (name, [mean, std]) in &first {
        let end = |ends: &[&str]| ends.iter().any(|end| name.ends_with(&format!("{end}.weight")) || name.ends_with(end));
        let expected = match () {
            () if is_constant(name) => 0.0,
            () if name.contains("language_model") || name.contains("projector") || name.contains("embeddings.p") => 0.02,
            () if end(&["class_embedding", "out_proj"]) => 0.0625,
            () if end(&["fc1"]) => 0.0442,
            () => 0.01976,
        };
        // The class token has 256 numbers, whose deviation is known to a twentieth.
        assert!((std - expected).abs() <= 0.15 * expected, "{name}: {std}, not {expected}");
        let centre = if is_constant(name) && name.ends_with(".weight") { 1.0 } else { 0.0 };
        assert!((mean - centre).abs() <= 0.2 * expected, "{name}: mean {mean}");
        assert_eq!(is_constant(name), first[name] == other[name], "{name}");
    }
    // Rounded, they are the same numbers.
    let halves = tempfile::tempdir().unwrap();
    let half = halves.path().join("half");
    start::write(Path::new(&self::shape(halves.path(), "float16")), Some(7), &half).unwrap();
    let rounded = |bytes: &[u8]| -> Vec<u8> {
        let round = |x: &[u8; 4]| half::f16::from_f32(f32::from_le_bytes(*x)).to_le_bytes();
        bytes.as_chunks().0.iter().flat_map(round).collect()
    };
    let halves = tensors(&half);
    assert!(tensors(&again).iter().all(|(name, bytes)| halves[name] == rounded(bytes)));
    // A deviation that is named is that of decoder and projector, and of the tower's embeddings if it is in its part.
    let config = std::fs::read_to_string(Path::new(&shape).join("config.json")).unwrap();
    let named =
        |part: &str, std: f64| config.replace(&format!("\"{part}\": {{"), &format!("\"{part}\": {{\"initializer_range\": {std},"));
    for (part, names) in [
        ("text_config", ["lm_head", "linear_1.w", "layers.0.mlp.up_p"]),
        ("vision_config", ["embeddings.patch", "embeddings.pos", "embeddings.patch"]),
    ] {
        std::fs::write(Path::new(&shape).join("config.json"), named(part, 0.08)).unwrap();
        let to = folder.path().join(part);
        start::write(Path::new(&shape), Some(7), &to).unwrap();
        let moments = moments(&to);
        let changed = moments.iter().filter(|(name, m)| (m[1] / first[*name][1] - 4.0).abs() < 0.01).map(|(name, _)| name.as_str());
        let changed: Vec<_> = changed.collect();
        assert!(names.iter().all(|name| changed.iter().any(|c| c.contains(name))), "{part}: {changed:?}");
        assert!(changed.iter().all(|name| (part == "text_config") != name.contains("vision_tower")), "{part}: {changed:?}");
        assert_eq!(changed.len(), if part == "text_config" { 2 + 2 + 7 * 4 } else { 2 });
    }
    // No tensor is another's, as far as there are as many numbers.
    let stds: Vec<_> = first.iter().filter(|(name, _)| !is_constant(name)).map(|(_, m)| m[1].to_bits()).collect();
    assert_eq!(stds.iter().collect::<std::collections::BTreeSet<_>>().len(), stds.len());
}

#[test]
fn a_run_begins_from_nothing_and_goes_on() {
    let folder = folder();
    let shape = shape(folder.path(), "float32");
    let flags =
        ["--init", "random", "--tune", "full", "--tune-vision", "full", "--epochs", "6", "--template", "hf", "--max-tokens", "400"];
    let run = |output: &str, more: &[&str]| finetune_of(Path::new(&shape), folder.path(), output, &[&flags, more].concat());
    for output in ["whole", "parts"] {
        let done = run(output, &["--save-steps", "2"]);
        assert!(done.ok, "{}", done.stderr);
    }
    let [whole, parts] = ["whole", "parts"].map(|name| folder.path().join(name));
    assert_eq!(tensors(&whole), tensors(&parts));
    let losses: Vec<f64> = log(&whole).iter().map(|step| step["loss"].as_f64().unwrap()).collect();
    // Nobody knows anything: one of 768 tokens.
    assert!((losses[0] - 768f64.ln()).abs() < 0.3 && losses[5] < losses[0] - 0.3, "{losses:?}");
    // It is killed before it wrote its model, and goes on from a start that it draws again.
    for name in ["config.json", "model.safetensors"] {
        std::fs::remove_file(parts.join(name)).unwrap();
    }
    let done = run("parts", &["--save-steps", "2", "--resume"]);
    assert!(done.ok && done.stderr.contains("going on after step"), "{}", done.stderr);
    assert_eq!(tensors(&whole), tensors(&parts));
    let done = run("parts", &["--save-steps", "2", "--resume", "--seed", "1"]);
    assert!(done.ok && done.stderr.contains("complete"), "{}", done.stderr);
    let info = succeed(&["inspect", "--model", whole.to_str().unwrap()]);
    assert!(info.contains("f32"), "{info}");
    succeed(&["generate", "--model", whole.to_str().unwrap(), "--prompt", "Hm?", "--max-new-tokens", "3"]);
}

#[test]
fn shapes_are_enough_to_plan_by() {
    let folder = folder();
    let shape = shape(folder.path(), "float32");
    let run = |model: &Path, flags: &[&str]| finetune_of(model, folder.path(), "out", flags);
    let all = ["--init", "random", "--tune", "full", "--tune-vision", "full", "--template", "hf"];
    let planned = run(Path::new(&shape), &[&all[..], &["--plan"]].concat());
    assert!(planned.ok && planned.stdout.contains("parameters learn"), "{} {}", planned.stdout, planned.stderr);
    let same = run(&root().join("models/demo"), &[&all[2..], &["--plan"]].concat());
    let learn = |text: &str| text.lines().find(|line| line.contains("parameters learn")).unwrap().to_owned();
    assert_eq!(learn(&planned.stdout), learn(&same.stdout));
    assert!(!folder.path().join("out").exists());

    for (flags, problem) in [
        (&all[2..], "without its weights"),
        (&["--init", "random"][..], "additions of low rank"),
        (&["--init", "zero"][..], "expected `checkpoint` or `random`"),
    ] {
        let done = run(Path::new(&shape), flags);
        assert!(!done.ok && done.stderr.contains(problem), "{flags:?}: {}", done.stderr);
    }
    let done = run(&fixture("checkpoints/orig_gqa_bf16"), &all);
    assert!(!done.ok && done.stderr.contains("described as llava-hf does"), "{}", done.stderr);
    let broken = folder.path().join("broken");
    copy_dir(Path::new(&shape), &broken);
    std::fs::write(broken.join("config.json"), "{").unwrap();
    assert!(run(&broken, &all).stderr.contains("not valid JSON"));
}
