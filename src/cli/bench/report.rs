//! What was measured, as a table for people or as one JSON document.

use llava_engine::device::Device;
use llava_engine::error::Result;
use serde_json::{Value, json};

use super::measure::{Phase, sorted};
use super::{About, Args};
use crate::cli::common;

/// Prints it.
pub fn report(args: &Args, device: Device, about: &About, phases: &[Phase]) -> Result<()> {
    if args.json { common::put_json(&document(args, device, about, phases)) } else { common::put(&table(device, about, phases)) }
}

fn document(args: &Args, device: Device, about: &About, phases: &[Phase]) -> Value {
    let (peaks, first_token) = (best_peaks(phases), first_token_ms(phases));
    json!({
        "machine": {
            "device": about.device,
            "simulated": device == Device::Sim,
            "threads": args.threads,
            "read_gbps": peaks.as_ref().map(|p| p.read_gbps),
            "peaks": peaks.as_ref().map(common::peaks_json),
        },
        "model": {
            "name": about.name, "weights": about.weights, "hidden_size": about.hidden_size, "n_layers": about.n_layers,
            "load_ms": about.load_ms,
        },
        "training": args.train,
        "rows": phases.iter().map(|phase| row(about, phase)).collect::<Vec<_>>(),
        "time_to_first_token": first_token.first().map(|min| json!({
            "ms_median": median(&first_token), "ms_min": min, "ms_max": first_token.last(),
        })),
        "peak_memory_bytes": common::memory("VmHWM"),
    })
}

fn row(about: &About, phase: &Phase) -> Value {
    let ms = phase.sorted_ms();
    let (median, work) = (median(&ms), phase.runs[0].work);
    json!({
        "phase": phase.name, "batch_size": phase.batch_size, "tokens": phase.tokens, "context": phase.context,
        "ms_median": median, "ms_min": ms[0], "ms_max": ms[ms.len() - 1],
        "tokens_per_second": phase.tokens as f64 / median * 1e3,
        "gbps": work.bytes / median / 1e6, "tflops": work.flops / median / 1e9,
        "stored_bytes": work.stored_bytes, "flops": work.flops, "packed_flops": work.packed_flops,
        "limit_ms": phase.limit_ms(about.stored), "percent_of_limit": phase.percent_of_limit(about.stored),
    })
}

fn table(device: Device, about: &About, phases: &[Phase]) -> String {
    let About { name, device: device_name, weights, n_layers, .. } = about;
    let mut out = format!("{name}, {weights}, {n_layers} layers, on {device_name}\n");
    if device == Device::Sim {
        out += "simulated: times and shares say nothing about a GPU\n";
    }
    out += "\n| phase | sequences | tokens | context | ms, median (range) | tokens/s | GB/s | TFLOP/s | % of limit |\n";
    out += "|---|---|---|---|---|---|---|---|---|\n";
    for phase in phases {
        let (row, ms) = (row(about, phase), phase.sorted_ms());
        let number = |key: &str| row[key].as_f64().unwrap_or_default();
        let percent = phase.percent_of_limit(about.stored).map_or("unknown".into(), |p| format!("{p:.1}"));
        out += &format!(
            "| {} | {} | {} | {} | {:.1} ({:.1} to {:.1}) | {:.2} | {:.1} | {:.3} | {percent} |\n",
            phase.name,
            phase.batch_size,
            phase.tokens,
            phase.context,
            number("ms_median"),
            ms[0],
            ms[ms.len() - 1],
            number("tokens_per_second"),
            number("gbps"),
            number("tflops"),
        );
    }
    let first_token = first_token_ms(phases);
    if !first_token.is_empty() {
        out += &format!("\ntime to first token (encode and prefill): {:.1} ms", median(&first_token));
    }
    out += &best_peaks(phases).map_or(String::new(), |peaks| format!("\nmeasured peaks: {}", common::peaks_text(&peaks)));
    out += &common::memory("VmHWM").map_or(String::new(), |bytes| format!("\npeak memory: {:.2} GB", bytes as f64 / 1e9));
    out + "\n"
}

/// The middle of sorted values, of which there is at least one.
fn median(sorted: &[f64]) -> f64 {
    sorted[sorted.len() / 2]
}

/// From pixels to the first token: encoding and reading the prompt, of each run, sorted.
fn first_token_ms(phases: &[Phase]) -> Vec<f64> {
    let runs = |name| phases.iter().filter(move |p| p.name == name).flat_map(|p| &p.runs);
    sorted(runs("encode").zip(runs("prefill")).map(|(encode, prefill)| encode.ms + prefill.ms))
}

/// Other programs only ever make a machine slower: the best of the probes is what it can do.
fn best_peaks(phases: &[Phase]) -> Option<llava_engine::ops::Peaks> {
    phases.iter().flat_map(|p| &p.runs).map(|r| r.peaks.clone()).reduce(|a, b| a.zip_with(&b, f64::max))
}
