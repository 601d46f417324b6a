"""How long a run is: its optimizer steps from the plan and the data, and its seconds on one kind of card."""

from __future__ import annotations

import math
from dataclasses import dataclass

from planner.lengths import DataLengths
from planner.results import Time
from planner.setup import TrainSetup


@dataclass(frozen=True, kw_only=True, slots=True)
class RunLength:
    """Optimizer steps of a whole run from `low_steps` to `high_steps`, and in words where they come from."""

    low_steps: int
    high_steps: int
    source: str

    def __post_init__(self) -> None:
        """A run has at least one step."""
        if not 1 <= self.low_steps <= self.high_steps:
            raise ValueError(f"{self.low_steps} to {self.high_steps} steps")


def tokens_per_step(setup: TrainSetup) -> int:
    """Token positions of one optimizer step, padding included."""
    return setup.global_batch_size * setup.sequences_per_row * setup.seq_len


def length_by_plan(setup: TrainSetup) -> RunLength | None:
    """`max_steps`, where the plan says it."""
    if setup.max_steps is None:
        return None
    return RunLength(low_steps=setup.max_steps, high_steps=setup.max_steps, source="the plan's max_steps")


def length_by_tokens(setup: TrainSetup, num_tokens: float) -> RunLength:
    """As many steps as `num_tokens` token positions fill."""
    steps = max(1, math.ceil(num_tokens / tokens_per_step(setup)))
    return RunLength(low_steps=steps, high_steps=steps, source=f"{num_tokens:,.0f} tokens in full sequences")


def length_by_rows(setup: TrainSetup, num_rows: int, mean_tokens: float | None = None) -> RunLength:
    """`epochs` over the rows that aren't held out; packed rows lie between perfect packing and none.

    `mean_tokens` of a row; without it packed rows may all fit into one sequence.
    """
    rows = max(1, num_rows - held_out_rows(setup, num_rows))
    fewest = rows
    if setup.packing:
        fewest = 1 if mean_tokens is None else math.ceil(rows * min(1.0, mean_tokens / setup.seq_len))
    packed = ", packed" if setup.packing else ""
    return RunLength(
        low_steps=_steps(setup, fewest),
        high_steps=_steps(setup, rows),
        source=f"{setup.epochs:g} epoch(s) of {rows:,} rows{packed}",
    )


def held_out_rows(setup: TrainSetup, num_rows: int) -> int:
    """Rows that are kept for evaluation."""
    return max(1, round(num_rows * setup.eval_fraction)) if setup.eval_fraction > 0 else 0


def length_by_lengths(setup: TrainSetup, lengths: DataLengths) -> RunLength:
    """`max_steps`, else `epochs` over rows of known lengths; packed rows fill sequences as well as a sample does."""
    planned = length_by_plan(setup)
    if planned is not None:
        return planned
    if not setup.packing or not lengths.sample:
        return length_by_rows(setup, lengths.num_rows, lengths.mean)
    rows = max(1, lengths.num_rows - held_out_rows(setup, lengths.num_rows))
    sequences = rows * lengths.packed_share(setup.seq_len)
    return RunLength(
        low_steps=_steps(setup, max(1, math.ceil(sequences * lengths.low_factor))),
        high_steps=_steps(setup, min(rows, math.ceil(sequences * lengths.high_factor))),
        source=f"{setup.epochs:g} epoch(s) of {rows:,} rows, packed; lengths {lengths.source}",
    )


def _steps(setup: TrainSetup, num_sequences: int) -> int:
    per_epoch = math.ceil(num_sequences / setup.global_batch_size)
    return max(1, math.ceil(setup.epochs * per_epoch))


def run_seconds(length: RunLength, time: Time) -> tuple[float, float]:
    """The shortest and the longest time that the steps take, each step being as long as a full batch."""
    return length.low_steps * time.low_step_s, length.high_steps * time.high_step_s
