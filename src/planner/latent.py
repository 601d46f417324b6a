"""Multi-head latent attention's queries, keys and values as the operations that torch runs (planner.tape).

They come out of narrow latents; positions rotate a slice of each head, and one slice serves the keys of all heads
(transformers' DeepseekV3Attention and DeepseekV2Attention). Widths are bytes per element.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.linears import Linears
from planner.specs import LayerSpec, Matrix
from planner.tape import FULL_WIDTH, ZERO, Tape, Tensor, per_token

Roles = dict[str, Matrix]
Rotary = Callable[[Linears, Tensor, Tensor, float, float], tuple[Tensor, ...]]


def projections(block: Linears, x: Tensor, roles: Roles, layer: LayerSpec) -> tuple[Tensor, ...]:
    """Query, key and value, then what else the attention module's variables hold."""
    tape, heads = block.tape, layer.num_heads
    rope = roles["kv_a"].out_features - roles["kv_b"].in_features
    plain = layer.head_dim - rope
    wide = _queries(block, x, roles)
    # Heads before tokens: a view, whose gradient is copied into the tokens' order.
    by_head = tape.part(wide, wide.size)
    passed = tape.split(by_head, per_token(wide.width * heads * plain))
    turning = tape.split(by_head, per_token(wide.width * heads * rope))
    narrow = block.linear(x, roles["kv_a"])
    rank = roles["kv_b"].in_features
    latent = tape.split(narrow, per_token(narrow.width * rank))
    shared = tape.split(narrow, per_token(narrow.width * rope))
    latent = block.norm(latent, rank, layer.norm)
    turned, shared, *others = _ROTARY[layer.rotary](block, turning, shared, heads * rope, rope)
    width = max(passed.width, turned.width)
    query = tape.join([passed, turned], per_token(width * heads * layer.head_dim), width)
    key, value = _expanded(block, latent, shared, roles["kv_b"], layer, rope)
    return query, key, value, wide, narrow, latent, turned, shared, *others


def _queries(block: Linears, x: Tensor, roles: Roles) -> Tensor:
    """One matrix, or two with a norm between them."""
    if "q" in roles:
        return block.linear(x, roles["q"])
    narrow = block.linear(x, roles["q_a"])
    normed = block.norm(narrow, roles["q_a"].out_features, "rmsnorm")
    block.tape.hold(narrow)
    return block.linear(normed, roles["q_b"])


def _expanded(
    block: Linears, latent: Tensor, shared: Tensor, matrix: Matrix, layer: LayerSpec, rope: int
) -> tuple[Tensor, Tensor]:
    """Key and value out of the latent; both parts of the key are copied into one empty tensor.

    The backward of such a copy makes the whole gradient anew, and a copy of the part
    (torch/csrc/autograd/functions/tensor.cpp, CopySlices).
    """
    tape, heads = block.tape, layer.num_heads
    wide = block.linear(latent, matrix)
    by_head = tape.part(wide, wide.size)
    plain = tape.split(by_head, per_token(wide.width * heads * (layer.head_dim - rope)))
    value = tape.split(by_head, per_token(wide.width * heads * layer.value_head_dim))
    # One head's slice, seen by all heads: its gradients are summed.
    everywhere = tape.part(shared, per_token(shared.width * heads * rope))
    size, slice_size = per_token(wide.width * heads * layer.head_dim), per_token(wide.width * heads * rope)
    begun = tape.run([plain], ZERO, wide.width, grad_temp=size)
    begun.grad_size = size
    key = tape.run([begun, everywhere], size, wide.width, grad_temp=slice_size)
    return key, value


def _interleaved(
    block: Linears, query: Tensor, key: Tensor, width_q: float, width_k: float
) -> tuple[Tensor, ...]:
    """DeepSeek-V3's: even and odd elements apart; the tables have the stream's width."""
    return tuple(_turned(block, x, n) for x, n in ((query, width_q), (key, width_k)))


def _turned(block: Linears, x: Tensor, num_elements: float) -> Tensor:
    """Both halves, four products and two sums, joined; the backward spreads either half over a whole slice."""
    width = max(x.width, block.recipe.stream)
    size = per_token(width * num_elements)
    if block.recipe.fused:
        return block.tape.run([x], size, width)
    grad_temp = per_token((x.width + width / 2) * num_elements)
    return block.tape.run([x], size, width, temp=size, grad_temp=grad_temp)


def _complex(
    block: Linears, query: Tensor, key: Tensor, width_q: float, width_k: float
) -> tuple[Tensor, ...]:
    """DeepSeek-V2's: float32 pairs as complex numbers, times the positions' phases."""
    pairs = ((query, width_q), (key, width_k))
    wide = [block.cast(x, FULL_WIDTH, n) for x, n in pairs]
    turned = [_multiplied(block.tape, full, x.width, n) for full, (x, n) in zip(wide, pairs, strict=True)]
    block.tape.hold(*wide)
    return tuple(turned)


def _multiplied(tape: Tape, full: Tensor, width: int, num_elements: float) -> Tensor:
    product = tape.run([full], per_token(FULL_WIDTH * num_elements), FULL_WIDTH)
    return product if width == FULL_WIDTH else tape.run([product], per_token(width * num_elements), width)


_ROTARY: dict[str, Rotary] = {"interleaved": _interleaved, "complex": _complex}
"""By LayerSpec's `rotary`."""
