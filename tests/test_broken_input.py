"""Broken plans and training files through the real commands: an answer or one line, and nothing half-written."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from broken_input import Ordeal, broken_plan, fault_of
from planner.planfile import parse_plan

pytestmark = pytest.mark.train


@pytest.fixture
def ordeal(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ordeal:
    monkeypatch.chdir(tmp_path)
    for name in ("model", "rows.jsonl"):
        (tmp_path / name).symlink_to(tiny / name)
    return Ordeal(tmp_path, seed=20)


def test_broken_plans_give_an_answer_or_one_line(ordeal: Ordeal) -> None:
    ordeal.plans(0, 100)
    assert ordeal.faults == []
    assert len(ordeal.counts) > 6, "answers and errors of several commands"


def test_broken_training_files_stop_a_run_in_one_line_before_anything_is_written(ordeal: Ordeal) -> None:
    ordeal.files(0, 60)
    assert ordeal.faults == []
    assert ordeal.counts["the model"] > 3, "some are harmless, and the run would begin"


@pytest.mark.slow
def test_a_thousand_broken_plans_and_a_thousand_training_files(ordeal: Ordeal) -> None:
    ordeal.plans(1000, 2000)
    ordeal.files(1000, 2000)
    assert ordeal.faults == []


def test_the_same_seed_breaks_in_the_same_way(tiny: Path) -> None:
    assert broken_plan(random.Random("7"), tiny) == broken_plan(random.Random("7"), tiny)
    whole = 0
    for number in range(60):
        try:
            parse_plan(broken_plan(random.Random(number), tiny).decode(), "p.yaml")
            whole += 1
        except Exception:
            continue
    assert 10 < whole < 50, "many get past the parser, and many don't"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (1, "Traceback (most recent call last):\nKeyError: 3"),
        (1, "finefit: unexpected error (KeyError: 3); the same command with --debug shows where"),
        (139, ""),
        (2, ""),
        (2, "finefit: one\nfinefit: two"),
        (2, "finefit: one\nand a second line"),
    ],
)
def test_a_crash_is_seen(code: int, said: str) -> None:
    assert fault_of(code, said)
    assert fault_of(2, "warning: old\nfinefit: rank: 0 is outside 1 to 65536") is None
