"""The recording of a deep model, put together from those of two shallow ones. No torch.

A step visits the layers one after the other: up in the forward, down in the backward, up or down whenever an
optimizer walks through its parameters. The deeper shallow recording has one period of layers more than the other.
Wherever its step stays in that period, the deep model's step stays there as often as its depth asks for: the events
are repeated, each copy with storages of its own, and what a copy frees of its neighbours is the next copy's.

Proof at run time: with the period left out, the deeper recording must become the shallower one, event by event.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from bench.trace.depth import Depths
from bench.trace.recording import Mark, Recording, Storage

Owner = int | None
Visit = tuple[Owner, list[int]]
"""A layer, and the positions of the events while the step is there."""
Slot = tuple[int, int]
"""A storage's number in the deeper recording, and which copy of the period it belongs to (0 outside)."""


NUM_NEIGHBOURS = 3
"""A step that is in one layer may drop at once what this one and those on both sides of it made."""


class NotPeriodicError(Exception):
    """The recordings aren't made of a repeated period: only a trace of all layers will do."""


def stitch(recordings: Sequence[Recording], depths: Depths) -> Recording:
    """The recording of all layers, from those of the two `depths.shallow`.

    Raises NotPeriodicError where the deeper one isn't the shallower one with a period put in.
    """
    assert depths.shallow is not None
    low, high = recordings
    source = _Source(high, period=depths.shallow[1] - depths.shallow[0])
    low_bytes = _prove(_weave(source, 0), high, low)
    num_copies = round(depths.factor)
    return _build(_weave(source, num_copies), source, num_copies, depths, low_bytes)


def sort_frees(events: Sequence[int], phase_starts: Iterable[int]) -> list[int]:
    """The events with frees that follow each other, within a phase, in the order of their allocation.

    The order changes nothing (free neighbours merge whichever goes first), and some of it is arbitrary: autocast
    drops its cast weights in the order of their addresses.
    """
    ordered: list[int] = []
    run: list[int] = []
    starts = set(phase_starts)
    for at, event in enumerate(events):
        if run and (event >= 0 or at in starts):
            ordered += sorted(run, reverse=True)
            run = []
        (ordered if event >= 0 else run).append(event)
    return ordered + sorted(run, reverse=True)


class _Source:
    """The deeper shallow recording: where its step is at each event, and who owns each storage.

    The repeated period is the last but one: the last layer isn't like the others, nor is the first.
    """

    def __init__(self, recording: Recording, *, period: int) -> None:
        self.recording, self.period = recording, period
        self.begin = recording.num_layers - 1 - period
        self.end = self.begin + period
        self.events = sort_frees(recording.events, (mark.at for mark in recording.marks))
        self.owners: list[Owner] = [storage.owner for storage in recording.storages]
        bounds = [*(mark.at for mark in recording.marks), len(self.events)]
        self.phases = [list(self._visits(*span)) for span in pairwise(bounds)]
        self._kinds, self._by_kind = self._number_kinds()

    def _visits(self, start: int, stop: int) -> Iterator[Visit]:
        """A phase's visits in their order. What nobody owns is owned by the layer where it was made."""
        here: Owner = None
        positions: list[int] = []
        swept = self._swept(start, stop)
        for at in range(start, stop):
            event = self.events[at]
            was = here
            if event >= 0 or at in swept:
                owner = self.owners[event if event >= 0 else ~event]
                here = here if owner is None else owner
            if event >= 0:
                self.owners[event] = here
            if here != was and positions:
                yield was, positions
                positions = []
            positions.append(at)
        yield here, positions

    def _swept(self, start: int, stop: int) -> set[int]:
        """Frees that follow each other through the layers: a list of tensors, one per parameter, is dropped."""
        swept: set[int] = set()
        run: list[int] = []
        for at in range(start, stop + 1):
            if at < stop and self.events[at] < 0:
                run.append(at)
                continue
            owners = {self.owners[~self.events[free]] for free in run} - {None}
            if len(owners) > max(self.period + 1, NUM_NEIGHBOURS):
                swept.update(run)
            run = []
        return swept

    def _number_kinds(self) -> tuple[list[object], dict[tuple[Owner, object], int]]:
        """What each storage is (the n-th of its phase, operator, module and shape in its layer), and the reverse."""
        counts: Counter[tuple[Owner, object]] = Counter()
        kinds: list[object] = []
        found: dict[tuple[Owner, object], int] = {}
        for storage, owner in zip(self.recording.storages, self.owners, strict=True):
            module = re.sub(r"\d+", "*", storage.module)
            sort = (storage.step, storage.phase, storage.op, module, storage.shape, storage.dtype)
            counts[owner, sort] += 1
            kind = (sort, counts[owner, sort])
            kinds.append(kind)
            found[owner, kind] = storage.number
        return kinds, found

    def sibling(self, number: int, layers: int) -> int:
        """The same storage of the layer that is so many `layers` further on."""
        owner = self.owners[number]
        assert owner is not None
        found = self._by_kind.get((owner + layers, self._kinds[number]))
        if found is None:
            storage = self.recording.storages[number]
            raise NotPeriodicError(f"layer {owner + layers} has no {storage.op} of {storage.module}")
        return found

    def is_repeated(self, owner: Owner) -> bool:
        """Whether a layer is in the repeated period."""
        return owner is not None and self.begin <= owner < self.end


