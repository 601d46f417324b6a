"""Models."""

from __future__ import annotations

from planner.facts import UNKNOWN, Fact, Kind, Record, column, optional, yes_no
from planner.render import Column
from planner.specs import ModelSpec
from planner.units import format_count


def _record(model: ModelSpec) -> Record:
    keys = ("name", "hub_id", "family", "architecture", "hidden_size", "vocab_size", "max_positions")
    more = ("num_layers", "num_params", "num_active_params", "tied_head", "remote_code")
    facts = ("license", "commercial", "source")
    return {key: getattr(model, key) for key in (*keys, *more, *facts)}


def _records() -> list[Record]:
    from planner.resolve import model_names, resolve_model

    return [_record(resolve_model(name)) for name in model_names()]


def _find(name: str) -> Record:
    from planner.resolve import resolve_model

    return _record(resolve_model(name))


def _columns(records: list[Record]) -> list[Column]:
    return [
        column("model", records, lambda r: r["name"]),
        column("parameters", records, lambda r: format_count(r["num_params"]), is_number=True),
        column("active", records, _active, is_number=True, drop=5),
        column("context", records, lambda r: optional(r["max_positions"], str), is_number=True, drop=3),
        column("family", records, lambda r: r["family"], drop=4),
        column("licence", records, lambda r: r["license"] or UNKNOWN, drop=2),
        column("commercial use", records, lambda r: r["commercial"] or UNKNOWN, drop=1),
    ]


def _active(record: Record) -> str:
    is_sparse = record["num_active_params"] < record["num_params"]
    return format_count(record["num_active_params"]) if is_sparse else ""


def _describe(record: Record) -> list[Fact]:
    source = record["source"]
    sparse = _active(record)
    return [
        Fact(name="model", value=record["name"]),
        Fact(name="hub id", value=record["hub_id"] or UNKNOWN),
        Fact(name="family", value=f"{record['family']} ({record['architecture']})", source=source),
        Fact(
            name="parameters",
            value=f"{record['num_params']:,}" + (f", {sparse} active per token" if sparse else ""),
            source=f"counted from the shapes in {source}" if source else None,
        ),
        Fact(name="layers", value=str(record["num_layers"]), source=source),
        Fact(name="hidden size", value=str(record["hidden_size"]), source=source),
        Fact(
            name="vocabulary",
            value=f"{record['vocab_size']:,}"
            + (" (head tied to the embedding)" if record["tied_head"] else ""),
            source=source,
        ),
        Fact(name="longest context", value=optional(record["max_positions"], "{:,}".format), source=source),
        Fact(name="licence", value=record["license"] or UNKNOWN, source=source),
        Fact(name="commercial use", value=record["commercial"] or UNKNOWN),
        Fact(name="needs remote code", value=yes_no(record["remote_code"])),
    ]


KIND = Kind(records=_records, columns=_columns, find=_find, describe=_describe)
