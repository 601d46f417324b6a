"""Prefix tuning (Li and Liang 2021, arXiv:2101.00190): learned keys and values ahead of each layer's, the model itself frozen."""

from __future__ import annotations

from planner.errors import SetupError
from planner.methods import VIRTUAL_TOKENS, FindMatrices, Method, Part, PeftCall, Refusal
from planner.methods.prompt import words
from planner.setup import TrainSetup
from planner.specs import ModelSpec


def whole(model: ModelSpec, num_virtual_tokens: int) -> tuple[Part, ...]:
    """One table: for each token all layers' keys and values.

    Raises SetupError where layers differ in them, or keys and values in their heads: PEFT has one shape for all.
    """
    shapes = {(layer.num_kv_heads, layer.head_dim, layer.value_head_dim) for layer in model.layers}
    layer = model.layers[0]
    if len(shapes) > 1 or layer.head_dim != layer.value_head_dim:
        raise SetupError("method", f"prefix: {model.name} hasn't one shape for all keys and values; use lora")
    num_layers = sum(kind.count for kind in model.layers)
    return (Part(num_virtual_tokens, 2 * num_layers * layer.num_kv_heads * layer.head_dim),)


def peft_config(setup: TrainSetup, find_matrices: FindMatrices) -> PeftCall:
    """PEFT's PrefixTuningConfig, without a projection."""
    return "PrefixTuningConfig", {"num_virtual_tokens": setup.num_virtual_tokens}


METHOD = Method(
    name="prefix",
    summary="learned keys and values ahead of every layer's (prefix tuning)",
    whole=whole,
    prefixes=True,
    peft_config=peft_config,
    words=words,
    refusals=(
        *VIRTUAL_TOKENS,
        Refusal(
            "checkpointing",
            lambda s: s.checkpointing != "none",
            "a recomputed layer would find its own keys in the cache that holds the learned ones; use none",
        ),
        Refusal(
            "attention",
            lambda s: s.attention == "eager",
            "its memory is known for sdpa and flash only; use sdpa",
        ),
    ),
    learning_rate=1e-3,
    learning_rate_source="PEFT's comparison of methods on MetaMathQA (Llama-3.2-3B, 200 tokens): 1e-3",
)
