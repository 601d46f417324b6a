"""The dimensions of one model: read from its config.json, checked, and put into families.toml's expressions."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from planner.errors import ConfigError, NotModelledError, ProfileError

MAX_DIMENSION = 100_000_000
"""No dimension of a real model comes near (the largest vocabulary is below 10**6)."""

Factor = tuple[str, str, str | int]
Term = tuple[int, tuple[Factor, ...]]
_TOKENS = re.compile(r"\s*([-+*/?!]|\d+|[a-z_][a-z_0-9]*)\s*")


@functools.cache
def parse(expression: str) -> tuple[Term, ...]:
    """An expression as terms (sign, ((operator, test, atom), ...)): sums of products, no brackets.

    >>> parse("2*hidden-?bias")
    ((1, (('*', '', 2), ('*', '', 'hidden'))), (-1, (('*', '?', 'bias'),)))
    """
    if _TOKENS.sub("", expression):
        raise ProfileError(f"families.toml: can't read the expression {expression!r}")
    terms: list[Term] = []
    factors: list[Factor] = []
    sign, action, test = 1, "*", ""
    for token in _TOKENS.findall(expression):
        if token in "+-":
            terms.append((sign, tuple(factors)))
            sign, action, factors = (1 if token == "+" else -1), "*", []
        elif token in "*/":
            action = token
        elif token in "?!":
            test = token
        else:
            factors.append((action, test, int(token) if token.isdigit() else token))
            test = ""
    return (*terms, (sign, tuple(factors)))


class Dimensions(dict[str, int]):
    """Dimension, or expression of dimensions, -> its size; each is worked out when first asked for.

    `where` names the file in errors; a missing or absurd field raises ConfigError.
    """

    def __init__(self, config: Mapping[str, Any], family: Mapping[str, Any], where: str) -> None:
        super().__init__()
        self.config, self.family, self.where = config, family, where

    def __missing__(self, name: str) -> int:
        if name.isidentifier():
            value = self._read(name)
        else:
            value = sum(sign * self._product(factors) for sign, factors in parse(name))
        self[name] = value
        return value

    def evaluate(self, expression: str | int) -> int:
        """The value of an expression of families.toml; ConfigError where a division is not exact."""
        return self[expression] if isinstance(expression, str) else int(expression)

    def require(self, expression: str | int) -> int:
        """The same for a width, which has to be positive."""
        value = self.evaluate(expression)
        if value < 1:
            raise self.error(f"{expression} = {value}, which has to be at least 1")
        return value

    def error(self, message: str) -> ConfigError:
        """A ConfigError that names the file."""
        return ConfigError(f"{self.where}: {message}")

    def field(self, name: str) -> str:
        """The config.json key that holds the dimension `name`."""
        keys = self.family["keys"].get(name, ())
        return next((key for key in keys if key in self.config), keys[0] if keys else name)

    def check_modelled(self) -> None:
        """Raise NotModelledError where the config asks for what the family refuses."""
        for name, reason in self.family["refuse"].items():
            if self[name]:
                raise NotModelledError(f"{self.where}: {self.field(name)}: {reason} is not modelled")

    def _product(self, factors: tuple[Factor, ...]) -> int:
        value = 1
        for action, test, atom in factors:
            number = atom if isinstance(atom, int) else self[atom]
            if test:
                number = int(bool(number) == (test == "?"))
            if action == "*":
                value *= number
            elif number == 0 or value % number:
                raise self.error(f"{self.field(str(atom))} = {number} doesn't divide {value}")
            else:
                value //= number
        return value

    def _read(self, name: str) -> int:
        if name in self.family["texts"]:
            return self._has_word(*self.family["texts"][name])
        default = self.family["values"].get(name)
        for key in self.family["keys"].get(name, ()):
            if key not in self.config:
                continue
            value = self.config[key]
            if value is not None:
                return self._checked(name, key, value, default)
            default = self.family["nulls"].get(name, default)
            break
        if default is None:
            raise self.error(f"field {self.field(name)!r} is missing")
        return self.evaluate(default)

    def _has_word(self, key: str, word: str) -> int:
        value = self.config.get(key)
        texts = value if isinstance(value, list) else [value]
        return int(any(isinstance(text, str) and word in text for text in texts))

    def _checked(self, name: str, key: str, value: Any, default: Any) -> int:
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise self.error(f"field {key!r} must be true or false, not {value!r:.40}")
            return int(value)
        if name in self.family["uniform"] and isinstance(value, list) and value:
            value = self._only(key, value)
        if name in self.family["counted"] and isinstance(value, dict | list):
            value = len(value)
        lowest = 0 if default == 0 or self.family["nulls"].get(name) == 0 else 1
        if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= MAX_DIMENSION:
            raise self.error(
                f"field {key!r} must be a whole number from {lowest} to {MAX_DIMENSION}, not {value!r:.40}"
            )
        return value

    def _only(self, key: str, values: list[Any]) -> Any:
        if any(value != values[0] for value in values):
            raise NotModelledError(f"{self.where}: {key} that differs from layer to layer is not modelled")
        return values[0]
