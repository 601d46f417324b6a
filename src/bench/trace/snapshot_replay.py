"""A recorded snapshot replayed: recorded beside replayed memory. No torch.

What was there before the recording began is not said, but follows: the segments and blocks at the end, with the
recorded events undone from the last one to the first.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from bench.trace.allocator import CachingAllocator
from bench.trace.allocator_rules import SMALL_BYTES, SMALL_SEGMENT_BYTES, AllocatorRules
from bench.trace.snapshot import Event, Segment, Snapshot
from planner.render import Column, format_table, wrap
from planner.results import SCHEMA_VERSION
from planner.units import format_bytes

NEW_ADDRESS = 1 << 52
"""Above every address of a device: where segments go that only the replay needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One figure in bytes, as recorded and as replayed."""

    recorded_bytes: int
    replayed_bytes: int

    @property
    def error(self) -> float:
        """Replayed over recorded, minus one."""
        if self.recorded_bytes:
            return self.replayed_bytes / self.recorded_bytes - 1
        return float(self.replayed_bytes != 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One device's figures by name; `num_emptied` counts how often the recorded run gave segments back."""

    device: int
    num_requests: int
    num_emptied: int
    figures: dict[str, Compared]

    def to_json(self) -> dict[str, Any]:
        """Plain values; sizes in bytes."""
        figures = {name: {**asdict(figure), "error": figure.error} for name, figure in self.figures.items()}
        return {
            "device": self.device,
            "num_requests": self.num_requests,
            "num_emptied": self.num_emptied,
            "figures": figures,
        }


def compare_snapshot(devices: Sequence[Snapshot]) -> list[Comparison]:
    """Replay each device's requests from the state before them."""
    return [_compare(device) for device in devices]


def _compare(device: Snapshot) -> Comparison:
    allocator = CachingAllocator(device.rules, find_address=_Driver(device).address)
    before = segments_before(device)
    _place(allocator, before)
    recorded = _Recorded(device.rules, before)
    num_requests = num_emptied = 0
    previous = ""
    for event in device.events:
        action, address, size, stream = event
        recorded.add(event)
        if action == "alloc":
            num_requests += 1
            allocator.allocate(address, size, stream)
        elif action == "free_completed":
            allocator.free(address)
        elif action in _GIVES_BACK and previous not in _GIVES_BACK:
            # By a call or under pressure, all free segments go; when, only the recording knows.
            num_emptied += 1
            allocator.empty_cache()
        previous = action
    final = [size for segment in device.segments for _, size in segment.blocks]
    figures = {
        "peak reserved": (recorded.peak_reserved_bytes, allocator.peak_reserved_bytes),
        "peak allocated": (recorded.peak_allocated_bytes, allocator.peak_allocated_bytes),
        "reserved at the end": (sum(s.num_bytes for s in device.segments), allocator.reserved_bytes),
        "allocated at the end": (sum(final), allocator.allocated_bytes),
    }
    return Comparison(
        device=device.device,
        num_requests=num_requests,
        num_emptied=num_emptied,
        figures={n: Compared(recorded_bytes=a, replayed_bytes=b) for n, (a, b) in figures.items()},
    )


_GIVES_BACK = ("segment_free", "segment_unmap")


class _Recorded:
    """Reserved and allocated memory as the recording says; a block counts as its rounded request."""

    def __init__(self, rules: AllocatorRules, before: Iterable[Segment]) -> None:
        self._rules = rules
        self._live = {address: size for segment in before for address, size in segment.blocks}
        self.reserved_bytes = self.peak_reserved_bytes = sum(segment.num_bytes for segment in before)
        self.allocated_bytes = self.peak_allocated_bytes = sum(self._live.values())

    def add(self, event: Event) -> None:
        action, address, size, _ = event
        if action == "alloc":
            self._live[address] = self._rules.round_request(size)
            self.allocated_bytes += self._live[address]
        elif action == "free_completed":
            self.allocated_bytes -= self._live.pop(address, 0)
        else:
            self.reserved_bytes += -size if action in _GIVES_BACK else size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)


class _Driver:
    """Puts a new segment where the recorded run got the next one of its size."""

    def __init__(self, device: Snapshot) -> None:
        self._recorded: dict[int, deque[int]] = defaultdict(deque)
        self._next = NEW_ADDRESS
        for action, address, size, _ in device.events:
            if action == "segment_alloc":
                self._recorded[size].append(address)

    def address(self, num_bytes: int) -> int:
        if self._recorded[num_bytes]:
            return self._recorded[num_bytes].popleft()
        self._next += num_bytes
        return self._next - num_bytes


def _place(allocator: CachingAllocator, segments: Iterable[Segment]) -> None:
    """The state before; the highest stretch of an expandable segment can go on growing."""
    segments = list(segments)
    highest = {(s.stream, s.is_small): s.address for s in segments if s.is_expandable}
    for segment in segments:
        allocator.place(
            segment.address,
            segment.num_bytes,
            allocator.pool(segment.stream, segment.is_small),
            base=segment.address if segment.is_expandable else None,
            can_grow=segment.is_expandable and highest[segment.stream, segment.is_small] == segment.address,
            used=[(address, address, size) for address, size in segment.blocks],
        )


