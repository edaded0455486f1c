#!/usr/bin/env bash
# Trains the demo model by llava-engine, from random weights:
#     tools/demo_model/train.sh OUT          # OUT/talk is the model
#     tools/demo_model/train.sh OUT quick    # the first lesson alone, in two minutes: OUT/patches can tell what patches show
# PYTHON names a Python with data-requirements.txt, LLAVA_ENGINE the program. A run that was stopped goes on where it was.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?where to: train.sh OUT [quick]}
size=${2:-full}
python=${PYTHON:-python3}
engine=${LLAVA_ENGINE:-$here/../../target/release/llava-engine}
mkdir -p "$out"

[ -e "$out/shape/config.json" ] || "$python" "$here/shape.py" "$out/shape"

# data KIND PICTURES TURNS
data() {
  [ -e "$out/data/$1/rows.json" ] || "$python" "$here/make_data.py" "$1" --out "$out/data/$1" --count "$2" --turns "$3"
}

# lesson NAME MODEL STEPS RATE FLAGS...: what is learnt comes from data/NAME
lesson() {
  local name=$1 model=$2 steps=$3 rate=$4
  shift 4
  [ -e "$out/$name/config.json" ] && return
  "$engine" finetune --model "$model" --output "$out/$name" --resume --tune full --tune-vision full --template hf --dtype f32 \
    --data "$out/data/$name/rows.json" --image-folder "$out/data" --max-steps "$steps" --epochs 100 --batch-size 16 --accumulation 1 \
    --recompute none --lr "$rate" --warmup-steps 100 --beta2 0.98 --weight-decay 0.05 --save-steps 250 --log-steps 25 "$@"
}

if [ "$size" = quick ]; then
  data patches 1600 0
  lesson patches "$out/shape" 200 1.2e-3 --init random --schedule constant --eval-share 0.03
  exit
fi
data patches 12000 0
lesson patches "$out/shape" 300 1.2e-3 --init random --schedule constant
data places 24000 0
lesson places "$out/patches" 2400 1.2e-3 --schedule constant
data pairs 12000 0
lesson pairs "$out/places" 600 1.2e-3 --schedule constant
data restated 12000 16
lesson restated "$out/pairs" 1500 1.2e-3 --schedule constant
data order 24000 16
lesson order "$out/restated" 2000 1.2e-3 --schedule constant
data talk 72000 10
lesson talk "$out/order" 9000 1.2e-3 --schedule cosine --data "$out/data/order/rows.json"
