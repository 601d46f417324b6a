"""Mamba's kernels as stand-ins (see bench.trace.scans): the selective scan, and Mamba-2's scan by chunks."""

# ruff: noqa: N803, N806 (the kernels' own names: A, B, C, D)

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from bench.trace.kernels import NUM_PROCESSORS
from planner.errors import NotModelledError

FULL = torch.float32


def new_empty(*shape: int, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An empty tensor on `like`'s device, in its dtype unless another is named."""
    return like.new_empty(shape, dtype=dtype or like.dtype)


def grads_like(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """A gradient for each tensor that is there."""
    return [None if t is None else torch.empty_like(t) for t in tensors]


def summed_grad(weight: torch.Tensor) -> torch.Tensor:
    """A gradient that the kernel sums in float32."""
    return torch.zeros(weight.shape, dtype=FULL).to(weight.dtype)


# --- Mamba


SCAN_CHUNK_TOKENS = 2048
"""Tokens between two states that selective_scan keeps (csrc/selective_scan/selective_scan.cpp)."""


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> torch.Tensor:
    """selective_scan_fn of u, delta and z [B, channels, T], A [channels, N], B and C [B, N, T]."""
    out: torch.Tensor = SelectiveScan.apply(u, delta, A, B, C, D, z, delta_bias)
    return out


class SelectiveScan(torch.autograd.Function):  # type: ignore[misc]
    """mamba_ssm/ops/selective_scan_interface.py: saves its inputs, the states between chunks and the ungated output."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor | None) -> torch.Tensor:
        """u, delta, A, B, C, D, z, delta_bias."""
        u, delta, A, B, C, D, z, bias = _rows_last(inputs)
        states, out = _scan_states(u, A), torch.empty_like(delta)
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, states, None if z is None else out)
        return out if z is None else torch.empty_like(z)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of B and C are summed in float32."""
        u, delta, A, B, C, D, z, bias, _, _ = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        made = grads_like(u, delta, A)
        summed = [torch.zeros(t.shape, dtype=FULL) for t in (B, C)]
        rest = grads_like(D, z, bias)
        narrow = [s.to(t.dtype) for s, t in zip(summed, (B, C), strict=True)]
        del grad
        return (*made, *narrow, *rest)


def _rows_last(inputs: tuple[Any, ...]) -> list[Any]:
    """Those of [B, …, T] with T last in memory."""
    return [t.contiguous() if t is not None and t.ndim > 2 and t.stride(-1) != 1 else t for t in inputs]


def _scan_states(u: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    batch, channels, tokens = u.shape
    chunks = -(-tokens // SCAN_CHUNK_TOKENS)
    return new_empty(batch, channels, chunks, 2 * A.shape[1], like=u, dtype=FULL)


def mamba_inner(
    xz: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    x_proj: torch.Tensor,
    dt_proj: torch.Tensor,
    out_proj: torch.Tensor,
    out_bias: torch.Tensor | None,
    A: torch.Tensor,
    B: None = None,
    C: None = None,
    D: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    """mamba_inner_fn of xz [B, 2 x channels, T]: convolution, projections, scan and output in one."""
    out: torch.Tensor = MambaInner.apply(
        xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, out_bias, A, D, delta_bias
    )
    return out


class MambaInner(torch.autograd.Function):  # type: ignore[misc]
    """MambaInnerFn with checkpoint_lvl 1: convolution and time steps are computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor | None) -> torch.Tensor:
        """[B, T, hidden]."""
        xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, out_bias, A, D, bias = _rows_last(inputs)
        x, z = xz.chunk(2, dim=1)
        conv = torch.empty_like(x)
        rows = functional.linear(_as_rows(conv), x_proj)
        delta = dt_proj @ rows[:, : dt_proj.shape[1]].t()
        B, C = (new_empty(len(xz), 1, A.shape[1], xz.shape[2], like=xz) for _ in range(2))
        states, out, gated = _scan_states(x, A), torch.empty_like(conv), torch.empty_like(z)
        del delta
        ctx.save_for_backward(
            xz, conv_weight, conv_bias, rows, x_proj, dt_proj, out_proj, A, B, C, D, bias, states, out
        )
        ctx.has_bias = out_bias is not None
        return functional.linear(gated.transpose(1, 2), out_proj, out_bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """One gradient for x and z together; the rest in the order of the kernel."""
        xz, conv_weight, conv_bias, rows, x_proj, dt_proj, out_proj, A, B, C, D, bias, _, _ = (
            ctx.saved_tensors
        )
        x, _ = xz.chunk(2, dim=1)
        conv = torch.empty_like(x)
        delta = dt_proj @ rows[:, : dt_proj.shape[1]].t()
        d_xz = torch.empty_like(xz)
        grad = grads[0].reshape(-1, grads[0].shape[-1]).t()
        d_y = out_proj.t() @ grad
        d_conv, d_delta, gated = torch.empty_like(conv), torch.empty_like(delta), torch.empty_like(conv)
        d_A, d_D, d_bias = grads_like(A, D, bias)
        summed = [torch.zeros(t.shape, dtype=FULL) for t in (B, C)]
        d_out = grad @ _as_rows(gated)
        d_rows = torch.empty_like(rows)
        d_dt_proj = d_delta @ rows[:, : dt_proj.shape[1]]
        d_x_proj = d_rows.t() @ _as_rows(conv)
        d_conv = d_conv.transpose(0, 1).reshape(len(dt_proj), -1)
        torch.addmm(d_conv, x_proj.t(), d_rows.t(), out=d_conv)
        d_out_bias = grads[0].sum((0, 1)) if ctx.has_bias else None
        d_conv_bias = None if conv_bias is None else summed_grad(conv_bias)
        del d_y, summed
        return (
            d_xz,
            summed_grad(conv_weight),
            d_conv_bias,
            d_x_proj,
            d_dt_proj,
            d_out,
            d_out_bias,
            d_A,
            d_D,
            d_bias,
        )


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """[B, channels, T] as [B x T, channels]."""
    return x.transpose(1, 2).reshape(-1, x.shape[1])


# --- Mamba-2 (mamba_ssm/ops/triton/ssd_combined.py)


def chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """mamba_chunk_scan_combined of x [B, T, H, P], dt [B, T, H], A [H], B and C [B, T, groups, N]."""
    if z is not None:
        raise NotModelledError("mamba_chunk_scan_combined: its gate (z) isn't modelled")
    out: torch.Tensor = ChunkScan.apply(x, dt, A, B, C, D, dt_bias, chunk_size)
    return out


class ChunkScan(torch.autograd.Function):  # type: ignore[misc]
    """Saves its inputs, its output and the cumulated decays [B, H, chunks, chunk] in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        dt_bias: torch.Tensor | None,
        chunk_size: int,
    ) -> torch.Tensor:
        """[B, T, H, P]."""
        ctx.chunk_size = chunk_size
        out, decays = _chunk_scan_forward(x, B, chunk_size)
        ctx.save_for_backward(out, x, dt, decays, A, B, C, D, dt_bias)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """See `_chunk_scan_backward`."""
        _, x, dt, _, A, B, C, D, dt_bias = ctx.saved_tensors
        made = grads_like(B, C, dt)
        d_x = _chunk_scan_backward(x, dt, B, ctx.chunk_size)
        return (d_x, made[2], *grads_like(A), made[0], made[1], *grads_like(D, dt_bias), None)


def _chunk_scan_forward(
    x: torch.Tensor, B: torch.Tensor, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """_mamba_chunk_scan_combined_fwd: the output and the cumulated decays; what else it holds is gone."""
    batch, tokens, heads, size = x.shape
    chunks = -(-tokens // chunk_size)
    decays, steps = (new_empty(batch, heads, chunks, chunk_size, like=x, dtype=FULL) for _ in range(2))
    wide = new_empty(batch, chunks, heads, size, B.shape[-1], like=x, dtype=FULL)
    passed = torch.empty_like(wide, dtype=B.dtype)
    del wide
    scores = new_empty(batch, chunks, B.shape[2], chunk_size, chunk_size, like=x, dtype=FULL)
    out = torch.empty(x.shape, dtype=x.dtype)
    del steps, passed, scores
    return out, decays


def _chunk_scan_backward(x: torch.Tensor, dt: torch.Tensor, B: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """_mamba_chunk_scan_combined_bwd: the gradient of x; what it holds beside is alive until it returns."""
    batch, tokens, heads, size = x.shape
    groups, states = B.shape[2:]
    chunks = -(-tokens // chunk_size)
    per_head = (batch, heads, chunks, chunk_size)
    scores_shape = (batch, chunks, groups, chunk_size, chunk_size)
    state_shape = (batch, chunks, heads, size, states)
    splits = _splits(batch * chunks * heads, heads // groups)
    held = [dt.clone(), *(new_empty(*per_head, like=x, dtype=FULL) for _ in range(2))]
    held.append(new_empty(*scores_shape, like=x, dtype=FULL))
    first = new_empty(*state_shape, like=x, dtype=FULL)
    passed = torch.empty_like(first)
    del first
    d_states = torch.empty_like(passed)
    # Both are narrowed for the products that follow.
    held += [new_empty(*state_shape, like=x) for _ in range(2)]
    del passed, d_states
    d_x = torch.empty(x.shape, dtype=x.dtype)
    held.append(new_empty(*per_head, like=x, dtype=FULL))
    for _ in range(2):
        split = new_empty(batch, tokens, splits, groups, states, like=x, dtype=FULL)
        held += [new_empty(*per_head, like=x, dtype=FULL), split.sum(2)]
        del split
    split = new_empty(batch, chunks, splits, groups, chunk_size, chunk_size, like=x, dtype=FULL)
    held.append(split.sum(2))
    del split
    held += [new_empty(*per_head, like=x, dtype=FULL) for _ in range(2)]
    del held
    return d_x


def _splits(programs: int, heads_per_group: int) -> int:
    """Partial sums over the heads of a group (nsplits in ssd_chunk_scan.py): by the card's multiprocessors."""
    per_program = max(min(-(-programs // NUM_PROCESSORS), heads_per_group), 1)
    return -(-heads_per_group // per_program)


def split_conv_scan(
    zxbcdt: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    chunk_size: int,
    *_: Any,
    rmsnorm_weight: torch.Tensor | None = None,
    outproj_weight: torch.Tensor | None = None,
    outproj_bias: torch.Tensor | None = None,
    headdim: int = 0,
    ngroups: int = 1,
    **__: Any,
) -> torch.Tensor:
    """mamba_split_conv1d_scan_combined of [B, T, all projections]: convolution, scan, gated norm and output in one."""
    if outproj_weight is None:
        raise NotModelledError("mamba_split_conv1d_scan_combined: only with its output projection")
    tensors = (zxbcdt, conv_weight, conv_bias, dt_bias, A, D, rmsnorm_weight, outproj_weight, outproj_bias)
    out: torch.Tensor = SplitConvScan.apply(*tensors, chunk_size, headdim, ngroups)
    return out


class SplitConvScan(torch.autograd.Function):  # type: ignore[misc]
    """MambaSplitConv1dScanCombinedFn: saves the projections and the scan's output; the convolution is redone."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        """[B, T, hidden]."""
        zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm, out_weight, out_bias, *sizes = inputs
        ctx.sizes = sizes
        conv, x, B = _convolved(zxbcdt, conv_weight, len(A), *sizes[1:])
        scanned, _ = _chunk_scan_forward(x, B, sizes[0])
        flat = torch.empty_like(scanned).flatten(2)
        rstd = new_empty(sizes[2] * flat.shape[0] * flat.shape[1], like=flat, dtype=FULL)
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            flat, out_weight = flat.to(dtype), out_weight.to(dtype)
            out_bias = None if out_bias is None else out_bias.to(dtype)
        out: torch.Tensor = functional.linear(flat, out_weight, out_bias)
        del conv
        ctx.save_for_backward(
            zxbcdt, conv_weight, conv_bias, scanned, A, D, dt_bias, norm, rstd, out_weight, out_bias
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """One gradient for all projections; output of norm and convolution again."""
        zxbcdt, conv_weight, conv_bias, scanned, A, D, dt_bias, norm, _, out_weight, out_bias = (
            ctx.saved_tensors
        )
        again = torch.empty_like(scanned).flatten(2)
        conv, x, B = _convolved(zxbcdt, conv_weight, len(A), *ctx.sizes[1:])
        d_all, d_conv = torch.empty_like(zxbcdt), torch.empty_like(conv)
        grad = functional.linear(grads[0].to(out_weight.dtype), out_weight.t())
        d_norm = None
        if norm is not None:
            grad = torch.empty_like(grad)
            partial = new_empty(NUM_PROCESSORS, len(norm), like=norm, dtype=FULL)
            d_norm = partial.sum(0).to(norm.dtype)
            del partial
        _chunk_scan_backward(x, zxbcdt[..., -len(A) :], B, ctx.sizes[0])
        d_out = grads[0].flatten(0, 1).t().to(again.dtype) @ again.flatten(0, 1)
        d_out_bias = None if out_bias is None else grads[0].sum((0, 1))
        d_conv_bias = None if conv_bias is None else summed_grad(conv_bias)
        small = grads_like(dt_bias, A, D)
        del grad, d_conv
        return (
            d_all,
            summed_grad(conv_weight),
            d_conv_bias,
            *small,
            d_norm,
            d_out,
            d_out_bias,
            None,
            None,
            None,
        )


def _convolved(
    zxbcdt: torch.Tensor, conv_weight: torch.Tensor, heads: int, size: int, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The convolution's output [B, T, channels], and x [B, T, H, P] and B [B, T, groups, N] inside it."""
    batch, tokens, _ = zxbcdt.shape
    inner, channels = heads * size, len(conv_weight)
    states = (channels - inner) // groups // 2
    conv = new_empty(batch, tokens, channels, like=zxbcdt)
    x = conv[..., :inner].unflatten(-1, (heads, size))
    return conv, x, conv[..., inner : inner + groups * states].unflatten(-1, (groups, states))
