//! What the GPU kernels take: registers, stack and shared memory as ptxas counted them, from the build's own output.

use std::collections::BTreeMap;
use std::path::Path;

/// Kernels that may keep a stack frame or spill, with the reason.
const MAY_SPILL: [(&str, &str); 8] = [
    ("attention_fwd_d64_f32", PLAIN),
    ("attention_fwd_d128_f32", PLAIN),
    ("attention_fwd_d256_f32", PLAIN),
    ("attention_fwd_d256_f16", PLAIN),
    ("attention_fwd_d256_bf16", PLAIN),
    ("attention_bwd_keys_d64_f32", PLAIN),
    ("attention_bwd_keys_d256_f16", PLAIN),
    ("attention_bwd_keys_d256_bf16", PLAIN),
];
/// On some architecture a few words of the outer loop.
const PLAIN: &str = "attention in f32, or of heads wider than 128, is there to be exact: no tensor cores, not tuned";

/// What ptxas says of one kernel on one architecture.
#[derive(Debug, Default)]
struct Usage {
    stack: usize,
    spills: usize,
    registers: usize,
}

/// The number that stands right before `unit`.
fn number_before(line: &str, unit: &str) -> usize {
    let before = line.split(unit).next().unwrap_or_default().trim_end();
    let digits = before.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    digits.parse().unwrap_or_else(|_| panic!("no number before `{unit}` in `{line}`"))
}

/// (kernel, architecture) → usage, from the output of `ptxas -v`.
fn usages(text: &str) -> BTreeMap<(String, String), Usage> {
    let mut all = BTreeMap::new();
    let mut current = None;
    for line in text.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let mut quoted = rest.split('\'');
            let (name, arch) = (quoted.next().unwrap(), quoted.nth(1).unwrap());
            current = Some((name.to_owned(), arch.to_owned()));
        }
        let Some(key) = &current else { continue };
        let usage: &mut Usage = all.entry(key.clone()).or_default();
        if line.contains("bytes stack frame") {
            usage.stack = number_before(line, " bytes stack frame");
            usage.spills = number_before(line, " bytes spill stores") + number_before(line, " bytes spill loads");
        } else if line.contains(" registers") {
            usage.registers = number_before(line, " registers");
        }
    }
    all
}

#[test]
fn no_kernel_spills() {
    let Some(dir) = option_env!("LLAVA_PTXAS_DIR").filter(|_| cfg!(llava_cuda)) else {
        println!("skipped: this build has no GPU kernels (no nvcc)");
        return;
    };
    let mut report = String::from("kernel\tarch\tregisters\tstack\tspills\n");
    let mut n_kernels = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "ptxas") || !source_exists(&path) {
            continue;
        }
        for ((kernel, arch), usage) in usages(&std::fs::read_to_string(&path).unwrap()) {
            let Usage { stack, spills, registers } = usage;
            report += &format!("{kernel}\t{arch}\t{registers}\t{stack}\t{spills}\n");
            n_kernels += 1;
            let excused = MAY_SPILL.iter().any(|(name, _)| *name == kernel);
            assert!(excused || stack + spills == 0, "{kernel} on {arch}: {stack} bytes of stack, {spills} of spills");
            assert!(registers > 0, "{kernel} on {arch}: its registers were not found");
        }
    }
    assert!(n_kernels > 10, "only {n_kernels} kernels were found in {dir}");
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels.tsv");
    std::fs::write(&file, report).unwrap();
    println!("{n_kernels} kernels: {}", file.display());
}

/// Whether the kernel file is still there: an output folder keeps what was compiled before.
fn source_exists(output: &Path) -> bool {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels").join(output.file_stem().unwrap());
    source.with_extension("cu").exists()
}
