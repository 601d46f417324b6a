"""A symbolic autograd tape: which tensors one block keeps for its backward, and its peaks.

A block (planner.blocks) is written as the operations that torch really runs, each with the tensors it saves.
The tape then plays the forward and the backward with autograd's rules for what is alive when:

* an output lives until its last use, or until the backward of the operation that saved it;
* in the backward an operation's input gradients are allocated while its output gradient is alive; a second
  gradient of the same tensor is added in place and then freed (torch/csrc/autograd/input_buffer.cpp);
* a weight's gradient stays.

Sizes are polynomials `(constant, per token, per token x sequence)` in bytes, so one tape answers every batch
and length: `Peaks.at(tokens, seq_len)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Size = tuple[float, float, float]
ZERO: Size = (0.0, 0.0, 0.0)

ACTIVATIONS, LOGITS, WORKSPACE, GRADIENTS = range(4)
CATEGORIES = ("activations", "logits", "workspace", "gradients")


def per_token(num_bytes: float) -> Size:
    """A size that grows with the number of tokens in the micro-batch."""
    return (0.0, num_bytes, 0.0)


def constant(num_bytes: float) -> Size:
    """A size that doesn't depend on the batch."""
    return (num_bytes, 0.0, 0.0)


def add(a: Size, b: Size) -> Size:
    """The sum of two sizes."""
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2])


def scale(a: Size, factor: float) -> Size:
    """A size times a number."""
    return (a[0] * factor, a[1] * factor, a[2] * factor)


def evaluate(size: Size, tokens: int, seq_len: int) -> float:
    """Bytes for a micro-batch of `tokens` tokens in rows of `seq_len`."""
    return size[0] + size[1] * tokens + size[2] * tokens * seq_len


@dataclass(slots=True)
class Tensor:
    """One storage: its size, its dtype's width in bytes, its category, and whether a gradient flows into it.

    `grad_size` is the gradient's where it isn't the tensor's own.
    """

    size: Size
    width: int
    category: int
    needs_grad: bool
    last_use: int = -1
    saved_until: int = -1
    grad_size: Size | None = None

    @property
    def gradient(self) -> Size:
        """The size of its gradient."""
        return self.size if self.grad_size is None else self.grad_size


@dataclass(slots=True)
class Operation:
    """One operation of the forward. `temp` is alive only while it runs, `grad_temp` only in its backward."""

    inputs: tuple[Tensor, ...]
    output: Tensor
    saves: tuple[Tensor, ...]
    temp: Size
    grad_temp: Size
    weight_grad: Size


Snapshot = tuple[Size, Size, Size, Size]


@dataclass(frozen=True, slots=True)
class Peaks:
    """Candidates for a peak, each split by category; the largest depends on tokens and seq_len."""

    snapshots: tuple[Snapshot, ...]

    def at(self, tokens: int, seq_len: int) -> dict[str, float]:
        """The largest candidate's bytes by category, for that many tokens in rows of `seq_len`."""
        best, best_total = [0.0] * 4, -1.0
        for snapshot in self.snapshots:
            sizes = [evaluate(s, tokens, seq_len) for s in snapshot]
            total = sum(sizes)
            if total > best_total:
                best, best_total = sizes, total
        return dict(zip(CATEGORIES, best, strict=True))


@dataclass(frozen=True, slots=True)
class BlockMemory:
    """What one block keeps for its backward, and the peaks above what was alive before it.

    `saved` is split by category; the block's input is not in it (`saves_input` says whether an operation keeps
    it). `forward` includes what the block has saved so far; `no_grad` is the forward with nothing saved
    (evaluation, and the first pass under checkpointing); `backward` includes what is still saved and all
    gradients made so far; `recompute` is the backward under checkpointing: the forward again with the
    output's gradient alive, then the backward.
    """

    saved: Snapshot
    saves_input: bool
    forward: Peaks
    no_grad: Peaks
    backward: Peaks
    recompute: Peaks


