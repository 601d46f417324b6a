"""Blocks of the CUDA caching allocator, and the lists in which free ones wait. No torch."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Block:
    """A stretch of a segment; `before` and `after` are its neighbours in the same segment.

    `base` is the address at which an expandable segment begins, None in an ordinary one. `idle_since` counts the
    requests of its pool up to the moment when it was freed.
    """

    address: int
    num_bytes: int
    pool: Pool
    base: int | None = None
    is_free: bool = True
    is_mapped: bool = True
    before: Block | None = None
    after: Block | None = None
    idle_since: int = 0

    @property
    def is_whole_segment(self) -> bool:
        """Whether it is an ordinary segment that nothing else uses."""
        return self.base is None and self.before is None and self.after is None


@dataclass(slots=True, eq=False)
class Pool:
    """The free blocks of one stream and size class, smallest first, then lowest; and the unmapped stretches."""

    stream: int
    is_small: bool
    free: list[tuple[int, int]] = field(default_factory=list)
    blocks: dict[int, Block] = field(default_factory=dict)
    unmapped: list[Block] = field(default_factory=list)
    num_searches: int = 0

    def add(self, block: Block) -> None:
        """List a free block."""
        insort(self.free, (block.num_bytes, block.address))
        self.blocks[block.address] = block
        block.idle_since = self.num_searches

    def remove(self, block: Block) -> None:
        """Take a block off the list."""
        del self.free[bisect_left(self.free, (block.num_bytes, block.address))]
        del self.blocks[block.address]

    def at(self, position: int) -> Block:
        """The free block at a position of the order."""
        return self.blocks[self.free[position][1]]


def address_of(block: Block) -> int:
    """The key by which unmapped stretches are sorted."""
    return block.address


def reach_of(block: Block) -> int:
    """How large a block could become if its segment grew."""
    after = block.after
    return block.num_bytes + (after.num_bytes if after is not None and not after.is_mapped else 0)


def free_bytes_from(first: Block, enough: int) -> int:
    """Bytes of the free and unmapped blocks in a row from `first` on, counted until they are enough."""
    total = 0
    block: Block | None = first
    while total < enough and block is not None and block.is_free:
        total += block.num_bytes
        block = block.after
    return total
