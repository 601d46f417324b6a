"""What a run costs: a pure function of its time, an offer and what is assumed around it.

Rented: the machine from its start to its end, with setting up, downloading the model and, for spot, what
interruptions repeat; storage; egress of the result. A cloud's price contains its power, so electricity is counted
for a card of one's own only. A part that isn't known is None and named; it is never counted as 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from planner.money import Money, Rates
from planner.offers import Offer
from planner.units import HOUR_S, KWH_JOULES, MONTH_S

GB = 10**9
"""As storage and traffic are billed."""
COARSEST_BILLING_S = HOUR_S
"""Where a provider's billing step is unknown, a run may be rounded up to this."""
CHECKPOINTS_PER_RUN = 10
"""`finefit train` saves every tenth of a run unless told otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A number between `low` and `high`: seconds, watts or bytes/s, as the field that holds it says."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        """The middle, for an order."""
        return (self.low + self.high) / 2

    def __add__(self, other: Span) -> Span:
        """The sum of both."""
        return Span(low=self.low + other.low, high=self.high + other.high)


@dataclass(frozen=True, kw_only=True, slots=True)
class CloudTerms:
    """What a rented run needs beside its training time.

    `setup_s` until the first step can run, the download apart; `download_bytes` at `download_bytes_per_s`;
    `disk_bytes` kept while the machine runs, `egress_bytes` taken home. `interruptions_per_s` of a spot machine;
    `checkpoint_s` between two checkpoints (None: a tenth of the run).
    """

    setup_s: Span
    download_bytes: int
    download_bytes_per_s: Span
    disk_bytes: int
    egress_bytes: int
    interruptions_per_s: Span
    checkpoint_s: float | None = None

    @property
    def start_s(self) -> Span:
        """From renting to the first step."""
        rate = self.download_bytes_per_s
        download = Span(low=self.download_bytes / rate.high, high=self.download_bytes / rate.low)
        return self.setup_s + download


@dataclass(frozen=True, kw_only=True, slots=True)
class CloudPrices:
    """A provider's prices beside the machine; None is unknown. `egress` is (up to GB, USD per GB), GB 0: no end."""

    disk_usd_per_gb_month: float | None = None
    egress_free_gb: float = 0.0
    egress: tuple[tuple[float, float], ...] | None = None
    min_billing_s: float | None = None
    billing_step_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RentCost:
    """One offer's cost of the run in the currency asked for. `total` is the sum of the parts that are known, None
    where the machine's own is not; `unknown` names the parts that are missing from it.
    """

    hourly: Money
    billed_s: Span | None
    parts: Mapping[str, Money | None]

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of the parts without a price."""
        return tuple(name for name, money in self.parts.items() if money is None)

    @property
    def total(self) -> Money | None:
        """All known parts, or None: without the machine's part a total would mean nothing."""
        if self.parts["machine"] is None:
            return None
        known = [money for money in self.parts.values() if money is not None]
        return sum(known[1:], start=known[0])

    def to_json(self) -> dict[str, Any]:
        """Money and seconds; `is_lower_bound` where a part is unknown."""
        return {
            "hourly": self.hourly.to_json(),
            "billed_s": None if self.billed_s is None else [self.billed_s.low, self.billed_s.high],
            "parts": {name: money and money.to_json() for name, money in self.parts.items()},
            "total": self.total and self.total.to_json(),
            "unknown": list(self.unknown),
            "is_lower_bound": self.total is not None and bool(self.unknown),
        }


