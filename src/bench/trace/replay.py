"""What a sequence of requests makes PyTorch's CUDA caching allocator reserve. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.trace.allocator import CachingAllocator, OutOfMemoryError
from bench.trace.allocator_rules import ROUND_LARGE_BYTES, AllocatorRules


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """Peaks of one replayed run in bytes; `num_retries` counts how often the cache had to be emptied.

    `failed_key` is the request for which even that didn't make room, None where the whole run was served.
    """

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    num_retries: int
    failed_key: int | None = None

    @property
    def fragmentation_bytes(self) -> int:
        """Reserved at its highest, less allocated at its highest."""
        return self.peak_reserved_bytes - self.peak_allocated_bytes


def replay(
    requests: Iterable[tuple[int, int]],
    *,
    capacity_bytes: int | None = None,
    rules: AllocatorRules | None = None,
) -> Replay:
    """Play `requests`: (key, bytes) allocates, (key, -1) frees; ends early where `capacity_bytes` isn't enough."""
    allocator = CachingAllocator(rules, capacity_bytes=capacity_bytes)
    failed_key = None
    for key, num_bytes in requests:
        if num_bytes < 0:
            allocator.free(key)
            continue
        try:
            allocator.allocate(key, num_bytes)
        except OutOfMemoryError:
            failed_key = key
            break
    return Replay(
        peak_allocated_bytes=allocator.peak_allocated_bytes,
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        num_retries=allocator.num_retries,
        failed_key=failed_key,
    )


def reserved_levels(requests: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(key, bytes reserved) of each request that makes a run's reserved memory grow."""
    allocator = CachingAllocator()
    levels = []
    for key, num_bytes in requests:
        before = allocator.reserved_bytes
        if num_bytes < 0:
            allocator.free(key)
        else:
            allocator.allocate(key, num_bytes)
        if allocator.reserved_bytes > before:
            levels.append((key, allocator.reserved_bytes))
    return levels


def least_capacity_bytes(requests: Sequence[tuple[int, int]]) -> int:
    """The smallest card, to a segment's rounding, on which all `requests` are served.

    Holes in segments that are in use are lost there; everything else that was cached is given back in time.
    """
    unlimited = replay(requests)
    low, high = unlimited.peak_allocated_bytes - 1, unlimited.peak_reserved_bytes
    while high - low > ROUND_LARGE_BYTES:
        middle = (low + high) // 2
        if replay(requests, capacity_bytes=middle).failed_key is None:
            high = middle
        else:
            low = middle
    return high
