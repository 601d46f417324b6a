"""How the process gets its memory from the system."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping
from typing import Any

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
"""mallopt's numbers (malloc.h of glibc)."""
_NEVER_BYTES = 2**31 - 1
_MMAP_BYTES = 2**30
_PAD_BYTES = 64 * 2**20


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what is freed, up to 2 GiB, instead of giving it back to the system.

    A training step asks for the same tensors each time. By default those above 32 MiB at most are mapped anew, and the
    kernel fills each page with zeros: about a tenth of a small model's step on a CPU. Elsewhere nothing is done.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, _NEVER_BYTES)
    libc.mallopt(_M_TOP_PAD, _PAD_BYTES)


def give_back_freed_memory() -> None:
    """Return to the system what malloc has kept of freed memory, after a step that found too little."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def kept_bytes() -> int | None:
    """Freed memory that malloc keeps; None where it doesn't say (glibc before 2.33, other C libraries)."""
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return None
    libc.mallinfo2.restype = _Mallinfo2
    return int(libc.mallinfo2().fordblks)


GROWTH = 1.25
"""Of the resident set over that of the first steps, from which on kept memory is given back. Steps of one shape stay far
below; rows of many lengths leave holes that the next ones don't fit into, and those add up."""
FIRST_STEPS = 3


class KeptMemory:
    """A listener of a run's metrics: bounds what `keep_freed_memory` lets a process on the CPU hold."""

    def __init__(self) -> None:
        self._num_steps, self._first_bytes = 0, 0

    def __call__(self, kind: str, values: Mapping[str, Any]) -> None:
        """Give freed memory back when a step leaves much more resident than the first ones did."""
        if kind != "step" or "rss_bytes" not in values:
            return
        self._num_steps += 1
        if self._num_steps <= FIRST_STEPS:
            self._first_bytes = max(self._first_bytes, values["rss_bytes"])
        elif values["rss_bytes"] > GROWTH * self._first_bytes:
            give_back_freed_memory()

    def close(self) -> None:
        """Nothing is held here."""


class _Mallinfo2(ctypes.Structure):
    """glibc's struct of that name (malloc.h)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            [
                "arena",
                "ordblks",
                "smblks",
                "hblks",
                "hblkhd",
                "usmblks",
                "fsmblks",
                "uordblks",
                "fordblks",
                "keepcost",
            ]
        )
    )
