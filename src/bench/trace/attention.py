"""Attention kernels as CUDA chooses and allocates them (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional
from transformers import integrations
from transformers.integrations.sdpa_attention import repeat_kv

from bench.build import inner_model
from planner.errors import SetupError
from planner.own_kernels import FLASH_BLOCK
from planner.setup import TrainSetup
from planner.stack import parse_stack, repeats_groups

aten = torch.ops.aten

MAX_FLASH_HEAD_DIM = 256
"""Largest head that the flash kernel takes (sdp_utils.cpp, check_head_dim_size_flash)."""


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """scaled_dot_product_attention by the kernel that CUDA (compute capability 8.0 and up) would choose.

    query [batch, heads, tokens, head_dim]; key and value may have fewer heads with `enable_gqa`.
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    head_dim = query.shape[-1]
    is_flash = attn_mask is None and query.dtype != torch.float32 and head_dim <= MAX_FLASH_HEAD_DIM
    bias = None if attn_mask is None else _as_bias(attn_mask, query.dtype)
    if bias is not None:
        # A view; its gradient is of this size before it is summed (attention.cpp, preprocess_mask).
        bias = bias.expand(*query.shape[:3], key.shape[2])
    out: torch.Tensor
    # Autocast casts what goes in and is off inside (autocast_mode.h, WrapFunction_).
    with without_autocast():
        if is_flash and value.shape[-1] == head_dim:
            out = FlashAttention.apply(query, key, value)
        elif key.shape[1] == query.shape[1]:
            out = EfficientAttention.apply(query, key, value, bias)
        else:
            # The memory-efficient kernel takes no grouped heads: torch falls back to plain matrix products.
            out = plain_products(query, key, value, bias, dropout_p=dropout_p, is_causal=is_causal)
    return out


