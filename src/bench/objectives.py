"""What one optimizer step learns: its loss, what that is the mean over, and what is logged of it.

OBJECTIVES is the registry. An objective is made for each step, and remembers what its last micro-batches have shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from bench.batching import num_trained_tokens
from bench.data import Example
from bench.logprobs import LOG_PROBS
from bench.loss import LOSSES, Batch, Phase
from planner.setup import TrainSetup


class Objective(Protocol):
    """`num_items` counts what all losses of a step are divided by: trained tokens, or pairs."""

    def loss(self, model: nn.Module, batch: Batch, num_items: float, phase: Phase) -> torch.Tensor:
        """One micro-batch's loss, summed over its items and divided by the step's `num_items`."""

    def num_items(self, rows: Sequence[Sequence[Example]]) -> int:
        """The items of some rows."""

    def take_metrics(self) -> dict[str, torch.Tensor]:
        """What there is to log of all micro-batches since the last call, each a mean over their items."""


class TokenObjective:
    """The cross-entropy of the trained tokens: sft, pretrain, mlm, seq2seq."""

    def __init__(self, setup: TrainSetup) -> None:
        self._loss = LOSSES[setup.loss]

    def loss(self, model: nn.Module, batch: Batch, num_items: float, phase: Phase) -> torch.Tensor:
        """See bench.loss."""
        return self._loss(model, batch, num_items, phase)

    def num_items(self, rows: Sequence[Sequence[Example]]) -> int:
        """Trained tokens."""
        return num_trained_tokens(rows)

    def take_metrics(self) -> dict[str, torch.Tensor]:
        """The loss says it all."""
        return {}


class PreferenceObjective:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, equation 7): the sigmoid loss.

    A row's reward is `dpo_beta` times the log probability of its answer's tokens, less what the model gave it before
    the first step (`reference_logps`, bench.reference). The loss of a pair is -log sigmoid of the chosen answer's
    reward less the rejected one's.
    """

    def __init__(self, setup: TrainSetup) -> None:
        self.beta = setup.dpo_beta
        self.log_probs = LOG_PROBS[setup.loss]
        self._rewards: list[torch.Tensor] = []

    def loss(self, model: nn.Module, batch: Batch, num_items: float, phase: Phase) -> torch.Tensor:
        """The batch holds the chosen conversations, then the rejected ones."""
        with phase("forward"):
            made = self.log_probs.forward(model, batch)
        with phase("loss"):
            rewards = self.beta * (self._sums(model, made, batch) - batch["reference_logps"])
            chosen, rejected = rewards.chunk(2)
            self._rewards.append(rewards.detach())
            return -functional.logsigmoid(chosen - rejected).sum() / num_items

    def logps(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The log probability of each row's labels together [rows], in float32."""
        return self._sums(model, self.log_probs.forward(model, batch), batch)

    def _sums(self, model: nn.Module, made: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self.log_probs.of(model, made, batch).sum(1)

    def num_items(self, rows: Sequence[Sequence[Example]]) -> int:
        """Pairs."""
        return sum(map(len, rows))

    def take_metrics(self) -> dict[str, torch.Tensor]:
        """Rewards of both answers, how far they are apart, and the share of pairs in which the chosen one's is higher."""
        if not self._rewards:
            return {}
        sides = zip(*(rewards.chunk(2) for rewards in self._rewards), strict=True)
        chosen, rejected = (torch.cat(side) for side in sides)
        self._rewards = []
        return {
            "rewards_chosen": chosen.mean(),
            "rewards_rejected": rejected.mean(),
            "rewards_margin": (chosen - rejected).mean(),
            "rewards_accuracy": (chosen > rejected).float().mean(),
        }


OBJECTIVES: dict[str, Callable[[TrainSetup], Objective]] = {
    "sft": TokenObjective,
    "pretrain": TokenObjective,
    "mlm": TokenObjective,
    "seq2seq": TokenObjective,
    "dpo": PreferenceObjective,
}
"""By the setup's `objective`; those that aren't here have no step."""
