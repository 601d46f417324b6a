"""What a search finds: options with their time, cost and quality, the best of them, and why others are out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from planner.cost import OwnCost, RentCost, Span
from planner.errors import UsageError
from planner.money import Money
from planner.offers import Offer
from planner.quality import Quality, Rung
from planner.results import Estimate
from planner.run_time import RunTime
from planner.sizing import Tally
from planner.specs import Machine
from planner.units import format_duration

TOKENS_OF_A_RATE = 1_000_000
"""Where no data says how long the run is, times are for as many tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One way to run: a setup on a machine that is owned, or rented by an `offer`.

    `wall_s` runs from renting to the last step; without a known run it is the time of a million token positions. None is
    unknown. `tier` is how far the price can be trusted (planner.offers), 0 for one's own machine.
    """

    rung: Rung
    machine: Machine
    estimate: Estimate
    quality: Quality
    run: RunTime | None
    wall_s: Span | None
    offer: Offer | None = None
    rent: RentCost | None = None
    own: OwnCost | None = None
    tier: int = 0

    @property
    def money(self) -> Money | None:
        """What the run costs: rent, or electricity; None where a part of the machine's own is unknown."""
        if self.rent is not None:
            return self.rent.total
        return None if self.own is None else self.own.electricity

    @property
    def relies_on_host(self) -> bool:
        """Whether it offloads to host memory of which nobody says how much there is."""
        return self.estimate.setup.offload != "none" and self.machine.host_bytes is None

    @property
    def doubts(self) -> int:
        """What it takes on trust: an old or undated price, and memory of the host."""
        return (self.tier > 0) + 2 * self.relies_on_host

    @property
    def where(self) -> str:
        """The machine and who rents it out."""
        if self.offer is None:
            return self.machine.label
        return f"{self.machine.label} at {self.offer.provider}{', spot' if self.offer.is_spot else ''}"

    @property
    def label(self) -> str:
        """Rung and place."""
        return f"{self.rung.name} on {self.where}"

    def to_json(self) -> dict[str, Any]:
        """The point, with the setup that reaches it."""
        return {
            "rung": self.rung.name,
            "gpu": self.machine.label,
            "offer": None if self.offer is None else asdict(self.offer),
            "wall_s": None if self.wall_s is None else [self.wall_s.low, self.wall_s.high],
            "cost": self.money and self.money.to_json(),
            "cost_is_lower_bound": bool(self.rent and self.rent.total and self.rent.unknown),
            "quality": asdict(self.quality),
            "host_bytes": self.estimate.memory.host_bytes,
            "relies_on_host": self.relies_on_host,
            "setup": self.estimate.setup.to_dict(),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Out:
    """A family that is out, with its gap: bytes, seconds or money over (None: that isn't the reason)."""

    label: str
    reason: str
    short_by_bytes: int | None = None
    over_s: float | None = None
    over_money: Money | None = None

    @property
    def gap(self) -> float | None:
        """Bytes, seconds or money over, whichever is the reason; None where there is nothing to measure."""
        money = None if self.over_money is None else self.over_money.high
        return next((gap for gap in (self.over_s, money, self.short_by_bytes) if gap is not None), None)

    def to_json(self) -> dict[str, Any]:
        """Reason and gap."""
        return {**asdict(self), "over_money": self.over_money and self.over_money.to_json()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What an option may cost and how long it may take, each held by the upper end of its range."""

    budget: Money | None = None
    deadline_s: float | None = None

    def out(self, option: Option) -> Out | None:
        """Why an option is out; None where it is within. What isn't known can't be promised."""
        if self.deadline_s is not None:
            if option.wall_s is None:
                return Out(label=option.label, reason="no time is known for this card, so no deadline holds")
            over = option.wall_s.high - self.deadline_s
            if over > 0:
                words = (
                    f"up to {format_duration(option.wall_s.high)}, {format_duration(over)} over the deadline"
                )
                return Out(label=option.label, reason=words, over_s=over)
        return None if self.budget is None else self._over_budget(option, self.budget)

    def _over_budget(self, option: Option, budget: Money) -> Out | None:
        money = option.money
        if money is None:
            return Out(label=option.label, reason="its cost isn't known, so no budget holds")
        over = money.high - budget.high
        if over <= 0:
            return None
        gap = Money(low=over, high=over, currency=money.currency)
        words = (
            f"up to {amount(money.high)} {money.currency}, over the budget by {amount(over)} {money.currency}"
        )
        return Out(label=option.label, reason=words, over_money=gap)

    def excess(self, option: Option) -> float:
        """How far over its limits, as the largest multiple; infinite where something isn't known."""
        found = [0.0]
        if self.deadline_s is not None:
            found.append(option.wall_s.high / self.deadline_s if option.wall_s else math.inf)
        if self.budget is not None:
            money = option.money
            found.append(money.high / self.budget.high if money and self.budget.high else math.inf)
        return max(found)

    @property
    def words(self) -> str:
        """Both limits as the user gave them."""
        parts = []
        if self.budget is not None:
            parts.append(f"the budget of {amount(self.budget.high)} {self.budget.currency}")
        if self.deadline_s is not None:
            parts.append(f"the deadline of {format_duration(self.deadline_s)}")
        return " and ".join(parts)


def amount(value: float) -> str:
    """Money as people read it, without its currency.

    >>> amount(0.456), amount(31.2), amount(2000)
    ('0.46', '31', '2,000')
    """
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The answer of a search. `front` holds the options that no other beats in time, cost and quality at once,
    `out` the families that are out, `tally` what was looked at.
    """

    goal: str
    chosen: Option
    front: tuple[Option, ...]
    out: tuple[Out, ...]
    tally: Tally
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    search_s: float

    def to_json(self) -> dict[str, Any]:
        """The chosen estimate with the run, its cost, the front and what is out."""
        chosen = self.chosen
        return {
            **chosen.estimate.to_json(),
            "cost": None if chosen.money is None else chosen.to_json()["cost"],
            "goal": self.goal,
            "chosen": {key: value for key, value in chosen.to_json().items() if key != "setup"},
            "run": chosen.run and chosen.run.to_json(),
            "front": [option.to_json() for option in self.front],
            "reasons": list(self.reasons),
            "rejected": [out.to_json() for out in self.out],
            "searched": {**asdict(self.tally), "seconds": self.search_s},
            "notes": list(self.notes),
        }


def _time(option: Option) -> float:
    return math.inf if option.wall_s is None else option.wall_s.middle


def _cost(option: Option) -> float:
    return math.inf if option.money is None else option.money.middle


Key = Callable[[Option], tuple[Any, ...]]

GOALS: Mapping[str, Key] = {
    "fastest": lambda o: (o.relies_on_host, _time(o), _cost(o), o.quality),
    "cheapest": lambda o: (o.doubts, _cost(o), _time(o), o.quality),
    "best-quality": lambda o: (o.relies_on_host, o.quality, o.doubts, _cost(o), _time(o)),
    "longest-context": lambda o: (o.relies_on_host, -_length(o), o.doubts, o.quality, _cost(o), _time(o)),
}
"""What comes first; the least is best. A price that is old, undated or recalled comes after every dated one, and what
needs an unknown host's memory after all that doesn't.
"""


def best(options: Sequence[Option], goal: str) -> Option:
    """The best option for a goal. Raises UsageError where nothing that the goal compares is known."""
    found = min(options, key=GOALS[goal])
    unknown = {"fastest": _time(found), "cheapest": _cost(found)}.get(goal, 0.0)
    if len(options) > 1 and math.isinf(unknown) and all(math.isinf(_time(o)) for o in options):
        raise UsageError(
            f"--goal {goal}: no step's time is known for any of these cards, so they can't be compared; "
            "name one with --gpu, or measure with `finefit bench`"
        )
    return found


def pareto(options: Iterable[Option], *, with_length: bool = False) -> tuple[Option, ...]:
    """Those that no other beats or equals in time, cost and quality together (and length, where that is asked for).

    What isn't known counts as worse than what is, and what is taken on trust beats nothing that isn't.
    """
    ranked = sorted(options, key=lambda o: (_time(o), _cost(o), o.quality, o.doubts, -_length(o)))
    front: list[Option] = []
    for option in ranked:
        is_beaten = any(
            _cost(other) <= _cost(option)
            and other.quality <= option.quality
            and other.doubts <= option.doubts
            and (not with_length or _length(other) >= _length(option))
            for other in front
        )
        if not is_beaten:
            front.append(option)
    return tuple(front)


def _length(option: Option) -> int:
    return option.estimate.setup.seq_len
