"""Pictures of money: time against cost of every offer, and one's own card against the cloud."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.report.content import Figure
from bench.report.drawing import MEASURED, PREDICTED, SERIES, draw, legend_below, listed, plain_numbers, short
from planner.units import HOUR_S, format_duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_BARS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """One way to run it: seconds, and a range of money in the table's currency."""

    name: str
    seconds: float
    low: float
    high: float
    is_own: bool = False

    @property
    def middle(self) -> float:
        """Of the range."""
        return (self.low + self.high) / 2


def pareto(offers: Sequence[Offer]) -> list[Offer]:
    """Those that no other one beats in both time and cost, the fastest first."""
    best: list[Offer] = []
    for offer in sorted(offers, key=lambda o: (o.seconds, o.middle)):
        if not best or offer.middle < best[-1].middle:
            best.append(offer)
    return best


def pareto_figure(offers: Sequence[Offer], currency: str) -> Figure | None:
    """Every offer by time and cost, those that nothing beats joined; None for fewer than two."""
    if len(offers) < 2:
        return None
    best = pareto(offers)

    def fill(axes: Axes) -> None:
        cloud, own = ([o for o in offers if o.is_own is wanted] for wanted in (False, True))
        axes.scatter(
            [o.seconds / HOUR_S for o in cloud],
            [o.middle for o in cloud],
            s=14,
            color=SERIES[6],
            label="offers",
        )
        axes.plot(
            [o.seconds / HOUR_S for o in best],
            [o.middle for o in best],
            "o-",
            color=PREDICTED,
            markersize=4,
            linewidth=1,
            label="nothing beats these",
        )
        if own:
            axes.scatter(
                [o.seconds / HOUR_S for o in own],
                [o.middle for o in own],
                s=70,
                marker="*",
                color=MEASURED,
                label="your own",
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        plain_numbers(axes.xaxis)
        plain_numbers(axes.yaxis)
        axes.set_xlabel("hours")
        axes.set_ylabel(currency)
        legend_below(axes)

    words = [f"{o.name}: {format_duration(o.seconds)}, {o.low:.2f} to {o.high:.2f} {currency}" for o in best]
    alt = f"Time against cost of {len(offers)} ways to run it. Nothing beats, in both, {listed(words, 8)}."
    return draw("Time against cost", alt, fill)


def cost_bars(offers: Sequence[Offer], currency: str) -> Figure | None:
    """Your own card above the cheapest offers, as ranges; None where there is nothing to compare."""
    own = [o for o in offers if o.is_own]
    cheapest = sorted((o for o in offers if not o.is_own), key=lambda o: o.middle)[:MAX_BARS]
    shown = [*own, *cheapest]
    if len(shown) < 2:
        return None

    def fill(axes: Axes) -> None:
        for i, offer in enumerate(shown):
            width = max(offer.high - offer.low, 0.01 * max(o.high for o in shown))
            axes.barh(i, width, 0.7, left=offer.low, color=MEASURED if offer.is_own else PREDICTED)
        axes.set_yticks(range(len(shown)), [textwrap.fill(short(o.name), 26) for o in shown])
        axes.invert_yaxis()
        axes.set_xlim(0, None)
        axes.set_xlabel(f"{currency}, from low to high")
        axes.grid(axis="y", visible=False)

    words = [f"{o.name} {o.low:.2f} to {o.high:.2f}" for o in shown]
    title = "Here or in the cloud" if own else "In the cloud"
    return draw(
        title,
        f"{title}, cost in {currency}: {'; '.join(words)}.",
        fill,
        height_inches=1.0 + 0.34 * len(shown),
    )
