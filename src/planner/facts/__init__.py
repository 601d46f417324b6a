"""`finefit list` and `finefit show`: what finefit knows, each fact with its source. One file per kind of thing.

The folder is the registry: a file `KIND.py` with a constant KIND adds a kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from planner.errors import FinefitError, UnknownNameError
from planner.render import Column

Record = Mapping[str, Any]
"""One thing as plain JSON values: bytes, seconds, FLOP/s, element counts; None is unknown."""

UNKNOWN = "-"
KIND_NAMES = ("gpus", "models", "methods", "optimizers", "formats")
"""The kinds in the order in which `show` looks; a test compares them with the folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """One fact as people read it; `source` is None where it follows from finefit's own code."""

    name: str
    value: str
    source: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One kind of thing: how to list all, find one by what a user calls it, and describe it.

    `find` raises UnknownNameError for a name that is none of these things.
    """

    records: Callable[[], list[Record]]
    columns: Callable[[list[Record]], list[Column]]
    find: Callable[[str], Record]
    describe: Callable[[Record], list[Fact]]


def find_kind(name: str) -> Kind:
    """The kind of that name (one of KIND_NAMES)."""
    import importlib

    kind: Kind = importlib.import_module(f"planner.facts.{name}").KIND
    return kind


def find_anything(name: str) -> dict[str, Record]:
    """Everything that `name` means, by kind.

    Raises UnknownNameError with the nearest names of all kinds, or what else is wrong with the name (it means
    several cards; it is a folder without a config.json).
    """
    found: dict[str, Record] = {}
    complaints: list[FinefitError] = []
    for kind_name in KIND_NAMES:
        try:
            found[kind_name] = find_kind(kind_name).find(name)
        except UnknownNameError:
            continue
        except FinefitError as error:
            complaints.append(error)
    if found:
        return found
    if complaints:
        raise complaints[0]
    known = [str(record["name"]) for kind_name in KIND_NAMES for record in find_kind(kind_name).records()]
    raise UnknownNameError("name", name, known, f"finefit list {'|'.join(KIND_NAMES)}")


def column(
    title: str,
    records: Iterable[Record],
    show: Callable[[Record], str],
    *,
    is_number: bool = False,
    is_prose: bool = False,
    drop: int = 0,
) -> Column:
    """A column whose cells are what `show` says of each record."""
    cells = tuple(show(record) for record in records)
    return Column(title=title, cells=cells, is_number=is_number, is_prose=is_prose, drop=drop)


def optional(value: Any, show: Callable[[Any], str] = str) -> str:
    """The value as text, or the sign for unknown."""
    return UNKNOWN if value is None else show(value)


def yes_no(value: bool | None) -> str:
    """A truth as a word."""
    return UNKNOWN if value is None else "yes" if value else "no"
