"""A report as one HTML file that needs no network, and as Markdown. Whatever comes from a name or a file is escaped."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.report.content import Block, Code, Facts, Figure, Notes, Report, Table
from planner.render import printable

_TEMPLATE = Path(__file__).with_name("template.html")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&])")


def to_html(report: Report) -> str:
    """The page. Everything but finefit's own SVG is escaped by the template engine."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_clean, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["groups"] = group_by_kind
    page: str = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(report=report)
    return page


def _clean(value: Any) -> Any:
    """Text without control characters and marks that turn its direction; markup and numbers as they are."""
    if type(value) is not str:
        return value
    return "".join(c if c.isprintable() or c == "\n" else " " for c in value)


def group_by_kind(blocks: Iterable[Block]) -> list[tuple[str, list[Block]]]:
    """Neighbours of one kind together: figures stand beside each other."""
    return [(kind, list(found)) for kind, found in groupby(blocks, key=lambda block: block.kind)]


def to_markdown(report: Report) -> str:
    """The same content; pictures become their description."""
    lines = [f"# {escape(report.question)}", "", f"**{escape(report.answer)}**", ""]
    if report.doubts:
        lines += [
            "What makes these figures doubtful:",
            "",
            *(f"* {escape(line)}" for line in report.doubts),
            "",
        ]
    for section in report.sections:
        lines += [f"## {escape(section.title)}", ""]
        for block in section.blocks:
            lines += [*_block(block), ""]
    return "\n".join([*lines, escape(report.made), ""])


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line.

    >>> escape("<b>a_b</b>")
    '\\\\<b\\\\>a\\\\_b\\\\</b\\\\>'
    """
    return _MARKDOWN.sub(r"\\\1", printable(text))


def _block(block: Block) -> Iterator[str]:
    if block.title:
        yield f"**{escape(block.title)}**"
        yield ""
    yield from _WRITERS[block.kind](block)


def _figure(block: Figure) -> Iterator[str]:
    yield escape(block.alt)


def _table(block: Table) -> Iterator[str]:
    yield f"| {' | '.join(map(escape, block.columns))} |"
    yield f"|{'|'.join('---' if i < block.num_words else '--:' for i in range(len(block.columns)))}|"
    yield from (f"| {' | '.join(map(escape, row))} |" for row in block.rows)
    if block.note:
        yield ""
        yield escape(block.note)


def _facts(block: Facts) -> Iterator[str]:
    yield from (f"* {escape(name)}: {escape(value)}" for name, value in block.pairs)


def _notes(block: Notes) -> Iterator[str]:
    yield from (f"* {escape(line)}" for line in block.lines)


def _code(block: Code) -> Iterator[str]:
    """Indented, so that nothing in the text can end the block."""
    yield from (f"    {_clean(line)}" for line in block.text.splitlines())


_WRITERS: Mapping[str, Callable[[Any], Iterator[str]]] = {
    "figure": _figure,
    "table": _table,
    "facts": _facts,
    "notes": _notes,
    "code": _code,
}
