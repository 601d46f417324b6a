"""What a sequence of requests makes PyTorch's CUDA caching allocator reserve. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bench.trace.allocator import CachingAllocator
from bench.trace.allocator_rules import AllocatorRules


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """Peaks of one replayed run in bytes; `num_retries` counts how often the cache had to be emptied."""

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    num_retries: int


def replay(
    requests: Iterable[tuple[int, int]],
    *,
    capacity_bytes: int | None = None,
    rules: AllocatorRules | None = None,
) -> Replay:
    """Play `requests`: (key, bytes) allocates, (key, -1) frees.

    Raises OutOfMemoryError where `capacity_bytes` isn't enough.
    """
    allocator = CachingAllocator(rules, capacity_bytes=capacity_bytes)
    for key, num_bytes in requests:
        if num_bytes < 0:
            allocator.free(key)
        else:
            allocator.allocate(key, num_bytes)
    return result_of(allocator)


def result_of(allocator: CachingAllocator) -> Replay:
    """The peaks of what an allocator has served so far."""
    return Replay(
        peak_allocated_bytes=allocator.peak_allocated_bytes,
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        num_retries=allocator.num_retries,
    )
