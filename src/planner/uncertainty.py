"""Does it fit? From a peak, the errors of published runs, and what the card can give to a probability and a verdict.

Verdict, in one sentence: *fits* if the chance that the run needs more than the card can give is at most 2 %,
*does-not-fit* if it is at least 50 %, *tight* in between.

Two things are uncertain. The allocated peak: its error is distributed as in published runs, by conformal
prediction (planner.conformal, planner.residuals); no constant stands for it. And what the allocator loses to holes
between blocks when the card is full (planner.pressure).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from planner.conformal import Distribution
from planner.pressure import overheads
from planner.residuals import Kind, Support, distribution, kind_of, published_runs, support
from planner.results import Fit, Interval, Memory
from planner.setup import TrainSetup

FITS_BELOW = 0.02
FAILS_FROM = 0.50

LEVEL = 0.90
"""Of the interval that is printed."""
RESOLUTION = 0.001
"""Intervals are rounded outwards to this share: published peaks aren't known better."""


class Uncertainty:
    """What is known of the error of one setup's peak; the same for every batch and length."""

    def __init__(
        self,
        setup: TrainSetup,
        *,
        on_gpu: bool = True,
        source: str = "analytic",
        errors: Distribution | None = None,
    ) -> None:
        """`source` is the estimate's: analytic or trace. `errors` replaces what the published runs say."""
        self._setup, self._on_gpu = setup, on_gpu
        self._is_own = bool(published_runs(source))
        self._known = _known(source if self._is_own else "analytic", kind_of(setup))
        if errors is not None:
            self._known = replace(self._known, errors=errors, ratios=_ratios(errors))

    def judge(self, memory: Memory, usable_bytes: int) -> Fit:
        """The verdict on a card that can give `usable_bytes` to the process, the context not yet taken off.

        `headroom_bytes` is against the middle of what the run may need.
        """
        available = usable_bytes - memory.terms["context"]
        beyond = overheads(self._setup, memory, on_gpu=self._on_gpu)
        allocated = memory.peak_allocated_bytes
        probability = sum(self._chance_above(available - lost, allocated) for lost in beyond) / len(beyond)
        middle = allocated * math.exp(self._known.errors.median) + beyond[len(beyond) // 2]
        return Fit(
            verdict=verdict(probability),
            usable_bytes=available,
            headroom_bytes=round(available - middle),
            probability=probability,
        )

    def interval(self, memory: Memory) -> Interval:
        """The interval of the allocated peak; an end is None where the published runs don't bound it."""
        low, high = self.ratios
        peak = memory.peak_allocated_bytes
        return Interval(
            level=LEVEL,
            low_peak_allocated_bytes=round(peak * low) if low > 0 else None,
            high_peak_allocated_bytes=None if math.isinf(high) else round(peak * high),
        )

    @property
    def ratios(self) -> tuple[float, float]:
        """The interval of measured over predicted peak; from 0 or to infinity where there is no bound."""
        return self._known.ratios

    @property
    def note(self) -> str:
        """What the interval was learnt from, in words."""
        if self._is_own:
            return self._known.note
        return f"{self._known.note}; errors of the closed form, since the trace's own are not collected"

    def _chance_above(self, limit: float, allocated: int) -> float:
        """P(peak > limit) when `allocated` was predicted."""
        if allocated <= 0:
            return 0.0 if limit >= 0 else 1.0
        return self._known.errors.above(math.log(limit / allocated)) if limit > 0 else 1.0


def verdict(probability: float) -> str:
    """The word for a probability that the run needs more than there is."""
    if probability <= FITS_BELOW:
        return "fits"
    return "does-not-fit" if probability >= FAILS_FROM else "tight"


@dataclass(frozen=True, slots=True)
class _Known:
    errors: Distribution
    ratios: tuple[float, float]
    note: str


@functools.cache
def _known(source: str, kind: Kind) -> _Known:
    runs = published_runs(source)
    errors = distribution(runs, kind)
    return _Known(errors, _ratios(errors), _note(support(runs, kind)))


def _ratios(errors: Distribution) -> tuple[float, float]:
    """The interval, rounded outwards."""
    low, high = errors.interval(LEVEL)
    steps_down, steps_up = math.expm1(low) / RESOLUTION, math.expm1(high) / RESOLUTION
    return (
        1.0 + RESOLUTION * math.floor(steps_down),
        1.0 + RESOLUTION * math.ceil(steps_up) if math.isfinite(steps_up) else math.inf,
    )


def _note(found: Support | None) -> str:
    if found is None:
        return "no published run tells how far off this is"
    projects = "one project" if found.num_projects == 1 else f"{found.num_projects} projects"
    runs = f"{found.num_runs} published runs of {found.num_shapes} shapes by {projects}"
    learnt = f"interval and odds from {runs} ({found.words}), widened by less similar ones"
    return learnt if found.is_narrowest else f"no published run of this kind: {learnt}"
