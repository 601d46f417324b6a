"""Text for people: tables that never break a number, bars, wrapped notes. Nothing here knows a command."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

MIN_PROSE_WIDTH = 24
"""Cells; prose in a narrower column is harder to read than a list."""
_SEPARATOR_WIDTH = 2
_COLORS = {
    "good": "\x1b[32m",
    "doubtful": "\x1b[33m",
    "bad": "\x1b[31m",
    "dim": "\x1b[2m",
    "strong": "\x1b[1m",
}
_RESET = "\x1b[0m"
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_BAR_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column of a table. Where the terminal is too narrow, those with the highest `drop` go first;
    a column with `drop` 0 stays. Numbers are aligned right, words left; a column of prose may be wrapped.
    """

    title: str
    cells: tuple[str, ...]
    is_number: bool = False
    is_prose: bool = False
    drop: int = 0

    @property
    def width(self) -> int:
        """Terminal cells of the widest entry."""
        return max(display_width(line) for text in (self.title, *self.cells) for line in text.split("\n"))


def terminal_width() -> int | None:
    """Columns of the terminal that is written to (or of $COLUMNS); None where the output is no terminal."""
    if os.environ.get("COLUMNS", "").isdigit() or sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    return None


def wants_color() -> bool:
    """Whether to colour: a terminal, and NO_COLOR (no-color.org) is unset or empty."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, tone: str) -> str:
    """The text in the colour of `tone` (good, doubtful, bad, dim, strong) where colours are wanted."""
    return f"{_COLORS[tone]}{text}{_RESET}" if text and wants_color() else text


def display_width(text: str) -> int:
    """Terminal cells that a text takes: without colour codes; a wide (Chinese, Japanese, Korean) letter takes two."""
    plain = _ANSI.sub("", text)
    if plain.isascii():
        return len(plain)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in plain)


def printable(text: str) -> str:
    """The text on one line without control characters: what a file holds must not steer the terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def format_table(columns: Sequence[Column], width: int | None = None) -> str:
    """The columns as a table at most `width` cells wide (None: as wide as needed).

    Where even the columns that can't be dropped are too wide, prose is wrapped; if that doesn't help either,
    each row becomes a list of titles and cells.
    """
    kept = list(columns)
    while width is not None and _table_width(kept) > width:
        droppable = [column for column in kept if column.drop > 0]
        if not droppable:
            narrow = _narrow_prose(kept, _table_width(kept) - width)
            return _tabulate(narrow) if narrow else _format_list(columns, width)
        kept.remove(max(droppable, key=lambda column: column.drop))
    return _tabulate(kept)


def _table_width(columns: Sequence[Column]) -> int:
    return sum(c.width for c in columns) + _SEPARATOR_WIDTH * (len(columns) - 1)


def _narrow_prose(columns: Sequence[Column], excess: int) -> list[Column] | None:
    """The columns with the prose wrapped so that the table is `excess` cells narrower; None if that can't be."""
    prose = [c for c in columns if c.is_prose and c.width - excess >= MIN_PROSE_WIDTH]
    if not prose:
        return None
    chosen = prose[0]
    cells = tuple(wrap(text, chosen.width - excess) for text in chosen.cells)
    narrow = [replace(c, cells=cells) if c is chosen else c for c in columns]
    is_narrow = (
        max(display_width(line) for text in cells for line in text.splitlines()) <= chosen.width - excess
    )
    return narrow if is_narrow else None


def _tabulate(columns: Sequence[Column]) -> str:
    import tabulate

    tabulate.MIN_PADDING = (
        0  # its own setting: headers no wider than their text, as `_table_width` counts them
    )
    text = tabulate.tabulate(
        list(zip(*(c.cells for c in columns), strict=True)),
        headers=[c.title for c in columns],
        tablefmt="simple",
        colalign=["right" if c.is_number else "left" for c in columns],
        disable_numparse=True,
    )
    return "\n".join(line.rstrip() for line in text.splitlines())


def _format_list(columns: Sequence[Column], width: int) -> str:
    """One block per row; the first column is the block's heading, prose is wrapped."""
    heading, rest = columns[0], columns[1:]
    title_width = max((display_width(c.title) for c in rest), default=0)
    blocks, label = [], ""
    for index, name in enumerate(heading.cells):
        label = name or label
        lines = []
        for column in (c for c in rest if c.cells[index]):
            title = f"  {column.title}{' ' * (title_width - display_width(column.title))}  "
            cell = column.cells[index]
            indent = " " * (title_width + 4)
            lines.append(wrap(cell, width, title, indent) if column.is_prose else f"{title}{cell}")
        blocks.append("\n".join([label, *lines]))
    return "\n".join(blocks)


def blank_repeats(column: Column) -> Column:
    """The column with each entry that equals the one above it left blank, as in a grouped table."""
    cells = column.cells
    shown = tuple(c if i == 0 or c != cells[i - 1] else "" for i, c in enumerate(cells))
    return replace(column, cells=shown)


def format_bar(share: float, width: int = 24) -> str:
    """A bar of `share` (0 to 1) of `width` terminal cells, exact to an eighth of a cell.

    >>> format_bar(0.5, 4)
    '██'
    """
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    return ("█" * (eighths // 8) + _BAR_EIGHTHS[eighths % 8]).rstrip()


def format_bars(values: Mapping[str, int], text: Mapping[str, str], width: int | None = None) -> str:
    """One line per entry: its name, its text on the right, a bar scaled to the largest value."""
    top = max(values.values(), default=0) or 1
    names, numbers = max(map(len, values), default=0), max(map(len, text.values()), default=0)
    bar_width = 24 if width is None else max(0, min(24, width - names - numbers - 8))
    lines = [
        f"  {name:<{names}}  {text[name]:>{numbers}}  {format_bar(value / top, bar_width)}".rstrip()
        for name, value in values.items()
    ]
    return "\n".join(lines)


def format_facts(facts: Iterable[tuple[str, str]], width: int | None = None) -> str:
    """Names and values below each other, values wrapped under themselves."""
    pairs = list(facts)
    names = max((display_width(name) for name, _ in pairs), default=0)
    return "\n".join(
        wrap(value, width, first=f"{name}{' ' * (names - display_width(name))}  ", rest=" " * (names + 2))
        for name, value in pairs
    )


def wrap(text: str, width: int | None, first: str = "", rest: str = "") -> str:
    """The text in lines of at most `width` cells (None: one line), never broken inside a word."""
    if width is None or display_width(first + text) <= width:
        return first + text
    import textwrap

    return textwrap.fill(
        text,
        width=max(width, 24),
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def format_json(value: Any) -> str:
    """One line of strict JSON in ASCII, so that no console's encoding can change it.

    An infinite or undefined number in an answer is a defect and raises ValueError.
    """
    import json

    return json.dumps(value, allow_nan=False)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], num_words: int) -> str:
    """A table whose first `num_words` columns are words."""
    align = ["---" if i < num_words else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, align, *rows))
