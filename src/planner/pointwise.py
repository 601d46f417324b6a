"""Norms and activations as the operations that torch runs for them (see planner.tape), by the names in LayerSpec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from planner.tape import FULL_WIDTH, ZERO, Size, Tape, Tensor, constant, per_token


@dataclass(frozen=True, kw_only=True, slots=True)
class Norm:
    """A norm over `groups` groups that have `num_elements` elements together, per token.

    `weight_width`: bytes per element of its weight, which trains where `is_trained`; `autocast` makes torch's own
    LayerNorm run in float32; `is_fused`: one kernel that saves its input only; `is_own`: finefit's, of plain RMSNorms.
    """

    kind: str
    num_elements: int
    groups: int = 1
    weight_width: int
    is_trained: bool
    autocast: bool
    is_fused: bool
    is_own: bool = False

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        """The normalised x, in x's width unless the weight is wider."""
        if self.is_fused:
            return _fused(self, tape, x)
        if self.is_own and self.kind == "rmsnorm":
            return _own(self, tape, x)
        return _NORMS[self.kind](self, tape, x)

    def size(self, width: int) -> Size:
        """One tensor like x with `width` bytes per element."""
        return per_token(width * self.num_elements)

    def statistic(self) -> Size:
        """One float32 per token and group."""
        return per_token(FULL_WIDTH * self.groups)

    def weight_grad(self, num_vectors: int = 1) -> Size:
        """The gradient of weight and bias."""
        elements = num_vectors * self.num_elements // self.groups
        return constant(elements * self.weight_width) if self.is_trained else ZERO


def cast(tape: Tape, x: Tensor, width: int, num_elements: float) -> Tensor:
    """x.to(dtype): nothing where it has that width already."""
    if x.width == width:
        return x
    return tape.run([x], per_token(width * num_elements), width, category=x.category)


def _rms_norm(norm: Norm, tape: Tape, x: Tensor) -> Tensor:
    """Llama's RMSNorm: float32 inside, narrowed before the weight."""
    normed = cast(tape, _rms_normed(norm, tape, x), x.width, norm.num_elements)
    width = max(x.width, norm.weight_width)
    return _weighted(norm, tape, normed, width)


def _wide_rms_norm(norm: Norm, tape: Tape, x: Tensor) -> Tensor:
    """Gemma's and OLMo 2's: narrowed after the weight."""
    out = _weighted(norm, tape, _rms_normed(norm, tape, x), FULL_WIDTH)
    return cast(tape, out, x.width, norm.num_elements)


def _t5_norm(norm: Norm, tape: Tape, x: Tensor) -> Tensor:
    """T5's: the variance in float32, of a copy; what is multiplied by it is the input itself."""
    full, wide = cast(tape, x, FULL_WIDTH, norm.num_elements), norm.size(FULL_WIDTH)
    thrice = norm.size(3 * FULL_WIDTH)
    scale = tape.run([full], norm.statistic(), FULL_WIDTH, saves=[full], temp=wide, grad_temp=thrice)
    normed = tape.run([x, scale], wide, FULL_WIDTH, saves=[x, scale], grad_temp=wide)
    narrow = cast(tape, normed, norm.weight_width, norm.num_elements)
    return _weighted(norm, tape, narrow, norm.weight_width)


def _rms_normed(norm: Norm, tape: Tape, x: Tensor) -> Tensor:
    """The square's backward holds three tensors: the mean's gradient, the power below, and its multiple."""
    full, wide = cast(tape, x, FULL_WIDTH, norm.num_elements), norm.size(FULL_WIDTH)
    thrice = norm.size(3 * FULL_WIDTH)
    scale = tape.run([full], norm.statistic(), FULL_WIDTH, saves=[full], temp=wide, grad_temp=thrice)
    return tape.run([full, scale], wide, FULL_WIDTH, saves=[full, scale], grad_temp=wide)


def _weighted(norm: Norm, tape: Tape, normed: Tensor, width: int) -> Tensor:
    saves = [normed] if norm.is_trained else []
    grad = norm.weight_grad()
    return tape.run([normed], norm.size(width), width, saves=saves, saves_weight=True, weight_grad=grad)


def _layer_norm(norm: Norm, tape: Tape, x: Tensor) -> Tensor:
    """torch's LayerNorm saves its input, a mean and a deviation."""
    if norm.autocast:
        x = cast(tape, x, FULL_WIDTH, norm.num_elements)
    size = per_token(x.width * norm.num_elements + 2 * FULL_WIDTH * norm.groups)
    return tape.run([x], size, x.width, saves=[x], weight_grad=norm.weight_grad(2))


def _plain_layer_norm(norm: Norm, tape: Tape, x: Tensor) -> Tensor:
    """OLMo's: torch's LayerNorm without a weight, on a float32 copy."""
    full = cast(tape, x, FULL_WIDTH, norm.num_elements)
    out = tape.run([full], norm.size(FULL_WIDTH), FULL_WIDTH, saves=[full])
    return cast(tape, out, x.width, norm.num_elements)


