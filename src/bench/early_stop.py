"""Held-out losses along a run: which evaluation is the best, and when further training is pointless.

Both follow from the evaluations alone, which a checkpoint carries, so a resumed run decides as it would have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from planner.errors import UsageError

Evaluations = Sequence[Mapping[str, Any]]
"""Each with `step` and `loss`, in the order of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """How a run uses its held-out loss.

    It ends after `patience` evaluations in a row without a lower loss (None: never before its end). With
    `keep_best` the checkpoint of the best evaluation stays, and the artifact is made of it.
    """

    every_steps: int | None = None
    patience: int | None = None
    keep_best: bool = False

    def check(self, has_data: bool) -> None:
        """Raise UsageError where what is asked for has no evaluations to go by."""
        for name, is_asked in (("--patience", self.patience is not None), ("--keep-best", self.keep_best)):
            if is_asked and not has_data:
                raise UsageError(f"{name} needs held-out rows: set eval_fraction above 0")
            if is_asked and self.every_steps is None:
                raise UsageError(f"{name} needs --eval-every STEPS")

    def is_over(self, evaluations: Evaluations) -> bool:
        """Whether the last `patience` evaluations brought no lower loss."""
        if self.patience is None or not evaluations:
            return False
        return len(evaluations) - 1 - evaluations.index(_lowest(evaluations)) >= self.patience

    def best_step(self, evaluations: Evaluations) -> int | None:
        """The step whose weights to keep; None where that isn't wanted, or nothing trained was evaluated yet."""
        trained = [entry for entry in evaluations if entry["step"] > 0]
        return int(_lowest(trained)["step"]) if self.keep_best and trained else None


def _lowest(evaluations: Evaluations) -> Mapping[str, Any]:
    """The first of the lowest; a loss that is no number is never the lowest."""
    return min(evaluations, key=lambda entry: math.inf if math.isnan(entry["loss"]) else float(entry["loss"]))
