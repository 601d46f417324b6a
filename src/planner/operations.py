"""What planner.tape records: tensors, and the operations that make and save them."""

from __future__ import annotations

from dataclasses import dataclass

from planner.sizes import ZERO, Size

MATMUL, ATTENTION = "matmul", "attention"
"""Kinds of matrix products: torch's own, and those inside a fused attention kernel, which holds no scores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """The matrix product that an operation is, with the `flops` of its forward.

    `weight_bytes`: of an operand that isn't on the tape; `trains_weight`: that one has a gradient. `backward`: FLOPs of
    the backward over those of the forward, None where each gradient of an operand is a product like this one. `skips`:
    masked pairs of positions, which `flops` counts, are left out.
    """

    flops: Size
    kind: str = MATMUL
    weight_bytes: float = 0.0
    trains_weight: bool = False
    backward: float | None = None
    skips: bool = False


@dataclass(slots=True)
class Tensor:
    """One storage: its size, its dtype's width in bytes, its category, and whether a gradient flows into it.

    It lives until the operation `last_use`, and until `graph_use` where a graph is recorded. `grad_size` is the
    gradient's where it isn't the tensor's own. `is_kept`: saved behind a checkpoint's back; `is_cached`: by autocast, until its context ends. `base`: the tensor that it is a part of, without memory of its own.
    """

    size: Size
    width: int
    category: int
    needs_grad: bool
    last_use: int = -1
    graph_use: int = -1
    saved_until: int = -1
    grad_size: Size | None = None
    is_kept: bool = False
    is_cached: bool = False
    base: Tensor | None = None

    @property
    def gradient(self) -> Size:
        """The size of its gradient."""
        return self.size if self.grad_size is None else self.grad_size


@dataclass(slots=True)
class Operation:
    """One operation of the forward. `temp` is alive only while it runs, `grad_temp` only in its backward.

    `needs_saved`: its backward reads a saved tensor, be it a weight; `shares_grad`: its inputs' gradients are
    its output's own storage; `views_grad`: they are views of what it made; `copies_grad`: its weight's is
    copied into the weight's layout; `joins`: they are views of its output's;
    `splits`: its output is one of several parts, whose gradients are joined in one new tensor. `product`: the matrix
    product that it is; `num_dequantised`: weights that it dequantises before, in its backward too; `traffic`: bytes
    that it moves beyond its tensors. `more`: what else it gives; all gradients are there before its backward. It stands for `num_others` runs of the operations `others` too.
    """

    inputs: tuple[Tensor, ...]
    output: Tensor
    saves: tuple[Tensor, ...]
    temp: Size
    grad_temp: Size
    weight_grad: Size
    needs_saved: bool
    shares_grad: bool
    views_grad: bool
    joins: bool = False
    splits: bool = False
    product: Product | None = None
    num_dequantised: float = 0.0
    traffic: Size = ZERO
    others: tuple[Operation, ...] = ()
    num_others: int = 0
    copies_grad: bool = False
    more: tuple[Tensor, ...] = ()

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """All that it gives."""
        return (self.output, *self.more)
