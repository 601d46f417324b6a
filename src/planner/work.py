"""What the operations of a block cost, read off its tape (planner.tape): matrix products, bytes moved, launches.

The same operations that say what a block saves say what it does, so an architecture gets its time with its memory.
An operation reads its inputs and writes its output; what it holds for a moment is written and read. In the backward
it reads its output's gradient and what it saved, and writes a gradient for each input that needs one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from planner.operations import ATTENTION, Operation, Product, Tensor
from planner.sizes import ZERO, Size, constant, scale, sum_of

DEQUANTISED_BYTES = 2.5
"""Moved for each weight: half a byte is read, with its share of the constants, and two are written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Matmul:
    """One matrix product: FLOPs, bytes of its operands and result, and the width of the operands' elements in bytes.

    `of_weight`: its result is a weight's gradient.
    """

    flops: Size
    moved: Size
    width: int
    count: int = 1
    of_weight: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What some operations do in one pass.

    `attention`: FLOPs inside fused attention kernels for all pairs of positions, of which `skipping` leaves the masked
    ones out. `moved`: bytes that everything but matrix products moves. `num_dequantised`: weights unpacked.
    `num_launches`: kernels started.
    """

    matmuls: tuple[Matmul, ...] = ()
    attention: Size = ZERO
    skipping: Size = ZERO
    moved: Size = ZERO
    num_dequantised: float = 0.0
    num_launches: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """A block's forward, its backward, and the part of the forward that a checkpoint runs again.

    `output_width`: bytes per element of what it gives.
    """

    forward: Work
    backward: Work
    again: Work
    output_width: int


def passes(operations: Sequence[Operation], recomputed: int) -> Passes:
    """The work of all operations; a checkpoint runs the first `recomputed` of them again."""
    return Passes(
        forward=_Sum().forward(operations).work(),
        backward=_Sum().backward(operations).work(),
        again=_Sum().forward(operations[:recomputed]).work(),
        output_width=operations[-1].output.width,
    )


class _Sum:
    """Adds up the work of operations, each `times` as often."""

    def __init__(self, times: int = 1) -> None:
        self.times = times
        self.products: dict[tuple[Size, Size, int, bool], int] = {}
        self.attention, self.skipping = _Sizes(), _Sizes()
        self.moved = _Sizes()
        self.num_dequantised = 0.0
        self.num_launches = 0

    def work(self) -> Work:
        """What was added up; equal products are counted, not repeated."""
        return Work(
            matmuls=tuple(
                Matmul(flops=flops, moved=moved, width=width, count=count, of_weight=of_weight)
                for (flops, moved, width, of_weight), count in self.products.items()
            ),
            attention=self.attention.size(),
            skipping=self.skipping.size(),
            moved=self.moved.size(),
            num_dequantised=self.num_dequantised,
            num_launches=self.num_launches,
        )

    def forward(self, operations: Iterable[Operation]) -> _Sum:
        """All of them in order."""
        for op in operations:
            if op.others:
                self._repeat(op.num_others, _Sum.forward, op.others)
            else:
                self._forward(op)
        return self

    def backward(self, operations: Sequence[Operation]) -> _Sum:
        """In reverse, as long as gradients arrive; a second gradient of a tensor is added to the first one."""
        arrived = {id(operations[-1].output)}
        for op in reversed(operations):
            if op.others:
                self._repeat(op.num_others, _Sum.backward, op.others)
            if not any(id(output) in arrived for output in op.outputs):
                continue
            wanted = [t for t in op.inputs if t.needs_grad]
            self._backward(op, wanted)
            for tensor in wanted:
                if id(tensor) in arrived and op.output.base is None:
                    self._move(tensor.gradient, 3.0)
                    self.num_launches += self.times
                arrived.add(id(tensor))
        return self

    def _repeat(
        self, count: int, play: Callable[[_Sum, Sequence[Operation]], _Sum], operations: Sequence[Operation]
    ) -> None:
        before, self.times = self.times, self.times * count
        play(self, operations)
        self.times = before

    def _move(self, size: Size, factor: float = 1.0) -> None:
        self.moved.add(size, factor * self.times)

    def _launch(self, count: int) -> None:
        self.num_launches += count * self.times

    def _forward(self, op: Operation) -> None:
        is_view = op.output.size == ZERO and op.product is None
        self._launch((not is_view) + (op.temp != ZERO))
        self._beside(op, op.temp)
        self._move(op.traffic)
        if op.product is not None:
            weight = constant(op.product.weight_bytes)
            sizes = [t.gradient for t in op.inputs] + [t.size for t in op.outputs]
            self._multiply(op, [*sizes, weight], 1.0)
        elif not is_view:
            self._move(op.output.size)
            for tensor in op.inputs:
                self._move(tensor.gradient)

    def _beside(self, op: Operation, temp: Size) -> None:
        """What is held for a moment is written and read; unpacked weights are counted apart."""
        if op.num_dequantised:
            self.num_dequantised += self.times * op.num_dequantised
        elif temp != ZERO:
            self._move(temp, 2.0)

    def _backward(self, op: Operation, wanted: Sequence[Tensor]) -> None:
        if op.product is None and op.output.base is not None:
            self._move(op.output.gradient, 2.0)
            self._launch(1)
        elif op.product is None and (op.shares_grad or op.joins):
            for tensor in wanted:
                if op.shares_grad and tensor.width != op.output.width:
                    self._move(tensor.gradient)
                    self._move(op.output.gradient)
                    self._launch(1)
        else:
            self._beside(op, op.grad_temp)
            self._launch(int(op.grad_temp != ZERO))
            self._own_gradients(op, wanted)

    def _own_gradients(self, op: Operation, wanted: Sequence[Tensor]) -> None:
        if op.product is not None:
            self._product_gradients(op, op.product, wanted)
            return
        for size in (op.output.gradient, op.weight_grad, *(t.gradient for t in (*op.saves, *wanted))):
            self._move(size)
        self._launch(len(wanted) + (op.weight_grad != ZERO))

    def _product_gradients(self, op: Operation, product: Product, wanted: Sequence[Tensor]) -> None:
        inputs, out = [t.gradient for t in op.inputs], sum_of(t.gradient for t in op.outputs)
        if product.backward is not None:
            if product.backward:
                self._multiply(op, [*inputs, out, *(t.gradient for t in wanted)], product.backward)
            return
        weight = constant(product.weight_bytes)
        for of_weight in [False] * len(wanted) + [True] * product.trains_weight:
            # Each gradient reads the other operand and is as large as its own.
            self._multiply(op, [*inputs, out, weight], 1.0, of_weight=of_weight)
            self._launch(1)

    def _multiply(
        self, op: Operation, sizes: Sequence[Size], times: float, *, of_weight: bool = False
    ) -> None:
        product = op.product
        assert product is not None
        flops, moved = scale(product.flops, times), sum_of(sizes)
        if product.kind == ATTENTION:
            (self.skipping if product.skips else self.attention).add(flops, self.times)
            self._move(moved)
            return
        key = flops, moved, op.output.width, of_weight
        self.products[key] = self.products.get(key, 0) + self.times


class _Sizes:
    """A sum of sizes, in place."""

    def __init__(self) -> None:
        self.parts = [0.0, 0.0, 0.0, 0.0]

    def add(self, size: Size, factor: float) -> None:
        """Add a size so many times."""
        for i, part in enumerate(size):
            if part:
                self.parts[i] += factor * part

    def size(self) -> Size:
        """The sum."""
        a, b, c, d = self.parts
        return (a, b, c, d)
