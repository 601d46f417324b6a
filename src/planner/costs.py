"""`finefit costs`: one plan on one's own card and on every cloud offer that can run it, from the cheapest up."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from planner.card_prices import CardPrice, price_range
from planner.catalog import gpu_profile
from planner.cost import (
    CloudTerms,
    OwnCost,
    OwnTerms,
    RentCost,
    Span,
    break_even_hours,
    own_cost,
    rent_cost,
)
from planner.errors import NotModelledError, SetupError, UnknownNameError
from planner.estimate import estimate
from planner.inventory import take_inventory
from planner.money import Money, Rates
from planner.offers import Offer
from planner.price_book import PriceBook, best_offers
from planner.price_dates import age_days
from planner.results import SCHEMA_VERSION, Estimate
from planner.run_length import RunLength, run_seconds, tokens_per_step
from planner.setup import TrainSetup
from planner.specs import GpuProfile, Machine, ModelSpec
from planner.tariffs import Tariff
from planner.units import DAY_S, HOUR_S, MINUTE_S

ANY_CARD = "any"
"""In `CostWishes.seconds` and `tokens_per_s`: holds for every card that isn't named."""

SETUP_S = Span(low=5 * MINUTE_S, high=20 * MINUTE_S)
DOWNLOAD_BYTES_PER_S = Span(low=50e6, high=500e6)
INTERRUPTIONS_PER_S = Span(low=0.0, high=2 / DAY_S)
"""Assumed, since no provider publishes them: an image with its packages, a download, spot interruptions."""

REST_OF_BOX_W = ((4, Span(low=100.0, high=150.0)), (1 << 30, Span(low=400.0, high=800.0)))
"""Watts of a box without its cards, by the most cards that it holds: a desktop, a server (both recalled)."""
SUPPLY_EFFICIENCY = Span(low=0.90, high=0.94)
"""Power supplies of the 80 PLUS Gold and Platinum classes (recalled)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CostWishes:
    """What the user says of money and time; None and empty: unknown. `is_owned`: the cards are there already.

    `seconds` and `tokens_per_s` by card name or ANY_CARD replace predicted times. `purchase` and `resale` are for one
    card; `hours` is the use of the cards between the two. `box_w` is the whole box at the wall.
    """

    currency: str = "USD"
    seconds: Mapping[str, float] = field(default_factory=dict)
    tokens_per_s: Mapping[str, float] = field(default_factory=dict)
    tariff: Tariff | None = None
    box_w: Span | None = None
    is_owned: bool = False
    purchase: Money | None = None
    resale: Money | None = None
    hours: float | None = None
    with_spot: bool = True
    setup_s: Span = SETUP_S
    download_bytes_per_s: Span = DOWNLOAD_BYTES_PER_S
    interruptions_per_s: Span = INTERRUPTIONS_PER_S
    checkpoint_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CostRow:
    """One offer that can run the plan: what it costs, its age, and break-even hours against the own card
    (`break_even` None: unknown, or buying never pays, as `never_pays` says).
    """

    offer: Offer
    tier: int
    age_days: int | None
    run_s: Span | None
    verdict: str
    cost: RentCost
    break_even: tuple[float, float | None] | None = None
    never_pays: bool = False

    def to_json(self) -> dict[str, Any]:
        """The offer's own keys, its price's age, and what the run costs there."""
        return {
            **asdict(self.offer),
            "tier": self.tier,
            "age_days": self.age_days,
            "run_s": None if self.run_s is None else [self.run_s.low, self.run_s.high],
            "verdict": self.verdict,
            "cost": self.cost.to_json(),
            "break_even_hours": None if self.break_even is None else list(self.break_even),
            "never_pays": self.never_pays,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class CostTable:
    """A plan's costs. `own_verdict` is that of the plan's own card; `too_small` and `refused` (with the reason)
    are cards that offers exist for and that can't run it; `card` is the own card's price where the user names none;
    `faults` are price rows that were left out.
    """

    estimate: Estimate
    length: RunLength | None
    own: OwnCost
    own_terms: OwnTerms
    card: CardPrice | None
    is_owned: bool
    rows: tuple[CostRow, ...]
    too_small: tuple[str, ...]
    refused: Mapping[str, str]
    faults: tuple[str, ...]
    currency: str
    rates: Rates
    tariff: Tariff | None
    today: datetime.date
    assumptions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The estimate's object with its `cost` filled in."""
        length = self.length
        cost = {
            "currency": self.currency,
            "steps": None if length is None else [length.low_steps, length.high_steps],
            "steps_source": None if length is None else length.source,
            "own": self.own.to_json(),
            "card": None if self.card is None else asdict(self.card),
            "offers": [row.to_json() for row in self.rows],
            "too_small": list(self.too_small),
            "refused": dict(self.refused),
            "left_out": list(self.faults),
            "exchange_rates": {"as_of": self.rates.as_of, "source": self.rates.source},
            "tariff": None if self.tariff is None else asdict(self.tariff),
            "today": self.today.isoformat(),
            "assumptions": list(self.assumptions),
        }
        return {**self.estimate.to_json(), "schema_version": SCHEMA_VERSION, "cost": cost}


