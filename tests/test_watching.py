"""What a run says of itself and when it stops by itself: divergence, early stop, time left, prediction beside measurement."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.divergence import SUSTAINED, WINDOW, Divergence
from bench.early_stop import HeldOut
from bench.progress import Pace
from bench.watch import JUDGED_STEPS, WARMUP_STEPS, Watch, bounds_of
from planner.errors import UsageError
from tiny_llama import tiny_setup

pytestmark = pytest.mark.train


def stops_at(losses: list[float]) -> int | None:
    watch = Divergence()
    return next((at for at, loss in enumerate(losses) if watch.see(loss)), None)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.0, 0.5), st.floats(0.0, 1.0))
def test_noise_and_spikes_that_pass_stop_no_run(seed: int, noise: float, learned: float) -> None:
    """Losses that fall (or don't), with noise, single outliers and a spike shorter than what is waited for."""
    draw = random.Random(seed)
    losses = [
        3.0 - learned * at / 300 + draw.gauss(0, noise) + (5.0 if draw.random() < 0.05 else 0.0)
        for at in range(300)
    ]
    losses[200 : 200 + SUSTAINED - 5] = [9.0] * (SUSTAINED - 5)
    losses[195:200] = losses[215:220] = [2.0] * 5
    assert stops_at(losses) is None


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.floats(0.0, 0.2), st.sampled_from((0.02, 0.1, 5.0)))
def test_a_loss_that_stays_up_stops_the_run(seed: int, noise: float, climb: float) -> None:
    """At once or slowly, it ends above where it began."""
    draw = random.Random(seed)
    good = [3.0 - at / 150 + draw.gauss(0, noise) for at in range(150)]
    bad = [good[-1] + min(6.0, climb * at) + draw.gauss(0, noise) for at in range(1, 400)]
    at = stops_at(good + bad)
    assert at is not None
    assert at >= 150 + SUSTAINED - 1


def test_data_learned_by_heart_is_no_divergence() -> None:
    """Nothing varies any more; then new rows come, which the model doesn't know yet but no worse than at first."""
    assert stops_at([2.0 - at / 50 for at in range(100)] + [0.0] * 200 + [1.9] * 100) is None


def test_short_runs_are_left_alone() -> None:
    assert stops_at([1.0] * (WINDOW + SUSTAINED - 1) + [9.0]) is None


def evaluations(*losses: float) -> list[dict[str, Any]]:
    return [{"step": 10 * at, "loss": loss} for at, loss in enumerate(losses)]


def test_patience_counts_evaluations_without_a_lower_loss() -> None:
    rule = HeldOut(every_steps=10, patience=2)
    assert not rule.is_over([])
    assert not rule.is_over(evaluations(3.0, 2.0, 2.1))
    assert rule.is_over(evaluations(3.0, 2.0, 2.1, 2.0))
    assert not rule.is_over(evaluations(3.0, 2.0, 2.1, 1.9))
    assert rule.is_over(evaluations(3.0, 3.1, float("nan")))
    assert not HeldOut(every_steps=10).is_over(evaluations(1.0, 2.0, 3.0, 4.0, 5.0))


def test_the_best_evaluation_is_of_trained_weights() -> None:
    rule = HeldOut(every_steps=10, keep_best=True)
    assert rule.best_step(evaluations(1.0)) is None
    assert rule.best_step(evaluations(1.0, 2.0, 1.5, 1.5)) == 20
    assert HeldOut(every_steps=10).best_step(evaluations(1.0, 2.0)) is None


def test_rules_need_evaluations_to_go_by() -> None:
    HeldOut().check(has_data=False)
    with pytest.raises(UsageError, match="--eval-every"):
        HeldOut(patience=1).check(has_data=True)
    with pytest.raises(UsageError, match="eval_fraction"):
        HeldOut(keep_best=True, every_steps=1).check(has_data=False)


