"""What a setup costs on its own card and in the cloud, for a report: a picture of both, and the cheapest ways."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from bench.report.content import Block, Notes, Table
from bench.report.drawing import short
from bench.report.money_figures import Offer, cost_bars, pareto, pareto_figure
from planner.costs import CostTable, CostWishes, costs
from planner.errors import FinefitError
from planner.estimate import resolve
from planner.prices import known_prices
from planner.run_length import RunLength, length_by_plan, length_by_tokens
from planner.setup import TrainSetup
from planner.specs import Machine
from planner.tariffs import WORLD, tariff
from planner.units import format_duration

USUAL_TOKENS = 1e6
"""What is priced where nothing says how long the run is."""
CURRENCY = "USD"
MAX_ROWS = 10


def money_blocks(
    setup: TrainSetup, machine: Machine, tokens_per_s: float | None = None
) -> list[Block | None]:
    """Pareto of time and cost, own card against the cloud, the cheapest offers, and what is assumed.

    `tokens_per_s` is what was measured on `machine`. Where something makes costs impossible, one note says what.
    """
    length = length_by_plan(setup) or length_by_tokens(setup, USUAL_TOKENS)
    try:
        table = cost_table(setup, machine, length, tokens_per_s)
    except FinefitError as error:
        return [Notes(title="", lines=(f"No costs: {error}",))]
    offers = list_offers(table)
    what = (
        f"{length.high_steps:,} optimizer steps" if setup.max_steps else "a million tokens in full sequences"
    )
    return [
        pareto_figure(offers, CURRENCY),
        cost_bars(offers, CURRENCY),
        _cheapest(offers, what),
        Notes(title="", lines=tuple(_notes(table, offers, what))),
    ]


def cost_table(
    setup: TrainSetup, machine: Machine, length: RunLength, tokens_per_s: float | None
) -> CostTable:
    """The costs of a run, at the world's average price of electricity. Raises FinefitError."""
    today = datetime.date.today()
    known = known_prices((), today)
    return costs(
        setup,
        machine,
        resolve(setup),
        book=known.book,
        rates=known.rates,
        wishes=CostWishes(
            currency=CURRENCY,
            tokens_per_s={} if tokens_per_s is None else {machine.gpu.name: tokens_per_s},
            tariff=tariff(WORLD, known.rates, CURRENCY),
            is_owned=True,
        ),
        length=length,
        today=today,
    )


def list_offers(table: CostTable) -> list[Offer]:
    """Every offer whose time and cost are both known, and the own machine."""
    offers = [
        Offer(
            name=f"{row.offer.provider} {row.offer.num_gpus} x {row.offer.gpu}{' spot' if row.offer.is_spot else ''}",
            seconds=row.run_s.middle,
            low=row.cost.total.low,
            high=row.cost.total.high,
        )
        for row in table.rows
        if row.run_s is not None and row.cost.total is not None
    ]
    own = table.own
    if own.run_s is not None and own.electricity is not None:
        electricity = own.electricity
        name = f"your own {table.estimate.gpu} (electricity)"
        offers.append(
            Offer(
                name=name, seconds=own.run_s.middle, low=electricity.low, high=electricity.high, is_own=True
            )
        )
    return offers


def _cheapest(offers: Sequence[Offer], what: str) -> Table | None:
    if not offers:
        return None
    best = {offer.name for offer in pareto(offers)}
    ordered = sorted(offers, key=lambda o: o.middle)[:MAX_ROWS]
    return Table(
        title=f"The cheapest ways, for {what}",
        columns=("machine", "time", f"{CURRENCY}", ""),
        rows=tuple(
            (
                short(o.name),
                format_duration(o.seconds),
                f"{o.low:.2f} to {o.high:.2f}",
                "nothing beats it" if o.name in best else "",
            )
            for o in ordered
        ),
    )


def _own_is_unknown(table: CostTable) -> str:
    """Why the own machine is in no picture, and what would put it there."""
    run_s = table.own.run_s
    if table.estimate.fit.verdict == "does-not-fit":
        return "Your own machine's cost is left out: by the prediction the setup doesn't fit there."
    if run_s is None:
        return "Your own machine's cost is unknown, since its speed isn't known: finefit machine measures it."
    return (
        f"Your own machine takes {format_duration(run_s.middle)}; its cost is unknown, since its power isn't known: "
        "finefit costs plan.yaml --box-watts W --tokens-per-second N takes what a meter at the wall and bench show."
    )


def _notes(table: CostTable, offers: Sequence[Offer], what: str) -> list[str]:
    lines = [f"Priced: {what}."]
    unknown = len(table.rows) - sum(not offer.is_own for offer in offers)
    if unknown:
        lines.append(f"{unknown} more offers can run it, but no time is known for their cards.")
    if not any(offer.is_own for offer in offers):
        lines.append(_own_is_unknown(table))
    return [
        *lines,
        f"Assumed: {'; '.join(table.assumptions)}. The command finefit costs has every offer with its date and source.",
    ]