def costs(
    setup: TrainSetup,
    machine: Machine,
    model: ModelSpec,
    *,
    book: PriceBook,
    rates: Rates,
    wishes: CostWishes,
    length: RunLength | None,
    today: datetime.date,
) -> CostTable:
    """The plan on `machine` as one's own and on each offer of `book` that can run it.

    Raises what `estimate` raises for the own machine; other cards that can't run the plan are listed.
    """
    here = estimate(setup, machine, model)
    cards = _Cards(setup, model, length, wishes)
    can_run = here.fit.verdict != "does-not-fit"
    is_known = wishes.purchase is not None or wishes.is_owned
    card = None if is_known else card_price_range(machine.gpu, wishes.currency)
    terms = own_terms(machine, wishes, card, setup.num_nodes)
    own = own_cost(terms, cards.run_s(machine.gpu, here) if can_run else None, rates, wishes.currency)
    rows, faults = _rows(cards, cloud_terms(here, model, wishes), book, rates, today)
    if can_run:
        rows = [_with_break_even(row, own, machine) for row in rows]
    return CostTable(
        estimate=here,
        length=length,
        own=own,
        own_terms=terms,
        card=card,
        is_owned=wishes.is_owned,
        rows=tuple(sorted(rows, key=_cheapest_first)),
        too_small=tuple(cards.too_small),
        refused=cards.refused,
        faults=(*faults, *book.faults),
        currency=wishes.currency,
        rates=rates,
        tariff=wishes.tariff,
        today=today,
        assumptions=tuple(_assumptions(wishes, terms)),
    )


def _rows(
    cards: _Cards, terms: CloudTerms, book: PriceBook, rates: Rates, today: datetime.date
) -> tuple[list[CostRow], list[str]]:
    """The offers that can run the plan, and what is wrong with those that can't be priced."""
    setup, wishes = cards.setup, cards.wishes
    offers = [offer for offer in book.offers if wishes.with_spot or not offer.is_spot]
    rows: list[CostRow] = []
    faults: list[str] = []
    for offer in _large_enough(best_offers(offers, today), setup):
        found = cards.estimate(offer)
        if found is None or found.fit.verdict == "does-not-fit":
            continue
        run_s, cloud = cards.run_s(gpu_profile(offer.gpu), found), book.cloud(offer.provider)
        try:
            cost = rent_cost(offer, run_s, terms, cloud, rates, wishes.currency, num_boxes=setup.num_nodes)
        except UnknownNameError as error:
            faults.append(f"{offer.provider} {offer.instance}: {error}")
            continue
        rows.append(_row(offer, found, run_s, cost, today))
    return rows, faults


class _Cards:
    """The plan on each kind of card, estimated once."""

    def __init__(
        self, setup: TrainSetup, model: ModelSpec, length: RunLength | None, wishes: CostWishes
    ) -> None:
        self.setup, self.model, self.length, self.wishes = setup, model, length, wishes
        self.too_small: list[str] = []
        self.refused: dict[str, str] = {}
        self._known: dict[str, Estimate | None] = {}

    def estimate(self, offer: Offer) -> Estimate | None:
        """None where the card can't run it; `refused` has the reason."""
        if offer.gpu not in self._known:
            self._known[offer.gpu] = self._judged(gpu_profile(offer.gpu))
        return self._known[offer.gpu]

    def _judged(self, gpu: GpuProfile) -> Estimate | None:
        try:
            found = estimate(self.setup, Machine(gpu=gpu, num_gpus=self.setup.num_gpus), self.model)
        except (SetupError, NotModelledError) as error:
            self.refused[gpu.name] = str(error)
            return None
        if found.fit.verdict == "does-not-fit":
            self.too_small.append(gpu.name)
        return found

    def run_s(self, gpu: GpuProfile, found: Estimate) -> Span | None:
        """Seconds of the run on a card: what the user says, else what finefit predicts, else unknown."""
        said = self._said(self.wishes.seconds, gpu)
        if said is not None:
            return Span(low=said, high=said)
        if self.length is None:
            return None
        speed = self._said(self.wishes.tokens_per_s, gpu)
        if speed is not None:
            tokens = tokens_per_step(self.setup)
            return Span(
                low=self.length.low_steps * tokens / speed, high=self.length.high_steps * tokens / speed
            )
        if found.time is None:
            return None
        low, high = run_seconds(self.length, found.time)
        return Span(low=low, high=high)

    def _said(self, values: Mapping[str, float], gpu: GpuProfile) -> float | None:
        return values.get(gpu.name, values.get(ANY_CARD))


def _large_enough(offers: Iterable[Offer], setup: TrainSetup) -> Iterator[Offer]:
    """Of each provider, card and kind the smallest instance that has the cards of one box; unused ones are paid."""
    needed = setup.num_gpus // setup.num_nodes
    fewest: dict[tuple[str, str, bool], Offer] = {}
    for offer in sorted(offers, key=lambda offer: offer.num_gpus):
        if offer.num_gpus >= needed:
            fewest.setdefault((offer.provider, offer.gpu, offer.is_spot), offer)
    return iter(fewest.values())


