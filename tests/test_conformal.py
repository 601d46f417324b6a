"""Conformal prediction with groups that back off: by hand, as laws, and by drawing."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.conformal import Distribution, predict
from planner.residuals import CIRCLES, Kind, Runs, distribution, support, table_text

ratios = st.floats(-1, 1).map(lambda value: round(value, 4))
clusters = st.lists(ratios, min_size=1, max_size=4)
circles = st.lists(st.lists(clusters, max_size=6), max_size=4)


def kind(**changes):
    plain = {"stack": "transformers", "sharding": "none", "is_shared": False, "method": "lora"}
    return Kind(**{**plain, "kernels": "plain", **changes})


def runs(*log_ratios, model="a", source="o/r/x.csv", num_gpus=1, **changes):
    return Runs(kind=kind(**changes), source=source, model=model, num_gpus=num_gpus, log_ratios=log_ratios)


class TestByHand:
    """Small cases worked out on paper."""

    def test_three_in_one_circle(self):
        found = predict([[[0.1], [0.2], [0.3]]])
        assert found.values == (0.1, 0.2, 0.3)
        assert found.weights == pytest.approx([1 / 6] * 3), "(3-1)/(3+1) over three"
        assert found.unseen == pytest.approx(2 / 4)
        assert found.above(0.2) == pytest.approx(1 / 6 + 1 / 6 + 1 / 4)
        assert found.above(0.25) == pytest.approx(1 / 6 + 1 / 4)

    def test_what_a_circle_leaves_goes_to_the_next(self):
        found = predict([[[0.1], [0.2], [0.3]], [], [[-1.0], [1.0]]])
        assert dict(zip(found.values, found.weights, strict=True)) == pytest.approx(
            {0.1: 1 / 6, 0.2: 1 / 6, 0.3: 1 / 6, -1.0: 1 / 12, 1.0: 1 / 12}
        )
        assert found.unseen == pytest.approx(1 / 2 * 2 / 3)

    def test_a_cluster_counts_once_however_many_it_holds(self):
        found = predict([[[0.1] * 50, [0.2]]])
        assert found.weights == pytest.approx([1 / 6, 1 / 6])

    def test_one_alone_says_nothing_of_spread(self):
        assert predict([[[0.1]]]).unseen == 1.0
        assert predict([]).interval(0.9) == (-math.inf, math.inf)

    def test_nineteen_bound_ninety_percent_by_their_extremes(self):
        """The finite-sample quantile: rank ceil(20 x 0.95) = 19 of 19 on each side."""
        found = predict([[[i / 100] for i in range(19)]])
        assert found.interval(0.9) == pytest.approx((0.0, 0.18))

    def test_fewer_reach_beyond_what_was_seen(self):
        low, high = predict([[[i / 100] for i in range(1, 10)]]).interval(0.9)
        assert low < 0.01
        assert high > 0.09

    def test_the_tail_falls_off_by_the_largest_distance_seen(self):
        found = Distribution((-0.5, 0.1), (0.4, 0.4), 0.2)
        assert found.above(0.1 + 0.5) == pytest.approx(0.1 * math.exp(-1))


class TestLaws:
    """Whatever the circles hold."""

    @given(circles)
    def test_all_mass_is_somewhere(self, found):
        predicted = predict(found)
        assert sum(predicted.weights) + predicted.unseen == pytest.approx(1.0)

    @given(circles, st.floats(-2, 2), st.floats(0, 2))
    def test_the_chance_above_never_rises(self, found, limit, more):
        predicted = predict(found)
        assert 0.0 <= predicted.above(limit + more) <= predicted.above(limit) + 1e-12 <= 1.0 + 2e-12

    @given(circles, st.floats(0.1, 0.97), st.floats(0.001, 0.02))
    def test_a_higher_level_is_never_narrower(self, found, level, more):
        predicted = predict(found)
        (low, high), (lower, higher) = predicted.interval(level), predicted.interval(level + more)
        assert lower <= low + 1e-12
        assert higher >= high - 1e-12

    @given(circles, st.floats(0.1, 0.99))
    def test_little_is_above_the_interval(self, found, level):
        predicted = predict(found)
        _, high = predicted.interval(level)
        if math.isfinite(high):
            assert predicted.above(math.nextafter(high, math.inf) + 1e-9) <= (1 - level) / 2 + 1e-9

    @given(circles, st.floats(0.5, 0.99))
    def test_mirrored_errors_mirror_the_interval(self, found, level):
        mirrored = [[[-value for value in cluster] for cluster in circle] for circle in found]
        low, high = predict(found).interval(level)
        assert predict(mirrored).interval(level) == pytest.approx((-high, -low))


def draw_groups(generator, num_groups, num_shapes, num_runs):
    """Runs of several kinds: each kind, shape and run has an error of its own."""
    table = []
    for method in range(num_groups):
        of_method = generator.gauss(0, 0.02)
        for shape in range(num_shapes):
            of_shape = of_method + generator.gauss(0, 0.03)
            errors = [of_shape + generator.gauss(0, 0.005) for _ in range(num_runs)]
            table.append(runs(*errors, model=str(shape), method=str(method)))
    return table


@pytest.mark.parametrize(("num_groups", "num_shapes"), [(1, 40), (5, 8), (8, 4)])
def test_intervals_cover_new_shapes_as_often_as_they_say(num_groups, num_shapes):
    """Leave one shape out, on exchangeable errors: between the 85 and 95 % that are promised, as far as chance allows."""
    generator = random.Random(7)
    covered = []
    for _ in range(12):
        table = draw_groups(generator, num_groups, num_shapes, 3)
        for row in table:
            rest = [other for other in table if other is not row]
            low, high = distribution(rest, row.kind).interval(0.9)
            covered += [low <= value <= high for value in row.log_ratios]
    assert 0.85 <= sum(covered) / len(covered) <= 0.97


class TestCircles:
    """Which runs count for which kind."""

    def test_no_run_counts_in_two_circles(self):
        table = [runs(0.1, method=m, sharding=s) for m in ("lora", "full") for s in ("none", "fsdp1")]
        found = distribution(table, kind())
        assert sum(found.weights) + found.unseen == pytest.approx(1.0)

    def test_what_is_left_out_leaves_no_trace(self):
        """The distribution without a shape doesn't change with that shape's errors."""
        others = [runs(0.01 * i, model=str(i)) for i in range(5)]
        for errors in ((0.5,), (-0.9, 0.9)):
            table = [*others, runs(*errors, model="left out")]
            kept = [row for row in table if row.shape != table[-1].shape]
            assert distribution(kept, kind()) == distribution(others, kind())

    def test_kernels_of_one_shape_are_one_cluster_for_wider_circles(self):
        apart = [
            runs(0.1, kernels="fused"),
            runs(0.1, kernels="liger"),
            runs(0.2, model="b", kernels="fused"),
        ]
        assert distribution(apart, kind()).unseen == pytest.approx(2 / 3)

    def test_another_trainers_runs_come_last(self):
        table = [
            *(runs(0.01, model=str(i)) for i in range(9)),
            runs(0.9, stack="other"),
            runs(0.8, stack="other", model="b"),
        ]
        known = distribution(table, kind())
        foreign = distribution(table, kind(stack="other"))
        assert known.above(0.5) < 0.2 < foreign.above(0.5)

    def test_support_names_the_circle(self):
        table = [runs(0.1), runs(0.2, 0.3, model="b")]
        found = support(table, kind())
        assert (found.is_narrowest, found.num_runs, found.num_shapes) == (True, 3, 2)
        wider = support(table, kind(method="dora", kernels="liger"))
        assert not wider.is_narrowest
        assert wider.words == "one GPU"
        assert support([], kind()) is None

    def test_every_circle_holds_the_narrower_ones(self):
        kinds = [
            kind(method=m, kernels=k, sharding=s, stack=t)
            for m in ("lora", "full")
            for k in ("plain", "liger")
            for s in ("none", "fsdp1")
            for t in ("transformers", "other")
        ]
        for narrow, wide in itertools.pairwise(CIRCLES):
            for one in kinds:
                for other in kinds:
                    assert narrow.key(one) != narrow.key(other) or wide.key(one) == wide.key(other)


def test_the_table_reads_back(tmp_path, monkeypatch):
    from planner import residuals

    rows = [runs(0.1, -0.2), runs(0.3, model="b", method="full")]
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "memory-residuals.json").write_text(table_text(rows))
    monkeypatch.setattr(residuals, "profiles_dir", lambda: tmp_path)
    residuals.published_runs.cache_clear()
    try:
        assert sorted(residuals.published_runs()) == sorted(rows)
    finally:
        residuals.published_runs.cache_clear()
