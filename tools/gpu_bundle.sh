#!/usr/bin/env bash
# Builds what tools/gpu_check.sh runs and lays it out in a folder, to be carried to a machine with a GPU together with this working tree:
#     tools/gpu_bundle.sh [DIR]        # target/gpu-bundle if none is named
# Needs nvcc (tools/install-cuda-toolchain.sh). Debug information is stripped, to keep it small.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-target/gpu-bundle}
mkdir -p "$out"
export LLAVA_CUDA=required
tests=(ops ops_linear ops_attention ops_sample ops_image stages batch demo ops_backward ops_attention_backward ops_train gradients)
cargo build --release --bin llava-engine
cp target/release/llava-engine "$out/"
cargo test --release --no-run --message-format=json "${tests[@]/#/--test=}" |
  python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["kind"] == ["test"]:
        print(message["target"]["name"], message["executable"])' |
  while read -r name executable; do
    cp "$executable" "$out/$name"
  done
strip --strip-debug "$out"/*
ls -l "$out"
