"""How old a price is: dates as sources give them, a day, a month, a quarter or a year."""

from __future__ import annotations

import datetime
import re

MARKED_FROM_DAYS = 30
"""Older prices are shown with their age."""
OLD_FROM_DAYS = 180
"""Older prices, and undated ones, rank below the others."""

_DATE = re.compile(r"(20\d\d)(?:-Q([1-4])|-(\d\d)(?:-(\d\d))?)?")


def first_day(as_of: str) -> datetime.date | None:
    """The first day that a date can mean, so that no price looks newer than it is; None where it isn't a date.

    >>> first_day("2026-Q2"), first_day("2025"), first_day("lately")
    (datetime.date(2026, 4, 1), datetime.date(2025, 1, 1), None)
    """
    match = _DATE.fullmatch(as_of)
    if match is None:
        return None
    year, quarter, month, day = match.groups()
    start_of_quarter = 3 * int(quarter) - 2 if quarter else 1
    try:
        return datetime.date(int(year), int(month or start_of_quarter), int(day or 1))
    except ValueError:
        return None


def age_days(as_of: str | None, today: datetime.date) -> int | None:
    """Days since a price was true; None where it has no date."""
    day = None if as_of is None else first_day(as_of)
    return None if day is None else (today - day).days


def is_old(as_of: str | None, today: datetime.date) -> bool:
    """Whether a price is older than OLD_FROM_DAYS or has no date."""
    age = age_days(as_of, today)
    return age is None or age > OLD_FROM_DAYS


def describe_date(as_of: str | None, today: datetime.date) -> str:
    """The date as people read it, with the age where that matters.

    >>> describe_date("2026-09-06", datetime.date(2026, 11, 22)), describe_date(None, datetime.date(2026, 11, 22))
    ('2026-09-06 (77 d old)', 'undated')
    """
    age = age_days(as_of, today)
    if age is None:
        return "undated"
    return f"{as_of} ({age} d old)" if age > MARKED_FROM_DAYS else str(as_of)
