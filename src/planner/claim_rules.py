"""How a claim is decided: one function to each rule, which asks the estimator and the prices about the claim's cases."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from planner.card_prices import price_range
from planner.catalog import parse_gpu
from planner.claims import (
    FALSE,
    NOT_ANSWERED,
    NOT_HARDWARE,
    TRUE,
    TRUE_ONLY_IF,
    Case,
    Claim,
    Finding,
    Judged,
    Judgement,
    Nearest,
    read_claims,
    read_guides,
)
from planner.cost import Span
from planner.errors import ConfigError, DoesNotFitError, NotModelledError, SetupError
from planner.estimate import estimate, open_attention, resolve
from planner.inventory import take_inventory
from planner.methods import methods
from planner.money import Money, Rates, shipped_rates
from planner.price_book import PriceBook, best_offers, shipped_book
from planner.price_dates import first_day
from planner.recipes import recipe, shared_by
from planner.results import Estimate
from planner.run_length import tokens_per_step
from planner.search import plan
from planner.setup import TrainSetup
from planner.specs import Machine
from planner.units import DAY_S, HOUR_S

MONTH_S = 30 * DAY_S
BY_VERDICT = {"fits": True, "tight": None, "does-not-fit": False}
SEVERAL = (2, 4, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """What money is judged from."""

    book: PriceBook
    rates: Rates
    today: datetime.date


def judge_claims(ids: Iterable[str] = ()) -> Judgement:
    """All claims, or those named. Unknown names give nothing: the caller checks them."""
    book = shipped_book()
    days = [day for offer in book.offers if offer.as_of and (day := first_day(offer.as_of))]
    prices = Prices(book=book, rates=shipped_rates(), today=max(days))
    wanted = set(ids)
    claims = [claim for claim in read_claims() if not wanted or claim.id in wanted]
    return Judgement(
        guides=read_guides(),
        judged=tuple(RULES[claim.rule](claim, prices) for claim in claims),
        prices_as_of=prices.today,
    )


def _decide(claim: Claim, findings: Iterable[Finding], *, between: str = NOT_ANSWERED) -> Judged:
    """`between` is the verdict where no case gives a yes or a no."""
    found = tuple(findings)
    answers = [finding.holds for finding in found]
    if set(answers) == {None}:
        verdict = between
    elif all(answers):
        verdict = TRUE
    elif not any(answers) and None not in answers:
        verdict = FALSE
    else:
        verdict = TRUE_ONLY_IF
    return Judged(claim=claim, verdict=verdict, findings=found)


def _ask(case: Case) -> Finding:
    """The estimate of a case, or why there is none; `holds` says whether it fits."""
    machine = _machine(case)
    asked = {
        **recipe(case.fields.get("method", "lora"), machine.gpu),
        "checkpointing": "full",
        **shared_by(machine.num_gpus),
        **case.fields,
    }
    try:
        found = estimate(TrainSetup.from_dict({**asked, **open_attention(asked, machine)}), machine)
    except (SetupError, NotModelledError, ConfigError) as error:
        return Finding(case=case, holds=False, error=str(error))
    return Finding(case=case, holds=BY_VERDICT[found.fit.verdict], estimate=found)


def _machine(case: Case) -> Machine:
    profile, count = parse_gpu(case.gpu)
    return Machine(gpu=profile, num_gpus=count)


# ------------------------------------------------------------- memory


def fits(claim: Claim, prices: Prices) -> Judged:
    """The configurations run on their cards. Where none does: the nearest to the first that does."""
    judged = _decide(claim, map(_ask, claim.cases), between=TRUE_ONLY_IF)
    if any(finding.holds for finding in judged.findings):
        return judged
    return replace(judged, nearest=_nearest(claim.cases[0]))


def does_not_fit(claim: Claim, prices: Prices) -> Judged:
    """The claim says that these cards are too small."""
    found = [replace(f, holds=None if f.holds is None else not f.holds) for f in map(_ask, claim.cases)]
    return _decide(claim, found, between=TRUE_ONLY_IF)


def saves_memory(claim: Claim, prices: Prices) -> Judged:
    """In each pair of cases the second needs less than the first, by a share of at least `at_least`."""
    return _decide(claim, (_saving(*pair, claim.limits["at_least"]) for pair in _pairs(claim)))


def _saving(first: Case, second: Case, at_least: float) -> Finding:
    before, after = _ask(first).estimate, _ask(second)
    if before is None or after.estimate is None:
        return replace(after, holds=None)
    share = 1 - after.estimate.memory.peak_allocated_bytes / before.memory.peak_allocated_bytes
    return replace(after, share=share, holds=share >= at_least)


def _pairs(claim: Claim) -> Iterator[tuple[Case, Case]]:
    return zip(claim.cases[::2], claim.cases[1::2], strict=True)


def trains_share(claim: Claim, prices: Prices) -> Judged:
    """The share of parameters that train lies from `low` to `high`."""
    return _decide(claim, (_trained(case, claim.limits) for case in claim.cases))


def _trained(case: Case, limits: Mapping[str, Any]) -> Finding:
    found = _ask(case)
    if found.estimate is None:
        return found
    model = resolve(found.estimate.setup)
    share = take_inventory(found.estimate.setup, model).trained_params / model.num_params
    return replace(found, share=share, holds=limits["low"] <= share <= limits["high"])


# ------------------------------------------------------------- time and money


def is_faster(claim: Claim, prices: Prices) -> Judged:
    """In each pair of cases the second makes at least `at_least` times the first's tokens per second."""
    return _decide(claim, (_speed_up(*pair, claim.limits["at_least"]) for pair in _pairs(claim)))


