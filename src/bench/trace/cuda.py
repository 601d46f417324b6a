"""What CUDA would do where a CPU does something else, so that a trace on fake CPU tensors allocates as CUDA would.

Attention kernels keep other tensors, dropout keeps a bool mask, autocast has other lists, some kernels hold
buffers while they run. Written from PyTorch's sources; each function names its file.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.nn import functional

from bench.trace.attention import attention, without_autocast

aten = torch.ops.aten


@contextmanager
def cuda_rules(*, autocast: bool) -> Iterator[None]:
    """Inside, the CPU's operators leave behind what CUDA's would. `autocast`: whether the step uses it."""
    with ExitStack() as stack:
        for name, replacement in _FUNCTIONS.items():
            stack.enter_context(mock.patch.object(functional, name, replacement))
        stack.enter_context(_cuda_int8())
        if autocast:
            stack.enter_context(cuda_autocast())
            # Without a device it asks for CUDA's; PEFT casts a 4-bit layer's input or not by it.
            stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", _is_autocast_enabled))
        yield


@contextmanager
def _cuda_int8() -> Iterator[None]:
    """On a CPU bitsandbytes trains 8-bit linears with unpacked weights (autograd/_functions.py, matmul)."""
    functions = importlib.import_module("bitsandbytes.autograd._functions")
    with mock.patch.object(functions, "MatMul8bitFp", functions.MatMul8bitLt):
        yield


# --- dropout, softmax, products of experts


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


class _GroupedProducts(torch.autograd.Function):  # type: ignore[misc]
    """rows [S, in] times one of weights [groups, in, out] each; keeps what its gradients need."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        needs_rows, needs_weights = ctx.needs_input_grad
        ctx.save_for_backward(rows if needs_weights else None, weights if needs_rows else None)
        ctx.shapes = rows.shape, weights.shape
        return rows.new_empty((rows.shape[0], weights.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        made = (
            grads[0].new_empty(s) if n else None
            for s, n in zip(ctx.shapes, ctx.needs_input_grad, strict=True)
        )
        return tuple(made)


_grouped_mm = functional.grouped_mm


def grouped_mm(
    rows: torch.Tensor, weights: torch.Tensor, *, offs: torch.Tensor, **options: Any
) -> torch.Tensor:
    """CUDA multiplies other dtypes than bfloat16 group by group, into one output (GroupedBlas.cpp); fake tensors
    are refused.
    """
    if rows.dtype == torch.bfloat16:
        out: torch.Tensor = _grouped_mm(rows, weights, offs=offs, **options)
        return out
    result: torch.Tensor = _GroupedProducts.apply(rows, weights)
    return result


_FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "scaled_dot_product_attention": attention,
    "grouped_mm": grouped_mm,
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


_ask_autocast = torch.is_autocast_enabled


def _is_autocast_enabled(device_type: str = "cpu") -> bool:
    enabled: bool = _ask_autocast(device_type)
    return enabled


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _is_16bit(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _to_float32(op: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with without_autocast():
            return op(*(a.float() if _is_16bit(a) else a for a in args), **kwargs)

    return call


def _float32_result(op: Any) -> Callable[..., Any]:
    """Ask for a float32 result of a 16-bit input unless the caller names a dtype.

    A softmax widens float16 inside its kernel (SoftMax.cpp, half_to_float).
    """
    fused = {aten.softmax.int: aten._softmax.default, aten.log_softmax.int: aten._log_softmax.default}.get(op)
    position = [a.name for a in op._schema.arguments].index("dtype")

    def call(*args: Any, **kwargs: Any) -> Any:
        named = kwargs.get("dtype") or (args[position] if len(args) > position else None)
        if named is None and fused is not None and args[0].dtype == torch.float16:
            with without_autocast():
                return fused(args[0], args[1], True)
        if named is None and _is_16bit(args[0]):
            args, kwargs = args[:position], {**kwargs, "dtype": torch.float32}
        with without_autocast():
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


def int8_vectorwise_quant_workspace(rows: torch.Tensor, threshold: float = 0.0) -> list[torch.Tensor]:
    """Magnitudes and a mask of outliers (backends/cuda/ops.py); transformers' threshold is 6, a trace's 0."""
    return [torch.empty(rows.shape, dtype=rows.dtype), torch.empty(rows.shape, dtype=torch.bool)]


def safe_softmax_workspace(scores: torch.Tensor, *_: Any, **__: Any) -> list[torch.Tensor]:
    """The plain softmax and where the scores are infinite, beside the result (native/transformers/attention.cpp)."""
    return [torch.empty_like(scores), torch.empty(scores.shape, dtype=torch.bool)]


WORKSPACES: dict[str, Callable[..., list[torch.Tensor]]] = {
    "aten::_safe_softmax": safe_softmax_workspace,
    "bitsandbytes::gemm_4bit": gemm_4bit_workspace,
    "bitsandbytes::int8_vectorwise_quant": int8_vectorwise_quant_workspace,
    "bitsandbytes::int8_scaled_mm": int8_scaled_mm_workspace,
}
