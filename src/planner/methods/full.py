"""Full fine-tuning: every weight trains."""

from __future__ import annotations

from planner.methods import Method
from planner.setup import TrainSetup
from planner.specs import Matrix


def adapter_params(matrix: Matrix, setup: TrainSetup) -> int:
    """Nothing is added."""
    return 0


def peft_config(setup: TrainSetup) -> None:
    """PEFT has no part in it."""
    return


METHOD = Method(
    name="full",
    summary="every weight trains",
    trains_base=True,
    quantises_base=False,
    adapter_params=adapter_params,
    peft_config=peft_config,
    learning_rate=2e-5,
    learning_rate_source="Stanford Alpaca and TRL's SFT default: 2e-5",
)
