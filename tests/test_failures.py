"""docs/failures.md: its tests exist, each row says what is done, and a row that no other test proves."""

from __future__ import annotations

import ast
import re
import weakref
from pathlib import Path
from typing import Any

import pytest

from tiny_llama import tiny_setup

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \| (.*?) ?\|$", TEXT, re.MULTILINE)
NUM_FAILURES = 68


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_failure_has_its_row() -> None:
    assert [int(number) for number, *_ in ROWS] == list(range(1, NUM_FAILURES + 1))


def test_every_row_says_what_is_done_and_proves_it() -> None:
    for number, _, answer, proof in ROWS:
        status = answer.partition(":")[0]
        assert status in ("Prevented", "Handled", "Not handled"), number
        assert proof.startswith("`test_") or status == "Not handled", number


def test_every_test_that_is_named_exists() -> None:
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", TEXT))
    assert len(named) > NUM_FAILURES
    missing = [f"{file}::{name}" for file, name in named if name not in functions(ROOT / "tests" / file)]
    assert not missing


@pytest.mark.train
def test_an_evaluation_keeps_no_logits() -> None:
    """At most the logits of the batch before live when a batch begins, and none at the end."""
    import numpy as np
    import torch

    from bench.build import build_model
    from bench.data import Example
    from bench.evaluate import evaluate
    from bench.optim import build_optimizer
    from bench.step import TrainStep

    setup = tiny_setup(eval_batch_size=1)
    model = build_model(setup, weights=None, device=torch.device("cpu"))
    alive: list[weakref.ref[Any]] = []

    def watch(module: Any, inputs: Any, output: Any) -> None:
        assert sum(logits() is not None for logits in alive) <= 1
        alive.append(weakref.ref(output))

    head = next(module for name, module in model.named_modules() if name.endswith("lm_head"))
    head.register_forward_hook(watch)
    ids = np.arange(3, 23, dtype=np.int32)
    labels = np.where(ids > 3, ids, -100).astype(np.int32)
    examples = [Example(input_ids=ids, labels=labels, group=str(n)) for n in range(4)]
    step = TrainStep(setup, model, build_optimizer(setup, model))
    found = evaluate(step, examples, pad_id=0)
    assert len(alive) == 4
    assert not any(logits() is not None for logits in alive)
    assert all(isinstance(value, int | float) for value in found.to_dict().values())
