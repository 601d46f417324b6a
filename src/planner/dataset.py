"""Training files -> rows, without a tokenizer.

The columns tell the format (`planner.dataset_formats`); all rows of a data set have one. Every complaint is a
DataError that names the file, the line, the fault and the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from planner.dataset_files import READERS, Fault, Reader, data_files
from planner.dataset_formats import accepted_columns, detect
from planner.dataset_turns import Content, Format, Message, Pair, RowError
from planner.errors import DataError
from planner.setup import PAIRED

__all__ = [
    "DatasetFacts",
    "FaultyRow",
    "Message",
    "Row",
    "Source",
    "check_rows",
    "content_sha256",
    "dataset_facts",
    "iter_rows",
    "read_rows",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One training row: a conversation (`messages`, at least one assistant turn) or a plain `text`, never both.

    `rejected` is the same conversation with another answer, to which that of `messages` is preferred.
    """

    messages: tuple[Message, ...] | None = None
    text: str | None = None
    rejected: tuple[Message, ...] | None = None
    line: int
    path: str

    @classmethod
    def of(cls, content: Content, *, line: int, path: str) -> Row:
        """The row that a record's content makes."""
        if isinstance(content, str):
            return cls(text=content, line=line, path=path)
        if isinstance(content, Pair):
            return cls(messages=content.chosen, rejected=content.rejected, line=line, path=path)
        return cls(messages=content, line=line, path=path)

    @property
    def content(self) -> Content:
        """What the row says, without its place."""
        if self.rejected is not None:
            return Pair(chosen=self.messages or (), rejected=self.rejected)
        return self.messages or self.text or ""

    @property
    def sequences(self) -> tuple[Row, ...]:
        """What is tokenised of it: the row itself, or a pair's two conversations."""
        if self.rejected is None:
            return (self,)
        return replace(self, rejected=None), replace(self, messages=self.rejected, rejected=None)

    @property
    def turns(self) -> tuple[Message, ...]:
        """All turns, those that a pair's conversations share once."""
        content = self.content
        if isinstance(content, Pair):
            return (*content.chosen, *content.rejected[content.num_shared :])
        return self.messages or ()

    @property
    def num_shared_answers(self) -> int:
        """Answers before the first difference of a pair: part of its prompt; 0 of any other row."""
        content = self.content
        if not isinstance(content, Pair):
            return 0
        return sum(turn.role == "assistant" for turn in content.chosen[: content.num_shared])

    @property
    def num_chars(self) -> int:
        """Characters of all turns, or of the text; of a pair, of both conversations."""
        own = sum(len(m.content) for m in self.messages or ()) + len(self.text or "")
        return own + sum(len(m.content) for m in self.rejected or ())

    @property
    def num_answer_chars(self) -> int:
        """Characters of the assistant's turns."""
        return sum(len(m.content) for m in self.turns if m.role == "assistant")


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetFacts:
    """What can be said of a data set without a tokenizer; `p50_chars` … `max_chars` are characters per row.

    `sha256` covers the names and bytes of all files. `num_duplicate_rows` counts rows that repeat an earlier one.
    """

    path: str
    format: str
    num_files: int
    num_rows: int
    num_duplicate_rows: int
    sha256: str
    total_chars: int
    answer_chars: int
    p50_chars: int
    p90_chars: int
    p99_chars: int
    max_chars: int
    ignored_columns: tuple[str, ...]


def iter_rows(path: str | Path, *, readers: Mapping[str, Reader] | None = None) -> Iterator[Row]:
    """The rows of a file, or of a folder's files in the order of their names; raises DataError at the first fault.

    `readers` adds readers of more kinds of file, by suffix.
    """
    for item in Source(path, readers).rows_and_faults():
        if isinstance(item, FaultyRow):
            raise item.as_error()
        yield item


def read_rows(path: str | Path, *, readers: Mapping[str, Reader] | None = None) -> list[Row]:
    """All rows. Raises DataError with the first fault and the lines of the others."""
    return Source(path, readers).rows()


def dataset_facts(path: str | Path, *, readers: Mapping[str, Reader] | None = None) -> DatasetFacts:
    """Facts of a data set. Raises DataError."""
    source = Source(path, readers)
    rows = source.rows()
    lengths = sorted(row.num_chars for row in rows)
    return DatasetFacts(
        path=str(path),
        format=source.format.name if source.format else "unknown",
        num_files=len(source.files),
        num_rows=len(rows),
        num_duplicate_rows=len(rows) - len({row.content for row in rows}),
        sha256=source.sha256(),
        total_chars=sum(lengths),
        answer_chars=sum(row.num_answer_chars for row in rows),
        p50_chars=nearest_rank(lengths, 0.50),
        p90_chars=nearest_rank(lengths, 0.90),
        p99_chars=nearest_rank(lengths, 0.99),
        max_chars=lengths[-1],
        ignored_columns=tuple(sorted(source.ignored_columns)),
    )


