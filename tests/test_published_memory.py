"""The closed form against every published run of the Hugging Face stack that evidence/ holds.

Setups with the corrections that evidence/README.md explains. The limits are those of the mechanisms that are known:
what is left is the imbalance of experts, which depends on the data, and fused adapters under FSDP1, whose plug-in
leaves them out of the sharding.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.accuracy import Compared, compare

EVIDENCE = Path(__file__).parents[1] / "evidence" / "memory-runs.jsonl"
WORST = {"dense": 0.0035, "moe": 0.03, "ignored adapters": 0.0075, "fused adapters": 0.0025}


@pytest.fixture(scope="module")
def compared() -> list[Compared]:
    cases = [json.loads(line) for line in EVIDENCE.read_bytes().splitlines()]
    hugging_face = [c for c in cases if "fms-acceleration" in c["source"]]
    return [c for c in compare(hugging_face) if c.measured_gib is not None]


def kind(case: Compared) -> str:
    group = case.group
    if group.shape == "moe":
        return "moe"
    if group.method == "qlora" and group.kernels != "plain":
        return "fused adapters" if group.sharding.startswith("none") else "ignored adapters"
    return "dense"


def test_every_run_is_predicted(compared: list[Compared]) -> None:
    assert [c.id for c in compared if c.problem] == []
    assert len(compared) > 170


@pytest.mark.parametrize("name", WORST)
def test_no_run_is_further_off_than_its_mechanisms_allow(name: str, compared: list[Compared]) -> None:
    errors = {c.id: abs(c.corrected_error or 0.0) for c in compared if kind(c) == name}
    assert errors and max(errors.values()) <= WORST[name], {
        i: e for i, e in errors.items() if e > WORST[name]
    }