def _speed_up(first: Case, second: Case, at_least: float) -> Finding:
    before, after = _ask(first).estimate, _ask(second)
    if before is None or after.estimate is None or before.time is None or after.estimate.time is None:
        return replace(after, holds=None)
    ratio = after.estimate.time.tokens_per_s / before.time.tokens_per_s
    return replace(after, ratio=ratio, holds=ratio >= at_least)


def takes(claim: Claim, prices: Prices) -> Judged:
    """A whole run takes from `low_hours` to `high_hours`."""
    limits = Span(low=claim.limits["low_hours"], high=claim.limits["high_hours"])
    found = [_run(case, prices, "CNY") for case in claim.cases]
    return _decide(claim, (replace(f, holds=_overlap(f.hours, limits)) for f in found))


def run_costs(claim: Claim, prices: Prices) -> Judged:
    """A whole run on rented cards costs from `low` to `high` of `currency`."""
    limits, currency = _limits(claim), claim.limits["currency"]
    found = [_run(case, prices, currency) for case in claim.cases]
    return _decide(claim, (replace(f, holds=_overlap(_span(f.money), limits)) for f in found))


def month_costs(claim: Claim, prices: Prices) -> Judged:
    """Renting the cards for a month costs from `low` to `high` of `currency`."""
    return _decide(claim, (_month(case, claim, prices) for case in claim.cases))


def _month(case: Case, claim: Claim, prices: Prices) -> Finding:
    hourly, source = _hourly(case, prices, claim.limits["currency"])
    money = None if hourly is None else hourly.times(MONTH_S / HOUR_S)
    holds = _overlap(_span(money), _limits(claim))
    return Finding(case=case, holds=holds, money=money, money_source=source)


def card_costs(claim: Claim, prices: Prices) -> Judged:
    """The card costs from `low` to `high` of `currency`."""
    return _decide(claim, (_card(case, claim) for case in claim.cases))


def _card(case: Case, claim: Claim) -> Finding:
    currency = claim.limits["currency"]
    price = price_range(_machine(case).gpu, currency)
    if price is None:
        return Finding(case=case, holds=None)
    money = Money(low=price.low, high=price.high, currency=currency)
    source = f"{price.kind} price, {price.quality}, {price.as_of or 'undated'}"
    return Finding(case=case, holds=_overlap(_span(money), _limits(claim)), money=money, money_source=source)


def _run(case: Case, prices: Prices, currency: str) -> Finding:
    """A run's hours, and what they cost on the cards' offers."""
    found = _ask(case)
    if found.estimate is None or found.estimate.time is None or case.num_tokens is None:
        return replace(found, holds=None)
    setup, time = found.estimate.setup, found.estimate.time
    steps = case.num_tokens / tokens_per_step(setup)
    hours = Span(low=steps * time.low_step_s / HOUR_S, high=steps * time.high_step_s / HOUR_S)
    hourly, source = _hourly(case, prices, currency)
    money = None if hourly is None else hourly.times(hours.low, hours.high)
    return replace(found, hours=hours, money=money, money_source=source)


