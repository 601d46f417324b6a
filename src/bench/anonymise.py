"""A measurement without anything that names a person, a computer or a folder, so that it can be shared."""

from __future__ import annotations

import re
from dataclasses import replace

from bench.store import Measurement

ENVIRONMENT_KEYS = frozenset(
    [
        "finefit",
        "commit",
        "versions",
        "python",
        "os",
        "cpu_model",
        "cpu_features",
        "num_cpus",
        "ram_bytes",
        "num_threads",
        "gpu_name",
        "gpu_total_bytes",
        "cuda",
        "driver",
        "max_temperature_c",
        "min_clock_hz",
        "max_power_w",
        "mean_power_w",
        "others_cpu_share",
        "steal_share",
        "cpu_wait_share",
        "page_reads",
        "min_cpu_clock_hz",
        "max_cpu_clock_hz",
        "cpu_throttles",
        "cpu_energy_j",
        "watched_s",
    ]
)
"""What a shared record keeps of the environment; whatever else there is, or will be, stays out."""

_PATH = re.compile(r"(?<![\w.>])(?:[A-Za-z]:)?(?:[\\/]+[^\\/\s:;,'\"()<>|]+)+[\\/]*|~[\\/][^\s'\"]*")


def anonymise(measurement: Measurement) -> Measurement:
    """The record with listed facts only: no paths, no output of the process, no time of day, no machine's id.

    Raises ValueError for a setup that names files of its own: such a plan can't be shared by leaving words out.
    """
    setup = measurement.setup
    if setup.data or (isinstance(setup.model, str) and re.search(r"[\\/~]|^\.", setup.model)):
        raise ValueError("only plans without files of one's own can be shared")
    kept = {key: value for key, value in measurement.environment.items() if key in ENVIRONMENT_KEYS}
    return replace(
        measurement,
        time_utc=measurement.time_utc[:10],
        environment=kept,
        error=None if measurement.error is None else without_paths(measurement.error),
        stderr_tail="",
        warnings=tuple(map(without_paths, measurement.warnings)),
    )


def without_paths(text: str) -> str:
    """The text with every path replaced.

    >>> without_paths("can't open '/srv/ada/x.json' at C:\\\\Users\\\\ada\\\\y, 3 steps/s")
    "can't open '<path>' at <path>, 3 steps/s"
    """
    return _PATH.sub("<path>", text)
