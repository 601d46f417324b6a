"""Attention kernels as the operations that torch runs for them (see planner.tape).

Each takes query, key and value and returns the context that the output projection
reads. `sdpa_kernel` chooses as CUDA does (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from planner.operations import ATTENTION, Product
from planner.specs import LayerSpec
from planner.tape import FULL_WIDTH, ZERO, Size, Tape, Tensor, add, per_pair, per_square, per_token, scale

MAX_FLASH_HEAD_DIM = 256
FUSED_BACKWARD = 2.5
"""Products of a fused kernel's backward over those of its forward: five for two, since it makes the scores again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Widths in bytes: `compute` that autocast narrows to (0: operands stay as they are), `mask` of an additive mask.

    `is_float16`: a softmax that is asked for float32 widens inside the kernel (SoftMax.cpp). `drops`: weights are dropped.
    `reach`: keys over queries. `is_single`: one row, whose heads a product takes as they lie; those of several rows it copies together.
    """

    compute: int = 0
    mask: int = 2
    is_float16: bool = False
    drops: bool = False
    is_single: bool = False
    reach: float = 1.0


Kernel = Callable[[Tape, Tensor, Tensor, Tensor, LayerSpec, Precision], Tensor]


def sdpa_kernel(layer: LayerSpec, width: int, *, is_masked: bool, has_flash: bool) -> Kernel:
    """The kernel behind scaled_dot_product_attention.

    Flash takes neither masks, nor float32, nor heads above 256, nor cards before Ampere. transformers hands
    grouped heads over as they are where there is no mask (integrations/sdpa_attention.py, use_gqa_in_sdpa), and
    the memory-efficient kernel takes none: then plain matrix products are left, as for a single head that the
    model broadcasts.
    """
    is_grouped = layer.num_kv_heads != layer.num_heads
    if is_grouped and not layer.hands_over_groups:
        return masked_products if is_masked else plain_products
    fits_flash = layer.head_dim == layer.value_head_dim <= MAX_FLASH_HEAD_DIM and not is_masked
    if fits_flash and width < FULL_WIDTH and has_flash:
        return flash
    if fits_flash and is_grouped:
        return plain_products
    return masked_efficient if is_masked else efficient


def flash(tape: Tape, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, how: Precision) -> Tensor:
    """FlashAttention 2."""
    return saving_all(tape, (query, key, value), layer, flash_temp(layer, query.width))


def flash_temp(layer: LayerSpec, width: int, held_rows: float = 1.0) -> Size:
    """What its backward holds: a float32 query gradient and row sums, of `held_rows` for each token, and key/value
    gradients for every head."""
    heads, multiple = layer.num_heads, 32 if layer.head_dim <= 128 else 64
    # the gradient's columns (csrc/flash_attn/flash_api.cpp, mha_bwd)
    columns = -(-layer.head_dim // multiple) * multiple
    temp = FULL_WIDTH * heads * (columns + 1) * held_rows
    if layer.num_kv_heads != heads:
        temp += width * heads * (layer.head_dim + layer.value_head_dim)
    return per_token(temp)


def efficient(
    tape: Tape, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, how: Precision
) -> Tensor:
    """The memory-efficient kernel; in 16 bits its backward holds a float32 query gradient."""
    key, value = repeated(tape, key, value, layer)
    return saving_all(tape, (query, key, value), layer, efficient_temp(layer, query.width))


def masked_efficient(
    tape: Tape, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, how: Precision
) -> Tensor:
    """The same with a mask, which becomes an additive one of its own in each layer (attention.cpp)."""
    key, value = repeated(tape, key, value, layer)
    mask = tape.run([], scale(per_pair(query.width), how.reach), query.width)
    return saving_all(tape, (query, key, value, mask), layer, efficient_temp(layer, query.width))


def plain_products(
    tape: Tape, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, how: Precision
) -> Tensor:
    """The math fallback, in float32 whatever the inputs are (attention.cpp, _scaled_dot_product_attention_math).

    Without a mask it makes a causal one.
    """
    return _products(tape, query, key, value, layer, how, per_square(FULL_WIDTH))


def masked_products(
    tape: Tape, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, how: Precision
) -> Tensor:
    """The same with a mask."""
    return _products(tape, query, key, value, layer, how, scale(per_pair(query.width), how.reach))


def _products(
    tape: Tape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: LayerSpec,
    how: Precision,
    mask_size: Size,
) -> Tensor:
    given, scores = query.width, scale(_scores(layer, FULL_WIDTH), how.reach)
    held = query, key, value
    query, key, value = (_widened(tape, t) for t in held)
    scaled = query = tape.run([query], query.gradient, FULL_WIDTH)
    mask = tape.run([], mask_size, FULL_WIDTH)
    mask.needs_grad = False
    key, value = expanded = repeated(tape, key, value, layer, copies=True)
    key = tape.run([key], key.gradient, FULL_WIDTH)
    if not how.is_single:
        # A product takes heads that lie beside each other, not tokens.
        query = _copy(tape, query)
        key, value = (t if layer.num_kv_heads != layer.num_heads else _copy(tape, t) for t in (key, value))
    weights = tape.run([query, key], scores, FULL_WIDTH, saves=[query, key], product=_scoring(layer))
    # _safe_softmax: a plain softmax and where scores are infinite, beside the result.
    extra = scale(scores, 1 + 1 / FULL_WIDTH)
    weights = tape.run([weights], scores, FULL_WIDTH, saves_output=True, temp=extra)
    weights = _dropped(tape, weights) if how.drops else weights
    out = per_token(FULL_WIDTH * layer.num_heads * layer.value_head_dim)
    returned = tape.run([weights], scale(scores, given / FULL_WIDTH) if given < FULL_WIDTH else ZERO, given)
    returned.needs_grad = False
    context = tape.run([weights, value], out, FULL_WIDTH, saves=[weights, value], product=_weighing(layer))
    tape.hold(*held, *expanded, scaled, mask, returned)
    if given == FULL_WIDTH:
        return context
    return tape.run([context], per_token(given * layer.num_heads * layer.value_head_dim), given)


def eager(tape: Tape, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, how: Precision) -> Tensor:
    """transformers' eager_attention_forward: scores, scale, mask, float32 softmax, product, contiguous copy."""
    given = query.width
    key, value = repeated(tape, key, value, layer)
    held = query, key, value
    scaled = _scaled(tape, *_operands(tape, (query, key), layer, how), layer)
    masked = _masked(tape, scaled, layer, how)
    weights = _softmax(tape, masked, layer, given, how)
    tape.hold(masked)
    return _context(tape, weights, value, layer, how, held)


