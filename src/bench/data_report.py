"""What inspecting a data set finds, as plain values."""

from __future__ import annotations

from array import array
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bench.data_audit import Finding
from planner.dataset import nearest_rank


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Something that some rows have: how many rows, how many times in all, and the first of them as FILE:LINE."""

    num_rows: int
    count: int
    first: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Lengths of rows, percentiles by nearest rank; `histogram` is (from, below, rows) in powers of two.

    `unit` is "tokens" or "characters"; `num_rows` those that were measured.
    """

    unit: str
    num_rows: int
    total: int
    p50: int
    p90: int
    p99: int
    longest: int
    histogram: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenReport:
    """What tokenising the measured rows to `seq_len` would do; counts are of these rows alone.

    `num_truncated_pairs` are pairs of which both answers' conversations are cut. The template can't write `num_refused_rows`. `num_answer_tokens` are trained tokens before truncation, `num_lost_answer_tokens` those beyond seq_len.
    """

    seq_len: int
    lengths: Lengths
    num_refused_rows: int
    num_truncated_rows: int
    num_truncated_pairs: int
    num_answer_tokens: int
    num_lost_answer_tokens: int
    num_untrained_rows: int
    num_control_token_rows: int
    num_cut_thought_rows: int
    template: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """Rows of the evaluation file that the training file holds too, word for word or nearly."""

    path: str
    num_rows: int
    exact: Found
    near: Found


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """All that was found. `num_pairs` rows hold two answers. `tokens` is None where no tokenizer could be had; `notes` then say why.

    `faults` groups rows that can't be read by kind; `languages` counts the `num_language_rows` rows looked at.
    """

    path: str
    format: str
    num_files: int
    size_bytes: int
    num_rows: int
    num_pairs: int
    faults: dict[str, Found]
    fault_message: str | None
    ignored_columns: tuple[str, ...]
    characters: Lengths | None
    tokens: TokenReport | None
    exact_duplicates: Found
    near_duplicates: Found
    overlap: Overlap | None
    languages: dict[str, int]
    num_language_rows: int
    personal: dict[str, Found]
    encoding: dict[str, Found]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    schema_version: int = 1

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def lengths_of(unit: str, values: array[int]) -> Lengths | None:
    """The lengths of rows; None of none."""
    if not values:
        return None
    ordered: Any = np.sort(np.frombuffer(values, dtype=np.uint32))
    edges = [0, *(2**power for power in range(int(ordered[-1]).bit_length() + 1))]
    below = np.searchsorted(ordered, edges)
    bins = zip(edges, edges[1:], np.diff(below).tolist(), strict=False)
    histogram = tuple((low, high, count) for low, high, count in bins if count)
    return Lengths(
        unit=unit,
        num_rows=len(ordered),
        total=int(ordered.sum(dtype=np.int64)),
        p50=int(nearest_rank(ordered, 0.50)),
        p90=int(nearest_rank(ordered, 0.90)),
        p99=int(nearest_rank(ordered, 0.99)),
        longest=int(ordered[-1]),
        histogram=histogram,
    )
