"""When a training loss has blown up for good, told apart from noise and from spikes that pass."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

WINDOW = 50
"""Losses whose median and spread say what is usual: the median of fewer moves too much by itself."""
SUSTAINED = 20
"""Losses in a row that must all be too high. Spikes that pass are common in healthy runs and last a few steps."""
SPREADS = 6.0
"""How many spreads above the median is too high. By Chebyshev's inequality at most 1 in 36 losses of any one
distribution lie that far off, so 20 in a row by chance have a probability of 36**-20 at most."""
BEGINNING = 5
"""Losses whose median says where the run began: while the learning rate warms up, little is learned."""
MAD_TO_SPREAD = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""


@dataclass(slots=True)
class Divergence:
    """Looks at one loss after another.

    Too high is above the best stretch of the run by SPREADS, and also above where the run began: a model that is
    worse than before training, for SUSTAINED steps, isn't learning. The second bound holds where the spread is
    nearly nothing, as on data that is learned by heart; the best stretch, and not the latest, catches a slow climb.
    The fields are plain values, so that a checkpoint can carry them.
    """

    begin: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    window: list[float] = field(default_factory=list)
    best: tuple[float, float] | None = None

    def see(self, loss: float) -> str | None:
        """Take a step's loss; why the run has diverged, None while it hasn't."""
        if len(self.begin) < BEGINNING:
            self.begin.append(loss)
        self.recent.append(loss)
        self.window += self.recent[:-SUSTAINED]
        del self.recent[:-SUSTAINED], self.window[:-WINDOW]
        if len(self.window) < WINDOW:
            return None
        self.best = min(self.best or (math.inf, 0.0), _middle(self.window))
        return self._verdict()

    def _verdict(self) -> str | None:
        assert self.best is not None
        median, spread = self.best
        began = statistics.median(self.begin)
        limit = max(median + SPREADS * spread, began)
        if min(self.recent) <= limit:
            return None
        return (
            f"the last {SUSTAINED} losses are all above {limit:.4g}; it began at {began:.4g} and its best "
            f"{WINDOW} steps had {median:.4g} (spread {spread:.2g})"
        )


def _middle(losses: list[float]) -> tuple[float, float]:
    """The median, and the spread as a standard deviation would say it."""
    median = statistics.median(losses)
    return median, MAD_TO_SPREAD * statistics.median(abs(loss - median) for loss in losses)
