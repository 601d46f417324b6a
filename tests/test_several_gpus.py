"""What each of several GPUs holds: the closed form against the trace, and both against processes that really run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from planner import sharding
from planner.estimate import resolve
from planner.memory import MemoryModel
from planner.setup import TrainSetup

pytestmark = pytest.mark.train

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
}
NUM_PARAMS = 2 * 4096 * 256 + 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 704 + 2 * 256) + 256
AUTOCAST = {"weights_dtype": "float32", "autocast": "bfloat16"}


def setup_of(**changes: Any) -> TrainSetup:
    values: dict[str, Any] = {
        "model": CONFIG,
        "from_scratch": True,
        "method": "full",
        "micro_batch_size": 1,
        "seq_len": 256,
        "max_grad_norm": None,
        "num_gpus": 2,
        "sharding": "fsdp",
    }
    return TrainSetup(**{**values, **changes})


def closed(setup: TrainSetup) -> dict[str, int]:
    """Phases on this CPU, by the closed form."""
    return dict(
        MemoryModel(setup, resolve(setup), on_gpu=False).at(setup.micro_batch_size, setup.seq_len).phases
    )


def traced(setup: TrainSetup) -> dict[str, int]:
    from bench.trace.run import trace

    result = trace(setup, on_gpu=False, all_layers=True)
    return {name: peak.num_bytes for name, peak in result.phases.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                {"num_gpus": 4, "checkpointing": "none"},
                {"seq_len": 32},
                AUTOCAST,
                {"model": {**CONFIG, "tie_word_embeddings": True}},
                {"method": "lora"},
                {"method": "lora", "seq_len": 32, **AUTOCAST},
                {"sharding": "ddp"},
            )
        ),
        {"sharding": "ddp", "method": "lora", "num_gpus": 4},
    ],
)
def test_every_phase_of_the_closed_form_is_the_traced_one(changes):
    setup = setup_of(**changes)
    phases, expected = closed(setup), traced(setup)
    for name, size in expected.items():
        assert phases[name] == pytest.approx(size, rel=0.01), name


def test_a_rank_of_fsdp_keeps_its_share_and_one_of_ddp_everything_and_its_buckets():
    fsdp, ddp = (traced(setup_of(sharding=s, num_gpus=4))["save"] for s in ("fsdp", "ddp"))
    buffers = 32 // 2 * 4 * 2
    assert fsdp == NUM_PARAMS * (2 + 4) // 4 + buffers
    assert ddp == pytest.approx(NUM_PARAMS * (2 + 2 + 4), abs=1024)


def real(setup: TrainSetup) -> list[dict[str, int]]:
    from bench.trace.processes import measure_ranks

    return measure_ranks(setup)


def check_against_processes(setup: TrainSetup) -> None:
    predictions = closed(setup), traced(setup)
    for measured in real(setup):
        assert measured.keys() == predictions[1].keys()
        for phases in predictions:
            assert max(phases.values()) == pytest.approx(max(measured.values()), rel=0.03)


@pytest.mark.slow
def test_two_processes_of_fsdp_hold_what_is_predicted():
    check_against_processes(setup_of(model={**CONFIG, "num_hidden_layers": 2}, seq_len=64))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"num_gpus": 4, "method": "lora", "seq_len": 32},
        {"checkpointing": "none", **AUTOCAST},
        {"sharding": "ddp"},
        {"sharding": "ddp", "method": "lora", "num_gpus": 4},
    ],
)
def test_processes_hold_what_is_predicted(changes):
    check_against_processes(setup_of(**changes))


@pytest.mark.slow
def test_processes_of_zero_hold_what_is_predicted_where_buckets_do_not_hide_it():
    from bench.trace.processes import measure_ranks

    setup, zero = setup_of(sharding="zero2"), replace(sharding.ZERO, bucket=500_000)
    with mock.patch.object(sharding, "ZERO", zero):
        phases = closed(setup)
    ranks = measure_ranks(setup, zero)
    for name in ranks[0]:
        assert phases[name] == pytest.approx(max(rank[name] for rank in ranks), rel=0.03), name


MEASURED = Path(__file__).parent.parent / "reports" / "several-gpus.jsonl"
ROWS = [json.loads(line) for line in MEASURED.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["case"])
def test_the_closed_form_is_within_3_percent_of_every_measured_peak(row):
    with mock.patch.object(sharding, "ZERO", replace(sharding.ZERO, **row.get("zero", {}))):
        predicted = max(closed(TrainSetup(**row["setup"])).values())
    assert predicted == pytest.approx(max(max(rank.values()) for rank in row["ranks"]), rel=0.03)


def test_a_rank_of_zero1_has_whole_gradients_until_the_backward_is_over_and_one_of_zero2_its_share():
    bucket = 500_000
    with mock.patch.object(sharding, "ZERO", replace(sharding.ZERO, bucket=bucket)):
        first, second = (closed(setup_of(sharding=s, num_gpus=4)) for s in ("zero1", "zero2"))
    share = NUM_PARAMS * 2 // 4
    assert first["backward"] - first["save"] >= NUM_PARAMS * 2 + share + bucket * 2
    assert second["backward"] < first["backward"]
    assert first["save"] == second["save"] == pytest.approx(NUM_PARAMS * 2 + 3 * share, rel=0.01)
