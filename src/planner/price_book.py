"""All prices that finefit knows: the shipped snapshot, a refreshed one, the user's own offers.

Of several prices for the same machine the best is taken (`best_offers`), and where they contradict each other they
become a range.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from planner.cost import CloudPrices
from planner.index import raw_profiles
from planner.offers import Offer, parse_offers
from planner.price_checks import check_offers
from planner.price_dates import first_day


@dataclass(frozen=True, kw_only=True, slots=True)
class PriceBook:
    """Offers that can be used, prices beside the machine by provider, and what was left out and why."""

    offers: tuple[Offer, ...]
    clouds: Mapping[str, CloudPrices]
    faults: tuple[str, ...] = ()

    def cloud(self, provider: str) -> CloudPrices:
        """A provider's prices of storage, egress and billing; all unknown where nobody wrote them down."""
        return self.clouds.get(provider, CloudPrices())


def shipped_book() -> PriceBook:
    """What profiles/prices holds."""
    raw = raw_profiles("prices")
    book = PriceBook(
        offers=(), clouds={name: _cloud(entry) for name, entry in raw["clouds"]["clouds"].items()}
    )
    for snapshot in raw["offers"]["snapshots"]:
        book = with_rows(book, _snapshot_rows(snapshot))
    return book


def with_rows(book: PriceBook, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> PriceBook:
    """The book with one snapshot more, its rows with the place that each stands at; broken ones become faults."""
    parsed, faults = parse_offers(rows)
    kept, rejected = check_offers(parsed)
    named = [
        f"{r.offer.provider} {r.offer.instance} {r.offer.region}: {r.reason} ({r.offer.source})"
        for r in rejected
    ]
    return replace(book, offers=(*book.offers, *kept), faults=(*book.faults, *faults, *named))


def _snapshot_rows(snapshot: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    shared = {key: snapshot[key] for key in ("as_of", "source") if key in snapshot}
    for number, row in enumerate(snapshot["offers"], 1):
        yield f"{snapshot['source']}, offer {number}", {**row, **shared}


def _cloud(entry: Mapping[str, Any]) -> CloudPrices:
    return CloudPrices(
        disk_usd_per_gb_month=entry.get("disk_usd_per_gb_month"),
        egress_free_gb=entry.get("egress_free_gb", 0.0),
        egress=tuple((end, price) for end, price in entry["egress"]) if "egress" in entry else None,
        min_billing_s=entry.get("min_billing_s"),
        billing_step_s=entry.get("billing_step_s"),
    )


def best_offers(offers: Iterable[Offer], today: datetime.date) -> list[Offer]:
    """One offer for each provider, card, count and kind (on-demand, spot), with the cheapest region.

    The most trustworthy rows decide, and of them the newest; different prices of one instance in one region on one
    day become a range, and so do all rows that are known to contradict each other.
    """
    groups: dict[tuple[str, str, int, bool], list[Offer]] = {}
    for offer in offers:
        groups.setdefault((offer.provider, offer.gpu, offer.num_gpus, offer.is_spot), []).append(offer)
    return [_best(group, today) for group in groups.values()]


def _best(group: list[Offer], today: datetime.date) -> Offer:
    tier = min(offer.tier(today) for offer in group)
    trusted = [offer for offer in group if offer.tier(today) == tier]
    conflicting = [offer for offer in trusted if offer.quality == "conflict"]
    if conflicting:
        return _ranged(conflicting)
    newest = max(_day(offer) for offer in trusted)
    places: dict[tuple[str, str, str], list[Offer]] = {}
    for offer in trusted:
        if _day(offer) == newest:
            places.setdefault((offer.region, offer.instance, offer.currency), []).append(offer)
    return min((_ranged(rows) for rows in places.values()), key=lambda offer: offer.hourly.middle)


def _day(offer: Offer) -> datetime.date:
    day = None if offer.as_of is None else first_day(offer.as_of)
    return day or datetime.date.min


def _ranged(rows: list[Offer]) -> Offer:
    """The rows as one: their whole range of prices, dated by the oldest."""
    sources = "; ".join(dict.fromkeys(row.source for row in rows))
    low, high = min(row.low for row in rows), max(row.high for row in rows)
    return replace(min(rows, key=_day), low=low, high=high, source=sources)
