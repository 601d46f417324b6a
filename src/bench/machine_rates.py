"""This machine's own rates: measured, then kept where planner.rates looks for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.hardware import stack_versions
from bench.host import read_cpu, read_memory
from bench.host_memory import keep_freed_memory
from bench.machine import cpu_machine, local_machine
from bench.rates import Progress, Reading, measure_rates
from planner import __version__
from planner.files import write_atomically
from planner.rates import Rates, local_rates, machine_file
from planner.results import SCHEMA_VERSION

MUCH_SPREAD = 0.15
"""From this interquartile range over the median on, something else ran beside the measurement."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineRates:
    """What was measured, on what and when; `path` None: not kept."""

    machine: str
    measured_at: str
    num_threads: int
    rates: Rates
    readings: tuple[Reading, ...]
    versions: Mapping[str, str]
    path: Path | None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Figures that vary too much to be trusted."""
        return tuple(
            f"{r.name}: the middle half of {r.num_calls} calls spreads over {r.spread:.0%}; measure again when nothing else runs"
            for r in self.readings
            if r.spread > MUCH_SPREAD
        )

    def to_json(self) -> dict[str, Any]:
        """The kept file's content."""
        return {
            "schema_version": SCHEMA_VERSION,
            "machine": self.machine,
            "measured_at": self.measured_at,
            "num_threads": self.num_threads,
            "finefit": __version__,
            "versions": dict(self.versions),
            "rates": self.rates.to_json(),
            "readings": [asdict(reading) for reading in self.readings],
            "warnings": list(self.warnings),
        }


def measure_and_keep(device: str | None, *, keep: bool, progress: Progress) -> MachineRates:
    """Measure the device that training would take (or the one named) and write the file that plans read.

    Raises FinefitError where the file can't be written; then an older one stays as it is.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    machine = cpu_machine(read_cpu(), read_memory()) if kind == "cpu" else local_machine()
    keep_freed_memory()  # as a run does, whose steps these rates are for
    rates, readings = measure_rates(torch.device(kind), progress)
    path = machine_file(machine.gpu)
    found = MachineRates(
        machine=machine.gpu.architecture if kind == "cpu" else machine.gpu.name,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        num_threads=torch.get_num_threads(),
        rates=rates,
        readings=readings,
        versions=stack_versions(),
        path=path if keep else None,
    )
    if keep:
        write_atomically(path, json.dumps(found.to_json(), indent=1) + "\n")
        local_rates.cache_clear()
    return found
