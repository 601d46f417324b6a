"""What is wrong in price catalogues, as rules that every snapshot goes through, the shipped one too.

Seen in public catalogues: spot prices of 0.00 in every row, an on-demand price below the spot price of the same
instance, spot quotes that equal on-demand or are exactly a tenth of it, card names that carry the memory of all
cards together, memory sizes in the wrong unit. Memory is therefore never read from a catalogue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from planner.offers import Offer

FLOOR_SHARE = 0.1
"""A spot quote of exactly this share of on-demand is a floor that the catalogue fills in, not a market."""
_SAME = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """An offer that is left out, and why."""

    offer: Offer
    reason: str


def check_offers(offers: Iterable[Offer]) -> tuple[tuple[Offer, ...], tuple[Rejected, ...]]:
    """The offers of one snapshot that can be used, doubtful ones marked, and those left out."""
    kept: list[Offer] = []
    rejected: list[Rejected] = []
    everything = list(offers)
    twins = _twins(everything)
    for offer in everything:
        reason = next((why for rule in _REASONS if (why := rule(offer, twins.get(_key(offer), ())))), None)
        if reason is None:
            kept.append(_marked(offer, twins.get(_key(offer), ())))
        else:
            rejected.append(Rejected(offer=offer, reason=reason))
    return tuple(kept), tuple(rejected)


def _key(offer: Offer) -> tuple[str, str, str, str, int, str]:
    place = (offer.provider, offer.region, offer.instance)
    return (*place, offer.gpu, offer.num_gpus, offer.currency)


def _twins(offers: Sequence[Offer]) -> dict[tuple[str, str, str, str, int, str], list[Offer]]:
    """All offers of the same instance in the same place, on-demand and spot."""
    found: dict[tuple[str, str, str, str, int, str], list[Offer]] = {}
    for offer in offers:
        found.setdefault(_key(offer), []).append(offer)
    return found


def _no_price(offer: Offer, twins: Sequence[Offer]) -> str | None:
    return None if offer.low > 0 else "a price of 0 means that it is missing"


def _below_spot(offer: Offer, twins: Sequence[Offer]) -> str | None:
    spot = [twin.low for twin in twins if twin.is_spot and twin.low > 0]
    if offer.is_spot or not spot or offer.high >= min(spot) * (1 - _SAME):
        return None
    return f"on-demand {offer.high:g} is below spot {min(spot):g}"


_REASONS: tuple[Callable[[Offer, Sequence[Offer]], str | None], ...] = (_no_price, _below_spot)


def _marked(offer: Offer, twins: Sequence[Offer]) -> Offer:
    """A spot offer that shows no market becomes suspect."""
    doubt = next(_spot_doubts(offer, twins), None)
    if doubt is None:
        return offer
    return replace(offer, quality="suspect", note="; ".join(filter(None, (offer.note, doubt))))


def _spot_doubts(offer: Offer, twins: Sequence[Offer]) -> Iterator[str]:
    for twin in twins:
        if not offer.is_spot or twin.is_spot or not twin.low > 0:
            continue
        share = offer.low / twin.low
        if abs(share - 1) < _SAME:
            yield "spot equals on-demand: no market seen"
        if abs(share - FLOOR_SHARE) < _SAME:
            yield "spot is exactly a tenth of on-demand: a floor, not a market"