def rent_cost(
    offer: Offer,
    run_s: Span | None,
    terms: CloudTerms,
    prices: CloudPrices,
    rates: Rates,
    currency: str,
    *,
    num_boxes: int = 1,
) -> RentCost:
    """The cost of `run_s` seconds of training on `num_boxes` machines of an offer; None: the time is unknown.

    Raises UnknownNameError where a currency has no rate.
    """
    hourly = rates.convert(offer.hourly.times(num_boxes), currency)
    wall_s = None if run_s is None else wall_time(run_s, terms, is_spot=offer.is_spot)
    billed_s = None if wall_s is None else billed_time(wall_s, _billing(offer, prices))
    parts: dict[str, Money | None] = {
        "machine": None if billed_s is None else hourly.times(billed_s.low / HOUR_S, billed_s.high / HOUR_S),
        "storage": _storage(terms, prices, billed_s, rates, currency),
        "egress": _egress(terms, prices, rates, currency),
    }
    if offer.basis != "instance":
        parts["host"] = None
    return RentCost(hourly=hourly, billed_s=billed_s, parts=parts)


def wall_time(run_s: Span, terms: CloudTerms, *, is_spot: bool) -> Span | None:
    """From renting to the last step.

    An interruption costs half of what lies between two checkpoints, and a new start. Interruptions come at a
    constant rate r over the time W that training takes with them, each costing c: W = T + r W c, so
    W = T / (1 - r c). None where r c reaches 1: such a run doesn't end.
    """
    start = terms.start_s
    if not is_spot:
        return start + run_s
    low = _with_interruptions(run_s.low, start.low, terms.interruptions_per_s.low, terms.checkpoint_s)
    high = _with_interruptions(run_s.high, start.high, terms.interruptions_per_s.high, terms.checkpoint_s)
    return None if low is None or high is None else start + Span(low=low, high=high)


def _with_interruptions(
    run_s: float, start_s: float, per_s: float, checkpoint_s: float | None
) -> float | None:
    between = run_s / CHECKPOINTS_PER_RUN if checkpoint_s is None else min(checkpoint_s, run_s)
    share_lost = per_s * (between / 2 + start_s)
    return None if share_lost >= 1 else run_s / (1 - share_lost)


def _billing(offer: Offer, prices: CloudPrices) -> CloudPrices:
    """The offer's own terms before its provider's."""
    return replace(
        prices,
        min_billing_s=prices.min_billing_s if offer.min_billing_s is None else offer.min_billing_s,
        billing_step_s=prices.billing_step_s if offer.billing_step_s is None else offer.billing_step_s,
    )


def billed_time(wall_s: Span, prices: CloudPrices) -> Span:
    """What is billed: at least the minimum, rounded up to the step; where that is unknown, up to a whole hour."""
    step, least = prices.billing_step_s, prices.min_billing_s
    low = _rounded_up(max(wall_s.low, least or 0.0), step or 0.0)
    high_step = COARSEST_BILLING_S if step is None else step
    return Span(low=low, high=max(low, _rounded_up(max(wall_s.high, least or 0.0), high_step)))


def _rounded_up(seconds: float, step_s: float) -> float:
    return math.ceil(seconds / step_s) * step_s if step_s else seconds


def _storage(
    terms: CloudTerms, prices: CloudPrices, billed_s: Span | None, rates: Rates, currency: str
) -> Money | None:
    if prices.disk_usd_per_gb_month is None or billed_s is None:
        return None
    per_month = prices.disk_usd_per_gb_month * terms.disk_bytes / GB
    monthly = rates.convert(Money(low=per_month, high=per_month, currency="USD"), currency)
    return monthly.times(billed_s.low / MONTH_S, billed_s.high / MONTH_S)


def _egress(terms: CloudTerms, prices: CloudPrices, rates: Rates, currency: str) -> Money | None:
    """From the month's free allowance untouched to used up."""
    if prices.egress is None:
        return None
    volume_gb = terms.egress_bytes / GB
    paid = (
        tiered_price(max(0.0, volume_gb - prices.egress_free_gb), prices.egress),
        tiered_price(volume_gb, prices.egress),
    )
    return rates.convert(Money(low=paid[0], high=paid[1], currency="USD"), currency)


