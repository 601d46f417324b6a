"""Short whole runs of the tiny model, how to stop them, and what they must leave whatever happened on the way."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bench import run
from bench.checkpoint import newest_checkpoint
from bench.train import RunSummary, train
from planner.errors import InterruptedRunError
from planner.setup import TrainSetup
from tiny_llama import save_tiny_model, tiny_setup, write_pairs, write_rows

NUM_STEPS = 8

STEP_KEYS = ("step", "loss", "grad_norm", "learning_rate", "tokens", "trained_tokens", "rewards_margin")
EVAL_KEYS = ("step", "loss", "perplexity", "num_trained_tokens", "rewards_margin")
"""Some objectives lack one."""
SUMMARY_KEYS = ("eval_before", "eval_after", "sample_before", "sample_after", "num_tokens", "final_loss")


def save_tiny_folder(folder: Path) -> Path:
    """model/, rows.jsonl and pairs.jsonl; 36 rows train, so an epoch has 5 steps of 4 x 2."""
    save_tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl", 40)
    write_pairs(folder / "pairs.jsonl", 40)
    return folder


def make_plan(tiny: Path, **changes: Any) -> TrainSetup:
    values = {
        "model": str(tiny / "model"),
        "data": str(tiny / "rows.jsonl"),
        "from_scratch": False,
        "seq_len": 64,
        "micro_batch_size": 4,
        "grad_accum_steps": 2,
        "eval_fraction": 0.1,
        "max_steps": NUM_STEPS,
        **changes,
    }
    if values["data"]:
        values["data"] = str(tiny / values["data"])
    return tiny_setup(**values)


def quiet_train(setup: TrainSetup, folder: Path, **options: Any) -> RunSummary:
    return train(setup, folder, progress=False, **{"save_every_steps": 3, **options})


def stop_at(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """SIGTERM arrives while the `call`-th call of `owner.name` runs."""
    original = getattr(owner, name)
    num_calls = 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == call:
            signal.raise_signal(signal.SIGTERM)
        return original(*args, **options)

    patch.setattr(owner, name, interrupted)


def metrics(folder: Path, kind: str = "step") -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def course(folder: Path) -> list[tuple[Any, ...]]:
    """Losses, norms and rates of all steps, and the evaluations; bit for bit."""
    steps = [tuple(map(entry.get, STEP_KEYS)) for entry in metrics(folder)]
    return steps + [tuple(map(entry.get, EVAL_KEYS)) for entry in metrics(folder, "eval")]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """The artifact's, and those of the last checkpoint: weights, optimizer, random generators."""
    (artifact,) = [*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")]
    found, _ = newest_checkpoint(folder / "checkpoints")
    assert found is not None
    return {
        **load_file(artifact),
        **{f"weights.{name}": t for name, t in found.weights.items()},
        **{f"state.{name}": t for name, t in load_file(found.path / "state.safetensors").items()},
    }


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def differences(one: Path, other: Path) -> list[str]:
    """What two finished runs don't have in common, bit for bit; empty when they are equal."""
    found = [f"{a} -> {b}" for a, b in zip(course(one), course(other), strict=False) if a != b]
    if len(course(one)) != len(course(other)):
        found.append(f"{len(course(one))} -> {len(course(other))} lines of metrics")
    a, b = tensors_of(one), tensors_of(other)
    found += sorted(a.keys() ^ b.keys())
    found += [name for name in a.keys() & b.keys() if not torch.equal(a[name], b[name])]
    return found + [key for key in SUMMARY_KEYS if summary_of(one)[key] != summary_of(other)[key]]


def assert_equal_runs(one: Path, other: Path) -> None:
    assert differences(one, other) == []


def interrupted(plan: Callable[..., TrainSetup], folder: Path, patch: pytest.MonkeyPatch) -> TrainSetup:
    """A run stopped after step 5, with checkpoints of steps 3 and 5."""
    setup = plan()
    with patch.context() as context:
        stop_at(context, run.Run, "_record", 5)
        with pytest.raises(InterruptedRunError):
            quiet_train(setup, folder)
    return setup
