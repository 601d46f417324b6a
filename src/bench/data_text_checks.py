"""What a text's letters tell: its language, and whether it went through a wrong encoding on its way here."""

from __future__ import annotations

import re

from planner.dataset import Row

MIN_LETTERS = 12
"""Of fewer letters the language can't be told; one of East Asia's scripts, from U+2E80 on, counts as three."""
MAX_CHARS = 500
"""What of a row its language is told by."""
UNKNOWN = "unknown"

_DAMAGE = {
    "replacement character": re.compile("\ufffd"),
    "wrongly decoded letters": re.compile("[ÂÃ][\x80-\xbf]|â€|ï»¿|[ÐÑ][\x80-\xbf][ÐÑ]"),
}
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")


def contents(row: Row) -> list[str]:
    """The texts of a row, turn by turn."""
    return [row.text] if row.text is not None else [m.content for m in row.turns]


def encoding_faults(row: Row) -> list[str]:
    """Signs of damage in valid UTF-8: letters that were lost, UTF-8 read as Latin-1, codes for terminals."""
    found: set[str] = set()
    for text in contents(row):
        if _CONTROL.search(text):
            found.add("control character")
        if not text.isascii():
            found.update(name for name, pattern in _DAMAGE.items() if pattern.search(text))
    return sorted(found)


def language(row: Row) -> str:
    """The ISO 639-1 code of the row's main language, by py3langid's own model; "unknown" of too few letters."""
    from py3langid import classify

    text = " ".join(contents(row))[:MAX_CHARS]
    if sum(1 + 2 * (letter >= "\u2e80") for letter in text if letter.isalpha()) < MIN_LETTERS:
        return UNKNOWN
    return str(classify(text)[0])
