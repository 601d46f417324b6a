"""Attention of processors, and of documents in rows of their own, as the operations that torch runs (see planner.kernels)."""

from __future__ import annotations

from planner.kernels import Kernel, Precision, saving_all
from planner.specs import LayerSpec
from planner.tape import ZERO, Tape, Tensor, per_token


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


def by_document(kernel: Kernel) -> Kernel:
    """A kernel that is given each document in a row of its own, in copies; what it gives is copied back."""

    def spread(
        tape: Tape, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, how: Precision
    ) -> Tensor:
        copies = [tape.run([t], t.gradient, t.width) for t in (query, key, value)]
        context = kernel(tape, copies[0], copies[1], copies[2], layer, how)
        tape.hold(*copies)
        size = per_token(context.width * layer.num_heads * layer.value_head_dim)
        return tape.run([context], size, context.width)

    return spread