@dataclass(slots=True)
class Tape:
    """Records operations; `play()` answers."""

    operations: list[Operation] = field(default_factory=list)

    def input(
        self, size: Size, width: int, *, needs_grad: bool = True, category: int = ACTIVATIONS
    ) -> Tensor:
        """A tensor that exists before the block; it isn't counted, its gradient is."""
        return Tensor(size, width, category, needs_grad, saved_until=-2)

    def run(
        self,
        inputs: Sequence[Tensor],
        size: Size,
        width: int,
        *,
        saves: Iterable[Tensor] = (),
        saves_output: bool = False,
        temp: Size = ZERO,
        grad_temp: Size = ZERO,
        weight_grad: Size = ZERO,
        category: int = ACTIVATIONS,
    ) -> Tensor:
        """Append one operation and return its output."""
        needs_grad = weight_grad != ZERO or any(t.needs_grad for t in inputs)
        output = Tensor(size, width, category, needs_grad)
        saved = (*saves, output) if saves_output else tuple(saves)
        index = len(self.operations)
        for tensor in inputs:
            tensor.last_use = index
        output.last_use = index
        if needs_grad:
            for tensor in saved:
                tensor.saved_until = max(tensor.saved_until, index) if tensor.saved_until != -2 else -2
        kept = saved if needs_grad else ()
        self.operations.append(Operation(tuple(inputs), output, kept, temp, grad_temp, weight_grad))
        return output

    def play(self) -> BlockMemory:
        """Run forward and backward."""
        snapshots, saved = self._forward(keep_saved=True)
        forward, backward = _prune(snapshots), _prune(self._backward(saved))
        output = self.operations[-1].output
        again = [_with(s, output.category, output.gradient) for s in forward]
        return BlockMemory(
            saved=(saved[0], saved[1], saved[2], saved[3]),
            saves_input=any(t.saved_until == -2 for op in self.operations for t in op.saves),
            forward=Peaks(forward),
            no_grad=Peaks(_prune(self._forward(keep_saved=False)[0])),
            backward=Peaks(backward),
            recompute=Peaks(_prune([*again, *backward])),
        )

    def _forward(self, *, keep_saved: bool) -> tuple[list[Snapshot], list[Size]]:
        live = [ZERO] * 4
        dying: dict[int, list[Tensor]] = {}
        snapshots: list[Snapshot] = []
        for index, op in enumerate(self.operations):
            out = op.output
            live[out.category] = add(live[out.category], out.size)
            snapshots.append(_with((live[0], live[1], live[2], live[3]), WORKSPACE, op.temp))
            if not (keep_saved and out.saved_until >= 0) and index < len(self.operations) - 1:
                dying.setdefault(out.last_use, []).append(out)
            for tensor in dying.pop(index, ()):
                live[tensor.category] = add(live[tensor.category], scale(tensor.size, -1))
        last = self.operations[-1].output
        if last.saved_until < 0:
            live[last.category] = add(live[last.category], scale(last.size, -1))
        return snapshots, live

    def _backward(self, saved: Sequence[Size]) -> list[Snapshot]:
        live = list(saved)
        last = self.operations[-1].output
        gradients: set[int] = {id(last)}
        live[last.category] = add(live[last.category], last.gradient)
        freed_at = _first_saver(self.operations)
        snapshots: list[Snapshot] = []
        for index in range(len(self.operations) - 1, -1, -1):
            op = self.operations[index]
            if not op.output.needs_grad:
                _free(live, freed_at.get(index, ()))
                continue
            new = [*live]
            new[WORKSPACE] = add(new[WORKSPACE], op.grad_temp)
            new[GRADIENTS] = add(new[GRADIENTS], op.weight_grad)
            wanted = [t for t in op.inputs if t.needs_grad]
            for tensor in wanted:
                new[tensor.category] = add(new[tensor.category], tensor.gradient)
            snapshots.append((new[0], new[1], new[2], new[3]))
            live[GRADIENTS] = add(live[GRADIENTS], op.weight_grad)
            for tensor in wanted:
                if id(tensor) not in gradients:
                    gradients.add(id(tensor))
                    live[tensor.category] = add(live[tensor.category], tensor.gradient)
            live[op.output.category] = add(live[op.output.category], scale(op.output.gradient, -1))
            gradients.discard(id(op.output))
            _free(live, freed_at.get(index, ()))
        return snapshots


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


def _free(live: list[Size], tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        live[tensor.category] = add(live[tensor.category], scale(tensor.size, -1))


def _with(snapshot: Snapshot, category: int, size: Size) -> Snapshot:
    changed = [*snapshot]
    changed[category] = add(changed[category], size)
    return (changed[0], changed[1], changed[2], changed[3])


def _prune(snapshots: Sequence[Snapshot]) -> tuple[Snapshot, ...]:
    """Drop the candidates that another one exceeds at every batch and length."""
    front: list[tuple[Size, Snapshot]] = []
    for snapshot in snapshots:
        a, b, c, d = snapshot
        total = (a[0] + b[0] + c[0] + d[0], a[1] + b[1] + c[1] + d[1], a[2] + b[2] + c[2] + d[2])
        if any(_covers(other, total) for other, _ in front):
            continue
        front = [kept for kept in front if not _covers(total, kept[0])]
        front.append((total, snapshot))
    return tuple(snapshot for _, snapshot in front)


def _covers(a: Size, b: Size) -> bool:
    return a[0] >= b[0] and a[1] >= b[1] and a[2] >= b[2]
