#!/usr/bin/env bash
# The main job on real input: from "what fits on a card" to a fine-tuned model on this machine.
set -euo pipefail
cd "$(dirname "$0")/.."

run=runs/$(date +%Y%m%d-%H%M%S)
model=smollm2-135m-instruct
data=data/chatterbot-en.jsonl

show() {
    printf '\n$ %s\n' "$*"
    "$@"
}

show finefit hw
show finefit fits rtx-4090
show finefit plan "$model" --data "$data" --gpu local --out "$run/plan.yaml"
show finefit bench "$run/plan.yaml" --steps 3 --results "$run/results.jsonl"
show finefit train "$run/plan.yaml" --out "$run/train"
