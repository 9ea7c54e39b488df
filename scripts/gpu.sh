#!/usr/bin/env bash
# What a GPU is for, within 15 minutes: tests marked cuda, then training and generation, eager and compiled.
# Usage: scripts/gpu.sh [DIR]     DIR gets the output and the result of each step; by default runs/gpu
#        STEPS="tests train-seed" scripts/gpu.sh     some of: tests train-seed compiled-seed train-124m compiled-124m generate
# A step that takes too long is ended, one that fails is told; the others are run all the same.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${1:-runs/gpu}"
steps="${STEPS:-tests train-seed train-124m compiled-seed compiled-124m generate}"
mkdir -p "$out"
python -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || { echo "no GPU that torch can use"; exit 1; }

peers="nanogpt"
python -c 'import transformers' 2>/dev/null && peers="gpt2,nanogpt"
train=(python scripts/benchmark.py train device=cuda precision=bf16 "candidates=[$peers,none,ltm,delta,titans]"
  peak_memory=false rounds=5 steps=3)
small=("sizes=[seed]" n_row=64)            # 32,768 tokens in a step
large=("sizes=[124m]" n_row=16 n_segment=2) # the same, in contexts of 1,024

step() { # NAME SECONDS COMMAND...
  local name="$1" limit="$2" began="$SECONDS" code=0
  shift 2
  [[ " $steps " == *" $name "* ]] || return 0
  timeout "$limit" "$@" >"$out/$name.txt" 2>&1 || code=$?
  printf '%-14s %4d s   %s\n' "$name" $((SECONDS - began)) "$([ "$code" = 0 ] && echo done || echo "failed ($code)")"
}

step tests 150 python -m pytest -n 0 -q -m cuda
step train-seed 120 "${train[@]}" "${small[@]}" "out=$out/train-seed" "hydra.run.dir=$out/train-seed"
step train-124m 150 "${train[@]}" "${large[@]}" "out=$out/train-124m" "hydra.run.dir=$out/train-124m"
step compiled-seed 180 "${train[@]}" "${small[@]}" compile=true "out=$out/compiled-seed" "hydra.run.dir=$out/compiled-seed"
step compiled-124m 180 "${train[@]}" "${large[@]}" compile=true "out=$out/compiled-124m" "hydra.run.dir=$out/compiled-124m"
step generate 90 python scripts/benchmark.py mixers device=cuda "memories=[none,ltm,delta,titans]" "peers=[]" rounds=3 \
  "out=$out/generate" "hydra.run.dir=$out/generate"
