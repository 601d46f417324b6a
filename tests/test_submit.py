"""Shared results: nothing of a person in them, everything that contradicts itself refused, and evidence once they lie in a folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("numpy")

from bench.cli import run
from bench.store import Measured, Measurement, Samples, append_result, read_results
from bench.submit import shared_case, shared_cases
from planner.setup import TrainSetup

GIB = 2**30
SECRETS = ("lovelace", "acme", "hunter2")


def record(**changes) -> Measurement:
    base = Measurement(
        id="0123456789abcdef",
        time_utc="2026-11-22T10:11:12Z",
        setup=TrainSetup(model="smollm2-135m", method="lora", seq_len=512),
        gpu="RTX 4090",
        device="cuda",
        environment={
            "versions": {"torch": "2.13.0+cu130", "transformers": "5.23.0"},
            "machine_id": "hunter2",
            "hostname": "acme",
            "gpu_total_bytes": 24 * GIB,
        },
        outcome="ok",
        stderr_tail="/srv/lovelace/x",
        samples=Samples(step_wall_s=(0.5,)),
        measured=Measured(
            peak_allocated_bytes=2 * GIB,
            peak_reserved_bytes=3 * GIB,
            device_used_bytes=4 * GIB,
            terms={"weights": GIB},
        ),
        predicted={
            "setup": {"model": "/srv/lovelace/m"},
            "assumptions": ["read from /srv/lovelace/m"],
            "memory": {},
        },
        warnings=("no checkpoint in /srv/lovelace",),
    )
    return replace(base, **changes)


def test_a_shared_case_names_nobody_and_carries_its_record():
    case = shared_case(record())
    text = json.dumps(case)
    assert not [word for word in SECRETS if word in text] and "10:11" not in text
    assert case["measured"] == {
        "outcome": "measured",
        "peak_allocated_gib": 2.0,
        "peak_reserved_gib": 3.0,
        "device_used_gib": 4.0,
    }
    assert case["stack"] is None
    assert Measurement.from_json(case["record"]).measured == record().measured


def test_a_case_of_older_libraries_names_them():
    facts = {**record().environment, "versions": {"transformers": "4.48.1", "torch": "2.11.0+cu130"}}
    assert shared_case(record(environment=facts))["stack"] == "transformers 4.48.1, torch 2.11.0"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"outcome": "killed"}, "neither well"),
        ({"device": "cpu", "gpu": "cpu"}, "no GPU"),
        ({"gpu": "RTX 9999"}, "none that finefit knows"),
        ({"environment": {}}, "which versions"),
        ({"measured": Measured()}, "no measured peak"),
        ({"measured": Measured(peak_allocated_bytes=3 * GIB, peak_reserved_bytes=2 * GIB)}, "contradict"),
        ({"measured": Measured(peak_allocated_bytes=GIB, terms={"weights": 2 * GIB})}, "contradict"),
        ({"measured": Measured(peak_allocated_bytes=99 * GIB)}, "contradict"),
        ({"outcome": "oom", "error": "?"}, "memory ran out"),
        ({"setup": TrainSetup(model="smollm2-135m", data="mine.jsonl")}, "shared"),
        ({"setup": TrainSetup(model="smollm2-135m", tokenizer="mine")}, "shared"),
        ({"setup": TrainSetup(model="acme/secret")}, "shared"),
        ({"setup": TrainSetup(model="~/smollm2-135m")}, "shared"),
    ],
)
def test_what_is_no_evidence_or_private_is_left_out_with_its_reason(changes, reason):
    cases, reasons = shared_cases([record(**changes)])
    assert cases == [] and reason in reasons[0]


def test_a_system_is_named_without_whose_build_it_is():
    facts = {**record().environment, "os": "Linux 6.8.0-45-acme"}
    assert shared_case(record(environment=facts))["record"]["environment"]["os"] == "Linux 6.8.0"


def test_an_inline_config_loses_a_private_name():
    config = {"model_type": "llama", "hidden_size": 64, "_name_or_path": "/srv/lovelace/m"}
    assert "lovelace" not in json.dumps(shared_case(record(setup=TrainSetup(model=config))))


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "results.jsonl"
    append_result(path, record())
    append_result(path, record(id="b" * 16, outcome="oom", error="CUDA out of memory"))
    append_result(path, record(id="c" * 16, outcome="crash"))
    return path


def test_a_folder_of_shared_files_is_evidence(results, capsys):
    assert run(["submit", "results.jsonl", "--out", "shared"]) == 0
    assert "left out" in capsys.readouterr().err
    (file,) = Path("shared").iterdir()
    found, warnings = read_results(file)
    assert [m.outcome for m in found] == ["ok", "oom"] and warnings == []
    assert run(["submit", "results.jsonl", "--out", "shared", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cases"] == 2 and len(list(Path("shared").iterdir())) == 1
    assert run(["accuracy", "shared", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [case["measured_gib"] for case in answer["cases"]] == [2.0, None]
    assert all(case["problem"] is None for case in answer["cases"])
    assert answer["outcomes"]["num_oom"] == 1
    Path("shared/copy.jsonl").write_bytes(file.read_bytes())
    assert run(["accuracy", "shared"]) == 1
    assert "is already in" in capsys.readouterr().err


def test_nothing_to_share_is_an_error_and_writes_nothing(results, capsys):
    Path("bad.jsonl").write_text("{}\n")
    assert run(["submit", "bad.jsonl", "--out", "shared"]) == 1
    assert "no result that can be shared" in capsys.readouterr().err and not Path("shared").exists()
    Path("empty").mkdir()
    assert run(["accuracy", "empty"]) == 1
