"""`kernels: fused`: autograd functions of plain torch that do with fewer passes over memory what a model's modules do.

A linear and its adapter are one function, those that read the same input are computed together; the norm and the rotary
embedding make no copies that their backward has to walk again. Modules are replaced only where they give what theirs
give, so a model of unknown parts keeps its own. T: tokens, I and O: a linear's widths, r: an adapter's rank.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bench.build import inner_model

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that read the same input, in the order in which they are called."""
_CLOSE = 1e-3


def fuse(model: nn.Module) -> None:
    """Replace the forwards of the model's modules that are known to do the same."""
    for module in list(model.modules()):
        if type(module).__name__.endswith("RMSNorm") and _is_norm(module):
            module.forward = _norm_forward(module)
        for names in _SIBLINGS:
            _join_siblings([getattr(module, name, None) for name in names])
        if _is_gated_mlp(module):
            module.forward = _mlp_forward(module)
    for module in model.modules():
        if _is_adapted(module) and "forward" not in vars(module):
            module.forward = _Siblings([module]).caller(0)
    _fuse_rotary(model)


def _is_adapted(module: Any) -> bool:
    """Whether it is PEFT's plain LoRA on a plain linear, without dropout; its adapter may be wider than the linear."""
    base: Any = getattr(module, "base_layer", None)
    names: Any = getattr(module, "active_adapters", ())
    if type(base) is not nn.Linear or len(names) != 1 or getattr(module, "lora_variant", True):
        return False
    (name,) = names
    down, up = module.lora_A[name], module.lora_B[name]
    is_plain = type(down) is type(up) is nn.Linear and up.bias is None and not base.weight.requires_grad
    is_wide = down.weight.dtype in (base.weight.dtype, torch.float32) and down.weight.dtype == up.weight.dtype
    return is_plain and is_wide and isinstance(module.lora_dropout[name], nn.Identity)


def _join_siblings(modules: Sequence[Any]) -> None:
    if all(_is_adapted(module) for module in modules):
        together = _Siblings(list(modules))
        for number, module in enumerate(modules):
            module.forward = together.caller(number)


@dataclass(eq=False)
class _Siblings:
    """Adapted linears that read one input: the first that is called computes all, the others hand theirs out."""

    modules: list[Any]
    read: torch.Tensor | None = None
    waiting: dict[int, torch.Tensor] = field(default_factory=dict)

    def caller(self, number: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The forward of one of them."""
        own = type(self.modules[number]).forward

        def forward(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            module = self.modules[number]
            if (
                args
                or options
                or module.disable_adapters
                or module.merged
                or torch.is_autocast_enabled(x.device.type)
            ):
                found: torch.Tensor = own(module, x, *args, **options)
                return found
            if self.read is not x or number not in self.waiting:
                self.read, self.waiting = x, dict(enumerate(self._compute(x)))
            found = self.waiting.pop(number)
            if not self.waiting:
                self.read = None
            return found

        return forward

    def _compute(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts: list[Any] = []
        for module in self.modules:
            (name,) = module.active_adapters
            base = module.base_layer
            down, up = module.lora_A[name].weight, module.lora_B[name].weight
            parts += [base.weight, base.bias, down, up, module.scaling[name]]
        found: tuple[torch.Tensor, ...] = AdaptedLinears.apply(x, *parts)
        return found


class AdaptedLinears(torch.autograd.Function):  # type: ignore[misc]
    """y = x W^T + b + s (x A^T) B^T of several frozen linears W [O, I] that read one x [..., I], with adapters
    A [r, I] and B [O, r], which may be wider: then all of theirs is computed in their dtype, and x widened for it.

    Adapters are added in place, and the gradients of x too. Only x, where an A trains, and x A^T are saved.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *parts: Any) -> tuple[torch.Tensor, ...]:
        """`parts`: W, b (None without), A, B and s of each. Returns each y [..., O]."""
        rows = x.reshape(-1, x.shape[-1])
        linears = [parts[at : at + 5] for at in range(0, len(parts), 5)]
        downs = torch.cat([down for _, _, down, _, _ in linears])
        inner = rows.to(downs.dtype) @ downs.T
        answers = []
        at = 0
        for weight, bias, down, up, scale in linears:
            answer = functional.linear(x, weight, bias)
            _add_product(answer.view(-1, len(weight)), inner[:, at : at + len(down)], up.T, scale)
            at += len(down)
            answers.append(answer)
        ctx.scales = [scale for *_, scale in linears]
        saved = rows if any(ctx.needs_input_grad[3::5]) else None
        ctx.save_for_backward(saved, inner, *(t for w, _, down, up, _ in linears for t in (w, down, up)))
        ctx.shape = x.shape
        return tuple(answers)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        """The gradients of x, and of each A and B."""
        rows, inner, *tensors = ctx.saved_tensors
        grads, found, at = [], [], 0
        grad_rows = None
        for number, (grad, scale) in enumerate(zip(grad_outputs, ctx.scales, strict=True)):
            weight, down, up = tensors[3 * number : 3 * number + 3]
            grad = grad.reshape(-1, grad.shape[-1])
            if ctx.needs_input_grad[0]:
                grad_rows = grad @ weight if grad_rows is None else grad_rows.addmm_(grad, weight)
            grad_part, grad_up = _through_up(grad, inner[:, at : at + len(down)], up, scale)
            at += len(down)
            grads.append(grad_part)
            found += [None, None, None, grad_up, None]
        grad_inner = torch.cat(grads, 1)
        downs = tensors[1::3]
        if rows is not None:
            grad_downs = grad_inner.T @ rows.to(grad_inner.dtype)
            found[2::5] = grad_downs.split([len(down) for down in downs])
        if grad_rows is not None:
            _add_product(grad_rows, grad_inner, torch.cat(downs), 1.0)
            grad_rows = grad_rows.view(ctx.shape)
        return (grad_rows, *found)


