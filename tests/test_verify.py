"""`finefit verify`: the ladder, its budget, and a record that names nobody."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("numpy")

from bench.anonymise import ENVIRONMENT_KEYS, anonymise, without_paths
from bench.compare import predicted_vs_measured
from bench.jobs import FakeExecutor, Job
from bench.measure import measure
from bench.store import read_results
from bench.verify import MIN_CASE_S, Rung, ladder, verify
from planner.catalog import find_gpu
from planner.setup import TrainSetup
from planner.specs import Machine

CARD = Machine(gpu=find_gpu("rtx-4090"), is_local=True)


class SlowExecutor(FakeExecutor):
    """Each run takes `seconds` on a clock of its own."""

    now_s = 0.0
    seconds = 50.0

    def run(self, job, progress):
        type(self).now_s += self.seconds
        return super().run(job, progress)


def test_ladder_covers_methods_checkpointing_and_lengths():
    setups = [rung.setup for rung in ladder()]
    kinds = {(s.method, s.checkpointing) for s in setups}
    assert kinds == {(m, c) for m in ("full", "lora", "qlora") for c in ("full", "none")}
    assert len({s.seq_len for s in setups}) == 2 and all(s.from_scratch for s in setups)
    assert len({rung.name for rung in ladder()}) == len(setups)


def test_every_rung_is_predicted_measured_and_recorded(tmp_path):
    found = verify(CARD, out_dir=tmp_path, executor=FakeExecutor())
    assert found.is_gpu and found.gpu == "RTX 4090"
    assert all(case.measurement and case.note is None for case in found.cases)
    assert {row.quantity for row in found.rows} >= {"peak_allocated_bytes", "device_used_bytes"}
    assert all(
        row.predicted_error is not None for row in found.rows if row.quantity == "peak_allocated_bytes"
    )
    records, warnings = read_results(found.record_path)
    assert len(records) == len(ladder()) and warnings == []
    assert len(predicted_vs_measured(records)) >= len(ladder())


def test_the_trace_stands_beside_the_closed_form():
    from planner.estimate import estimate

    found = verify(CARD, rungs=ladder()[:1], executor=FakeExecutor(), trace=estimate)
    (row,) = [row for row in found.rows if row.quantity == "peak_allocated_bytes"]
    assert row.traced == row.predicted and row.traced_error == row.predicted_error
    assert found.record_path is None


def test_a_failing_trace_or_run_is_a_finding(tmp_path):
    def broken(setup, machine):
        raise RuntimeError("fake\ntensors")

    executor = FakeExecutor(outcomes={"qlora": "oom"})
    found = verify(CARD, out_dir=tmp_path, executor=executor, trace=broken)
    notes = {case.rung.setup.method: case.note for case in found.cases}
    assert notes["qlora"] == "oom: fake oom" and notes["lora"] is None
    assert all(row.traced is None for row in found.rows)
    records, _ = read_results(found.record_path)
    assert len(records) == len(ladder())
    assert all(r.predicted["trace_error"] == "RuntimeError: fake tensors" for r in records)


def test_the_budget_is_kept_and_what_was_left_out_says_so():
    SlowExecutor.now_s = 0.0
    executor = SlowExecutor()
    found = verify(CARD, executor=executor, budget_s=120, clock=lambda: SlowExecutor.now_s)
    assert [case.measurement is not None for case in found.cases][:4] == [True, True, False, False]
    assert found.cases[2].note == "no time was left for it"
    assert [job.timeout_s for job in executor.jobs] == [120, 70]
    assert 120 - 2 * SlowExecutor.seconds < MIN_CASE_S


def test_a_rung_that_does_not_fit_is_not_run():
    executor = FakeExecutor()
    full = replace(CARD, free_bytes=2**29)
    found = verify(full, executor=executor)
    assert executor.jobs == [] and all("not to fit" in case.note for case in found.cases)
    unknown = Rung(name="x", setup=TrainSetup(model="no-such-model-at-all", from_scratch=True))
    (case,) = verify(CARD, rungs=[unknown], executor=executor).cases
    assert "no prediction" in case.note


def test_the_record_names_nobody(tmp_path):
    found = verify(
        CARD, out_dir=tmp_path, rungs=ladder()[:2], executor=FakeExecutor(outcomes={"lora": "crash"})
    )
    text = found.record_path.read_text()
    private = [str(Path.home()), str(Path.cwd()), str(tmp_path), socket.gethostname()]
    private += [
        name for name in (os.environ.get("USER"), os.environ.get("LOGNAME")) if name and len(name) > 4
    ]
    assert not [word for word in private if word in text]
    for line in text.splitlines():
        record = json.loads(line)
        assert set(record["environment"]) <= ENVIRONMENT_KEYS and "machine_id" not in record["environment"]
        assert record["stderr_tail"] == "" and len(record["time_utc"]) == len("2026-11-22")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("can't read /srv/ada/x.json: gone", "can't read <path>: gone"),
        ("in 'C:\\Users\\ada\\x'", "in '<path>'"),
        ("~/models/m and \\\\server\\share\\f", "<path> and <path>"),
        ('File "/a/b.py", line 3', 'File "<path>", line 3'),
        ("3 steps/s of org/model, 1/2 done", "3 steps/s of org/model, 1/2 done"),
    ],
)
def test_paths_are_taken_out_of_texts(text, expected):
    assert without_paths(text) == expected


@pytest.mark.parametrize(
    "changes", [{"data": "mine.jsonl"}, {"model": "./mine"}, {"model": "/m"}, {"model": "~/m"}]
)
def test_plans_with_files_of_ones_own_cannot_be_shared(changes):
    setup = TrainSetup(**{"model": "smollm2-135m", **changes})
    with pytest.raises(ValueError, match="shared"):
        anonymise(measure(setup, executor=FakeExecutor()))


@pytest.mark.train
@pytest.mark.slow
def test_a_rung_runs_for_real_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    from bench.machine import local_machine

    smallest = ladder()[0]
    rung = replace(smallest, setup=smallest.setup.with_(seq_len=64))
    found = verify(local_machine(), out_dir=tmp_path, rungs=[rung])
    (case,) = found.cases
    assert case.measurement.outcome == "ok", case.measurement.stderr_tail
    (row,) = [row for row in found.rows if row.quantity == "peak_allocated_bytes"]
    assert abs(row.predicted_error) < 0.10
    assert found.context_bytes > 2**26


def test_jobs_carry_the_rungs_setup():
    executor = FakeExecutor()
    verify(CARD, rungs=ladder()[:1], executor=executor)
    (job,) = executor.jobs
    assert isinstance(job, Job) and job.setup == ladder()[0].setup