def cloud_terms(here: Estimate, model: ModelSpec, wishes: CostWishes) -> CloudTerms:
    """What a rented run needs: the model's 16-bit weights come down, the checkpoints stay on its disk beside
    them, and what was trained goes home.
    """
    weights = 0 if here.setup.from_scratch else 2 * model.num_params
    trained = take_inventory(here.setup, model).gradients_bytes
    return CloudTerms(
        setup_s=wishes.setup_s,
        download_bytes=weights,
        download_bytes_per_s=wishes.download_bytes_per_s,
        disk_bytes=weights + here.memory.disk_bytes,
        egress_bytes=trained,
        interruptions_per_s=wishes.interruptions_per_s,
        checkpoint_s=wishes.checkpoint_s,
    )


def own_terms(machine: Machine, wishes: CostWishes, card: CardPrice | None, num_nodes: int = 1) -> OwnTerms:
    """The own machine's power and price, the user's word before what is known of it."""
    count = machine.num_gpus
    purchase = wishes.purchase
    if purchase is None and card is not None:
        purchase = Money(low=card.low, high=card.high, currency=card.currency)
    return OwnTerms(
        box_w=wishes.box_w or box_power(machine, num_nodes),
        per_kwh=None if wishes.tariff is None else wishes.tariff.per_kwh,
        purchase=None if purchase is None else purchase.times(count),
        resale=None if wishes.resale is None else wishes.resale.times(count),
        hours=wishes.hours,
    )


def box_power(machine: Machine, num_nodes: int = 1) -> Span | None:
    """Watts at the wall of all boxes with each card at its limit; None where that isn't known."""
    if machine.gpu.tdp_w is None:
        return None
    cards = machine.num_gpus * machine.gpu.tdp_w
    rest = next(span for most, span in REST_OF_BOX_W if machine.num_gpus <= most * num_nodes)
    return Span(
        low=(cards + num_nodes * rest.low) / SUPPLY_EFFICIENCY.high,
        high=(cards + num_nodes * rest.high) / SUPPLY_EFFICIENCY.low,
    )


def card_price_range(gpu: GpuProfile, currency: str) -> CardPrice | None:
    """What a card costs to buy, in CNY where that is asked for and known, else in USD; None where nobody knows."""
    return (price_range(gpu, "CNY") if currency == "CNY" else None) or price_range(gpu, "USD")


def _row(offer: Offer, found: Estimate, run_s: Span | None, cost: RentCost, today: datetime.date) -> CostRow:
    return CostRow(
        offer=offer,
        tier=offer.tier(today),
        age_days=age_days(offer.as_of, today),
        run_s=run_s,
        verdict=found.fit.verdict,
        cost=cost,
    )


def _with_break_even(row: CostRow, own: OwnCost, machine: Machine) -> CostRow:
    rent = _rent_per_own_hour(row, own, machine)
    if rent is None or own.loss is None or own.electricity_hourly is None:
        return row
    found = break_even_hours(own.loss, rent, own.electricity_hourly)
    return replace(row, break_even=found, never_pays=found is None)


def _rent_per_own_hour(row: CostRow, own: OwnCost, machine: Machine) -> Money | None:
    """What renting costs for the work that the own card does in an hour; None where a time is unknown."""
    if row.offer.gpu == machine.gpu.name:
        return row.cost.hourly
    total = row.cost.total
    if total is None or own.run_s is None:
        return None
    return total.times(HOUR_S / own.run_s.middle)


def _cheapest_first(row: CostRow) -> tuple[int, bool, float, str, str]:
    total = row.cost.total
    amount = row.cost.hourly.middle if total is None else total.middle
    return (row.tier, total is None, amount, row.offer.provider, row.offer.gpu)


def _assumptions(wishes: CostWishes, terms: OwnTerms) -> Iterator[str]:
    yield "every step takes as long as a full batch; evaluations and saving aren't counted"
    yield (
        f"setting up a rented machine: {_minutes(wishes.setup_s)} min; download of the model: "
        f"{wishes.download_bytes_per_s.low / 1e6:g} to {wishes.download_bytes_per_s.high / 1e6:g} MB/s"
    )
    if wishes.with_spot:
        per_day = Span(
            low=wishes.interruptions_per_s.low * DAY_S, high=wishes.interruptions_per_s.high * DAY_S
        )
        yield f"spot machines: {per_day.low:g} to {per_day.high:g} interruptions a day, each repeats half a checkpoint interval"
    if wishes.box_w is None and terms.box_w is not None:
        yield f"the whole box takes {terms.box_w.low:.0f} to {terms.box_w.high:.0f} W: cards at their limit, rest recalled"


def _minutes(span: Span) -> str:
    return f"{span.low / MINUTE_S:g} to {span.high / MINUTE_S:g}"
