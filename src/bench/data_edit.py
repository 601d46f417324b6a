"""New files from a data set: cleaned, in another format, split. The same file gives the same bytes; nothing half-written.

Every function reads row by row, writes aside and renames, and returns what it did.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bench.data import extra_readers
from bench.data_personal import redact
from bench.data_similar import SimilarRows, similar_rows
from planner.dataset import FaultyRow, Row, Source
from planner.dataset_files import estimate_records
from planner.dataset_formats import FORMATS
from planner.dataset_turns import Format, RowError
from planner.errors import DataError, UnknownNameError, UsageError
from planner.files import atomic_files

Progress = Callable[[str, int, int], None]
"""Called with (what is done, rows done, rows there are, about)."""
_PROGRESS_ROWS = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class Edited:
    """What was written: rows by output file; rows that were left out by reason; redacted strings by kind."""

    written: Mapping[str, int]
    left_out: Mapping[str, int] = field(default_factory=dict)
    redacted: Mapping[str, int] = field(default_factory=dict)
    schema_version: int = 1

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def clean(
    path: Path,
    out: Path,
    *,
    near: bool = False,
    without: Path | None = None,
    hide_personal: bool = False,
    progress: Progress = lambda *_: None,
) -> Edited:
    """The rows that can be trained on, each once, as they are in the file, as JSON Lines.

    Left out: rows that can't be read, repetitions, with `near` also near-duplicates, and rows that the file `without`
    (an evaluation set) holds too. `hide_personal` replaces personal strings in all texts. Raises DataError where no row
    is left.
    """
    kept = _Kept(path, near, without, progress)
    redacted: Counter[str] = Counter()
    with atomic_files(out) as (file,):
        for record, item in _records(path, "writing", progress):
            if isinstance(item, Row) and kept.keeps():
                file.write(_line(_redact(record, redacted) if hide_personal else record, item))
        if not kept.num_kept:
            raise DataError(str(path), f"no row is left of it ({_reasons(kept.left_out)})")
    return Edited(written={str(out): kept.num_kept}, left_out=dict(kept.left_out), redacted=dict(redacted))


def convert(path: Path, out: Path, *, to: str, progress: Progress = lambda *_: None) -> Edited:
    """The rows in another format, as JSON Lines, a JSON list or a table, by the suffix of `out`.

    Columns that the old format doesn't name are left behind. Raises DataError with the line of a row that can't be read
    or that the format or the kind of file can't hold, UnknownNameError, UsageError.
    """
    chosen = _format(to)
    writer = _WRITERS.get(out.suffix.lower())
    if writer is None:
        raise UsageError(f"{out}: unknown kind of file; {', '.join(_WRITERS)} can be written")
    count = 0
    with atomic_files(out) as (file,):
        write = writer(file, (*chosen.required, *chosen.optional))
        for _, item in _records(path, "converting", progress):
            if isinstance(item, FaultyRow):
                raise item.as_error("; `finefit data clean` leaves such rows out")
            try:
                write.add(chosen.write(item.content))
            except RowError as error:
                raise DataError(item.path, str(error), item.line) from error
            count += 1
        write.close()
    return Edited(written={str(out): count})


def split(
    path: Path, out: Path, *, eval_fraction: float, seed: int = 0, progress: Progress = lambda *_: None
) -> Edited:
    """The rows as `out`/train.jsonl and `out`/eval.jsonl, by their content and the seed alone.

    Rows that repeat each other, exactly or nearly, go to one side. About `eval_fraction` of the groups are held out.
    Raises DataError for a row that can't be read, and where a side would be empty.
    """
    with similar_rows() as index:
        for _, item in _records(path, "reading", progress):
            if isinstance(item, FaultyRow):
                raise item.as_error("; `finefit data clean` leaves such rows out")
            index.add(item)
        firsts, digests = index.near_firsts(), index.digests()
    is_held_out = draw(digests[firsts], seed) < eval_fraction
    names = out / "train.jsonl", out / "eval.jsonl"
    counts = [int((~is_held_out).sum()), int(is_held_out.sum())]
    if not all(counts):
        side = "training" if counts[1] else "held-out"
        message = (
            f"no {side} row: {len(set(firsts.tolist()))} different rows; change --eval-fraction or --seed"
        )
        raise DataError(str(path), message)
    with atomic_files(*names) as files:
        for number, (record, item) in enumerate(_records(path, "writing", progress)):
            files[int(is_held_out[number])].write(_line(record, item))
    return Edited(written={str(name): count for name, count in zip(names, counts, strict=True)})


def draw(digests: Any, seed: int) -> Any:
    """A number in [0, 1) for each 64-bit digest, even and independent of the others (splitmix64's mixer)."""
    with np.errstate(over="ignore"):
        mixed = digests + np.uint64(seed & 0xFFFFFFFF) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53


class _Kept:
    """Which rows `clean` keeps, asked row by row in the order of the file."""

    def __init__(self, path: Path, near: bool, without: Path | None, progress: Progress) -> None:
        self.left_out: Counter[str] = Counter()
        self.num_kept = self.number = 0
        with similar_rows() as index:
            banned = 0 if without is None else _add_rows(index, without, progress)
            for _, item in _records(path, "reading", progress):
                if isinstance(item, FaultyRow):
                    self.left_out[_FAULTS.get(item.kind, item.kind)] += 1
                else:
                    index.add(item)
            self._judge(index, near, banned)

    def _judge(self, index: SimilarRows, near: bool, banned: int) -> None:
        """Rows of the file `without` come first in the index, so that a row's first tells which file it repeats."""
        exact = index.exact_firsts()
        firsts = index.near_firsts() if near else exact
        numbers = np.arange(len(exact))
        reasons = np.select([firsts < banned, exact != numbers, firsts != numbers], [3, 2, 1], default=0)[
            banned:
        ]
        self.reasons = reasons.astype(np.int8)

    def keeps(self) -> bool:
        """Whether the next row stays; counts it."""
        reason = int(self.reasons[self.number])
        self.number += 1
        if reason:
            self.left_out[_REASONS[reason]] += 1
        self.num_kept += not reason
        return not reason


_FAULTS = {
    "json": "broken JSON",
    "encoding": "not UTF-8",
    "empty": "empty",
    "same": "chosen and rejected are one",
    "format": "wrong columns or turns",
}
_REASONS = ("", "near-duplicate", "duplicate", "in the evaluation file")


def _add_rows(index: SimilarRows, path: Path, progress: Progress) -> int:
    for _, item in _records(path, "reading", progress):
        if isinstance(item, Row):
            index.add(item)
    return len(index)


def _records(path: Path, what: str, progress: Progress) -> Iterator[tuple[object, Row | FaultyRow]]:
    source = Source(path, extra_readers())
    about = estimate_records(path, source.readers)
    for number, pair in enumerate(source.records()):
        if number % _PROGRESS_ROWS == 0:
            progress(what, number, max(number, about))
        yield pair


def _reasons(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in left_out.items()) or "it holds none"


def _format(name: str) -> Format:
    chosen = next((f for f in FORMATS if f.name == name), None)
    if chosen is None:
        raise UnknownNameError("format", name, [f.name for f in FORMATS], "finefit data convert --help")
    return chosen


def _redact(value: Any, found: Counter[str]) -> Any:
    """The same record with personal strings replaced in all its texts, at any depth that a row can have."""
    if isinstance(value, str):
        text, counts = redact(value)
        found.update(counts)
        return text
    if isinstance(value, list):
        return [_redact(item, found) for item in value]
    if isinstance(value, Mapping):
        return {key: _redact(item, found) for key, item in value.items()}
    return value


def _line(record: object, item: Row | FaultyRow | None = None) -> bytes:
    """One line of JSON. Raises DataError for an unused column that is nested deeper than Python can write."""
    try:
        return (json.dumps(record, ensure_ascii=False, default=str) + "\n").encode(errors="replace")
    except RecursionError:
        path, line = (item.path, item.line) if item else ("data", None)
        raise DataError(path, "nested too deeply; remove the row", line) from None


class _JsonLines:
    def __init__(self, file: BinaryIO, columns: tuple[str, ...]) -> None:
        self.file = file

    def add(self, record: Mapping[str, Any]) -> None:
        self.file.write(_line(record))

    def close(self) -> None:
        """Nothing stands after the last row."""


class _JsonList:
    def __init__(self, file: BinaryIO, columns: tuple[str, ...]) -> None:
        self.file, self.separator = file, "[\n"

    def add(self, record: Mapping[str, Any]) -> None:
        self.file.write((self.separator + json.dumps(record, ensure_ascii=False)).encode())
        self.separator = ",\n"

    def close(self) -> None:
        self.file.write(b"\n]\n")


class _Table:
    delimiter = ","

    def __init__(self, file: BinaryIO, columns: tuple[str, ...]) -> None:
        self.text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        self.table = csv.DictWriter(self.text, columns, delimiter=self.delimiter, restval="")
        self.table.writeheader()

    def add(self, record: Mapping[str, Any]) -> None:
        nested = [name for name, value in record.items() if not isinstance(value, str)]
        if nested:
            raise RowError(f"{nested[0]} is a list, which a table can't hold; write .jsonl")
        self.table.writerow(record)

    def close(self) -> None:
        self.text.detach()


class _TabTable(_Table):
    delimiter = "\t"


_WRITERS: Mapping[str, type[_JsonLines | _JsonList | _Table]] = {
    ".jsonl": _JsonLines,
    ".ndjson": _JsonLines,
    ".json": _JsonList,
    ".csv": _Table,
    ".tsv": _TabTable,
}
