"""The computer watched from outside while a job runs: who else uses it, clocks, throttling, swapping, energy.

Everything is read from /proc and /sys; what a system doesn't have is None, never 0.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.host import ROOT

INTERVAL_S = 0.5
"""Between two looks: each reads a handful of small files, some tenths of a millisecond."""
MIN_WATCHED_S = 0.2
"""Between the first look and the last: the kernel counts processor time in hundredths of a second."""
MAX_OTHERS_SHARE = 0.10
"""Share of all processors that others may use during the steps before wall times are in doubt."""
MAX_STEAL_SHARE = 0.02
MAX_WAIT_SHARE = 0.05
"""Share of its time that the job may spend runnable without a processor."""
MAX_CLOCK_DROP = 0.10
MAX_PAGE_READS = 100
"""Pages that a step's working set may read back from disk; a system that swaps reads thousands."""

_IDLE, _IOWAIT, _STEAL = 3, 4, 7
"""Columns of /proc/stat's cpu line (proc_stat(5)); guest time is already inside user time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostState:
    """Counters at one moment. CPU times in seconds since the start; None where the system doesn't say."""

    at_s: float
    busy_s: float | None = None
    steal_s: float | None = None
    total_s: float | None = None
    job_cpu_s: float | None = None
    job_wait_s: float | None = None
    job_page_reads: int | None = None
    throttles: int | None = None
    energy_j: float | None = None


@dataclass
class HostSampler:
    """Watches the computer around process `pid`; shares are over the time in which the job `is_working`."""

    pid: int
    root: Path = ROOT
    clock: Callable[[], float] = time.monotonic
    own_cpu_s: Callable[[], float] = time.process_time
    first: HostState | None = None
    last: HostState | None = None
    clocks_hz: list[float] = field(default_factory=list)
    _due_s: float = 0.0
    _was_working: bool = False
    _ticks: list[int] = field(default_factory=list)

    def look(self, *, is_working: bool) -> float | None:
        """Sample if it is time to, and once when the work has ended; the processors' mean clock in Hz where one was read now.

        Without the look at the end nothing would be known of steps that are over sooner than two looks.
        """
        has_ended, self._was_working = self._was_working and not is_working, is_working
        if not has_ended and (not is_working or self.clock() < self._due_s):
            return None
        self._due_s = self.clock() + INTERVAL_S
        state = read_state(self.pid, self.clock(), self.root, self.own_cpu_s())
        if state.job_cpu_s is None and self.first is not None:
            return None
        self.first = self.first or state
        self.last = state
        if has_ended:
            return None
        clock_hz = _clock_hz(self.root)
        if clock_hz is not None:
            self.clocks_hz.append(clock_hz)
        return clock_hz

    def busy_share(self) -> float | None:
        """Of all processors' time, by whomever, since this was asked last; None at first and where nothing tells."""
        before, self._ticks = self._ticks, _cpu_ticks(self.root)
        if not before or not self._ticks:
            return None
        passed = [now - then for now, then in zip(self._ticks, before, strict=False)][:8]
        idle = passed[_IDLE] + passed[_IOWAIT] + passed[_STEAL]
        return _share(sum(passed) - idle, sum(passed))

    def facts(self) -> dict[str, Any]:
        """What the record's environment says of the computer during the measured steps; None: unknown."""
        total_s = self._delta("total_s")
        busy_s, job_s = self._delta("busy_s"), self._delta("job_cpu_s")
        others_s = None if busy_s is None else max(0.0, busy_s - (job_s or 0.0))
        return {
            "others_cpu_share": _share(others_s, total_s),
            "steal_share": _share(self._delta("steal_s"), total_s),
            "cpu_wait_share": self._wait_share(),
            "page_reads": self._delta("job_page_reads"),
            "min_cpu_clock_hz": min(self.clocks_hz, default=None),
            "max_cpu_clock_hz": max(self.clocks_hz, default=None),
            "cpu_throttles": self._delta("throttles"),
            "cpu_energy_j": self._delta("energy_j"),
            "watched_s": self._delta("at_s"),
        }

    def doubts(self) -> list[str]:
        """What makes wall times doubtful, one line each."""
        facts = self.facts()
        return [text.format(facts[key]) for key, text in doubted_facts(facts).items()] + (
            self._clock_doubt(facts)
        )

    def _clock_doubt(self, facts: dict[str, Any]) -> list[str]:
        low, high = facts["min_cpu_clock_hz"], facts["max_cpu_clock_hz"]
        if not low or low >= (1 - MAX_CLOCK_DROP) * high:
            return []
        return [f"the processors' clock went from {high / 1e9:.1f} down to {low / 1e9:.1f} GHz"]

    def _delta(self, name: str) -> Any:
        if self.first is None or self.last is None or self.last.at_s - self.first.at_s < MIN_WATCHED_S:
            return None
        before, after = getattr(self.first, name), getattr(self.last, name)
        return None if before is None or after is None else max(0, after - before)

    def _wait_share(self) -> float | None:
        waited_s, ran_s = self._delta("job_wait_s"), self._delta("job_cpu_s")
        return None if waited_s is None or ran_s is None else _share(waited_s, waited_s + ran_s)


