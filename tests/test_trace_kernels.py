"""Stand-ins for fused kernels: what they leave alive, and what they spare against the plain operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.trace.kernels import CrossEntropy, GatedActivation, LinearCrossEntropy, RMSNorm, rotary
from bench.trace.run import trace
from bench.trace.tracker import Tracker
from planner.errors import NotModelledError
from planner.setup import TrainSetup

pytestmark = pytest.mark.train

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2000,
    "tie_word_embeddings": False,
}
ROWS, HIDDEN, VOCAB = 64, 32, 500


def setup_of(**changes: Any) -> TrainSetup:
    return TrainSetup(**{"model": TINY, "micro_batch_size": 2, "seq_len": 128, **changes})


def made_by(run: Callable[[], Any]) -> tuple[list[tuple[tuple[int, ...], str]], Any]:
    """Shapes and dtypes of what is alive after `run`, and what it returned."""
    with FakeTensorMode(), Tracker() as tracker:
        kept = run()
        return [(s.shape, s.dtype) for s in tracker.storages if s.freed_at is None], kept


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def test_a_fused_norm_keeps_its_input_and_a_float32_per_row():
    def run() -> list[torch.Tensor]:
        x, weight = leaf(ROWS, HIDDEN), torch.empty(HIDDEN)
        return [x, weight, RMSNorm.apply(x, weight, True)]

    alive, _ = made_by(run)
    assert alive[2:] == [((ROWS,), "float32"), ((ROWS, HIDDEN), "bfloat16")]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_fused_norm_writes_over_its_gradient_where_the_family_allows_it(in_place):
    with FakeTensorMode():
        x, weight = leaf(ROWS, HIDDEN), torch.empty(HIDDEN)
        out = RMSNorm.apply(x, weight, in_place)
        given = torch.empty_like(out)
        (grad,) = torch.autograd.grad(out, (x,), given)
        assert (grad.untyped_storage()._cdata == given.untyped_storage()._cdata) is in_place


def test_rotary_embeddings_take_no_memory_of_their_own():
    def run() -> list[Any]:
        query, key = leaf(2, ROWS, 4, 16), leaf(2, ROWS, 2, 16)
        cos, sin = torch.empty(1, ROWS, 16), torch.empty(1, ROWS, 16)
        return [query, key, cos, sin, rotary(query.transpose(1, 2), key.transpose(1, 2), cos, sin)]

    alive, _ = made_by(run)
    assert len(alive) == 4


def test_a_gated_activation_gives_the_memory_of_its_inputs_to_their_gradients():
    with FakeTensorMode(), Tracker() as tracker:
        gate, up = (leaf(ROWS, HIDDEN) * 1 for _ in range(2))
        out = GatedActivation.apply(gate, up)
        grads = torch.autograd.grad(out, (gate, up), torch.empty_like(out))
        stored = {t.untyped_storage()._cdata for t in (gate, up)}
        assert {g.untyped_storage()._cdata for g in grads} == stored
        assert tracker.num_ops


def test_fused_cross_entropy_turns_the_logits_into_their_gradient():
    with FakeTensorMode():
        logits = leaf(ROWS, VOCAB, dtype=torch.float32) * 1
        loss = CrossEntropy.apply(logits, torch.empty(ROWS, dtype=torch.int64)).sum()
        (grad,) = torch.autograd.grad(loss, (logits,))
        assert grad.untyped_storage()._cdata == logits.untyped_storage()._cdata


@pytest.mark.parametrize(("with_grad", "trains_head"), [(True, True), (True, False), (False, False)])
def test_the_linear_loss_keeps_gradients_and_never_all_logits(with_grad, trains_head):
    with FakeTensorMode(), Tracker() as tracker:
        rows = leaf(ROWS, HIDDEN)
        weight = torch.empty(VOCAB, HIDDEN, dtype=torch.bfloat16, requires_grad=trains_head)
        labels = torch.empty(ROWS, dtype=torch.int64)
        loss = LinearCrossEntropy.apply(rows, weight, None, labels, with_grad, False)
        made = [s for s in tracker.storages if s.shape[-1:] == (VOCAB,)]
        kept = [s.shape for s in tracker.storages[3:] if s.freed_at is None]
    # 500 / 32 = 16 parts of 4 rows each.
    assert {s.shape for s in made} == {(4, VOCAB)}
    assert kept == [(ROWS, HIDDEN), *([(VOCAB, HIDDEN)] if trains_head else []), ()]
    assert loss.shape == ()


@pytest.mark.parametrize("kernels", ["fused", "liger"])
def test_fused_kernels_need_less_in_the_layers(kernels):
    options = {"method": "full", "checkpointing": "none"}
    plain, fused = trace(setup_of(**options)), trace(setup_of(**options, kernels=kernels))
    assert fused.phases["forward"].terms["activations"] < plain.phases["forward"].terms["activations"]
    assert fused.phases["save"].num_bytes == plain.phases["save"].num_bytes


def test_the_fused_loss_spares_the_logits():
    big = {**TINY, "vocab_size": 50_000}
    full, fused = (trace(setup_of(model=big, loss=loss)) for loss in ("full", "fused"))
    assert full.phases["loss"].terms["logits"] >= 6 * 2 * 128 * 50_000
    assert fused.phases["loss"].terms["logits"] < 2 * 2 * 50_000 * 2


def test_a_family_without_ligers_patches_is_refused():
    model = {**TINY, "model_type": "starcoder2"}
    with pytest.raises(NotModelledError, match="kernels: Liger's patches of starcoder2"):
        trace(setup_of(model=model, kernels="liger"))
    with pytest.raises(NotModelledError, match="no RMSNorm"):
        trace(setup_of(model=model, kernels="fused", stack="transformers 4.48.1, torch 2.4.1"))
