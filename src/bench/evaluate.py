"""Loss, perplexity and accuracy on held-out examples, per trained token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bench.accuracy import counting_hits
from bench.batching import micro_batch, num_trained_tokens
from bench.data import Example
from bench.signals import StopRequestedError
from bench.step import TrainStep
from bench.world import ALONE, World
from planner.packing import pack
from planner.setup import TrainSetup


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """`loss` is the objective's: the mean cross-entropy (nats) of the trained tokens, with `perplexity` its exponential and
    `token_accuracy` the share of them that the model holds for the likeliest (None where the loss doesn't show its
    logits); or that of pairs of answers, with their `rewards`.
    """

    loss: float
    num_trained_tokens: int
    num_examples: int
    perplexity: float | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    token_accuracy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what the objective doesn't have is not there."""
        values = asdict(self)
        rewards = values.pop("rewards")
        return {name: value for name, value in {**values, **rewards}.items() if value is not None}

    @property
    def text(self) -> str:
        """In a few words."""
        figures = {"loss": f"{self.loss:.3f}"}
        if self.perplexity is not None:
            figures["perplexity"] = f"{self.perplexity:.2f}"
        if self.token_accuracy is not None:
            figures["token accuracy"] = f"{self.token_accuracy:.1%}"
        figures |= {name.replace("_", " "): f"{value:.3f}" for name, value in self.rewards.items()}
        return ", ".join(f"{name} {value}" for name, value in figures.items())


def evaluate(
    step: TrainStep, examples: Sequence[Example], *, pad_id: int, world: World = ALONE
) -> Evaluation:
    """The model's loss on `examples` (at least one) with the step's own loss and autocast, shared by all ranks.

    Changes neither the model nor the random generators. Asks the step's `should_stop` between batches and
    raises StopRequestedError.
    """
    total_loss, num_trained, num_items, num_right = 0.0, 0, 0, 0
    step.objective.take_metrics()
    was_training = step.model.training
    step.model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            batches = list(eval_rows(step.setup, examples))
            for own in world.share(batches):
                rows = own or batches[0]
                batch = micro_batch(step.setup.with_(compile=False), rows, pad_id=pad_id)
                on_device = {name: tensor.to(step.device) for name, tensor in batch.items()}
                with counting_hits() as hits:
                    loss = float(step.forward(on_device, 1))
                if own is not None:
                    total_loss += loss
                    num_trained += num_trained_tokens(rows)
                    num_items += step.objective.num_items(rows)
                    num_right += int(sum(hits))
                if step.should_stop():
                    raise StopRequestedError
    finally:
        step.model.train(was_training)
    total_loss, total_trained, total_items, total_right = world.total(
        total_loss, num_trained, num_items, num_right
    )
    loss, num_trained = total_loss / total_items, int(total_trained)
    rewards = {name: float(value) for name, value in step.objective.take_metrics().items()}
    return Evaluation(
        loss=loss,
        perplexity=None if rewards else math.exp(loss) if loss < 700 else math.inf,
        rewards=rewards,
        num_trained_tokens=num_trained,
        num_examples=len(examples),
        token_accuracy=total_right / total_trained if hits and not rewards else None,
    )


def eval_rows(setup: TrainSetup, examples: Sequence[Example]) -> Iterator[list[list[Example]]]:
    """The examples batch by batch, in rows as the setup packs them; longest first, so that little is padded."""
    if setup.packing:
        lengths = [example.num_tokens for example in examples]
        rows = [[examples[i] for i in row] for row in pack(lengths, setup.seq_len)]
    else:
        rows = [[example] for example in sorted(examples, key=lambda example: -example.width)]
    size = setup.eval_batch_size or setup.micro_batch_size
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
