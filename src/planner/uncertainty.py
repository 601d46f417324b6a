"""Does it fit? From a peak, its known error, and what the card can give to a probability and a verdict.

Verdict, in one sentence: *fits* if the chance that the run needs more than the card can give is at most 2 %,
*does-not-fit* if it is at least 50 %, *tight* in between.
"""

from __future__ import annotations

import math

from planner.results import Fit, Memory

FITS_BELOW = 0.02
FAILS_FROM = 0.50

RELATIVE_ERROR = {"single": 0.03, "sharded": 0.12}
"""Standard deviation of the closed form's allocated peak against published runs, by number of GPUs.
Source: reports/accuracy.md, exact lengths, plain kernels, all stacks; set above what was seen there because
the runs come from few projects."""

_NODES = 9
"""Points at which the share of fragmentation is averaged."""


def judge(memory: Memory, usable_bytes: int, num_gpus: int) -> Fit:
    """The verdict for a peak on a card that can give `usable_bytes` to torch, the context not yet taken off.

    Under pressure the allocator gives cached blocks back, so the run needs between allocated and reserved;
    any share of the fragmentation is taken as equally likely. `headroom_bytes` is against the middle.
    """
    available = usable_bytes - memory.terms["context"]
    allocated, fragmentation = memory.peak_allocated_bytes, memory.terms["fragmentation"]
    deviation = RELATIVE_ERROR["single" if num_gpus == 1 else "sharded"] * allocated
    shares = [(i + 0.5) / _NODES for i in range(_NODES)]
    chances = [_chance_above(available - share * fragmentation, allocated, deviation) for share in shares]
    probability = sum(chances) / _NODES
    return Fit(
        verdict=verdict(probability),
        usable_bytes=available,
        headroom_bytes=round(available - allocated - fragmentation / 2),
        probability=probability,
    )


def verdict(probability: float) -> str:
    """The word for a probability that the run needs more than there is."""
    if probability <= FITS_BELOW:
        return "fits"
    return "does-not-fit" if probability >= FAILS_FROM else "tight"


def _chance_above(limit: float, mean: float, deviation: float) -> float:
    """P(X > limit) for a normal X."""
    return 0.5 * math.erfc((limit - mean) / (deviation * math.sqrt(2)))
