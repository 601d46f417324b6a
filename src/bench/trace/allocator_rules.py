"""Sizes and settings of PyTorch's CUDA caching allocator. No torch.

Source: c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h (torch 2.13); names of its functions and
constants stand in brackets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from planner.units import MIB

MIN_BLOCK_BYTES = 512
"""Every request is rounded up to a multiple of it [kMinBlockSize]."""
SMALL_BYTES = MIB
"""Requests up to this size come from the small pool [kSmallSize]; a large block is split only for more."""
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
"""Segments of the small pool [kSmallBuffer], and of large requests below OWN_SEGMENT_BYTES [kLargeBuffer]; the pages
of expandable segments have the same sizes."""
OWN_SEGMENT_BYTES = 10 * MIB
"""Requests from this size on get a segment of their own [kMinLargeAlloc], in multiples of ROUND_LARGE_BYTES."""
ROUND_LARGE_BYTES = 2 * MIB


@dataclass(frozen=True, kw_only=True, slots=True)
class AllocatorRules:
    """The settings of PYTORCH_ALLOC_CONF (formerly PYTORCH_CUDA_ALLOC_CONF), by default torch's own.

    `max_split_bytes`: larger blocks are never split, and serve only requests that are large themselves.
    `power2_divisions`: into how many parts a power of two is divided to round requests up, by the MiB (a power
    of two) from which on that holds. `gc_threshold`: the share of the capacity from which idle blocks are freed.
    """

    expandable: bool = False
    max_split_bytes: int | None = None
    max_non_split_rounding_bytes: int = LARGE_SEGMENT_BYTES
    large_segment_bytes: int = LARGE_SEGMENT_BYTES
    power2_divisions: Mapping[int, int] = field(default_factory=dict)
    gc_threshold: float = 0.0

    def round_request(self, num_bytes: int) -> int:
        """What the allocator hands out for a request [round_size]: 0 for none.

        >>> AllocatorRules().round_request(513), AllocatorRules(power2_divisions={1: 4}).round_request(1200 * 2**10)
        (1024, 1310720)
        """
        parts = self._divisions(num_bytes) if self.power2_divisions else 0
        if parts > 1 and num_bytes > MIN_BLOCK_BYTES * parts:
            unit = 1 << (num_bytes.bit_length() - 1) >> (parts.bit_length() - 1)
            return -(-num_bytes // unit) * unit
        return -(-num_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES

    def _divisions(self, num_bytes: int) -> int:
        """Those of the largest boundary that isn't above the request; below 1 MiB those of 1 MiB."""
        power_mib = max(1, (1 << max(0, num_bytes.bit_length() - 1)) // MIB)
        below = [mib for mib in self.power2_divisions if mib <= power_mib]
        return self.power2_divisions[max(below) if below else min(self.power2_divisions)]

    def segment_bytes(self, num_bytes: int) -> int:
        """What is asked of the driver when no cached block holds a rounded request [get_allocation_size].

        >>> [AllocatorRules().segment_bytes(n) // 2**20 for n in (512, 2**20 + 512, 10 * 2**20 + 512)]
        [2, 20, 12]
        """
        if num_bytes <= SMALL_BYTES:
            return SMALL_SEGMENT_BYTES
        if num_bytes < OWN_SEGMENT_BYTES:
            return self.large_segment_bytes
        return -(-num_bytes // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES

    def is_oversized(self, num_bytes: int) -> bool:
        """Whether a block of this size is never split."""
        return self.max_split_bytes is not None and num_bytes >= self.max_split_bytes
