"""Which card a person means: "4090", "rtx-4090", "NVIDIA A100-SXM4-80GB", "a6000 48g".

A name is taken in three steps, and the first that leaves exactly one card decides:

1. it spells a card's name or alias, whatever its case, blanks, hyphens and brand words;
2. it has all the words that tell the card from others, and only words that are true of it
   (memory size and type and the form factor may be said or left out, in any order);
3. its words are true of the card, though some of the card's own are missing ("h20", "h100 nvl").

Several cards are an error that lists them, and so is none: a card is never guessed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from planner.errors import UnknownNameError, UsageError, fold_name, nearest_names

BRANDS = frozenset(
    {"nvidia", "geforce", "rtx", "gtx", "tesla", "amd", "radeon", "rx", "instinct", "intel", "habana"}
    | {"apple", "google", "cloud", "huawei", "gpu", "gpus", "graphics", "generation", "edition"}
)
"""Words that don't tell one card from another."""

SYNONYMS = {"mobile": "laptop", "sxm2": "sxm", "sxm3": "sxm", "sxm4": "sxm", "sxm5": "sxm", "sxm6": "sxm"}
FORM_FACTORS = frozenset({"sxm", "pcie"})

_GLUED_BRAND = re.compile(r"\b(?:rtx|gtx|rx)(?=a?\d)")
_GLUED_SUFFIX = re.compile(r"(?<=\d{4})(ti|super|d)\b")
_MEMORY = re.compile(r"\b(\d+)\s*(?:g|gb|gib)\b")
_WORD = re.compile(r"[a-z0-9.]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spelling:
    """One way to write a card: the words that identify it, and those that are merely true of it."""

    gpu: str
    needed: frozenset[str]
    allowed: frozenset[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class CardWords:
    """What the resolver has to know of a card; `memory_gib` as marketed."""

    gpu: str
    spellings: tuple[str, ...]
    memory_gib: float
    memory_type: str


def words(text: str) -> frozenset[str]:
    """The words of a name that mean something.

    >>> sorted(words("NVIDIA A100-SXM4-80GB")), sorted(words("rtx4070Ti 12 GB"))
    (['80gb', 'a100', 'sxm'], ['12gb', '4070', 'ti'])
    """
    spaced = re.sub(r"[^a-z0-9.]+", " ", text.lower())
    spaced = _GLUED_SUFFIX.sub(r" \1", _GLUED_BRAND.sub("", _MEMORY.sub(r"\1gb", spaced)))
    return frozenset(SYNONYMS.get(word, word) for word in _WORD.findall(spaced)) - BRANDS


def plain(text: str) -> str:
    """A whole name without case, blanks, punctuation and brand words, in its own order."""
    spaced = _GLUED_BRAND.sub("", re.sub(r"[^a-z0-9.+]+", " ", text.lower()))
    return fold_name("".join(word for word in spaced.split() if word not in BRANDS))


class GpuNames:
    """Resolves names against a catalogue of cards; the words are worked out only when step 1 fails."""

    def __init__(self, cards: Iterable[CardWords]) -> None:
        self.cards = tuple(cards)
        self._exact = {plain(spelling): card.gpu for card in self.cards for spelling in card.spellings}

    def resolve(self, text: str) -> str:
        """The one card's name. Raises UsageError listing the cards when several are meant, UnknownNameError."""
        exact = self._exact.get(plain(text))
        if exact is not None:
            return exact
        meant = self._by_words(words(text))
        if len(meant) == 1:
            return meant[0]
        if meant:
            raise UsageError(f"GPU {text!r} can be several: {_listed(meant)}; say which")
        raise UnknownNameError("GPU", text, (_closest_spelling(card, text) for card in self.cards))

    def _by_words(self, wanted: frozenset[str]) -> list[str]:
        """Cards of which all the words are true: the exact ones if there are any, else all."""
        true_of = [s for s in self._spellings if wanted & s.needed and wanted <= s.allowed]
        exact = _unique(s.gpu for s in true_of if s.needed <= wanted)
        return exact if len(exact) == 1 else _unique(s.gpu for s in true_of)

    @functools.cached_property
    def _spellings(self) -> list[Spelling]:
        return [_spelling(card, text) for card in self.cards for text in card.spellings]


def _spelling(card: CardWords, text: str) -> Spelling:
    said = words(text)
    side_facts = {f"{card.memory_gib:g}gb", *words(card.memory_type)}
    return Spelling(gpu=card.gpu, needed=said - side_facts - FORM_FACTORS, allowed=said | side_facts)


def _closest_spelling(card: CardWords, text: str) -> str:
    """The card as its spelling most like `text`, so that brand words don't hide what is near."""
    return (nearest_names(text, card.spellings, most=1) or [card.gpu])[0]


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def clashes(cards: Iterable[CardWords]) -> Mapping[str, list[str]]:
    """Spellings that two cards share, for the test of the data; must be empty."""
    owners: dict[str, list[str]] = {}
    for card in cards:
        for spelling in {plain(s) for s in card.spellings}:
            owners.setdefault(spelling, []).append(card.gpu)
    return {spelling: names for spelling, names in owners.items() if len(names) > 1}
