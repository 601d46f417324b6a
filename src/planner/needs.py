"""`finefit needs`: one model, all accelerators: which, and how many, can do it, from the cheapest up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from planner.card_prices import CardPrice, card_price
from planner.catalog import gpus
from planner.errors import NotModelledError, SetupError
from planner.estimate import Estimator, usable_memory
from planner.fits import METHODS, describe_setups, table_setup
from planner.results import SCHEMA_VERSION, Fit, Memory
from planner.setup import TrainSetup
from planner.specs import GpuProfile, Machine, ModelSpec
from planner.uncertainty import Uncertainty

COUNTS = (1, 2, 4, 8)
"""Cards in one machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedsRow:
    """The fewest equal cards that can do it. `price` is one card's; None is unknown."""

    setup: TrainSetup
    machine: Machine
    memory: Memory
    fit: Fit
    price: CardPrice | None = None

    @property
    def total_price(self) -> float | None:
        """The cards' price together, in the price's currency: the middle of its range."""
        return None if self.price is None else self.machine.num_gpus * self.price.middle

    def to_json(self) -> dict[str, Any]:
        """An estimate's keys as far as they concern memory, and the cards' price as amount and currency."""
        price = None
        if self.price is not None:
            price = {
                "amount": self.total_price,
                "currency": self.price.currency,
                "card": asdict(self.price),
            }
        return {
            "setup": self.setup.to_dict(),
            "gpu": self.machine.label,
            "memory": self.memory.to_json(),
            "fit": asdict(self.fit),
            "cards_price": price,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedsTable:
    """By method: the machines that fit, the cheapest first, unknown prices last. `not_modelled` names the cards
    that finefit has no rules for; `too_small` maps a method to those of which even the most don't suffice, and
    `refused` to the cards that can't run it at all, with the reason.
    """

    model: ModelSpec
    currency: str
    rows: Mapping[str, tuple[NeedsRow, ...]]
    too_small: Mapping[str, tuple[str, ...]]
    refused: Mapping[str, Mapping[str, str]]
    not_modelled: tuple[str, ...]
    assumptions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The whole table for `--json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model.name,
            "num_params": self.model.num_params,
            "currency": self.currency,
            "rows": [row.to_json() for rows in self.rows.values() for row in rows],
            "too_small": {method: list(names) for method, names in self.too_small.items()},
            "refused": {method: dict(reasons) for method, reasons in self.refused.items()},
            "cards_not_modelled": list(self.not_modelled),
            "assumptions": list(self.assumptions),
        }


def needs(
    name: str,
    model: ModelSpec,
    *,
    methods: Sequence[str] = METHODS,
    fields: Mapping[str, Any] | None = None,
    counts: Sequence[int] = COUNTS,
    currency: str = "USD",
) -> NeedsTable:
    """Which cards, and how many of `counts`, can train `model`; `fields` are TrainSetup fields that hold for all.

    `name` is what a setup calls the model. Raises SetupError when the fields are wrong on every card.
    """
    modelled = [gpu for gpu in gpus().values() if gpu.modelled]
    rows: dict[str, tuple[NeedsRow, ...]] = {}
    too_small: dict[str, tuple[str, ...]] = {}
    refused: dict[str, dict[str, str]] = {}
    for method in methods:
        search = _Search(name, model, method, dict(fields or {}))
        found = list(search.rows(modelled, counts))
        done = {row.machine.gpu.name for row in found} | set(search.refused)
        refused[method] = search.refused
        rows[method] = tuple(sorted(_priced(found, currency), key=_cheapest_first))
        too_small[method] = tuple(gpu.name for gpu in modelled if gpu.name not in done)
    setups = [row.setup for found in rows.values() for row in found]
    return NeedsTable(
        model=model,
        currency=currency,
        rows=rows,
        too_small=too_small,
        refused=refused,
        not_modelled=tuple(name for name, gpu in gpus().items() if not gpu.modelled),
        assumptions=tuple(describe_setups(setups)) if setups else (),
    )


def _priced(rows: Iterable[NeedsRow], currency: str) -> Iterator[NeedsRow]:
    return (replace(row, price=card_price(row.machine.gpu, currency)) for row in rows)


def _cheapest_first(row: NeedsRow) -> tuple[bool, float, int, str]:
    total = row.total_price
    return (total is None, total or 0.0, row.machine.gpu.memory_bytes, row.machine.gpu.name)


class _Search:
    """One method on many cards: the peak depends on a card's features only, so it is computed once for each."""

    def __init__(self, name: str, model: ModelSpec, method: str, fields: Mapping[str, Any]) -> None:
        self.name, self.model, self.method, self.fields = name, model, method, fields
        self.refused: dict[str, str] = {}
        self._peaks: dict[tuple[Any, ...], Memory] = {}

    def rows(self, cards: Iterable[GpuProfile], counts: Sequence[int]) -> Iterator[NeedsRow]:
        """The fewest of each card that fit; raises SetupError when every card is refused."""
        first: SetupError | None = None
        num_cards = 0
        for gpu in cards:
            num_cards += 1
            try:
                row = self._fewest(gpu, counts)
            except (SetupError, NotModelledError) as error:
                first = first or (error if isinstance(error, SetupError) else None)
                self.refused[gpu.name] = str(error)
                continue
            if row is not None:
                yield row
        if first is not None and len(self.refused) == num_cards:
            raise first

    def _fewest(self, gpu: GpuProfile, counts: Sequence[int]) -> NeedsRow | None:
        for count in counts:
            machine = Machine(gpu=gpu, num_gpus=count)
            setup = table_setup(self.name, self.model, self.method, machine, self.fields)
            memory = self._peak(setup, machine)
            fit = Uncertainty(setup).judge(memory, usable_memory(machine)[0])
            if fit.verdict == "fits":
                return NeedsRow(setup=setup, machine=machine, memory=memory, fit=fit)
        return None

    def _peak(self, setup: TrainSetup, machine: Machine) -> Memory:
        gpu = machine.gpu
        features = (gpu.backend, gpu.compute_capability, gpu.bf16, gpu.flash_attention, gpu.bitsandbytes)
        key = (setup.num_gpus, *features)
        if key not in self._peaks:
            estimator = Estimator(setup, machine, self.model)
            self._peaks[key] = estimator.memory(setup.micro_batch_size, setup.seq_len)
        return self._peaks[key]
