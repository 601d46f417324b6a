"""The batch shapes that a step's memory is asked for: one in plain numbers, or many at once in numpy's arrays.

Both answer in the same words, so that a step's phases are written once. Arrays give bit for bit what plain numbers
give: the same operations in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from planner.sizes import CATEGORIES, Size, evaluate
from planner.tape import Peaks

Terms = dict[str, Any]
"""Bytes by term: floats, or arrays of them, one for each shape."""


@cache
def has_arrays() -> bool:
    """Whether numpy is installed, which planning doesn't need."""
    from importlib.util import find_spec

    return find_spec("numpy") is not None


class Shape:
    """Micro-batches of `tokens` tokens in rows of `seq_len`.

    `one` is a shape (tokens, length) for whatever doesn't change between the shapes that are asked for together.
    """

    def __init__(self, tokens: int, seq_len: int) -> None:
        self.tokens: Any = tokens
        self.seq_len: Any = seq_len
        self.one = tokens, seq_len

    def with_rows(self, num_rows: int) -> Shape:
        """The same lengths in micro-batches of `num_rows` rows."""
        return Shape(num_rows * self.seq_len, self.seq_len)

    def at(self, size: Size) -> Any:
        """Bytes of a size."""
        return evaluate(size, self.tokens, self.seq_len)

    def peak(self, peaks: Peaks) -> Terms:
        """The largest candidate's bytes by category."""
        return peaks.at(self.tokens, self.seq_len)

    def highest(self, candidates: Sequence[Terms]) -> Terms:
        """The candidate with the largest sum."""
        return max(candidates, key=lambda terms: sum(terms.values()))

    def least(self, num_bytes: Any, limit: float) -> Any:
        """Bytes, but at most `limit`."""
        return min(num_bytes, limit)


class Shapes(Shape):
    """Many shapes, of which no operation, mask or chunk differs but in size: `tokens` and `seq_len` are arrays."""

    def __init__(self, tokens: Any, seq_len: Any) -> None:
        """Arrays, or sequences of integers. Needs numpy, which not everyone has who plans: see has_arrays."""
        import numpy

        self._numpy = numpy
        self.tokens, self.seq_len = numpy.asarray(tokens), numpy.asarray(seq_len)
        self.one = int(tokens[0]), int(seq_len[0])

    def with_rows(self, num_rows: int) -> Shapes:
        """See Shape."""
        return Shapes(num_rows * self.seq_len, self.seq_len)

    def each(self, values: Any) -> list[float]:
        """One number for each shape."""
        numbers: list[float] = self._numpy.broadcast_to(values, len(self.tokens)).tolist()
        return numbers

    def each_rounded(self, values: Any) -> list[int]:
        """The same, rounded as round() does."""
        np = self._numpy
        numbers: list[int] = np.broadcast_to(np.rint(values), len(self.tokens)).astype(np.int64).tolist()
        return numbers

    def peak(self, peaks: Peaks) -> Terms:
        """See Shape."""
        if not peaks.snapshots:
            return super().peak(peaks)
        np = self._numpy
        pairs, squares = self.tokens * self.seq_len, self.seq_len * self.seq_len
        # [coefficients, candidates, 1] against [shapes]
        w, x, y, z = np.array(peaks.totals).T[:, :, None]
        best = (w + x * self.tokens + y * pairs + z * squares).argmax(axis=0)
        # [categories, coefficients, shapes]
        chosen = np.array(peaks.snapshots)[best].transpose(1, 2, 0)
        return {
            name: s[0] + s[1] * self.tokens + s[2] * pairs + s[3] * squares
            for name, s in zip(CATEGORIES, chosen, strict=True)
        }

    def highest(self, candidates: Sequence[Mapping[str, Any]]) -> Terms:
        """See Shape."""
        np, num_shapes = self._numpy, len(self.tokens)
        sums = np.empty((len(candidates), num_shapes))
        for row, terms in zip(sums, candidates, strict=True):
            row[:] = sum(terms.values())
        best = sums.argmax(axis=0)
        found = {}
        for name in candidates[0]:
            values = np.empty_like(sums)
            for row, terms in zip(values, candidates, strict=True):
                row[:] = terms[name]
            found[name] = values[best, np.arange(num_shapes)]
        return found

    def least(self, num_bytes: Any, limit: float) -> Any:
        """See Shape."""
        return self._numpy.minimum(num_bytes, limit)
