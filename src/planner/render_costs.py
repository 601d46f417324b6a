"""The tables of `finefit costs` as people read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from planner.cost import Span
from planner.costs import CostRow, CostTable
from planner.money import Money
from planner.price_dates import describe_date
from planner.render import Column, format_facts, format_table, paint, wrap
from planner.render_estimate import describe_fit
from planner.units import format_duration

SHOWN = 12
"""Offers shown without --all."""
_BREAK_EVEN = "break-even h"
_TIERS = {2: "the host is billed on top", 3: "doubtful"}


def format_costs(table: CostTable, width: int | None = None, *, show_all: bool = False) -> str:
    """The own card, the offers from the cheapest up, and under them what is unknown, assumed and left out."""
    rows = table.rows if show_all else table.rows[:SHOWN]
    sources = list(dict.fromkeys(row.offer.source for row in rows))
    parts = [paint(_title(table), "strong"), format_facts(_own_facts(table), width)]
    if rows:
        parts.append(format_table(_columns(rows, table, sources), width))
    parts.append(
        "\n".join(paint(wrap(note, width, rest="  "), "dim") for note in _notes(table, rows, sources))
    )
    return "\n\n".join(parts)


def _title(table: CostTable) -> str:
    return f"{table.estimate.setup.method} of {table.estimate.setup.model_label}, in {table.currency}"


def _own_facts(table: CostTable) -> list[tuple[str, str]]:
    own, card = table.own, table.estimate.gpu
    facts = [("steps", _describe_length(table)), (card, describe_fit(table.estimate.fit))]
    if table.estimate.fit.verdict == "does-not-fit":
        return facts
    facts += [("time", _describe_time(own.run_s)), ("already owned", _describe_electricity(table))]
    return facts if table.is_owned else [*facts, ("bought for it", _describe_bought(table))]


def _describe_length(table: CostTable) -> str:
    length = table.length
    if length is None:
        return "unknown: give --tokens, --max-steps or --data"
    same = length.low_steps == length.high_steps
    steps = f"{length.high_steps:,}" if same else f"{length.low_steps:,} to {length.high_steps:,}"
    return f"{steps} ({length.source})"


def _describe_time(run_s: Span | None) -> str:
    if run_s is None:
        return "unknown: give --hours, or --tokens-per-second (finefit bench measures it)"
    low, high = format_duration(run_s.low), format_duration(run_s.high)
    return low if low == high else f"{low} to {high}"


def _describe_electricity(table: CostTable) -> str:
    own, tariff = table.own, table.tariff
    if own.electricity_hourly is None:
        return "unknown: give --box-watts and --country or --tariff"
    total = format_money(own.electricity) if own.electricity else "unknown"
    where = f", {tariff.country} {describe_date(tariff.as_of, table.today)}" if tariff else ""
    doubt = f" ({tariff.quality})" if tariff and tariff.quality != "ok" else ""
    return f"{total} of electricity ({format_money(own.electricity_hourly)} an hour{where}{doubt})"


def _describe_bought(table: CostTable) -> str:
    own = table.own
    if own.loss is None:
        return "unknown: give --card-price"
    loss = f"{'loses' if table.own_terms.resale else 'costs'} {format_money(own.loss)}{_card_note(table)}"
    if own.wear_hourly is None:
        return f"{loss}; its share of the run is unknown: give --hours-per-year (and --years, --resale)"
    total = format_money(own.total_bought) if own.total_bought else "unknown"
    return f"{total} with {format_money(own.wear_hourly)} an hour of wear ({loss})"


def _card_note(table: CostTable) -> str:
    """Kind and date of the card's price where it isn't the user's."""
    card = table.card
    if card is None:
        return ""
    doubt = f", {card.quality}" if card.quality != "ok" else ""
    return f", {card.kind} {describe_date(card.as_of, table.today)}{doubt}"


def format_money(money: Money) -> str:
    """A range of money without its currency; cents below 1000.

    >>> format_money(Money(low=0.304, high=1.5, currency="USD")), format_money(Money(low=2000, high=2000, currency="USD"))
    ('0.30-1.50', '2,000')
    """
    low, high = _amount(money.low), _amount(money.high)
    return low if low == high else f"{low}-{high}"


def _amount(amount: float) -> str:
    if 0 < amount < 0.01:
        return "<0.01"
    return f"{amount:,.0f}" if amount >= 1000 else f"{amount:.2f}"


