"""What CUDA would do where a CPU does something else, so that a trace on fake CPU tensors allocates as CUDA would.

Attention kernels keep other tensors, dropout keeps a bool mask, autocast has other lists, some kernels hold
buffers while they run. Written from PyTorch's sources; each function names its file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.nn import functional

aten = torch.ops.aten

MAX_FLASH_HEAD_DIM = 256
"""Largest head that the flash kernel takes (sdp_utils.cpp, check_head_dim_size_flash)."""


@contextmanager
def cuda_rules(*, autocast: bool) -> Iterator[None]:
    """Inside, the CPU's operators leave behind what CUDA's would. `autocast`: whether the step uses it."""
    with ExitStack() as stack:
        for name, replacement in _FUNCTIONS.items():
            stack.enter_context(mock.patch.object(functional, name, replacement))
        if autocast:
            stack.enter_context(cuda_autocast())
        yield


# --- attention (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp chooses the kernel)


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
    head_dim = query.shape[-1]
    is_flash = attn_mask is None and query.dtype != torch.float32 and head_dim <= MAX_FLASH_HEAD_DIM
    out: torch.Tensor
    if is_flash and value.shape[-1] == head_dim:
        out = FlashAttention.apply(query, key, value)
    elif key.shape[1] == query.shape[1]:
        bias = None if attn_mask is None else _as_bias(attn_mask, query.dtype)
        out = EfficientAttention.apply(query, key, value, bias)
    else:
        # The memory-efficient kernel takes no grouped heads: torch falls back to plain matrix products.
        out = aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]
    return out


def _as_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask becomes an additive one (attention.cpp, convert_boolean_attn_mask)."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(mask.logical_not(), float("-inf"))


def round_up(number: int, multiple: int) -> int:
    """The next multiple of `multiple`."""
    return -(-number // multiple) * multiple


class FlashAttention(torch.autograd.Function):  # type: ignore[misc]
    """FlashAttention 2's storages, of torch's kernel and of the flash-attn package (csrc/flash_attn/flash_api.cpp).

    Saved: query, key, value, the output and a float32 log-sum-exp [batch, heads, tokens]. The output is laid out
    [batch, tokens, heads, head_dim].
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """All [batch, heads, tokens, head_dim]."""
        batch, heads, tokens, head_dim = query.shape
        out = torch.empty((batch, tokens, heads, head_dim), dtype=query.dtype).transpose(1, 2)
        logsumexp = torch.empty((batch, heads, tokens), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """While it runs: the row sums, a float32 accumulator of dq, and unreduced dk and dv for grouped heads."""
        query, key, value, _, _ = ctx.saved_tensors
        batch, heads, tokens, head_dim = query.shape
        rows = round_up(tokens, 128)
        columns = round_up(head_dim, 32 if head_dim <= 128 else 64)
        d_query, d_key, d_value = (torch.empty_like(t) for t in (query, key, value))
        held = [
            torch.empty((batch, heads, rows), dtype=torch.float32),
            torch.empty((batch, rows, heads, columns), dtype=torch.float32),
        ]
        if key.shape[1] != heads:
            held += [torch.empty((batch, key.shape[2], heads, head_dim), dtype=key.dtype) for _ in range(2)]
        del held
        return d_query, d_key, d_value


class EfficientAttention(torch.autograd.Function):  # type: ignore[misc]
    """The memory-efficient kernel's storages (mem_eff_attention; attention_backward.cu): any mask, any dtype.

    Saved: query, key, value, the bias, the output and a float32 log-sum-exp padded to 32 tokens.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """All [batch, heads, tokens, head_dim]; `bias` can be broadcast to [batch, heads, tokens, tokens]."""
        batch, heads, tokens, _ = query.shape
        out = torch.empty((batch, tokens, heads, value.shape[-1]), dtype=query.dtype).transpose(1, 2)
        logsumexp = torch.empty((batch, heads, round_up(tokens, 32)), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """While it runs: the row sums and, in 16 bits, a float32 accumulator of dq."""
        query, key, value, _, _, logsumexp = ctx.saved_tensors
        d_query, d_key, d_value = (torch.empty_like(t) for t in (query, key, value))
        held = [torch.empty_like(logsumexp)]
        if query.dtype != torch.float32:
            held.append(torch.empty(query.shape, dtype=torch.float32))
        del held
        return d_query, d_key, d_value, None


# --- dropout and softmax


def dropout(
    input: torch.Tensor,  # noqa: A002 (torch's name)
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> torch.Tensor:
    """CUDA's fused dropout keeps a bool mask (Dropout.cpp, is_fused_kernel_acceptable); the CPU's keeps noise."""
    if not training or p == 0.0:
        return input
    out: torch.Tensor = torch.native_dropout(input, p, True)[0]
    return out


def _softmax_like(original: Callable[..., torch.Tensor], fused: Any) -> Callable[..., torch.Tensor]:
    """CUDA widens float16 inside the kernel, without a float32 copy of the input (SoftMax.cpp)."""

    def softmax(
        input: torch.Tensor,  # noqa: A002 (torch's name)
        dim: int | None = None,
        _stacklevel: int = 3,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        if dim is not None and input.dtype == torch.float16 and dtype == torch.float32:
            out: torch.Tensor = fused(input, dim, True)
            return out
        return original(input, dim=dim, _stacklevel=_stacklevel, dtype=dtype)

    return softmax


_FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "scaled_dot_product_attention": attention,
    "dropout": dropout,
    "softmax": _softmax_like(functional.softmax, aten._softmax.default),
    "log_softmax": _softmax_like(functional.log_softmax, aten._log_softmax.default),
}

# --- autocast (aten/src/ATen/autocast_mode.h: the lists of CUDA)

_TO_FLOAT32 = [
    "acos",
    "asin",
    "cosh",
    "erfinv",
    "exp",
    "expm1",
    "log",
    "log10",
    "log2",
    "log1p",
    "reciprocal",
    "rsqrt",
    "sinh",
    "tan",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "pow.Scalar",
    "softplus",
    "layer_norm",
    "native_layer_norm",
    "group_norm",
    "cosine_similarity",
    "poisson_nll_loss",
    "cosine_embedding_loss",
    "nll_loss",
    "nll_loss2d",
    "kl_div",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "mse_loss",
    "binary_cross_entropy_with_logits",
    "dist",
    "pdist",
    "renorm",
    "logsumexp",
]
_FLOAT32_RESULT = [
    "prod",
    "prod.dim_int",
    "softmax.int",
    "log_softmax.int",
    "cumprod",
    "cumsum",
    "sum",
    "sum.dim_IntList",
    "linalg_vector_norm",
]


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Give the CPU's autocast the operators that CUDA's runs in float32; both share the list of 16-bit ones."""
    library = torch.library.Library("aten", "IMPL")
    for names, wrap in ((_TO_FLOAT32, _to_float32), (_FLOAT32_RESULT, _float32_result)):
        for name in names:
            library.impl(name, wrap(_overload(name)), "AutocastCPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _without_autocast() -> Any:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    return torch._C._ExcludeDispatchKeyGuard(keys)


def _is_16bit(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _to_float32(op: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with _without_autocast():
            return op(*(a.float() if _is_16bit(a) else a for a in args), **kwargs)

    return call


def _float32_result(op: Any) -> Callable[..., Any]:
    """Ask for a float32 result of a 16-bit input unless the caller names a dtype."""
    position = [a.name for a in op._schema.arguments].index("dtype")

    def call(*args: Any, **kwargs: Any) -> Any:
        named = kwargs.get("dtype") or (args[position] if len(args) > position else None)
        if named is None and _is_16bit(args[0]):
            args, kwargs = args[:position], {**kwargs, "dtype": torch.float32}
        with _without_autocast():
            return op(*args, **kwargs)

    return call


# --- buffers that a kernel holds while it runs

MAX_FUSED_4BIT_ROWS = 1536
"""bitsandbytes 0.50 multiplies fewer rows than this without unpacking the weight (backends/cuda/ops.py)."""


def gemm_4bit_workspace(
    rows: torch.Tensor,
    packed: torch.Tensor,
    shape: Any,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: torch.Tensor | None = None,
    absmax_8bit: torch.Tensor | None = None,
    *_: Any,
) -> list[torch.Tensor]:
    """The unpacked weight [out, in] in the input's dtype, and the constants of double quantisation in float32."""
    if rows.numel() // rows.shape[-1] <= MAX_FUSED_4BIT_ROWS and shape[1] % blocksize == 0:
        return []
    held = [torch.empty(tuple(shape), dtype=rows.dtype)]
    if absmax_8bit is not None:
        held += [torch.empty(absmax_8bit.shape, dtype=torch.float32) for _ in range(2)]
    return held


def int8_scaled_mm_workspace(
    rows: torch.Tensor,
    weight: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """The int32 product, and its float16 form where the result has another dtype (backends/default/ops.py)."""
    shape = (*rows.shape[:-1], weight.shape[0])
    held = [torch.empty(shape, dtype=torch.int32)]
    if dtype not in (None, torch.float16):
        held.append(torch.empty(shape, dtype=torch.float16))
    return held


WORKSPACES: dict[str, Callable[..., list[torch.Tensor]]] = {
    "bitsandbytes::gemm_4bit": gemm_4bit_workspace,
    "bitsandbytes::int8_scaled_mm": int8_scaled_mm_workspace,
}
