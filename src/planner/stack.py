"""The library versions whose behaviour is predicted: `transformers 4.48.1, peft 0.13.2, torch 2.4.1`."""

from __future__ import annotations

import re
from dataclasses import dataclass

Version = tuple[int, ...]

NEWEST_KNOWN = "transformers 5.23.0, peft 0.21.2, accelerate 1.15.0, bitsandbytes 0.50.2, torch 2.13.0"
"""The releases that finefit's own step runs on and that the formulas were derived from."""

_ENTRY = re.compile(r"([a-z][\w-]*)\s+v?(\d+(?:\.\d+)*)")


@dataclass(frozen=True, slots=True)
class Stack:
    """Versions by library; a library that the text doesn't name behaves as the newest known one."""

    versions: tuple[tuple[str, Version], ...]

    def is_before(self, library: str, *version: int) -> bool:
        """Whether `library` is older than `version`; False where the stack doesn't name it."""
        found = dict(self.versions).get(library)
        return found is not None and found < version

    @property
    def splits_experts(self) -> bool:
        """Experts are separate linears (transformers 4), not one 3-D parameter (5)."""
        return self.is_before("transformers", 5)


def parse_stack(text: str | None) -> Stack:
    """The stack that a setup names; the newest known where it names none.

    >>> parse_stack("transformers 4.48.1, peft 0.13.2").is_before("transformers", 4, 50)
    True
    """
    entries = _ENTRY.findall((text or NEWEST_KNOWN).lower())
    return Stack(tuple((name, tuple(int(part) for part in version.split("."))) for name, version in entries))
