"""What the caching allocator hands out beyond what is asked for: a remainder that isn't worth splitting off stays with
its block and counts as allocated (torch.cuda.memory_allocated). No torch.

A segment is a multiple of 2 MiB and a remainder of up to 1 MiB isn't split, so a large weight can hold 1 MiB too much.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from bench.trace.allocator import CachingAllocator
from bench.trace.recording import Mark, Recording


def block_excess(
    timeline: Recording, extra: Mapping[int, tuple[int, int]], step: int
) -> dict[str, Counter[str]]:
    """Bytes by category that blocks hold beyond their requests, where each phase asks for the most.

    Phases are those of optimizer step `step`, and `load`. `extra`: requests of libraries, as Recording.requests has them.
    """
    highest: dict[str, int] = {}
    found: dict[str, Counter[str]] = {}
    for phase, number, asked_bytes, excess in _moments(timeline, extra):
        if number == (0 if phase == "load" else step) and asked_bytes > highest.get(phase, -1):
            highest[phase] = asked_bytes
            found[phase] = excess.copy()
    return found


def _moments(
    timeline: Recording, extra: Mapping[int, tuple[int, int]]
) -> Iterator[tuple[str, int, int, Counter[str]]]:
    """After each event and at each phase's begin: phase, step, bytes that are asked for, what their blocks hold beyond
    them (one object).
    """
    allocator = CachingAllocator()
    excess: Counter[str] = Counter()
    asked_bytes = 0
    marks = iter([*timeline.marks, Mark(len(timeline.events), -1, "")])
    mark, following = Mark(0, -1, ""), next(marks)
    for at, event in enumerate(timeline.events):
        while following.at <= at:
            mark, following = following, next(marks)
            yield mark.phase, mark.step, asked_bytes, excess
        if at in extra:
            allocator.allocate(*extra[at])
        storage = timeline.storages[event if event >= 0 else ~event]
        size, category = timeline.size(storage), timeline.category(storage)
        if not size:
            continue
        if event >= 0:
            allocator.allocate(storage.number, storage.num_bytes)
        sign = 1 if event >= 0 else -1
        excess[category] += sign * (allocator.block_bytes(storage.number) - size)
        asked_bytes += sign * size
        if event < 0:
            allocator.free(storage.number)
        yield mark.phase, mark.step, asked_bytes, excess
