"""profiles/prices/electricity.toml -> what a kilowatt-hour costs in a country, with date, quality and source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from planner.errors import UnknownNameError
from planner.index import raw_profiles
from planner.money import Money, Rates

QUALITIES = ("ok", "low", "recall")
"""Best first."""
SECTORS = ("household", "business")
WORLD = "WORLD"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tariff:
    """Money for one kWh. `as_of` None: undated; `quality` and `source` of the rows that it comes from."""

    country: str
    per_kwh: Money
    as_of: str | None
    quality: str
    source: str


def tariff(country: str, rates: Rates, currency: str, sector: str = "household") -> Tariff:
    """A country's tariff: its best row; rows that are all doubtful become one range.

    Raises UnknownNameError for a country without a row of that sector.
    """
    wanted = country.strip().casefold()
    rows = [row for row in _rows() if row["sector"] == sector]
    found = [row for row in rows if row["country"].casefold() == wanted and row["currency"] in rates.per_eur]
    if not found:
        known = dict.fromkeys(row["country"] for row in rows)
        raise UnknownNameError("country", country, known, "finefit costs --help, or give --tariff")
    chosen = [row for row in found if row["quality"] == "ok"][:1] or found
    prices = [rates.convert(_price(row), currency) for row in chosen]
    return Tariff(
        country=chosen[0]["country"],
        per_kwh=Money(low=min(p.low for p in prices), high=max(p.high for p in prices), currency=currency),
        as_of=min((row["as_of"] for row in chosen), default=None)
        if all("as_of" in r for r in chosen)
        else None,
        quality=max((row["quality"] for row in chosen), key=QUALITIES.index),
        source="; ".join(dict.fromkeys(row["source"] for row in chosen)),
    )


def _price(row: Mapping[str, Any]) -> Money:
    return Money(low=row["price_per_kwh"], high=row["price_per_kwh"], currency=row["currency"])


def _rows() -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = raw_profiles("prices")["electricity"]["tariffs"]
    return rows
