"""Where the documents of a batch lie: what attention needs to treat each by itself, without a mask of all tokens.

Documents of like length are gathered side by side and padded at their end, so that a causal attention without a mask
is exact for their real tokens; what it gives at the padding is thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

MULTIPLE = 32
"""Padded lengths are multiples of it: bfloat16's vector width of AVX-512, whose softmax over other lengths takes
1.5 to 2.7 times as long (torch 2.13, CPU)."""
LEAST_FILL = 0.6
"""A document shorter than this share of its group's longest starts a group of its own."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Documents:
    """The documents of a batch of N tokens (rows one after the other), gathered in groups of like length.

    `groups` holds (number of documents, padded length) of each, `places` [N] where each token stands among all
    places of all groups; `starts` [documents + 1] counts the tokens before each document, `longest` those of the
    longest one.
    """

    groups: tuple[tuple[int, int], ...]
    places: torch.Tensor
    starts: torch.Tensor
    longest: int

    @property
    def num_places(self) -> int:
        """Tokens and padding."""
        return sum(number * length for number, length in self.groups)

    def to(self, device: torch.device) -> Documents:
        """The same with its tensors there."""
        return Documents(
            groups=self.groups,
            places=self.places.to(device),
            starts=self.starts.to(device),
            longest=self.longest,
        )


def locate(lengths: Sequence[int]) -> Documents:
    """The documents of these lengths (tokens, at least one), which follow each other without a gap."""
    import torch

    starts = np.concatenate(([0], np.cumsum(lengths)))
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    groups = []
    places = np.zeros(starts[-1], dtype=np.int64)
    num_places = 0
    for members in _alike(order, lengths):
        width = _padded(lengths[members[0]])
        groups.append((len(members), width))
        for number in members:
            span = slice(starts[number], starts[number + 1])
            places[span] = num_places + np.arange(lengths[number])
            num_places += width
    return Documents(
        groups=tuple(groups),
        places=torch.from_numpy(places),
        starts=torch.from_numpy(starts.astype(np.int32)),
        longest=max(lengths),
    )


def _alike(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Neighbours of `order`, the longest first, whose padding stays small."""
    groups: list[list[int]] = []
    for number in order:
        if groups and lengths[number] >= LEAST_FILL * _padded(lengths[groups[-1][0]]):
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def _padded(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE
