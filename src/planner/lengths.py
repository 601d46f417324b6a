"""Token lengths of training rows, and what they make of a batch: truncation, padding, packing."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from planner.packing import pack

MOST_PACKED = 4096
"""Rows of a sample that are packed to learn how full sequences get."""
SURE = 1.645
"""Standard errors on each side of a mean that hold it in nine of ten samples (normal distribution)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataLengths:
    """Token lengths of the training rows; `source` says how they are known.

    `num_rows` counts rows of the file. A pair of answers is one of them, and two lengths.

    `sample` holds the lengths of rows that stand for all, ascending; empty where only the other figures are known.
    `low_factor` to `high_factor` is what the true lengths may be of those that are given, with nine chances in ten:
    1 where every row was counted, less and more for a sample, far from 1 where `is_estimated` from characters.
    """

    num_rows: int
    mean: float
    p50: int
    p99: int
    longest: int
    source: str
    sample: tuple[int, ...] = ()
    low_factor: float = 1.0
    high_factor: float = 1.0
    is_estimated: bool = False

    @classmethod
    def of(
        cls,
        sample: Sequence[int],
        *,
        num_rows: int,
        source: str,
        longest: int = 0,
        standard_error: float = 0.0,
    ) -> DataLengths:
        """From the lengths of some rows; `longest` where a longer row was seen outside of them, `standard_error`
        that of their mean in tokens. Raises ValueError for an empty sample.
        """
        if not sample:
            raise ValueError("no row was measured")
        ranked = tuple(sorted(sample))
        mean = statistics.fmean(ranked)
        spread = min(0.9, SURE * standard_error / mean) if mean else 0.0
        return cls(
            num_rows=num_rows,
            mean=mean,
            p50=ranked[_rank(len(ranked), 0.50)],
            p99=ranked[_rank(len(ranked), 0.99)],
            longest=max(longest, ranked[-1]),
            source=source,
            sample=ranked,
            low_factor=1 - spread,
            high_factor=1 + spread,
        )

    def cut(self, seq_len: int) -> DataLengths:
        """The pieces of at most `seq_len` tokens that pretraining cuts long rows into; nothing is lost then."""
        if not self.sample or self.longest <= seq_len:
            return self
        pieces = [min(seq_len, n - at) for n in self.sample for at in range(0, n, seq_len)]
        mean = statistics.fmean(pieces)
        return replace(
            DataLengths.of(pieces, num_rows=round(self.num_rows * self.mean / mean), source=self.source),
            low_factor=self.low_factor,
            high_factor=self.high_factor,
            is_estimated=self.is_estimated,
        )

    def share_truncated(self, seq_len: int) -> float | None:
        """Of the rows, those that are longer; None where no sample is known and some may be."""
        if seq_len >= self.longest:
            return 0.0
        return sum(length > seq_len for length in self.sample) / len(self.sample) if self.sample else None

    def share_lost(self, seq_len: int) -> float | None:
        """Of the tokens, those beyond `seq_len` of their rows."""
        if seq_len >= self.longest:
            return 0.0
        total = sum(self.sample)
        return sum(max(0, n - seq_len) for n in self.sample) / total if total else None

    def kept_mean(self, seq_len: int) -> float:
        """Tokens of a row on average, cut at `seq_len`."""
        if not self.sample:
            return min(self.mean, float(seq_len))
        return _kept_mean(self.sample, seq_len)

    def padded_mean(self, seq_len: int, micro_batch_size: int) -> float:
        """Positions of a row on average when each micro-batch of rows drawn by chance is padded to its longest.

        The largest of b draws is at most the i-th of n lengths with probability (i/n)**b. Without a sample every
        row may be as long as `seq_len`.
        """
        if not self.sample:
            return float(seq_len)
        return _padded_mean(self.sample, seq_len, micro_batch_size)

    def packed_share(self, seq_len: int) -> float:
        """Sequences per row when rows are packed by best fit; without a sample as if no token were wasted."""
        if not self.sample:
            return min(1.0, self.mean / seq_len)
        return _packed_share(self.sample[:: max(1, len(self.sample) // MOST_PACKED)], seq_len)

    def percentile(self, share: float) -> int:
        """The least length that at least `share` of the rows don't exceed; the known one above where there is no sample."""
        if self.sample:
            return self.sample[_rank(len(self.sample), share)]
        known = ((0.50, self.p50), (0.99, self.p99))
        return next((length for upto, length in known if share <= upto), self.longest)


@functools.lru_cache(maxsize=256)
def _kept_mean(sample: tuple[int, ...], seq_len: int) -> float:
    return statistics.fmean(min(n, seq_len) for n in sample)


@functools.lru_cache(maxsize=1024)
def _padded_mean(sample: tuple[int, ...], seq_len: int, micro_batch_size: int) -> float:
    count = len(sample)
    chances = [(i / count) ** micro_batch_size for i in range(count + 1)]
    parts = (
        min(n, seq_len) * (upper - lower)
        for n, lower, upper in zip(sample, chances, chances[1:], strict=False)
    )
    return sum(parts)


@functools.lru_cache(maxsize=256)
def _packed_share(sample: tuple[int, ...], seq_len: int) -> float:
    return len(pack([min(n, seq_len) for n in sample], seq_len)) / len(sample)


def _rank(count: int, share: float) -> int:
    return max(0, math.ceil(round(count * share, 6)) - 1)
