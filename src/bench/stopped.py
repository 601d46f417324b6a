"""The batch at which a run stopped by itself, written down so that a person can see which row did it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bench.batching import micro_batch
from bench.data import Example, extra_readers
from bench.rundata import RunData
from bench.step import TrainStep
from planner.dataset import Row, Source
from planner.errors import DataError, FinefitError
from planner.files import write_atomically

FILE = "stopped-batch.json"


class DivergedError(FinefitError):
    """The loss is no number any more, or has blown up for good."""


def has_bad_numbers(loss: float, grad_norm: float | None, *, is_scaled: bool) -> bool:
    """Whether a step can't be taken. float16's loss scaling skips steps whose gradients overflow: that is no fault."""
    return not math.isfinite(loss) or not (grad_norm is None or is_scaled or math.isfinite(grad_norm))


def describe_batch(step: TrainStep, data: RunData, number: int, tokenizer: Any) -> list[dict[str, Any]]:
    """The rows of optimizer step `number` (from 0): what they say, and each one's loss by itself.

    `row` counts the data's rows from 1 and `place` is its file and line. The loss is the mean of the row's trained
    tokens, or the pair's, under the weights as they are now, without dropout; several ranks must all ask.
    """
    micro_batches = data.batches.step_rows(data.train, number)
    examples = [(at, example) for at, rows in enumerate(micro_batches) for row in rows for example in row]
    places = _places(data, [example.row for _, example in examples])
    losses = list(_losses(step, data, [example for _, example in examples]))
    return [
        {
            "row": example.row,
            "place": places.get(example.row),
            "micro_batch": at,
            "loss": plain_number(loss),
            "num_trained_tokens": example.num_trained_tokens,
            "token_ids": example.input_ids.tolist(),
            "text": tokenizer.decode(example.input_ids.tolist()),
            **_rejected(example, tokenizer),
        }
        for (at, example), loss in zip(examples, losses, strict=True)
    ]


def _rejected(example: Example, tokenizer: Any) -> dict[str, str]:
    """A pair's other answer."""
    if example.rejected is None:
        return {}
    return {"rejected_text": tokenizer.decode(example.rejected.input_ids.tolist())}


def write_stopped_batch(path: Path, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the file: the facts of the step, then its rows. Raises FinefitError."""
    numbers = {
        name: plain_number(value) if isinstance(value, float) else value for name, value in facts.items()
    }
    write_atomically(path, json.dumps({**numbers, "rows": rows}, indent=1, ensure_ascii=False) + "\n")


def plain_number(value: float) -> float | str:
    """JSON has no numbers for nan and inf: these as words."""
    return value if math.isfinite(value) else str(value)


def _losses(step: TrainStep, data: RunData, examples: Sequence[Example]) -> Iterator[float]:
    was_training, setup = step.model.training, data.setup.with_(compile=False)
    step.model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for example in examples:
                batch = micro_batch(setup, [[example]], pad_id=data.pad_id)
                on_device = {name: tensor.to(step.device) for name, tensor in batch.items()}
                yield float(step.forward(on_device, step.objective.num_items([[example]])))
    finally:
        step.model.train(was_training)


def _places(data: RunData, rows: Sequence[int | None]) -> dict[int | None, str]:
    """File and line of each row; nothing where the data can't be read any more."""
    wanted = {row for row in rows if row is not None}
    if not wanted or data.setup.data is None:
        return {}
    try:
        items = Source(data.setup.data, extra_readers()).rows_and_faults()
        first = islice(items, max(wanted))
        return {
            number: f"{item.path}:{item.line}"
            for number, item in enumerate(first, start=1)
            if number in wanted and isinstance(item, Row)
        }
    except (DataError, OSError):
        return {}
