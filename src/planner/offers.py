"""Offers: what a provider asks for a machine by the hour, each with its date, quality and source.

A row is a mapping with the keys of ROW_KEYS, whether it comes from profiles/prices/offers.toml, from a refreshed
snapshot or from the user's own file. A row that breaks a rule is named and left out; the rest is used.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from planner.catalog import find_catalog_gpu
from planner.errors import UsageError, nearest_names
from planner.money import Money
from planner.price_dates import first_day, is_old

QUALITIES = ("ok", "user-doc", "recall", "suspect", "conflict")
BASES = ("instance", "gpu-only")
"""What the price buys: the whole machine, or the cards alone with the host billed on top."""

_TEXTS = ("provider", "region", "instance", "gpu", "currency", "quality", "basis", "as_of", "source", "note")
ROW_KEYS = (*_TEXTS, "num_gpus", "price", "spot", "min_billing_s", "billing_step_s")
_REQUIRED = ("provider", "gpu", "price", "source")


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """`low` to `high` in `currency` for one hour of `num_gpus` cards of `gpu` (a name of the catalogue).

    `as_of` None: undated. `min_billing_s` and `billing_step_s` None: unknown.
    """

    provider: str
    region: str = "any"
    instance: str = ""
    gpu: str
    num_gpus: int = 1
    low: float
    high: float
    currency: str = "USD"
    is_spot: bool = False
    basis: str = "instance"
    quality: str = "ok"
    as_of: str | None = None
    source: str
    note: str | None = None
    min_billing_s: float | None = None
    billing_step_s: float | None = None

    @property
    def hourly(self) -> Money:
        """The whole instance's price of one hour."""
        return Money(low=self.low, high=self.high, currency=self.currency)

    def tier(self, today: datetime.date) -> int:
        """How far it can be trusted: 0 dated and whole, 1 old, undated or recalled, 2 without its host, 3 doubtful."""
        if self.quality in ("suspect", "conflict"):
            return 3
        if self.basis != "instance":
            return 2
        return 1 if self.quality == "recall" or is_old(self.as_of, today) else 0


def parse_offer(row: Mapping[str, Any]) -> Offer:
    """One row. Raises UsageError that says what is wrong with it; 0 as a price passes, for the checks to name."""
    _check_keys(row)
    row = {key: value for key, value in row.items() if value is not None}
    num_gpus, price = row.get("num_gpus", 1), row["price"]
    if not isinstance(num_gpus, int) or isinstance(num_gpus, bool) or num_gpus < 1:
        raise UsageError(f"num_gpus: {num_gpus!r} is not a whole number from 1")
    low, high = _price_range(price)
    return Offer(
        provider=row["provider"].lower(),
        region=row.get("region", "any"),
        instance=row.get("instance", ""),
        gpu=_card(row["gpu"]),
        num_gpus=num_gpus,
        low=low,
        high=high,
        currency=_choice("currency", row.get("currency", "USD").upper(), None),
        is_spot=_flag("spot", row.get("spot", False)),
        basis=_choice("basis", row.get("basis", "instance"), BASES),
        quality=_choice("quality", row.get("quality", "ok"), QUALITIES),
        as_of=_date(row.get("as_of")),
        source=row["source"],
        note=row.get("note"),
        min_billing_s=_seconds("min_billing_s", row.get("min_billing_s")),
        billing_step_s=_seconds("billing_step_s", row.get("billing_step_s")),
    )


def parse_offers(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> tuple[tuple[Offer, ...], tuple[str, ...]]:
    """The rows, each with the place that it stands at, as offers, and for each broken one what is wrong, and where."""
    offers: list[Offer] = []
    faults: list[str] = []
    for place, row in rows:
        try:
            offers.append(parse_offer(row))
        except UsageError as error:
            faults.append(f"{place}: {error}")
    return tuple(offers), tuple(faults)


def _check_keys(row: Mapping[str, Any]) -> None:
    for key in row:
        if key not in ROW_KEYS:
            raise UsageError(
                f"{key!s:.40}: no such key; nearest: {', '.join(nearest_names(str(key), ROW_KEYS))}"
            )
    for key in _REQUIRED:
        if row.get(key) in (None, ""):
            raise UsageError(f"{key}: is missing")
    for key in _TEXTS:
        if row.get(key) is not None and not isinstance(row[key], str):
            raise UsageError(f"{key}: {row[key]!r} is not text")


def _card(text: str) -> str:
    return find_catalog_gpu(text).name


def _price_range(price: object) -> tuple[float, float]:
    ends = price if isinstance(price, list) and len(price) == 2 else [price, price]
    if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends):
        raise UsageError(f"price: {price!r} is neither a number nor [low, high]")
    low, high = map(float, ends)
    if not 0 <= low <= high < float("inf"):
        raise UsageError(f"price: {price!r} is negative, or its low end is above its high end")
    return low, high


def _choice(key: str, value: str, choices: tuple[str, ...] | None) -> str:
    known = value in choices if choices else len(value) == 3 and value.isascii() and value.isalpha()
    if not known:
        wanted = ", ".join(choices) if choices else "a code of three letters, as USD"
        raise UsageError(
            f"{key}: {value!r} is not {wanted}" if not choices else f"{key}: {value!r} is not one of {wanted}"
        )
    return value


def _flag(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{key}: {value!r} is neither true nor false")
    return value


def _date(value: str | None) -> str | None:
    if value is not None and first_day(value) is None:
        raise UsageError(f"as_of: {value!r} is not a date (2026-11-22, 2026-11, 2026-Q4 or 2026)")
    return value


def _seconds(key: str, value: object) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise UsageError(f"{key}: {value!r} is no number of seconds")
    return float(value)
