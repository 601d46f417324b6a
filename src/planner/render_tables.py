"""The tables of `finefit fits` and `finefit needs` as people read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from planner.fits import FitsRow, FitsTable
from planner.needs import COUNTS, NeedsRow, NeedsTable
from planner.render import Column, blank_repeats, format_table, paint, wrap
from planner.render_estimate import VERDICT_TONES, describe_fit
from planner.setup import TrainSetup
from planner.units import format_bytes, format_count, gib

NEEDS_SHOWN = 8
"""Machines shown per method without --all."""

_FITS_MEANING = (
    "peak: torch's max_memory_allocated; free: what is left beside it, the CUDA context and half of the allocator's "
    "reserve; longest: tokens at micro-batch 1; batch: the largest micro-batch"
)
_PRICE_MEANING = (
    "Prices are those of the cards alone, the middle of a dated range; the launch price where nothing newer is "
    "known. finefit show CARD names the sources"
)


def format_fits(table: FitsTable, width: int | None = None) -> str:
    """The table, and under it what it means and assumes."""
    notes = [*_limit_notes(table.rows), *_problem_notes(table.rows)]
    if table.assumptions:
        notes += [_FITS_MEANING, "Assumed: " + "; ".join(table.assumptions)]
    body = format_table(_fits_columns(table.rows), width)
    return "\n".join([wrap(_fits_title(table), width), "", body, "", *_dim_notes(notes, width)])


def _fits_title(table: FitsTable) -> str:
    machine = table.machine
    label = paint(f"{machine.num_gpus} x {machine.gpu.name}", "strong")
    estimate = next((row.estimate for row in table.rows if row.estimate is not None), None)
    if estimate is None or estimate.fit.usable_bytes is None:
        return label
    room = f"{format_bytes(estimate.fit.usable_bytes)} each beside the CUDA context"
    return f"{label}, {room}: {_shape(estimate.setup, table.seq_len)}"


def _shape(setup: TrainSetup, seq_len: int) -> str:
    return f"sequences of {seq_len} tokens, micro-batch {setup.micro_batch_size}"


def _fits_columns(rows: Sequence[FitsRow]) -> list[Column]:
    def column(title: str, show: Callable[[FitsRow], str], **style: bool | int) -> Column:
        cells = tuple(show(row) for row in rows)
        return Column(
            title=title, cells=cells, is_number=bool(style.get("number")), drop=int(style.get("drop", 0))
        )

    return [
        blank_repeats(column("model", lambda r: r.model.name)),
        blank_repeats(column("params", lambda r: format_count(r.model.num_params), number=True, drop=3)),
        column("method", lambda r: r.method),
        column("peak GiB", _peak, number=True),
        column("verdict", _verdict),
        column("longest", _longest, number=True, drop=1),
        column("batch", _batch, number=True, drop=2),
    ]


def _peak(row: FitsRow) -> str:
    return "" if row.estimate is None else f"{gib(row.estimate.memory.peak_allocated_bytes):.1f}"


def _verdict(row: FitsRow) -> str:
    if row.estimate is None:
        return paint("can't run" if row.is_modelled else "not modelled", "dim")
    return paint(describe_fit(row.estimate.fit), VERDICT_TONES[row.estimate.fit.verdict])


def _longest(row: FitsRow) -> str:
    if row.estimate is None:
        return ""
    mark = "*" if row.is_longest_models_limit else ""
    return f"{mark}{row.longest_seq_len}" if row.longest_seq_len else "-"


def _batch(row: FitsRow) -> str:
    if row.estimate is None:
        return ""
    mark = ">=" if row.is_largest_searchs_limit else ""
    return f"{mark}{row.largest_micro_batch_size}" if row.largest_micro_batch_size else "-"


def _limit_notes(rows: Iterable[FitsRow]) -> list[str]:
    return ["* the model's own limit"] if any(row.is_longest_models_limit for row in rows) else []


def _problem_notes(rows: Iterable[FitsRow]) -> list[str]:
    """Each reason once, with the methods that it holds for."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.problem:
            names = reasons.setdefault(row.problem, [])
            names += [row.method] if row.method not in names else []
    return [f"{', '.join(methods)}: {why}" for why, methods in reasons.items()]


