"""Rows to measure with: random ones of the full length, and one batch's worth for an evaluation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from planner.setup import TrainSetup

if TYPE_CHECKING:
    import torch

    from bench.data import Example
    from bench.rundata import RunData, StepBatch

RANDOM_STEPS = 3
"""Optimizer steps with rows of their own; later steps see them again."""
DOCUMENTS_PER_PACKED_ROW = 2
"""Enough for the mask that keeps the documents of a row apart."""


def random_data(setup: TrainSetup, model: Any) -> RunData:
    """Rows of `seq_len` random tokens of the model's vocabulary that all train: the worst case of any data.

    Packed rows hold several documents, of equal lengths.
    """
    from bench.build import inner_model
    from bench.rundata import RunData, plan_batches

    generator = np.random.default_rng(setup.seed)
    vocab_size = inner_model(model).get_input_embeddings().weight.shape[0]
    per_row = DOCUMENTS_PER_PACKED_ROW if setup.packing else 1
    num_rows = RANDOM_STEPS * setup.micro_batch_size * setup.grad_accum_steps * per_row
    num_held_out = (setup.eval_batch_size or setup.micro_batch_size) * per_row
    draw = partial(_random_row, generator, setup, vocab_size)
    train = [draw(number) for number in range(num_rows)]
    return RunData(
        setup=setup,
        train=train,
        held_out=[draw(-number) for number in range(1, num_held_out + 1)],
        batches=plan_batches(setup, train),
        sha256="random",
        pad_id=0,
        facts={},
    )


def _random_row(generator: np.random.Generator, setup: TrainSetup, vocab_size: int, number: int) -> Example:
    """A row, or a pair of rows with a reference of 0."""
    from bench.data import IGNORE_INDEX, Example

    length = setup.seq_len // (DOCUMENTS_PER_PACKED_ROW if setup.packing else 1)
    rows = []
    for _ in range(setup.sequences_per_row):
        ids = generator.integers(0, vocab_size, length, dtype=np.int32)
        labels = ids.copy()
        labels[0] = IGNORE_INDEX
        rows.append(Example(input_ids=ids, labels=labels, group=str(number)))
    if len(rows) == 1:
        return rows[0]
    chosen, rejected = (replace(row, reference_logp=0.0) for row in rows)
    return replace(chosen, rejected=rejected)


def worst_batch(data: RunData, device: torch.device) -> StepBatch:
    """One optimizer step with the longest rows of the data: what needs the most memory."""
    rows = data.batches.rows
    lengths = [sum(data.train[number].width for number in row) for row in rows]
    size = data.setup.micro_batch_size * data.setup.grad_accum_steps
    longest = sorted(range(len(rows)), key=lambda row: -lengths[row])[:size]
    batches = replace(data.batches, rows=tuple(rows[row] for row in longest))
    return replace(data, batches=batches).step_batch(0, device)


def eval_examples(data: RunData) -> list[Example]:
    """The longest held-out examples (training ones where none are held out) that fill one evaluation batch."""
    setup = data.setup
    num_rows = setup.eval_batch_size or setup.micro_batch_size
    longest_first = sorted(data.held_out or data.train, key=lambda example: -example.width)
    if not setup.packing:
        return longest_first[:num_rows]
    chosen, num_tokens = [], 0
    for example in longest_first:
        if num_tokens + example.num_tokens > num_rows * setup.seq_len:
            break
        chosen.append(example)
        num_tokens += example.num_tokens
    return chosen or longest_first[:1]
