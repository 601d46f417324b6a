"""Fused Triton kernels as stand-ins: each allocates and saves what the kernel's autograd function does.

`kernels: fused` of a named stack is the set of fms-acceleration's foak plugin (RMSNorm, rotary embedding and
cross-entropy, written by Unsloth), else finefit's own, which are traced themselves; `kernels: liger` what Liger's
patches of a family replace (liger_kernel 0.8.5, transformers/monkey_patch.py); `loss: fused` Liger's fused linear
cross-entropy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional

import bench.loss
from bench.build import inner_model
from bench.fused import fuse
from planner.errors import NotModelledError
from planner.setup import TrainSetup
from planner.stack import parse_stack

NUM_PROCESSORS = 132
"""Rows of partial sums that a norm's backward keeps when its weight trains: multiprocessors of the card (an H100's;
others have 30 to 190, a row is 4 bytes x hidden size)."""


@dataclass(frozen=True, slots=True)
class Fusion:
    """What one family's patches replace. `in_place`: the norm's backward writes over the gradient it is given."""

    rope: bool = True
    norm: bool = True
    in_place: bool = True
    mlp: bool = True


_PLAIN = Fusion()
_SANDWICH = Fusion(in_place=False)
LIGER: dict[str, Fusion] = {
    **dict.fromkeys(
        ("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "phi3", "gemma", "granite"), _PLAIN
    ),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4"), _SANDWICH),
    "hunyuan_v1_dense": _PLAIN,
    "glm4": Fusion(rope=False, in_place=False),
}
"""Decoders whose patches are modelled; Liger's fused experts aren't."""
FOAK = Fusion(mlp=False)


@contextmanager
def fused_kernels(setup: TrainSetup, model: nn.Module) -> Iterator[None]:
    """Inside, the model's norms, rotary embeddings, activations and losses are the setup's fused ones.

    Raises NotModelledError for a model that the kernels aren't made for.
    """
    fusion = _fusion(setup, inner_model(model).config.get_text_config().model_type)
    with ExitStack() as stack:
        if setup.runs_own_kernels:
            for modeling in (sys.modules[name] for name in _rotary_modules(model)):
                # replaced in the whole file: it is put back
                kept = modeling.apply_rotary_pos_emb
                stack.enter_context(mock.patch.object(modeling, "apply_rotary_pos_emb", kept))
            fuse(model)
        if fusion is not None:
            _fuse_modules(model, fusion)
            if setup.quant:
                _fuse_adapters(model)
            for module_name in _rotary_modules(model) if fusion.rope else ():
                modeling = sys.modules[module_name]
                stack.enter_context(mock.patch.object(modeling, "apply_rotary_pos_emb", rotary))
        if setup.kernels == "fused" and not setup.runs_own_kernels:
            stack.enter_context(mock.patch.object(functional, "cross_entropy", cross_entropy))
        if setup.loss == "fused":
            linear = _linear_cross_entropy(widens=_is_foak(setup))
            stack.enter_context(mock.patch.object(bench.loss, "_liger_cross_entropy", linear))
        yield


def _fusion(setup: TrainSetup, family: str) -> Fusion | None:
    if setup.kernels == "plain" or setup.runs_own_kernels:
        return None
    if setup.kernels == "fused" or _is_foak(setup):
        return FOAK
    if family not in LIGER:
        known = ", ".join(LIGER)
        raise NotModelledError(f"kernels: Liger's patches of {family} can't be traced; these can: {known}")
    return LIGER[family]


def _is_foak(setup: TrainSetup) -> bool:
    """A stack that is named without a release of Liger is fms-acceleration's: its own kernels, a copy of Liger's loss."""
    return setup.stack is not None and "liger-kernel" not in dict(parse_stack(setup.stack).versions)


def _fuse_modules(model: nn.Module, fusion: Fusion) -> None:
    found = 0
    for module in model.modules():
        if fusion.norm and _is_rms_norm(module):
            module.forward = _norm_forward(module, fusion.in_place)
            found += 1
        elif fusion.mlp and hasattr(module, "down_proj") and hasattr(module, "act_fn"):
            module.forward = _mlp_forward(module)
        elif fusion.mlp and hasattr(module, "down_proj") and hasattr(module, "gate_up_proj"):
            module.forward = _joint_mlp_forward(module)
    if not found:
        raise NotModelledError(
            "kernels: this model has no RMSNorm that a fused kernel could replace; use plain"
        )


def _fuse_adapters(model: nn.Module) -> None:
    """Unsloth's quantised linears are one function with their adapters (foak has them too)."""
    for module in model.modules():
        for dropout in getattr(module, "lora_dropout", {}).values():
            if isinstance(dropout, nn.Dropout):
                dropout.forward = _adapter_dropout_forward(dropout)


