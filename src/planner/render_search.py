"""A search's outcome as people read it: the choice, the front, what is out, and what was looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from planner.methods import find_method
from planner.options import Option, Out, Outcome, amount
from planner.render import Column, format_facts, format_table, paint, wrap
from planner.render_estimate import format_answer
from planner.render_run import describe_span, format_run
from planner.results import Plan
from planner.units import format_bytes, format_duration

SHOWN_OF_FRONT = 12
SHOWN_OUT = 10
SHOWN_ALIKE = 3
"""Rows shown to people; --json has all."""


def format_outcome(found: Outcome, width: int | None = None) -> str:
    """The chosen option as a plan is shown, then the front and the rest."""
    chosen = found.chosen
    answer = Plan(estimate=chosen.estimate, reasons=found.reasons, rejected=())
    more = [format_facts(_money_facts(chosen), width)]
    if chosen.run is not None:
        more.insert(0, format_run(chosen.run, width))
    parts = [
        format_answer(answer, width, "\n".join(more), list(_format_out(found.out))),
        _format_front(found, width),
        paint("\n".join(wrap(note, width, rest="  ") for note in _notes(found)), "dim"),
    ]
    return "\n\n".join(part for part in parts if part)


def _money_facts(option: Option) -> list[tuple[str, str]]:
    where = "this machine" if option.machine.is_local else option.where
    facts = [("where", where)]
    if option.wall_s is not None and option.offer is not None and option.run is not None:
        facts.append(("until done", f"{describe_span(option.wall_s)}, renting and downloading included"))
    money = option.money
    kind = "electricity" if option.offer is None else "rent"
    facts.append(("cost", "unknown" if money is None else f"{_range(option)} {money.currency} of {kind}"))
    if option.offer is not None:
        facts.append(("price", f"{option.offer.as_of or 'undated'}, {option.offer.source}"))
    return facts


def _range(option: Option) -> str:
    money = option.money
    if money is None:
        return "unknown"
    low, high = amount(money.low), amount(money.high)
    mark = " +" if option.rent is not None and option.rent.unknown else ""
    return f"{low if low == high else f'{low}-{high}'}{mark}"


def _format_front(found: Outcome, width: int | None) -> str:
    rows = found.front[:SHOWN_OF_FRONT]
    if not rows:
        return ""
    is_rate = rows[0].run is None
    title = "Time per million positions" if is_rate else "Time"
    columns = [
        _column(rows, "", lambda o: "*" if _is_same(o, found.chosen) else ""),
        _column(rows, title, lambda o: format_duration(o.wall_s.middle) if o.wall_s else "unknown", True),
        _column(rows, "cost", lambda o: _range(o), True),
        _column(rows, "quality", lambda o: _describe_quality(o)),
        _column(rows, "machine", lambda o: o.where),
    ]
    heading = paint("Nothing beats these in time, cost and quality at once", "strong")
    more = len(found.front) - len(rows)
    rest = f"\n{more} more (--json)" if more > 0 else ""
    return f"{heading}\n{format_table(columns, width)}{rest}"


def _is_same(one: Option, other: Option) -> bool:
    return (one.label, one.estimate.setup.seq_len) == (other.label, other.estimate.setup.seq_len)


def _column(
    rows: Sequence[Option], title: str, show: Callable[[Option], str], number: bool = False
) -> Column:
    return Column(title=title, cells=tuple(map(show, rows)), is_number=number)


def _describe_quality(option: Option) -> str:
    parts = [option.rung.name, f"{option.estimate.setup.seq_len} tokens"]
    if find_method(option.estimate.setup.method).has_rank:
        parts.append(f"rank {option.estimate.setup.rank}")
    if option.relies_on_host:
        parts.append(f"{format_bytes(option.estimate.memory.host_bytes)} of host memory")
    if option.quality.lost_share:
        parts.append(f"{100 * option.quality.lost_share:.2g} % of the tokens cut off")
    return ", ".join(parts)


def _format_out(found: Sequence[Out]) -> Iterator[str]:
    """The nearest misses first; what has no gap comes last, each reason once."""
    with_gap = [out for out in found if out.gap is not None]
    ranked = sorted(with_gap, key=lambda out: (out.short_by_bytes is not None, out.gap))
    for out in ranked[:SHOWN_OUT]:
        yield f"{out.label}: {out.reason}"
    if len(ranked) > SHOWN_OUT:
        yield f"{len(ranked) - SHOWN_OUT} more (--json)"
    for reason, labels in _by_reason(out for out in found if out.gap is None).items():
        more = f" and {len(labels) - SHOWN_ALIKE} more" if len(labels) > SHOWN_ALIKE else ""
        yield f"{'; '.join(labels[:SHOWN_ALIKE])}{more}: {reason}"


def _by_reason(found: Iterable[Out]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for out in found:
        names.setdefault(out.reason, []).append(out.label)
    return names


def _notes(found: Outcome) -> Iterator[str]:
    yield from found.notes
    tally = found.tally
    yield (
        f"decided on {tally.setups:,} setups ({tally.ways:,} with each offer) in {found.search_s:.1f} s, by {tally.sized:,} "
        f"peaks and {tally.timed:,} step times that were computed; the others follow from these (docs/search.md)"
    )
