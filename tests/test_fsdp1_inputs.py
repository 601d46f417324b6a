"""Why FSDP1 keeps the inputs of frozen layers: torch's own hook under torch's own reentrant checkpoint."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.checkpoint import checkpoint

from planner.hf_config import model_spec
from planner.memory import MemoryModel
from planner.setup import TrainSetup

pytestmark = pytest.mark.train

NUM_LAYERS = 6
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
}


class Frozen(nn.Module):
    """A frozen layer; `is_wrapped` hooks its input as FSDP1 does for a flat parameter that doesn't train."""

    def __init__(self, *, is_wrapped: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8).requires_grad_(False)
        self.is_wrapped = is_wrapped
        self.handles: list[object] = []
        self.inputs: list[weakref.ref[torch.UntypedStorage]] = []
        self.grads: list[weakref.ref[torch.UntypedStorage]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            self.inputs.append(weakref.ref(x.untyped_storage()))
            x.register_post_accumulate_grad_hook(
                lambda t: self.grads.append(weakref.ref(t.grad.untyped_storage()))
            )
            if self.is_wrapped:
                self.handles.append(register_multi_grad_hook([x], lambda _: None))
        return self.inner(x)


def num_alive_at_the_end(*, is_wrapped: bool) -> tuple[int, int]:
    """Inputs and their gradients of all layers that are alive when the backward reaches the first input."""
    layers = [Frozen(is_wrapped=is_wrapped) for _ in range(NUM_LAYERS)]
    alive: list[tuple[int, int]] = []

    def count(_: torch.Tensor) -> None:
        gc.collect()
        inputs = sum(ref() is not None for layer in layers for ref in layer.inputs)
        alive.append((inputs, sum(ref() is not None for layer in layers for ref in layer.grads)))

    start = torch.randn(4, 8, requires_grad=True)
    start.register_hook(count)
    # Not a leaf, as the embeddings' output isn't once a hook asks it for gradients and it is passed on.
    x = start * 1.0
    for layer in layers:
        x = checkpoint(layer, x, use_reentrant=True)
    x.sum().backward()
    return alive[0]


def test_the_hook_keeps_every_input_and_its_gradient() -> None:
    assert num_alive_at_the_end(is_wrapped=True) == (NUM_LAYERS, NUM_LAYERS)
    inputs, grads = num_alive_at_the_end(is_wrapped=False)
    assert inputs <= 1 and grads <= 1


def test_the_closed_form_counts_them() -> None:
    """All but two: the peak of the first layer's backward holds its own input's gradient and its output's anyway."""
    setup = TrainSetup(
        model=LLAMA,
        stack="transformers 4.48.1",
        method="lora",
        seq_len=512,
        checkpointing="full",
        autocast="bfloat16",
        loss="chunked",
    )

    def per_row(**sharding: object) -> float:
        owner = MemoryModel(setup.with_(**sharding), model_spec(LLAMA))
        return (owner.at(64, 512).phases["backward"] - owner.at(32, 512).phases["backward"]) / 32

    stream = 512 * 64 * 2
    extra = per_row(sharding="fsdp1", num_gpus=2) - per_row()
    assert extra == pytest.approx((NUM_LAYERS - 2) * stream)