def _is_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith("RMSNorm") and weight is not None and weight.ndim == 1


def _rotary_modules(model: nn.Module) -> set[str]:
    names = {type(module).__module__ for module in model.modules()}
    return {name for name in names if hasattr(sys.modules[name], "apply_rotary_pos_emb")}


# --- norms, rotary embeddings, activations


def _norm_forward(module: nn.Module, in_place: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = RMSNorm.apply(hidden_states, module.weight, in_place)
        return out

    return forward


class RMSNorm(torch.autograd.Function):  # type: ignore[misc]
    """liger_kernel/ops/rms_norm.py: saves its input, its weight and a float32 per row; no float32 copy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, in_place: bool) -> torch.Tensor:
        """`x` [..., hidden]; the result has its dtype."""
        rows = x.contiguous().view(-1, x.shape[-1])
        ctx.in_place = in_place
        ctx.save_for_backward(rows, weight, torch.empty(len(rows), dtype=torch.float32))
        return torch.empty(x.shape, dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Over the given gradient; partial sums of the weight's, where it trains."""
        _, weight, _ = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_weight = None
        if ctx.needs_input_grad[1]:
            partial = torch.empty((NUM_PROCESSORS, len(weight)), dtype=torch.float32)
            d_weight = partial.sum(0).to(weight.dtype)
        return grad if ctx.in_place else torch.zeros_like(grad), d_weight, None


def cuda_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float | None) -> torch.Tensor:
    """torch's own (layer_norm_kernel.cu): what the others keep, and a gradient of its own."""
    out: torch.Tensor = RMSNorm.apply(x, weight, False)
    return out


def rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """apply_rotary_pos_emb in one kernel, over query and key themselves."""
    out: tuple[torch.Tensor, torch.Tensor] = Rotary.apply(query, key, cos, sin)
    return out


