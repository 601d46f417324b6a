#!/usr/bin/env bash
# Regenerate what reports/ holds that needs no measurement of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
finefit accuracy evidence/memory-runs.jsonl --markdown --worst 20 > reports/accuracy.md
python scripts/terminal_picture.py
