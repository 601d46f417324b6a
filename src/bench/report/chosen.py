"""Runs of one setup on one machine belong together, and the median one stands for them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from bench.compare import machine_key, machine_name
from bench.store import Measurement


def key_of(run: Measurement) -> Hashable:
    """The same for runs whose figures may be put together."""
    return run.setup_id, str(machine_key(run))


def by_setup(runs: Sequence[Measurement]) -> dict[Hashable, list[Measurement]]:
    """The runs that ended well, by setup and machine."""
    found: dict[Hashable, list[Measurement]] = {}
    for run in runs:
        if run.outcome == "ok":
            found.setdefault(key_of(run), []).append(run)
    return found


def middle(runs: Sequence[Measurement]) -> Measurement:
    """The median run by speed; the slower one of two."""
    return sorted(runs, key=_speed)[(len(runs) - 1) // 2]


def headline(runs: Sequence[Measurement]) -> Measurement:
    """Of the setup with the fastest median run, that run; the last one where none ended well.

    The fastest run of all would be a lucky one where setups were measured several times.
    """
    found = [middle(repeated) for repeated in by_setup(runs).values()]
    return max(found, key=_speed) if found else runs[-1]


def _speed(run: Measurement) -> float:
    return run.measured.tokens_per_s or 0.0


def places(runs: Sequence[Measurement]) -> Callable[[Measurement], str]:
    """` on MACHINE` of a run where the runs are of several machines, else nothing."""
    if len({str(machine_key(run)) for run in runs}) == 1:
        return lambda run: ""
    return lambda run: f" on {machine_name(run)}"
