"""Runs that lack memory: the ladder keeps what is learned, writes down what it ran with, and ends in a plan that fits."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import run, train
from bench.ladder import Shortage, ShortOfMemoryError
from bench.step import TrainStep
from planner.errors import DoesNotFitError, FinefitError, InterruptedRunError
from planner.planfile import read_plan
from planner.setup import TrainSetup
from whole_runs import assert_equal_runs, metrics, quiet_train, stop_at

pytestmark = pytest.mark.train

Plan = Callable[..., TrainSetup]


def refuse(
    patch: pytest.MonkeyPatch, is_refused: Callable[[TrainStep, Any], bool], phase: str = "backward"
) -> None:
    """An allocator that fails in a micro-batch's phase, after tensors were made there."""
    original = TrainStep.forward

    def forward(self: TrainStep, batch: Any, *args: Any) -> torch.Tensor:
        loss = original(self, batch, *args)
        if torch.is_grad_enabled() == (phase != "eval") and is_refused(self, batch):
            if phase == "backward":
                loss.backward()
            self.phase(phase)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return loss

    patch.setattr(TrainStep, "forward", forward)


def num_rows(batch: Any) -> int:
    return len(batch["input_ids"])


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in metrics(folder)]


def test_a_smaller_micro_batch_learns_the_same_and_is_what_resumes(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, folder = plan(max_steps=4), tmp_path / "short"
    quiet_train(setup, tmp_path / "whole")
    with monkeypatch.context() as patch:
        refuse(patch, lambda step, batch: num_rows(batch) > 2 and step.num_steps_done == 1)
        stop_at(patch, run.Run, "_record", 3)
        with pytest.raises(InterruptedRunError):
            quiet_train(setup, folder)
    (retry,) = metrics(folder, "retry")
    assert retry["changes"] == {"micro_batch_size": 2, "grad_accum_steps": 4}
    assert (retry["step"], retry["phase"], retry["missing_bytes"]) == (1, "backward", 20 * 2**20)
    as_run = read_plan(folder / "plan.yaml")
    assert as_run.setup == setup.with_(micro_batch_size=2, grad_accum_steps=4)
    assert as_run.planned == setup
    # the plan as it was given resumes with what was run
    summary = quiet_train(setup, folder)
    assert summary.resumed_from == 3
    assert summary.setup["micro_batch_size"] == 2
    assert summary.notes == [retry["note"]]
    assert len(metrics(folder, "retry")) == 1
    assert losses(folder) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    # and so does the plan as it was run, as if nothing had ever failed
    assert quiet_train(as_run.setup, folder) == summary


def test_a_step_that_is_taken_again_is_the_same_step_bit_for_bit(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputing changes no number, so this rung shows that gradients and generators were put back."""
    setup = plan(max_steps=3, dropout=0.3, micro_batch_size=1)
    quiet_train(setup.with_(checkpointing="full"), tmp_path / "whole")
    with monkeypatch.context() as patch:
        refuse(patch, lambda step, _: step.setup.checkpointing == "none" and step.num_steps_done == 1)
        summary = quiet_train(setup, tmp_path / "short")
    assert summary.setup["checkpointing"] == "full"
    assert_equal_runs(tmp_path / "whole", tmp_path / "short")


@pytest.mark.slow
def test_where_no_smaller_step_is_left_the_run_is_saved_and_exits_with_3(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, folder = plan(max_steps=4, grad_accum_steps=1), tmp_path / "run"
    with monkeypatch.context() as patch:
        refuse(patch, lambda step, _: step.num_steps_done == 2)
        with pytest.raises(DoesNotFitError, match="no smaller step is left") as caught:
            quiet_train(setup, folder)
    assert caught.value.exit_code == 3
    changes = [retry["changes"] for retry in metrics(folder, "retry")]
    assert changes == [
        {"micro_batch_size": 2, "grad_accum_steps": 2},
        {"micro_batch_size": 1, "grad_accum_steps": 4},
        {"checkpointing": "full"},
    ]
    assert quiet_train(setup, folder).resumed_from == 2


@pytest.mark.slow
def test_an_evaluation_that_lacks_memory_only_shrinks_its_own_batch(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = plan(max_steps=2)
    whole = quiet_train(setup, tmp_path / "whole")
    refuse(monkeypatch, lambda _, batch: num_rows(batch) > 1, "eval")
    short = quiet_train(setup, tmp_path / "short")
    assert short.setup == {**whole.setup, "eval_batch_size": 1}
    assert losses(tmp_path / "short") == losses(tmp_path / "whole")
    assert short.eval_after["loss"] == pytest.approx(whole.eval_after["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_step_that_was_half_taken_begins_again_from_the_checkpoint(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = plan(method="full", optimizer_in_backward=True, grad_accum_steps=1, max_steps=3)
    quiet_train(setup.with_(checkpointing="full"), tmp_path / "whole", save_every_steps=1)
    refuse(monkeypatch, lambda step, _: step.setup.checkpointing == "none" and step.num_steps_done == 1)
    summary = quiet_train(setup, tmp_path / "short", save_every_steps=1)
    assert summary.resumed_from == 1
    assert losses(tmp_path / "short") == losses(tmp_path / "whole")


@pytest.mark.parametrize("phase", ["load", "optimizer"])
def test_what_no_smaller_batch_helps_ends_at_once(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise MemoryError

    owner, name = {"load": (train, "build_model"), "optimizer": (TrainStep, "_clip")}[phase]
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(DoesNotFitError, match=f"out of memory \\({phase}"):
        quiet_train(plan(max_steps=2), tmp_path / "run")
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_ranks_that_lack_memory_begin_again_with_the_next_rung(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error comes out of another process; what the ranks are given is the plan as it is run."""
    sizes = []

    def ranks(stop: Any, num_ranks: int, target: Any, values: Any, *args: Any) -> None:
        sizes.append(values["setup"]["micro_batch_size"])
        if len(sizes) < 3:
            error = ShortOfMemoryError(Shortage(phase="backward", missing_bytes=1))
            raise pickle.loads(pickle.dumps(error))
        raise FinefitError("enough")

    monkeypatch.setattr(train, "run_ranks", ranks)
    with pytest.raises(FinefitError, match="enough"):
        quiet_train(plan(num_gpus=2, sharding="ddp"), tmp_path / "run")
    assert sizes == [4, 2, 1]
    assert len(metrics(tmp_path / "run", "retry")) == 2


LIMITED = """
import resource, sys
from pathlib import Path
import psutil
from bench import run
from bench.train import train
from planner.planfile import read_plan

original = run.Run.execute

def limited(self):
    limit = psutil.Process().memory_info().vms + int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    original(self)

run.Run.execute = limited
summary = train(read_plan(Path(sys.argv[1])), Path(sys.argv[2]), progress=False)
print(summary.setup["micro_batch_size"], summary.setup["grad_accum_steps"])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
def test_a_real_limit_of_memory_is_met_with_smaller_steps(plan: Plan, tmp_path: Path) -> None:
    """16 rows of 512 positions and 256 logits don't fit in 48 MiB with two layers' activations; 2 or 4 do."""
    setup = plan(max_steps=2, micro_batch_size=16, grad_accum_steps=1, objective="pretrain", seq_len=512)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{n} {'word ' * 200}"}) + "\n" for n in range(20)))
    setup = setup.with_(data=str(rows))
    quiet_train(setup, tmp_path / "whole")
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "whole/plan.yaml"), str(tmp_path / "short")]
    done = subprocess.run([*command, str(48 * 2**20)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    size, accumulation = map(int, done.stdout.split())
    assert size < 16
    assert size * accumulation == 16
    assert metrics(tmp_path / "short", "retry")
    assert losses(tmp_path / "short") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
