"""A symbolic autograd tape: which tensors one block keeps for its backward, and its peaks.

A block (planner.blocks) is written as the operations that torch really runs, each with the tensors it saves.
The tape then plays the forward and the backward with autograd's rules for what is alive when:

* an output lives until its last use, or until the backward of the operation that saved it; `hold` keeps it
  longer, as a local variable of the running module does;
* in the backward an operation's input gradients are allocated while its output gradient is alive; an addition
  passes its output's gradient on without a copy;
* a second gradient of the same tensor is added in place, unless another tensor shares the first one
  (torch/csrc/autograd/input_buffer.cpp);
* a weight's gradient stays;
* a checkpointed block is recomputed when its backward first asks for a saved tensor, and only up to the last
  one that it needs (torch/utils/checkpoint.py); reentrantly: from the start, whole, with its output kept.

Sizes are polynomials `(constant, per token, per token x sequence)` in bytes, so one tape answers every batch
and length: `Peaks.at(tokens, seq_len)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Size = tuple[float, float, float]
ZERO: Size = (0.0, 0.0, 0.0)

FULL_WIDTH = 4
"""Bytes per element of float32."""

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
    is_kept: bool = False

    @property
    def gradient(self) -> Size:
        """The size of its gradient."""
        return self.size if self.grad_size is None else self.grad_size


@dataclass(slots=True)
class Operation:
    """One operation of the forward. `temp` is alive only while it runs, `grad_temp` only in its backward.

    `needs_saved`: its backward reads a saved tensor, be it a weight; `shares_grad`: its inputs' gradients are
    its output's own storage.
    """

    inputs: tuple[Tensor, ...]
    output: Tensor
    saves: tuple[Tensor, ...]
    temp: Size
    grad_temp: Size
    weight_grad: Size
    needs_saved: bool
    shares_grad: bool


@dataclass(slots=True)
class _Gradient:
    """One storage that is the gradient of `num_owners` tensors."""

    size: Size
    category: int
    num_owners: int = 0


Snapshot = tuple[Size, Size, Size, Size]
NOTHING: Snapshot = (ZERO, ZERO, ZERO, ZERO)


@dataclass(frozen=True, slots=True)
class Peaks:
    """Candidates for a peak, each split by category; the largest depends on tokens and seq_len."""

    snapshots: tuple[Snapshot, ...]
    _totals: tuple[Size, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """All categories of each candidate together, which decide between them."""
        object.__setattr__(self, "_totals", tuple(_sum(snapshot) for snapshot in self.snapshots))

    def at(self, tokens: int, seq_len: int) -> dict[str, float]:
        """The largest candidate's bytes by category, for that many tokens in rows of `seq_len`."""
        pairs = tokens * seq_len
        best, most = NOTHING, -1.0
        for snapshot, (x, y, z) in zip(self.snapshots, self._totals, strict=True):
            total = x + y * tokens + z * pairs
            if total > most:
                best, most = snapshot, total
        return {name: s[0] + s[1] * tokens + s[2] * pairs for name, s in zip(CATEGORIES, best, strict=True)}


