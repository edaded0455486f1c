#!/usr/bin/env bash
# Everything that a GPU can tell about a build: one command, for a machine with an NVIDIA driver. It needs no Rust and no network; what it
# runs was built elsewhere and carried here (docs/GPU.md says how).
#
#     tools/gpu_check.sh BIN_DIR [OUT_DIR]
#
# BIN_DIR holds `llava-engine` and the test executables ops, ops_linear, ops_attention, stages and demo, as `tools/gpu_bundle.sh` lays them
# out. OUT_DIR gets logs, `<gpu>-<date>.json` and `<gpu>-<date>.md`. A part that fails is reported and the rest goes on; exit 1 if any did.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=${1:?usage: tools/gpu_check.sh BIN_DIR [OUT_DIR]}
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

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' /' '--') || { echo "no NVIDIA driver here"; exit 1; }
stamp=$(date -u +%Y-%m-%d)
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem --format=csv >"$out/gpu.csv"
"$bin/llava-engine" info || failed+=(info)

# Correctness: the case tables of the simulator, on the GPU.
export LLAVA_TEST_DEVICE=cuda
for test in ops ops_linear ops_attention stages demo; do
  part "$test" "$bin/$test"
done

# The same kernels under the sanitizer's four tools.
if sanitizer=$(command -v compute-sanitizer); then
  for tool in memcheck racecheck initcheck synccheck; do
    for test in ops ops_linear ops_attention; do
      part "$tool-$test" "$sanitizer" --tool "$tool" --error-exitcode 9 "$bin/$test"
    done
  done
else
  echo "compute-sanitizer is not installed: its part is left out"
fi

python3 tools/gpu_figures.py --engine "$bin/llava-engine" --json "$out/$gpu-$stamp.json" --table "$out/$gpu-$stamp.md" || failed+=(figures)
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