# --- the state before the recording


@dataclass(slots=True)
class _Stretch:
    num_bytes: int
    stream: int
    is_small: bool
    is_expandable: bool


@dataclass(slots=True)
class _State:
    """Reserved stretches and blocks in use by address, while events are undone."""

    stretches: dict[int, _Stretch] = field(default_factory=dict)
    used: dict[int, int] = field(default_factory=dict)


def segments_before(device: Snapshot) -> list[Segment]:
    """The segments before the first recorded event, by address."""
    state = _State()
    for s in device.segments:
        state.stretches[s.address] = _Stretch(s.num_bytes, s.stream, s.is_small, s.is_expandable)
        state.used.update(s.blocks)
    for action, address, size, stream in reversed(device.events):
        _UNDO[action](state, address, size, stream)
    addresses = sorted(state.used)
    return [_segment(start, state, addresses, device.rules) for start in sorted(state.stretches)]


def _undo_alloc(state: _State, address: int, size: int, stream: int) -> None:
    state.used.pop(address, None)


def _undo_free(state: _State, address: int, size: int, stream: int) -> None:
    state.used[address] = size


def _undo_segment_alloc(state: _State, address: int, size: int, stream: int) -> None:
    state.stretches.pop(address, None)


def _undo_segment_free(state: _State, address: int, size: int, stream: int) -> None:
    state.stretches[address] = _Stretch(size, stream, size == SMALL_SEGMENT_BYTES, False)


def _undo_map(state: _State, address: int, size: int, stream: int) -> None:
    """Cut the pages out of the stretch that holds them."""
    for start, old in list(state.stretches.items()):
        if start <= address < start + old.num_bytes:
            del state.stretches[start]
            for begin, end in ((start, address), (address + size, start + old.num_bytes)):
                if end > begin:
                    state.stretches[begin] = _Stretch(end - begin, old.stream, old.is_small, True)


def _undo_unmap(state: _State, address: int, size: int, stream: int) -> None:
    is_small = bool(size % (20 * SMALL_BYTES))
    state.stretches[address] = _Stretch(size, stream, is_small, True)


_UNDO: dict[str, Callable[[_State, int, int, int], None]] = {
    "alloc": _undo_alloc,
    "free_completed": _undo_free,
    "segment_alloc": _undo_segment_alloc,
    "segment_free": _undo_segment_free,
    "segment_map": _undo_map,
    "segment_unmap": _undo_unmap,
}


def _segment(start: int, state: _State, addresses: Sequence[int], rules: AllocatorRules) -> Segment:
    stretch = state.stretches[start]
    end = start + stretch.num_bytes
    inside = addresses[bisect_left(addresses, start) : bisect_left(addresses, end)]
    is_fine = stretch.is_small or stretch.is_expandable
    return Segment(
        address=start,
        num_bytes=stretch.num_bytes,
        stream=stretch.stream,
        is_small=stretch.is_small,
        is_expandable=stretch.is_expandable,
        blocks=tuple(
            (a, _block_bytes(state.used[a], stop - a, is_fine, rules)) for a, stop in pairwise([*inside, end])
        ),
    )


def _block_bytes(recorded: int, room: int, is_fine: bool, rules: AllocatorRules) -> int:
    """What a block takes of the room up to the next one: its rounded request, and a rest not worth splitting off."""
    size = min(room, rules.round_request(recorded))
    return size if is_fine or room - size > SMALL_BYTES else room


# --- text


def comparisons_json(found: Sequence[Comparison]) -> dict[str, Any]:
    """The object that `finefit trace --snapshot --json` prints."""
    return {"schema_version": SCHEMA_VERSION, "devices": [comparison.to_json() for comparison in found]}


def format_comparisons(found: Sequence[Comparison], width: int | None = None) -> str:
    """Recorded beside replayed for each device."""
    return "\n\n".join(_format(comparison, width) for comparison in found)


def _format(comparison: Comparison, width: int | None) -> str:
    figures = comparison.figures
    columns = [
        Column(title=f"device {comparison.device}", cells=tuple(figures)),
        Column(title="recorded", cells=_sizes(f.recorded_bytes for f in figures.values()), is_number=True),
        Column(title="replayed", cells=_sizes(f.replayed_bytes for f in figures.values()), is_number=True),
        Column(title="error", cells=tuple(f"{f.error:+.2%}" for f in figures.values()), is_number=True),
    ]
    note = f"{comparison.num_requests} requests"
    if comparison.num_emptied:
        note += f"; segments were given back {comparison.num_emptied} times, and the replay follows"
    return f"{format_table(columns, width)}\n{wrap(note, width)}"


def _sizes(values: Iterable[int]) -> tuple[str, ...]:
    return tuple(format_bytes(value) for value in values)
