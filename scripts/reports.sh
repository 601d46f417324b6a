#!/usr/bin/env bash
# Regenerate what reports/ holds that needs no measurement of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
# Written aside first: a failure leaves the report that was there.
finefit accuracy evidence/memory-runs.jsonl --markdown --worst 20 >reports/accuracy.md.new
mv reports/accuracy.md.new reports/accuracy.md
python scripts/terminal_picture.py
