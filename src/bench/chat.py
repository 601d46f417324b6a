"""A model's own answers to fixed held-out prompts, to be read before and after a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from bench.data import IGNORE_INDEX, Example
from bench.signals import StopRequestedError
from bench.step import never

MAX_NEW_TOKENS = 40
NUM_PROMPTS = 2
MAX_PROMPT_TOKENS = 512
TEXT_PROMPT_TOKENS = 16
"""What is shown of a plain text, which has no prompt of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One prompt, the data's own answer, and the model's."""

    prompt: str
    expected: str
    answer: str

    def to_dict(self) -> dict[str, str]:
        """Plain JSON values."""
        return asdict(self)


def sample_answers(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    num_prompts: int = NUM_PROMPTS,
    max_new_tokens: int = MAX_NEW_TOKENS,
    should_stop: Callable[[], bool] = never,
) -> list[Sample]:
    """Greedy answers to the first `num_prompts` examples.

    Changes neither the model nor the random generators. Asks `should_stop` between prompts and raises
    StopRequestedError.
    """
    was_training = model.training
    model.eval()
    samples = []
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for example in examples[:num_prompts]:
                if should_stop():
                    raise StopRequestedError
                samples.append(_answer(model, tokenizer, example, max_new_tokens))
    finally:
        model.train(was_training)
    return samples


def _answer(model: nn.Module, tokenizer: Any, example: Example, max_new_tokens: int) -> Sample:
    prompt_ids, expected_ids = _cut(example)
    device = next(model.parameters()).device
    input_ids = torch.tensor([prompt_ids], device=device)
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    answer_ids = output[0, len(prompt_ids) :].tolist()
    texts = [
        tokenizer.decode(ids, skip_special_tokens=True).strip()
        for ids in (prompt_ids, expected_ids, answer_ids)
    ]
    return Sample(prompt=texts[0], expected=texts[1], answer=texts[2])


def _cut(example: Example) -> tuple[list[int], list[int]]:
    """The tokens before the first trained one and the trained ones that follow; a plain text's first few."""
    ids, labels = example.input_ids.tolist(), example.labels.tolist()
    first = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(ids))
    if first <= 1:
        first = min(TEXT_PROMPT_TOKENS, len(ids))
    last = next((i for i in range(first, len(ids)) if labels[i] == IGNORE_INDEX), len(ids))
    return ids[max(0, first - MAX_PROMPT_TOKENS) : first], ids[first:last]