@dataclass(frozen=True, slots=True)
class BlockMemory:
    """What one block keeps for its backward, and the peaks above what was alive before it.

    `saved` is split by category; the block's input is not in it (`saves_input` says whether an operation keeps
    it). `forward` includes what the block has saved so far; `no_grad` is the forward with nothing saved
    (evaluation, and the first pass under checkpointing); `backward` includes what is still saved and all
    gradients made so far; `recompute` is the backward under checkpointing. `weight_gradients` are those that its
    backward leaves behind, `kept` what stays of the first pass under checkpointing until the whole backward is
    done.
    """

    saved: Snapshot
    saves_input: bool
    kept: Snapshot
    weight_gradients: Size
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
        saves_weight: bool = False,
        temp: Size = ZERO,
        grad_temp: Size = ZERO,
        weight_grad: Size = ZERO,
        category: int = ACTIVATIONS,
        shares_grad: bool = False,
    ) -> Tensor:
        """Append one operation and return its output.

        `saves_weight` says that the backward needs a weight, which is there anyway and takes no room.
        """
        needs_grad = weight_grad != ZERO or any(t.needs_grad for t in inputs)
        output = Tensor(size, width, category, needs_grad)
        saved = (*saves, output) if saves_output else tuple(saves)
        output.last_use = index = len(self.operations)
        for tensor in inputs:
            tensor.last_use = index
        if needs_grad:
            for tensor in saved:
                tensor.saved_until = max(tensor.saved_until, index) if tensor.saved_until != -2 else -2
        kept = saved if needs_grad else ()
        needs_saved = needs_grad and (saves_weight or bool(saved))
        self.operations.append(
            Operation(tuple(inputs), output, kept, temp, grad_temp, weight_grad, needs_saved, shares_grad)
        )
        return output

    def hold(self, *tensors: Tensor) -> None:
        """Keep tensors alive through the last operation so far: a variable of a running module holds them."""
        for tensor in tensors:
            tensor.last_use = len(self.operations) - 1

    def keep(self, *tensors: Tensor) -> None:
        """The last operation saves tensors behind a checkpoint's back, until the whole backward is done."""
        op = self.operations[-1]
        if not op.output.needs_grad:
            return
        op.saves += tensors
        for tensor in tensors:
            tensor.is_kept = True
            if tensor.saved_until != -2:
                tensor.saved_until = len(self.operations) - 1

    def play(self, *, is_reentrant: bool = False) -> BlockMemory:
        """Run forward and backward; `is_reentrant` chooses how a checkpoint is recomputed."""
        snapshots, saved = self._forward(keep_saved=True)
        backward = _Backward(self.operations, saved)
        backward.run()
        forward, backward_peaks = _prune(snapshots), _prune(backward.snapshots)
        if is_reentrant:
            output = self.operations[-1].output
            gradient = _with(NOTHING, output.category, output.gradient)
            kept = _with(NOTHING, output.category, output.size)
            recompute = [*_plus(forward, gradient), *_plus(backward_peaks, kept)]
        else:
            again = _prune(snapshots[: self._recompute_end()])
            recompute = [*_plus(again, backward.waiting), *backward_peaks]
        return BlockMemory(
            saved=(saved[0], saved[1], saved[2], saved[3]),
            saves_input=any(t.saved_until == -2 for op in self.operations for t in op.saves),
            kept=NOTHING if is_reentrant else self._kept(),
            weight_gradients=_sum(op.weight_grad for op in self.operations),
            forward=Peaks(forward),
            no_grad=Peaks(_prune(self._forward(keep_saved=False)[0])),
            backward=Peaks(backward_peaks),
            recompute=Peaks(_prune(recompute)),
        )

    def _kept(self) -> Snapshot:
        kept = NOTHING
        for tensor in (op.output for op in self.operations):
            if tensor.is_kept:
                kept = _with(kept, tensor.category, tensor.size)
        return kept

    def _recompute_end(self) -> int:
        """Operations that a recomputation runs: inputs are saved before an operation runs, its output after."""
        for index in range(len(self.operations) - 1, -1, -1):
            op = self.operations[index]
            if op.needs_saved:
                return index + 1 if op.output in op.saves else index
        return 0

    def _forward(self, *, keep_saved: bool) -> tuple[list[Snapshot], list[Size]]:
        live = [ZERO] * 4
        dying: dict[int, list[Tensor]] = {}
        snapshots: list[Snapshot] = []
        for index, op in enumerate(self.operations):
            out = op.output
            live[out.category] = add(live[out.category], out.size)
            moment = (live[0], live[1], live[2], live[3])
            snapshots.append(moment if op.temp is ZERO else _with(moment, WORKSPACE, op.temp))
            if not (keep_saved and out.saved_until >= 0) and index < len(self.operations) - 1:
                dying.setdefault(out.last_use, []).append(out)
            for tensor in dying.pop(index, ()):
                live[tensor.category] = add(live[tensor.category], scale(tensor.size, -1))
        last = self.operations[-1].output
        if last.saved_until < 0:
            live[last.category] = add(live[last.category], scale(last.size, -1))
        return snapshots, live


