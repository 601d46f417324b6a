"""Kernels of linear attention and state spaces as stand-ins, in place of transformers' reference loops.

Each allocates what its CUDA kernel does, saves what its autograd function saves, and holds in the backward what that
one holds. Shapes: B batch, T tokens, H heads (of keys), V heads of values, K and P sizes of a head, N states.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn.attention import varlen

import bench.attention
import bench.fused
from bench.build import inner_model
from bench.trace.attention import documents_attention, flash_attention
from bench.trace.caches import shaped_caches
from bench.trace.kernels import cuda_norm, fused_kernels
from bench.trace.mamba import (
    FULL,
    chunk_scan,
    grads_like,
    mamba_inner,
    new_empty,
    selective_scan,
    split_conv_scan,
    summed_grad,
)
from bench.trace.stacks import stack_attention
from planner.errors import NotModelledError
from planner.setup import TrainSetup

Tensors = list[torch.Tensor]
DECODING = ("causal_conv1d_update", "selective_state_update", "fused_recurrent_")
"""Kernels (or how their names begin) for one token at a time: training never calls them."""


@contextmanager
def device_kernels(setup: TrainSetup, model: nn.Module, on_gpu: bool) -> Iterator[None]:
    """The kernels that the setup, its stack and the model's family would call on the device."""
    family = inner_model(model).config.get_text_config().model_type
    with ExitStack() as stack:
        stack.enter_context(fused_kernels(setup, model))
        stack.enter_context(stack_attention(setup, family))
        stack.enter_context(flash_attention(setup, model))
        stack.enter_context(shaped_caches())
        if on_gpu:
            stack.enter_context(scan_kernels(model))
            stack.enter_context(_cuda_kernels())
        yield


@contextmanager
def _cuda_kernels() -> Iterator[None]:
    """Fake tensors say that they are the CPU's."""
    own = {"has_slow_backward": lambda query: False, "has_flash": lambda device: True}
    with ExitStack() as stack:
        for name, answer in own.items():
            stack.enter_context(mock.patch.object(bench.attention, name, answer))
        stack.enter_context(mock.patch.object(varlen, "varlen_attn", documents_attention))
        stack.enter_context(mock.patch.object(bench.fused, "is_on_cuda", lambda x: True))
        stack.enter_context(mock.patch.object(bench.fused, "cuda_norm", cuda_norm))
        yield


@contextmanager
def scan_kernels(model: nn.Module) -> Iterator[None]:
    """Inside, the model's modeling files call the stand-ins; a kernel without one raises NotModelledError."""
    modules = {type(module).__module__ for module in model.modules()}
    with ExitStack() as stack:
        for module in (sys.modules[name] for name in modules if name.startswith("transformers.")):
            for name, function in list(vars(module).items()):
                kernel = _kernel_name(function)
                if kernel is not None and not kernel.startswith(DECODING):
                    stack.enter_context(mock.patch.object(module, name, _stand_in(kernel)))
        yield


def _kernel_name(function: Any) -> str | None:
    """The CUDA kernel that a function falls back from (transformers/integrations/hub_kernels.py)."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    if "func_name" not in names or "torch_function" not in names:
        return None
    return str(function.__closure__[names.index("func_name")].cell_contents)


def _stand_in(kernel: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        known = ", ".join(STAND_INS)
        raise NotModelledError(f"{kernel}: no stand-in for this CUDA kernel; the trace has {known}")

    return STAND_INS.get(kernel, refuse)


# --- short convolutions


def causal_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *_: Any, **__: Any
) -> torch.Tensor:
    """causal_conv1d_fn of x [B, channels, T], weight [channels, width]; the activation is part of the kernel."""
    out: torch.Tensor = CausalConv.apply(x, weight, bias)
    return out


class CausalConv(torch.autograd.Function):  # type: ignore[misc]
    """causal_conv1d/causal_conv1d_interface.py and csrc/causal_conv1d.cpp: saves input, weight and bias."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The result is laid out as `x`."""
        if x.stride(2) != 1 and x.stride(1) != 1:
            x = x.contiguous()
        ctx.save_for_backward(x, weight, bias)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The weight's gradient is summed in float32."""
        x, weight, bias = ctx.saved_tensors
        return torch.empty_like(x), summed_grad(weight), None if bias is None else summed_grad(bias)


# --- delta rules (fla/ops/gated_delta_rule/chunk.py and fla/ops/kda/chunk.py of fla-core 0.6)

DELTA_CHUNK = 64


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *_: Any,
    use_qk_l2norm_in_kernel: bool = False,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    """chunk_gated_delta_rule of q and k [B, T, H, K], v [B, T, V, P], g and beta [B, T, V]."""
    return GatedDeltaRule.apply(q, k, v, g, beta, use_qk_l2norm_in_kernel), None


