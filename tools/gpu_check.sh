#!/usr/bin/env bash
# Everything that a GPU can tell about a build, for a machine with an NVIDIA driver. It needs no Rust and no network; what it runs was built
# elsewhere by tools/gpu_bundle.sh and carried here with the working tree.
#
#     tools/gpu_check.sh BIN_DIR [PART...]        # OUT_DIR (docs/results) in the environment is where results go
#
#     tests          op cases, stage fixtures, batches and the demo model on the GPU
#     sanitize       the op cases under compute-sanitizer, where it is installed; or one tool: memcheck, racecheck, initcheck, synccheck
#     bench          LLaVA-1.5-7B's shape in bf16: encode, prefill of 640, decode to context 704 of 1 and 8 sequences
#     transformers   the same work by Hugging Face transformers, eager and compiled to CUDA graphs; needs python3 with torch
#     autotune       and compiled with max-autotune
#     train          training steps of the same shape, 16,896 tokens: the projector, and LoRA; the op cases of the way back come first
#     peft           the same by transformers with PEFT
#     table          joins what there is into OUT_DIR/<gpu>-<date>.json and .md; also made after bench, train, and what runs peers
#
# All of them if none is named. A part takes at most PART_SECONDS (480), so that each can be a command of its own where commands are cut off;
# what has no time left is reported. What fails is reported too and the rest goes on; exit 1 if anything did.
# LLAVA_TEST_DEVICE=sim tries the script out: the simulator, a tiny model, transformers on the CPU.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=$(realpath "${1:?usage: tools/gpu_check.sh BIN_DIR [tests|sanitize|bench|transformers|autotune|train|peft|table ...]}")
shift
[ $# -gt 0 ] || set -- tests sanitize bench transformers autotune train peft
out=${OUT_DIR:-docs/results}
python=${PYTHON:-python3}
mkdir -p "$out"
failed=()
export LLAVA_TEST_DEVICE=${LLAVA_TEST_DEVICE:-cuda} CARGO_MANIFEST_DIR=$PWD

# run NAME SECONDS COMMAND...: a log of its own, for as long as it may take and as the part has left. Standard output goes to $to if set.
run() {
  local name=$1 start=$SECONDS left=$((part_end - SECONDS)) status
  local seconds=$(($2 < left ? $2 : left))
  shift 2
  if [ "$seconds" -lt 1 ]; then
    printf '%-28s NOT RUN: no time left\n' "$name"
    failed+=("$name")
    return
  fi
  timeout --kill-after=10 "$seconds" "$@" >"${to:-$out/$name.log}" 2>"$out/$name.err"
  status=$?
  cat "$out/$name.err" >>"$out/$name.log" && rm "$out/$name.err"
  if [ $status -eq 0 ]; then
    printf '%-28s ok      %4d s\n' "$name" $((SECONDS - start))
    return
  fi
  [ $status -ne 124 ] || echo "stopped after $seconds s" >>"$out/$name.log"
  printf '%-28s FAILED  %4d s: %s\n' "$name" $((SECONDS - start)) "$out/$name.log"
  tail -n 5 "$out/$name.log" | sed 's/^/    /'
  failed+=("$name")
}

sanitize() { # TOOL...
  local tool test sanitizer
  if ! sanitizer=$(command -v compute-sanitizer); then
    echo "compute-sanitizer is not installed: its part is left out"
    return
  fi
  for tool in "$@"; do
    for test in ops ops_linear ops_attention ops_sample ops_image; do
      run "$tool-$test" 480 "$sanitizer" --tool "$tool" --error-exitcode 9 "$bin/$test"
    done
  done
}

bench() {
  to=$out/bench.json run bench 480 "$bin/llava-engine" bench "${our_model[@]}" --repeat 5 --device "$LLAVA_TEST_DEVICE" --json
  [ -s "$out/bench.json" ] || rm -f "$out/bench.json"
}

transformers() { # MODE SECONDS PART_LIMIT [--train]
  local name=transformers-$1${4:+-train}
  rm -f "$out/$name.json"
  run "$name" "$2" "$python" tools/gpu_transformers.py "${peer_model[@]}" --mode "$1" --limit "$3" ${4:-} --output "$out/$name.json"
}

train() {
  local tune recompute name
  for tune in projector lora; do
    for recompute in selective full; do
      name=train-$tune-$recompute
      to=$out/$name.json run "$name" 100 "$bin/llava-engine" bench "${our_training[@]}" --train "tune=$tune" --train "recompute=$recompute" \
        --repeat 5 --device "$LLAVA_TEST_DEVICE" --json
      [ -s "$out/$name.json" ] || rm -f "$out/$name.json"
    done
  done
}

table() {
  local peers=("$out"/transformers-*.json)
  [ -e "${peers[0]}" ] || peers=()
  [ -e "$out/bench.json" ] || { echo "no table: bench has not run"; return; }
  local trainings=("$out"/train-*.json)
  [ -e "${trainings[0]}" ] || trainings=()
  to=$out/table.md run table 30 "$python" tools/gpu_table.py --ours "$out/bench.json" --training "${trainings[@]}" --peers "${peers[@]}" \
    --gpu "$gpu" --date "$(date -u +%Y-%m-%d)" --output-dir "$out"
  cat "$out/table.md"
  rm -f "$out/table.md"
}

# torch brings cuBLASLt along; where the system has none, that one is made known.
use_torch_cublaslt() {
  ldconfig -p 2>/dev/null | grep 'libcublasLt\.so ' >/dev/null && return
  local found
  found=$("$python" -c 'import glob, sys
print(next((f for p in sys.path for f in sorted(glob.glob(p + "/nvidia/**/libcublasLt.so.*", recursive=True))), ""))')
  [ -n "$found" ] || { echo "no cuBLASLt here: our own GEMM makes every product"; return; }
  libraries=$(mktemp -d)
  trap 'rm -r "$libraries"' EXIT
  ln -s "$found" "$libraries/libcublasLt.so"
  export LD_LIBRARY_PATH=$libraries:$(dirname "$found")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  echo "cuBLASLt: $found"
}

if [ "$LLAVA_TEST_DEVICE" = sim ]; then
  gpu=simulator
  our_model=(--model tests/fixtures/checkpoints/hf_mha_f32 --prompt-tokens 40 --new-tokens 5 --batch-size 1,8)
  our_training=(--model tests/fixtures/checkpoints/hf_mha_f32 --prompt-tokens 40 --new-tokens 5 --batch-size 2)
  peer_model=(--device cpu --size tiny)
else
  gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' /' '--')
  [ -n "$gpu" ] || { echo "no NVIDIA driver here"; exit 1; }
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem --format=csv
  our_model=(--shape llava-1.5-7b --weights bf16 --prompt-tokens 640 --new-tokens 65 --batch-size 1,8)
  our_training=(--shape llava-1.5-7b --weights bf16 --prompt-tokens 640 --new-tokens 64 --batch-size 24)
  peer_model=(--device cuda --size 7b)
  use_torch_cublaslt
fi
"$bin/llava-engine" info

for part in "$@"; do
  echo "--- $part"
  part_end=$((SECONDS + ${PART_SECONDS:-480}))
  case $part in
    tests) for test in ops ops_linear ops_attention ops_sample ops_image stages batch demo; do run "$test" 240 "$bin/$test"; done ;;
    sanitize) sanitize memcheck racecheck initcheck synccheck ;;
    memcheck | racecheck | initcheck | synccheck) sanitize "$part" ;;
    bench) bench; table ;;
    transformers) transformers eager 150 40; transformers reduce-overhead 300 150; table ;;
    autotune) transformers max-autotune 440 220; table ;;
    train)
      for test in ops_backward ops_attention_backward ops_train gradients; do run "$test" 240 "$bin/$test"; done
      train
      table
      ;;
    peft) transformers eager 440 110 --train; table ;;
    table) table ;;
    *) echo "unknown part $part"; exit 2 ;;
  esac
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
echo "all of it passed: $*"
