"""Money as a range with its currency, and the exchange rates that serve to show it in another one.

Prices keep the currency of their quote; nothing is converted before it is shown or added up.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from planner.errors import UnknownNameError, UsageError
from planner.index import raw_profiles

SHOWN_CURRENCIES = ("USD", "CNY", "EUR")
"""What a total can be shown in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Money:
    """An amount between `low` and `high` in `currency` (ISO 4217)."""

    low: float
    high: float
    currency: str

    @property
    def middle(self) -> float:
        """The middle of the range, for an order."""
        return (self.low + self.high) / 2

    def __add__(self, other: Money) -> Money:
        """The sum; both must have the same currency."""
        if other.currency != self.currency:
            raise ValueError(f"{self.currency} and {other.currency} can't be added")
        return replace(self, low=self.low + other.low, high=self.high + other.high)

    def times(self, low: float, high: float | None = None) -> Money:
        """Multiplied by a factor from `low` to `high` (left out: the same), neither below zero."""
        return replace(self, low=self.low * low, high=self.high * (low if high is None else high))

    def to_json(self) -> dict[str, Any]:
        """`amount` is the middle of the range."""
        return {"amount": self.middle, "low": self.low, "high": self.high, "currency": self.currency}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Units of each currency for one euro, the day they are of, and where they are from."""

    per_eur: Mapping[str, float]
    as_of: str
    source: str

    def convert(self, money: Money, currency: str) -> Money:
        """The same money in another currency. Raises UnknownNameError for a currency without a rate."""
        if money.currency == currency:
            return money
        factor = self._of(currency) / self._of(money.currency)
        return Money(low=money.low * factor, high=money.high * factor, currency=currency)

    def with_rate(self, pair: str, rate: float) -> Rates:
        """One rate replaced: `pair` is FROM/TO, and one FROM costs `rate` TO. Raises UsageError."""
        base, slash, quote = (part.strip().upper() for part in pair.partition("/"))
        if not slash or not _is_code(base) or not _is_code(quote) or base == quote or not rate > 0:
            raise UsageError(f"exchange rate {pair}={rate:g}: expected FROM/TO=RATE, as in USD/CNY=7.1")
        if base in self.per_eur and quote != "EUR":
            changed = {quote: self._of(base) * rate}
        else:
            changed = {base: self._of(quote) / rate}
        return replace(self, per_eur={**self.per_eur, **changed}, source=f"{self.source}; {pair} by the user")

    def _of(self, currency: str) -> float:
        if currency not in self.per_eur:
            raise UnknownNameError("currency", currency, self.per_eur, "finefit costs --help")
        return self.per_eur[currency]


def _is_code(text: str) -> bool:
    return len(text) == 3 and text.isascii() and text.isalpha()


@functools.cache
def shipped_rates() -> Rates:
    """The dated rates of profiles/prices/rates.toml."""
    raw = raw_profiles("prices")["rates"]
    return Rates(per_eur=raw["per_eur"], as_of=raw["as_of"], source=raw["source"])