def format_needs(table: NeedsTable, width: int | None = None, *, show_all: bool = False) -> str:
    """The cheapest machines of each method, and under them how many more there are and what is assumed."""
    shown = [row for rows in table.rows.values() for row in (rows if show_all else rows[:NEEDS_SHOWN])]
    notes = [note for method in table.rows for note in _method_notes(table, method, show_all)]
    if not shown:
        return "\n".join([_needs_title(table, shown), "", *notes])
    notes.append(_PRICE_MEANING)
    if table.not_modelled:
        notes.append(f"Not modelled, so not judged: {', '.join(table.not_modelled)}")
    notes.append("Assumed: " + "; ".join(table.assumptions))
    title, body = (
        wrap(_needs_title(table, shown), width),
        format_table(_needs_columns(shown, table.currency), width),
    )
    return "\n".join([title, "", body, "", *_dim_notes(notes, width)])


def _needs_title(table: NeedsTable, shown: Sequence[NeedsRow]) -> str:
    model = paint(f"{table.model.name} ({format_count(table.model.num_params)})", "strong")
    if not shown:
        return model
    return f"{model}: {_shape(shown[0].setup, shown[0].setup.seq_len)}"


def _needs_columns(rows: Sequence[NeedsRow], currency: str) -> list[Column]:
    def column(title: str, show: Callable[[NeedsRow], str], **style: bool | int) -> Column:
        cells = tuple(show(row) for row in rows)
        return Column(
            title=title, cells=cells, is_number=bool(style.get("number")), drop=int(style.get("drop", 0))
        )

    return [
        blank_repeats(column("method", lambda r: r.setup.method)),
        column("cards", lambda r: f"{r.machine.num_gpus} x {r.machine.gpu.name}"),
        column(currency, _total_price, number=True),
        column("price", _price_kind, drop=2),
        column("sharding", lambda r: "" if r.setup.sharding == "none" else r.setup.sharding, drop=3),
        column("peak GiB", lambda r: f"{gib(r.memory.peak_allocated_bytes):.1f}", number=True, drop=1),
        column("free", lambda r: format_bytes(r.fit.headroom_bytes or 0), number=True),
    ]


def _total_price(row: NeedsRow) -> str:
    return "unknown" if row.total_price is None else f"{row.total_price:,.0f}"


def _price_kind(row: NeedsRow) -> str:
    if row.price is None:
        return ""
    doubt = "" if row.price.quality == "ok" else f" ({row.price.quality})"
    return f"{row.price.kind} {row.price.as_of or 'undated'}{doubt}".replace("undated (undated)", "(undated)")


def _method_notes(table: NeedsTable, method: str, show_all: bool) -> list[str]:
    """What the table doesn't show of a method."""
    rows, refused, parts = table.rows[method], table.refused[method], []
    if not show_all and len(rows) > NEEDS_SHOWN:
        parts.append(f"{len(rows) - NEEDS_SHOWN} more kinds of card can do it (--all)")
    if not rows:
        parts.append(f"no card can do it, not even {COUNTS[-1]} in one machine")
    elif table.too_small[method]:
        parts.append(f"{len(table.too_small[method])} are too small even times {COUNTS[-1]}")
    if refused:
        parts.append(f"{len(refused)} can't run it ({next(iter(refused.values()))})")
    return [f"{method}: {'; '.join(parts)}"] if parts else []


def _dim_notes(notes: Iterable[str], width: int | None) -> list[str]:
    return [paint(wrap(note, width, rest="  "), "dim") for note in notes]
