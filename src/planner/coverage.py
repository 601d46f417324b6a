"""How good the intervals and verdicts are where the runs that set them are kept out.

A run says nothing about an interval that it helped to set. So each case's interval and verdict are set again
without the published runs that share something with it: its shape, its source, its method …
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from planner.accuracy import Compared, Outcomes, outcomes
from planner.residuals import Runs, distribution, kind_of, published_runs
from planner.uncertainty import Uncertainty

LEFT_OUT: Mapping[str, Callable[[Runs], Hashable] | None] = {
    "nothing (in the sample)": None,
    "its shape": lambda runs: runs.shape,
    "its model": lambda runs: runs.model,
    "its method": lambda runs: runs.kind.method,
    "its kernels": lambda runs: runs.kind.kernels,
    "its sharding": lambda runs: runs.kind.sharding,
    "its source": lambda runs: runs.source,
    "its project": lambda runs: runs.project,
}
"""What is kept out of the published runs, and what a run has in common with the case then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """Intervals of several cases: how many hold the measured peak, and their median width over the prediction.

    `median_width` is infinite where the median interval is open.
    """

    num_cases: int
    num_covered: int
    median_width: float

    @property
    def share(self) -> float:
        """Of the cases that are covered."""
        return self.num_covered / self.num_cases


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """All cases with one thing kept out: coverage in total and by part, and the verdicts."""

    what: str
    total: Coverage | None
    parts: Mapping[str, Coverage]
    outcomes: Outcomes


@dataclass(frozen=True, slots=True)
class _Held:
    is_covered: bool
    width: float
    parts: tuple[str, ...]


def left_out(compared: Iterable[Compared]) -> list[LeftOut]:
    """Coverage and verdicts for each thing that can be kept out."""
    cases = [case for case in compared if case.labelled is not None]
    return [_left_out(what, key, cases) for what, key in LEFT_OUT.items()]


def _left_out(what: str, key: Callable[[Runs], Hashable] | None, cases: list[Compared]) -> LeftOut:
    held, verdicts = [], []
    for case in cases:
        uncertainty = _uncertainty(case, key)
        answer = case.labelled
        assert answer is not None
        usable_bytes = (answer.fit.usable_bytes or 0) + answer.memory.terms["context"]
        verdicts.append((case, uncertainty.judge(answer.memory, usable_bytes).verdict))
        if case.runs is not None:
            held.append(_held(case, uncertainty))
    names = sorted({part for one in held for part in one.parts})
    return LeftOut(
        what=what,
        total=_coverage(held) if held else None,
        parts={name: _coverage([one for one in held if name in one.parts]) for name in names},
        outcomes=outcomes(verdicts),
    )


def _uncertainty(case: Compared, key: Callable[[Runs], Hashable] | None) -> Uncertainty:
    """Of a case's setup, without what it has in common with published runs."""
    assert case.labelled is not None
    setup, source = case.labelled.setup, case.labelled.source
    if key is None:
        return Uncertainty(setup, source=source)
    kind = kind_of(setup)
    own = Runs(kind=kind, source=case.group.source, model=case.model, num_gpus=setup.num_gpus, log_ratios=())
    rows = published_runs(source) or published_runs()
    kept = [runs for runs in rows if key(runs) != key(own)]
    return Uncertainty(setup, source=source, errors=distribution(kept, kind))


def _held(case: Compared, uncertainty: Uncertainty) -> _Held:
    """Whether the interval holds the peak, both taken to the bytes that the source printed."""
    assert case.labelled is not None
    assert case.measured_gib is not None
    low, high = uncertainty.ratios
    ratio = case.measured_gib / (case.predicted_gib or math.nan)
    setup = case.labelled.setup
    parts = (case.group.source, setup.method, "one GPU" if setup.num_gpus == 1 else "several GPUs")
    return _Held(low <= ratio <= high, high - low, parts)


def _coverage(held: list[_Held]) -> Coverage:
    return Coverage(
        num_cases=len(held),
        num_covered=sum(one.is_covered for one in held),
        median_width=statistics.median(one.width for one in held),
    )


def to_json(found: Iterable[LeftOut]) -> list[dict[str, Any]]:
    """The coverage as plain values; an open width is None."""
    return [
        {
            "left_out": one.what,
            "total": None if one.total is None else _values(one.total),
            "parts": {name: _values(part) for name, part in one.parts.items()},
            "outcomes": {name: getattr(one.outcomes, name) for name in one.outcomes.__slots__},
        }
        for one in found
    ]


def _values(coverage: Coverage) -> dict[str, Any]:
    width = coverage.median_width
    return {
        "num_cases": coverage.num_cases,
        "num_covered": coverage.num_covered,
        "share": coverage.share,
        "median_width": width if math.isfinite(width) else None,
    }
