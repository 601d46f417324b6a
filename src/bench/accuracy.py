"""Token accuracy: how often the likeliest token is the right one, counted where a loss has the logits anyway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_hits: ContextVar[list[torch.Tensor] | None] = ContextVar("hits", default=None)


@contextmanager
def counting_hits() -> Iterator[list[torch.Tensor]]:
    """While entered, losses append a number for each piece of logits that they make: the labels that it meets.

    The list stays empty where a loss never shows its logits (Liger's).
    """
    found: list[torch.Tensor] = []
    token = _hits.set(found)
    try:
        yield found
    finally:
        _hits.reset(token)


def count_hits(logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Called by losses: `logits` [..., V] and the labels [...] of the same places; negative labels don't count."""
    found = _hits.get()
    if found is not None:
        found.append(((logits.argmax(-1) == labels) & (labels >= 0)).sum())
