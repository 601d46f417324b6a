"""The user's own prices: a YAML file with offers in any currency, and exchange rates for currencies that need one.

    offers:
      - {provider: autodl, gpu: rtx-4090, price: 1.98, currency: CNY, as_of: 2026-11-20, source: "autodl.com, my account"}
    rates:
      USD/TWD: 32.1

An offer's keys are `planner.offers.ROW_KEYS`; provider, gpu, price and source must be there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.errors import UsageError
from planner.files import user_data_folder
from planner.money import Rates
from planner.plain_yaml import load_mapping, read_text

_NOUN = "price file"
_KEYS = ("offers", "rates")


@dataclass(frozen=True, kw_only=True, slots=True)
class UserPrices:
    """What one file says: rows with the place that each stands at, and rates by pair."""

    rows: tuple[tuple[str, Mapping[str, Any]], ...]
    rates: Mapping[str, float]

    def change(self, rates: Rates) -> Rates:
        """The rates with the file's own in their place."""
        for pair, rate in self.rates.items():
            rates = rates.with_rate(pair, rate)
        return rates


def default_price_file() -> Path:
    """Read whenever it is there."""
    return user_data_folder() / "prices.yaml"


def read_user_prices(path: Path) -> UserPrices:
    """The file's content; single offers are judged later. Raises UsageError with file and line, FinefitError."""
    return parse_user_prices(read_text(path, _NOUN), str(path))


def parse_user_prices(text: str, name: str) -> UserPrices:
    """The same from a text; `name` is what complaints call the file."""
    values, lines = load_mapping(text, name, _NOUN)
    for key in values:
        if key not in _KEYS:
            raise UsageError(
                f"{name}:{lines[key]}: {key}: no such key; a price file has {' and '.join(_KEYS)}"
            )
    given = {key: value for key, value in values.items() if value is not None}
    offers, rates = given.get("offers", []), given.get("rates", {})
    if not isinstance(offers, list):
        raise UsageError(f"{name}:{lines['offers']}: offers is not a list (- provider: …)")
    if not isinstance(rates, dict):
        raise UsageError(f"{name}:{lines['rates']}: rates is not a mapping (USD/CNY: 7.1)")
    for pair, rate in rates.items():
        if not isinstance(rate, int | float) or isinstance(rate, bool):
            raise UsageError(f"{name}:{lines[f'rates.{pair}']}: {pair}: {rate!r} is not a number")
    return UserPrices(rows=tuple(_rows(offers, lines, name)), rates=rates)


def _rows(offers: list[Any], lines: Mapping[str, int], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, row in enumerate(offers):
        if not isinstance(row, dict):
            raise UsageError(f"{name}:{lines['offers']}: offer {number + 1} is not a mapping (provider: …)")
        line = min(
            (at for key, at in lines.items() if key.startswith(f"offers.{number}.")), default=lines["offers"]
        )
        # a year alone is a number to YAML
        as_of = {"as_of": str(row["as_of"])} if isinstance(row.get("as_of"), int) else {}
        yield f"{name}:{line}", {**row, **as_of}
