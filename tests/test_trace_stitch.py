"""Recordings of deep models put together from shallow ones must be those that a trace of all layers makes."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.trace import stitch as module
from bench.trace.depth import Depths, choose_depths
from bench.trace.recording import Mark, Recording, Storage
from bench.trace.replay import replay
from bench.trace.stitch import NotPeriodicError, sort_frees, stitch


class Step:
    """Plays one optimizer step of a model whose layers have the given kinds (letters)."""

    def __init__(self, kinds: str) -> None:
        self.kinds = kinds
        self.storages: list[Storage] = []
        self.events: list[int] = []
        self.marks: list[Mark] = []

    def phase(self, name: str, step: int = 1) -> None:
        self.marks.append(Mark(len(self.events), step, name))

    def alloc(self, op: str, num_bytes: int, layer: int | None, owner: int | None = None) -> int:
        number = len(self.storages)
        self.storages.append(
            Storage(
                number=number,
                num_bytes=num_bytes,
                shape=(num_bytes,),
                dtype="float32",
                op=op,
                module="model" if layer is None else f"model.layers.{layer}.mlp",
                layer=layer,
                phase=self.marks[-1].phase,
                step=self.marks[-1].step,
                allocated_at=len(self.events),
                owner=layer if owner is None else owner,
            )
        )
        self.events.append(number)
        return number

    def free(self, *numbers: int) -> None:
        for number in numbers:
            self.storages[number].freed_at = len(self.events)
            self.events.append(~number)

    def size(self, layer: int) -> int:
        return 1000 * (1 + "abcdefgh".index(self.kinds[layer]))

    def run(self) -> Recording:
        layers = range(len(self.kinds))
        self.phase("load", 0)
        embedding = self.alloc("empty", 7, None)
        weights = [self.alloc("empty", self.size(n), n) for n in layers]
        self.phase("forward")
        before = self.alloc("embed", 11, None)
        saved, inputs = [], [before]
        for n in layers:
            scratch = self.alloc("mul", self.size(n) + 3, n)
            out = self.alloc("add", 50, n)
            saved.append(self.alloc("silu", self.size(n) * 2, n))
            inputs.append(self.alloc("input", 23, n))
            self.free(scratch, *([before] if n else []))
            # made by the model itself, between its layers
            between = self.alloc("mask", 5, None)
            self.free(between)
            before = out
        logits = self.alloc("head", 99, None)
        self.free(before)
        self.phase("backward")
        gradient, above = self.alloc("ones", 13, None), None
        gradients = []
        for n in reversed(layers):
            below = self.alloc("mm", 17, n)
            gradients.append(self.alloc("mm", self.size(n), n))
            # what it took from the layer below, made itself, and left over from the one above
            self.free(inputs[n], gradient, saved[n], *([above] if above is not None else []))
            above = self.alloc("keep", 19, n)
            gradient = below
        self.free(gradient, above, logits, inputs[-1])
        self.phase("optimizer")
        norms = [self.alloc("norm", 2, None, n) for n in layers]
        stacked = self.alloc("stack", 4 * len(self.kinds), None)
        self.free(*reversed(norms), stacked)
        roots = [self.alloc("sqrt", self.size(n), None, n) for n in layers]
        self.free(*roots)
        self.free(*gradients)
        self.free(embedding, *weights)
        return Recording(
            storages=self.storages,
            events=self.events,
            marks=self.marks,
            recompute_ends=(),
            vocab_size=99,
            num_layers=len(self.kinds),
            num_ops=len(self.storages),
        )


def same_run(found: Recording, expected: Recording) -> None:
    assert sort_frees(found.events, [m.at for m in found.marks]) == sort_frees(
        expected.events, [m.at for m in expected.marks]
    )
    facts = [(s.num_bytes, s.op, s.module, s.layer, s.phase, s.step) for s in found.storages]
    assert facts == [(s.num_bytes, s.op, s.module, s.layer, s.phase, s.step) for s in expected.storages]
    assert [found.category(s) for s in found.storages] == [expected.category(s) for s in expected.storages]
    assert [(m.at, m.phase) for m in found.marks] == [(m.at, m.phase) for m in expected.marks]


@given(st.sampled_from(["", "g", "gh"]), st.sampled_from(["a", "ab", "aab", "abcd"]), st.integers(5, 9))
@settings(max_examples=30, deadline=None)
def test_a_period_repeated_is_the_deep_run(start: str, period: str, repeats: int) -> None:
    kinds = start + period * repeats
    depths = choose_depths(kinds)
    assert depths.shallow is not None
    low, high = (Step(kinds[:depth]).run() for depth in depths.shallow)
    same_run(stitch([low, high], depths), Step(kinds).run())


def test_recordings_that_are_not_periodic_are_refused() -> None:
    depths = Depths(num_layers=9, shallow=(3, 4))
    for low, high in [("aab", "aaaa"), ("aaa", "aaaaa"), ("aaaa", "aaaa"), ("aaa", "abaa")]:
        with pytest.raises(NotPeriodicError):
            stitch([Step(low).run(), Step(high).run()], depths)


def test_frees_are_ordered_within_a_run_and_a_phase_only() -> None:
    assert sort_frees([0, 1, 2, ~1, ~0, 3, ~3, ~2], []) == [0, 1, 2, ~0, ~1, 3, ~2, ~3]
    assert sort_frees([0, 1, ~1, ~0], [3]) == [0, 1, ~1, ~0]


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(module).failed == 0


DENSE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 600,
    "tie_word_embeddings": False,
}
GRANITE = {**DENSE, "model_type": "granite", "residual_multiplier": 0.5}
MOE: dict[str, Any] = {
    **DENSE,
    "model_type": "qwen3_moe",
    "num_hidden_layers": 8,
    "moe_intermediate_size": 32,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 2,
}
SETUPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora-checkpointed": (DENSE, {"method": "lora", "grad_accum_steps": 2}),
    "full-kept": (DENSE, {"method": "full", "checkpointing": "none"}),
    "qlora-autocast": (DENSE, {"method": "qlora", "autocast": "bfloat16"}),
    "reentrant": (GRANITE, {"method": "lora", "attention": "flash", "stack": "transformers 4.48.1"}),
    "moe-every-other-layer": (MOE, {"method": "full"}),
}


@pytest.mark.train
@pytest.mark.parametrize(
    "name",
    [name if n == 0 else pytest.param(name, marks=pytest.mark.slow) for n, name in enumerate(SETUPS)],
)
def test_stitched_and_traced_at_all_layers_are_the_same_run(name: str) -> None:
    from bench.trace.run import trace
    from planner.setup import TrainSetup

    model, fields = SETUPS[name]
    setup = TrainSetup(model=model, micro_batch_size=2, seq_len=128, **fields)
    shallow, whole = trace(setup), trace(setup, all_layers=True)
    assert shallow.depths.shallow is not None
    same_run(shallow.timeline, whole.timeline)
    assert replay(shallow.timeline.requests()) == replay(whole.timeline.requests())
    assert {p: v.num_bytes for p, v in shallow.phases.items()} == {
        p: v.num_bytes for p, v in whole.phases.items()
    }
    assert shallow.largest == whole.largest
    assert (shallow.operator, shallow.module) == (whole.operator, whole.module)


@pytest.mark.train
@pytest.mark.slow
def test_what_a_sharded_step_learns_once_in_a_process_is_no_memory() -> None:
    from bench.trace.run import trace
    from planner.setup import TrainSetup

    model = {**DENSE, "num_hidden_layers": 2}
    setup = TrainSetup(model=model, method="full", seq_len=32, num_gpus=2, sharding="fsdp")
    first, second = trace(setup, all_layers=True), trace(setup, all_layers=True)
    same_run(first.timeline, second.timeline)
