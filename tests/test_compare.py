"""Records against their predictions and against each other."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("numpy")

from hypothesis import given
from hypothesis import strategies as st

from bench.compare import compare, predicted_vs_measured
from bench.store import Measured, Measurement, Samples
from planner.errors import UsageError
from planner.setup import TrainSetup

MACHINE = {"machine_id": "abc", "cpu_model": "x", "num_cpus": 2, "versions": {"torch": "2.13.0"}}


def run(*step_wall_s: float, **changes) -> Measurement:
    base = Measurement(
        id="r",
        time_utc="2026-11-22T10:00:00Z",
        setup=TrainSetup(model="m"),
        gpu="cpu",
        device="cpu",
        environment=MACHINE,
        outcome="ok",
        samples=Samples(step_wall_s=step_wall_s, step_cpu_s=tuple(2 * s for s in step_wall_s)),
        measured=Measured(peak_allocated_bytes=1000, step_s=1.0),
    )
    return replace(base, **changes)


STEADY = (1.0, 1.01, 0.99, 1.0, 1.02, 0.98)


def test_rows_exist_only_for_what_was_predicted_and_measured():
    predicted = {"source": "trace", "memory": {"peak_allocated_bytes": 900, "peak_reserved_bytes": 950}}
    good = run(*STEADY, predicted={**predicted, "time": {"step_s": 2.0}})
    failed = replace(good, outcome="oom")
    rows = predicted_vs_measured([good, failed, run(*STEADY)])
    assert [(row.quantity, round(row.relative_error, 3)) for row in rows] == [
        ("peak_allocated_bytes", -0.1),
        ("step_s", 1.0),
    ]
    assert rows[0].source == "trace"


@pytest.mark.parametrize("predicted", [None, {}, {"memory": None, "time": None}])
def test_no_prediction_gives_no_row(predicted):
    assert predicted_vs_measured([run(*STEADY, predicted=predicted)]) == []


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=12), st.floats(0.5, 2))
def test_a_slower_twin_shows_its_factor(times, factor):
    b = [factor * t for t in times]
    found = compare([run(*times)], [run(*b)])
    assert found.step.ratio == pytest.approx(factor)
    assert found.cpu_step.ratio == pytest.approx(factor)
    assert found.step.low_ratio <= found.step.ratio * 1.0001
    assert found.is_same_machine and found.is_same_versions and not found.setup_differences


def test_a_clear_difference_is_significant_and_noise_is_not():
    slower = [1.2 * t for t in STEADY]
    assert compare([run(*STEADY)], [run(*slower)]).is_significant
    assert not compare([run(*STEADY)], [run(*reversed(STEADY))]).is_significant


def test_enough_runs_are_compared_by_their_medians():
    found = compare([run(*STEADY)] * 3, [run(2.0, 2.0, 100.0)] * 3)
    assert found.unit == "run" and found.step.ratio == pytest.approx(2.0)
    assert not any("within a run" in w for w in found.warnings)
    few = compare([run(*STEADY)] * 2, [run(*STEADY)] * 3)
    assert few.unit == "step" and any("within a run" in w for w in few.warnings)


def test_other_machines_versions_and_setups_are_named():
    other = {**MACHINE, "machine_id": "def", "versions": {"torch": "2.14.0", "peft": "1"}}
    b = run(*STEADY, environment=other, setup=TrainSetup(model="m", rank=8), device="cuda")
    found = compare([run(*STEADY)], [b])
    assert found.is_same_machine is False and found.is_same_versions is False
    assert found.version_differences == {"peft": (None, "1"), "torch": ("2.13.0", "2.14.0")}
    assert found.setup_differences == {"rank": (16, 8)}
    assert any("devices" in w for w in found.warnings)


def test_without_ids_machines_are_told_by_their_hardware_and_else_unknown():
    def on(**environment):
        return run(*STEADY, environment=environment)

    a = on(cpu_model="x", num_cpus=2)
    assert compare([a], [on(cpu_model="x", num_cpus=2)]).is_same_machine is True
    assert compare([a], [on(cpu_model="y", num_cpus=2)]).is_same_machine is False
    unknown = compare([on()], [on()])
    assert unknown.is_same_machine is None and unknown.is_same_versions is None


def test_memory_ratio_takes_the_highest_of_each_side():
    high = run(*STEADY, measured=Measured(peak_allocated_bytes=3000))
    assert compare([run(*STEADY)], [run(*STEADY), high]).peak_allocated_ratio == 3
    assert compare([run(*STEADY)], [run(*STEADY, measured=Measured())]).peak_allocated_ratio is None


def test_sides_without_a_successful_run_are_a_usage_error():
    with pytest.raises(UsageError, match="B has no successful run"):
        compare([run(*STEADY)], [run(*STEADY, outcome="oom"), run()])


def test_doubts_of_the_runs_travel_along():
    noted = run(*STEADY, warnings=("hot",))
    assert compare([noted], [noted]).warnings.count("hot") == 1