def _hourly(case: Case, prices: Prices, currency: str) -> tuple[Money | None, str | None]:
    """All trusted on-demand offers of a card as one range for the case's number of cards, and from how many."""
    machine = _machine(case)
    offers = [
        offer
        for offer in best_offers(prices.book.offers, prices.today)
        if offer.gpu == machine.gpu.name and not offer.is_spot and offer.tier(prices.today) <= 1
    ]
    if not offers:
        return None, None
    each = [prices.rates.convert(o.hourly, currency).times(1 / o.num_gpus) for o in offers]
    money = Money(low=min(m.low for m in each), high=max(m.high for m in each), currency=currency)
    dates = sorted(offer.as_of or "undated" for offer in offers)
    return money.times(machine.num_gpus), f"{len(offers)} offers, {dates[0]} to {dates[-1]}"


def _limits(claim: Claim) -> Span:
    return Span(low=claim.limits["low"], high=claim.limits["high"])


def _span(money: Money | None) -> Span | None:
    return None if money is None else Span(low=money.low, high=money.high)


def _overlap(found: Span | None, limits: Span) -> bool | None:
    """Whether the ranges meet; None where nothing is known."""
    return None if found is None else found.low <= limits.high and limits.low <= found.high


# ------------------------------------------------------------- no numbers


def not_hardware(claim: Claim, prices: Prices) -> Judged:
    """Nothing that memory, time or money can decide."""
    return Judged(claim=claim, verdict=NOT_HARDWARE)


def not_answered(claim: Claim, prices: Prices) -> Judged:
    """About hardware, and finefit has no rules for it."""
    return Judged(claim=claim, verdict=NOT_ANSWERED)


RULES: Mapping[str, Callable[[Claim, Prices], Judged]] = {
    "fits": fits,
    "does-not-fit": does_not_fit,
    "saves-memory": saves_memory,
    "trains-share": trains_share,
    "is-faster": is_faster,
    "takes": takes,
    "run-costs": run_costs,
    "month-costs": month_costs,
    "card-costs": card_costs,
    "not-hardware": not_hardware,
    "not-answered": not_answered,
}


# ------------------------------------------------------------- the nearest that fits


def _nearest(case: Case) -> Nearest | None:
    """The first that fits: the same without the asked details, other methods on the same card, more cards."""
    for gpu, fields in _relaxed(case):
        found = _planned(gpu, fields)
        if found is not None:
            return Nearest(estimate=found, changes=_changes(case, found))
    return None


KEPT = ("model", "method", "seq_len", "objective")


def _relaxed(case: Case) -> Iterator[tuple[str, Mapping[str, Any]]]:
    kept = {name: case.fields[name] for name in KEPT if name in case.fields}
    card, _, count = case.gpu.partition(":")
    yield case.gpu, kept
    for more in SEVERAL:
        if more > int(count or 1):
            yield f"{card}:{more}", kept
    for method in methods():
        if method != kept.get("method"):
            yield case.gpu, {**kept, "method": method}


def _planned(gpu: str, fields: Mapping[str, Any]) -> Estimate | None:
    profile, count = parse_gpu(gpu)
    try:
        return plan(fields, Machine(gpu=profile, num_gpus=count)).estimate
    except (DoesNotFitError, SetupError, NotModelledError):
        return None


SHOWN = ("method", "quant", "targets", "optimizer", "weights_dtype", "micro_batch_size", "seq_len", "loss")


def _changes(case: Case, found: Estimate) -> dict[str, Any]:
    """What differs from the case as it was asked, in words of TrainSetup; `gpu` where it is another number of them."""
    before = _ask(case).estimate
    asked = dict(case.fields) if before is None else before.setup.to_dict()
    after = found.setup.to_dict()
    changed = {name: after[name] for name in SHOWN if name in asked and asked[name] != after[name]}
    return {**changed, **({"gpu": found.gpu} if found.setup.num_gpus != asked.get("num_gpus", 1) else {})}
