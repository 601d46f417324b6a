"""Attention of processors, and of documents in rows of their own, as the operations that torch runs (see planner.kernels)."""

from __future__ import annotations

import functools

from planner.kernels import MAX_FLASH_HEAD_DIM, Kernel, Precision, flash, flash_temp, saving_all
from planner.specs import LayerSpec
from planner.tape import ZERO, Tape, Tensor, per_token

FLASH_BLOCK = 128
"""Rows that flash's backward over variable lengths holds beside each document's (flash_api.cpp, mha_varlen_bwd)."""


def takes_documents(head_dim: int, value_head_dim: int) -> bool:
    """Whether flash over variable lengths takes the heads: nobody pads them there, and some cards have no backward
    for those between 192 and 224 (sdp_utils.cpp)."""
    fits = head_dim <= 192 or 224 < head_dim <= MAX_FLASH_HEAD_DIM
    return head_dim == value_head_dim and head_dim % 8 == 0 and fits


def cpu_kernel(*, spreads: bool) -> Kernel:
    """torch's, or finefit's for documents in rows of their own."""
    return by_products if spreads else on_cpu


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
