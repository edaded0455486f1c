//! Compiles `kernels/`: with nvcc for GPUs, with the host's C++ compiler for the simulator.
//!
//! | variable | means |
//! |---|---|
//! | `LLAVA_CUDA` | `required`: no nvcc is an error; `off`: no GPU kernels; else they are built where nvcc is found |
//! | `NVCC`, `CUDA_HOME` | where nvcc is; else it is looked for in `PATH` and in `.cuda-venv` (tools/install-cuda-toolchain.sh) |
//! | `LLAVA_CUDA_ARCHS` | what to compile for, `80,90a` by default; PTX of the last one's base is always added |
//! | `LLAVA_SIM` | `off`: no simulator; else it is built where a C++17 compiler is found |
//! | `LLAVA_COVERAGE` | `1`: the simulator's kernels count which of their lines run, for gcov (tools/coverage.sh) |
//!
//! The build never asks what GPU the machine has, and needs none.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

fn main() {
    for cfg in ["llava_cuda", "llava_sim"] {
        println!("cargo:rustc-check-cfg=cfg({cfg})");
    }
    for name in ["LLAVA_CUDA", "NVCC", "CUDA_HOME", "LLAVA_CUDA_ARCHS", "LLAVA_SIM", "LLAVA_COVERAGE"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    let kernels = kernel_files();
    build_simulator(&kernels);
    build_fatbins(&kernels);
}

/// `kernels/*.cu`, in order.
fn kernel_files() -> Vec<PathBuf> {
    let entries = fs::read_dir("kernels").expect("the folder kernels");
    let mut files: Vec<_> = entries.map(|e| e.expect("an entry of kernels").path()).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "cu"));
    files.sort();
    files
}

fn out_dir() -> PathBuf {
    PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"))
}

fn stem(file: &Path) -> &str {
    file.file_stem().and_then(|s| s.to_str()).expect("a kernel file has a name")
}

// ---------------------------------------------------------------- simulator

fn build_simulator(kernels: &[PathBuf]) {
    if env::var("LLAVA_SIM").is_ok_and(|v| v == "off") || env::var("CARGO_CFG_UNIX").is_err() {
        return;
    }
    let base = || {
        let mut build = cc::Build::new();
        build.cpp(true).std("c++17").opt_level(2).debug(false).include("kernels").define("LLAVA_SIM", None).warnings(true);
        build.flag("-fno-exceptions").flag("-fno-strict-aliasing").flag("-ffp-contract=off").cargo_metadata(false);
        build
    };
    let coverage = env::var("LLAVA_COVERAGE").is_ok_and(|v| v == "1");
    // The runtime must not be instrumented, the kernels must be.
    let runtime = base().file("kernels/sim/sim.cpp").try_compile("llava_sim");
    let compiled = runtime.and_then(|()| {
        let mut build = base();
        build.flag("-fsanitize=thread").flag("-Wno-unknown-pragmas").flag("-Wno-unused-function").flag("-x").flag("c++");
        if coverage {
            // Unoptimized, so that no line disappears. Atomic counters are the ones that the simulator's hooks do not see.
            build.opt_level(0).flag("--coverage").flag("-fprofile-update=atomic");
        }
        // With kernels that only its own tests run.
        build.files(kernels).file("kernels/sim/faults.cu").try_compile("llava_sim_kernels")
    });
    match compiled {
        Ok(()) => {
            println!("cargo:rustc-link-search=native={}", out_dir().display());
            // Whole: kernels register themselves and nobody names them.
            println!("cargo:rustc-link-lib=static:+whole-archive=llava_sim_kernels");
            println!("cargo:rustc-link-lib=static=llava_sim");
            if coverage {
                println!("cargo:rustc-link-lib=gcov");
            }
            println!(
                "cargo:rustc-link-lib={}",
                if env::var("CARGO_CFG_TARGET_VENDOR").is_ok_and(|v| v == "apple") { "c++" } else { "stdc++" }
            );
            println!("cargo:rustc-cfg=llava_sim");
        }
        Err(error) => println!("cargo:warning=built without the kernel simulator (`--device sim`): {error}"),
    }
}

