"""Fine-tuning methods."""

from __future__ import annotations

from planner.facts import Fact, Kind, Record, column, yes_no
from planner.methods import Method
from planner.render import Column


def _record(method: Method) -> Record:
    keys = ("name", "summary", "trains_base", "quantises_base", "learning_rate", "learning_rate_source")
    return {key: getattr(method, key) for key in keys}


def _records() -> list[Record]:
    from planner.methods import methods

    return [_record(method) for method in methods().values()]


def _find(name: str) -> Record:
    from planner.methods import find_method

    return _record(find_method(name.lower()))


def _columns(records: list[Record]) -> list[Column]:
    return [
        column("method", records, lambda r: r["name"]),
        column("learning rate", records, lambda r: f"{r['learning_rate']:g}", is_number=True, drop=1),
        column("what it does", records, lambda r: r["summary"], is_prose=True),
    ]


def _describe(record: Record) -> list[Fact]:
    return [
        Fact(name="method", value=f"{record['name']}: {record['summary']}"),
        Fact(name="trains the model's own weights", value=yes_no(record["trains_base"])),
        Fact(name="quantises the frozen weights", value=yes_no(record["quantises_base"])),
        Fact(
            name="default learning rate",
            value=f"{record['learning_rate']:g}",
            source=record["learning_rate_source"],
        ),
    ]


KIND = Kind(records=_records, columns=_columns, find=_find, describe=_describe)
