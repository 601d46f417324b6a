"""Statistics of timings: laws that any correct summary obeys, and values from textbooks' tables."""

from __future__ import annotations

from itertools import combinations

import pytest

np = pytest.importorskip("numpy")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from bench.stats import _normal_p, _orders_by_wins, drift, mann_whitney, median_ratio, summarise  # noqa: E402

times = st.floats(1e-6, 1e6)
samples = st.lists(times, min_size=1, max_size=30)


@given(samples)
def test_quantiles_are_in_order_and_inside_the_samples(values):
    timing = summarise(values)
    low, high = timing.low_s or timing.median_s, timing.high_s or timing.median_s
    slack = 1e-9 * max(values)
    assert min(values) - slack <= timing.p10_s <= timing.median_s <= timing.p90_s <= max(values) + slack
    assert min(values) - slack <= low <= high <= max(values) + slack
    assert timing.iqr_s >= 0


@given(samples, st.floats(0.1, 10))
def test_a_scaled_run_gives_the_scale_as_its_ratio(values, scale):
    ratio = median_ratio(values, [scale * v for v in values])
    assert ratio.ratio == pytest.approx(scale)


@given(samples, samples)
def test_the_rank_test_is_symmetric_and_a_probability(a, b):
    p = mann_whitney(a, b)
    assert 0 <= p <= 1
    assert p == pytest.approx(mann_whitney(b, a))


@given(samples)
def test_equal_samples_show_no_difference(values):
    assert mann_whitney(values, values) > 0.5


@pytest.mark.parametrize(("num_a", "num_b"), [(1, 1), (2, 3), (4, 3), (5, 5)])
def test_counts_of_orders_equal_a_full_enumeration(num_a, num_b):
    counts = [0] * (num_a * num_b + 1)
    for places in combinations(range(num_a + num_b), num_b):
        counts[sum(place - rank for rank, place in enumerate(places))] += 1
    assert _orders_by_wins(num_a, num_b) == counts


def test_separated_samples_reach_the_smallest_possible_p():
    assert mann_whitney([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(2 / 252)


def test_critical_value_of_the_published_table():
    """n = m = 8: U = 13 is the largest value with p <= 0.05, two-sided (Mann-Whitney tables)."""
    counts = _orders_by_wins(8, 8)
    assert 2 * sum(counts[:14]) / sum(counts) <= 0.05 < 2 * sum(counts[:15]) / sum(counts)


def test_normal_approximation_meets_the_exact_test():
    generator = np.random.default_rng(1)
    a, b = generator.normal(1.0, 0.1, 25), generator.normal(1.05, 0.1, 25)
    wins = float((b[:, None] > a[None, :]).sum())
    assert _normal_p(25, 25, wins, np.ones(50, dtype=np.int64)) == pytest.approx(mann_whitney(a, b), abs=0.01)


def test_interval_covers_the_true_median_about_as_often_as_it_says():
    generator = np.random.default_rng(7)
    covered = 0
    for seed in range(100):
        timing = summarise(generator.lognormal(0, 0.2, 25), seed=seed)
        covered += timing.low_s <= 1.0 <= timing.high_s
    assert 88 <= covered <= 100


def test_same_samples_give_the_same_interval():
    assert summarise([1, 2, 3, 5, 8]) == summarise([1, 2, 3, 5, 8])


def test_drift_sees_a_run_that_slows_down():
    assert drift([1.0] * 5 + [1.2] * 5) == pytest.approx(0.2)
    assert drift([2.0]) == 0


@pytest.mark.parametrize("bad", [[], [float("nan")], [1.0, float("inf")]])
def test_no_finite_samples_is_an_error(bad):
    with pytest.raises(ValueError, match="finite"):
        summarise(bad)
    with pytest.raises(ValueError):
        median_ratio([1.0], [0.0])
