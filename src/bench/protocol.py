"""How long a measurement warms up and how many optimizer steps it measures; docs/protocol.md has the sources. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIN_WARMUP, MAX_WARMUP = 2, 10
"""Optimizer states appear in the first step and are filled in the second, so two steps are the least."""
MIN_STEPS, MAX_STEPS = 10, 50
MAX_SPREAD = 0.05
"""Interquartile range over median up to which step times count as steady."""
MAX_MEASURE_S = 120.0
"""Seconds of measured steps after which no more than the least number is taken."""
NEW_RECORD = 0.05
"""A step that beats the fastest one before it by more than this share shows that the run is still getting faster."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepProtocol:
    """Warm-up until steps stop getting faster; measured steps until their spread is small, within both caps."""

    min_warmup: int = MIN_WARMUP
    max_warmup: int = MAX_WARMUP
    min_steps: int = MIN_STEPS
    max_steps: int = MAX_STEPS
    max_spread: float = MAX_SPREAD
    max_measure_s: float = MAX_MEASURE_S

    @classmethod
    def of(cls, *, warmup: int | None = None, steps: int | None = None) -> StepProtocol:
        """The default protocol, with exactly `warmup` steps before and `steps` measured ones where these are given."""
        return cls(
            min_warmup=MIN_WARMUP if warmup is None else warmup,
            max_warmup=MAX_WARMUP if warmup is None else warmup,
            min_steps=MIN_STEPS if steps is None else steps,
            max_steps=MAX_STEPS if steps is None else steps,
        )

    def is_warm(self, step_wall_s: Sequence[float]) -> bool:
        """Whether the warm-up steps so far suffice: the last one sets no new record."""
        done = len(step_wall_s)
        if done < self.min_warmup or done >= self.max_warmup:
            return done >= self.max_warmup
        return done > 1 and step_wall_s[-1] >= (1 - NEW_RECORD) * min(step_wall_s[:-1])

    def is_measured(self, step_wall_s: Sequence[float]) -> bool:
        """Whether the measured steps so far suffice."""
        done = len(step_wall_s)
        if done < self.min_steps or done >= self.max_steps:
            return done >= self.max_steps
        return sum(step_wall_s) >= self.max_measure_s or relative_spread(step_wall_s) <= self.max_spread


def relative_spread(values: Sequence[float]) -> float:
    """Interquartile range / median of at least one value; 0 where the median is 0."""
    import numpy as np

    q1, median, q3 = np.percentile(values, (25, 50, 75))
    return float((q3 - q1) / median) if median > 0 else 0.0
