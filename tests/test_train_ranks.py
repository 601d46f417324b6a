"""`train` on several ranks: real processes (CPU, gloo) against one process with the same global batch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import psutil
import pytest
import torch
from safetensors.torch import load_file

from bench.launch import PassedOnStop, run_ranks
from bench.run import Run
from bench.train import RunSummary, train
from planner.errors import InterruptedRunError, NotModelledError
from planner.planfile import write_plan
from planner.setup import TrainSetup
from tiny_llama import save_tiny_model, tiny_setup, write_rows

pytestmark = [pytest.mark.train, pytest.mark.slow, pytest.mark.timeout(900)]

NUM_STEPS = 4


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ and rows.jsonl; 18 rows train, so an epoch ends with half a global batch of 8."""
    folder = tmp_path_factory.mktemp("tiny-ranks")
    save_tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl", 20)
    return folder


def plan_of(tiny: Path, **changes: Any) -> TrainSetup:
    values = {
        "model": str(tiny / "model"),
        "data": str(tiny / "rows.jsonl"),
        "from_scratch": False,
        "seq_len": 64,
        "micro_batch_size": 2,
        "grad_accum_steps": 2,
        "eval_fraction": 0.1,
        "max_steps": NUM_STEPS,
        "num_gpus": 2,
    }
    return tiny_setup(**{**values, **changes})


def quiet_train(setup: TrainSetup, folder: Path) -> RunSummary:
    return train(setup, folder, progress=False, device="cpu", save_every_steps=2)


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in lines if entry["kind"] == "step"]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    (artifact,) = [*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")]
    return load_file(artifact)


class Case(NamedTuple):
    """A run on two ranks, whose wrapper has this name, and the changes that it shares with one process."""

    wrapper: str
    sharding: str
    changes: dict[str, Any]

    @property
    def name(self) -> str:
        return "-".join([self.sharding, *map(str, self.changes.values())])


FASTEST = {"method": "lora", "padding_free": True, "kernels": "fused", "loss": "chunked"}
CASES = [
    Case("DistributedDataParallel", "ddp", {"method": "full", "loss": "chunked", "packing": True}),
    Case("DistributedDataParallel", "ddp", {"method": "qlora"}),
    Case("FSDPLossModule", "fsdp", {"method": "full", "checkpointing": "full"}),
    Case("FSDPLossModule", "fsdp", {"method": "qlora"}),
    Case("FSDPLossModule", "fsdp", FASTEST),
    Case("DeepSpeedEngine, stage 1", "zero1", {"method": "lora"}),
    Case("DeepSpeedEngine, stage 2", "zero2", {"method": "full"}),
    Case("DeepSpeedEngine, stage 3", "zero3", {"method": "full"}),
    Case("DeepSpeedEngine, stage 3", "zero3", FASTEST),
]


def train_all(tiny: Path, folder: Path) -> None:
    """One of two ranks: each case trained whole, and stopped on the second rank and gone on with."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for case in CASES:
        setup = plan_of(tiny, sharding=case.sharding, **case.changes)
        with mock.patch.object(Run, "execute", recording(folder / case.name)):
            quiet_train(setup, folder / case.name / "whole")
        with mock.patch.object(Run, "_take_step", stopping_after(3)), pytest.raises(InterruptedRunError):
            quiet_train(setup, folder / case.name / "stopped")
        quiet_train(setup, folder / case.name / "stopped")


def recording(folder: Path) -> Callable[[Run], None]:
    """Run.execute that first writes what this rank's model is wrapped in."""
    execute = Run.execute

    def recorded(run: Run) -> None:
        model: Any = run.train_step.model
        stage = (
            f", stage {model.zero_optimization_stage()}" if hasattr(model, "zero_optimization_stage") else ""
        )
        text = f"{type(model).__name__}{stage} of {run.world.size}"
        (folder / f"wrapper-{run.world.rank}").write_text(text)
        execute(run)

    return recorded


def stopping_after(step: int) -> Callable[[Run], None]:
    """Run._take_step that a SIGTERM to the second rank interrupts."""
    take_step = Run._take_step

    def stopped(run: Run) -> None:
        if run.state.step == step - 1 and run.world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        take_step(run)

    return stopped


@pytest.fixture(scope="session")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained-ranks")
    with PassedOnStop() as stop:
        run_ranks(stop, 2, train_all, tiny, folder)
    return folder


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def test_two_ranks_train_as_one_process_with_the_same_global_batch(tiny, trained, tmp_path, case):
    alone = quiet_train(plan_of(tiny, num_gpus=1, grad_accum_steps=4, **case.changes), tmp_path)
    folder = trained / case.name
    assert [path.read_text() for path in sorted(folder.glob("wrapper-*"))] == [f"{case.wrapper} of 2"] * 2
    assert losses(folder / "whole") == pytest.approx(losses(tmp_path), rel=1e-4)
    ranks = RunSummary(**json.loads((folder / "whole" / "summary.json").read_text()))
    assert ranks.num_tokens == alone.num_tokens
    for when in ("eval_before", "eval_after"):
        assert getattr(ranks, when)["loss"] == pytest.approx(getattr(alone, when)["loss"], rel=1e-4)
    files = [
        sorted(p.name for p in (root / alone.artifact).iterdir()) for root in (tmp_path, folder / "whole")
    ]
    assert files[0] == files[1]
    one, two = weights_of(tmp_path), weights_of(folder / "whole")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-3)


