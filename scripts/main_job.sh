#!/usr/bin/env bash
# The main job on real input: from "what fits on a card" to a fine-tuned model on this machine.
set -euo pipefail
cd "$(dirname "$0")/.."

# Threads that wait by spinning take the cores from whoever computes: three times slower on a shared machine.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

run=runs/$(date +%Y%m%d-%H%M%S)
model=smollm2-135m-instruct
data=data/chatterbot-en.jsonl

show() {
    printf '\n$ %s\n' "$*"
    "$@"
}

show finefit hw
show finefit fits rtx-4090
# 40 steps are minutes on two cores; without the option the plan is one pass over the data.
show finefit plan "$model" --data "$data" --gpu local --max-steps 40 --out "$run/plan.yaml"
show finefit bench "$run/plan.yaml" --steps 3 --results "$run/results.jsonl"
show finefit train "$run/plan.yaml" --out "$run/train"
show finefit report "$run/train" --html "$run/report.html"
