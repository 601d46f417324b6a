"""When a run ends early, which weights it leaves, and what it tells on the way."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bench import run
from bench.checkpoint import read_checkpoint, saved_steps
from bench.evaluate import evaluate
from planner.errors import DataError, InterruptedRunError, MissingExtraError
from planner.setup import TrainSetup
from whole_runs import assert_equal_runs, metrics, quiet_train, stop_at

pytestmark = pytest.mark.train

Plan = Callable[..., TrainSetup]
LOSSES = {0: 3.0, 1: 2.0, 2: 1.0, 3: 1.5, 4: 1.6, 5: 0.5}
"""By step; with a patience of 2 the run ends after step 4, and its best is step 2."""
OPTIONS: dict[str, Any] = {"eval_every_steps": 1, "patience": 2, "keep_best": True}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    def graded(step: Any, *args: Any, **options: Any) -> Any:
        return replace(evaluate(step, *args, **options), loss=LOSSES[step.num_steps_done])

    monkeypatch.setattr(run, "evaluate", graded)


@pytest.mark.usefixtures("scripted")
@pytest.mark.slow
def test_a_run_that_no_longer_gets_better_ends_and_leaves_its_best(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, folder = plan(dropout=0.2), tmp_path / "whole"
    summary = quiet_train(setup, folder, **OPTIONS)
    assert (summary.num_steps, summary.artifact_step) == (4, 2)
    assert [note for note in summary.notes if "ended after step 4" in note]
    assert summary.eval_after["loss"] == LOSSES[4]
    assert saved_steps(folder / "checkpoints") == [4, 3, 2], "the best stays beside the newest two"
    best = read_checkpoint(folder / "checkpoints", 2)
    assert best is not None
    left = load_file(folder / "adapter/adapter_model.safetensors")
    for name, tensor in best.weights.items():
        assert torch.equal(left[name.replace(".default", "")], tensor), name
    with monkeypatch.context() as patch:
        stop_at(patch, run.Run, "_record", 3)
        with pytest.raises(InterruptedRunError):
            quiet_train(setup, tmp_path / "cut", **OPTIONS)
    quiet_train(setup, tmp_path / "cut", **OPTIONS)
    assert_equal_runs(folder, tmp_path / "cut")


def events(folder: Path) -> Iterator[tuple[str, int, float]]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for path in sorted(folder.iterdir()):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                yield value.tag, event.step, value.tensor.float_val[0]


def test_own_prompts_are_answered_at_each_evaluation_and_tensorboard_shows_the_numbers(
    plan: Plan, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("n 5\n\nn 6\n")
    folder = tmp_path / "run"
    summary = quiet_train(plan(max_steps=2), folder, prompts=prompts, eval_every_steps=1, tensorboard=True)
    asked = [[sample["prompt"] for sample in entry["samples"]] for entry in metrics(folder, "sample")]
    assert len(asked) == 3
    assert all("n 5" in first and "n 6" in second for first, second in asked)
    assert summary.sample_after == metrics(folder, "sample")[-1]["samples"]
    shown = {(tag, step): value for tag, step, value in events(folder / "tensorboard")}
    for kind in ("step", "eval"):
        for entry in metrics(folder, kind):
            assert shown[f"{kind}/loss", entry["step"]] == pytest.approx(entry["loss"])


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "No such file"), (b"\xff\xfe", "not UTF-8"), (b" \n", "no prompt")]
)
def test_prompts_that_cannot_be_read_are_one_line(
    plan: Plan, tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        quiet_train(plan(), tmp_path / "run", prompts=path)


def test_without_tensorboard_one_line_says_what_to_install(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"finefit\[tensorboard\]"):
        quiet_train(plan(), tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()