def _through_up(
    grad: torch.Tensor, inner: torch.Tensor, up: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `inner` [T, r] and of `up` [O, r], from that of s inner up^T."""
    grad = grad.to(up.dtype)
    return (grad @ up).mul_(scale), (grad.T @ inner).mul_(scale)


def _add_product(total: torch.Tensor, first: torch.Tensor, second: torch.Tensor, scale: float) -> None:
    """total += scale first second; rounded once where the factors are wider."""
    if total.dtype == first.dtype:
        total.addmm_(first, second, alpha=scale)
    else:
        total.copy_(total.to(first.dtype).addmm_(first, second, alpha=scale))


def _is_gated_mlp(module: Any) -> bool:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    act = getattr(module, "act_fn", None)
    if not all(isinstance(part, nn.Module) for part in parts) or len(list(module.children())) > 4:
        return False
    return isinstance(act, nn.SiLU) or type(act).__name__ == "SiLUActivation"


def _mlp_forward(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = module.down_proj(GatedSilu.apply(module.gate_proj(x), module.up_proj(x)))
        return found

    return forward


class GatedSilu(torch.autograd.Function):  # type: ignore[misc]
    """silu(gate) up, saving only the two."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Both [..., I]."""
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of both."""
        gate, up = ctx.saved_tensors
        (grad,) = grad_outputs
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, functional.silu(gate).mul_(grad)


def _is_norm(module: Any) -> bool:
    """Whether it scales each token to unit mean square, in float32, and then by its weight."""
    weight = getattr(module, "weight", None)
    if weight is None or getattr(module, "bias", None) is not None or _epsilon(module) is None:
        return False
    # tensors of the probe's own: the module's may have a shape only
    x = torch.linspace(-3, 5, 4 * weight.numel(), dtype=weight.dtype).view(4, -1)
    probe = torch.linspace(-2, 2, weight.numel(), dtype=weight.dtype)
    with torch.no_grad():
        expected = torch.func.functional_call(module, {"weight": probe}, (x,))
        found = RootMeanSquareNorm.apply(x, probe, _epsilon(module))
    return bool(torch.equal(expected, found))


def _epsilon(module: Any) -> float | None:
    found = (getattr(module, name, None) for name in ("variance_epsilon", "eps", "epsilon"))
    return next((value for value in found if isinstance(value, float)), None)


def _norm_forward(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    epsilon = _epsilon(module)

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight = module.weight
        if is_on_cuda(x) and x.dtype == weight.dtype:
            return cuda_norm(x, weight, epsilon)
        found: torch.Tensor = RootMeanSquareNorm.apply(x, weight, epsilon)
        return found

    return forward


def is_on_cuda(x: torch.Tensor) -> bool:
    """Whether CUDA's kernels run on it."""
    return bool(x.is_cuda)


def cuda_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float | None) -> torch.Tensor:
    """torch's own, one kernel there each way; it rounds after the weight, not before it too."""
    found: torch.Tensor = functional.rms_norm(x, weight.shape, weight, epsilon)
    return found