// ---------------------------------------------------------------- GPU

fn build_fatbins(kernels: &[PathBuf]) {
    let wish = env::var("LLAVA_CUDA").unwrap_or_default();
    let nvcc = if wish == "off" { None } else { find_nvcc() };
    let table = out_dir().join("fatbins.rs");
    let Some(nvcc) = nvcc else {
        assert!(wish != "required", "LLAVA_CUDA=required, but no nvcc was found: set NVCC or run tools/install-cuda-toolchain.sh");
        if wish != "off" {
            println!("cargo:warning=built without GPU kernels: no nvcc (set NVCC or run tools/install-cuda-toolchain.sh)");
        }
        fs::write(table, "static FATBINS: &[(&str, &[u8])] = &[];\n").expect("OUT_DIR is writable");
        return;
    };
    let archs = env::var("LLAVA_CUDA_ARCHS").unwrap_or_else(|_| "80,90a".into());
    let mut next = kernels.iter();
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    // As many at once as cargo was given jobs.
    loop {
        let batch: Vec<_> = next.by_ref().take(jobs).collect();
        if batch.is_empty() {
            break;
        }
        let running: Vec<_> = batch.iter().map(|file| (file, nvcc_command(&nvcc, &archs, file).spawn())).collect();
        for (file, child) in running {
            let output = child.and_then(|c| c.wait_with_output()).unwrap_or_else(|e| panic!("{}: {e}", nvcc.display()));
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said);
            assert!(output.status.success(), "{} did not compile {}:\n{said}", nvcc.display(), file.display());
            // Registers, stack and shared memory of each kernel: tests/kernels.rs reads them.
            fs::write(out_dir().join(format!("{}.ptxas", stem(file))), &*said).expect("OUT_DIR is writable");
        }
    }
    let rows: String = kernels
        .iter()
        .map(|f| format!("    ({0:?}, include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{0}.fatbin\"))),\n", stem(f)))
        .collect();
    fs::write(table, format!("static FATBINS: &[(&str, &[u8])] = &[\n{rows}];\n")).expect("OUT_DIR is writable");
    println!("cargo:rustc-env=LLAVA_CUDA_ARCHS={archs}");
    println!("cargo:rustc-env=LLAVA_PTXAS_DIR={}", out_dir().display());
    println!("cargo:rustc-cfg=llava_cuda");
}

fn nvcc_command(nvcc: &Path, archs: &str, file: &Path) -> Command {
    let mut command = Command::new(nvcc);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.args([
        "-Xptxas",
        "-v",
        "-std=c++17",
        "-O3",
        "-Werror",
        "all-warnings",
        "-diag-suppress",
        "177",
        "--fatbin",
        "-Xfatbin=-compress-all",
        "-Ikernels",
        "-lineinfo",
    ]);
    for arch in archs.split(',') {
        command.arg("-gencode").arg(format!("arch=compute_{arch},code=sm_{arch}"));
    }
    if let Some(last) = archs.split(',').next_back() {
        let base = last.trim_end_matches(|c: char| c.is_alphabetic());
        command.arg("-gencode").arg(format!("arch=compute_{base},code=compute_{base}"));
    }
    command.arg("-o").arg(out_dir().join(format!("{}.fatbin", stem(file)))).arg(file);
    command
}

fn find_nvcc() -> Option<PathBuf> {
    if let Some(named) = env::var_os("NVCC") {
        return Some(named.into());
    }
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = home.into_iter().chain(env::split_paths(&path)).chain(pip_folders());
    folders.map(|dir| dir.join("nvcc")).find(|nvcc| nvcc.is_file())
}

/// Where the packages of tools/cuda-toolchain.txt put nvcc.
fn pip_folders() -> Vec<PathBuf> {
    let lib = Path::new(".cuda-venv/lib");
    let pythons = fs::read_dir(lib).into_iter().flatten().flatten();
    pythons.map(|python| python.path().join("site-packages/nvidia/cu13/bin")).collect()
}
