"""What was seen of a job from outside, over its seconds: memory, power, clocks, who else was there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.host_sampler import HostSampler
from bench.sampler import GpuSampler

MAX_ROWS = 240
INTERVAL_S = 0.1
COLUMNS = (
    "at_s",
    "phase",
    "rss_bytes",
    "device_bytes",
    "power_w",
    "clock_hz",
    "temperature_c",
    "cpu_clock_hz",
    "cpu_busy_share",
    "num_other_processes",
)
"""Of a record's `watched`: seconds since the start, the phase, then what was seen then (None: not to be seen)."""


@dataclass
class Watched:
    """Rows of COLUMNS. A run that gets long is looked at half as often, and keeps every second row."""

    clock: Callable[[], float] = time.monotonic
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    _start_s: float | None = None
    _due_s: float = 0.0
    _interval_s: float = INTERVAL_S

    def look(
        self, phase: str | None, resident_bytes: int | None, host: HostSampler, card: GpuSampler | None
    ) -> None:
        """Add a row if it is time to."""
        now = self.clock()
        self._start_s = now if self._start_s is None else self._start_s
        if now < self._due_s or resident_bytes is None:
            return
        self._due_s = now + self._interval_s
        load = card.last_load if card else None
        row = (
            round(now - self._start_s, 3),
            phase,
            resident_bytes,
            card.last_used_bytes if card else None,
            load.power_w if load else None,
            load.clock_hz if load else None,
            load.temperature_c if load else None,
            host.clocks_hz[-1] if host.clocks_hz else None,
            host.busy_share(),
            card.num_others_now if card else None,
        )
        self.rows.append(row)
        if len(self.rows) >= MAX_ROWS:
            del self.rows[1::2]
            self._interval_s *= 2

    def columns(self) -> dict[str, Sequence[Any]]:
        """The rows as one list per column; columns of which nothing is known are left out."""
        found = {name: [row[i] for row in self.rows] for i, name in enumerate(COLUMNS)}
        return {name: values for name, values in found.items() if any(value is not None for value in values)}
