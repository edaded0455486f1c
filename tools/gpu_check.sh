#!/usr/bin/env bash
# Everything that a GPU can tell about a build: one command, for a machine with an NVIDIA driver. It needs no Rust and no network; what it
# runs was built elsewhere by tools/gpu_bundle.sh and carried here with the working tree.
#
#     tools/gpu_check.sh BIN_DIR [OUT_DIR]
#
# Runs the op cases, the stage fixtures and the demo model on the GPU, the op cases under compute-sanitizer's four tools where it is
# installed, and `bench`. OUT_DIR (docs/results) gets a log of each part and `<gpu>-<date>.json`. A part that fails is reported and the
# rest goes on; exit 1 if any did.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=$(realpath "${1:?usage: tools/gpu_check.sh BIN_DIR [OUT_DIR]}")
out=${2:-docs/results}
mkdir -p "$out"
failed=()

part() { # NAME COMMAND...: runs it into a log of its own
  local name=$1 start=$SECONDS
  shift
  if "$@" >"$out/$name.log" 2>&1; then
    printf '%-28s ok      %4d s\n' "$name" $((SECONDS - start))
  else
    printf '%-28s FAILED  %4d s: %s\n' "$name" $((SECONDS - start)) "$out/$name.log"
    tail -n 5 "$out/$name.log" | sed 's/^/    /'
    failed+=("$name")
  fi
}

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' /' '--')
[ -n "$gpu" ] || { echo "no NVIDIA driver here"; exit 1; }
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem --format=csv
"$bin/llava-engine" info

export LLAVA_TEST_DEVICE=cuda CARGO_MANIFEST_DIR=$PWD
for test in ops ops_linear ops_attention stages demo; do
  part "$test" "$bin/$test"
done

if sanitizer=$(command -v compute-sanitizer); then
  for tool in memcheck racecheck initcheck synccheck; do
    for test in ops ops_linear ops_attention; do
      part "$tool-$test" "$sanitizer" --tool "$tool" --error-exitcode 9 "$bin/$test"
    done
  done
else
  echo "compute-sanitizer is not installed: its part is left out"
fi

part bench "$bin/llava-engine" bench --shape llava-1.5-7b --weights bf16 --device cuda --json
[ -s "$out/bench.log" ] && cp "$out/bench.log" "$out/$gpu-$(date -u +%Y-%m-%d).json"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
