"""A run's folder after kills and faults of the disk: nothing is lost, and what was torn is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import position, run
from bench import train as train_module
from bench.checkpoint import newest_checkpoint
from bench.metrics import MetricsLog
from bench.runfolder import RunFolder
from bench.signals import StopFlag, StopRequestedError
from planner.errors import FinefitError, InterruptedRunError, UsageError
from planner.setup import TrainSetup
from whole_runs import assert_equal_runs, interrupted, metrics, quiet_train, stop_at

pytestmark = pytest.mark.train

Plan = Callable[..., TrainSetup]


def test_a_stop_while_loading_says_whether_anything_is_saved(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, train_module, "load_run_data", 1)
        with pytest.raises(FinefitError, match="stopped by SIGTERM before anything was trained") as caught:
            quiet_train(plan(), tmp_path / "run")
    assert caught.value.exit_code == 143
    setup = interrupted(plan, tmp_path / "run", monkeypatch)
    with monkeypatch.context() as patch:
        stop_at(patch, train_module, "build_model", 1)
        with pytest.raises(InterruptedRunError, match="step 5 is saved"):
            quiet_train(setup, tmp_path / "run")
    assert quiet_train(setup, tmp_path / "run").resumed_from == 5


@pytest.mark.parametrize("name", ["write_artifact", "verify_artifact"])
def test_a_stop_after_the_last_step_is_resumed_by_writing_what_is_left(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    setup = plan(max_steps=2)
    quiet_train(setup, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, train_module, name, 1)
        with pytest.raises(InterruptedRunError, match="step 2 is saved"):
            quiet_train(setup, tmp_path / "cut")
    assert not (tmp_path / "cut" / "summary.json").exists()
    assert quiet_train(setup, tmp_path / "cut").resumed_from == 2
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_torn_checkpoints_ahead_never_push_out_the_one_that_is_whole(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two torn ones would count as the newest two, and each that is saved behind them would be deleted."""
    setup = interrupted(plan, tmp_path / "run", monkeypatch)
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        os.truncate(folder / "weights.safetensors", 9)
    with monkeypatch.context() as patch:
        stop_at(patch, run.Run, "_record", 2)
        with pytest.raises(InterruptedRunError, match="after step 2"):
            quiet_train(setup, tmp_path / "run", save_every_steps=1)
    checkpoint, notes = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    assert (checkpoint.step, notes) == (2, [])


