"""When a run is examined: held-out loss and answers to fixed prompts, before, after and on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.chat import sample_answers
from bench.data import Example
from bench.early_stop import Evaluations, HeldOut
from bench.rundata import RunData
from bench.step import TrainStep


@dataclass(frozen=True, kw_only=True, slots=True)
class Exam:
    """The rule of a run of `num_steps` steps, and its prompts; None asks the first held-out rows."""

    num_steps: int
    rule: HeldOut
    prompts: Sequence[Example] | None = None

    def is_due(self, step: int) -> bool:
        """Before, after, and as often as was asked for."""
        every = self.rule.every_steps
        return step in (0, self.num_steps) or (every is not None and step % every == 0)

    def is_over(self, evaluations: Evaluations) -> bool:
        """Whether the run ends before its last step."""
        return self.rule.is_over(evaluations)

    def answers(self, step: TrainStep, model: Any, tokenizer: Any, data: RunData) -> list[dict[str, str]]:
        """The model's answers to the prompts. Raises StopRequestedError."""
        own = self.prompts
        examples = (data.held_out or data.train) if own is None else own
        more = {} if own is None else {"num_prompts": len(own)}
        samples = sample_answers(model, tokenizer, examples, should_stop=step.should_stop, **more)
        return [sample.to_dict() for sample in samples]