def _wide_layer_norm(norm: Norm, tape: Tape, x: Tensor) -> Tensor:
    """Cohere's: mean and variance by hand in float32, the difference from the mean twice; narrowed at the end."""
    full, wide = cast(tape, x, FULL_WIDTH, norm.num_elements), norm.size(FULL_WIDTH)
    squared = tape.run([full], wide, FULL_WIDTH)
    scale = tape.run([squared], norm.statistic(), FULL_WIDTH, saves=[squared], temp=wide, grad_temp=wide)
    centred = tape.run([full], wide, FULL_WIDTH)
    normed = tape.run([centred, scale], wide, FULL_WIDTH, saves=[centred, scale])
    return cast(tape, _weighted(norm, tape, normed, FULL_WIDTH), x.width, norm.num_elements)


def _fused(norm: Norm, tape: Tape, x: Tensor) -> Tensor:
    size = per_token(x.width * norm.num_elements + FULL_WIDTH * norm.groups)
    return tape.run([x], size, x.width, saves=[x], weight_grad=norm.weight_grad())


def _own(norm: Norm, tape: Tape, x: Tensor) -> Tensor:
    """bench.fused.RootMeanSquareNorm: saves its input and a float32 factor per token.

    The forward holds a float32 copy of a 16-bit x and its multiple, then the latter in 16 bits and the result. The
    backward the product with x that is summed, and where the weight trains what its gradient is summed of.
    """
    width, is_narrow = max(x.width, norm.weight_width), x.width < FULL_WIDTH
    squares = FULL_WIDTH * (2 if is_narrow else 1)
    factor = tape.run([x], norm.statistic(), FULL_WIDTH, temp=norm.size(squares))
    factor.needs_grad = False
    narrowed = squares + x.width - width if is_narrow else 0
    sums = width + (x.width if norm.is_trained else 0)
    scaled = squares + x.width - width if norm.is_trained and is_narrow else 0
    return tape.run(
        [x, factor],
        norm.size(width),
        width,
        saves=[x, factor],
        temp=norm.size(max(FULL_WIDTH, narrowed)),
        grad_temp=norm.size(max(sums, scaled)),
        weight_grad=norm.weight_grad(),
    )


_NORMS: dict[str, Callable[[Norm, Tape, Tensor], Tensor]] = {
    "rmsnorm": _rms_norm,
    "rmsnorm-wide": _wide_rms_norm,
    "rmsnorm-t5": _t5_norm,
    "layernorm": _layer_norm,
    "layernorm-plain": _plain_layer_norm,
    "layernorm-wide": _wide_layer_norm,
}


def activation(
    tape: Tape, x: Tensor, num_elements: float, name: str, *, autocast: bool, is_recomputed: bool = False
) -> Tensor:
    """An activation function by its name in transformers' ACT2FN; one kernel that saves its input unless listed.

    `is_recomputed`: a checkpoint's.
    """
    size = per_token(x.width * num_elements)
    if name in _SAVE_OUTPUT:
        return tape.run([x], size, x.width, saves_output=True)
    if name == CLAMPED_SILU:
        return _clamped_silu(tape, x, size)
    if name in _COMPOSED_GELU:
        width = FULL_WIDTH if autocast else x.width
        return _composed_gelu(tape, x, num_elements, width, is_recomputed=is_recomputed)
    return tape.run([x], size, x.width, saves=[x])


CLAMPED_SILU = "clamped-silu"
"""Gpt-oss': the name is finefit's own, since its config.json says silu."""
_SAVE_OUTPUT = ("relu", "tanh", "sigmoid")
_COMPOSED_GELU = ("gelu_new", "gelu_fast")


def _clamped_silu(tape: Tape, x: Tensor, size: Size) -> Tensor:
    """Clamped, then multiplied by the sigmoid of its multiple, a tensor for each step."""
    clamped = tape.run([x], size, x.width, saves=[x])
    scaled = tape.run([clamped], size, x.width)
    sigmoid = tape.run([scaled], size, x.width, saves_output=True)
    return tape.run([clamped, sigmoid], size, x.width, saves=[clamped, sigmoid])


def _composed_gelu(tape: Tape, x: Tensor, num_elements: float, width: int, *, is_recomputed: bool) -> Tensor:
    """transformers' NewGELUActivation: 0.5 x (1 + tanh(c (x + 0.044715 x^3))), a tensor for each step, 0.5 x first.

    Under autocast the power is computed in float32, and all that follows it.
    """
    size = per_token(width * num_elements)
    half = tape.run([x], per_token(x.width * num_elements), x.width)
    base = cast(tape, x, width, num_elements)
    cube = tape.run([base], size, width, saves=[base])
    scaled = tape.run([cube], size, width)
    inner = tape.run([x, scaled], size, width, shares_grad=True)
    inner = tape.run([inner], size, width)
    tanh = tape.run([inner], size, width, saves_output=True)
    plus = tape.run([tanh], size, width, shares_grad=True)
    # The gradient of 0.5 x is as wide as the result until autograd narrows it, beside what the product saved;
    # a checkpoint has let go of that by then.
    wide = per_token((width - half.width) * num_elements)
    widened = wide if is_recomputed or half.width == width else size
    return tape.run([half, plus], size, width, saves=[half, plus], grad_temp=widened)