def _columns(rows: Sequence[CostRow], table: CostTable, sources: list[str]) -> list[Column]:
    def column(title: str, show: Callable[[CostRow], str], *, number: bool = False, drop: int = 0) -> Column:
        return Column(title=title, cells=tuple(map(show, rows)), is_number=number, drop=drop)

    says_break_even = any(row.break_even or row.never_pays for row in rows)
    columns = [
        column("offer", lambda r: r.offer.provider),
        column("machine", lambda r: _machine(r, table)),
        column(f"{table.currency}/h", lambda r: format_money(r.cost.hourly), number=True),
        column("total", _total, number=True),
        column(_BREAK_EVEN, _break_even, number=True, drop=1),
        column("price of", lambda r: _dated(r, table), drop=3),
        column("region", lambda r: r.offer.region, drop=5),
        column("source", lambda r: f"[{sources.index(r.offer.source) + 1}]", drop=4),
    ]
    return [c for c in columns if says_break_even or c.title != _BREAK_EVEN]


def _machine(row: CostRow, table: CostTable) -> str:
    """The instance's cards, with how many of them the plan uses where it isn't all."""
    setup, count = table.estimate.setup, row.offer.num_gpus
    used = setup.num_gpus // setup.num_nodes
    cards = f"{count} x {row.offer.gpu}" if used == count else f"{used} of {count} x {row.offer.gpu}"
    marks = ["spot"] * row.offer.is_spot + ["tight"] * (row.verdict == "tight")
    return ", ".join([cards, *marks])


def _total(row: CostRow) -> str:
    total = row.cost.total
    if total is None:
        return "unknown"
    return f"{format_money(total)}{' +' if row.cost.unknown else ''}"


def _break_even(row: CostRow) -> str:
    if row.never_pays:
        return "never"
    if row.break_even is None:
        return "unknown"
    low, high = row.break_even
    latest = "never" if high is None else f"{high:,.0f}"
    return latest if latest == f"{low:,.0f}" else f"{low:,.0f}-{latest}"


def _dated(row: CostRow, table: CostTable) -> str:
    doubts = [row.offer.quality] if row.offer.quality != "ok" else []
    doubts += [_TIERS[row.tier]] if row.tier in _TIERS else []
    return "; ".join([describe_date(row.offer.as_of, table.today), *doubts])


def _by_reason(table: CostTable) -> dict[str, list[str]]:
    """Each reason once, with the cards that it holds for."""
    names: dict[str, list[str]] = {}
    for name, reason in table.refused.items():
        names.setdefault(reason.replace(name, "the card"), []).append(name)
    return names


def _notes(table: CostTable, rows: Sequence[CostRow], sources: Sequence[str]) -> Iterator[str]:
    yield from _row_notes(table, rows)
    if table.too_small:
        yield f"Too small: {', '.join(table.too_small)}"
    for reason, names in _by_reason(table).items():
        yield f"Can't run it: {', '.join(names)} ({reason})"
    if table.faults:
        yield f"{len(table.faults)} price rows left out (--json lists them): {table.faults[0]}"
    yield "Assumed: " + "; ".join(table.assumptions)
    yield from _source_notes(table, sources)


def _row_notes(table: CostTable, rows: Sequence[CostRow]) -> Iterator[str]:
    """What the table of offers means and doesn't show."""
    if not table.rows:
        yield "No offer that finefit knows can run it."
    if len(rows) < len(table.rows):
        yield f"{len(table.rows) - len(rows)} more offers (--all); dated prices come before old and undated ones"
    missing = dict.fromkeys(part for row in rows if row.cost.total for part in row.cost.unknown)
    if missing:
        yield f"+ the price of {', '.join(missing)} is unknown and comes on top"
    if any(row.cost.total is None for row in rows):
        yield "Total unknown: no time is known for that card; give --hours GPU=H or --tokens-per-second GPU=X"
    if any(row.break_even for row in rows):
        yield "Break-even: hours of work on the own card after which buying it was cheaper than renting"


def _source_notes(table: CostTable, sources: Sequence[str]) -> Iterator[str]:
    if table.card is not None:
        yield f"Card: {table.card.source}"
    if table.tariff is not None:
        yield f"Electricity: {table.tariff.source}"
    yield f"Exchange rates of {describe_date(table.rates.as_of, table.today)}: {table.rates.source}"
    if sources:
        yield "Offers, whose price is no promise that one is free:"
    for number, source in enumerate(sources, 1):
        yield f"[{number}] {source}"
