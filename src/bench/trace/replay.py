"""PyTorch's CUDA caching allocator, played by its rules: what a sequence of requests makes it reserve. No torch.

Source: c10/cuda/CUDACachingAllocator.cpp (one stream, default settings, no garbage collection threshold).
Assumed: the driver hands out segments at rising addresses.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from planner.units import MIB

MIN_BLOCK_BYTES = 512
"""Every request is rounded up to a multiple of it (kMinBlockSize)."""
SMALL_BYTES = MIB
"""Requests up to this size come from the small pool (kSmallSize); a large block is split only for more."""
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
"""Segments of the small pool (kSmallBuffer), and of large requests below OWN_SEGMENT_BYTES (kLargeBuffer)."""
OWN_SEGMENT_BYTES = 10 * MIB
"""Requests from this size on get a segment of their own (kMinLargeAlloc), in multiples of ROUND_LARGE_BYTES."""
ROUND_LARGE_BYTES = 2 * MIB


class OutOfMemoryError(Exception):
    """The driver has no `segment_bytes` more, and the cache held nothing that could be given back."""

    def __init__(self, segment_bytes: int) -> None:
        self.segment_bytes = segment_bytes
        super().__init__(f"no segment of {segment_bytes} bytes left")


def round_request(num_bytes: int) -> int:
    """What the allocator hands out for a request: 0 for none."""
    return -(-num_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES


def segment_bytes(num_bytes: int) -> int:
    """What the allocator asks of the driver when no cached block holds a (rounded) request.

    >>> segment_bytes(512), segment_bytes(2**20 + 512), segment_bytes(10 * 2**20 + 1)
    (2097152, 20971520, 12582912)
    """
    if num_bytes <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if num_bytes < OWN_SEGMENT_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-num_bytes // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES


@dataclass(slots=True, eq=False)
class Block:
    """A stretch of a segment; `before` and `after` are its neighbours in the same segment."""

    address: int
    num_bytes: int
    is_small: bool
    is_free: bool = True
    before: Block | None = None
    after: Block | None = None


@dataclass(slots=True)
class _Pool:
    """Free blocks by (size, address), smallest first."""

    free: list[tuple[int, int]] = field(default_factory=list)
    blocks: dict[int, Block] = field(default_factory=dict)

    def add(self, block: Block) -> None:
        insort(self.free, (block.num_bytes, block.address))
        self.blocks[block.address] = block

    def remove(self, block: Block) -> None:
        del self.free[bisect_left(self.free, (block.num_bytes, block.address))]
        del self.blocks[block.address]

    def best_fit(self, num_bytes: int) -> Block | None:
        """The smallest block that is large enough, then the one with the lowest address."""
        position = bisect_left(self.free, (num_bytes, -1))
        if position == len(self.free):
            return None
        return self.blocks[self.free[position][1]]


class CachingAllocator:
    """Allocates and frees by key. `capacity_bytes` is what the driver can give (None: without end).

    `expandable` is `expandable_segments:True`: each pool is one segment that grows by pages; capacity is not
    supported with it.
    """

    def __init__(self, *, capacity_bytes: int | None = None, expandable: bool = False) -> None:
        assert capacity_bytes is None or not expandable, "capacity is modelled for ordinary segments only"
        self.capacity_bytes, self.expandable = capacity_bytes, expandable
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.num_retries = 0
        self._pools = {True: _Pool(), False: _Pool()}
        self._tails: dict[bool, Block] = {}
        self._used: dict[int, Block] = {}
        self._next_address = {True: 0, False: 1 << 60}

    def allocate(self, key: int, num_bytes: int) -> None:
        """Serve a request; raises OutOfMemoryError where the driver can't give what is missing."""
        size = round_request(num_bytes)
        if size == 0:
            return
        is_small = size <= SMALL_BYTES
        pool = self._pools[is_small]
        block = pool.best_fit(size) or self._grow(size, is_small)
        pool.remove(block)
        self._split(block, size)
        block.is_free = False
        self._used[key] = block
        self.allocated_bytes += block.num_bytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)

    def free(self, key: int) -> None:
        """Give a request's block back to its pool, merged with free neighbours."""
        block = self._used.pop(key, None)
        if block is None:
            return
        self.allocated_bytes -= block.num_bytes
        block.is_free = True
        pool = self._pools[block.is_small]
        for other in (block.before, block.after):
            if other is not None and other.is_free:
                pool.remove(other)
                block = self._merge(*sorted((block, other), key=lambda b: b.address))
        pool.add(block)

    def empty_cache(self) -> None:
        """Give whole free segments back to the driver."""
        for pool in self._pools.values():
            for block in list(pool.blocks.values()):
                if block.before is None and block.after is None:
                    pool.remove(block)
                    self.reserved_bytes -= block.num_bytes

    def _merge(self, first: Block, second: Block) -> Block:
        first.num_bytes += second.num_bytes
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        if self._tails.get(first.is_small) is second:
            self._tails[first.is_small] = first
        return first

    def _split(self, block: Block, size: int) -> None:
        remaining = block.num_bytes - size
        fine_grained = block.is_small or self.expandable
        if remaining < MIN_BLOCK_BYTES or (not fine_grained and remaining <= SMALL_BYTES):
            return
        rest = Block(block.address + size, remaining, block.is_small, before=block, after=block.after)
        if block.after is not None:
            block.after.before = rest
        block.after, block.num_bytes = rest, size
        if self._tails.get(block.is_small) is block:
            self._tails[block.is_small] = rest
        self._pools[block.is_small].add(rest)

    def _grow(self, size: int, is_small: bool) -> Block:
        """A free block of at least `size` bytes from the driver, in its pool."""
        if self.expandable:
            return self._extend(size, is_small)
        wanted = segment_bytes(size)
        if not self._has_room(wanted):
            self.num_retries += 1
            self.empty_cache()
            if not self._has_room(wanted):
                raise OutOfMemoryError(wanted)
        return self._map(wanted, is_small)

    def _has_room(self, num_bytes: int) -> bool:
        return self.capacity_bytes is None or self.reserved_bytes + num_bytes <= self.capacity_bytes

    def _map(self, num_bytes: int, is_small: bool) -> Block:
        block = Block(self._next_address[is_small], num_bytes, is_small)
        self._next_address[is_small] += num_bytes
        self._pools[is_small].add(block)
        self.reserved_bytes += num_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return block

    def _extend(self, size: int, is_small: bool) -> Block:
        """Map as many pages behind the pool's segment as its free end lacks."""
        page = SMALL_SEGMENT_BYTES if is_small else LARGE_SEGMENT_BYTES
        tail = self._tails.get(is_small)
        missing = size - (tail.num_bytes if tail is not None and tail.is_free else 0)
        block = self._map(-(-missing // page) * page, is_small)
        if tail is not None:
            tail.after, block.before = block, tail
        self._tails[is_small] = block
        if tail is None or not tail.is_free:
            return block
        pool = self._pools[is_small]
        pool.remove(tail)
        pool.remove(block)
        merged = self._merge(tail, block)
        pool.add(merged)
        return merged


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """Peaks of one replayed run in bytes; `num_retries` counts how often the cache had to be emptied."""

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    num_retries: int


def replay(
    requests: Iterable[tuple[int, int]], *, capacity_bytes: int | None = None, expandable: bool = False
) -> Replay:
    """Play `requests`: (key, bytes) allocates, (key, -1) frees.

    Raises OutOfMemoryError where `capacity_bytes` isn't enough.
    """
    allocator = CachingAllocator(capacity_bytes=capacity_bytes, expandable=expandable)
    for key, num_bytes in requests:
        if num_bytes < 0:
            allocator.free(key)
        else:
            allocator.allocate(key, num_bytes)
    return Replay(
        peak_allocated_bytes=allocator.peak_allocated_bytes,
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        num_retries=allocator.num_retries,
    )
