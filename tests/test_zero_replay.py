"""ZeRO's bookkeeping by hand: when gradients are reduced, and which weights are whole."""

from __future__ import annotations

from planner.zero_replay import Call, Gradient, Passes, gathered, reduced

WIDTH = 2


def passes_of(*layers: int) -> Passes:
    """One weight per layer, called forward and then backward."""
    forward = tuple(Call("forward", (n,), size) for n, size in enumerate(layers))
    backward = tuple(Call("backward", call.parameters, call.elements) for call in reversed(forward))
    sizes = tuple((size, WIDTH * size) for size in layers)
    evaluation = tuple(Call("eval", call.parameters, call.elements) for call in forward)
    return Passes(sizes, forward + backward, evaluation, ())


def test_gradients_collect_until_the_next_one_would_not_fit():
    each = [Gradient("first", 6), Gradient("first", 4), Gradient("second", 3), Gradient("second", 20)]
    found = reduced(tuple(each), 10)
    assert [(elements, cause.elements) for elements, cause in found.each] == [(10, 3), (3, 20)]
    assert found.final == 20
    assert found.largest("second") == 10
    assert found.largest("first") == 0


def test_a_bucket_that_holds_all_is_reduced_once_at_the_end():
    found = reduced((Gradient("first", 6), Gradient("first", 4)), 10)
    assert (found.each, found.final) == ((), 10)


def test_without_gathering_ahead_only_the_layer_at_work_is_whole():
    live = gathered(passes_of(100, 300, 200), reuse=1, prefetch=0)
    assert live["forward"] == live["backward"] == WIDTH * 300


def test_what_is_used_again_soon_stays_whole():
    live = gathered(passes_of(100, 300, 200), reuse=10_000, prefetch=0)
    assert live["forward"] == live["backward"] == WIDTH * 600


def test_the_next_layer_is_gathered_ahead_while_there_is_room():
    few, many = (gathered(passes_of(100, 300, 200), reuse=room, prefetch=1) for room in (100, 301))
    assert few["forward"] == WIDTH * 300
    assert many["forward"] == WIDTH * (300 + 200)


def test_several_weights_that_arrive_together_are_there_twice_until_the_last_is_used():
    passes = passes_of(100, 300, 200)
    live = gathered(passes, reuse=10_000, prefetch=10_000)
    assert live["forward"] == WIDTH * (100 + 2 * 500)


def test_a_second_evaluation_finds_what_the_first_left_for_a_backward():
    live = gathered(passes_of(100, 300, 200), reuse=1, prefetch=0)
    assert (live["forward"], live["eval"]) == (WIDTH * 300, WIDTH * (200 + 300))
