"""The caching allocator's rules, by sequences whose result was worked out by hand."""

import doctest
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.trace import allocator_rules
from bench.trace.allocator import CachingAllocator, OutOfMemoryError
from bench.trace.allocator_rules import AllocatorRules
from bench.trace.replay import least_capacity_bytes, replay
from planner.inventory import unsplit_bytes
from planner.units import GIB, MIB

EXPANDABLE = AllocatorRules(expandable=True)


def reserved(*requests, capacity_bytes=None, **rules):
    """An allocator after allocating (positive: bytes, keyed by order), freeing (("free", key)) and allocating on
    another stream (("stream", number, bytes)) in turn.
    """
    allocator = CachingAllocator(AllocatorRules(**rules), capacity_bytes=capacity_bytes)
    key = 0
    for request in requests:
        if isinstance(request, tuple) and request[0] == "free":
            allocator.free(request[1])
        elif isinstance(request, tuple):
            allocator.allocate(key, request[2], request[1])
            key += 1
        else:
            allocator.allocate(key, request)
            key += 1
    return allocator


@pytest.mark.parametrize(
    ("num_bytes", "rounded"), [(0, 0), (1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)]
)
def test_requests_are_rounded_up_to_512_bytes(num_bytes, rounded):
    assert AllocatorRules().round_request(num_bytes) == rounded
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