def test_a_run_that_one_rank_stopped_goes_on_bit_for_bit(trained, case):
    folder = trained / case.name
    assert json.loads((folder / "stopped" / "summary.json").read_text())["resumed_from"] in (2, 3)
    assert losses(folder / "stopped") == losses(folder / "whole")
    stopped, whole = weights_of(folder / "stopped"), weights_of(folder / "whole")
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)


FINEFIT = (sys.executable, "-c", "import sys; from bench.cli import main; sys.exit(main())")


def command_of(setup: TrainSetup, folder: Path) -> list[str]:
    """The command that trains in folder/run, saved at its end only unless it is stopped."""
    write_plan(folder / "plan.yaml", setup, "local", {})
    options = ["--device", "cpu", "--out", str(folder / "run"), "--save-every", "1000"]
    return [*FINEFIT, "train", str(folder / "plan.yaml"), *options]


def started(command: list[str], out: Path) -> subprocess.Popen[str]:
    """The command's process, some steps into its run."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not ((out / "metrics.jsonl").exists() and len(losses(out)) >= 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    return process


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks that a run has started, oldest first: spawned by multiprocessing, so not its resource tracker."""
    ranks = [p for p in psutil.Process(process.pid).children() if "spawn_main" in " ".join(p.cmdline())]
    return sorted(ranks, key=lambda p: p.create_time())


def end_of(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Exit code and what isn't progress on stderr."""
    _, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors
    return process.returncode, [line for line in errors.splitlines() if line.startswith("finefit: ")]


def test_sigterm_saves_on_all_ranks_and_the_same_command_goes_on(tiny, tmp_path):
    setup = plan_of(tiny, sharding="fsdp", max_steps=1000)
    command, out = command_of(setup, tmp_path), tmp_path / "run"
    process = started(command, out)
    process.terminate()
    code, lines = end_of(process)
    assert code == InterruptedRunError.exit_code
    assert len(lines) == 1 and "SIGTERM" in lines[0] and "resumes" in lines[0]
    (saved,) = (out / "checkpoints").iterdir()
    assert (saved / "rank-0001").is_dir()
    assert saved.name == f"step-{len(losses(out)):06d}"


def test_a_rank_that_is_killed_ends_the_run_in_one_line(tiny, tmp_path):
    process = started(command_of(plan_of(tiny, sharding="ddp", max_steps=1000), tmp_path), tmp_path / "run")
    ranks = ranks_of(process)
    ranks[-1].kill()
    code, lines = end_of(process)
    assert code == 1
    assert len(lines) == 1 and "rank 1 was ended by SIGKILL" in lines[0]
    assert not any(rank.is_running() for rank in ranks)


def test_ranks_end_with_the_process_that_started_them(tiny, tmp_path):
    process = started(command_of(plan_of(tiny, sharding="ddp", max_steps=1000), tmp_path), tmp_path / "run")
    ranks = ranks_of(process)
    process.kill()
    process.communicate()
    assert psutil.wait_procs(ranks, timeout=60)[1] == []


def test_torchrun_starts_the_ranks_as_well(tiny, trained, tmp_path):
    case = next(case for case in CASES if case.sharding == "fsdp")
    setup = plan_of(tiny, sharding=case.sharding, **case.changes)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "--no-python", *command_of(setup, tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out loss") == 1
    assert losses(tmp_path / "run") == losses(trained / case.name / "whole")


def test_what_ranks_cannot_do_is_refused_before_anything_is_written(tiny, tmp_path):
    for changes, reason in (
        ({"sharding": "fsdp1"}, "finefit export"),
        ({"sharding": "device_map"}, "use ddp, or fsdp"),
        ({"sharding": "fsdp", "optimizer": "lion-8bit"}, "shares"),
        ({"sharding": "zero2", "optimizer": "sgd"}, "DeepSpeed"),
        ({"sharding": "zero1", "offload": "optimizer"}, "offload"),
        ({"sharding": "ddp", "num_nodes": 2}, "torchrun --nnodes 2 --nproc-per-node 1"),
    ):
        with pytest.raises(NotModelledError, match=reason):
            quiet_train(plan_of(tiny, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
