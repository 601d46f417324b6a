"""The families of profiles/models/families.toml: what config.json doesn't say, one entry per model_type."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Mapping
from typing import Any

from planner.errors import NotModelledError, ProfileError, nearest_names

Family = Mapping[str, Any]
"""An entry of families.toml with everything that it inherits; the file's head explains its keys."""


@functools.cache
def _raw() -> Mapping[str, Any]:
    import tomllib
    from pathlib import Path

    folder = Path(__file__).parents[2] / "profiles" / "models"
    return {path.stem: tomllib.loads(path.read_text()) for path in sorted(folder.glob("*.toml"))}


def raw_models() -> Mapping[str, Mapping[str, Any]]:
    """The model profiles by file."""
    return {stem: models for stem, models in _raw().items() if stem != "families"}


@functools.cache
def model_types() -> tuple[str, ...]:
    """Every model_type that has a family."""
    return tuple(name for name in _raw()["families"]["family"] if name != "base")


@functools.cache
def family(model_type: str) -> Family:
    """The family of a model_type, inherited parts merged in.

    Raises NotModelledError with the nearest families when there is none.
    """
    entry = _raw()["families"]["family"].get(model_type)
    if entry is None:
        near = ", ".join(nearest_names(model_type, model_types())) or ", ".join(model_types()[:6])
        raise NotModelledError(
            f"model_type {model_type!r} is not modelled; nearest: {near} (see `finefit list models`)"
        )
    parent = entry.get("like")
    return entry if parent is None else _merge(family(parent), entry)


def block(name: str) -> Mapping[str, Any]:
    """A named block of families.toml: its matrices and its `vectors` expression."""
    try:
        found: Mapping[str, Any] = _raw()["families"]["block"][name]
    except KeyError:
        raise ProfileError(f"families.toml: no block {name!r}") from None
    return found


def _merge(base: Family, entry: Family) -> Family:
    merged = dict(base)
    for key, value in entry.items():
        is_table = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if is_table else value
    return merged


Term = tuple[int, tuple[tuple[str, str | int], ...]]
_TOKENS = re.compile(r"\s*([-+*/]|\d+|[a-z_][a-z_0-9]*)")
_OPERATORS = {"*": operator.mul, "/": operator.floordiv}


@functools.cache
def parse(expression: str) -> tuple[Term, ...]:
    """An expression as terms (sign, ((operator, atom), ...)): sums of products, no brackets.

    >>> parse("2*hidden-1")
    ((1, (('*', 2), ('*', 'hidden'))), (-1, (('*', 1),)))
    """
    if _TOKENS.sub("", expression).strip():
        raise ProfileError(f"families.toml: can't read the expression {expression!r}")
    terms: list[Term] = []
    sign, action, factors = 1, "*", []  # type: int, str, list[tuple[str, str | int]]
    for token in _TOKENS.findall(expression):
        if token in "+-":
            terms.append((sign, tuple(factors)))
            sign, action, factors = (1 if token == "+" else -1), "*", []
        elif token in "*/":
            action = token
        else:
            factors.append((action, int(token) if token.isdigit() else token))
    return (*terms, (sign, tuple(factors)))


def evaluate(expression: str | int | bool, dims: Mapping[str, int]) -> int:
    """The value of an expression over `dims`; ZeroDivisionError and ArithmeticError where / isn't exact."""
    if not isinstance(expression, str):
        return int(expression)
    return sum(sign * _product(factors, dims) for sign, factors in parse(expression))


def _product(factors: tuple[tuple[str, str | int], ...], dims: Mapping[str, int]) -> int:
    value = 1
    for action, atom in factors:
        number = atom if isinstance(atom, int) else dims[atom]
        if action == "/" and (number == 0 or value % number):
            raise ArithmeticError(f"{atom}")
        value = _OPERATORS[action](value, number)
    return value
