"""The search over methods, precision, batches, machines and offers: the option that serves a goal best, within limits.

On each machine each rung gets its fastest way that fits (planner.fitting). An hour there costs the same whatever runs, so
the fastest way is the cheapest too, and the front of time, cost and quality over these is the front over all.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from planner.cost import Span, own_cost, rent_cost, wall_time
from planner.costs import CostWishes, cloud_terms, own_terms
from planner.errors import DoesNotFitError, LimitError, UnknownNameError
from planner.estimate import Estimator
from planner.fitting import BatchShape, Fitted, Fitter, Misfit
from planner.gains import describe_gains
from planner.lengths import DataLengths
from planner.money import Rates
from planner.options import TOKENS_OF_A_RATE, Limits, Option, Out, Outcome, best, pareto
from planner.places import Place
from planner.price_book import PriceBook
from planner.quality import RUNGS, Quality, Rung, filling_rank, rungs
from planner.recipes import attention_for, describe_rates, rates_for
from planner.run_length import tokens_per_step
from planner.run_time import RunTime, run_time
from planner.search import LENGTH_STEP, batch_shape
from planner.setup import TrainSetup
from planner.specs import ModelSpec
from planner.tariffs import WORLD

SHORTER = (0.99, 0.95, 0.90)
"""Shares of the rows that a shorter sequence still holds whole, tried where the longest row doesn't fit."""
CONTEXT_STEP = 128
MAX_CONTEXT = 131_072
"""Lengths that are tried for the longest context, where a model names no limit of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked: TrainSetup fields that hold, machines, a goal and its limits, and what is known of data and money.

    `tokens` (in full sequences, all epochs) say how long the run is where neither the wishes nor `lengths` do.
    """

    wishes: Mapping[str, Any]
    model: ModelSpec
    places: Sequence[Place]
    goal: str
    book: PriceBook
    rates: Rates
    today: datetime.date
    limits: Limits = field(default_factory=Limits)
    money: CostWishes = field(default_factory=CostWishes)
    lengths: DataLengths | None = None
    tokens: float | None = None
    global_batch: int | None = None


def optimise(question: Question) -> Outcome:
    """The best option for the question.

    Raises LimitError with the nearest option where nothing is within the limits, DoesNotFitError where nothing fits,
    SetupError or NotModelledError where every family is refused.
    """
    started = time.perf_counter()
    search = _Search(question)
    options = list(search.options())
    if not options:
        raise search.nothing()
    within = [option for option in options if search.judge(option)]
    if not within:
        raise _nothing_within(question.limits, options)
    chosen = search.complete(best(within, question.goal))
    return Outcome(
        goal=question.goal,
        chosen=chosen,
        front=pareto(within, with_length=question.goal == "longest-context"),
        out=tuple(search.out()),
        tally=search.fitter.tally,
        reasons=tuple(_reasons(chosen, question, search)),
        notes=tuple(_notes(question, within)),
        search_s=time.perf_counter() - started,
    )


