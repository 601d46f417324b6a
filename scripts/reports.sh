#!/usr/bin/env bash
# Regenerate what finefit generates from its own evidence: the residuals that intervals are set from, then reports/.
set -euo pipefail
cd "$(dirname "$0")/.."
finefit accuracy evidence/memory-runs.jsonl --residuals profiles/calibration/memory-residuals.json
traced=evidence/memory-runs-traced.jsonl
# Written aside first: a failure leaves the report that was there.
finefit accuracy evidence/memory-runs.jsonl --markdown --worst 20 >reports/accuracy.md.new
mv reports/accuracy.md.new reports/accuracy.md
finefit accuracy evidence/memory-runs.jsonl --traced $traced --markdown --worst 20 >reports/accuracy-traced.md.new
mv reports/accuracy-traced.md.new reports/accuracy-traced.md
python benchmarks/card_report.py evidence/h100-runs.jsonl --traced evidence/h100-runs-traced.jsonl >reports/h100.md.new
mv reports/h100.md.new reports/h100.md
finefit accuracy evidence/throughput-runs.jsonl --speed --markdown --worst 20 >reports/throughput.md.new
mv reports/throughput.md.new reports/throughput.md
python benchmarks/closed_form_report.py >reports/closed-form-vs-trace.md.new
mv reports/closed-form-vs-trace.md.new reports/closed-form-vs-trace.md
finefit claims --markdown >reports/claims.md.new
mv reports/claims.md.new reports/claims.md
finefit claims --markdown --lang zh >reports/claims.zh-CN.md.new
mv reports/claims.zh-CN.md.new reports/claims.zh-CN.md
python scripts/terminal_picture.py
