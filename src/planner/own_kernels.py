"""finefit's own kernels (bench.fused, bench.attention) as the operations that torch runs (see planner.tape)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from planner.kernels import MAX_FLASH_HEAD_DIM, Kernel, Precision, flash, flash_temp, saving_all
from planner.operations import Product
from planner.specs import LayerSpec, Matrix
from planner.tape import ZERO, Tape, Tensor, constant, per_token, scale

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Modules that read one input, whose adapters are computed together."""

FLASH_BLOCK = 128
"""Rows that flash's backward over variable lengths holds beside each document's (flash_api.cpp, mha_varlen_bwd)."""


def takes_documents(head_dim: int, value_head_dim: int) -> bool:
    """Whether flash over variable lengths takes the heads: nobody pads them there, and some cards have no backward
    for those between 192 and 224 (sdp_utils.cpp)."""
    fits = head_dim <= 192 or 224 < head_dim <= MAX_FLASH_HEAD_DIM
    return head_dim == value_head_dim and head_dim % 8 == 0 and fits


def adapted(
    tape: Tape,
    x: Tensor,
    matrices: Sequence[Matrix],
    ranks: Sequence[int],
    share: float,
    *,
    adapter: int,
    trains_first: bool,
) -> list[Tensor]:
    """bench.fused.AdaptedLinears: frozen linears of one input with their adapters of `adapter` bytes per element.

    Only the input, where the first factors train, and what those make of it are saved. Adapters wider than the input are
    computed in copies of their own width: of the input, and of one output after the other.
    """
    rank, width, columns = sum(ranks), x.width, matrices[0].in_features * share
    factors = rank * columns / share
    is_wide = adapter != width
    inner = tape.run(
        [x],
        per_token(adapter * rank * share),
        adapter,
        temp=per_token(is_wide * adapter * columns),
        product=Product(flops=per_token(2.0 * rank * columns), weight_bytes=adapter * factors, backward=0.0),
    )
    inner.needs_grad = False
    sizes = [per_token(width * matrix.out_features * share) for matrix in matrices]
    num_out = [matrix.out_features * share for matrix in matrices]
    ups = sum(r * matrix.out_features for r, matrix in zip(ranks, matrices, strict=True))
    trained = ups + factors * trains_first
    first = tape.run(
        [x, inner],
        sizes[0],
        width,
        saves=[*([x] if trains_first else []), inner],
        saves_weight=True,
        temp=per_token(is_wide * adapter * num_out[-1]),
        grad_temp=per_token(is_wide * adapter * max(columns, *num_out)),
        weight_grad=constant(adapter * trained),
        product=_product(matrices, share, ranks, trains_first=trains_first, width=width),
    )
    return [first, *tape.also(sizes[1:])]


def _product(
    matrices: Sequence[Matrix], share: float, ranks: Sequence[int], *, trains_first: bool, width: int
) -> Product:
    """Of the linears and the adapters' second factors; the backward has the gradients of input and adapters."""
    linears = 2.0 * share * sum(m.in_features * m.out_features for m in matrices)
    seconds = 2.0 * share * sum(r * m.out_features for r, m in zip(ranks, matrices, strict=True))
    firsts = 2.0 * share * sum(ranks) * matrices[0].in_features
    forward = linears + seconds
    return Product(
        flops=per_token(forward),
        weight_bytes=width * sum(m.in_features * m.out_features for m in matrices),
        backward=(linears + 2 * seconds + (1 + trains_first) * firsts) / forward,
    )


def gated_silu(tape: Tape, gate: Tensor, up: Tensor) -> Tensor:
    """bench.fused.GatedSilu: saves what goes in."""
    width = max(gate.width, up.width)
    return tape.run([gate, up], scale(up.size, width / up.width), width, saves=[gate, up])


def knows_gate(roles: Mapping[str, Matrix], layer: LayerSpec) -> bool:
    """Whether bench.fused knows the feed-forward part's gate."""
    names = tuple(roles[role].module for role in ("gate", "up", "down"))
    return names == ("gate_proj", "up_proj", "down_proj") and layer.activation == "silu"


def cpu_kernel(*, is_own: bool) -> Kernel:
    """torch's, or finefit's."""
    return by_products if is_own else on_cpu


def on_cpu(tape: Tape, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, how: Precision) -> Tensor:
    """The CPU's flash attention: what CUDA's saves, and nothing is held beside it."""
    return saving_all(tape, (query, key, value), layer, ZERO)


def by_products(
    tape: Tape, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, how: Precision
) -> Tensor:
    """The same with finefit's backward (bench.attention), which saves no more than what goes in."""
    return saving_all(tape, (query, key, value), layer, ZERO, keeps=False)


def _documents_flash(
    held_rows: float, tape: Tape, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, how: Precision
) -> Tensor:
    return saving_all(tape, (query, key, value), layer, flash_temp(layer, query.width, held_rows))


def by_document(kernel: Kernel, layer: LayerSpec, held_rows: float) -> Kernel:
    """A kernel that is given each document in a row of its own, in copies; what it gives is copied back.

    Flash takes the documents as they lie; its backward holds `held_rows` for each token.
    """
    if kernel is flash and takes_documents(layer.head_dim, layer.value_head_dim):
        return functools.partial(_documents_flash, held_rows)

    def spread(
        tape: Tape, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, how: Precision
    ) -> Tensor:
        copies = [tape.run([t], t.gradient, t.width) for t in (query, key, value)]
        context = kernel(tape, copies[0], copies[1], copies[2], layer, how)
        tape.hold(*copies)
        size = per_token(context.width * layer.num_heads * layer.value_head_dim)
        return tape.run([context], size, context.width)

    return spread
