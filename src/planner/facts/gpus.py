"""Accelerators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from planner.catalog import GIGA, TERA, find_gpu, gpus, usable_bytes_or_bound
from planner.errors import NotModelledError
from planner.facts import UNKNOWN, Fact, Kind, Record, column, optional, yes_no
from planner.render import Column
from planner.specs import GpuProfile
from planner.units import format_bytes, gib


def _record(gpu: GpuProfile) -> Record:
    try:
        usable_bytes, source = usable_bytes_or_bound(gpu)
    except NotModelledError:
        return asdict(gpu)
    return {
        **asdict(gpu),
        "usable_bytes": usable_bytes,
        "sources": {**gpu.sources, "usable_bytes": source},
    }


def _records() -> list[Record]:
    return [_record(gpu) for gpu in gpus().values()]


def _find(name: str) -> Record:
    return _record(find_gpu(name))


def _columns(records: list[Record]) -> list[Column]:
    return [
        column("GPU", records, lambda r: r["name"]),
        column("GiB", records, lambda r: f"{gib(r['memory_bytes']):g}", is_number=True),
        column(
            "GB/s", records, lambda r: optional(r["bandwidth_bytes_per_s"], _giga), is_number=True, drop=2
        ),
        column(
            "bf16 TFLOP/s",
            records,
            lambda r: optional(r["flops"].get("bfloat16"), _tera),
            is_number=True,
            drop=3,
        ),
        column("architecture", records, lambda r: r["architecture"], drop=4),
        column(
            "back end", records, lambda r: r["backend"] if r["modelled"] else f"{r['backend']} (not modelled)"
        ),
        column("released", records, lambda r: r["release_date"] or UNKNOWN, drop=5),
    ]


def _giga(value: float) -> str:
    return f"{value / GIGA:.0f}"


def _tera(value: float) -> str:
    return f"{value / TERA:.0f}"


_GPU_FACTS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("memory, as marketed", "memory_bytes", format_bytes),
    ("of which torch can have", "usable_bytes", lambda v: f"{gib(v):.2f} GiB"),
    ("memory bandwidth", "bandwidth_bytes_per_s", lambda v: f"{v / GIGA:g} GB/s"),
    ("power limit", "tdp_w", lambda v: f"{v:g} W"),
    ("link between GPUs, one way", "link_bytes_per_s", lambda v: f"{v / GIGA:g} GB/s"),
    ("PCIe, one way", "pcie_bytes_per_s", lambda v: f"{v / GIGA:.1f} GB/s"),
    ("compute capability", "compute_capability", lambda v: ".".join(map(str, v))),
    ("bf16", "bf16", yes_no),
    ("FlashAttention", "flash_attention", yes_no),
    ("bitsandbytes (4-bit, 8-bit)", "bitsandbytes", yes_no),
    ("fp8", "fp8", yes_no),
    ("launch price", "launch_price_usd", lambda v: f"{v:,.0f} USD"),
    ("launch price in China", "launch_price_cny", lambda v: f"{v:,.0f} CNY"),
    ("released", "release_date", str),
)


def _describe(record: Record) -> list[Fact]:
    sources = record["sources"]
    facts = [
        Fact(name="GPU", value=f"{record['name']} ({record['vendor']}, {record['architecture']})"),
        Fact(name="also called", value=", ".join(record["aliases"])),
        Fact(
            name="back end",
            value=record["backend"] + ("" if record["modelled"] else ": finefit has no memory rules for it"),
            source=sources.get("backend"),
        ),
    ]
    for name, key, show in _GPU_FACTS:
        facts.append(Fact(name=name, value=optional(record[key], show), source=sources.get(key)))
    facts[5:5] = [
        Fact(name=f"dense {dtype}", value=f"{flops / TERA:g} TFLOP/s", source=sources.get(f"flops.{dtype}"))
        for dtype, flops in record["flops"].items()
    ]
    if record["unified_memory"]:
        facts.append(Fact(name="memory is shared", value="with the processor (unified)"))
    return [*facts, Fact(name="note", value=record["note"] or "")]


KIND = Kind(records=_records, columns=_columns, find=_find, describe=_describe)
