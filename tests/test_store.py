"""The results file: what was written is read back, and nothing that happens to a file loses another line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.store import (
    MAX_LINE_BYTES,
    MAX_RECORDS,
    OUTCOMES,
    Measured,
    Measurement,
    Samples,
    append_result,
    read_results,
)
from planner.errors import FinefitError
from planner.setup import TrainSetup

times = st.floats(0, 1e9)
sizes = st.integers(0, 2**60)
maybe_size = st.none() | sizes


def record(**changes) -> Measurement:
    base = Measurement(
        id="run-1",
        time_utc="2026-11-22T10:00:00Z",
        setup=TrainSetup(model="smollm2-135m", method="qlora", targets=("q_proj", "v_proj")),
        gpu="rtx-4090",
        device="cuda",
        environment={"versions": {"torch": "2.13.0"}},
        outcome="ok",
        samples=Samples(step_wall_s=(0.5, 0.4), step_cpu_s=(1.0, 0.9), losses=(2.0, 1.9)),
        measured=Measured(peak_allocated_bytes=2**30, phases={"load": 2**20}, step_s=0.45),
        predicted={"memory": {"peak_allocated_bytes": 2**30}},
        timeline=(("forward", (1, 5, 2**30)), ("backward", (7,))),
        watched={"at_s": [0.1, 0.2], "rss_bytes": [5, None]},
        warnings=("few samples",),
    )
    return replace(base, **changes)


measurements = st.builds(
    record,
    id=st.text(max_size=20),
    outcome=st.sampled_from(OUTCOMES),
    stderr_tail=st.text(max_size=200),
    error=st.none() | st.text(max_size=50),
    samples=st.builds(
        Samples,
        step_wall_s=st.lists(times).map(tuple),
        step_tokens=st.lists(sizes).map(tuple),
        losses=st.lists(st.none() | st.floats(-1e6, 1e6)).map(tuple),
    ),
    measured=st.builds(
        Measured,
        peak_allocated_bytes=maybe_size,
        host_bytes=maybe_size,
        phases=st.dictionaries(st.text(max_size=8), sizes, max_size=3),
        step_s=st.none() | times,
    ),
)

on_disk = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)


@on_disk
@given(written=st.lists(measurements, max_size=4))
def test_what_was_written_is_read_back(tmp_path, written):
    path = tmp_path / "results.jsonl"
    path.unlink(missing_ok=True)
    path.touch()
    for measurement in written:
        append_result(path, measurement)
    assert read_results(path) == (written, [])


@on_disk
@given(cut=st.integers(1, 2000))
def test_a_torn_last_line_loses_only_itself(tmp_path, cut):
    path = tmp_path / "results.jsonl"
    path.unlink(missing_ok=True)
    append_result(path, record(id="first"))
    whole = path.read_bytes()
    append_result(path, record(id="torn"))
    path.write_bytes(path.read_bytes()[: len(whole) + min(cut, len(whole) - 20)])
    torn = path.read_bytes()

    found, warnings = read_results(path)
    assert [m.id for m in found] == ["first"]
    assert len(warnings) == 1 and "cut off" in warnings[0]
    assert path.read_bytes() == torn

    append_result(path, record(id="after"))
    assert path.read_bytes().startswith(torn)
    found, warnings = read_results(path)
    assert [m.id for m in found] == ["first", "after"] and len(warnings) == 1


def nested(depth: int) -> dict:
    return {"inside": nested(depth - 1)} if depth else {}


def test_a_record_of_version_1_is_read(tmp_path):
    path = tmp_path / "results.jsonl"
    old = record(timeline=(), watched={}).to_json()
    for key in ("setup_id", "timeline", "watched", "protocol"):
        del old[key]
    path.write_text(json.dumps({**old, "schema_version": 1}) + "\n")
    found, warnings = read_results(path)
    assert warnings == [] and found == [record(timeline=(), watched={})]


def test_equal_setups_have_one_id_however_a_number_is_written():
    assert (
        record(setup=TrainSetup(model="m", alpha=32)).setup_id
        == record(setup=TrainSetup(model="m", alpha=32.0)).setup_id
    )
    assert (
        record(setup=TrainSetup(model="m", rank=8)).setup_id != record(setup=TrainSetup(model="m")).setup_id
    )


def test_every_line_of_a_file_is_judged_alone(tmp_path):
    path = tmp_path / "results.jsonl"
    good = record().to_json()
    broken = {
        "2": {**good, "schema_version": 7},
        "3": {**good, "setup": {**good["setup"], "rnk": 3}},
        "4": {**good, "outcome": "great"},
        "5": {key: value for key, value in good.items() if key != "gpu"},
        "6": {**good, "surprise": 1},
        "7": {**good, "measured": {"peak_allocated_bytes": -5}},
        "8": {**good, "measured": {"step_s": "fast"}},
        "9": {**good, "samples": {"step_wall_s": [True]}},
        "10": {**good, "samples": {"step_wall_s": 3}},
        "11": {**good, "environment": []},
        "12": {**good, "id": 5},
        "13": [good],
        "14": {**good, "timeline": [{"phase": "forward", "live_bytes": [-1]}]},
        "15": {**good, "watched": {"at_s": [1.0], "rss_bytes": []}},
        "16": {**good, "predicted": []},
        "17": {**good, "environment": nested(200)},
    }
    raw = {
        "18": json.dumps(good).replace(": 0.45", ": NaN"),
        "19": json.dumps(good).replace(": 0.45", ": 1e999"),
        "20": json.dumps(good).replace(": 0.45", ": " + "9" * 400),
        "21": json.dumps(good).replace(": 0.45", ": " + "9" * 5000),
        "22": "[" * 100_000,
        "23": "\0\xff",
    }
    lines = [json.dumps(good), *map(json.dumps, broken.values()), *raw.values(), "", json.dumps(good)]
    path.write_text("\n".join(lines) + "\n", encoding="latin-1")
    found, warnings = read_results(path)
    assert found == [record(), record()]
    assert [w.split(":")[1] for w in warnings] == [*broken, *raw]
    assert "schema_version 7" in warnings[0] and "rnk" in warnings[1] and "great" in warnings[2]
    assert "gpu" in warnings[3] and "surprise" in warnings[4]
    assert all(len(w) < 300 and "\n" not in w for w in warnings)


def test_a_diverged_loss_is_kept_as_null(tmp_path):
    path = tmp_path / "results.jsonl"
    append_result(path, record(samples=Samples(losses=(1.0, float("nan"), float("inf")))))
    (found,), warnings = read_results(path)
    assert found.samples.losses == (1.0, None, None) and warnings == []


def test_each_line_stands_alone_as_plain_json(tmp_path):
    path = tmp_path / "results.jsonl"
    append_result(path, record(stderr_tail="line one\nline two \u2028 \u4e2d\u6587"))
    assert path.read_bytes().count(b"\n") == 1
    line = json.loads(path.read_text(encoding="utf-8"))
    assert line["schema_version"] == 2 and line["setup_id"] == record().setup_id
    assert TrainSetup.from_dict(line["setup"]) == record().setup


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(FinefitError, match=r"can't read .*none\.jsonl"):
        read_results(tmp_path / "none.jsonl")


def test_an_unknown_outcome_cannot_be_made():
    with pytest.raises(ValueError, match="great"):
        record(outcome="great")


HOSTILE = {
    "lists": '{"schema_version": 2, "x": [' + "[]," * 4_000_000 + "[]]}",
    "depth": '{"schema_version": 2, "x": ' + "[" * 4_000_000,
    "keys": '{"schema_version": 2, "watched": {' + ",".join(f'"k{n}":[]' for n in range(800_000)) + "}}",
    "length": '{"id": "' + "x" * (MAX_LINE_BYTES + 1) + '"}',
    "lines": "{}\n" * (MAX_RECORDS + 1),
    "values": json.dumps(record(watched={"x": [[]] * 60_000}).to_json()),
}
TIMES = {"values": 200}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_one_message_within_the_memory(tmp_path, kind):
    path = tmp_path / "results.jsonl"
    path.write_text((HOSTILE[kind] + "\n") * TIMES.get(kind, 1) + json.dumps(record().to_json()) + "\n")
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30));"
        "from bench.cli import run; sys.exit(run(['compare', sys.argv[1], '--predicted']))"
    )
    child = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert child.returncode == (1 if kind in ("lines", "values") else 0)
    assert "Traceback" not in child.stderr and "MemoryError" not in child.stderr
    assert any(words in child.stderr for words in ("left out", "split it first"))
    assert max(map(len, child.stderr.splitlines())) < 500