@dataclass(slots=True)
class _Woven:
    """Slots in the order in which they are allocated, events by their position, and where each phase begins."""

    slots: list[Slot]
    events: list[int]
    phase_starts: list[int]
    numbers: dict[Slot, int]

    def add(self, slot: Slot, is_allocation: bool) -> None:
        if is_allocation:
            self.numbers[slot] = len(self.slots)
            self.events.append(len(self.slots))
            self.slots.append(slot)
        elif slot in self.numbers:
            self.events.append(~self.numbers[slot])
        else:
            raise NotPeriodicError(f"storage {slot} is freed before it is made")


def _weave(source: _Source, num_copies: int) -> _Woven:
    """The recording with its period `num_copies` times; 0 leaves it out."""
    woven = _Woven([], [], [], {})
    for visits in source.phases:
        woven.phase_starts.append(len(woven.events))
        for stay in _stays(source, visits):
            if source.is_repeated(stay[0][0]):
                _repeat(source, stay, num_copies, woven, _goes_up(source, stay, visits))
            else:
                _copy_once(source, stay[0], num_copies, woven)
    return woven


def _stays(source: _Source, visits: list[Visit]) -> Iterator[list[Visit]]:
    """Visits one by one, those that follow each other inside the repeated period together."""
    stay: list[Visit] = []
    for visit in visits:
        if source.is_repeated(visit[0]):
            stay.append(visit)
            continue
        if stay:
            yield stay
        stay = []
        yield [visit]
    if stay:
        yield stay


def _goes_up(source: _Source, stay: list[Visit], visits: list[Visit]) -> bool:
    """Whether the step comes from the layers below. Raises NotPeriodicError where it visits a part of the period."""
    layers = [layer for layer, _ in stay]
    up = list(range(source.begin, source.end))
    if layers not in (up, up[::-1]):
        raise NotPeriodicError(f"a stay in layers {layers}")
    if len(layers) > 1:
        return layers == up
    position = visits.index(stay[0])
    before = visits[position - 1][0] if position else None
    return before is None or before < source.begin


def _copy_once(source: _Source, visit: Visit, num_copies: int, woven: _Woven) -> None:
    """Events outside the repeated period: what they say of it concerns the copy on their side."""
    here, positions = visit
    for at in positions:
        event = source.events[at]
        number = event if event >= 0 else ~event
        slot = (number, 0)
        if source.is_repeated(source.owners[number]):
            is_above = here is not None and here >= source.end
            slot = _nearest_copy(source, number, num_copies, is_above)
        woven.add(slot, event >= 0)


def _nearest_copy(source: _Source, number: int, num_copies: int, is_above: bool) -> Slot:
    if num_copies:
        return number, num_copies - 1 if is_above else 0
    return source.sibling(number, -source.period if is_above else source.period), 0