def test_time_left_counts_evaluations_and_saves() -> None:
    pace = Pace(num_steps=100, save_every_steps=30, eval_every_steps=25)
    pace.add_step(50.0)
    pace.add_step(1.0)
    assert pace.num_evals_ahead(25) == 3
    assert pace.left(40) == "60 s and 3 evals and 3 saves left"
    pace._others_s.update(eval=[10.0], save=[2.0, 4.0])
    assert pace.left(40) == "2 min left"
    assert pace.left(99) == "14 s left"
    assert Pace(num_steps=10, save_every_steps=10).num_evals_ahead(0) == 1
    assert Pace(num_steps=10, save_every_steps=10, is_evaluated=False).num_evals_ahead(0) == 0


PREDICTED = {
    "memory": {
        "peak_allocated_bytes": 100,
        "low_peak_allocated_bytes": 90,
        "high_peak_allocated_bytes": 120,
        "device_used_bytes": 150,
    },
    "time": {"step_s": 1.0, "low_step_s": 0.5, "high_step_s": 2.0},
}
SETUP = tiny_setup(seq_len=10, micro_batch_size=2, grad_accum_steps=5)


class Doubts:
    """A sampler that saw something."""

    def look(self, *, is_working: bool) -> None:
        assert is_working

    def doubts(self) -> list[str]:
        return ["other programs used 70 %"]


def judged(
    freed_bytes: Any = lambda: None,
    device_type: str = "cuda",
    host: Any = None,
    retry: bool = False,
    **step: Any,
) -> dict[str, list[str]]:
    """Causes by quantity, after steps like this one."""
    said: dict[str, list[str]] = {}
    lines: list[str] = []

    def report(kind: str, values: Any) -> None:
        assert kind == "warning"
        assert values["quantity"] not in said, "once"
        said[values["quantity"]] = values["causes"]
        lines.append(values["note"])

    bounds = bounds_of(PREDICTED, device_type)
    watch = Watch(bounds=bounds, setup=SETUP, report=report, host=host, freed_bytes=freed_bytes)
    if retry:
        watch("retry", {"step": 0})
    for at in range(2 * (WARMUP_STEPS + JUDGED_STEPS)):
        peak = {"peak_allocated_bytes": 110} if device_type == "cuda" else {}
        values = {"step": at, "step_s": 1.0, "rss_bytes": 150, "positions": 100, **peak}
        slow = {"step_s": 60.0} if at < WARMUP_STEPS else {}
        watch("step", {**values, **step, **slow})
    assert all(causes or "cause not known" in line for causes, line in zip(said.values(), lines, strict=True))
    return said


def test_inside_the_interval_nothing_is_said() -> None:
    assert judged(peak_allocated_bytes=119, step_s=1.9) == {}
    assert judged(device_type="cpu", rss_bytes=169) == {}


def test_causes_are_what_was_seen() -> None:
    assert judged(step_s=2.5) == {"step": []}
    assert judged(step_s=2.5, host=Doubts()) == {"step": ["other programs used 70 %"]}
    assert judged(peak_allocated_bytes=130, host=Doubts()) == {"memory": []}
    (short,) = judged(step_s=0.4, positions=40)["step"]
    assert "40%" in short
    assert judged(step_s=0.4, positions=95) == {"step": []}
    assert judged(step_s=2.5, retry=True) == {}


def test_the_cpu_s_memory_is_only_seen_between_steps() -> None:
    assert judged(device_type="cpu", rss_bytes=10) == {}
    assert judged(device_type="cpu", rss_bytes=171) == {"memory": []}
    (kept,) = judged(lambda: 15, "cpu", rss_bytes=171)["memory"]
    assert "C library" in kept


@pytest.mark.parametrize("broken", [{}, {"memory": 3, "time": []}, {"memory": {"peak_allocated_bytes": "x"}}])
def test_a_plan_without_predictions_is_not_held_to_any(broken: dict[str, Any]) -> None:
    assert bounds_of(broken, "cuda") == {}
