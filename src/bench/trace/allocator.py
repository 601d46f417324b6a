"""PyTorch's CUDA caching allocator, played by its rules. No torch.

Source: c10/cuda/CUDACachingAllocator.cpp (torch 2.13); names of its functions stand in brackets. Left out: pools of
CUDA graphs, and blocks that wait for an event of another stream. Assumed: the driver hands out segments at rising
addresses.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator

from bench.trace.allocator_pool import Block, Pool, address_of, free_bytes_from, reach_of
from bench.trace.allocator_rules import MIN_BLOCK_BYTES, SMALL_BYTES, SMALL_SEGMENT_BYTES, AllocatorRules

EXPANDABLE_SPACE_BYTES = 1 << 50
"""Addresses kept for one expandable segment; torch keeps 9/8 of the card's memory, which it can't fill either."""


class OutOfMemoryError(Exception):
    """The driver has no `segment_bytes` more, and the cache held nothing that could be given back."""

    def __init__(self, segment_bytes: int) -> None:
        self.segment_bytes = segment_bytes
        super().__init__(f"no segment of {segment_bytes} bytes left")


class CachingAllocator:
    """Allocates and frees by key. `capacity_bytes` is what the driver can give (None: without end).

    `find_address` says where the driver puts a new segment of so many bytes.
    """

    def __init__(
        self,
        rules: AllocatorRules | None = None,
        *,
        capacity_bytes: int | None = None,
        find_address: Callable[[int], int] | None = None,
    ) -> None:
        self.rules = rules or AllocatorRules()
        self.capacity_bytes = capacity_bytes
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.num_retries = 0
        self._find_address = find_address or self._rising_address
        self._pools: dict[tuple[int, bool], Pool] = {}
        self._used: dict[int, Block] = {}
        self._next_address = 0
        self._next_base = EXPANDABLE_SPACE_BYTES

    def allocate(self, key: int, num_bytes: int, stream: int = 0) -> None:
        """Serve a request; raises OutOfMemoryError where the driver can't give what is missing."""
        size = self.rules.round_request(num_bytes)
        if size == 0:
            return
        pool = self.pool(stream, size <= SMALL_BYTES)
        block = self._best_fit(pool, size) or self._grow(pool, size)
        self._split(block, size)
        self._take(key, block)

    def _take(self, key: int, block: Block) -> None:
        block.is_free = False
        self._used[key] = block
        self.allocated_bytes += block.num_bytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)

    def block_bytes(self, key: int) -> int:
        """The size of the block that serves a request."""
        return self._used[key].num_bytes

    def free(self, key: int) -> None:
        """Give a request's block back to its pool, merged with free neighbours."""
        block = self._used.pop(key, None)
        if block is None:
            return
        self.allocated_bytes -= block.num_bytes
        block.is_free = True
        self._return(block)

    def place(
        self,
        address: int,
        num_bytes: int,
        pool: Pool,
        *,
        used: Iterable[tuple[int, int, int]],
        base: int | None = None,
        can_grow: bool = False,
    ) -> None:
        """Put a segment there as it was found, with `used` blocks (key, address, bytes) in rising order.

        `can_grow` keeps addresses behind an expandable one.
        """
        rest = Block(address, num_bytes + (EXPANDABLE_SPACE_BYTES if can_grow else 0), pool, base)
        self._reserve(num_bytes)
        if can_grow:
            unmapped = self._cut(rest, num_bytes)
            unmapped.is_mapped = False
            insort(pool.unmapped, unmapped, key=address_of)
        for key, start, size in used:
            if start > rest.address:
                gap, rest = rest, self._cut(rest, start - rest.address)
                pool.add(gap)
            block, remaining = rest, rest.num_bytes - size
            if remaining:
                rest = self._cut(block, size)
            self._take(key, block)
            if not remaining:
                return
        pool.add(rest)

    def empty_cache(self) -> None:
        """Give whole free segments, and whole free pages of expandable ones, back to the driver."""
        for pool in self._pools.values():
            for block in list(pool.blocks.values()):
                if block.is_whole_segment:
                    self._release(block)
                elif block.base is not None:
                    self._unmap(block)

    def blocks(self) -> Iterator[Block]:
        """Every mapped block."""
        yield from self._used.values()
        for pool in self._pools.values():
            yield from pool.blocks.values()

    # --- cached blocks

    def pool(self, stream: int, is_small: bool) -> Pool:
        """The pool of a stream: blocks are never lent to another one."""
        if (stream, is_small) not in self._pools:
            self._pools[stream, is_small] = Pool(stream, is_small)
        return self._pools[stream, is_small]

    def _best_fit(self, pool: Pool, size: int) -> Block | None:
        """The smallest block that is large enough, then the lowest [get_free_block]; taken out of the pool."""
        pool.num_searches += 1
        position = bisect_left(pool.free, (size, -1))
        if position == len(pool.free):
            return None
        if self.rules.expandable:
            position = self._least_reach(pool, position)
        block = pool.at(position)
        if self.rules.is_oversized(block.num_bytes) and not self._may_use_oversized(block, size):
            return None
        del pool.free[position]
        del pool.blocks[block.address]
        return block

    def _least_reach(self, pool: Pool, position: int) -> int:
        """A block that can grow counts as large as it can become: better one that can't."""
        while position + 1 < len(pool.free) and pool.at(position).base is not None:
            if reach_of(pool.at(position + 1)) >= reach_of(pool.at(position)):
                break
            position += 1
        return position

    def _may_use_oversized(self, block: Block, size: int) -> bool:
        is_close = block.num_bytes < size + self.rules.max_non_split_rounding_bytes
        return self.rules.is_oversized(size) and is_close

    def _split(self, block: Block, size: int) -> None:
        """Put what a block has too much into its pool, where that is worth it [should_split]."""
        remaining = block.num_bytes - size
        if block.pool.is_small or self.rules.expandable:
            is_worth_it = remaining >= MIN_BLOCK_BYTES
        else:
            is_worth_it = remaining > SMALL_BYTES and not self.rules.is_oversized(size)
        if is_worth_it:
            block.pool.add(self._cut(block, size))

    def _cut(self, block: Block, size: int) -> Block:
        """Shorten a block to `size`; returns the rest behind it."""
        rest = Block(block.address + size, block.num_bytes - size, block.pool, block.base, block.is_free)
        rest.is_mapped = block.is_mapped
        rest.before, rest.after = block, block.after
        if block.after is not None:
            block.after.before = rest
        block.after, block.num_bytes = rest, size
        return rest

    def _return(self, block: Block) -> None:
        """Merge a free block with free neighbours of the same kind and list it [free_block, try_merge_blocks]."""
        pool = block.pool
        before, after = block.before, block.after
        if before is not None and before.is_free and before.is_mapped == block.is_mapped:
            self._unlist(before)
            block = self._merge(before, block)
        if after is not None and after.is_free and after.is_mapped == block.is_mapped:
            self._unlist(after)
            block = self._merge(block, after)
        if block.is_mapped:
            pool.add(block)
        else:
            insort(pool.unmapped, block, key=address_of)

    def _unlist(self, block: Block) -> None:
        if block.is_mapped:
            block.pool.remove(block)
        else:
            block.pool.unmapped.remove(block)

    def _merge(self, first: Block, second: Block) -> Block:
        first.num_bytes += second.num_bytes
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        return first

    # --- the driver

    def _grow(self, pool: Pool, size: int) -> Block:
        """A block of at least `size` bytes from the driver, in no pool's list."""
        if self.rules.gc_threshold and self.capacity_bytes is not None:
            self._collect_garbage(self.capacity_bytes)
        block = self._from_driver(pool, size)
        if block is None and self._release_oversized(pool, size):
            block = self._from_driver(pool, size)
        if block is None:
            self.empty_cache()
            self.num_retries += 1
            block = self._from_driver(pool, size)
        if block is None:
            raise OutOfMemoryError(self.rules.segment_bytes(size))
        return block

    def _from_driver(self, pool: Pool, size: int) -> Block | None:
        """A new segment, or a stretch of an expandable one; None where the driver has no more [alloc_block]."""
        if self.rules.expandable:
            return self._expand(pool, size)
        wanted = self.rules.segment_bytes(size)
        if not self._has_room(wanted):
            return None
        self._reserve(wanted)
        return Block(self._find_address(wanted), wanted, pool)

    def _rising_address(self, num_bytes: int) -> int:
        self._next_address += num_bytes
        return self._next_address - num_bytes

    def _has_room(self, num_bytes: int) -> bool:
        return self.capacity_bytes is None or self.reserved_bytes + num_bytes <= self.capacity_bytes

    def _reserve(self, num_bytes: int) -> None:
        self.reserved_bytes += num_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _release(self, block: Block) -> None:
        block.pool.remove(block)
        self.reserved_bytes -= block.num_bytes

    def _release_oversized(self, pool: Pool, size: int) -> bool:
        """Free one cached block that is large enough and never split, else the largest ones until they are
        enough together [release_available_cached_blocks]. Whether that gave what was missing.
        """
        if self.rules.max_split_bytes is None:
            return False
        wanted = max(size, self.rules.max_split_bytes)
        position = bisect_left(pool.free, (wanted, -1))
        if position < len(pool.free):
            block = pool.at(position)
            if block.base is None:
                self._release(block)
            return block.base is None
        released = 0
        while pool.free and released < wanted:
            block = pool.at(-1)
            if not self.rules.is_oversized(block.num_bytes) or not block.is_whole_segment:
                break
            released += block.num_bytes
            self._release(block)
        return released >= wanted

    def _collect_garbage(self, capacity_bytes: int) -> None:
        """Free the large segments that were idle longest until the threshold is met [garbage_collect_cached_blocks]."""
        target = self.reserved_bytes - self.rules.gc_threshold * capacity_bytes
        before = self.reserved_bytes
        while target > 0 and before - self.reserved_bytes < target:
            large = [p for p in self._pools.values() if not p.is_small]
            idle = [b for p in large for b in p.blocks.values() if b.is_whole_segment]
            ages = [block.pool.num_searches - block.idle_since for block in idle]
            if not idle:
                return
            for block, age in zip(idle, ages, strict=True):
                if age >= sum(ages) / len(ages):
                    self._release(block)

    # --- expandable segments

    def _page_bytes(self, pool: Pool) -> int:
        return SMALL_SEGMENT_BYTES if pool.is_small else self.rules.large_segment_bytes

    def _expand(self, pool: Pool, size: int) -> Block | None:
        """Map pages until a free stretch holds `size` [try_allocate_expandable_block]."""
        block = self._expandable_stretch(pool, size)
        if not block.is_mapped:
            mapped = self._map(block, min(block.num_bytes, size))
        else:
            pool.remove(block)
            mapped = block
        while mapped is not None and mapped.num_bytes < size:
            following = mapped.after
            assert following is not None and not following.is_mapped
            more = self._map(following, min(following.num_bytes, size - mapped.num_bytes))
            if more is None:
                pool.add(mapped)
                return None
            mapped = self._merge(mapped, more)
        return mapped

    def _expandable_stretch(self, pool: Pool, size: int) -> Block:
        """The lowest stretch of free and unmapped blocks that holds `size` [find_expandable_block]."""
        for unmapped in pool.unmapped:
            first = unmapped
            if first.before is not None and first.before.is_free:
                first = first.before
            if free_bytes_from(first, size) >= size:
                return first
        self._next_base += EXPANDABLE_SPACE_BYTES
        block = Block(self._next_base, EXPANDABLE_SPACE_BYTES, pool, self._next_base, is_mapped=False)
        pool.unmapped.append(block)
        return block

    def _map(self, block: Block, size: int) -> Block | None:
        """Map the pages that hold the first `size` bytes of an unmapped block; returns it, in no list."""
        page = self._page_bytes(block.pool)
        wanted = -(-size // page) * page
        if not self._has_room(wanted):
            return None
        self._reserve(wanted)
        block.pool.unmapped.remove(block)
        if wanted < block.num_bytes:
            insort(block.pool.unmapped, self._cut(block, wanted), key=address_of)
        block.is_mapped = True
        after = block.after
        if after is not None and after.is_free and after.is_mapped:
            self._unlist(after)
            block = self._merge(block, after)
        return block

    def _unmap(self, block: Block) -> None:
        """Give the whole pages of a free block back; its ends stay [unmap_block]."""
        assert block.base is not None
        page = self._page_bytes(block.pool)
        start = block.base - (block.base - block.address) // page * page
        stop = block.base + (block.address + block.num_bytes - block.base) // page * page
        if stop <= start:
            return
        block.pool.remove(block)
        middle = block
        if start > block.address:
            middle = self._cut(block, start - block.address)
            block.pool.add(block)
        if middle.num_bytes > stop - start:
            middle.pool.add(self._cut(middle, stop - start))
        self.reserved_bytes -= middle.num_bytes
        middle.is_mapped = False
        self._return(middle)