def tiered_price(volume: float, tiers: tuple[tuple[float, float], ...]) -> float:
    """Price of a volume under tiers of (up to, price per unit); an end of 0 means none.

    >>> tiered_price(15.0, ((10, 2.0), (0, 1.0)))
    25.0
    """
    price, begin = 0.0, 0.0
    for end, per_unit in tiers:
        upper = min(volume, end) if end else volume
        price += max(0.0, upper - begin) * per_unit
        begin = max(begin, upper)
    return price


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnTerms:
    """A machine of one's own: power of the whole box at the wall, price of a kWh, and of the card if it is to be
    bought: `purchase` and `resale` for all cards, used `hours` in all before that. None is unknown.
    """

    box_w: Span | None
    per_kwh: Money | None
    purchase: Money | None = None
    resale: Money | None = None
    hours: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnCost:
    """The run on one's own machine: `electricity`, and `wear`, its share of what the cards lose in value."""

    run_s: Span | None
    electricity_hourly: Money | None
    wear_hourly: Money | None
    loss: Money | None

    @property
    def electricity(self) -> Money | None:
        """Of the whole run; all that it costs on a card that is there already."""
        return self._of_run(self.electricity_hourly)

    @property
    def wear(self) -> Money | None:
        """The run's share of purchase less resale."""
        return self._of_run(self.wear_hourly)

    @property
    def total_bought(self) -> Money | None:
        """On cards that are bought for such work; None where a part is unknown."""
        electricity, wear = self.electricity, self.wear
        return None if electricity is None or wear is None else electricity + wear

    def _of_run(self, hourly: Money | None) -> Money | None:
        if hourly is None or self.run_s is None:
            return None
        return hourly.times(self.run_s.low / HOUR_S, self.run_s.high / HOUR_S)

    def to_json(self) -> dict[str, Any]:
        """Money, and the run's seconds."""
        names = ("electricity_hourly", "wear_hourly", "electricity", "wear", "total_bought", "loss")
        money = {name: getattr(self, name) for name in names}
        return {
            "run_s": None if self.run_s is None else [self.run_s.low, self.run_s.high],
            **{name: value and value.to_json() for name, value in money.items()},
        }


def own_cost(terms: OwnTerms, run_s: Span | None, rates: Rates, currency: str) -> OwnCost:
    """The cost of a run on one's own machine; `run_s` None: its time is unknown."""
    electricity = None
    if terms.box_w is not None and terms.per_kwh is not None:
        per_joule = rates.convert(terms.per_kwh, currency).times(1 / KWH_JOULES)
        electricity = per_joule.times(terms.box_w.low * HOUR_S, terms.box_w.high * HOUR_S)
    loss = _loss(terms, rates, currency)
    wear = None if loss is None or terms.hours is None else loss.times(1 / terms.hours)
    return OwnCost(run_s=run_s, electricity_hourly=electricity, wear_hourly=wear, loss=loss)


def _loss(terms: OwnTerms, rates: Rates, currency: str) -> Money | None:
    """Purchase less resale, at least 0; without a resale value the card is worth nothing at the end."""
    if terms.purchase is None:
        return None
    paid = rates.convert(terms.purchase, currency)
    if terms.resale is None:
        return paid
    back = rates.convert(terms.resale, currency)
    return Money(low=max(0.0, paid.low - back.high), high=max(0.0, paid.high - back.low), currency=currency)


def break_even_hours(
    loss: Money, rent_hourly: Money, electricity_hourly: Money
) -> tuple[float, float | None] | None:
    """Hours of work after which buying was cheaper than renting, from soonest to latest.

    The latest is None where it may never be, the whole answer where it never is: renting costs less than the
    electricity. All in one currency; `rent_hourly` is what renting the same work costs per hour of the own card.
    """
    most = rent_hourly.high - electricity_hourly.low
    least = rent_hourly.low - electricity_hourly.high
    if most <= 0:
        return None
    return loss.low / most, loss.high / least if least > 0 else None