_DOUBTS: tuple[tuple[str, float, str], ...] = (
    (
        "others_cpu_share",
        MAX_OTHERS_SHARE,
        "other programs used {:.0%} of the processors during the steps: trust CPU seconds, not wall time",
    ),
    ("steal_share", MAX_STEAL_SHARE, "the hypervisor took {:.0%} of the processors away during the steps"),
    ("cpu_wait_share", MAX_WAIT_SHARE, "the process was ready but had no processor for {:.0%} of its time"),
    ("cpu_throttles", 0, "the processors were throttled {} times by heat or power during the steps"),
    ("page_reads", MAX_PAGE_READS, "{} pages were read back from disk during the steps: memory is short"),
)
"""Facts above these limits are doubts, in these words."""


def doubted_facts(facts: Mapping[str, Any]) -> dict[str, str]:
    """The facts of a record's environment that make its wall times doubtful, with the words for them."""
    return {key: text for key, limit, text in _DOUBTS if (facts.get(key) or 0) > limit}


def read_state(pid: int, at_s: float, root: Path = ROOT, own_cpu_s: float = 0.0) -> HostState:
    """The counters now; the watching process' own CPU time is not counted as others'."""
    ticks = _cpu_ticks(root)
    job_cpu_s, page_reads = _job_times(pid, root)
    state: dict[str, Any] = {}
    if ticks:
        hz = _ticks_per_s()
        busy = sum(ticks[:8]) - ticks[_IDLE] - ticks[_IOWAIT] - ticks[_STEAL]
        state = {
            "busy_s": busy / hz - own_cpu_s,
            "steal_s": ticks[_STEAL] / hz,
            "total_s": sum(ticks[:8]) / hz,
        }
    return HostState(
        at_s=at_s,
        job_cpu_s=job_cpu_s,
        job_wait_s=_wait_s(pid, root),
        job_page_reads=page_reads,
        throttles=_throttles(root),
        energy_j=_energy_j(root),
        **state,
    )


def _share(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _ticks_per_s() -> int:
    return os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _cpu_ticks(root: Path) -> list[int]:
    words = _read(root / "proc/stat").partition("\n")[0].split()
    is_known = len(words) >= 9 and words[0] == "cpu" and all(word.isdigit() for word in words[1:])
    return [int(word) for word in words[1:]] if is_known else []


def _job_times(pid: int, root: Path) -> tuple[float | None, int | None]:
    """CPU seconds of the process with all its threads, and its major page faults (proc_pid_stat(5))."""
    words = _read(root / f"proc/{pid}/stat").rpartition(")")[2].split()
    if len(words) < 13:
        return None, None
    return (int(words[11]) + int(words[12])) / _ticks_per_s(), int(words[9])


def _wait_s(pid: int, root: Path) -> float | None:
    """Seconds that the process' threads were runnable and had no processor (schedstat's second number)."""
    waited = 0
    for thread in sorted((root / f"proc/{pid}/task").glob("*/schedstat")):
        words = _read(thread).split()
        if len(words) < 2 or not words[1].isdigit():
            return None
        waited += int(words[1])
    return waited / 1e9 or None


def _throttles(root: Path) -> int | None:
    folder = root / "sys/devices/system/cpu"
    counts = [
        _read(path).strip() for path in sorted(folder.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"))
    ]
    known = [int(count) for count in counts if count.isdigit()]
    return sum(known) if known else None


def _clock_hz(root: Path) -> float | None:
    """The mean of what the processors run at now (the kernel counts in kHz); None where no governor tells."""
    folder = root / "sys/devices/system/cpu"
    known = [
        int(text)
        for path in sorted(folder.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
        if (text := _read(path).strip()).isdigit()
    ]
    return 1e3 * sum(known) / len(known) if known else None


def _energy_j(root: Path) -> float | None:
    """The sockets' energy counters (RAPL), where this user may read them."""
    counts = [
        _read(path).strip()
        for path in sorted((root / "sys/class/powercap").glob("intel-rapl:[0-9]/energy_uj"))
    ]
    known = [int(count) for count in counts if count.isdigit()]
    return sum(known) / 1e6 if known and len(known) == len(counts) else None
