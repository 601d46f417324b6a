"""profiles/prices/cards.toml -> what a card costs to buy, with date, quality and source; unknown stays unknown."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from planner.index import raw_profiles
from planner.specs import GpuProfile

CURRENCIES = ("usd", "cny")
KINDS = ("list", "street", "used", "indicative")
QUALITIES = ("ok", "undated", "stale", "recall", "conflict")
"""Best first; a conflicting price is shown and never used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CardPrice:
    """One price of one card; `low` and `high` in `currency` (ISO 4217), equal where one price was named.

    `as_of` is a year, a year-month, a quarter or None where the source has no date.
    """

    gpu: str
    kind: str
    currency: str
    low: float
    high: float
    as_of: str | None
    quality: str
    source: str
    note: str | None = None

    @property
    def middle(self) -> float:
        """The middle of the range, for an order."""
        return (self.low + self.high) / 2


def card_prices(gpu: GpuProfile, currency: str | None = None) -> tuple[CardPrice, ...]:
    """All that is known of a card's price, the most trustworthy first, then the newest; empty when nothing is.

    The launch price of the profile is among them (kind "list").
    """
    found = [*_rows().get(gpu.name, ()), *_launch_prices(gpu)]
    return tuple(sorted((p for p in found if currency in (None, p.currency)), key=_trust))


def card_price(gpu: GpuProfile, currency: str = "USD") -> CardPrice | None:
    """The price to put cards in order by: the best that doesn't conflict with another; None when unknown."""
    return next((price for price in card_prices(gpu, currency) if price.quality != "conflict"), None)


def price_range(gpu: GpuProfile, currency: str = "USD") -> CardPrice | None:
    """What a card costs now: of the newest trustworthy price's kind all prices, contradicting ones too, as a range.

    Where only old or recalled prices are known, those of the best one's kind. None when unknown.
    """
    known = card_prices(gpu, currency)
    if not known:
        return None
    trusted = [price for price in known if price.quality in ("ok", "conflict")]
    newest = max(trusted, key=lambda price: _age_rank(price.as_of)) if trusted else known[0]
    same = [price for price in trusted or known if price.kind == newest.kind]
    sources = "; ".join(dict.fromkeys(price.source for price in same))
    return replace(newest, low=min(p.low for p in same), high=max(p.high for p in same), source=sources)


def cheapest_first(gpu: GpuProfile, currency: str = "USD") -> tuple[bool, float, str]:
    """A key that sorts cards from the cheapest up, those without a known price last."""
    price = card_price(gpu, currency)
    return (price is None, price.middle if price else 0.0, gpu.name)


def _trust(price: CardPrice) -> tuple[int, int, float]:
    return (QUALITIES.index(price.quality), -_age_rank(price.as_of), price.low)


def _age_rank(as_of: str | None) -> int:
    """Later dates rank higher: the month of a year-month, the last month of a quarter, of a year the first."""
    if as_of is None:
        return 0
    year, _, rest = as_of.partition("-")
    month = 3 * int(rest[1:]) if rest.startswith("Q") else int((rest or "1").split("-")[0])
    return 12 * int(year) + month


@functools.cache
def _rows() -> Mapping[str, list[CardPrice]]:
    rows: dict[str, list[CardPrice]] = {}
    for entry in raw_profiles("prices")["cards"]["cards"]:
        rows.setdefault(entry["gpu"], []).extend(_prices(entry))
    return rows


def _prices(entry: Mapping[str, Any]) -> Iterator[CardPrice]:
    for currency in CURRENCIES:
        if currency in entry:
            low, high = entry[currency]
            yield CardPrice(
                gpu=entry["gpu"],
                kind=entry["kind"],
                currency=currency.upper(),
                low=low,
                high=high,
                as_of=entry.get("as_of"),
                quality=entry["quality"],
                source=entry["source"],
                note=entry.get("note"),
            )


def _launch_prices(gpu: GpuProfile) -> Iterator[CardPrice]:
    for currency, amount in (("USD", gpu.launch_price_usd), ("CNY", gpu.launch_price_cny)):
        if amount is not None:
            source = gpu.sources[f"launch_price_{currency.lower()}"]
            yield CardPrice(
                gpu=gpu.name,
                kind="list",
                currency=currency,
                low=amount,
                high=amount,
                as_of=gpu.release_date,
                quality="recall" if source == "recall" else "ok",
                source=source,
            )
