"""The layers of a model in order: which memory each one has, and what lies before and after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from planner.shapes import Shape, Terms
from planner.sizes import sum_of
from planner.tape import CATEGORIES, BlockMemory, Size, Snapshot, scale


@dataclass(frozen=True, slots=True)
class Group:
    """Some of the layers, and the sums of what they hold.

    `num_plain` of them are never recomputed. `inputs` are those that outlive the forward; `saved` is what outlives it of
    layers that aren't recomputed; `handed_on` what they gave to later ones beside the stream. The sizes are sums of BlockMemory's, `kept` of all categories.
    """

    num_layers: int
    num_plain: int
    inputs: Size
    handed_on: Size
    saved: Snapshot
    kept: Size
    cached: Size
    weight_gradients: Size


@dataclass(frozen=True, slots=True)
class Spot:
    """One layer, by its memory's number: itself, those before it, both together, and those after it."""

    number: int
    own: Group
    before: Group
    until: Group
    after: Group


@dataclass(frozen=True, slots=True)
class Layering:
    """The memories of a model's layers, `order` of them from the first to the last layer; `whole`: all together."""

    memories: tuple[BlockMemory, ...]
    order: tuple[int, ...]
    spots: tuple[Spot, ...]
    whole: Group
    plain: frozenset[int] = frozenset()
    keeps_source: bool = False

    @property
    def output_width(self) -> int:
        """Bytes per element of what the last layer gives."""
        return self.memories[self.order[-1]].output_width


def lay(
    memories: Sequence[BlockMemory],
    order: Sequence[int],
    *,
    stores_inputs: bool,
    plain: frozenset[int] = frozenset(),
) -> Layering:
    """The layers with their spots: of each memory the first and the last layer, where its peaks are highest.

    `stores_inputs`: checkpoints keep each layer's input, be it saved or not, and recompute it; all but `plain` ones.

    In between, what is stored before shrinks and gradients grow linearly with the layers.
    """
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for position, number in enumerate(order):
        first.setdefault(number, position)
        last[number] = position

    def group(numbers: Iterable[int]) -> Group:
        return _group(memories, Counter(numbers), stores_inputs=stores_inputs, plain=plain)

    spots = tuple(
        Spot(order[p], group([order[p]]), group(order[:p]), group(order[: p + 1]), group(order[p + 1 :]))
        for p in sorted({*first.values(), *last.values()})
    )
    return Layering(tuple(memories), tuple(order), spots, group(order), plain)


def _group(
    memories: Sequence[BlockMemory], counts: Counter[int], *, stores_inputs: bool, plain: frozenset[int]
) -> Group:
    layers = [(memories[number], count) for number, count in counts.items()]
    stored = [(memories[k], n) for k, n in counts.items() if k in plain or not stores_inputs]
    inputs = [(memories[k], n) for k, n in counts.items() if stores_inputs and k not in plain]
    inputs += [(m, n) for m, n in stored if m.saves_input]
    saved = tuple(sum_of(scale(m.saved[i], n) for m, n in stored) for i in range(len(CATEGORIES)))
    return Group(
        num_layers=counts.total(),
        num_plain=sum(counts[k] for k in plain),
        inputs=sum_of(scale(m.input, n) for m, n in inputs),
        handed_on=sum_of(scale(m.handed_on, n) for m, n in layers),
        saved=(saved[0], saved[1], saved[2], saved[3]),
        kept=sum_of(scale(size, n) for m, n in layers for size in m.kept),
        cached=sum_of(scale(m.cached, n) for m, n in layers),
        weight_gradients=sum_of(scale(m.weight_gradients, n) for m, n in layers),
    )


def by_category(snapshot: Snapshot, shape: Shape) -> Terms:
    """A snapshot's bytes for a batch shape."""
    return {name: shape.at(size) for name, size in zip(CATEGORIES, snapshot, strict=True)}
