"""What the options of `finefit costs` say in words: amounts with their currency, ranges, values for one card."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from planner.catalog import find_gpu
from planner.cost import Span
from planner.costs import ANY_CARD, CostWishes
from planner.errors import UnknownNameError, UsageError
from planner.money import SHOWN_CURRENCIES, Money, Rates
from planner.tariffs import SECTORS, WORLD, Tariff, tariff
from planner.units import DAY_S, HOUR_S, MINUTE_S

OWNED = "owned"
_SPANS = (
    ("box_watts", "box_w", 1.0),
    ("setup_minutes", "setup_s", MINUTE_S),
    ("download_mb_s", "download_bytes_per_s", 1e6),
    ("interruptions_per_day", "interruptions_per_s", 1 / DAY_S),
)
"""Option, field of CostWishes, and what one unit of the option is in the field's unit."""
_ABOVE_ZERO = ("box_watts", "download_mb_s")

_NUMBER = r"\d+(?:\.\d+)?|\.\d+"
_RANGE = re.compile(rf"({_NUMBER})(?:\s*-\s*({_NUMBER}))?")
_AMOUNT = re.compile(rf"({_NUMBER})(?:\s*-\s*({_NUMBER}))?\s*([A-Za-z]{{3}})")


def read_wishes(options: Mapping[str, Any], rates: Rates, own_card: str) -> CostWishes:
    """What the options of the command say, by their names. Raises UsageError, UnknownNameError."""
    currency = find_currency(options["currency"])
    given: dict[str, Any] = {
        field: parse_span(_option(name), options[name], scale, above_zero=name in _ABOVE_ZERO)
        for name, field, scale in _SPANS
        if options[name] is not None
    }
    is_owned = (options["card_price"] or "").strip().lower() == OWNED
    per_year = options["hours_per_year"]
    checkpoint = options["checkpoint_minutes"]
    return CostWishes(
        currency=currency,
        seconds=parse_by_card("--hours", options["hours"], own_card, HOUR_S),
        tokens_per_s=parse_by_card("--tokens-per-second", options["tokens_per_second"], own_card),
        tariff=_tariff(options, rates, currency),
        is_owned=is_owned,
        purchase=None if is_owned else _money(options, "card_price", rates),
        resale=_money(options, "resale", rates),
        hours=None if per_year is None else per_year * options["years"],
        with_spot=not options["on_demand"],
        checkpoint_s=None if checkpoint is None else checkpoint * MINUTE_S,
        **given,
    )


def find_currency(text: str) -> str:
    """The currency to show amounts in. Raises UnknownNameError."""
    wanted = text.strip().upper()
    if wanted not in SHOWN_CURRENCIES:
        raise UnknownNameError("currency", text, SHOWN_CURRENCIES, "finefit costs --help")
    return wanted


def _tariff(options: Mapping[str, Any], rates: Rates, currency: str) -> Tariff:
    """The price of a kWh that was given, else the country's, else the world's average."""
    given = _money(options, "tariff", rates)
    if given is None:
        return tariff(options["country"] or WORLD, rates, currency, SECTORS[options["business"]])
    if options["country"] is not None:
        raise UsageError("--tariff and --country both say what a kWh costs; give one of them")
    return Tariff(country="yours", per_kwh=given, as_of=None, quality="ok", source="the user")


def _money(options: Mapping[str, Any], name: str, rates: Rates) -> Money | None:
    text = options[name]
    return None if text is None else parse_money(_option(name), text, rates)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse_span(option: str, text: str, scale: float = 1.0, *, above_zero: bool = False) -> Span:
    """A number or LOW-HIGH, times `scale`. Raises UsageError.

    >>> parse_span("--setup-minutes", "5-20", 60)
    Span(low=300.0, high=1200.0)
    """
    match = _RANGE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{option} {text!r}: expected a number from 0, or LOW-HIGH as in 5-20")
    low, high = _ends(option, text, match)
    if above_zero and not low > 0:
        raise UsageError(f"{option} {text!r}: must be above 0")
    return Span(low=low * scale, high=high * scale)


def parse_money(option: str, text: str, rates: Rates) -> Money:
    """An amount or a range with its currency. Raises UsageError, UnknownNameError for a currency without a rate.

    >>> from planner.money import shipped_rates
    >>> parse_money("--tariff", "0.30eur", shipped_rates())
    Money(low=0.3, high=0.3, currency='EUR')
    """
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"{option} {text!r}: expected an amount from 0 with its currency, as in 1600USD or 0.3EUR"
        )
    low, high = _ends(option, text, match)
    money = Money(low=low, high=high, currency=match[3].upper())
    rates.convert(money, "EUR")
    return money


def _ends(option: str, text: str, match: re.Match[str]) -> tuple[float, float]:
    low = float(match[1])
    high = float(match[2] or match[1])
    if low > high:
        raise UsageError(f"{option} {text!r}: the low end is above the high end")
    return low, high


def parse_by_card(option: str, texts: Iterable[str], own_card: str, scale: float = 1.0) -> dict[str, float]:
    """`X` for the plan's own card, `GPU=X` for another, `any=X` for all that aren't named. Raises UsageError."""
    values: dict[str, float] = {}
    for text in texts:
        name, equals, number = text.rpartition("=")
        card = (
            own_card if not equals else ANY_CARD if name.strip().lower() == ANY_CARD else find_gpu(name).name
        )
        values[card] = _positive(option, text, number) * scale
    return values


def _positive(option: str, text: str, number: str) -> float:
    if re.fullmatch(_NUMBER, number.strip()) is None or not float(number) > 0:
        raise UsageError(f"{option} {text!r}: expected a number above 0, or GPU=NUMBER as in rtx-4090=2.5")
    return float(number)


def parse_rates(rates: Rates, texts: Iterable[str]) -> Rates:
    """The rates with those of `--rate FROM/TO=X` in their place. Raises UsageError."""
    for text in texts:
        pair, _, number = text.partition("=")
        rates = rates.with_rate(pair, _positive("--rate", text, number))
    return rates
