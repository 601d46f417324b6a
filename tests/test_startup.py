"""Start-up: what planner's commands may load. Modules are counted, since wall time says more about the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "torch",
    "numpy",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "pynvml",
    "psutil",
    "huggingface_hub",
    "requests",
    "asyncio",
    "multiprocessing",
    "unittest",
}
MAX_FOREIGN_MODULES = 200
"""Loaded with Python 3.11 and click 8.5 by the most demanding command: 185."""

PROGRAM = """
import json, sys
from bench.cli import run
code = run(json.loads(sys.argv[1]))
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


def run_and_list_modules(*arguments: str, folder: Path) -> tuple[int, set[str]]:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        check=True,
    )
    code, modules = json.loads(result.stderr.splitlines()[-1])
    return code, set(modules)


@pytest.mark.parametrize(
    "arguments",
    [
        ("fits", "rtx-4090", "--model", "smollm2-135m"),
        ("needs", "smollm2-135m"),
        ("estimate", "smollm2-135m", "--gpu", "rtx-4090"),
        ("plan", "smollm2-135m", "--gpu", "rtx-4090"),
        ("costs", "smollm2-135m", "--gpu", "rtx-4090"),
        ("prices", "show"),
        ("list", "models"),
        ("show", "rtx-4090"),
        ("completion", "bash"),
        ("--help",),
    ],
    ids=lambda arguments: arguments[0],
)
def test_planners_commands_load_nothing_heavy(arguments: tuple[str, ...], tmp_path: Path) -> None:
    code, modules = run_and_list_modules(*arguments, folder=tmp_path)
    assert code == 0
    assert not HEAVY & modules
    foreign = {name for name in modules if name.partition(".")[0] not in ("planner", "bench")}
    assert len(foreign) <= MAX_FOREIGN_MODULES


def test_what_a_command_does_not_need_stays_unloaded(tmp_path: Path) -> None:
    _, modules = run_and_list_modules(
        "fits", "rtx-4090", "--model", "smollm2-135m", "--json", folder=tmp_path
    )
    assert not {"yaml", "tabulate"} & modules


@pytest.mark.parametrize("command", ["bench", "train", "hw", "compare"])
def test_help_of_benchs_commands_loads_nothing_heavy(command: str, tmp_path: Path) -> None:
    code, modules = run_and_list_modules(command, "--help", folder=tmp_path)
    assert code == 0
    assert not HEAVY & modules