class Rotary(torch.autograd.Function):  # type: ignore[misc]
    """liger_kernel/ops/rope.py: in place, forwards and backwards; saves cosine and sine."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All [batch, heads, tokens, head_dim], laid out [batch, tokens, heads, head_dim]."""
        ctx.save_for_backward(cos, sin)
        return _by_token(query), _by_token(key)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Over the gradients."""
        return _by_token(grads[0]), _by_token(grads[1]), None, None


def _by_token(heads: torch.Tensor) -> torch.Tensor:
    return heads.transpose(1, 2).contiguous().transpose(1, 2)


def _mlp_forward(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = module.down_proj(GatedActivation.apply(module.gate_proj(x), module.up_proj(x)))
        return out

    return forward


def _joint_mlp_forward(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
        out: torch.Tensor = module.down_proj(GatedActivation.apply(gate, up))
        return out

    return forward


class GatedActivation(torch.autograd.Function):  # type: ignore[misc]
    """liger_kernel/ops/swiglu.py and geglu.py: saves gate and up, and writes their gradients over them."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Both [..., intermediate]."""
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The saved tensors themselves."""
        gate, up = ctx.saved_tensors
        return gate, up


def _adapter_dropout_forward(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = AdapterDropout.apply(x) if module.training else x
        return out

    return forward


class AdapterDropout(torch.autograd.Function):  # type: ignore[misc]
    """Dropout before a fused adapter (LoRA_QKV, LoRA_W in foak's kernels/unsloth/fast_lora.py): no mask.

    The backward asks the dropped copy, which the adapter's product keeps, which elements are zero; the input is
    kept beside it.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """The copy of `x` [..., in_features] of which some elements are zero."""
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        """A gradient of the input's own."""
        (x,) = ctx.saved_tensors
        return torch.empty_like(x)


# --- losses


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """torch's cross_entropy of [tokens, vocabulary] by the fused kernel."""
    losses: torch.Tensor = CrossEntropy.apply(logits, target)
    total = losses.sum()
    return total if reduction == "sum" else total / torch.count_nonzero(target != ignore_index)


class CrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """Unsloth's kernel (foak, kernels/unsloth/cross_entropy_loss.py): saves the logits, writes their gradient over them."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """A loss per token, and beside it a log-sum-exp, in float32."""
        losses, logsumexp = (torch.empty(len(logits), dtype=torch.float32) for _ in range(2))
        ctx.save_for_backward(logits, logsumexp, labels)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The logits' own memory."""
        logits, _, _ = ctx.saved_tensors
        return logits, None


def _linear_cross_entropy(*, widens: bool) -> Callable[..., torch.Tensor]:
    def loss(
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        trained: torch.Tensor | None,
        num_trained: float,
        softcap: float | None,
        with_grad: bool,
    ) -> torch.Tensor:
        if trained is not None:
            rows, labels = rows[trained], labels[trained]
        total: torch.Tensor = LinearCrossEntropy.apply(rows, weight, bias, labels, with_grad, widens)
        return total / num_trained

    return loss


class LinearCrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """Head and loss by chunks (liger_kernel/ops/fused_linear_cross_entropy.py): gradients are made in the forward.

    `widens`: the chunk's logits are widened to float32, narrowed and scaled, each time into new memory, as Liger 0.3
    did and foak's copy of it still does (kernels/liger/fused_linear_cross_entropy_loss.py).
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        with_grad: bool,
        widens: bool,
    ) -> torch.Tensor:
        """`rows` [tokens, hidden], `weight` [vocabulary, hidden]: the sum of the losses."""
        grad_rows = torch.zeros_like(rows)
        needed = [with_grad and needed for needed in ctx.needs_input_grad]
        grad_weight = torch.zeros_like(weight) if needed[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and needed[2] else None
        losses = torch.zeros(len(rows), dtype=torch.float32)
        chunk = _chunk_tokens(rows, weight)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else rows.dtype
        shared = None
        if not widens and rows.dtype == weight.dtype == dtype:
            shared = torch.empty((chunk, len(weight)), dtype=dtype)
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            grad = _grad_logits(part, weight, bias, shared, widens)
            if with_grad:
                grad_rows[start : start + chunk] = grad @ weight
            if grad_weight is not None:
                torch.addmm(grad_weight, grad.t(), part.to(grad.dtype), out=grad_weight)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            del grad
        ctx.save_for_backward(grad_rows, grad_weight, grad_bias)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients made in the forward, scaled in place."""
        return (*ctx.saved_tensors, None, None, None)


def _chunk_tokens(rows: torch.Tensor, weight: torch.Tensor) -> int:
    parts = -(-len(weight) // rows.shape[1])
    per_chunk = -(-len(rows) // parts)
    return min(len(rows), 1 << int(per_chunk - 1).bit_length())


def _grad_logits(
    part: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shared: torch.Tensor | None,
    widens: bool,
) -> torch.Tensor:
    """A chunk's logits, which the kernel overwrites by their gradient."""
    if shared is not None:
        logits = shared[: len(part)]
        torch.mm(part, weight.t(), out=logits)
        return logits if bias is None else logits.add_(bias)
    logits = part @ weight.t()
    if bias is not None:
        logits = logits + bias
    if not widens:
        return logits
    dtype = logits.dtype
    logits = logits.float()
    logits = logits.to(dtype)
    return logits * torch.empty((), dtype=torch.float32)