class _Search:
    """The options of one question, and what became of the others."""

    def __init__(self, question: Question) -> None:
        self.question, self.model = question, question.model
        self.wishes = {**question.wishes}
        self.wishes.pop("num_gpus", None)
        method = self.wishes.get("method", "lora")
        targets, epochs = self.wishes.get("targets", "all-linear"), self.wishes.get("epochs", 1.0)
        self.rank = filling_rank(self.model, method, targets, question.lengths, epochs)
        self.fitter = Fitter(self.model, self.wishes, self.rank, question.lengths)
        self.misfits: list[Misfit] = []
        self._out: dict[str, Out] = {}
        self._within: set[str] = set()

    def options(self) -> Iterator[Option]:
        """Every rung's best way on every machine, by every offer."""
        for place in self.question.places:
            wishes = {**attention_for(self.model, place.machine.gpu), **self.wishes}
            self.fitter.wishes = wishes
            for rung in rungs(wishes, place.machine.gpu):
                shapes = self._shapes(rung, place)
                found = self.fitter.best(rung, place.machine, shapes, place.num_ways)
                if isinstance(found, Misfit):
                    self.misfits.append(found)
                else:
                    yield from self._priced(found, place)

    def _shapes(self, rung: Rung, place: Place) -> list[BatchShape]:
        """The batch that the data wants, then shorter ones; for the longest context the longest that fits."""
        question = self.question
        is_longest = question.goal == "longest-context" and "seq_len" not in self.wishes
        # longer rows than those at hand are wanted: these don't decide
        lengths = None if is_longest else question.lengths
        wanted = batch_shape(self.fitter.wishes, self.model, lengths, place.machine, question.global_batch)
        first = _as_shape(wanted, lengths)
        if is_longest:
            return [self._longest(rung, place, first)]
        if lengths is None or "seq_len" in self.wishes:
            return [first]
        shorter = {-(-lengths.percentile(share) // LENGTH_STEP) * LENGTH_STEP for share in SHORTER}
        return [first] + [
            replace(first, seq_len=length, lost_share=lengths.share_lost(length))
            for length in sorted(shorter, reverse=True)
            if length < first.seq_len
        ]

    def _longest(self, rung: Rung, place: Place, first: BatchShape) -> BatchShape:
        machine, num_ways = place.machine, place.num_ways
        limit = self.model.max_positions or MAX_CONTEXT
        lengths = [*range(CONTEXT_STEP, limit, CONTEXT_STEP), limit]
        longest = self.fitter.longest(rung, machine, lengths, first.global_batch)
        self.fitter.tally.setups += len(lengths)
        self.fitter.tally.ways += len(lengths) * num_ways
        lengths_known = self.question.lengths
        lost = None if lengths_known is None else lengths_known.share_lost(longest)
        return replace(
            first, seq_len=longest or lengths[0], lost_share=0.0 if lengths_known is None else lost
        )

    def _priced(self, found: Fitted, place: Place) -> Iterator[Option]:
        question, setup = self.question, found.estimate.setup
        run = run_time(
            setup, found.estimate.time, found.machine, self.model, question.lengths, question.tokens
        )
        seconds = _seconds(found, run)
        quality = Quality.of(setup, found.rung, found.shape.lost_share, self.rank)
        plain = Option(
            rung=found.rung,
            machine=found.machine,
            estimate=found.estimate,
            quality=quality,
            run=run,
            wall_s=seconds,
        )
        if place.is_owned:
            yield replace(plain, own=self._own(found, run))
        yield from self._rented(plain, place)

    def _own(self, found: Fitted, run: RunTime | None) -> Any:
        question = self.question
        terms = own_terms(found.machine, question.money, None, found.estimate.setup.num_nodes)
        seconds = None if run is None else run.total_s
        return own_cost(terms, seconds, question.rates, question.money.currency)

    def _rented(self, plain: Option, place: Place) -> Iterator[Option]:
        if not place.offers:
            return
        question, run = self.question, plain.run
        terms = cloud_terms(plain.estimate, self.model, question.money)
        seconds = None if run is None else run.total_s
        for offer in place.offers:
            try:
                rent = rent_cost(
                    offer,
                    seconds,
                    terms,
                    question.book.cloud(offer.provider),
                    question.rates,
                    question.money.currency,
                )
            except UnknownNameError as error:
                self._reject(Out(label=f"{plain.rung.name} at {offer.provider}", reason=str(error)))
                continue
            wall = plain.wall_s if seconds is None else wall_time(seconds, terms, is_spot=offer.is_spot)
            yield replace(plain, offer=offer, rent=rent, wall_s=wall, tier=offer.tier(question.today))

    def judge(self, option: Option) -> bool:
        """Whether an option is within the limits; the least excess of its family is kept."""
        family = f"{option.rung.name} on {option.machine.gpu.name}"
        found = self.question.limits.out(option)
        if found is None:
            self._within.add(family)
            return True
        self._reject(replace(found, label=family))
        return False

    def _reject(self, found: Out) -> None:
        known = self._out.get(found.label)
        is_nearer = (
            known is not None and found.gap is not None and (known.gap is None or found.gap < known.gap)
        )
        if known is None or is_nearer:
            self._out[found.label] = found

    def out(self) -> Iterator[Out]:
        """What is out: rungs that don't fit, each card once with the smallest gap, then what breaks a limit."""
        for misfit in self.misfits:
            headroom = misfit.estimate.fit.headroom_bytes if misfit.estimate else None
            label = f"{misfit.rung.name} on {misfit.machine.label}"
            gap = None if headroom is None else max(0, -headroom)
            yield Out(label=label, reason=misfit.reason, short_by_bytes=gap)
        yield from (out for label, out in self._out.items() if label not in self._within)

    def nothing(self) -> Exception:
        """The error where no setup fits on any machine."""
        missed = [m for m in self.misfits if m.estimate is not None]
        if not missed:
            errors = [m.error for m in self.misfits if m.error is not None]
            return (
                errors[0]
                if errors
                else LimitError("no machine is left: nothing matches --gpu and --provider")
            )
        nearest = max(missed, key=lambda m: m.estimate.fit.headroom_bytes or 0 if m.estimate else 0)
        assert nearest.estimate is not None
        return DoesNotFitError(
            f"nothing fits; nearest is {nearest.rung.name} on {nearest.machine.label}: {nearest.reason}",
            max(0, -(nearest.estimate.fit.headroom_bytes or 0)),
        )

    def complete(self, option: Option) -> Option:
        """The chosen option with the whole estimate, its words, and the rates that are recommended."""
        setup = option.estimate.setup
        setup = setup.with_(**rates_for(setup, self.model))
        full = Estimator(setup, option.machine, self.model).at(setup.micro_batch_size, setup.seq_len)
        return replace(option, estimate=replace(full, time=option.estimate.time or full.time))


def _as_shape(wanted: Any, lengths: DataLengths | None) -> BatchShape:
    return BatchShape(
        seq_len=wanted.seq_len,
        global_batch=wanted.global_batch,
        is_packed=wanted.is_packed,
        lost_share=0.0 if lengths is None else lengths.share_lost(wanted.seq_len),
        is_packing_open=wanted.is_packing_open,
    )


def _seconds(found: Fitted, run: RunTime | None) -> Span | None:
    """The run's, or those of a million positions."""
    if run is not None:
        return run.total_s
    time, setup = found.estimate.time, found.estimate.setup
    if time is None:
        return None
    steps = TOKENS_OF_A_RATE / tokens_per_step(setup)
    return Span(low=steps * time.low_step_s, high=steps * time.high_step_s)


def _nothing_within(limits: Limits, options: Sequence[Option]) -> LimitError:
    nearest = min(options, key=lambda option: (limits.excess(option), option.quality))
    found = limits.out(nearest)
    assert found is not None
    return LimitError(f"nothing is within {limits.words}; nearest is {found.label}: {found.reason}")


def _reasons(chosen: Option, question: Question, search: _Search) -> Iterator[str]:
    setup = chosen.estimate.setup
    yield f"{question.goal}: {chosen.label}"
    source = next((rung.source for rung in RUNGS if rung == chosen.rung), chosen.rung.source)
    yield f"quality: rung {chosen.rung.level + 1} of {len(RUNGS)}; {source}"
    yield describe_batch(setup, question.lengths)
    yield from describe_gains(setup, question.wishes)
    yield from describe_rates(setup, search.model, search.rank)


def describe_batch(setup: TrainSetup, lengths: DataLengths | None) -> str:
    """Micro-batch, accumulation and length in words."""
    known = "" if lengths is None else f"; the longest row has {lengths.longest} ({lengths.source})"
    return (
        f"micro-batch {setup.micro_batch_size} x {setup.grad_accum_steps} accumulation x {setup.num_gpus} GPU(s) = "
        f"{setup.global_batch_text} per step of {setup.seq_len} tokens{known}"
    )


def _describe_tariff(money: CostWishes) -> str:
    if money.tariff is None or money.tariff.country == WORLD:
        return "the world's average tariff"
    return f"the tariff of {money.tariff.country}"


def _notes(question: Question, options: Sequence[Option]) -> Iterator[str]:
    if question.tokens is None and question.lengths is None and "max_steps" not in question.wishes:
        yield "no data and no --tokens: times are for a million token positions, and no cost of a run is known"
    if any(option.rent is not None and option.rent.unknown for option in options):
        yield "+ a part of the price (storage, egress or the host) is unknown and comes on top, beyond any budget"
    if any(option.offer is None and option.money is not None for option in options):
        yield f"electricity at {_describe_tariff(question.money)}; the card is owned already"
    old = sum(option.tier > 0 for option in options)
    if old:
        yield f"{old} of {len(options)} options have a price that is old, undated or recalled; dated ones come first"
    unknown = sum(option.wall_s is None for option in options)
    if unknown:
        yield f"no time is known of {unknown} of {len(options)} options; the others come before them"
    offloaded = sum(option.relies_on_host for option in options)
    if offloaded:
        yield f"{offloaded} options need host memory that nothing says the machine has; those that need none come first"
