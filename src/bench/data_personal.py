"""Strings that may name a person or open a door: e-mail addresses, phone and card numbers, identity numbers, keys.

Found by their look, and by their check digits where the kind has some; a hit is a hint, not a proof, and a name or an
address in words is not found at all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One kind of string: its look, and a module of python-stdnum whose `is_valid` a match must pass."""

    name: str
    pattern: re.Pattern[str]
    check: str = ""


def _kind(name: str, pattern: str, check: str = "") -> Kind:
    return Kind(name=name, pattern=re.compile(pattern, re.ASCII), check=check)


KINDS: tuple[Kind, ...] = (
    _kind("email", r"(?<![\w.+-])[A-Za-z0-9][\w.%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"),
    _kind(
        "secret", r"\b(?:sk-[\w-]{20,}|gh[pousr]_\w{30,}|hf_\w{30,}|AKIA[0-9A-Z]{16}|xox[abpr]-[\w-]{10,})"
    ),
    _kind("iban", r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", "stdnum.iban"),
    _kind("resident-id", r"(?<![\w])\d{17}[\dXx](?!\w)", "stdnum.cn.ric"),
    _kind("card", r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])", "stdnum.luhn"),
    _kind("social-security", r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])", "stdnum.us.ssn"),
    _kind(
        "phone",
        r"(?<![\w.+/-])(?:\+\d{1,3}(?:[ .()-]{0,2}\d){7,12}|\(\d{3}\) ?\d{3}[ .-]\d{4}"
        r"|\d{3}[.-]\d{3}[.-]\d{4}|1[3-9]\d{9})(?![\w-])",
    ),
)
"""Looked for in this order: what an earlier kind took is not counted again."""

_SIGNS = ("@", "sk-", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "hf_", "AKIA", "xox")
_DIGITS = re.compile(r"[0-9][0-9 .()X-]{5,}", re.ASCII)
"""Whatever any kind finds holds a sign or such digits so that most texts cost little."""


def _may_hold_some(text: str) -> bool:
    return any(sign in text for sign in _SIGNS) or _DIGITS.search(text) is not None


def redact(text: str) -> tuple[str, Mapping[str, int]]:
    """(the text with each such string replaced by its kind, as in <EMAIL>, how many of each kind).

    >>> redact("write to ada@example.org")
    ('write to <EMAIL>', {'email': 1})
    """
    if not _may_hold_some(text):
        return text, {}
    found: Counter[str] = Counter()
    for kind in KINDS:
        text = kind.pattern.sub(partial(_replace, kind=kind, found=found), text)
    return text, dict(found)


def _replace(match: re.Match[str], kind: Kind, found: Counter[str]) -> str:
    if not _validator(kind.check)(re.sub("[ -]", "", match[0])):
        return match[0]
    found[kind.name] += 1
    return f"<{kind.name.upper()}>"


@cache
def _validator(module: str) -> Callable[[str], bool]:
    if not module:
        return lambda text: True
    is_valid: Callable[[str], bool] = import_module(module).is_valid
    return is_valid
