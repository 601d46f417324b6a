"""Full fine-tuning: every weight trains."""

from __future__ import annotations

from planner.methods import Method
from planner.setup import TrainSetup


def words(setup: TrainSetup) -> str:
    """All there is."""
    return "all weights"


METHOD = Method(
    name="full",
    summary="every weight trains",
    trains_base=True,
    splits=True,
    words=words,
    learning_rate=2e-5,
    learning_rate_source="Stanford Alpaca and TRL's SFT default: 2e-5",
)