class _Backward:
    """Plays the operations in reverse.

    `snapshots` are the candidates for the peak, `waiting` the gradients that are alive when a saved tensor is
    first asked for.
    """

    def __init__(self, operations: Sequence[Operation], saved: Sequence[Size]) -> None:
        self.operations, self.live = operations, list(saved)
        self.snapshots: list[Snapshot] = []
        self.waiting = NOTHING
        self._saved = tuple(saved)
        self._gradients: dict[int, _Gradient] = {}

    def run(self) -> None:
        output = self.operations[-1].output
        self._gradients[id(output)] = gradient = self._allocate(output)
        gradient.num_owners = 1
        freed_at = _first_saver(self.operations)
        has_waited = False
        for index in range(len(self.operations) - 1, -1, -1):
            op = self.operations[index]
            if op.needs_saved and not has_waited:
                has_waited = True
                self.waiting = self._beyond_saved()
            if id(op.output) in self._gradients:
                self._step(op)
            for tensor in freed_at.get(index, ()):
                self._change(tensor.category, tensor.size, -1)

    def _step(self, op: Operation) -> None:
        mine = self._gradients.pop(id(op.output))
        wanted = [t for t in op.inputs if t.needs_grad]
        made = [mine if op.shares_grad and t.gradient == mine.size else self._allocate(t) for t in wanted]
        if op.weight_grad is not ZERO:
            self._change(GRADIENTS, op.weight_grad, 1)
        moment = self._snapshot()
        self.snapshots.append(moment if op.grad_temp is ZERO else _with(moment, WORKSPACE, op.grad_temp))
        for gradient in made:
            gradient.num_owners += 1
        self._drop(mine)
        for tensor, gradient in zip(wanted, made, strict=True):
            self._accumulate(tensor, gradient)

    def _accumulate(self, tensor: Tensor, gradient: _Gradient) -> None:
        """Give a tensor its gradient, or add it to the one that is there."""
        there = self._gradients.get(id(tensor))
        if there is None:
            self._gradients[id(tensor)] = gradient
        elif there.num_owners == 1:
            self._drop(gradient)
        else:
            self._gradients[id(tensor)] = total = self._allocate(tensor)
            total.num_owners = 1
            self.snapshots.append(self._snapshot())
            self._drop(there)
            self._drop(gradient)

    def _drop(self, gradient: _Gradient) -> None:
        gradient.num_owners -= 1
        if gradient.num_owners == 0:
            self._change(gradient.category, gradient.size, -1)

    def _allocate(self, tensor: Tensor) -> _Gradient:
        self._change(tensor.category, tensor.gradient, 1)
        return _Gradient(tensor.gradient, tensor.category)

    def _change(self, category: int, size: Size, sign: int) -> None:
        a = self.live[category]
        self.live[category] = (a[0] + sign * size[0], a[1] + sign * size[1], a[2] + sign * size[2])

    def _beyond_saved(self) -> Snapshot:
        live, saved = self.live, self._saved
        differences = [add(live[i], scale(saved[i], -1)) for i in range(4)]
        return (differences[0], differences[1], differences[2], differences[3])

    def _snapshot(self) -> Snapshot:
        return (self.live[0], self.live[1], self.live[2], self.live[3])


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


def _with(snapshot: Snapshot, category: int, size: Size) -> Snapshot:
    changed = [*snapshot]
    changed[category] = add(changed[category], size)
    return (changed[0], changed[1], changed[2], changed[3])


def _sum(sizes: Iterable[Size]) -> Size:
    total = ZERO
    for size in sizes:
        total = add(total, size)
    return total


def _plus(snapshots: Iterable[Snapshot], extra: Snapshot) -> list[Snapshot]:
    """Each candidate with something that is alive beside it."""
    a, b, c, d = extra
    return [(add(s[0], a), add(s[1], b), add(s[2], c), add(s[3], d)) for s in snapshots]


def _prune(snapshots: Iterable[Snapshot]) -> tuple[Snapshot, ...]:
    """Drop the candidates that another one exceeds at every batch and length."""
    totals = [
        (a[1] + b[1] + c[1] + d[1], a[0] + b[0] + c[0] + d[0], a[2] + b[2] + c[2] + d[2], (a, b, c, d))
        for a, b, c, d in snapshots
    ]
    # In falling order a candidate can only be exceeded by one before it.
    totals.sort(reverse=True)
    front: list[tuple[float, float, Snapshot]] = []
    for _, x, z, snapshot in totals:
        for most_x, most_z, _ in front:
            if most_x >= x and most_z >= z:
                break
        else:
            front.append((x, z, snapshot))
    return tuple(entry[2] for entry in front)