def _repeat(source: _Source, stay: list[Visit], num_copies: int, woven: _Woven, goes_up: bool) -> None:
    """The events of a stay once for each copy, in the direction of the step."""
    rules = [_rule(source, at) for _, positions in stay for at in positions]
    for copy in range(num_copies) if goes_up else reversed(range(num_copies)):
        for is_allocation, number, offset, at_edge in rules:
            target = copy + offset
            slot = (number, target) if 0 <= target < num_copies else (at_edge, 0)
            woven.add(slot, is_allocation)


def _rule(source: _Source, at: int) -> tuple[bool, int, int, int]:
    """Of an event inside the period: is it an allocation, of which storage, how many copies off, and which
    storage it is where there is no such copy.
    """
    event = source.events[at]
    number = event if event >= 0 else ~event
    owner = source.owners[number]
    if source.is_repeated(owner):
        return event >= 0, number, 0, number
    for offset in (-1, 1):
        if owner is not None and source.is_repeated(owner - offset * source.period):
            return event >= 0, source.sibling(number, -offset * source.period), offset, number
    raise NotPeriodicError(f"a middle layer frees what layer {owner} made")


def _prove(woven: _Woven, high: Recording, low: Recording) -> dict[int, int]:
    """Without the period the deeper recording must be the shallower one.

    Returns the bytes that storages have there whose size depends on the number of layers, by number.
    """
    expected_events = sort_frees(low.events, (mark.at for mark in low.marks))
    if sort_frees(woven.events, woven.phase_starts) != expected_events:
        raise NotPeriodicError("the deeper recording isn't the shallower one with a period put in")
    low_bytes = {}
    for (number, _), expected in zip(woven.slots, low.storages, strict=True):
        found = high.storages[number]
        if (found.op, found.dtype, len(found.shape)) != (expected.op, expected.dtype, len(expected.shape)):
            raise NotPeriodicError(f"{found.op} of {found.module} beside {expected.op} of {expected.module}")
        if found.num_bytes != expected.num_bytes:
            if found.owner is not None:
                raise NotPeriodicError(f"{found.op} of {found.module} changes with the number of layers")
            low_bytes[number] = expected.num_bytes
    return low_bytes


def _build(
    woven: _Woven, source: _Source, num_copies: int, depths: Depths, low_bytes: dict[int, int]
) -> Recording:
    """The woven events as a recording, each storage with its category and the name of its own layer's module."""
    high = source.recording
    categories = [high.category(storage) for storage in high.storages]
    storages: list[Storage] = []
    for number, copy in woven.slots:
        old = high.storages[number]
        owner = source.owners[number]
        is_above = owner is not None and owner >= source.end
        shift = source.period * (num_copies - 1 if is_above else copy)
        num_bytes = old.num_bytes
        if number in low_bytes:
            num_bytes = round(low_bytes[number] + (num_bytes - low_bytes[number]) * depths.factor)
        storages.append(
            Storage(
                number=len(storages),
                num_bytes=num_bytes,
                shape=old.shape,
                dtype=old.dtype,
                op=old.op,
                module=_renumber(old.module, owner, shift) if shift else old.module,
                layer=old.layer if old.layer is None else old.layer + shift,
                phase=old.phase,
                step=old.step,
                allocated_at=0,
                category=categories[number],
                owner=owner if owner is None else owner + shift,
            )
        )
    _date(storages, woven.events)
    starts = zip(woven.phase_starts, high.marks, strict=True)
    return Recording(
        storages=storages,
        events=woven.events,
        marks=[Mark(at, mark.step, mark.phase) for at, mark in starts],
        recompute_ends=(),
        vocab_size=high.vocab_size,
        num_layers=depths.num_layers,
        num_ops=high.num_ops,
        rounding_bytes=high.rounding_bytes,
    )


def _date(storages: list[Storage], events: list[int]) -> None:
    for at, event in enumerate(events):
        if event >= 0:
            storages[event].allocated_at = at
        else:
            storages[~event].freed_at = at


def _renumber(module: str, layer: Owner, shift: int) -> str:
    """The module's name with its layer's number raised.

    >>> _renumber("model.layers.2.mlp.experts.2", 2, 7)
    'model.layers.9.mlp.experts.2'
    """
    if layer is None:
        return module
    return re.sub(rf"(?<=\.){layer}(?=\.|$)", str(layer + shift), module, count=1)
