//! The C interface: its header is up to date, C programs compile against it, link with the shared and the static library, and run,
//! under valgrind where that is installed.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use support::fixture;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where cargo put the libraries: beside the test programs.
fn libraries() -> PathBuf {
    std::env::current_exe().unwrap().parent().unwrap().to_owned()
}

#[test]
fn the_header_is_what_cbindgen_makes() {
    let config = cbindgen::Config::from_file(root().join("cbindgen.toml")).unwrap();
    let bindings = cbindgen::Builder::new().with_src(root().join("src/capi.rs")).with_config(config).generate().unwrap();
    let mut made = Vec::new();
    bindings.write(&mut made);
    let path = root().join("include/llava_engine.h");
    if std::env::var_os("LLAVA_UPDATE_HEADER").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let kept = std::fs::read(&path).unwrap_or_default();
    assert!(kept == made, "include/llava_engine.h is out of date: run this test with LLAVA_UPDATE_HEADER=1 and look at the change");
}

/// Compiles a C program against the header and one of the libraries.
fn compile(source: &str, out: &Path, link: &[&str]) {
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let output = Command::new(compiler)
        .args(["-std=c11", "-D_POSIX_C_SOURCE=200809L", "-Wall", "-Wextra", "-Werror", "-O1", "-g"])
        .arg(format!("-I{}", root().join("include").display()))
        .arg(root().join(source))
        .args(link)
        .args(["-lpthread", "-ldl", "-lm", "-o"])
        .arg(out)
        .output()
        .expect("a C compiler is needed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn shared() -> Vec<String> {
    let dir = libraries();
    assert!(dir.join("libllava_engine.so").exists(), "no shared library in {}", dir.display());
    vec![format!("-L{}", dir.display()), "-lllava_engine".into(), format!("-Wl,-rpath,{}", dir.display())]
}

fn run(mut command: Command) -> String {
    let output = command.output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}\n{out}\n{err}");
    out.into_owned()
}

#[test]
fn a_c_program_runs_against_the_shared_library() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("capi");
    compile("tests/capi.c", &program, &shared().iter().map(String::as_str).collect::<Vec<_>>());
    let mut command = Command::new(program);
    command.arg(fixture("checkpoints/hf_mha_f32")).arg(fixture("images/odd.png"));
    assert!(run(command).contains("all checks passed"));
}

#[test]
fn a_c_program_runs_against_the_static_library() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("capi");
    let archive = libraries().join("libllava_engine.a");
    assert!(archive.exists(), "no static library at {}", archive.display());
    // As the header says.
    compile("tests/capi.c", &program, &[archive.to_str().unwrap(), "-lstdc++"]);
    let mut command = Command::new(program);
    command.arg(fixture("checkpoints/hf_gqa_bf16")).arg(fixture("images/square.png"));
    assert!(run(command).contains("all checks passed"));
}

#[test]
fn the_example_program_describes_the_scene() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("describe");
    compile("examples/describe.c", &program, &shared().iter().map(String::as_str).collect::<Vec<_>>());
    let mut command = Command::new(program);
    command.arg(root().join("models/demo")).arg(root().join("examples/scene.png")).arg("What is in this picture?");
    let expected = std::fs::read_to_string(root().join("examples/scene.txt")).unwrap();
    assert_eq!(run(command).trim(), expected.trim());
}

#[test]
fn valgrind_finds_nothing() {
    if Command::new("valgrind").arg("--version").output().is_err() {
        println!("skipped: valgrind is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("capi");
    compile("tests/capi.c", &program, &shared().iter().map(String::as_str).collect::<Vec<_>>());
    let mut command = Command::new("valgrind");
    command.args(["--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=definite", "-q"]).arg(program);
    command.arg(fixture("checkpoints/hf_mha_f32")).arg(fixture("images/odd.png"));
    assert!(run(command).contains("all checks passed"));
}
