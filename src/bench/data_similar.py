"""Rows that repeat others: exactly, by a digest of their words; nearly, by MinHash.

Memory stays small however many rows there are (about 40 bytes a row): signatures lie in a temporary file, and what bands have in
common is found by sorting one band at a time.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from bench.data_text_checks import contents
from planner.dataset import Row
from planner.errors import FinefitError

SIMILAR = 0.8
"""Estimated Jaccard similarity of two rows' word triples from which they are near-duplicates."""
NUM_HASHES = 128
"""The estimate's standard error is at most (0.25 / 128) ** 0.5 = 0.044."""
NUM_BANDS = 16
"""16 bands of 8 find a pair of similarity 0.8 with probability 1 - (1 - 0.8**8)**16 = 0.95, one of 0.9 surely."""
SHINGLE_WORDS = 3
MAX_CHARS = 2**20
"""What of a row is compared; a longer one's end is not."""
_BATCH_ROWS, _BATCH_CHARS = 1000, 2**22
_SEED = 1
_ROWS_AT_ONCE = 2**13
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af]|[^\W_]+")
"""A letter of a script without blanks between words, or a word."""
_BLANKS = {number: " " for number in range(128) if not chr(number).isalnum()}

Digests = npt.NDArray[np.uint64]
Firsts = npt.NDArray[np.int32]
"""For each row the number of the first row that it repeats: its own where it repeats none."""


def row_text(row: Row) -> str:
    """All that a row says; roles and turns are kept apart by control characters that no text should hold."""
    if row.text is not None:
        return row.text
    conversations = ("\x1e".join(f"{m.role}\x1f{m.content}" for m in s.messages or ()) for s in row.sequences)
    return "\x1d".join(conversations)


def row_digest(row: Row) -> int:
    """64 bits of a row's content; among five million rows a chance of 1 in a million that two different ones agree."""
    data = row_text(row).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def shingles(row: Row) -> list[str]:
    """The row's word triples in lower case, with punctuation left out; a shorter row is one shingle."""
    words = _words(" ".join(filter(None, contents(row)))[:MAX_CHARS].lower())
    if len(words) < SHINGLE_WORDS:
        return [" ".join(words)]
    return list(map(" ".join, zip(*(words[at:] for at in range(SHINGLE_WORDS)), strict=False)))


def _words(text: str) -> list[str]:
    """Where a text is ASCII, as most are, the same in a third of the time."""
    return (text.translate(_BLANKS).split() if text.isascii() else _WORD.findall(text)) or text.split()


@contextmanager
def similar_rows() -> Iterator[SimilarRows]:
    """An index whose file is gone with the block."""
    with tempfile.TemporaryFile() as file:
        yield SimilarRows(file)


class SimilarRows:
    """An index of rows, numbered as they are added, that finds for each the first row that it repeats.

    `file` takes the rows' signatures.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._digests = array("Q")
        self._file = file
        self._waiting: list[list[str]] = []
        self._waiting_chars = 0

    def __len__(self) -> int:
        return len(self._digests)

    def add(self, row: Row) -> None:
        """Take a row in. Raises FinefitError where the temporary folder is full (512 bytes a row)."""
        self._digests.append(row_digest(row))
        self._waiting.append(shingles(row))
        self._waiting_chars += row.num_chars
        if len(self._waiting) >= _BATCH_ROWS or self._waiting_chars >= _BATCH_CHARS:
            self._write()

    def digests(self) -> Digests:
        """64 bits of each row's content."""
        return np.array(self._digests, dtype=np.uint64)

    def exact_firsts(self) -> Firsts:
        """For each row the number of the first row with the same content: its own where there is none before."""
        return _leaders(self.digests())

    def near_firsts(self) -> Firsts:
        """For each row the number of the first row that it nearly repeats: its own where there is none before.

        A row is compared with the first one of each band that they have in common, not with all: a row of a long chain
        of small changes may be missed, and a missed one counts as a row of its own.
        """
        self._write()
        firsts = self.exact_firsts()
        for band in range(NUM_BANDS):
            leaders = _leaders(self._band(band))
            candidates = repeats(leaders)
            candidates = candidates[firsts[candidates] == candidates]
            for row, head in self._alike(candidates, leaders[candidates]):
                firsts[row] = head
        return _roots(firsts)

    def _alike(self, rows: npt.NDArray[np.int64], heads: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
        for at in range(0, len(rows), _ROWS_AT_ONCE):
            some, others = rows[at : at + _ROWS_AT_ONCE], heads[at : at + _ROWS_AT_ONCE]
            similarity = (self._signatures(some) == self._signatures(others)).mean(axis=1)
            chosen = similarity >= SIMILAR
            yield from zip(some[chosen].tolist(), others[chosen].tolist(), strict=True)

    def _signatures(self, numbers: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint32]:
        """[rows, NUM_HASHES], read in the order of the file."""
        wanted, back = np.unique(numbers, return_inverse=True)
        found = np.empty((len(wanted), NUM_HASHES), dtype=np.uint32)
        for place, number in enumerate(wanted.tolist()):
            self._file.seek(number * NUM_HASHES * 4)
            found[place] = np.frombuffer(self._file.read(NUM_HASHES * 4), dtype=np.uint32)
        return found[back]

    def _band(self, band: int) -> npt.NDArray[np.uint32]:
        """One key a row: its hashes of the band, mixed."""
        width = NUM_HASHES // NUM_BANDS
        keys = np.empty(len(self), dtype=np.uint32)
        self._file.seek(0)
        for at in range(0, len(self), _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, len(self) - at)
            block = np.frombuffer(self._file.read(count * NUM_HASHES * 4), dtype=np.uint32)
            keys[at : at + count] = _mix(
                block.reshape(count, NUM_HASHES)[:, band * width : (band + 1) * width]
            )
        return keys

    def _write(self) -> None:
        if not self._waiting:
            return
        from rensa import RMinHash

        rows: Any = RMinHash.digests_from_token_sets(self._waiting, NUM_HASHES, _SEED)
        try:
            self._file.seek(0, 2)
            self._file.write(np.array(rows, dtype=np.uint32).tobytes())
        except OSError as error:
            reason = error.strerror or error
            raise FinefitError(
                f"the rows' signatures don't fit in {tempfile.gettempdir()} ({reason}); set TMPDIR"
            ) from error
        self._waiting, self._waiting_chars = [], 0


def _mix(columns: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """FNV-1a over 32-bit words: rows of equal keys are compared by their signatures, so it needn't be strong."""
    keys = np.full(len(columns), 0xCBF29CE484222325, dtype=np.uint64)
    for column in columns.T:
        keys = (keys ^ column) * np.uint64(0x100000001B3)
    return (keys >> np.uint64(32)).astype(np.uint32)


def _leaders(keys: npt.NDArray[Any]) -> Firsts:
    """For each row the number of the first row with the same key."""
    order = np.argsort(keys, kind="stable").astype(np.int32)
    in_order = keys[order]
    starts = np.arange(len(keys), dtype=np.int32)
    starts[1:][in_order[1:] == in_order[:-1]] = 0
    np.maximum.accumulate(starts, out=starts)
    leaders = np.empty_like(order)
    leaders[order] = order[starts]
    return leaders


def _roots(firsts: Firsts) -> Firsts:
    """Follow each row's first to a row that is its own first."""
    while True:
        further = firsts[firsts]
        if (further == firsts).all():
            return firsts
        firsts = further


def repeats(firsts: Firsts) -> npt.NDArray[np.int64]:
    """The numbers of the rows that repeat an earlier one."""
    return np.flatnonzero(firsts != np.arange(len(firsts), dtype=np.int32))
