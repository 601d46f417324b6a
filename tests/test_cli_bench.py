"""bench and compare as commands, on a model of a few thousand parameters; train's own tests are elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from bench.cli import run
from bench.store import read_results
from planner.cli_options import Session
from planner.planfile import write_plan
from planner.setup import TrainSetup
from planner.specs import GpuProfile, Machine
from planner.units import GIB

pytestmark = [pytest.mark.train, pytest.mark.slow]

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
SETUP = TrainSetup(
    model=CONFIG, from_scratch=True, seq_len=64, weights_dtype="float32", optimizer="adamw-fused"
)


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    write_plan(tmp_path / "plan.yaml", SETUP, "local", {})
    return "plan.yaml"


def bench(plan: str, *words: str, session: Session | None = None) -> int:
    return run(["bench", plan, "--steps", "2", "--warmup", "1", "--random-weights", *words], session)


def test_bench_prints_and_keeps_what_it_measured(plan: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(plan, "--set", "rank=4", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    (kept,), warnings = read_results(Path("results.jsonl"))
    assert warnings == []
    assert printed == json.loads(json.dumps(kept.to_json()))
    assert kept.setup.rank == 4
    assert len(kept.samples.step_wall_s) == 2
    assert kept.predicted is not None
    assert run(["compare", "results.jsonl", "--predicted", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert "peak_allocated_bytes" in {row["quantity"] for row in rows}
    assert run(["compare", "results.jsonl", "--predicted"]) == 0
    assert "%" in capsys.readouterr().out
    assert run(["compare", "results.jsonl", "results.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"]["ratio"] == 1
    assert run(["compare", "results.jsonl", "results.jsonl"]) == 0


def tiny_machine(usable_bytes: int) -> Session:
    gpu = GpuProfile(
        name="cpu",
        vendor="test",
        architecture="test",
        backend="cpu",
        modelled=True,
        memory_bytes=GIB,
        usable_bytes=usable_bytes,
    )
    return Session(local_machine=lambda: Machine(gpu=gpu, free_bytes=usable_bytes, is_local=True))


@pytest.mark.parametrize("command", ["bench", "train"])
def test_what_is_predicted_not_to_fit_is_not_run(
    command: str, plan: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, plan], tiny_machine(2**20)) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "--force" in captured.err
    assert sorted(path.name for path in Path().iterdir()) == ["plan.yaml"]


def test_force_runs_what_is_predicted_not_to_fit(plan: str) -> None:
    assert bench(plan, "--force", session=tiny_machine(2**20)) == 0


def test_a_run_that_fails_is_a_record_and_exit_1(plan: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = yaml.safe_load(Path(plan).read_text())
    broken = {**CONFIG, "hidden_act": "no-such-activation"}
    Path(plan).write_text(yaml.safe_dump({**values, "model": broken}))
    assert bench(plan) == 1
    (kept,), _ = read_results(Path("results.jsonl"))
    assert kept.outcome == "crash"
    assert "crash" in capsys.readouterr().out


def test_hw_is_pasteable_and_machine_readable(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["hw", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema_version"] == 1
    assert run(["hw"]) == 0
    assert "RAM" in capsys.readouterr().out
