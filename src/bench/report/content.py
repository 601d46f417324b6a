"""What a report says, before anybody decides how it looks. Texts are plain: whoever writes them out escapes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A picture as inline SVG, and `alt`: all that it shows, in words."""

    kind: ClassVar[str] = "figure"
    title: str
    alt: str
    svg: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of cells; `num_words` columns at the left hold words, the others numbers. `note` stands below."""

    kind: ClassVar[str] = "table"
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_words: int = 1
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Names and values."""

    kind: ClassVar[str] = "facts"
    title: str
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Notes:
    """Lines of prose; `tone` is one of good, doubtful, bad and plain."""

    kind: ClassVar[str] = "notes"
    title: str
    lines: tuple[str, ...]
    tone: str = "plain"


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """Something to type or to save; long ones are folded away."""

    kind: ClassVar[str] = "code"
    title: str
    text: str
    is_folded: bool = False


Block = Figure | Table | Facts | Notes | Code


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The question and its answer first, then what stands behind it. `tone` colours the answer."""

    question: str
    answer: str
    tone: str
    doubts: tuple[str, ...]
    sections: tuple[Section, ...]
    made: str


def section(title: str, blocks: Sequence[Block | None]) -> list[Section]:
    """The section, or none where nothing is left to say."""
    found = tuple(block for block in blocks if block is not None)
    return [Section(title=title, blocks=found)] if found else []
