"""All prices and rates that finefit knows here: what it ships, what was refreshed, what the user wrote down."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.money import Rates, shipped_rates
from planner.offers import Offer
from planner.price_book import PriceBook, shipped_book, with_rows
from planner.price_dates import age_days
from planner.price_snapshot import snapshot_folder, snapshot_rows
from planner.user_prices import default_price_file, read_user_prices


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownPrices:
    """All offers in one book, the rates, and how many offers each origin has; `new_faults` are those of the book's
    that finefit's own snapshot doesn't have.
    """

    book: PriceBook
    rates: Rates
    origins: tuple[Origin, ...]
    new_faults: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where offers are from, and how old they are: `dated` (as_of) and the number without a date."""

    name: str
    num_offers: int
    oldest: str | None
    newest: str | None
    num_undated: int
    newest_age_days: int | None

    @classmethod
    def of(cls, name: str, offers: Iterable[Offer], today: datetime.date) -> Origin:
        """The summary of some offers."""
        found = list(offers)
        dates = sorted(offer.as_of for offer in found if offer.as_of is not None)
        newest = dates[-1] if dates else None
        return cls(
            name=name,
            num_offers=len(found),
            oldest=dates[0] if dates else None,
            newest=newest,
            num_undated=len(found) - len(dates),
            newest_age_days=age_days(newest, today),
        )


def known_prices(files: Iterable[str], today: datetime.date) -> KnownPrices:
    """The shipped snapshot, then the refreshed ones, then the user's files: the default one, and `files`.

    Raises UsageError and FinefitError for a user's file that can't be read; single broken rows are in `book.faults`.
    """
    book, rates = shipped_book(), shipped_rates()
    origins, num_known_faults = [Origin.of("finefit", book.offers, today)], len(book.faults)
    for name, rows, change in _more(files):
        larger = with_rows(book, rows)
        origins.append(Origin.of(name, larger.offers[len(book.offers) :], today))
        book, rates = larger, change(rates)
    return KnownPrices(
        book=book, rates=rates, origins=tuple(origins), new_faults=book.faults[num_known_faults:]
    )


def _more(files: Iterable[str]) -> Iterable[tuple[str, Any, Any]]:
    """Name, rows and change of rates of each further origin."""
    folder = snapshot_folder()
    if folder.is_dir():
        yield str(folder), snapshot_rows(folder), lambda rates: rates
    default = default_price_file()
    for path in [*([default] if default.exists() else []), *map(Path, files)]:
        found = read_user_prices(path)
        yield str(path), found.rows, found.change
