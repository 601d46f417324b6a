"""Export formats."""

from __future__ import annotations

from planner.export import Format, find_format, formats
from planner.facts import Fact, Kind, Record, column
from planner.render import Column


def _record(form: Format) -> Record:
    return {"name": form.name, "summary": form.summary}


def _records() -> list[Record]:
    return [_record(form) for form in formats()]


def _find(name: str) -> Record:
    return _record(find_format(name))


def _columns(records: list[Record]) -> list[Column]:
    return [
        column("format", records, lambda r: r["name"]),
        column("what is written", records, lambda r: r["summary"], is_prose=True),
    ]


def _describe(record: Record) -> list[Fact]:
    return [Fact(name="format", value=f"{record['name']}: {record['summary']}")]


KIND = Kind(records=_records, columns=_columns, find=_find, describe=_describe)
