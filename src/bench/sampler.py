"""A card watched from outside while a job runs: memory by process, throttling, heat, other users."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from bench.nvml import CardLoad, CardMemory, Handle, Nvml, NvmlQueryError

INTERVAL_S = 0.2
"""Between two looks; a look asks the driver three questions of some tens of microseconds each."""


@dataclass
class GpuSampler:
    """Watches the card that process `pid` runs on, once `watch` has told which one that is.

    Fields hold the extremes so far. `peak_used_bytes` is the process' own memory; where the driver doesn't name
    processes (containers with their own process ids, WSL), what the card's use grew by since the watch began.
    """

    nvml: Nvml
    pid: int
    clock: Callable[[], float] = time.monotonic
    peak_used_bytes: int | None = None
    peak_growth_bytes: int | None = None
    max_temperature_c: int | None = None
    min_clock_hz: float | None = None
    max_power_w: float | None = None
    throttling: set[str] = field(default_factory=set)
    other_pids: set[int] = field(default_factory=set)
    driver_version: str | None = None
    problem: str | None = None
    last_used_bytes: int | None = None
    last_load: CardLoad | None = None
    num_others_now: int | None = None
    _powers: list[tuple[float, float]] = field(default_factory=list)
    _handle: Handle = None
    _before: CardMemory | None = None
    _due_s: float = 0.0

    def watch(self, uuid: str | None) -> None:
        """Choose the card by its unique id (torch leaves NVML's prefix out)."""
        try:
            self.driver_version = self.nvml.driver_version()
            for index in range(self.nvml.num_devices()):
                handle = self.nvml.device(index)
                if uuid and self.nvml.uuid(handle).removeprefix("GPU-") == uuid.removeprefix("GPU-"):
                    self._handle, self._before = handle, self.nvml.memory(handle)
        except NvmlQueryError as error:
            self.problem = f"the driver stopped answering: {error}"

    def look(self, *, is_working: bool) -> None:
        """Sample if it is time to. Clocks and throttling count only while the job `is_working`."""
        if self._handle is None or self.problem or self.clock() < self._due_s:
            return
        self._due_s = self.clock() + INTERVAL_S
        try:
            self._see_memory(self.nvml.memory(self._handle))
            self._see_processes()
            if is_working:
                self._see_load(self.nvml.load(self._handle))
        except NvmlQueryError as error:
            self.problem = f"the driver stopped answering: {error}"

    @property
    def device_used_bytes(self) -> int | None:
        """The process' memory on the card at its highest; None if it was never seen."""
        return self.peak_used_bytes if self.peak_used_bytes is not None else self.peak_growth_bytes

    def forget_memory(self) -> None:
        """Start the highest memory anew."""
        self.peak_used_bytes = self.peak_growth_bytes = None

    def doubts(self) -> list[str]:
        """What makes the job's figures doubtful, one line each."""
        found = [f"the card was slowed down by: {word}" for word in sorted(self.throttling)]
        if self.other_pids:
            found.append(f"{len(self.other_pids)} other processes were on the card")
        if self.peak_used_bytes is None and self.peak_growth_bytes is not None:
            found.append(
                "the driver doesn't show this process: device memory is the growth of the whole card's"
            )
        return found + ([self.problem] if self.problem else [])

    def facts(self) -> dict[str, Any]:
        """What the record's environment says of the card."""
        return {
            "driver": self.driver_version,
            "max_temperature_c": self.max_temperature_c,
            "min_clock_hz": self.min_clock_hz,
            "max_power_w": self.max_power_w,
            "mean_power_w": self.mean_power_w,
        }

    @property
    def mean_power_w(self) -> float | None:
        """Over the time in which the job worked, by the trapezoid rule; None for fewer than two looks."""
        if len(self._powers) < 2:
            return None
        spans = [(b[0] - a[0], (a[1] + b[1]) / 2) for a, b in pairwise(self._powers)]
        total_s = sum(seconds for seconds, _ in spans)
        return sum(seconds * watts for seconds, watts in spans) / total_s if total_s > 0 else None

    def _see_memory(self, memory: CardMemory) -> None:
        if self._before is not None:
            growth = max(0, self._before.free_bytes - memory.free_bytes)
            self.peak_growth_bytes = max(self.peak_growth_bytes or 0, growth)
            self.last_used_bytes = growth

    def _see_processes(self) -> None:
        processes = self.nvml.processes(self._handle)
        others = {process.pid for process in processes if process.pid != self.pid}
        self.num_others_now = len(others)
        self.other_pids |= others
        for process in processes:
            if process.pid == self.pid and process.used_bytes is not None:
                self.peak_used_bytes = max(self.peak_used_bytes or 0, process.used_bytes)
                self.last_used_bytes = process.used_bytes

    def _see_load(self, load: CardLoad) -> None:
        self.last_load = load
        if load.power_w is not None:
            self._powers.append((self.clock(), load.power_w))
        self.throttling.update(load.throttling)
        self.max_temperature_c = _highest(self.max_temperature_c, load.temperature_c)
        self.max_power_w = _highest(self.max_power_w, load.power_w)
        if load.clock_hz is not None:
            self.min_clock_hz = min(self.min_clock_hz or load.clock_hz, load.clock_hz)


def _highest(known: Any, new: Any) -> Any:
    return known if new is None else new if known is None else max(known, new)
