"""The backward of recorded operations (planner.tape): which gradients and saved tensors are alive at each moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.operations import Operation, Tensor
from planner.sizes import GRADIENTS, NOTHING, WORKSPACE, ZERO, Size, Snapshot, add, scale, with_at


@dataclass(slots=True)
class _Gradient:
    """One storage that is the gradient of `num_owners` tensors."""

    size: Size
    category: int
    is_view: bool = False
    num_owners: int = 0


class Backward:
    """Plays the operations in reverse.

    `snapshots` are the candidates for the peak, `made` what is alive after each weight's gradient,
    with all that have been made so far, `waiting` the gradients that are alive when a saved tensor is
    first asked for.
    """

    def __init__(
        self,
        operations: Sequence[Operation],
        saved: Sequence[Size],
        step_factor: float | None,
        *,
        frees_kept: bool,
    ) -> None:
        self.operations, self.live = operations, list(saved)
        self.step_factor, self.frees_kept = step_factor, frees_kept
        self.snapshots: list[Snapshot] = []
        self.made: list[tuple[Size, Snapshot]] = []
        self.waiting = NOTHING
        self._saved = tuple(saved)
        self._gradients: dict[int, _Gradient] = {}

    def begin(self, tensors: Sequence[Tensor]) -> None:
        """Tensors that have a gradient before the first operation, from later blocks."""
        for tensor in tensors:
            self._gradients[id(tensor)] = self._allocate(tensor, 1)

    def run(self) -> None:
        """From the last operation to the first."""
        output = self.operations[-1].output
        self._gradients[id(output)] = self._allocate(output, 1)
        freed_at = _first_saver(self.operations)
        has_waited = False
        for index in range(len(self.operations) - 1, -1, -1):
            op = self.operations[index]
            if op.needs_saved and not has_waited:
                has_waited = True
                self.waiting = self._beyond_saved()
            freed = [t for t in freed_at.get(index, ()) if self.frees_kept or not t.is_kept]
            if any(id(output) in self._gradients for output in op.outputs):
                self._step(op, freed)
            else:
                self._free(freed)

    def _free(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            self._change(tensor.category, tensor.size, -1)

    def _step(self, op: Operation, freed: Sequence[Tensor]) -> None:
        """One operation's gradients; what it saved is gone before its weight's gradient is used (torch's engine.cpp)."""
        others = [self._gradients.pop(id(t)) for t in op.more if id(t) in self._gradients]
        # What nothing reads has a gradient of zeros.
        mine = self._gradients.pop(id(op.output), None) or self._allocate(op.output, 1)
        wanted = [t for t in op.inputs if t.needs_grad and not (op.splits and id(t) in self._gradients)]
        made = [mine if _is_shared(op, t, mine) else self._allocate(t) for t in wanted]
        for gradient in made:
            gradient.is_view = gradient.is_view or op.views_grad
        if op.weight_grad is not ZERO:
            self._change(GRADIENTS, op.weight_grad, 1)
        moment = self._snapshot()
        self.snapshots.append(moment if op.grad_temp is ZERO else with_at(moment, WORKSPACE, op.grad_temp))
        for gradient in made:
            gradient.num_owners += 1
        for gradient in (mine, *others):
            self._drop(gradient)
        self._free(freed)
        if op.weight_grad is not ZERO:
            before = self.made[-1][0] if self.made else ZERO
            self.made.append((add(before, op.weight_grad), self._snapshot()))
        if op.copies_grad:
            self.snapshots.append(with_at(self._snapshot(), GRADIENTS, op.weight_grad))
        if self.step_factor is not None and op.weight_grad is not ZERO:
            self.snapshots.append(
                with_at(self._snapshot(), GRADIENTS, scale(op.weight_grad, self.step_factor))
            )
            self._change(GRADIENTS, op.weight_grad, -1)
        for tensor, gradient in zip(wanted, made, strict=True):
            self._accumulate(tensor, gradient)

    def _accumulate(self, tensor: Tensor, gradient: _Gradient) -> None:
        """Give a tensor its gradient, or add it to the one that is there."""
        there = self._gradients.get(id(tensor))
        if there is None:
            self._gradients[id(tensor)] = gradient
        elif there.num_owners == 1 and not there.is_view:
            self._drop(gradient)
        else:
            self._gradients[id(tensor)] = self._allocate(tensor, 1)
            self.snapshots.append(self._snapshot())
            self._drop(there)
            self._drop(gradient)

    def _drop(self, gradient: _Gradient) -> None:
        gradient.num_owners -= 1
        if gradient.num_owners == 0:
            self._change(gradient.category, gradient.size, -1)

    def _allocate(self, tensor: Tensor, num_owners: int = 0) -> _Gradient:
        self._change(tensor.category, tensor.gradient, 1)
        return _Gradient(tensor.gradient, tensor.category, num_owners=num_owners)

    def _change(self, category: int, size: Size, sign: int) -> None:
        a = self.live[category]
        self.live[category] = (
            a[0] + sign * size[0],
            a[1] + sign * size[1],
            a[2] + sign * size[2],
            a[3] + sign * size[3],
        )

    def _beyond_saved(self) -> Snapshot:
        live, saved = self.live, self._saved
        differences = [add(live[i], scale(saved[i], -1)) for i in range(4)]
        return (differences[0], differences[1], differences[2], differences[3])

    def _snapshot(self) -> Snapshot:
        return (self.live[0], self.live[1], self.live[2], self.live[3])


def _is_shared(op: Operation, tensor: Tensor, gradient: _Gradient) -> bool:
    """Whether an input's gradient is the output's storage: a cast needs its own."""
    if op.joins:
        return tensor.width == op.output.width
    return op.shares_grad and tensor.gradient == gradient.size


def _first_saver(operations: Sequence[Operation]) -> dict[int, list[Tensor]]:
    """For each operation the saved tensors that its backward is the last to need (inputs of the block apart)."""
    first: dict[int, tuple[int, Tensor]] = {}
    for index, op in enumerate(operations):
        for tensor in op.saves:
            if tensor.saved_until >= 0:
                first.setdefault(id(tensor), (index, tensor))
    freed: dict[int, list[Tensor]] = {}
    for index, tensor in first.values():
        freed.setdefault(index, []).append(tensor)
    return freed
