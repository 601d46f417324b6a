"""Attention kernels as the operations that torch runs for them (see planner.tape).

Each takes query, key and value in `width` bytes per element and returns the context that the output projection
reads. `sdpa_kernel` chooses as CUDA does (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
"""

from __future__ import annotations

from collections.abc import Callable

from planner.specs import LayerSpec
from planner.tape import FULL_WIDTH, ZERO, Size, Tape, Tensor, per_token

MAX_FLASH_HEAD_DIM = 256

Kernel = Callable[[Tape, Tensor, Tensor, Tensor, LayerSpec, int], Tensor]


def sdpa_kernel(layer: LayerSpec, width: int, *, is_masked: bool, has_flash: bool) -> Kernel:
    """The kernel behind scaled_dot_product_attention.

    Flash takes neither masks, nor float32, nor heads above 256, nor cards before Ampere. transformers hands
    grouped heads over as they are where there is no mask (integrations/sdpa_attention.py, use_gqa_in_sdpa), and
    the memory-efficient kernel takes none: then plain matrix products are left, as for a single head that the
    model broadcasts.
    """
    is_grouped = layer.num_kv_heads != layer.num_heads
    if is_grouped and not layer.hands_over_groups:
        return plain_products
    fits_flash = layer.head_dim == layer.value_head_dim <= MAX_FLASH_HEAD_DIM and not is_masked
    if fits_flash and width < FULL_WIDTH and has_flash:
        return flash
    if fits_flash and is_grouped:
        return plain_products
    return masked_efficient if is_masked else efficient


def flash(tape: Tape, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, width: int) -> Tensor:
    """FlashAttention 2. Its backward holds a float32 query gradient, and key/value gradients for every head."""
    heads = layer.num_heads
    temp = FULL_WIDTH * heads * (layer.head_dim + 1)
    if layer.num_kv_heads != heads:
        temp += width * heads * (layer.head_dim + layer.value_head_dim)
    return _saving_all(tape, (query, key, value), layer, width, per_token(temp))


def on_cpu(tape: Tape, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, width: int) -> Tensor:
    """The CPU's flash attention: the same tensors are saved, nothing is held beside them."""
    return _saving_all(tape, (query, key, value), layer, width, ZERO)


def efficient(tape: Tape, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, width: int) -> Tensor:
    """The memory-efficient kernel; in 16 bits its backward holds a float32 query gradient."""
    key, value = repeated(tape, key, value, layer, width)
    return _saving_all(tape, (query, key, value), layer, width, _efficient_temp(layer, width))


def masked_efficient(
    tape: Tape, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, width: int
) -> Tensor:
    """The same with a mask, which becomes an additive one of its own in each layer (attention.cpp)."""
    key, value = repeated(tape, key, value, layer, width)
    mask = tape.run([], (0.0, 0.0, width), width)
    return _saving_all(tape, (query, key, value, mask), layer, width, _efficient_temp(layer, width))


def plain_products(
    tape: Tape, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, width: int
) -> Tensor:
    """The math fallback, in float32 whatever the inputs are (attention.cpp, _scaled_dot_product_attention_math)."""
    heads = layer.num_heads
    wide, scores = per_token(FULL_WIDTH * heads * layer.head_dim), _scores(layer, FULL_WIDTH)
    key, value = repeated(tape, key, value, layer, FULL_WIDTH)
    query, key = (tape.run([t], wide, FULL_WIDTH) for t in (query, key))
    weights = tape.run([query, key], scores, FULL_WIDTH, saves=[query, key])
    weights = tape.run([weights], scores, FULL_WIDTH, saves_output=True)
    out = per_token(FULL_WIDTH * heads * layer.value_head_dim)
    context = tape.run([weights, value], out, FULL_WIDTH, saves=[weights, value])
    return tape.run([context], per_token(width * heads * layer.value_head_dim), width)


def eager(tape: Tape, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, width: int) -> Tensor:
    """transformers' eager_attention_forward: scores, scale, mask, float32 softmax, product, contiguous copy."""
    scores = _scores(layer, width)
    key, value = repeated(tape, key, value, layer, width)
    weights = tape.run([query, key], scores, width, saves=[query, key])
    scaled = tape.run([weights], scores, width)
    if layer.scores == "capped":
        scaled = tape.run([scaled], scores, width)
        scaled = tape.run([scaled], scores, width, saves_output=True)
        scaled = tape.run([scaled], scores, width)
    masked = tape.run([scaled], scores, width, shares_grad=True)
    weights = _softmax(tape, masked, layer, width)
    tape.hold(masked)
    out = per_token(width * layer.num_heads * layer.value_head_dim)
    context = tape.run([weights, value], out, width, saves=[weights, value])
    context = tape.run([context], out, width)
    tape.hold(weights)
    return context


def _softmax(tape: Tape, masked: Tensor, layer: LayerSpec, width: int) -> Tensor:
    """In float32 and narrowed; or in 16 bits over a copy with the sinks, shifted by the largest score."""
    if layer.scores == "sinks":
        joined = tape.run([masked], masked.size, width)
        shifted = tape.run([joined], masked.size, width, shares_grad=True)
        return tape.run([shifted], masked.size, width, saves_output=True)
    full = _scores(layer, FULL_WIDTH)
    wide = masked if width == FULL_WIDTH else tape.run([masked], full, FULL_WIDTH)
    weights = tape.run([wide], full, FULL_WIDTH, saves_output=True)
    return weights if width == FULL_WIDTH else tape.run([weights], _scores(layer, width), width)


def _scores(layer: LayerSpec, width: int) -> Size:
    return (0.0, 0.0, width * layer.num_heads)


def _efficient_temp(layer: LayerSpec, width: int) -> Size:
    accumulator = layer.head_dim if width < FULL_WIDTH else 0
    return per_token(FULL_WIDTH * layer.num_heads * (1 + accumulator))


def _saving_all(
    tape: Tape, inputs: tuple[Tensor, ...], layer: LayerSpec, width: int, grad_temp: Size
) -> Tensor:
    """Everything that goes in is saved, and the output with a float32 log-sum per head and token."""
    out = per_token(width * layer.num_heads * layer.value_head_dim + FULL_WIDTH * layer.num_heads)
    return tape.run(inputs, out, width, saves=inputs, saves_output=True, grad_temp=grad_temp)


def repeated(tape: Tape, key: Tensor, value: Tensor, layer: LayerSpec, width: int) -> tuple[Tensor, Tensor]:
    """Grouped heads copied out to as many as the queries have."""
    if layer.num_kv_heads == layer.num_heads:
        return key, value
    wide_key = per_token(width * layer.num_heads * layer.head_dim)
    wide_value = per_token(width * layer.num_heads * layer.value_head_dim)
    return tape.run([key], wide_key, width), tape.run([value], wide_value, width)
