"""A measurement without anything that names a person, a computer or a folder, so that it can be shared."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

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

_PRIVATE_NAME = re.compile(r"[\\/~]|^\.")
_PATH = re.compile(r"(?<![\w.>])(?:[A-Za-z]:)?(?:[\\/]+[^\\/\s:;,'\"()<>|]+)+[\\/]*|~[\\/][^\s'\"]*")


def anonymise(measurement: Measurement) -> Measurement:
    """The record with listed facts only: no paths, no output of the process, no time of day, no machine's id.

    Raises ValueError for a setup that names files of its own: such a plan can't be shared by leaving words out.
    """
    setup = measurement.setup
    if setup.data or setup.tokenizer or not is_public(setup.model):
        raise ValueError(
            "only plans without files of one's own can be shared (bench it with --set data=none, a public model)"
        )
    kept = {key: value for key, value in measurement.environment.items() if key in ENVIRONMENT_KEYS}
    if "os" in kept:
        kept["os"] = system_name(str(kept["os"]))
    predicted = measurement.predicted
    return replace(
        measurement,
        setup=setup.with_(model=_unnamed(setup.model)),
        predicted=None if predicted is None else _cleaned(predicted),
        time_utc=measurement.time_utc[:10],
        environment=kept,
        error=None if measurement.error is None else without_paths(measurement.error),
        stderr_tail="",
        warnings=tuple(map(without_paths, measurement.warnings)),
    )


def system_name(text: str) -> str:
    """A system and the numbers of its release: what follows them can name a provider, or somebody's own build.

    >>> system_name("Linux 6.8.0-45-acme"), system_name("Darwin 24.1.0")
    ('Linux 6.8.0', 'Darwin 24.1.0')
    """
    found = re.match(r"\S+ \d+(?:\.\d+)*", text)
    return found.group() if found else text.split(" ")[0]


def is_public(model: str | Mapping[str, Any]) -> bool:
    """Whether a setup's model is one that finefit knows by name, or its shapes alone."""
    if not isinstance(model, str):
        return True
    from planner.resolve import is_known

    return not re.search(r"[\\~]|^[./]", model) and is_known(model)


def _unnamed(model: str | Mapping[str, Any]) -> str | Mapping[str, Any]:
    """An inline config without a name that could be a path, or somebody's."""
    if isinstance(model, str):
        return model
    name = str(model.get("_name_or_path", ""))
    return {
        key: value for key, value in model.items() if key != "_name_or_path" or not _PRIVATE_NAME.search(name)
    }


def _cleaned(value: Any) -> Any:
    """A prediction without the setup, which the record has, and without paths in its texts."""
    if isinstance(value, Mapping):
        return {str(key): _cleaned(item) for key, item in value.items() if key != "setup"}
    if isinstance(value, list | tuple):
        return [_cleaned(item) for item in value]
    return without_paths(value) if isinstance(value, str) else value


def without_paths(text: str) -> str:
    """The text with every path replaced.

    >>> without_paths("can't open '/srv/ada/x.json' at C:\\\\Users\\\\ada\\\\y, 3 steps/s")
    "can't open '<path>' at <path>, 3 steps/s"
    """
    return _PATH.sub("<path>", text)