@pytest.mark.parametrize(
    "num_bytes", [9 * MIB, 10 * MIB, 11 * MIB, 11 * MIB - 512, 23 * MIB // 2, 135_790_592]
)
def test_the_closed_form_says_what_a_new_segment_keeps_beyond_a_tensor(num_bytes):
    allocator = CachingAllocator()
    allocator.allocate(1, num_bytes)
    assert unsplit_bytes(num_bytes) == allocator.block_bytes(1) - num_bytes


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


def test_a_cache_of_split_segments_can_not_help():
    # 12 of the 20 MiB segment are free, but the driver can't take back a part of it.
    with pytest.raises(OutOfMemoryError):
        reserved(6 * MIB, 6 * MIB, ("free", 0), 30 * MIB, capacity_bytes=45 * MIB)


def test_streams_do_not_share_blocks():
    alone = reserved(30 * MIB, ("free", 0), ("stream", 0, 30 * MIB))
    other = reserved(30 * MIB, ("free", 0), ("stream", 7, 30 * MIB))
    assert (alone.reserved_bytes, other.reserved_bytes) == (30 * MIB, 60 * MIB)


# --- max_split_size


def test_an_oversized_block_is_never_split():
    # A 100 MiB block freed: with max_split_size 64 a request of 70 takes it only within the rounding (20 MiB).
    options = {"max_split_bytes": 64 * MIB}
    far = reserved(100 * MIB, ("free", 0), 70 * MIB, **options)
    assert (far.reserved_bytes, far.allocated_bytes) == (170 * MIB, 70 * MIB)
    near = reserved(100 * MIB, ("free", 0), 81 * MIB, **options)
    assert (near.reserved_bytes, near.allocated_bytes) == (100 * MIB, 100 * MIB)


def test_an_oversized_block_serves_no_smaller_request():
    after = reserved(100 * MIB, ("free", 0), 30 * MIB, max_split_bytes=64 * MIB)
    assert after.reserved_bytes == 130 * MIB
    assert reserved(100 * MIB, ("free", 0), 30 * MIB).reserved_bytes == 100 * MIB


def test_pressure_frees_the_one_oversized_block_that_is_enough_first():
    # 70, 90 and 30 are cached; 80 needs room for 80: the 90 goes back, 70 and 30 stay, nothing counts as a retry.
    cached = [70 * MIB, 90 * MIB, 30 * MIB, ("free", 0), ("free", 1), ("free", 2)]
    options = {"max_split_bytes": 64 * MIB, "max_non_split_rounding_bytes": 2 * MIB}
    after = reserved(*cached, 80 * MIB, capacity_bytes=190 * MIB, **options)
    assert (after.reserved_bytes, after.num_retries) == (180 * MIB, 0)
    # 150 needs both: the largest ones go first, until they are enough together.
    after = reserved(*cached, 150 * MIB, capacity_bytes=190 * MIB, **options)
    assert (after.reserved_bytes, after.num_retries) == (180 * MIB, 0)
    # What is not oversized goes back only when all is emptied.
    after = reserved(*cached, 180 * MIB, capacity_bytes=190 * MIB, **options)
    assert (after.reserved_bytes, after.num_retries) == (180 * MIB, 1)


# --- roundup_power2_divisions, garbage_collection_threshold, large_segment_size


@pytest.mark.parametrize(
    ("num_bytes", "rounded"),
    [
        # 4 parts of 1 MiB (1 to 2 MiB): steps of 256 KiB
        (MIB + 1, MIB + 256 * 1024),
        (MIB + 256 * 1024, MIB + 256 * 1024),
        (2 * MIB - 1, 2 * MIB),
        # below 1 MiB the divisions of 1 MiB, up to 4 x 512 bytes plain rounding
        (2048, 2048),
        (2049, 2560),
        # from 64 MiB on 2 parts: steps of 32 MiB
        (65 * MIB, 96 * MIB),
    ],
)
def test_requests_are_rounded_to_parts_of_a_power_of_two(num_bytes, rounded):
    assert AllocatorRules(power2_divisions={1: 4, 64: 2}).round_request(num_bytes) == rounded


def test_garbage_is_what_was_idle_longest():
    # Cached: 20, idle for three requests, and 60, idle for one; 40 in use. Before the next segment 120 are above
    # half of 200: what is idle for longer than the mean of two goes back, and that is enough.
    requests = [20 * MIB, ("free", 0), 40 * MIB, 60 * MIB, ("free", 2), 70 * MIB]
    collected = reserved(*requests, capacity_bytes=200 * MIB, gc_threshold=0.5)
    assert (collected.reserved_bytes, collected.num_retries) == (40 * MIB + 60 * MIB + 70 * MIB, 0)
    # Below the threshold, and without one, nothing goes back.
    for threshold in (0.6, 0.0):
        kept = reserved(*requests, capacity_bytes=200 * MIB, gc_threshold=threshold)
        assert (kept.reserved_bytes, kept.num_retries) == (190 * MIB, 0)


def test_the_size_of_large_segments_can_be_set():
    assert reserved(2 * MIB, large_segment_bytes=40 * MIB).reserved_bytes == 40 * MIB
    assert reserved(2 * MIB, large_segment_bytes=40 * MIB, expandable=True).reserved_bytes == 40 * MIB


# --- expandable segments


def test_expandable_segments_grow_by_pages_from_the_free_end():
    # 30 MiB: two pages of 20. The free 10 at the end and one more page serve 25.
    after = reserved(30 * MIB, 25 * MIB, expandable=True)
    assert after.reserved_bytes == 60 * MIB
    # What two ordinary segments couldn't merge, one growing segment can.
    merged = reserved(20 * MIB, 20 * MIB, ("free", 0), ("free", 1), 40 * MIB, expandable=True)
    assert merged.reserved_bytes == 40 * MIB
    assert reserved(512, expandable=True).reserved_bytes == 2 * MIB


def test_expandable_blocks_keep_no_rest():
    # Ordinary: 12 MiB serve 11.5 whole. Expandable: 20 mapped, 11.5 used, the other 8.5 serve 8.
    after = reserved(11 * MIB + MIB // 2, 8 * MIB, expandable=True)
    assert (after.reserved_bytes, after.allocated_bytes) == (20 * MIB, 19 * MIB + MIB // 2)


def test_a_block_that_can_grow_is_taken_last():
    # Free: 12 in the middle, 10 at the end, which can grow without end. 9 takes the 12 though 10 fits better, so
    # that 30 grows from the end: one page more (40 + 20) and not two.
    requests = [12 * MIB, 18 * MIB, ("free", 0), 9 * MIB]
    after = reserved(*requests, 30 * MIB, expandable=True)
    assert after.reserved_bytes == 60 * MIB


def test_under_pressure_whole_free_pages_are_unmapped():
    # Pages of 20: 0-20 and 20-40 free, 40-50 used (of 40-60). The driver has 60: 35 needs 40 mapped anew or the
    # free 40; 45 unmaps both pages and maps them behind 60, where 10 free MiB wait.
    requests = [40 * MIB, 10 * MIB, ("free", 0)]
    reuse = reserved(*requests, 35 * MIB, expandable=True, capacity_bytes=60 * MIB)
    assert (reuse.reserved_bytes, reuse.num_retries) == (60 * MIB, 0)
    moved = reserved(*requests, 45 * MIB, expandable=True, capacity_bytes=60 * MIB)
    assert (moved.reserved_bytes, moved.num_retries) == (60 * MIB, 1)
    with pytest.raises(OutOfMemoryError):
        reserved(*requests, 55 * MIB, expandable=True, capacity_bytes=60 * MIB)


def test_pages_that_are_used_in_part_stay():
    # 5 MiB used at 15-20; page 0-20 stays, 20-40 goes.
    after = reserved(15 * MIB, 5 * MIB, 20 * MIB, ("free", 0), ("free", 2), expandable=True)
    after.empty_cache()
    assert after.reserved_bytes == 20 * MIB
    # The hole is mapped again from its free neighbour on.
    after.allocate(9, 30 * MIB)
    assert after.reserved_bytes == 60 * MIB


# --- the whole run


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
    allocator = CachingAllocator(AllocatorRules(expandable=expandable))
    alive = []
    for key, (num_bytes, frees_one) in enumerate(run):
        allocator.allocate(key, num_bytes)
        alive.append(key)
        if frees_one:
            allocator.free(alive.pop(len(alive) // 2))
        used = [b for b in allocator.blocks() if not b.is_free]
        free = [b for b in allocator.blocks() if b.is_free]
        assert sum(b.num_bytes for b in used + free) == allocator.reserved_bytes
        assert sum(b.num_bytes for b in used) == allocator.allocated_bytes
        spans = sorted((b.address, b.address + b.num_bytes) for b in used + free)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    for key in alive:
        allocator.free(key)
    allocator.empty_cache()
    assert allocator.allocated_bytes == allocator.reserved_bytes == 0


@given(runs, st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_capacity_of_what_was_reserved_is_always_enough(run, expandable):
    requests = [(key, num_bytes) for key, (num_bytes, _) in enumerate(run)]
    for key, (_, frees_it) in enumerate(run):
        if frees_it:
            requests.append((key, -1))
    rules = AllocatorRules(expandable=expandable)
    free = replay(requests, rules=rules)
    assert replay(requests, rules=rules, capacity_bytes=free.peak_reserved_bytes) == free
    assert free.peak_reserved_bytes < 4 * GIB * len(run)


@given(runs)
@settings(max_examples=100, deadline=None)
def test_pressure_never_breaks_an_expandable_segment(run):
    """With little room every page moves about; what is served stays disjoint and inside what is reserved."""
    allocator = CachingAllocator(EXPANDABLE, capacity_bytes=200 * MIB)
    alive = []
    for key, (num_bytes, frees_one) in enumerate(run):
        try:
            allocator.allocate(key, num_bytes)
        except OutOfMemoryError:
            frees_one = True
        else:
            alive.append(key)
        if frees_one and alive:
            allocator.free(alive.pop(len(alive) // 2))
        blocks = sorted((b.address, b.address + b.num_bytes) for b in allocator.blocks())
        assert all(end <= start for (_, end), (start, _) in pairwise(blocks))
        assert sum(b.num_bytes for b in allocator.blocks()) == allocator.reserved_bytes <= 200 * MIB


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(allocator_rules).failed == 0


class TestLeastCapacity:
    """How small a card may be."""

    def test_a_hole_in_a_used_segment_is_lost(self):
        """30 MiB are freed but for a block of 2 MiB at their start; 30 MiB more don't fit into the hole."""
        requests = [(1, 30 * MIB), (1, -1), (2, 2 * MIB), (3, 30 * MIB)]
        assert replay(requests).peak_allocated_bytes == 32 * MIB
        least = least_capacity_bytes(requests)
        assert 50 * MIB <= least <= 60 * MIB
        assert replay(requests, capacity_bytes=least).failed_key is None
        assert replay(requests, capacity_bytes=least - 2 * MIB).failed_key is not None

    def test_whole_free_segments_are_given_back(self):
        requests = [(1, 30 * MIB), (1, -1), (2, 40 * MIB)]
        assert replay(requests).peak_reserved_bytes == 70 * MIB
        assert least_capacity_bytes(requests) <= 42 * MIB
