"""The running fine-tune held against its plan: memory and speed, and why they differ where that can be seen.

Causes are what was observed on this machine at that time; where nothing was, none is named.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.host_memory import kept_bytes
from bench.host_sampler import HostSampler
from bench.sampler import GpuSampler
from planner.setup import TrainSetup
from planner.units import format_bytes_finely, format_duration

WARMUP_STEPS = 2
"""Steps in which memory is allocated and kernels are chosen."""
JUDGED_STEPS = 10
"""Steps after the warm-up that are looked at before anything is said: as many as `bench` measures at least."""
SHORT_ROWS = 0.9
"""Share of the planned token positions below which the rows' lengths explain a faster or leaner step."""
UNKNOWN_CAUSE = "cause not known"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """A predicted figure with its interval; None where the plan gives no bound on that side."""

    predicted: float
    low: float | None
    high: float | None

    def is_left(self, value: float) -> bool:
        """Whether the value lies outside."""
        return (self.low is not None and value < self.low) or (self.high is not None and value > self.high)


def bounds_of(predicted: Mapping[str, Any], device_type: str) -> dict[str, Bounds]:
    """`memory` (bytes) and `step` (seconds) as a plan's summary of its estimate predicts them; what it lacks is left out.

    On CUDA memory is the peak of allocated tensors. On the CPU it is the resident set, seen between steps: a
    lower bound of its peak, so that only more than predicted can be told.
    """
    found = {}
    memory, time = predicted.get("memory"), predicted.get("time")
    if isinstance(memory, Mapping):
        allocated = _number(memory, "peak_allocated_bytes")
        low, high = (_number(memory, f"{side}_peak_allocated_bytes") for side in ("low", "high"))
        shown = _number(memory, "device_used_bytes")
        if device_type == "cuda" and allocated is not None:
            found["memory"] = Bounds(predicted=allocated, low=low, high=high)
        elif shown is not None and allocated is not None and high is not None:
            found["memory"] = Bounds(predicted=shown, low=None, high=shown + high - allocated)
    if isinstance(time, Mapping) and (step_s := _number(time, "step_s")) is not None:
        low, high = _number(time, "low_step_s"), _number(time, "high_step_s")
        found["step"] = Bounds(predicted=step_s, low=low, high=high)
    return found


def expected_figures(predicted: Mapping[str, Any], device_type: str) -> dict[str, float]:
    """What is shown beside the measured `memory` (bytes) and `tokens_per_s`; what the plan lacks is left out.

    Speed is that of full rows.
    """
    found = {
        name: bounds.predicted
        for name, bounds in bounds_of(predicted, device_type).items()
        if name == "memory"
    }
    time = predicted.get("time")
    speed = _number(time, "tokens_per_s") if isinstance(time, Mapping) else None
    return found if speed is None else {**found, "tokens_per_s": speed}


def _number(values: Mapping[str, Any], key: str) -> float | None:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if value > 0 else None


_SHOW: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "memory": ("memory", format_bytes_finely),
    "step": ("an optimizer step", format_duration),
}


