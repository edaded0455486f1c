//! `bench`: that its document has what scripts rely on, and that its figures hang together.

mod support;

use std::process::Command;

use support::fixture;

#[test]
fn the_document_is_as_the_contract_says() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_llava-engine"));
    command.env_clear().env("HOME", "/nowhere").env("HF_HUB_OFFLINE", "1");
    command.args([
        "bench",
        "--json",
        "--prompt-tokens",
        "40",
        "--new-tokens",
        "5",
        "--repeat",
        "3",
        "--threads",
        "1",
        "--device",
        "cpu",
    ]);
    let output = command.arg("--model").arg(fixture("checkpoints/hf_mha_f32")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let peaks = &document["machine"];
    assert!(peaks["read_gbps"].as_f64().unwrap() > 0.1 && peaks["peaks"]["f32_gflops"].as_f64().unwrap() > 0.1);
    assert!(cfg!(not(target_os = "linux")) || document["peak_memory_bytes"].as_u64().unwrap() > 1 << 20);
    let rows = document["rows"].as_array().unwrap();
    let of = |key: &str| rows.iter().map(|r| r[key].clone()).collect::<Vec<_>>();
    assert_eq!(of("phase"), ["encode", "prefill", "decode"]);
    assert_eq!(of("context"), [0, 40, 44]);
    assert_eq!((of("tokens")[1].clone(), of("tokens")[2].clone()), (40.into(), 4.into()));
    for row in rows {
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key} in {row}"));
        assert!(number("ms_min") <= number("ms_median") && number("ms_median") <= number("ms_max"));
        assert!((number("tokens_per_second") * number("ms_median") / 1e3 / number("tokens") - 1.0).abs() < 1e-6);
        assert!(number("gbps") > 0.0 && number("tflops") > 0.0);
        assert!((0.0..110.0).contains(&number("percent_of_limit")), "{row}");
    }
}

#[test]
fn shapes_and_sizes_that_make_no_sense_are_refused() {
    for (flags, part) in [
        (&["--shape", "llava-9-900b"][..], "llava-1.5-7b"),
        (&["--new-tokens", "1"], "at least 2"),
        (&["--weights", "int3"], "int3"),
        (&["--repeat", "0"], "at least 1"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_llava-engine")).arg("bench").args(flags).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && stderr.contains(part), "{flags:?}: {stderr}");
    }
}
