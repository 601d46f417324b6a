"""Robust statistics of repeated timings: medians, intervals by resampling, a rank test. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

LEVEL = 0.95
NUM_RESAMPLES = 4000
MAX_EXACT_PAIRS = 2500
"""Above this many pairs of samples the normal approximation of the rank test is exact enough."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Step times. `low_s`/`high_s`: 95 % interval of the median (None for fewer than 2 steps)."""

    num_samples: int
    median_s: float
    p10_s: float
    p90_s: float
    iqr_s: float
    low_s: float | None
    high_s: float | None

    @property
    def relative_spread(self) -> float:
        """Interquartile range / median."""
        return self.iqr_s / self.median_s if self.median_s > 0 else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """median(b) / median(a) with its 95 % interval, and the chance of such ranks if a and b were alike."""

    ratio: float
    low_ratio: float
    high_ratio: float
    p_value: float


def summarise(samples_s: Sequence[float], *, seed: int = 0) -> Timing:
    """The summary of step times in seconds. Raises ValueError without finite samples."""
    values = _checked(samples_s)
    p10, q1, median, q3, p90 = np.percentile(values, (10, 25, 50, 75, 90))
    low, high = (None, None)
    if len(values) > 1:
        low, high = _interval(_resampled_medians(values, np.random.default_rng(seed)))
    return Timing(
        num_samples=len(values),
        median_s=float(median),
        p10_s=float(p10),
        p90_s=float(p90),
        iqr_s=float(q3 - q1),
        low_s=low,
        high_s=high,
    )


def median_ratio(a_s: Sequence[float], b_s: Sequence[float], *, seed: int = 0) -> Ratio:
    """How many times longer b takes than a. Raises ValueError without finite, positive samples."""
    a, b = _checked(a_s), _checked(b_s)
    if a.min() <= 0 or b.min() <= 0:
        raise ValueError("step times must be positive")
    generator = np.random.default_rng(seed)
    low, high = _interval(_resampled_medians(b, generator) / _resampled_medians(a, generator))
    return Ratio(
        ratio=float(np.median(b) / np.median(a)), low_ratio=low, high_ratio=high, p_value=mann_whitney(a, b)
    )


def mann_whitney(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> float:
    """Two-sided p-value of the rank-sum test that a and b come from one distribution.

    Exact for few samples without ties; else the normal approximation with corrections for ties and continuity
    (Mann and Whitney 1947; ties as in Lehmann, Nonparametrics, 1975).
    """
    a, b = _checked(a), _checked(b)
    pairs = np.sign(b[:, None] - a[None, :])
    wins = float((pairs + 1).sum() / 2)
    _, tie_sizes = np.unique(np.concatenate((a, b)), return_counts=True)
    if tie_sizes.max() == 1 and len(a) * len(b) <= MAX_EXACT_PAIRS:
        return _exact_p(len(a), len(b), round(wins))
    return _normal_p(len(a), len(b), wins, tie_sizes)


def drift(samples_s: Sequence[float]) -> float:
    """median of the last third / median of the first third - 1: above 0 where steps get slower while it runs."""
    values = _checked(samples_s)
    third = max(1, len(values) // 3)
    first = float(np.median(values[:third]))
    return float(np.median(values[-third:])) / first - 1 if first > 0 else 0.0


def _checked(samples: Sequence[float] | Floats) -> Floats:
    values = np.asarray(samples, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError("needs at least one sample, all of them finite")
    return values


def _resampled_medians(values: Floats, generator: np.random.Generator) -> Floats:
    picks = generator.integers(0, len(values), size=(NUM_RESAMPLES, len(values)))
    medians: Floats = np.median(values[picks], axis=1)
    return medians


def _interval(estimates: Floats) -> tuple[float, float]:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(estimates, (tail, 100 - tail))
    return float(low), float(high)


def _exact_p(num_a: int, num_b: int, wins: int) -> float:
    """Two-sided tail of the number of pairs that b wins, over all orders of the samples."""
    counts = _orders_by_wins(num_a, num_b)
    tail = min(wins, num_a * num_b - wins)
    total = sum(counts)
    return min(1.0, 2 * sum(counts[: tail + 1]) / total)


def _orders_by_wins(num_a: int, num_b: int) -> list[int]:
    """counts[u]: orders of num_a + num_b samples in which u pairs are won (Gaussian binomial coefficients)."""
    counts = [1] + [0] * (num_a * num_b)
    for i in range(1, num_b + 1):
        for u in range(len(counts) - 1, num_a + i - 1, -1):
            counts[u] -= counts[u - num_a - i]
        for u in range(i, len(counts)):
            counts[u] += counts[u - i]
    return counts


def _normal_p(num_a: int, num_b: int, wins: float, tie_sizes: npt.NDArray[np.int64]) -> float:
    total = num_a + num_b
    ties = float((tie_sizes**3 - tie_sizes).sum()) / (total * (total - 1)) if total > 1 else 0.0
    variance = num_a * num_b / 12 * (total + 1 - ties)
    if variance <= 0:
        return 1.0
    distance = max(0.0, abs(wins - num_a * num_b / 2) - 0.5)
    return math.erfc(distance / math.sqrt(2 * variance))
