#!/bin/sh
# The longer training, for one GPU: 20 million tokens instead of 0.4. About ten minutes on an H200 by its arithmetic;
# not run yet. Needs MODEL (SmolLM2 as safetensors) and TEXT (made by kv_text.py).
set -eu
model=$1 text=$2
basis compress "$model" --kv-ratio 0.6 --device cuda --calibration "$text/train.jsonl" \
  --train-steps 2500 --batch 16 --length 512 -o "$model-kv0.6-long"
python "$(dirname "$0")/kv_quality.py" "$model" "$text" "trained-20M=$model-kv0.6-long"
basis eval "$model-kv0.6-long" --against "$model" --text "$text/held-out.jsonl" --device cuda --contexts 512,2048,8000