def content_sha256(path: str | Path, *, readers: Mapping[str, Reader] | None = None) -> str:
    """Hash of the names and bytes of all files of a data set."""
    return Source(path, readers).sha256()


def check_rows(rows: Sequence[Row], objective: str) -> None:
    """Raise DataError where the objective learns from pairs of answers and the rows are none, or the other way round.

    All rows of a data set have one format: the first one tells.
    """
    wants_pairs = objective in PAIRED
    for row in rows[:1]:
        if wants_pairs and row.rejected is None:
            message = (
                f"objective {objective} learns from two answers to a prompt; the rows have no rejected one"
            )
            raise DataError(row.path, message, row.line)
        if not wants_pairs and row.rejected is not None:
            message = f"the rows are pairs of a chosen and a rejected answer; set objective to {PAIRED[0]}"
            raise DataError(row.path, message, row.line)


def nearest_rank(sorted_values: Sequence[int], share: float) -> int:
    """The smallest value that at least `share` of the values don't exceed.

    >>> nearest_rank([1, 2, 3, 4], 0.5), nearest_rank([1, 2, 3, 4], 0.99)
    (2, 4)
    """
    rank = math.ceil(round(len(sorted_values) * share, 6))
    return sorted_values[max(rank, 1) - 1]


@dataclass(frozen=True, slots=True)
class FaultyRow:
    """A record that is no training row, and why; `kind` groups faults: json, encoding, empty, same or format."""

    path: str
    line: int
    message: str
    kind: str = "format"

    def as_error(self, remark: str = "") -> DataError:
        """The fault as the error that reading raises."""
        return DataError(self.path, self.message + remark, self.line)


class Source:
    """The files of a data set, and what reading them has shown so far. Raises DataError where there are none."""

    def __init__(self, path: str | Path, readers: Mapping[str, Reader] | None = None) -> None:
        self.path = Path(path)
        self.readers = {**READERS, **(readers or {})}
        self.files = data_files(self.path, self.readers)
        self.format: Format | None = None
        self.first = ""
        self.ignored_columns: set[str] = set()

    def rows(self) -> list[Row]:
        """All rows. Raises DataError with the first fault and the lines of the others."""
        rows: list[Row] = []
        faults: list[FaultyRow] = []
        for item in self.rows_and_faults():
            if isinstance(item, Row):
                rows.append(item)
            else:
                faults.append(item)
        if faults:
            raise faults[0].as_error(_more(faults[1:]))
        return rows

    def rows_and_faults(self) -> Iterator[Row | FaultyRow]:
        """Every record as a row, or as what is wrong with it. Raises DataError for a file without any."""
        return (item for _, item in self.records())

    def records(self) -> Iterator[tuple[object, Row | FaultyRow]]:
        """The same with the records as they are in the file."""
        num_records = 0
        for file in self.files:
            for line, record in self.readers[file.suffix.lower()](file):
                num_records += 1
                yield record, self._row_or_fault(str(file), line, record)
        if num_records == 0:
            raise DataError(str(self.path), "empty: there is no row in it")

    def sha256(self) -> str:
        """Hash of the names and bytes of all files."""
        import hashlib

        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode(errors="surrogateescape"))
            with file.open("rb") as opened:
                while block := opened.read(2**20):
                    digest.update(block)
        return digest.hexdigest()

    def _row_or_fault(self, path: str, line: int, record: object) -> Row | FaultyRow:
        try:
            if isinstance(record, Fault):
                raise RowError(record.message, record.kind)
            if not isinstance(record, Mapping):
                raise RowError("not a JSON object; each row is an object with named columns")
            content = self._format_of(record, path, line).parse(record)
        except RowError as error:
            return FaultyRow(path, line, str(error), error.kind)
        return Row.of(content, line=line, path=path)

    def _format_of(self, record: Mapping[str, object], path: str, line: int) -> Format:
        """The data set's format, decided by the first record that has one. Raises RowError where this one has another."""
        if self.format is None:
            self.format, self.first = detect(record), f"{path}:{line}"
            if self.format is None:
                raise RowError(f"columns {_names(record)}; accepted: {accepted_columns()}")
        if not self.format.matches(record):
            other = detect(record)
            if other is not None:
                raise RowError(f"mixed formats: {other.name} here, {self.format.name} in {self.first}")
            missing = ", ".join(c for c in self.format.required if c not in record)
            raise RowError(f"no column {missing} (format {self.format.name}); found {_names(record)}")
        known = (*self.format.required, *self.format.optional)
        self.ignored_columns.update(column for column in record if column not in known)
        return self.format


def _names(record: Mapping[str, object]) -> str:
    names = [ascii(name)[1:-1][:40] for name in list(record)[:10]]
    return ", ".join(names) + (", …" if len(record) > 10 else "") if names else "(none)"


def _more(faults: list[FaultyRow]) -> str:
    if not faults:
        return ""
    lines = ", ".join(str(fault.line) for fault in faults[:5]) + (", …" if len(faults) > 5 else "")
    return f" ({len(faults)} more faulty rows: lines {lines})"