def sinks_eager(
    tape: Tape, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, how: Precision
) -> Tensor:
    """gpt-oss': a softmax over the scores and a sink, in the scores' own dtype."""
    given = value.width
    key, value = repeated(tape, key, value, layer)
    held = query, key, value
    scaled = _scaled(tape, *_operands(tape, (query, key), layer, how), layer)
    weights, named = _with_sinks(tape, _masked(tape, scaled, layer, how), layer, given)
    return _context(tape, weights, value, layer, how, (*held, *named))


def own_eager(
    tape: Tape, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, how: Precision
) -> Tensor:
    """GPT-2's: the softmax in the scores' own dtype, which autocast makes float32."""
    held = query, key, value
    scaled = _scaled(tape, *_operands(tape, (query, key), layer, how), layer)
    masked = _masked(tape, scaled, layer, how)
    weights = _own_softmax(tape, masked, layer, value.width, how)
    return _context(tape, weights, value, layer, how, held)


def unnarrowed_eager(
    tape: Tape, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, how: Precision
) -> Tensor:
    """BERT's and BART's: the same, and what autocast makes float32 stays that until the product with the values."""
    held = query, key, value
    scaled = _scaled(tape, *_operands(tape, (query, key), layer, how), layer)
    masked = _masked(tape, scaled, layer, how)
    weights = _own_softmax(tape, masked, layer, FULL_WIDTH if how.compute else masked.width, how)
    return _context(tape, weights, value, layer, how, held)


def wide_eager(
    tape: Tape, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, how: Precision
) -> Tensor:
    """GPT-J's: queries and keys, and so scores, in float32."""
    held = query, key, value
    wide = [_widened(tape, t) for t in (query, key)]
    scaled = _scaled(tape, *_operands(tape, (wide[0], wide[1]), layer, how), layer)
    masked = _masked(tape, scaled, layer, how)
    weights = _own_softmax(tape, masked, layer, value.width, how)
    return _context(tape, weights, value, layer, how, (*wide, *held))


def alibi_eager(
    tape: Tape, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, how: Precision
) -> Tensor:
    """BLOOM's: baddbmm adds the distances and scales, in one product."""
    given = query.width
    parts = query, key, value
    query, key, value = (_joined(tape, t, how) for t in parts)
    held = (*parts, query, key, value)
    operands = _operands(tape, (query, key), layer, how)
    scores = _scores(layer, operands[0].width)
    scaled = tape.run(list(operands), scores, operands[0].width, saves=operands, product=_scoring(layer))
    masked = _masked(tape, scaled, layer, how)
    tape.hold(scaled)
    weights = _softmax(tape, masked, layer, given, how)
    tape.variables += (scaled, masked, *held)
    return _context(tape, weights, value, layer, how, held)


