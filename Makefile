# make run: set everything up and do the main job on this machine.  make test: set up and test.
# Without make, the same in plain commands: README.md.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

# Threads that wait by spinning take the cores from whoever computes: three times slower on a shared machine.
OMP_WAIT_POLICY ?= passive
export OMP_WAIT_POLICY

.DEFAULT_GOAL := help
.PHONY: help setup run test test-slow soak check format index reports bench clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 12

setup:  ## the virtual environment with all packages (once)
	@PYTHON="$(PYTHON)" scripts/setup.sh "$(VENV)"

run: setup  ## the main job on real input: hw, fits, plan, bench, train
	@PATH="$(abspath $(BIN)):$$PATH" scripts/main_job.sh

test: setup  ## all tests but the slow ones
	$(PYTEST) -m "not slow"

test-slow: setup  ## the slow tests: real models, the wheel, whole runs
	$(PYTEST) -m slow

soak: setup  ## hundreds of kills, stops and broken inputs of real runs (about ten minutes)
	$(BIN)/python tests/soak.py --report reports/soak

check: setup  ## format, lint, types, import rules, length limits
	@$(BIN)/ruff format --check --quiet . || { echo "run: make format" >&2; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@PATH="$(abspath $(BIN)):$$PATH" lint-imports
	$(PYTEST) tests/test_architecture.py

format: setup  ## format the code and fix what the linter can
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

index: setup  ## regenerate the profiles' index
	$(BIN)/python -m planner.index

reports: setup  ## regenerate reports/
	@PATH="$(abspath $(BIN)):$$PATH" scripts/reports.sh

bench: setup  ## this code beside the usual trainer, in CPU-seconds per step
	$(BIN)/python benchmarks/train_speed.py --report reports/speed.md

clean:  ## remove what was built, but not the environment
	rm -rf build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
