"""Prediction from what was seen of others: conformal sets with groups that back off to wider ones.

If a new case is exchangeable with n seen ones, it lies above all of them with probability 1/(n+1), below all with
1/(n+1), and between them with (n-1)/(n+1) (Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World). So a
circle of n independent clusters speaks for a share (n-1)/(n+1) of the new case; what it leaves is spoken for by the
next wider circle, counted without it, and so on. A circle of one says nothing about spread and only widens the next.
Cases that aren't independent of each other form one cluster and share its weight.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

Cluster = Sequence[float]
"""Values that are not independent of each other."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """Where a new value lies: ascending `values` with their `weights`, and `unseen`, the mass outside all of them.

    Half of `unseen` is above the highest value and half below the lowest, falling off exponentially with the
    largest distance from zero that was seen; where nothing but zeros was seen it is at infinity.
    """

    values: tuple[float, ...]
    weights: tuple[float, ...]
    unseen: float
    _from_top: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        from_top = tuple(accumulate(reversed(self.weights), initial=self.unseen / 2))
        object.__setattr__(self, "_from_top", from_top[::-1])

    @property
    def scale(self) -> float:
        """How fast the unseen mass falls off."""
        return max(-self.values[0], self.values[-1]) if self.values else 0.0

    @property
    def median(self) -> float:
        """The middle of what was seen; 0 where nothing was."""
        return self._end(self.values, self.weights, 0.5) if self.values else 0.0

    def above(self, limit: float) -> float:
        """The probability of a value of at least `limit`."""
        if not self.values:
            return 0.5
        if limit > self.values[-1]:
            return self._tail(limit - self.values[-1])
        if limit < self.values[0]:
            return 1.0 - self._tail(self.values[0] - limit)
        return min(1.0, self._from_top[bisect_left(self.values, limit)])

    def interval(self, level: float) -> tuple[float, float]:
        """The central interval that holds a new value with probability `level`; infinite where too little is seen."""
        outside = (1.0 - level) / 2
        return -self._end(
            [-value for value in reversed(self.values)], self.weights[::-1], outside
        ), self._end(self.values, self.weights, outside)

    def _tail(self, distance: float) -> float:
        return self.unseen / 2 * (math.exp(-distance / self.scale) if self.scale else 1.0)

    def _end(self, values: Sequence[float], weights: Sequence[float], outside: float) -> float:
        """The least of `values` that at most `outside` of the mass exceeds, or a point beyond them."""
        beyond = self.unseen / 2
        if not values or (beyond > outside and not self.scale):
            return math.inf
        if beyond > outside:
            return values[-1] + self.scale * math.log(beyond / outside)
        for value, weight in zip(reversed(values), reversed(weights), strict=True):
            beyond += weight
            if beyond > outside:
                return value
        return values[0]


def predict(circles: Iterable[Sequence[Cluster]]) -> Distribution:
    """The distribution of a new value from circles of clusters, the narrowest first; none is in two circles."""
    unseen, mass = 1.0, dict[float, float]()
    for clusters in circles:
        count = len(clusters)
        if not count:
            continue
        for cluster in clusters:
            each = unseen * (count - 1) / (count + 1) / count / len(cluster)
            for value in cluster:
                mass[value] = mass.get(value, 0.0) + each
        unseen *= 2 / (count + 1)
    values = sorted(mass)
    return Distribution(tuple(values), tuple(mass[value] for value in values), unseen)