def test_a_folder_whose_plan_was_being_written_is_taken_over(plan: Plan, tmp_path: Path) -> None:
    """What a kill in the first moments leaves is no foreign folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".plan.yaml.x1y2").write_text("# finefit pl")
    quiet_train(plan(max_steps=1), folder)
    assert not list(folder.glob(".plan.yaml.*"))


def test_a_stop_of_which_c_code_makes_another_error_is_still_a_stop() -> None:
    """safetensors calls torch from Rust, which reports any exception in there as its own."""
    with StopFlag() as stop, pytest.raises(StopRequestedError), stop.at_once():
        try:
            signal.raise_signal(signal.SIGTERM)
        except StopRequestedError as error:
            raise ValueError("could not determine the shape") from error
    with StopFlag() as stop, pytest.raises(ValueError, match="of its own"), stop.at_once():
        raise ValueError("of its own")


def test_what_a_kill_left_in_the_last_save_is_removed(plan: Plan, tmp_path: Path) -> None:
    setup = plan(max_steps=1)
    quiet_train(setup, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    for name in (".deleting-step-000000", ".writing-step-000001"):
        (tmp_path / "run" / "checkpoints" / name).mkdir()
    quiet_train(setup, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]


def test_a_torn_plan_in_the_folder_is_replaced_when_changes_are_allowed(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = interrupted(plan, tmp_path / "run", monkeypatch)
    os.truncate(tmp_path / "run" / "plan.yaml", 700)
    with pytest.raises(UsageError, match=r"belongs to another plan.*allow the changes"):
        quiet_train(setup, tmp_path / "run")
    (tmp_path / "run" / "plan.yaml").write_bytes(b"\xff\xfe[[")
    with pytest.raises(UsageError, match="its own can't be read"):
        quiet_train(setup, tmp_path / "run")
    assert quiet_train(setup, tmp_path / "run", allow_changes=True).resumed_from == 5


def test_a_torn_summary_is_written_again(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = plan(max_steps=1)
    first = quiet_train(setup, tmp_path / "run")
    for damage in (b'{"setup": {', b'{"of": "another version"}'):
        (tmp_path / "run" / "summary.json").write_bytes(damage)
        again = quiet_train(setup, tmp_path / "run")
        assert "the run's end is done again" in capsys.readouterr().err
        assert again.eval_after == first.eval_after
        assert again.resumed_from == 1


def test_torn_lines_of_metrics_are_left_out_and_counted(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = interrupted(plan, tmp_path / "run", monkeypatch)
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    first = next(at for at, line in enumerate(lines) if b'"kind": "step"' in line)
    lines[first] = lines[first].replace(b'"step"', b'"stfp"', 2)
    path.write_bytes(b"".join(lines) + b'{"kind": "step", "st')
    summary = quiet_train(setup, tmp_path / "run")
    assert summary.notes == ["metrics.jsonl: 2 torn lines are left out"]
    assert [e["step"] for e in metrics(tmp_path / "run")] == [2, 3, 4, 5, 6, 7, 8]


def test_a_checkpoint_of_another_finefit_is_one_line(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import checkpoint

    setup = interrupted(plan, tmp_path / "run", monkeypatch)
    folder = tmp_path / "run" / "checkpoints" / "step-000005"
    state = json.loads((folder / "state.json").read_text())
    state["run"]["of_old"] = 1
    (folder / "state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"] = checkpoint._entry(folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FinefitError, match="of another finefit or another optimizer"):
        quiet_train(setup, tmp_path / "run")


def test_an_artifact_that_the_disk_cannot_hold_is_one_line(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def full_disk(self: Any, *args: Any, **options: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("peft.PeftModel.save_pretrained", full_disk)
        with pytest.raises(FinefitError, match=r"can't write .*adapter.*No space left"):
            quiet_train(plan(max_steps=1), tmp_path / "run")
    assert not [p for p in (tmp_path / "run").iterdir() if "adapter" in p.name]
    assert quiet_train(plan(max_steps=1), tmp_path / "run").resumed_from == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fills_up(
    patch: pytest.MonkeyPatch, owner: Any, name: str, call: int, free_bytes: int, disk: Path
) -> None:
    """From the `call`-th call of `owner.name` on, the disk has so many bytes left."""
    original = getattr(owner, name)
    num_calls = 0

    def full(*args: Any, **options: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == call:
            (disk / "filler").write_bytes(b"x" * (shutil.disk_usage(disk).free - free_bytes))
        return original(*args, **options)

    patch.setattr(owner, name, full)


FULL_AT = {
    "first file of a checkpoint": (position, "save_checkpoint", 2, 0),
    "later file of a checkpoint": (position, "save_checkpoint", 2, 150_000),
    "end of a checkpoint": (position, "save_checkpoint", 2, 300_000),
    "plan": (RunFolder, "_settle_plan", 1, 0),
    "metrics": (MetricsLog, "write", 5, 0),
    "result": (train_module, "write_artifact", 1, 0),
    "summary": (RunFolder, "write_summary", 1, 0),
}


@pytest.mark.parametrize(
    "place",
    [name if name.startswith("later") else pytest.param(name, marks=pytest.mark.slow) for name in FULL_AT],
)
def test_a_disk_that_fills_on_the_way_costs_only_what_was_being_written(
    plan: Plan, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Behind each check of free space; a real file system of 3 MiB, as another program would fill it."""
    setup, folder = plan(max_steps=6), small_disk / "run"
    owner, name, call, free_bytes = FULL_AT[place]
    with monkeypatch.context() as patch:
        fills_up(patch, owner, name, call, free_bytes, small_disk)
        with pytest.raises(FinefitError, match=r"No space left|the disk has") as caught:
            quiet_train(setup, folder, save_every_steps=2)
    assert "\n" not in str(caught.value)
    assert [p.name for p in folder.rglob(".*") if p.name != ".lock"] == []
    (small_disk / "filler").unlink()
    resumed_from = quiet_train(setup, folder, save_every_steps=2).resumed_from
    assert (
        resumed_from
        == {"checkpoint": 2, "plan": None, "metrics": 2, "result": 6, "summary": 6}[place.split()[-1]]
    )
    quiet_train(setup, tmp_path / "whole", save_every_steps=2)
    assert_equal_runs(tmp_path / "whole", folder)
