//! `finetune` with low-rank additions: from rows to an adapter that answers, over a base that stays as it is.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::Value;
use support::finetune::{finetune, finetune_of, folder, log};
use support::fixture;
use support::program::{quantize, succeed};

/// The tensors of an adapter, by name.
fn factors(folder: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let bytes = fs::read(folder.join("adapter_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let of = |view: &safetensors::tensor::TensorView| (view.shape().to_vec(), bytemuck::pod_collect_to_vec(view.data()));
    file.tensors().iter().map(|(name, view)| (name.clone(), of(view))).collect()
}

fn answer(model: &Path, lora: Option<&Path>, prompt: &str) -> String {
    let (model, image) = (model.to_str().unwrap(), fixture("images/square.png"));
    let mut args = vec!["generate", "--model", model, "--image", image.to_str().unwrap(), "--prompt", prompt];
    args.extend(["--temperature", "0", "--template", "v1", "--dtype", "f32", "--max-new-tokens", "40"]);
    args.extend(lora.iter().flat_map(|lora| ["--lora", lora.to_str().unwrap()]));
    succeed(&args).trim().to_owned()
}

const LORA: [&str; 6] = ["--tune", "lora", "--lora-r", "8", "--lora-alpha", "16"];

#[test]
fn an_adapter_learns_its_rows_and_answers_over_its_base() {
    for (base, tower) in [("hf_gqa_bf16", "off"), ("hf_gqa_bf16", "lora"), ("hf_gqa_bf16", "full"), ("orig_mha_f32", "lora")] {
        let folder = folder();
        let model = fixture("checkpoints").join(base);
        let flags = [&LORA[..], &["--tune-vision", tower, "--epochs", "60", "--lr", "1e-2"]].concat();
        let done = finetune_of(&model, folder.path(), "out", &flags);
        assert!(done.ok, "{base}, {tower}: {}", done.stderr);
        let out = folder.path().join("out");
        let steps = log(&out);
        let loss = |i: usize| steps[i]["loss"].as_f64().unwrap();
        assert!(loss(steps.len() - 1) < 0.2 * loss(0), "{base}, {tower}: {} to {}", loss(0), loss(steps.len() - 1));
        assert!(steps[10]["lr"].as_f64().unwrap() > 5e-3, "{}", steps[10]);
        let expected = "It has four sides.";
        assert_ne!(answer(&model, None, "Describe it."), expected);
        assert_eq!(answer(&model, Some(&out), "Describe it."), expected, "{base}, {tower}");

        // An original LLaVA's loader asks for its configuration beside the adapter.
        let configuration = |folder: &Path| fs::read(folder.join("config.json")).ok();
        assert_eq!(configuration(&out), configuration(&model).filter(|_| base.starts_with("orig")));

        let merged = folder.path().join("merged");
        let [model, out, merged_dir] = [&model, &out, &merged].map(|path| path.to_str().unwrap());
        succeed(&["merge", "--model", model, "--lora", out, "--output", merged_dir]);
        assert_eq!(answer(&merged, None, "Describe it."), expected, "{base}, {tower}: merged");
    }
}

/// Names, ranks and settings are those of the field; what is not asked for is not there.
#[test]
fn adapters_are_written_as_peft_has_them() {
    let folder = folder();
    let done = finetune(
        folder.path(),
        "out",
        &[&LORA[..], &["--lora-targets", "q_proj,down_proj", "--max-steps", "2", "--epochs", "9"]].concat(),
    );
    assert!(done.ok, "{}", done.stderr);
    let out = folder.path().join("out");
    let names: Vec<_> = factors(&out).into_iter().map(|(name, (shape, _))| (name, shape)).collect();
    let mut expected = Vec::new();
    for layer in 0..3 {
        for (module, n, k) in [("mlp.down_proj", 48, 48), ("self_attn.q_proj", 48, 48)] {
            let name = format!("base_model.model.model.language_model.layers.{layer}.{module}");
            expected.push((format!("{name}.lora_A.weight"), vec![8, k]));
            expected.push((format!("{name}.lora_B.weight"), vec![n, 8]));
        }
    }
    for (layer, k) in [("linear_1", 32), ("linear_2", 48)] {
        expected.push((format!("base_model.model.model.multi_modal_projector.{layer}.bias"), vec![48]));
        expected.push((format!("base_model.model.model.multi_modal_projector.{layer}.weight"), vec![48, k]));
    }
    assert_eq!(names, expected);
    let config: Value = serde_json::from_slice(&fs::read(out.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!((&config["r"], &config["lora_alpha"], &config["peft_type"]), (&8.into(), &16.0.into(), &"LORA".into()));
    assert_eq!(config["target_modules"], r".*language_model\..*\.(q_proj|down_proj)");
    assert!(!out.join("config.json").exists());
}

/// Neither threads nor layers that are run again change a bit of what dropout and beginnings make; another seed does.
#[test]
fn runs_are_the_same() {
    let folder = folder();
    let result = |name: &str, flags: &[&str]| {
        let common = ["--tune-vision", "lora", "--max-steps", "3", "--epochs", "9", "--lora-dropout", "0.2"];
        let done = finetune(folder.path(), name, &[&LORA[..], &common, flags].concat());
        assert!(done.ok, "{}", done.stderr);
        factors(&folder.path().join(name))
    };
    let expected = result("a", &["--threads", "2"]);
    assert!(result("b", &["--threads", "1"]) == expected);
    assert!(result("c", &["--recompute", "selective"]) == expected);
    assert!(result("d", &["--lora-dropout", "0"]) != expected);
    let other = result("e", &["--seed", "43"]);
    let a = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight";
    assert!(other[a] != expected[a]);
}

/// A begins between ±1/√k, all over it, and B at zero, so that the first loss is the base's.
#[test]
fn additions_begin_with_nothing() {
    let folder = folder();
    let first = |name: &str, flags: &[&str]| {
        let done = finetune(folder.path(), name, &[flags, &["--max-steps", "1", "--epochs", "9", "--lr", "1e-30"]].concat());
        assert!(done.ok, "{}", done.stderr);
        log(&folder.path().join(name))[0]["loss"].as_f64().unwrap()
    };
    let lora = ["--tune", "lora", "--lora-r", "64", "--tune-vision", "lora"];
    let of_another_seed = {
        first("seed", &[&lora[..], &["--seed", "43"]].concat());
        factors(&folder.path().join("seed"))
    };
    let lora = first("lora", &lora);
    let base = first("base", &["--tune", "projector"]);
    assert!((lora - base).abs() < 1e-6 * base, "{lora} is not {base}");
    let mut seen = BTreeSet::new();
    for (name, (shape, values)) in factors(&folder.path().join("lora")) {
        let Some(factor) = name.split("lora_").nth(1) else { continue };
        let max = values.iter().fold(0f32, |max, v| max.max(v.abs()));
        let bound = 1.0 / (shape[1] as f32).sqrt();
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let std = (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt();
        match factor {
            "A.weight" => {
                assert!(max <= bound && max > 0.97 * bound, "{name}: {max} of {bound}");
                assert!(
                    values != of_another_seed[&name].1 && seen.insert(bytemuck::cast_slice::<f32, u8>(&values).to_vec()),
                    "{name}"
                );
                assert!(mean.abs() < 0.06 * bound && (std * 3f32.sqrt() / bound - 1.0).abs() < 0.06, "{name}: {mean}, {std}");
            }
            _ => assert_eq!(max, 0.0, "{name}"),
        }
    }
}

/// Over integers: the base stays packed, the projector, which was packed too, learns whole.
#[test]
fn packed_bases_take_additions() {
    let folder = folder();
    let base = folder.path().join("base");
    quantize(&fixture("checkpoints/hf_mha_f32"), &base, &["--bits", "4", "--group-size", "32", "--no-evaluation"]);
    let before = fs::read(base.join("model.safetensors")).unwrap();
    for dtype in ["f32", "bf16"] {
        let flags = [&LORA[..], &["--base-bits", "4", "--epochs", "60", "--lr", "1e-2", "--dtype", dtype]].concat();
        let done = finetune_of(&base, folder.path(), dtype, &flags);
        assert!(done.ok, "{}", done.stderr);
        assert!(fs::read(base.join("model.safetensors")).unwrap() == before);
        assert_eq!(answer(&base, Some(&folder.path().join(dtype)), "Describe it."), "It has four sides.", "{dtype}");
    }

    // Whole parts learn in no packed checkpoint, which could not be written again.
    let done = finetune_of(&base, folder.path(), "whole", &["--tune", "projector"]);
    assert!(!done.ok && done.stderr.contains("packed already") && !folder.path().join("whole").exists(), "{}", done.stderr);
    let done = finetune_of(&base, folder.path(), "eight", &[&LORA[..], &["--base-bits", "8"]].concat());
    assert!(!done.ok && done.stderr.contains("base_bits is 8") && done.stderr.contains("--bits 8"), "{}", done.stderr);
}