class RootMeanSquareNorm(torch.autograd.Function):  # type: ignore[misc]
    """weight x / rms(x); only x and a factor for each token are saved."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """`x` [..., I], in float32 until it is scaled by the weight [I]."""
        wide = x.float()
        factor = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, factor)
        return weight * (wide * factor).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        """The gradients of x and of the weight. Sums over a token are float32."""
        x, weight, factor = ctx.saved_tensors
        (grad,) = grad_outputs
        grad_weight = None
        if ctx.needs_input_grad[1]:
            unit = (x.float() * factor).to(x.dtype)
            grad_weight = (grad * unit).flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype)
        scaled = grad * weight
        share = (scaled * x).sum(-1, keepdim=True, dtype=torch.float32) * factor**3 / x.shape[-1]
        scaled.mul_(factor.to(x.dtype)).addcmul_(x, share.to(x.dtype), value=-1)
        return scaled, grad_weight, None


def _fuse_rotary(model: nn.Module) -> None:
    """Where the model's own file rotates halves of heads by its global function, put ours in its place.

    The file is shared by all models of the family in this process, which get the same numbers.
    """
    modeling = sys.modules[type(inner_model(model)).__module__]
    own = getattr(modeling, "apply_rotary_pos_emb", None)
    if own is None or hasattr(own, "__wrapped__"):
        return
    query, key = (torch.linspace(-2, 3, 2 * n * 3 * 8).view(2, n, 3, 8) for n in (4, 2))
    angles = torch.linspace(0, 3, 2 * 3 * 4).view(2, 3, 4).repeat(1, 1, 2)
    try:
        expected = own(query, key, angles.cos(), angles.sin())
    except (TypeError, RuntimeError):
        # it wants other arguments, or tables of another shape
        return
    found = rotate(query, key, angles.cos(), angles.sin())
    if all(torch.allclose(a, b, atol=_CLOSE) for a, b in zip(expected, found, strict=True)):
        setattr(modeling, "apply_rotary_pos_emb", _rotating(own))  # noqa: B010


def _rotating(own: Callable[..., Any]) -> Callable[..., Any]:
    """`own`, done by `rotate` where the tables are as wide as a head: some models turn a part of it only."""

    @functools.wraps(own)
    def rotating(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, *args: Any, **named: Any) -> Any:
        is_whole = cos.shape[-1] == query.shape[-1] == key.shape[-1]
        return (rotate if is_whole else own)(query, key, cos, *args, **named)

    return rotating


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' apply_rotary_pos_emb of heads [B, H, L, D] whose halves are rotated by the same angles [B, L, D]."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return Rotary.apply(query, cos, sin), Rotary.apply(key, cos, sin)


class Rotary(torch.autograd.Function):  # type: ignore[misc]
    """x cos + rotate_half(x) sin, half by half."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`x` [B, H, L, D]; the tables broadcast."""
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        """The inverse rotation."""
        cos, sin = ctx.saved_tensors
        return _rotated(grad_outputs[0], cos, sin, -1), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = cos[..., :half], sin[..., :half]
    out = torch.empty_like(x)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=sign)
    return out
