"""Examples -> batches: packing, the order of an epoch, random access by step."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bench.data import IGNORE_INDEX, Example
from bench.documents import locate
from planner.packing import pack
from planner.setup import TrainSetup

if TYPE_CHECKING:
    import torch


def epoch_order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """The numbers 0 … num_rows - 1 shuffled; depends on (seed, epoch) alone.

    Sorts by raw bits of a counter-based generator, whose stream, unlike `Generator.permutation`, numpy
    promises never to change; so a resumed run keeps its order under a later numpy.
    """
    bits = np.random.Philox(key=[seed, epoch]).random_raw(num_rows)
    return [int(number) for number in np.argsort(bits, kind="stable")]


_recent_order = functools.lru_cache(maxsize=2)(epoch_order)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """Which examples each optimizer step sees, with random access by step.

    `rows` holds the example indices of each sequence: one index without packing, several with it. Rows are packed
    once, so every epoch has the same number of steps; only their order changes. The last global batch of an
    epoch holds what is left (fewer micro-batches, a smaller last one): nothing is dropped or seen twice.
    """

    rows: tuple[tuple[int, ...], ...]
    micro_batch_size: int
    grad_accum_steps: int
    seed: int

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        *,
        seq_len: int,
        packing: bool,
        micro_batch_size: int,
        grad_accum_steps: int,
        seed: int,
    ) -> BatchPlan:
        """The plan of a data set; without packing a row is an example."""
        numbers = (
            pack([e.num_tokens for e in examples], seq_len)
            if packing
            else [[n] for n in range(len(examples))]
        )
        return cls(
            rows=tuple(map(tuple, numbers)),
            micro_batch_size=micro_batch_size,
            grad_accum_steps=grad_accum_steps,
            seed=seed,
        )

    @property
    def num_steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data."""
        return -(-len(self.rows) // (self.micro_batch_size * self.grad_accum_steps))

    def micro_batches(self, step: int) -> list[list[int]]:
        """Row numbers (indices into `rows`) of each micro-batch of optimizer step `step`, counted from 0 over
        all epochs: epoch = step // num_steps_per_epoch.
        """
        epoch, step_in_epoch = divmod(step, self.num_steps_per_epoch)
        global_size = self.micro_batch_size * self.grad_accum_steps
        order = _recent_order(len(self.rows), self.seed, epoch)
        chosen = order[step_in_epoch * global_size : (step_in_epoch + 1) * global_size]
        size = self.micro_batch_size
        return [chosen[at : at + size] for at in range(0, len(chosen), size)]

    def step_rows(self, examples: Sequence[Example], step: int) -> list[list[list[Example]]]:
        """The same as examples: micro-batch -> row -> documents; each micro-batch is ready for `collate`."""
        return [
            [[examples[number] for number in self.rows[row]] for row in micro_batch]
            for micro_batch in self.micro_batches(step)
        ]


MOST_TRAINED = 0.9
"""Above this share of positions that train, the loss reads all rows: picking some would spare too little."""


def micro_batch(setup: TrainSetup, rows: Sequence[Sequence[Example]], *, pad_id: int) -> dict[str, Any]:
    """One micro-batch as the setup trains or evaluates on it: `collate`'s, and what its loss and attention need.

    `trained_rows` numbers the positions (rows one after the other) whose next token is trained, where the loss can
    leave out the others; a padding-free batch has `documents` (`bench.documents`).
    """
    if setup.joins_rows:
        examples = [example for row in rows for example in row]
        batch = _joined(examples)
        if setup.attention == "sdpa":
            batch["documents"] = locate([example.num_tokens for example in examples])
    else:
        # compiled layers need one shape
        seq_len = setup.seq_len if setup.compile else None
        batch = collate(rows, pad_id=pad_id, seq_len=seq_len, packing=setup.packing)
    if setup.loss != "full":
        trained = _trained_rows(batch["labels"].numpy())
        batch.update({} if trained is None else {"trained_rows": trained})
    return batch


def _joined(examples: Sequence[Example]) -> dict[str, Any]:
    """All documents in one row, without padding."""
    import torch

    batch = {
        "input_ids": np.concatenate([example.input_ids for example in examples]),
        "labels": np.concatenate([example.labels for example in examples]),
        "position_ids": np.concatenate([np.arange(example.num_tokens) for example in examples]),
    }
    return {name: torch.from_numpy(array.astype(np.int64))[None] for name, array in batch.items()}


def _trained_rows(labels: npt.NDArray[np.int64]) -> torch.Tensor | None:
    """Positions whose next token has a label, among those of all rows; None where nearly all have."""
    import torch

    shifted = np.full_like(labels, IGNORE_INDEX)
    shifted[:, :-1] = labels[:, 1:]
    found = np.flatnonzero(shifted.reshape(-1) != IGNORE_INDEX)
    return torch.from_numpy(found) if len(found) < MOST_TRAINED * labels.size else None


def collate(
    rows: Sequence[Sequence[Example]], *, pad_id: int, seq_len: int | None = None, packing: bool = False
) -> dict[str, torch.Tensor]:
    """One micro-batch as int64 tensors of shape [rows, longest row, or seq_len where given]: `input_ids`,
    `labels`, `position_ids`, and `attention_mask` only where there is padding and no packing.

    Packed: position_ids restart with each document and there is no mask (a mask, or use_cache=True, would let
    documents see each other); padding at the end is a document of its own without labels. Padding is told by
    its place, never by its id, so an end token that is also the pad token keeps its label.

    Pairs: all chosen answers, then all rejected ones, and `reference_logps` (float32, one for each row). Raises ValueError
    when a row is longer than seq_len, or holds several documents without packing.
    """
    import torch

    rows = sequences(rows)
    lengths = [sum(example.num_tokens for example in row) for row in rows]
    width = max(lengths) if seq_len is None else seq_len
    if max(lengths) > width:
        raise ValueError(f"a row has {max(lengths)} tokens, more than seq_len {seq_len}")
    if not packing and any(len(row) != 1 for row in rows):
        raise ValueError("several documents in one row need packing")
    batch: dict[str, np.ndarray[Any, Any]] = {
        "input_ids": np.full((len(rows), width), pad_id, dtype=np.int64),
        "labels": np.full((len(rows), width), IGNORE_INDEX, dtype=np.int64),
        "position_ids": np.zeros((len(rows), width), dtype=np.int64),
    }
    for number, row in enumerate(rows):
        at = 0
        for example in row:
            part = (number, slice(at, at + example.num_tokens))
            batch["input_ids"][part] = example.input_ids
            batch["labels"][part] = example.labels
            batch["position_ids"][part] = np.arange(example.num_tokens)
            at += example.num_tokens
        batch["position_ids"][number, at:] = np.arange(width - at)
    if not packing and min(lengths) < width:
        batch["attention_mask"] = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    if rows[0][0].reference_logp is not None:
        batch["reference_logps"] = np.array([row[0].reference_logp for row in rows], dtype=np.float32)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def sequences(rows: Sequence[Sequence[Example]]) -> Sequence[Sequence[Example]]:
    """What the model reads of the rows: pairs as the chosen conversations, then the rejected ones."""
    if rows[0][0].rejected is None:
        return rows
    sides = zip(*(row[0].sequences for row in rows), strict=True)
    return [[example] for side in sides for example in side]


def num_real_tokens(rows: Sequence[Sequence[Example]]) -> int:
    """Tokens that are not padding."""
    return sum(example.num_tokens for row in rows for example in row)


def num_trained_tokens(rows: Sequence[Sequence[Example]]) -> int:
    """Tokens that give a loss; sum it over the micro-batches of a step to normalise the loss."""
    return sum(example.num_trained_tokens for row in rows for example in row)