class GatedDeltaRule(torch.autograd.Function):  # type: ignore[misc]
    """Saves normalised q and k, v, beta, the cumulated gate in float32 and a triangle of each chunk [B, T, V, 64]."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        normalises: bool,
    ) -> torch.Tensor:
        """[B, T, V, P]."""
        q, k, v, g, beta = (t.contiguous() for t in (q, k, v, g, beta))
        q, k, norms = _normalised(q, k, normalises)
        gate = torch.empty(g.shape, dtype=FULL)
        triangle = new_empty(*v.shape[:3], DELTA_CHUNK, like=k)
        w, u = new_empty(*v.shape[:3], k.shape[-1], like=k), torch.empty_like(v)
        states, fresh, out = _chunk_states(k, v), torch.empty_like(v), torch.empty_like(v)
        del w, u, states, fresh
        ctx.normalises = normalises
        ctx.save_for_backward(q, k, v, gate, beta, triangle, *norms)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Everything that the forward dropped again, and gradients of keys and queries for every value head."""
        q, k, v, gate, beta, _, *_ = ctx.saved_tensors
        grad = grads[0].contiguous()
        per_head = (*v.shape[:3], k.shape[-1])
        held = [new_empty(*per_head, like=k), torch.empty_like(v), _chunk_states(k, v), torch.empty_like(v)]
        d_v = torch.empty_like(grad)
        d_states, d_u = _chunk_states(q, v), torch.empty_like(d_v)
        d_v = d_u
        d_q, d_k, d_w = (new_empty(*per_head, like=q) for _ in range(3))
        d_gate = torch.empty_like(gate)
        d_q, d_k = _grouped(d_q, q), _grouped(d_k, k)
        again = _grouped(new_empty(*per_head, like=k), k)
        d_v, d_beta, d_gate_again = torch.empty_like(v), torch.empty_like(beta), torch.empty_like(gate)
        d_gate = torch.empty_like(d_gate)
        del held, d_states, d_u, d_w, again, d_gate_again
        if ctx.normalises:
            d_q, d_k = torch.empty_like(d_q), torch.empty_like(d_k)
        return d_q, d_k, d_v, d_gate, d_beta, None


def _normalised(
    q: torch.Tensor, k: torch.Tensor, normalises: bool
) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
    """q and k of length 1 and their reciprocal norms in float32, where the kernel makes them."""
    if not normalises:
        return q, k, []
    norms = [new_empty(*t.shape[:3], like=t, dtype=FULL) for t in (q, k)]
    return torch.empty_like(q), torch.empty_like(k), norms


def _chunk_states(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A state [K, P] for each chunk and value head."""
    batch, tokens, heads, size = v.shape
    return new_empty(batch, -(-tokens // DELTA_CHUNK), heads, k.shape[-1], size, like=k)


def _grouped(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Gradients of all value heads summed over those that share a key head."""
    if grad.shape[2] == like.shape[2]:
        return grad
    return grad.unflatten(2, (like.shape[2], -1)).sum(3)


def kimi_delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *_: Any,
    A_log: torch.Tensor | None = None,  # noqa: N803
    dt_bias: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    """chunk_kda: as gated_delta_rule with a gate per element of a key, g [B, T, V, K]."""
    out = KimiDelta.apply(q, k, v, g, beta, A_log, dt_bias, use_qk_l2norm_in_kernel, use_gate_in_kernel)
    return out, None


class KimiDelta(torch.autograd.Function):  # type: ignore[misc]
    """Saves normalised q and k, v, the gate (cumulated in float32, unless the kernel makes it) and two triangles."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        """[B, T, V, P]."""
        q, k, v, g, beta, *rest, normalises, makes_gate = inputs
        q, k, v, g, beta = (t.contiguous() for t in (q, k, v, g, beta))
        q, k, norms = _normalised(q, k, normalises)
        gate = torch.empty(g.shape, dtype=FULL)
        triangles = [new_empty(*v.shape[:3], DELTA_CHUNK, like=k) for _ in range(2)]
        w, keys, u = *(new_empty(*v.shape[:3], k.shape[-1], like=k) for _ in range(2)), torch.empty_like(v)
        states, fresh, out = _chunk_states(k, v), torch.empty_like(v), torch.empty_like(v)
        del w, keys, u, states, fresh
        ctx.flags = normalises, makes_gate
        ctx.save_for_backward(q, k, v, g, beta, *rest, None if makes_gate else gate, *triangles, *norms)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, k and the gate are float32 until they are returned."""
        q, k, v, g, beta, decay, dt_bias, *_ = ctx.saved_tensors
        normalises, makes_gate = ctx.flags
        grad = grads[0].contiguous()
        per_head = (*v.shape[:3], k.shape[-1])
        held = [torch.empty(g.shape, dtype=FULL)] if makes_gate else []
        held += [*(new_empty(*per_head, like=k) for _ in range(3)), torch.empty_like(v)]
        held += [_chunk_states(k, v), torch.empty_like(v)]
        held += [new_empty(*v.shape[:3], DELTA_CHUNK, like=v, dtype=FULL)]
        d_v = torch.empty_like(grad)
        d_states, d_v = _chunk_states(q, v), torch.empty_like(v)
        d_q, d_k, d_gate = (new_empty(*per_head, like=q, dtype=FULL) for _ in range(3))
        d_v, d_beta = torch.empty_like(v), torch.empty(beta.shape, dtype=FULL)
        held += [new_empty(*v.shape[:3], DELTA_CHUNK, like=v, dtype=FULL)]
        second = [torch.empty_like(t) for t in (d_q, d_k, d_gate)]
        d_q, d_k, d_gate = second
        d_q, d_k = _grouped(d_q, q), _grouped(d_k, k)
        d_gate = torch.empty_like(d_gate)
        del held, d_states, second
        if normalises:
            d_q, d_k = (torch.empty_like(t, dtype=FULL) for t in (q, k))
        small = grads_like(decay, dt_bias)
        return (
            d_q.to(q.dtype),
            d_k.to(k.dtype),
            d_v,
            d_gate.to(g.dtype),
            d_beta.to(beta.dtype),
            *small,
            None,
            None,
        )


STAND_INS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv1d,
    "selective_scan_fn": selective_scan,
    "mamba_inner_fn": mamba_inner,
    "mamba_chunk_scan_combined": chunk_scan,
    "mamba_split_conv1d_scan_combined": split_conv_scan,
    "chunk_gated_delta_rule": gated_delta_rule,
    "chunk_kda": kimi_delta,
}
"""For each kernel of causal_conv1d, mamba_ssm and fla that transformers calls in training, its stand-in."""
