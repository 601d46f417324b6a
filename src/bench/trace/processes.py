"""What a setup's ranks really hold: processes on this machine (CPU, gloo, loopback) that run the step that is traced.

Each process runs bench.trace.run.record_on on real tensors with small random weights, under the tracker of a trace.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

from planner import sharding
from planner.errors import FinefitError
from planner.setup import TrainSetup
from planner.sharding import ZeroSizes

TIMEOUT_S = 600.0


def measure_ranks(setup: TrainSetup, zero: ZeroSizes = sharding.ZERO) -> list[dict[str, int]]:
    """For each rank the peak bytes of live tensors by phase of the second step.

    `zero`: DeepSpeed's buffers, whose defaults would hide a small model.
    Raises FinefitError with the traceback of a rank that failed, queue.Empty after TIMEOUT_S.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    ranks = range(setup.num_gpus)
    port = free_port()
    processes = [
        context.Process(target=_run_rank, args=(r, port, setup.to_dict(), zero, queue)) for r in ranks
    ]
    for process in processes:
        process.start()
    try:
        answers: dict[int, Any] = dict(queue.get(timeout=TIMEOUT_S) for _ in ranks)
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    failed = next((answer for answer in answers.values() if isinstance(answer, str)), None)
    if failed is not None:
        raise FinefitError(f"a rank failed:\n{failed}")
    return [answers[rank] for rank in ranks]


def free_port() -> int:
    """A port of the loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run_rank(rank: int, port: int, values: Mapping[str, Any], zero: ZeroSizes, queue: Any) -> None:
    """One process: send (rank, phases), or (rank, traceback)."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(values["num_gpus"])}
    try:
        with mock.patch.object(sharding, "ZERO", zero):
            answer: Any = _phases(TrainSetup(**values))
    except Exception:
        answer = traceback.format_exc()
    queue.put((rank, answer))


def _phases(setup: TrainSetup) -> dict[str, int]:
    import torch
    import torch.distributed as dist

    from bench.trace.depth import Depths, phase_peaks
    from bench.trace.ranks import LiveTracker
    from bench.trace.run import NUM_STEPS, REPORTED, record_on

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tracker = LiveTracker()
    with tracker.resizes(), _without_compiling(setup):
        recording = record_on(setup, tracker, nullcontext(), on_gpu=False, fill=_fill_with_noise)
    dist.destroy_process_group()
    depths = Depths(recording.num_layers, None)
    peaks = phase_peaks([recording], depths, NUM_STEPS)
    peaks |= {name: p for name, p in phase_peaks([recording], depths, 0).items() if name == "load"}
    return {name: peaks[name].num_bytes for name in REPORTED if name in peaks}


@contextmanager
def _without_compiling(setup: TrainSetup) -> Iterator[None]:
    """DeepSpeed would compile an operator for processes that share memory; gloo does without."""
    if not setup.sharding.startswith("zero"):
        yield
        return
    with mock.patch("deepspeed.comm.torch.build_shm_op", return_value=None):
        yield


def _fill_with_noise(model: Any) -> None:
    """Give a model on the meta device real tensors with small random weights."""
    import torch

    from bench.trace.fakes import fill_with_fakes, quantised_tensors

    fill_with_fakes(model)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers(), *quantised_tensors(model)]:
            if tensor.is_floating_point():
                tensor.normal_(0, 0.02)
            else:
                tensor.zero_()
