"""Records against their predictions and against each other."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("numpy")

from hypothesis import given
from hypothesis import strategies as st

from bench.compare import compare, compare_files, predicted_vs_measured
from bench.compare_text import format_comparisons
from bench.gates import check_gates, read_gate
from bench.store import Measured, Measurement, Samples
from bench.terms import errors_by_term, term_rows
from planner.errors import GateError, UsageError
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
    assert any(w.startswith("A ran on x abc, B on ") for w in found.warnings)


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


def test_two_machines_in_one_file_are_refused_and_named():
    other = run(*STEADY, environment={**MACHINE, "machine_id": "def", "cpu_model": "y"})
    with pytest.raises(UsageError, match=r"A mixes runs of 2 machines \(x abc, y def\)"):
        compare([run(*STEADY), other], [run(*STEADY)])


def test_sweeps_are_compared_setup_by_setup():
    def swept(factor: float, *ranks: int) -> list[Measurement]:
        return [
            run(*(factor * rank * t for t in STEADY), setup=TrainSetup(model="m", rank=rank))
            for rank in ranks
        ]

    many, _ = compare_files(swept(1, 1, 2, 4, 8), swept(1.5, 1, 2, 4, 8))
    lines = format_comparisons(many, 120).splitlines()
    assert lines[0].startswith("4 of 4 setups differ") and sum("1.500" in line for line in lines) == 4
    assert "B's step takes 50.0% longer" in format_comparisons(many[:1], 120)
    found, lonely = compare_files(swept(1, 4, 8, 16), swept(1.5, 8, 16, 32))
    assert [round(c.step.ratio, 6) for c in found] == [1.5, 1.5] and all(c.label for c in found)
    assert not any(c.setup_differences for c in found)
    assert [line[:6] for line in lonely] == ["only A", "only B"]
    with pytest.raises(UsageError, match="share no setup"):
        compare_files(swept(1, 4, 8), swept(1, 2))
    (direct,), _ = compare_files(swept(1, 4), swept(1, 8))
    assert direct.setup_differences == {"rank": (4, 8)}


def test_a_gate_holds_or_is_exit_3():
    found = [compare([run(*STEADY)], [run(*(1.1 * t for t in STEADY))])]
    assert check_gates([read_gate("step_s <= 1.2"), read_gate("peak_allocated_bytes<1.01")], found)
    with pytest.raises(GateError, match=r"step_s<=1\.05: 1\.1") as error:
        check_gates([read_gate("step_s<=1.05"), read_gate("cpu_step_s<2")], found)
    assert error.value.exit_code == 3 and "cpu_step_s" not in str(error.value)
    with pytest.raises(GateError, match="not measured"):
        check_gates([read_gate("eval_s<=2")], found)
    elsewhere = run(*STEADY, environment={**MACHINE, "machine_id": "def"})
    strangers = [compare([run(*STEADY)], [elsewhere])]
    with pytest.raises(GateError, match="different machines"):
        check_gates([read_gate("step_s<=2")], strangers)
    assert check_gates([read_gate("step_s<=2")], strangers, any_machine=True)


@pytest.mark.parametrize(
    "text", ["step_s", "step_s=1", "step<=1", "step_s<=x", "step_s<=1e999", "<=1", "step_s<=1;2"]
)
def test_a_gate_that_is_none_is_a_usage_error(text):
    with pytest.raises(UsageError):
        read_gate(text)


TERMS = {"weights": 100, "adapters": 10, "optimizer": 20, "gradients": 10, "activations": 60}
PREDICTED = {
    "memory": {
        "terms": {**TERMS, "logits": 0, "workspace": 0, "context": 30, "fragmentation": 5},
        "phases": {"backward": 200, "save": 150},
    },
    "time": {"step_s": 2.0},
}


def test_errors_by_term_add_up_to_the_error_of_the_peak():
    measured = Measured(
        peak_allocated_bytes=220,
        peak_reserved_bytes=230,
        device_used_bytes=250,
        phases={"backward": 220},
        terms={"weights": 120, "adapters": 10, "optimizer": 20, "gradients": 10},
        step_s=1.0,
    )
    one = run(*STEADY, device="cuda", predicted=PREDICTED, measured=measured)
    rows = {row.part: row for row in term_rows(one)}
    parts = ("weights", "adapters", "optimizer", "gradients + activations + logits + workspace")
    assert sum(rows[part].share for part in parts) == pytest.approx((200 - 220) / 220)
    assert rows["fragmentation"].measured == 10 and rows["context"].measured == 20
    assert rows["phase backward"].relative_error == pytest.approx(-20 / 220)
    assert "phase save" not in rows and rows["step_s"].relative_error == 1
    errors = {error.part: error for error in errors_by_term([one, replace(one, outcome="oom"), run(*STEADY)])}
    assert errors["weights"].num_runs == 1 and errors["weights"].bias == pytest.approx(-1 / 6)


@pytest.mark.parametrize(
    "predicted", [None, {}, {"memory": [], "time": "x"}, {"memory": {"terms": {"weights": "x"}}}]
)
def test_a_strange_prediction_gives_no_term(predicted):
    assert term_rows(run(*STEADY, predicted=predicted)) == []