def falcon_eager(
    tape: Tape, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, how: Precision
) -> Tensor:
    """Falcon's: scores scaled in place, the masked ones in the softmax' argument, a softmax in the layer's dtype."""
    held = query, key, value
    key, value = repeated(tape, key, value, layer)
    operands = _operands(tape, (query, key), layer, how)
    width = operands[0].width
    scores = tape.run(list(operands), _scores(layer, width), width, saves=operands, product=_scoring(layer))
    masked = _masked(tape, scores, layer, how)
    out = max(how.mask, FULL_WIDTH if how.compute else 0)
    wide = masked
    if masked.width < out and not how.is_float16:
        wide = tape.run([masked], _scores(layer, out), out)
    weights = tape.run([wide], _scores(layer, out), out, saves_output=True)
    tape.hold(masked, scores)
    return _context(tape, weights, value, layer, how, held)


def biased_eager(
    tape: Tape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: LayerSpec,
    how: Precision,
    bias: Tensor,
) -> Tensor:
    """T5's: a learned bias is added to the scores before the mask, and the softmax is in their own dtype."""
    held = query, key, value
    scaled = _scaled(tape, *_operands(tape, (query, key), layer, how), layer)
    width = max(scaled.width, bias.width)
    # The bias' gradient is the scores' summed over rows.
    biased = tape.run([scaled, bias], _scores(layer, width), width, shares_grad=True)
    masked = _masked(tape, biased, layer, how)
    weights = _own_softmax(tape, masked, layer, FULL_WIDTH if how.compute else masked.width, how)
    return _context(tape, weights, value, layer, how, held)


UNGROUPED = (efficient, masked_efficient)
"""Kernels that are given a key and a value for each query head."""

EAGER: dict[str, Kernel] = {
    "plain": eager,
    "capped": eager,
    "sinks": sinks_eager,
    "own": own_eager,
    "wide": wide_eager,
    "unnarrowed": unnarrowed_eager,
    "alibi": alibi_eager,
    "falcon": falcon_eager,
}
"""transformers' eager attention by LayerSpec's `scores`."""


def _operands(
    tape: Tape, pair: tuple[Tensor, Tensor], layer: LayerSpec, how: Precision
) -> tuple[Tensor, Tensor]:
    """Two tensors as a product takes them: narrowed by autocast, the heads of several rows' parts copied together."""
    first, second = (_joined(tape, _narrowed(tape, t, how), how) for t in pair)
    return first, second


def _joined(tape: Tape, x: Tensor, how: Precision) -> Tensor:
    return x if x.base is None or how.is_single else _copy(tape, x)


def _copy(tape: Tape, x: Tensor) -> Tensor:
    return tape.run([x], x.gradient, x.width, shares_grad=True)


def _scaled(tape: Tape, query: Tensor, key: Tensor, layer: LayerSpec) -> Tensor:
    width = query.width
    scores = _scores(layer, width)
    weights = tape.run([query, key], scores, width, saves=[query, key], product=_scoring(layer))
    scaled = tape.run([weights], scores, width)
    if layer.scores == "capped":
        scaled = tape.run([scaled], scores, width)
        scaled = tape.run([scaled], scores, width, saves_output=True)
        scaled = tape.run([scaled], scores, width)
    return scaled


def _masked(tape: Tape, scaled: Tensor, layer: LayerSpec, how: Precision) -> Tensor:
    if not layer.causal:
        return scaled
    width = max(scaled.width, how.mask)
    return tape.run([scaled], _scores(layer, width), width, shares_grad=True)


def _context(
    tape: Tape,
    weights: Tensor,
    value: Tensor,
    layer: LayerSpec,
    how: Precision,
    held: tuple[Tensor, ...],
) -> Tensor:
    """Weights, dropped, times values, copied into the tokens' order.

    `held` are the function's variables; the weights are returned, and the layer holds them.
    """
    given = weights
    weights = _dropped(tape, weights) if how.drops else weights
    operand, value = _operands(tape, (weights, value), layer, how)
    out = per_token(operand.width * layer.num_heads * layer.value_head_dim)
    context = tape.run([operand, value], out, operand.width, saves=[operand, value], product=_weighing(layer))
    copied = tape.run([context], out, operand.width)
    tape.hold(*held)
    tape.hold_to_end(weights if how.drops else given)
    return copied


