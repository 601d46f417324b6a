"""Where a run can go: machines of one's own, and those that somebody rents out."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass

from planner.catalog import gpu_profile
from planner.offers import Offer
from planner.price_book import PriceBook, best_offers
from planner.specs import GpuProfile, Machine


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A machine, and the offers to rent it; one's own where `is_owned`."""

    machine: Machine
    offers: tuple[Offer, ...] = ()
    is_owned: bool = False

    @property
    def num_ways(self) -> int:
        """Ways to get it: each offer, and having it."""
        return len(self.offers) + self.is_owned


def owned(machines: Iterable[Machine]) -> list[Place]:
    """Machines that are there already."""
    return [Place(machine=machine, is_owned=True) for machine in machines]


def rented(
    book: PriceBook,
    today: datetime.date,
    *,
    gpus: Iterable[str] = (),
    providers: Iterable[str] = (),
    with_spot: bool = True,
) -> list[Place]:
    """The machines on offer, each card and number once; `gpus` (of the catalogue) and `providers` narrow them down."""
    wanted, names = set(gpus), {name.strip().lower() for name in providers}
    found: dict[tuple[str, int], list[Offer]] = {}
    for offer in best_offers(book.offers, today):
        is_wanted = not wanted or offer.gpu in wanted
        is_asked = not names or offer.provider in names
        if is_wanted and is_asked and (with_spot or not offer.is_spot):
            found.setdefault((offer.gpu, offer.num_gpus), []).append(offer)
    return [
        Place(machine=Machine(gpu=profile, num_gpus=count), offers=tuple(offers))
        for (gpu, count), offers in found.items()
        if (profile := _modelled(gpu)) is not None
    ]


def _modelled(name: str) -> GpuProfile | None:
    profile = gpu_profile(name)
    return profile if profile.modelled else None