@dataclass(kw_only=True)
class Watch:
    """Looks at each step's metrics; `report("warning", values)` is called once for each figure that left its interval.

    A listener of MetricsLog. After a retry the prediction is another plan's, and nothing is said any more. `host`
    and `card` see what else the machine does; None where that can't be told apart from the run.
    """

    bounds: Mapping[str, Bounds]
    setup: TrainSetup
    report: Callable[[str, Mapping[str, Any]], None]
    host: HostSampler | None = None
    card: GpuSampler | None = None
    allocator_retries: Callable[[], int] = lambda: 0
    freed_bytes: Callable[[], int | None] = lambda: None
    _steps: list[Mapping[str, Any]] = field(default_factory=list)
    _is_done: bool = False

    def __call__(self, kind: str, values: Mapping[str, Any]) -> None:
        """One entry of metrics.jsonl."""
        if kind == "retry":
            self._is_done = True
        if kind != "step" or self._is_done:
            return
        self._look()
        self._steps.append(values)
        if len(self._steps) == WARMUP_STEPS + JUDGED_STEPS:
            self._is_done = True
            self._judge()

    def close(self) -> None:
        """Nothing is held."""

    def _look(self) -> None:
        if len(self._steps) >= WARMUP_STEPS:
            if self.host is not None:
                self.host.look(is_working=True)
            if self.card is not None:
                self.card.look(is_working=True)

    def _judge(self) -> None:
        judged = self._steps[WARMUP_STEPS:]
        measured = {
            "memory": max(_memory_bytes(step) for step in judged),
            "step": statistics.median(step["step_s"] for step in judged),
        }
        for name, bounds in self.bounds.items():
            if bounds.is_left(measured[name]):
                causes = self._causes(name, measured[name] - bounds.predicted)
                self._say(name, bounds, measured[name], causes)

    def _say(self, name: str, bounds: Bounds, measured: float, causes: list[str]) -> None:
        words, show = _SHOW[name]
        verb = "takes" if name == "step" else "is"
        limits = [show(limit) for limit in (bounds.low, bounds.high) if limit is not None]
        expected = " to ".join(limits) if len(limits) == 2 else f"at most {limits[0]}"
        line = f"{words} {verb} {show(measured)} where {show(bounds.predicted)} was predicted ({expected}): "
        values = {
            "step": self._steps[-1]["step"],
            "quantity": name,
            "measured": measured,
            "predicted": bounds.predicted,
            "low": bounds.low,
            "high": bounds.high,
            "causes": causes,
            "note": line + ("; ".join(causes) or UNKNOWN_CAUSE),
        }
        self.report("warning", values)

    def _causes(self, name: str, excess: float) -> list[str]:
        """What was seen that makes this figure larger, or smaller."""
        is_more = excess > 0
        if not is_more:
            return self._short_rows()
        return self._disturbances() if name == "step" else self._kept(excess)

    def _short_rows(self) -> list[str]:
        planned = self.setup.global_batch_size * self.setup.seq_len
        share = statistics.mean(step["positions"] for step in self._steps[WARMUP_STEPS:]) / planned
        if share >= SHORT_ROWS:
            return []
        return [
            f"the rows are shorter than seq_len: a step has {share:.0%} of the token positions planned for"
        ]

    def _kept(self, excess_bytes: float) -> list[str]:
        """Freed memory counts where it makes up most of what is too much."""
        kept = self.freed_bytes() or 0
        if kept < excess_bytes / 2:
            return []
        return [f"{format_bytes_finely(kept)} of it are freed, and kept for later steps by the C library"]

    def _disturbances(self) -> list[str]:
        found = [] if self.host is None else self.host.doubts()
        found += [] if self.card is None else self.card.doubts()
        retries = self.allocator_retries()
        if retries:
            found.append(f"the allocator had to free its cache {retries} times: the card is nearly full")
        return found


def _memory_bytes(step: Mapping[str, Any]) -> float:
    """The peak of allocated tensors where the device has one."""
    return float(step.get("peak_allocated_bytes", step["rss_bytes"]))


def watch_for(
    predicted: Mapping[str, Any],
    setup: TrainSetup,
    device: torch.device,
    report: Callable[[str, Mapping[str, Any]], None],
) -> Watch:
    """The watch of a run in this process on `device`. Other ranks of the same run would count as strangers."""
    is_alone = setup.num_gpus == 1
    on_cuda = device.type == "cuda"
    return Watch(
        bounds=bounds_of(predicted, device.type),
        setup=setup,
        report=report,
        host=HostSampler(pid=os.getpid(), own_cpu_s=lambda: 0.0) if is_alone else None,
        card=_card(device) if is_alone and on_cuda else None,
        allocator_retries=_retries(device) if on_cuda else lambda: 0,
        # CUDA's figure is of live tensors
        freed_bytes=(lambda: None) if on_cuda else kept_bytes,
    )


def _retries(device: torch.device) -> Callable[[], int]:
    before = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
    return lambda: int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0) - before)


def _card(device: torch.device) -> GpuSampler | None:
    """The card as NVML sees it; None where that doesn't answer, as in many containers."""
    from bench.meters import describe_device
    from bench.nvml import NvmlQueryError
    from bench.nvml_driver import Pynvml

    nvml = Pynvml()
    try:
        nvml.open()
    except NvmlQueryError:
        return None
    sampler = GpuSampler(nvml=nvml, pid=os.getpid())
    sampler.watch(describe_device(device)["gpu_uuid"])
    return sampler
