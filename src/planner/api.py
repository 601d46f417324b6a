"""The small Python API: the three questions as functions. Stable: names, arguments and results keep their meaning.

>>> estimate("smollm2-135m-instruct", gpu="rtx-4090", method="lora").fit.verdict
'fits'
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from planner.catalog import parse_gpu
from planner.cost_options import find_currency
from planner.costs import CostTable, CostWishes
from planner.costs import costs as _costs
from planner.estimate import estimate as _estimate
from planner.estimate import estimate_many as _estimate_many
from planner.estimate import memory_many as _memory_many
from planner.estimate import open_attention, resolve
from planner.lengths import DataLengths
from planner.prices import known_prices
from planner.recipes import recipe, shared_by
from planner.results import Estimate, Memory, Plan
from planner.run_length import length_by_lengths, length_by_plan, length_by_tokens
from planner.search import plan as _plan
from planner.setup import TrainSetup
from planner.specs import Machine
from planner.tariffs import SECTORS, WORLD, tariff


def estimate(model: str | Mapping[str, Any], *, gpu: str, **fields: Any) -> Estimate:
    """What one configuration needs on `gpu` ("rtx-4090", "a100-80gb-sxm4:4"); `fields` are TrainSetup's.

    Sizes in bytes, times in seconds. Raises UnknownNameError, SetupError, ConfigError or NotModelledError; a
    setup that doesn't fit is an answer with the verdict does-not-fit.
    """
    machine = _machine(gpu)
    asked = {"model": model, **shared_by(machine.num_gpus), **fields}
    return _estimate(TrainSetup(**{**asked, **open_attention(asked, machine)}), machine)


def estimate_many(setups: Iterable[TrainSetup], *, gpu: str) -> Iterator[Estimate]:
    """The estimates of many setups on `gpu`, in order; what they share is computed once. Raises as `estimate`."""
    return _estimate_many(setups, _machine(gpu))


def memory_many(setups: Iterable[TrainSetup], *, gpu: str) -> Iterator[Memory]:
    """Only the memory of many setups, for searches over tens of thousands; in order, with the same figures.

    >>> sizes = (TrainSetup(model="smollm2-135m", micro_batch_size=n) for n in (1, 2))
    >>> [memory.peak_phase for memory in memory_many(sizes, gpu="rtx-4090")]
    ['backward', 'backward']
    """
    return _memory_many(setups, _machine(gpu))


def plan(
    model: str | Mapping[str, Any],
    *,
    gpu: str,
    global_batch: int | None = None,
    lengths: DataLengths | None = None,
    **fields: Any,
) -> Plan:
    """The configuration to use on `gpu`, why, and what the rejected ones lack; `fields` fixes TrainSetup's.

    Raises DoesNotFitError with `short_by_bytes` when nothing fits, otherwise as `estimate`.
    """
    return _plan({"model": model, **fields}, _machine(gpu), global_batch=global_batch, lengths=lengths)


def costs(
    model: str | Mapping[str, Any],
    *,
    gpu: str,
    tokens: float | None = None,
    lengths: DataLengths | None = None,
    currency: str = "USD",
    country: str | None = None,
    **fields: Any,
) -> CostTable:
    """What a run costs on `gpu` as one's own and by every offer that finefit knows, the cheapest first.

    How long it is comes from `max_steps` among the fields, else from `tokens` (all epochs, full sequences), else from
    `lengths`; without these, totals are None. `currency` is USD, CNY or EUR, `country` a code as DE (None: the world's
    average tariff). Prices are the shipped, the refreshed and the user's own. Raises as `estimate`, and UnknownNameError
    for a currency or country.
    """
    machine = _machine(gpu)
    asked = {"model": model, **shared_by(machine.num_gpus), **fields}
    setup = TrainSetup(**{**asked, **open_attention(asked, machine)})
    today = datetime.date.today()
    known = known_prices((), today)
    shown = find_currency(currency)
    power = tariff(country or WORLD, known.rates, shown, SECTORS[False])
    length = length_by_plan(setup)
    if length is None and tokens is not None:
        length = length_by_tokens(setup, tokens)
    if length is None and lengths is not None:
        length = length_by_lengths(setup, lengths)
    return _costs(
        setup,
        machine,
        resolve(setup),
        book=known.book,
        rates=known.rates,
        wishes=CostWishes(currency=shown, tariff=power),
        length=length,
        today=today,
    )


def fits(gpu: str, *, models: list[str], methods: list[str], **fields: Any) -> list[Estimate]:
    """Estimates of every model with every method on `gpu`, in the order given, with the recipe of each method.

    Raises as `estimate`.
    """
    machine = _machine(gpu)
    common = {"checkpointing": "full", **shared_by(machine.num_gpus), **fields}
    asked = [
        {"model": model, **recipe(method, machine.gpu), **common} for model in models for method in methods
    ]
    return [_estimate(TrainSetup(**{**one, **open_attention(one, machine)}), machine) for one in asked]


def _machine(gpu: str) -> Machine:
    profile, count = parse_gpu(gpu)
    return Machine(gpu=profile, num_gpus=count)
