"""The layers of a model in order: which memory each one has, and what lies before and after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.tape import CATEGORIES, NOTHING, BlockMemory, Size, Snapshot, add, evaluate, scale


@dataclass(frozen=True, slots=True)
class Spot:
    """One layer, by its memory's number, with how many layers of each memory are before it and after it."""

    number: int
    before: Mapping[int, int]
    after: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Layering:
    """The memories of a model's layers, `order` of them from the first to the last layer."""

    memories: tuple[BlockMemory, ...]
    order: tuple[int, ...]
    spots: tuple[Spot, ...]

    @property
    def counts(self) -> Mapping[int, int]:
        """Layers of each memory."""
        return Counter(self.order)


def lay(memories: Sequence[BlockMemory], order: Sequence[int]) -> Layering:
    """The layers with their spots: of each memory the first and the last layer, where its peaks are highest.

    In between, what is stored before shrinks and gradients grow linearly with the layers.
    """
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for position, number in enumerate(order):
        first.setdefault(number, position)
        last[number] = position
    spots = tuple(
        Spot(order[p], Counter(order[:p]), Counter(order[p + 1 :]))
        for p in sorted({*first.values(), *last.values()})
    )
    return Layering(tuple(memories), tuple(order), spots)


def saved_sum(layering: Layering, counts: Mapping[int, int]) -> Snapshot:
    """What `counts` layers of each memory save, by category."""
    total = NOTHING
    for number, count in counts.items():
        parts = layering.memories[number].saved
        total = (
            add(total[0], scale(parts[0], count)),
            add(total[1], scale(parts[1], count)),
            add(total[2], scale(parts[2], count)),
            add(total[3], scale(parts[3], count)),
        )
    return total


def sum_of(sizes: Mapping[int, Size], counts: Mapping[int, int]) -> Size:
    """The sum of `counts` times each memory's size."""
    total = NOTHING[0]
    for number, count in counts.items():
        total = add(total, scale(sizes[number], count))
    return total


def by_category(snapshot: Snapshot, tokens: int, seq_len: int) -> dict[str, float]:
    """A snapshot's bytes for that many tokens in rows of `seq_len`."""
    return {name: evaluate(size, tokens, seq_len) for name, size in zip(CATEGORIES, snapshot, strict=True)}
