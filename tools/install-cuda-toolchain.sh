#!/usr/bin/env bash
# Installs the CUDA compiler of cuda-toolchain.txt into a virtual environment, .cuda-venv in the project's folder if none is named:
#     tools/install-cuda-toolchain.sh [DIR]
# build.rs finds .cuda-venv by itself; for another folder set CUDA_HOME to DIR/lib/python3.*/site-packages/nvidia/cu13.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.cuda-venv}
if [ -x "$venv"/bin/python ] && "$venv"/bin/pip freeze 2>/dev/null | grep -qxF "$(grep -m1 '^nvidia-cuda-nvcc' tools/cuda-toolchain.txt)"; then
  exit 0
fi
python3 -m venv "$venv"
"$venv"/bin/pip install --quiet --no-deps -r tools/cuda-toolchain.txt
"$venv"/lib/python3.*/site-packages/nvidia/cu13/bin/nvcc --version | tail -n 2 | head -n 1