def without_autocast() -> Any:
    """Inside, operators run in the dtypes of their inputs."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    return torch._C._ExcludeDispatchKeyGuard(keys)


def plain_products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    dropout_p: float,
    is_causal: bool,
) -> torch.Tensor:
    """The math fallback (attention.cpp, _scaled_dot_product_attention_math), in float32 whatever the inputs are.

    Not torch's own, which adds the mask out of place to tensors that are subclasses, as fake ones are.
    """
    dtype, groups = query.dtype, query.shape[1] // key.shape[1]
    query, key, value = query.float(), key.float(), value.float()
    query = query * 1.0
    if is_causal:
        bias = torch.ones((query.shape[-2], key.shape[-2]), dtype=torch.bool).tril()
        bias = _as_bias(bias, query.dtype)
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = query @ (key.transpose(-2, -1) * 1.0)
    if bias is not None:
        scores.add_(bias)
    scores = torch._safe_softmax(scores, -1)
    if dropout_p:
        scores = torch.native_dropout(scores, dropout_p, True)[0]
    # The weights are its second result, alive until it returns.
    weights = scores.to(dtype)
    out = (scores @ value).to(dtype)
    del weights
    return out


@contextmanager
def flash_attention(setup: TrainSetup, model: nn.Module) -> Iterator[None]:
    """Inside, a model that was built with sdpa calls the flash-attn package, where the setup asks for it.

    It takes a sliding window as a number, so no mask is built. Raises SetupError where transformers has none.
    """
    inner = inner_model(model)
    modeling = sys.modules[type(inner).__module__]
    if setup.attention != "flash":
        yield
        return
    by_class = _flash_classes(modeling)
    if not getattr(inner, "_supports_flash_attn", False):
        raise SetupError(
            "attention", f"{setup.model_label}: transformers has no flash for it; use sdpa or eager"
        )
    inner.config._attn_implementation = "flash_attention_2"
    family = inner.config.get_text_config().model_type
    kernel: Callable[..., torch.Tensor] = _packaged_flash
    if repeats_groups(parse_stack(setup.stack), family, setup.attention):
        kernel = _repeating_flash
    kernel = partial(kernel, is_packed=setup.packing or setup.padding_free)
    for module in inner.modules():
        if type(module) in by_class:
            module.__class__ = by_class[type(module)]
            module._flash_attn_uses_top_left_mask = False
    with ExitStack() as stack:
        for owner in (integrations.flash_attention, *([modeling] if by_class else [])):
            replaced = mock.patch.object(owner, "_flash_attention_forward", kernel, create=True)
            stack.enter_context(replaced)
        yield


def _flash_classes(modeling: Any) -> dict[type, type]:
    """The classes of a family that has one attention class for each kernel, and theirs for the flash-attn package."""
    suffix = "FlashAttention2"
    found = (name.removesuffix(suffix) for name in vars(modeling) if name.endswith(suffix))
    plain = {name: getattr(modeling, f"{name}Attention", None) for name in found}
    return {
        attention: getattr(modeling, name + suffix)
        for name, attention in plain.items()
        if attention is not None
    }


def _repeating_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **options: Any
) -> torch.Tensor:
    """The same of keys and values that are copied out to all heads first."""
    groups = query.shape[2] // key.shape[2]
    key, value = (repeat_kv(t.transpose(1, 2), groups).transpose(1, 2) for t in (key, value))
    return _packaged_flash(query, key, value, *args, **options)


def _packaged_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: Any,
    is_packed: bool = False,
    position_ids: torch.Tensor | None = None,
    target_dtype: torch.dtype | None = None,
    **__: Any,
) -> torch.Tensor:
    """flash-attn 2 of [batch, tokens, heads, head_dim]; its head is padded to a multiple of 8.

    Positions that begin anew say that a batch of one row is packed: it is copied into one sequence, whatever layout
    it had (transformers' _is_packed_sequence and _prepare_from_posids).
    """
    if target_dtype is not None:
        query, key, value = (t.to(target_dtype) for t in (query, key, value))
    if is_packed and position_ids is not None and len(query) == 1:
        query, key, value = (t.contiguous() for t in (query, key, value))
    head_dim = query.shape[-1]
    if query.dtype == torch.float32 or head_dim > MAX_FLASH_HEAD_DIM:
        raise SetupError(
            "attention", f"flash takes 16-bit heads of at most {MAX_FLASH_HEAD_DIM}; use sdpa or autocast"
        )
    padding = round_up(head_dim, 8) - head_dim
    if padding:
        query, key, value = (functional.pad(t, (0, padding)) for t in (query, key, value))
    out: torch.Tensor = FlashAttention.apply(*(t.transpose(1, 2) for t in (query, key, value)))
    return out.transpose(1, 2)[..., :head_dim]


def documents_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    """torch.nn.attention.varlen.varlen_attn of [tokens, heads, head_dim]; `starts` [documents + 1]."""
    rows = (t.transpose(0, 1)[None] for t in (query, key, value))
    out: torch.Tensor = FlashAttention.apply(*rows, len(starts) - 1)
    return out[0].transpose(0, 1)


def _as_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask becomes an additive one (attention.cpp, convert_boolean_attn_mask)."""
    if mask.dtype != torch.bool:
        return mask
    allowed, forbidden = torch.zeros((), dtype=dtype), torch.full((), float("-inf"), dtype=dtype)
    return torch.where(mask, allowed, forbidden)


def round_up(number: int, multiple: int) -> int:
    """The next multiple of `multiple`."""
    return -(-number // multiple) * multiple


class FlashAttention(torch.autograd.Function):  # type: ignore[misc]
    """FlashAttention 2's storages, of torch's kernel and of the flash-attn package (csrc/flash_attn/flash_api.cpp).

    Saved: query, key, value, the output and a float32 log-sum-exp [batch, heads, tokens]. The output is laid out
    [batch, tokens, heads, head_dim]. `num_documents` of variable lengths may be one row.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_documents: int = 0
    ) -> torch.Tensor:
        """All [batch, heads, tokens, head_dim]."""
        batch, heads, tokens, head_dim = query.shape
        ctx.rows = tokens + FLASH_BLOCK * num_documents if num_documents else round_up(tokens, FLASH_BLOCK)
        out = torch.empty((batch, tokens, heads, head_dim), dtype=query.dtype).transpose(1, 2)
        logsumexp = torch.empty((batch, heads, tokens), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """While it runs: the row sums, a float32 accumulator of dq, and unreduced dk and dv for grouped heads."""
        query, key, value, _, _ = ctx.saved_tensors
        batch, heads, _, head_dim = query.shape
        rows = ctx.rows
        columns = round_up(head_dim, 32 if head_dim <= 128 else 64)
        d_query, d_key, d_value = (torch.empty_like(t) for t in (query, key, value))
        held = [
            torch.empty((batch, heads, rows), dtype=torch.float32),
            torch.empty((batch, rows, heads, columns), dtype=torch.float32),
        ]
        if key.shape[1] != heads:
            held += [torch.empty((batch, key.shape[2], heads, head_dim), dtype=key.dtype) for _ in range(2)]
        del held
        return d_query, d_key, d_value, None


class EfficientAttention(torch.autograd.Function):  # type: ignore[misc]
    """The memory-efficient kernel's storages (mem_eff_attention; attention_backward.cu): any mask, any dtype.

    Saved: query, key, value, the bias, the output and a float32 log-sum-exp padded to 32 tokens.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """All [batch, heads, tokens, head_dim]; `bias` [batch, heads, tokens, tokens] may be a broadcast view."""
        batch, heads, tokens, _ = query.shape
        out = torch.empty((batch, tokens, heads, value.shape[-1]), dtype=query.dtype).transpose(1, 2)
        logsumexp = torch.empty((batch, heads, round_up(tokens, 32)), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """While it runs: the row sums and, in 16 bits, a float32 accumulator of dq."""
        query, key, value, bias, _, logsumexp = ctx.saved_tensors
        d_query, d_key, d_value = (torch.empty_like(t) for t in (query, key, value))
        d_bias = torch.empty(bias.shape, dtype=bias.dtype) if ctx.needs_input_grad[3] else None
        held = [torch.empty_like(logsumexp)]
        if query.dtype != torch.float32:
            held.append(torch.empty(query.shape, dtype=torch.float32))
        del held
        return d_query, d_key, d_value, d_bias
