"""A run's data: the setup's file as examples, split, with the order in which they are trained on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from bench.batching import BatchPlan, micro_batch, num_real_tokens, num_trained_tokens
from bench.data import IGNORE_INDEX, Example, TokenFacts, extra_readers, split
from bench.data_audit import (
    ANSWERED,
    embedding_rows,
    find_foreign_tokens,
    find_lost_labels,
    find_unlike_serving,
    stop_at,
)
from bench.objectives import OBJECTIVES
from bench.token_cache import tokenize_file
from bench.world import ALONE, World
from planner.dataset import Row, Source
from planner.errors import DataError, SetupError
from planner.setup import TrainSetup


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepBatch:
    """One optimizer step's micro-batches on the device. `num_tokens` are real ones, `num_positions` with padding.

    `num_items`: what the step's loss is the mean over, trained tokens or pairs.
    """

    micro_batches: list[dict[str, Any]]
    num_tokens: int
    num_trained_tokens: int
    num_positions: int
    num_items: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RunData:
    """Training and held-out examples; `sha256` changes with any of their tokens or labels."""

    setup: TrainSetup
    train: Sequence[Example]
    held_out: Sequence[Example]
    batches: BatchPlan
    sha256: str
    pad_id: int
    facts: Mapping[str, Any]

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run: `max_steps`, else `epochs` passes."""
        if self.setup.max_steps is not None:
            return self.setup.max_steps
        return max(1, math.ceil(self.setup.epochs * self.batches.num_steps_per_epoch))

    def cut_as(self, setup: TrainSetup) -> RunData:
        """The same rows in the same order, in the setup's micro-batches of the same global batch."""
        batches = replace(
            self.batches,
            micro_batch_size=setup.micro_batch_size,
            grad_accum_steps=setup.grad_accum_steps * setup.num_gpus,
        )
        return replace(self, setup=setup, batches=batches)

    def step_batch(self, step: int, device: torch.device, world: World = ALONE) -> StepBatch:
        """The global batch of optimizer step `step`, counted from 0, with this rank's micro-batches of it; the same at
        every call. A rank that is one short takes the first once more, without labels.

        Rows are padded to the longest of their micro-batch, or joined without padding.
        """
        rows = self.batches.step_rows(self.train, step)
        own = world.share(rows)
        collated = [micro_batch(self.setup, r or rows[0], pad_id=self.pad_id) for r in own]
        for batch, micro_rows in zip(collated, own, strict=True):
            if micro_rows is None:
                batch["labels"].fill_(IGNORE_INDEX)
        return StepBatch(
            micro_batches=[{name: t.to(device) for name, t in batch.items()} for batch in collated],
            num_tokens=sum(map(num_real_tokens, rows)),
            num_trained_tokens=sum(map(num_trained_tokens, rows)),
            # the ranks' shares are as large
            num_positions=world.size * sum(batch["input_ids"].numel() for batch in collated),
            num_items=sum(map(OBJECTIVES[self.setup.objective](self.setup).num_items, rows)),
        )


def load_run_data(setup: TrainSetup, tokenizer: Any) -> RunData:
    """Read, tokenise, split and order the setup's data. Raises DataError, or SetupError where it names none."""
    if not setup.data:
        raise SetupError("data", "training needs a file: set data in the plan, or --set data=FILE")
    _audit_settings(setup, setup.data, tokenizer)
    tokenized = tokenize_file(setup.data, tokenizer, seq_len=setup.seq_len, objective=setup.objective)
    data = run_data(setup, tokenized.examples, pad_id=tokenizer.pad_token_id, facts=_plain(tokenized.facts))
    _audit_batch(data)
    return data


def _audit_settings(setup: TrainSetup, data: str, tokenizer: Any) -> None:
    """What a few rows and the tokenizer tell within a second. Raises DataError."""
    stop_at(find_foreign_tokens(tokenizer, embedding_rows(setup)))
    if setup.objective in ANSWERED:
        # rows that are broken are listed all at once by who tokenises them
        items = Source(data, extra_readers()).rows_and_faults()
        stop_at(find_unlike_serving((item for item in items if isinstance(item, Row)), tokenizer))


def _audit_batch(data: RunData) -> None:
    """The labels of the first micro-batch as they will be trained. Raises DataError."""
    rows = data.batches.step_rows(data.train, 0)[0]
    stop_at(find_lost_labels(rows, data.step_batch(0, torch.device("cpu")).micro_batches[0]))


def plan_batches(setup: TrainSetup, train: Sequence[Example]) -> BatchPlan:
    """The order and the batches in which the setup trains on the examples."""
    return BatchPlan.of(
        train,
        seq_len=setup.seq_len,
        packing=setup.packing,
        micro_batch_size=setup.micro_batch_size,
        grad_accum_steps=setup.grad_accum_steps * setup.num_gpus,
        seed=setup.seed,
    )


def run_data(
    setup: TrainSetup, examples: Sequence[Example], *, pad_id: int, facts: Mapping[str, Any] | None = None
) -> RunData:
    """RunData of examples that are tokenised already."""
    train, held_out = split(examples, setup.eval_fraction, setup.seed)
    if not train:
        raise DataError(str(setup.data), "no example is left to train on after the split")
    return RunData(
        setup=setup,
        train=train,
        held_out=held_out,
        batches=plan_batches(setup, train),
        sha256=_fingerprint(examples),
        pad_id=pad_id,
        facts=facts or {},
    )


def _fingerprint(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in (sequence for row in examples for sequence in row.sequences):
        digest.update(len(example.input_ids).to_bytes(8, "little"))
        digest.update(example.input_ids.tobytes())
        digest.update(example.labels.tobytes())
    return digest.hexdigest()


def _plain(facts: TokenFacts) -> dict[str, Any]:
    """As JSON would give it back, so that a summary equals itself read from disk."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(facts)))
    return plain
