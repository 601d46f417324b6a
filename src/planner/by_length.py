"""What fits by length: one setup at growing sequence lengths, as far as a little beyond what the card gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from planner.estimate import Estimator
from planner.results import Estimate, Fit
from planner.setup import TrainSetup
from planner.specs import Machine, ModelSpec

SHORTEST, LONGEST = 128, 131_072
"""Tokens; a model's own limit comes first."""
MOST_OF_CARD = 1.5
"""Lengths that need more than this many times what the card gives are left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthRow:
    """One length: what is needed of the card, and the verdict."""

    seq_len: int
    needed_bytes: int
    fit: Fit

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        probability = self.fit.probability
        return {
            "seq_len": self.seq_len,
            "needed_bytes": self.needed_bytes,
            "verdict": self.fit.verdict,
            "probability": probability,
        }


def by_length(
    setup: TrainSetup,
    machine: Machine,
    model: ModelSpec | None = None,
    *,
    micro_batch_size: int | None = None,
) -> list[LengthRow]:
    """Doubling lengths and the setup's own, the shortest first. Raises as `estimate` does."""
    estimator = Estimator(setup, machine, model)
    size = micro_batch_size or setup.micro_batch_size
    rows: list[LengthRow] = []
    for seq_len in _lengths(setup, estimator.model):
        found = estimator.at(size, seq_len)
        needed, usable = needed_bytes(found), found.fit.usable_bytes
        if rows and usable is not None and needed > MOST_OF_CARD * usable:
            break
        rows.append(LengthRow(seq_len=seq_len, needed_bytes=needed, fit=found.fit))
    return rows


def _lengths(setup: TrainSetup, model: ModelSpec) -> list[int]:
    limit = min(model.max_positions or LONGEST, LONGEST)
    doubling = {SHORTEST << power for power in range(LONGEST.bit_length()) if SHORTEST << power <= limit}
    return sorted(doubling | {setup.seq_len})


def needed_bytes(found: Estimate) -> int:
    """What is held against what the card can give; all that the device shows where that is unknown."""
    fit = found.fit
    if fit.usable_bytes is None or fit.headroom_bytes is None:
        return found.memory.device_used_bytes
    return fit.usable_bytes - fit.headroom_bytes