def _with_sinks(
    tape: Tape, masked: Tensor, layer: LayerSpec, given: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """In the scores' dtype over a copy with a column of sinks, shifted by the largest score; narrowed to `given` bytes.

    The masked scores give their name to the weights; the shifted ones and the softmax keep theirs.
    """
    size = add(masked.size, per_token(masked.width * layer.num_heads))
    joined = tape.run([masked], size, masked.width)
    shifted = tape.run([joined], size, masked.width, shares_grad=True)
    weights = tape.run([shifted], size, masked.width, saves_output=True)
    held = shifted, weights
    if masked.width != given:
        weights = tape.run([weights], _scores(layer, given), given)
    tape.hold(masked)
    return weights, held


def _softmax(tape: Tape, masked: Tensor, layer: LayerSpec, given: int, how: Precision) -> Tensor:
    """In float32, and narrowed to `given` bytes."""
    weights = _wide_softmax(tape, masked, layer, how)
    return weights if given == FULL_WIDTH else tape.run([weights], _scores(layer, given), given)


def _wide_softmax(tape: Tape, masked: Tensor, layer: LayerSpec, how: Precision) -> Tensor:
    full = _scores(layer, FULL_WIDTH)
    is_wide = masked.width == FULL_WIDTH or how.is_float16
    wide = masked if is_wide else tape.run([masked], full, FULL_WIDTH)
    return tape.run([wide], full, FULL_WIDTH, saves_output=True)


def _own_softmax(tape: Tape, masked: Tensor, layer: LayerSpec, given: int, how: Precision) -> Tensor:
    """In the scores' dtype, which autocast makes float32; narrowed to `given` bytes once the scores' name is taken."""
    if not how.compute:
        weights = tape.run([masked], masked.size, masked.width, saves_output=True)
        tape.hold(masked)
        return weights if weights.width == given else tape.run([weights], _scores(layer, given), given)
    weights = _wide_softmax(tape, masked, layer, how)
    tape.hold(masked)
    return weights if given == FULL_WIDTH else tape.run([weights], _scores(layer, given), given)


def _dropped(tape: Tape, weights: Tensor) -> Tensor:
    """A mask of one byte per weight, and a copy."""
    mask = tape.run([], scale(weights.size, 1 / weights.width), 1)
    mask.needs_grad = False
    return tape.run([weights, mask], weights.size, weights.width, saves=[mask])


def _narrowed(tape: Tape, x: Tensor, how: Precision) -> Tensor:
    """x as a product takes it under autocast."""
    if how.compute in (0, x.width):
        return x
    return tape.run([x], _sized(x, how.compute), how.compute)


def _widened(tape: Tape, x: Tensor) -> Tensor:
    return x if x.width == FULL_WIDTH else tape.run([x], _sized(x, FULL_WIDTH), FULL_WIDTH)


def _sized(x: Tensor, width: int) -> Size:
    a, b, c, d = (part * width / x.width for part in x.gradient)
    return (a, b, c, d)


def _scores(layer: LayerSpec, width: int) -> Size:
    return per_pair(width * layer.num_heads)


def efficient_temp(layer: LayerSpec, width: int) -> Size:
    """What the memory-efficient kernel's backward holds: row sums, and in 16 bits a float32 query gradient."""
    accumulator = layer.head_dim if width < FULL_WIDTH else 0
    return per_token(FULL_WIDTH * layer.num_heads * (1 + accumulator))


def saving_all(
    tape: Tape, inputs: tuple[Tensor, ...], layer: LayerSpec, temp: Size, keeps: bool = True
) -> Tensor:
    """Everything that goes in is saved, and what it `keeps`: the output with a float32 log-sum per head and token."""
    width, heads = inputs[0].width, layer.num_heads
    out = per_token(width * heads * layer.value_head_dim + FULL_WIDTH * heads * keeps)
    product = Product(
        flops=add(_scoring(layer).flops, _weighing(layer).flops),
        kind=ATTENTION,
        backward=FUSED_BACKWARD,
        skips=len(inputs) == len(("query", "key", "value")),
    )
    return tape.run(inputs, out, width, saves=inputs, saves_output=keeps, grad_temp=temp, product=product)


def _scoring(layer: LayerSpec) -> Product:
    """Queries times keys."""
    return Product(flops=per_pair(2.0 * layer.num_heads * layer.head_dim))


def _weighing(layer: LayerSpec) -> Product:
    """Weights times values."""
    return Product(flops=per_pair(2.0 * layer.num_heads * layer.value_head_dim))


def repeated(
    tape: Tape, key: Tensor, value: Tensor, layer: LayerSpec, *, copies: bool = False
) -> tuple[Tensor, Tensor]:
    """Grouped heads for all of the queries': copied out; a single one is a view (transformers' repeat_kv) unless `copies`."""
    if layer.num_kv_heads == layer.num_heads:
        return key, value
    wide_key, wide_value = (scale(t.gradient, layer.num_heads // layer.num_kv_heads) for t in (key, value))
    if layer.num_kv_heads == 1 and not copies:
        return tape.part(key, wide_key), tape.part(value, wide_value)
    return tape.run([key], wide_key, key.width), tape.run([value], wide_value, value.width)
