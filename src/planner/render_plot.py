"""Two plots for the terminal: bars against a limit, and memory over time as columns. Plain text where colours aren't wanted.

Own code and no library: planner may import none beyond click, tabulate and PyYAML, and a start in milliseconds
leaves no room for one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from planner.render import display_width, paint, wrap
from planner.units import format_bytes

MAX_WIDTH = 100
MIN_BAR = 8
"""Cells; a shorter bar says nothing, and only the numbers are shown."""
MIN_COLUMNS = 24
HEIGHT = 10
_BLOCKS, _ASCII = " ▁▂▃▄▅▆▇█", " ....:::#"
_FULL, _LIMIT = "█", "│"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """A labelled size; `note` stands behind it."""

    label: str
    num_bytes: int
    note: str = ""


def _can_draw() -> bool:
    """Whether the output can show block characters."""
    try:
        (_BLOCKS + _LIMIT).encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def format_limit_bars(bars: Sequence[Bar], limit_bytes: int | None, width: int | None = None) -> str:
    """One bar per line with a mark where the limit is; what lies beyond it is drawn in the colour of trouble.

    Where the terminal is too narrow, the notes go first, then the bars.
    """
    sizes = [format_bytes(bar.num_bytes) for bar in bars]
    labels = max((display_width(bar.label) for bar in bars), default=0)
    numbers, notes = (
        max(map(len, sizes), default=0),
        max((display_width(bar.note) for bar in bars), default=0),
    )
    cells = min(width or MAX_WIDTH, MAX_WIDTH) - labels - numbers - 6
    has_notes = cells - notes - 2 >= MIN_BAR
    if has_notes:
        cells -= notes + 2
    top = max([*(bar.num_bytes for bar in bars), limit_bytes or 1])
    lines = []
    for bar, size in zip(bars, sizes, strict=True):
        drawn = _limit_bar(bar.num_bytes, limit_bytes, top, cells) if cells >= MIN_BAR else ""
        note = bar.note if has_notes else ""
        lines.append(f"  {bar.label:>{labels}}  {size:>{numbers}}  {drawn}  {note}".rstrip())
    return "\n".join(lines)


def _limit_bar(num_bytes: int, limit_bytes: int | None, top: int, cells: int) -> str:
    full, mark = (_FULL, _LIMIT) if _can_draw() else ("#", "|")
    filled = max(1, round(num_bytes / top * (cells - 1)))
    if limit_bytes is None:
        return (full * filled).ljust(cells)
    at = min(cells - 1, round(limit_bytes / top * (cells - 1)))
    before, beyond = min(filled, at), max(0, filled - at)
    tail = paint(full * beyond, "bad") if beyond else ""
    return f"{full * before}{' ' * (at - before)}{mark}{tail}{' ' * (cells - at - 1 - beyond)}"


def format_area(
    stretches: Sequence[tuple[str, Sequence[int]]], limit_bytes: int | None = None, width: int | None = None
) -> str:
    """Bytes over time as columns, the phases' names below; "" where the terminal is too narrow.

    Each column is the highest of its share of a stretch. The limit is drawn where it is not far above the peak.
    """
    kept = [(name, values) for name, values in stretches if len(values)]
    if not kept:
        return ""
    peak = max(max(values) for _, values in kept)
    shows_limit = limit_bytes is not None and limit_bytes <= 1.5 * peak
    top = max(peak, (limit_bytes or 0) if shows_limit else 0) or 1
    axis = max(len(format_bytes(top)), len(format_bytes(0)))
    cells = min(width or MAX_WIDTH, MAX_WIDTH) - axis - 2
    if cells < MIN_COLUMNS:
        return ""
    columns = [_columns(values, count) for (_, values), count in zip(kept, _shares(kept, cells), strict=True)]
    rows = list(
        _rows([value for column in columns for value in column], top, limit_bytes if shows_limit else None)
    )
    scale = {0: format_bytes(top), HEIGHT - 1: format_bytes(0)}
    lines = [f"{scale.get(i, ''):>{axis}} {row.rstrip()}" for i, row in enumerate(rows)]
    widths = [(name, len(column)) for (name, _), column in zip(kept, columns, strict=True)]
    names = "".join(_cut(name, cells).center(cells) for name, cells in widths)
    cut = [f"{_cut(name, cells)}: {name}" for name, cells in widths if _cut(name, cells) != name]
    indent = " " * (axis + 1)
    key = [wrap(f"{indent}{', '.join(dict.fromkeys(cut))}", width, rest=indent)] if cut else []
    return "\n".join([*lines, f"{' ' * axis} {names.rstrip()}", *key])


def _shares(stretches: Sequence[tuple[str, Sequence[int]]], cells: int) -> list[int]:
    """Columns of each stretch by its length; at least one each."""
    total = sum(len(values) for _, values in stretches)
    return [max(1, len(values) * cells // total) for _, values in stretches]


def _columns(values: Sequence[int], count: int) -> list[int]:
    """`count` columns; where there are fewer values, some are repeated."""
    number = len(values)
    edges = [i * number // count for i in range(count + 1)]
    return [max(values[a : max(b, a + 1)]) for a, b in pairwise(edges)]


def _rows(columns: Sequence[int], top: int, limit_bytes: int | None) -> Iterator[str]:
    """The picture's lines from the top down, each column in eighths of a cell."""
    blocks = _BLOCKS if _can_draw() else _ASCII
    eighths = [round(value / top * HEIGHT * 8) for value in columns]
    limit_row = None if limit_bytes is None else min(HEIGHT - 1, int(limit_bytes / top * HEIGHT))
    for row in range(HEIGHT - 1, -1, -1):
        blank = "-" if row == limit_row else " "
        cells = [max(0, min(8, count - 8 * row)) for count in eighths]
        yield "".join(blocks[cell] if cell else blank for cell in cells)


def _cut(name: str, cells: int) -> str:
    """A phase's name as far as it fits under its columns, with a gap to the next one; at least its first letter."""
    return name if len(name) < cells else name[: max(1, cells - 1)]
