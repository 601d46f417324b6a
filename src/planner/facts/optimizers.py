"""Optimizers."""

from __future__ import annotations

from planner.facts import Fact, Kind, Record, column, yes_no
from planner.optimizers import Optimizer
from planner.render import Column


def _record(optimizer: Optimizer) -> Record:
    keys = ("name", "summary", "num_states", "state_bits", "step_copies", "is_factored", "is_paged")
    return {key: getattr(optimizer, key) for key in (*keys, "factory", "hf_name", "source")}


def _records() -> list[Record]:
    from planner.optimizers import OPTIMIZERS

    return [_record(optimizer) for optimizer in OPTIMIZERS.values()]


def _find(name: str) -> Record:
    from planner.optimizers import find_optimizer

    return _record(find_optimizer(name.lower()))


def _states(record: Record) -> str:
    if record["is_factored"]:
        return "rows + columns"
    width = f" of {record['state_bits']} bits" if record["state_bits"] else ""
    return f"{record['num_states']}{width}"


def _columns(records: list[Record]) -> list[Column]:
    return [
        column("optimizer", records, lambda r: r["name"]),
        column("states", records, _states, drop=1),
        column("what it is", records, lambda r: r["summary"], is_prose=True),
    ]


def _describe(record: Record) -> list[Fact]:
    return [
        Fact(name="optimizer", value=f"{record['name']}: {record['summary']}"),
        Fact(name="states per parameter", value=_states(record), source=record["source"]),
        Fact(name="copies made by a step", value=f"{record['step_copies']:g}", source=record["source"]),
        Fact(name="states in host memory", value=yes_no(record["is_paged"])),
        Fact(name="class", value=record["factory"]),
        Fact(name="Trainer's name", value=record["hf_name"] or "none"),
    ]


KIND = Kind(records=_records, columns=_columns, find=_find, describe=_describe)
