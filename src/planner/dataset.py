"""Training files -> rows, without a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

Reader = Callable[[Path], Iterator[tuple[int, object]]]
"""A file as (line, record) pairs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn; `role` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One training row: a conversation (`messages`, at least one assistant turn) or a plain `text`, never both."""

    messages: tuple[Message, ...] | None = None
    text: str | None = None
    line: int
    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetFacts:
    """What can be said of a data set without a tokenizer; lengths are in characters per row."""

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
    """The rows of a file, or of a folder's files in the order of their names; raises DataError at the first fault."""
    raise NotImplementedError


def read_rows(path: str | Path, *, readers: Mapping[str, Reader] | None = None) -> list[Row]:
    """All rows; raises DataError that counts the rows with the same fault."""
    raise NotImplementedError


def dataset_facts(path: str | Path) -> DatasetFacts:
    """Facts of a data set; reads it once. Raises DataError."""
    raise NotImplementedError
