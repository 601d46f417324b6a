"""Examples -> batches: packing, order of an epoch, random access by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.data import Example

if TYPE_CHECKING:
    import torch


def epoch_order(num_examples: int, seed: int, epoch: int) -> list[int]:
    """The numbers 0 … num_examples - 1 shuffled; depends on (seed, epoch) alone."""
    raise NotImplementedError


def pack(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Indices of `lengths` in rows of at most `seq_len` tokens (best-fit decreasing)."""
    raise NotImplementedError


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """Which examples each optimizer step sees, with random access by step.

    `rows` holds the example indices of each sequence: one index without packing, several with it.
    The last global batch of an epoch may be short (fewer micro-batches, a smaller last one); nothing is dropped.
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
        """The plan of a data set; packed once, so that every epoch has the same number of steps."""
        raise NotImplementedError

    @property
    def num_steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data."""
        raise NotImplementedError

    def micro_batches(self, step: int) -> list[list[int]]:
        """Row numbers (indices into `rows`) of each micro-batch of optimizer step `step`, counted from 0 over
        all epochs: epoch = step // num_steps_per_epoch.
        """
        raise NotImplementedError

    def step_rows(self, examples: Sequence[Example], step: int) -> list[list[list[Example]]]:
        """The same as examples: micro-batch -> row -> documents; each micro-batch is ready for `collate`."""
        raise NotImplementedError


def collate(
    rows: Sequence[Sequence[Example]], *, pad_id: int, seq_len: int | None = None, packing: bool = False
) -> dict[str, torch.Tensor]:
    """One micro-batch as int64 tensors of shape [rows, longest row, or seq_len where given]: `input_ids`,
    `labels`, `position_ids`, and `attention_mask` only where there is padding and no packing.

    Packed: position_ids restart with each document and there is no mask (a mask, or use_cache=True, would let
    documents see each other); padding at the end is a document of its own without labels.
    """
    raise NotImplementedError


def num_real_tokens(rows: Sequence[Sequence[Example]]) -> int:
    """Tokens that are not padding."""
    raise NotImplementedError


def num_trained_tokens(rows: Sequence[Sequence[Example]]) -> int:
    """Tokens that give a loss; sum it over the micro-batches of a step to normalise the loss."""
    raise NotImplementedError
