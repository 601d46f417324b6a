"""The caching allocator's rules, by sequences whose result was worked out by hand."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.trace.replay import CachingAllocator, OutOfMemoryError, replay, round_request
from planner.units import GIB, MIB


def reserved(*requests, **options):
    """Reserved bytes after allocating (positive: bytes, keyed by order) and freeing (("free", key)) in turn."""
    allocator = CachingAllocator(**options)
    key = 0
    for request in requests:
        if isinstance(request, tuple):
            allocator.free(request[1])
        else:
            allocator.allocate(key, request)
            key += 1
    return allocator


@pytest.mark.parametrize(
    ("num_bytes", "rounded"), [(0, 0), (1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)]
)
def test_requests_are_rounded_up_to_512_bytes(num_bytes, rounded):
    assert round_request(num_bytes) == rounded
    assert reserved(num_bytes).allocated_bytes == rounded


@pytest.mark.parametrize(
    ("num_bytes", "segment"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (501 * MIB, 502 * MIB),
    ],
)
def test_the_first_request_decides_the_segment(num_bytes, segment):
    assert reserved(num_bytes).reserved_bytes == segment


def test_small_requests_share_a_segment_until_it_is_full():
    assert reserved(*[MIB // 2] * 4).reserved_bytes == 2 * MIB
    assert reserved(*[MIB // 2] * 5).reserved_bytes == 4 * MIB


def test_small_requests_never_use_the_large_pool():
    # 20 MiB are cached and free, yet 512 bytes open a small segment.
    assert reserved(2 * MIB, ("free", 0), 512).reserved_bytes == 22 * MIB


def test_the_best_fit_is_the_smallest_block_that_is_large_enough():
    # Free: 30 and 12 MiB. 11 MiB takes the 12 (no rest worth splitting), so 30 MiB still fit without a new segment.
    after = reserved(30 * MIB, 12 * MIB, ("free", 0), ("free", 1), 11 * MIB, 30 * MIB)
    assert after.reserved_bytes == 42 * MIB


def test_a_large_block_keeps_a_rest_of_up_to_one_mebibyte():
    # The 12 MiB block serves 11 MiB whole: the allocator counts 12 as allocated and can't use the rest.
    whole = reserved(12 * MIB, ("free", 0), 11 * MIB)
    assert whole.allocated_bytes == 12 * MIB
    # A rest above 1 MiB is split off: 10.5 out of 12 leaves 1.5, which then serves 1.25.
    split = reserved(12 * MIB, ("free", 0), 10 * MIB + MIB // 2, MIB + MIB // 4)
    assert split.reserved_bytes == 12 * MIB
    assert split.allocated_bytes == 12 * MIB


def test_neighbours_merge_whatever_the_order_of_freeing():
    for order in [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)]:
        frees = [("free", key) for key in order]
        # Three 6 MiB blocks of one 20 MiB segment; merged they serve 18 MiB.
        after = reserved(6 * MIB, 6 * MIB, 6 * MIB, *frees, 18 * MIB)
        assert after.reserved_bytes == 20 * MIB, order


def test_blocks_of_two_segments_never_merge():
    after = reserved(20 * MIB, 20 * MIB, ("free", 0), ("free", 1), 40 * MIB)
    assert after.reserved_bytes == 80 * MIB


def test_a_block_in_use_keeps_its_segment_from_being_given_back():
    allocator = reserved(6 * MIB, 6 * MIB, ("free", 0), 30 * MIB, ("free", 2))
    assert allocator.reserved_bytes == 50 * MIB
    allocator.empty_cache()
    assert allocator.reserved_bytes == 20 * MIB


def test_pressure_empties_the_cache_and_then_fails():
    # 30 + 40 would be 70: the free 30 are given back first.
    after = reserved(30 * MIB, ("free", 0), 40 * MIB, capacity_bytes=60 * MIB)
    assert (after.reserved_bytes, after.num_retries) == (40 * MIB, 1)
    with pytest.raises(OutOfMemoryError) as failure:
        reserved(30 * MIB, 40 * MIB, capacity_bytes=60 * MIB)
    assert failure.value.segment_bytes == 40 * MIB


def test_expandable_segments_grow_by_pages_from_the_free_end():
    # 30 MiB: two pages of 20. The free 10 at the end and one more page serve 25.
    after = reserved(30 * MIB, 25 * MIB, expandable=True)
    assert after.reserved_bytes == 60 * MIB
    # What two ordinary segments couldn't merge, one growing segment can.
    merged = reserved(20 * MIB, 20 * MIB, ("free", 0), ("free", 1), 40 * MIB, expandable=True)
    assert merged.reserved_bytes == 40 * MIB
    assert reserved(512, expandable=True).reserved_bytes == 2 * MIB


def test_replay_reports_the_peaks_of_the_whole_run():
    result = replay([(0, 30 * MIB), (0, -1), (1, 40 * MIB), (1, -1), (2, 512)])
    assert result.peak_allocated_bytes == 40 * MIB
    assert result.peak_reserved_bytes == 72 * MIB
    assert result.num_retries == 0


sizes = st.integers(1, 64 * MIB)
runs = st.lists(st.tuples(sizes, st.booleans()), min_size=1, max_size=60)


@given(runs, st.booleans())
@settings(max_examples=200, deadline=None)
def test_blocks_neither_vanish_nor_overlap(run, expandable):
    allocator = CachingAllocator(expandable=expandable)
    alive = []
    for key, (num_bytes, frees_one) in enumerate(run):
        allocator.allocate(key, num_bytes)
        alive.append(key)
        if frees_one:
            allocator.free(alive.pop(len(alive) // 2))
        used = list(allocator._used.values())
        free = [b for pool in allocator._pools.values() for b in pool.blocks.values()]
        assert sum(b.num_bytes for b in used + free) == allocator.reserved_bytes
        assert sum(b.num_bytes for b in used) == allocator.allocated_bytes
        spans = sorted((b.address, b.address + b.num_bytes) for b in used + free)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    for key in alive:
        allocator.free(key)
    allocator.empty_cache()
    assert allocator.allocated_bytes == 0
    assert expandable or allocator.reserved_bytes == 0


@given(runs)
@settings(max_examples=100, deadline=None)
def test_a_capacity_of_what_was_reserved_is_always_enough(run):
    requests = [(key, num_bytes) for key, (num_bytes, _) in enumerate(run)]
    for key, (_, frees_it) in enumerate(run):
        if frees_it:
            requests.append((key, -1))
    free = replay(requests)
    assert replay(requests, capacity_bytes=free.peak_reserved_bytes) == free
    assert free.peak_reserved_bytes < 4 * GIB * len(run)
