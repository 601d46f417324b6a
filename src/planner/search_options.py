"""What the limits of `finefit plan` say in words."""

from __future__ import annotations

import re

from planner.cost_options import parse_money
from planner.errors import UsageError
from planner.money import SHOWN_CURRENCIES, Rates
from planner.options import Limits
from planner.units import DAY_S, HOUR_S, MINUTE_S

_DURATION = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(min|h|d)", re.IGNORECASE)
_SECONDS = {"min": MINUTE_S, "h": HOUR_S, "d": DAY_S}


def parse_limits(budget: str | None, deadline: str | None, rates: Rates) -> tuple[Limits, str]:
    """The limits, and the currency to count in: the budget's where amounts are shown in it.

    Raises UsageError, UnknownNameError for a currency without a rate.
    """
    currency, money = "USD", None
    if budget is not None:
        money = parse_money("--budget", budget, rates)
        currency = money.currency if money.currency in SHOWN_CURRENCIES else currency
        money = rates.convert(money, currency)
    seconds = None if deadline is None else parse_duration("--deadline", deadline)
    return Limits(budget=money, deadline_s=seconds), currency


def parse_duration(option: str, text: str) -> float:
    """Seconds. Raises UsageError.

    >>> parse_duration("--deadline", "1.5h")
    5400.0
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None or not float(match[1]) > 0:
        raise UsageError(f"{option} {text!r}: expected a time above 0 with its unit, as in 8h, 90min or 2d")
    return float(match[1]) * _SECONDS[match[2].lower()]
