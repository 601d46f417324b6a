"""Resuming: the states that a new optimizer is given, where it puts them and in which dtype."""

from __future__ import annotations

from typing import Any

import pytest

from bench.trace.run import record, trace
from planner.setup import TrainSetup

pytestmark = pytest.mark.train

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "tie_word_embeddings": False,
}


def setup_of(**changes: Any) -> TrainSetup:
    return TrainSetup(**{"model": TINY, "micro_batch_size": 1, "seq_len": 32, "method": "full", **changes})


@pytest.mark.parametrize(
    "changes", [{}, {"master_weights": "float32"}, {"optimizer_in_backward": True, "max_grad_norm": None}]
)
def test_states_of_the_weights_dtype_come_back_as_they_were(changes):
    phases = trace(setup_of(**changes)).phases
    assert phases["resume"].terms == phases["save"].terms


def test_a_paged_optimizer_gets_its_states_back_on_the_device():
    phases = trace(setup_of(model={**TINY, "vocab_size": 4000}, optimizer="paged-adamw")).phases
    held = phases["resume"].terms["optimizer"] - phases["save"].terms["optimizer"]
    assert held >= 2 * 2 * 2 * 4000 * 64


def test_each_8bit_state_gets_a_code_book_of_its_own():
    recording = record(setup_of(optimizer="adamw-8bit", model={**TINY, "num_hidden_layers": 1}), on_gpu=True)
    books = [s for s in recording.storages if s.phase == "resume" and s.shape == (256,)]
    on_device = [s for s in books if recording.size(s)]
    quantised = [s for s in recording.storages if s.phase == "resume" and s.dtype == "uint8"]
    assert len(on_device) == sum(1 for s in quantised if recording.size(s)) > 2


def test_what_happens_after_the_step_is_not_in_its_timeline():
    result = trace(setup_of())
    assert {s.phase for s in result.timeline.storages}.isdisjoint({"resume", "end"})
