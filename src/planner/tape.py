"""A symbolic autograd tape: which tensors one block keeps for its backward, and its peaks.

A block (planner.blocks) is written as the operations that torch really runs, each with the tensors it saves.
The tape then plays the forward and the backward with autograd's rules for what is alive when:

* an output lives until its last use, or until the backward of the operation that saved it; `hold` keeps it
  longer, as a local variable of the running module does;
* in the backward an operation's input gradients are allocated while its output gradient is alive; an addition
  passes its output's gradient on without a copy;
* a second gradient of the same tensor is added in place, unless another tensor shares the first one or it is a
  view (torch/csrc/autograd/input_buffer.cpp);
* a weight's gradient stays;
* a checkpointed block is recomputed when its backward first asks for a saved tensor, and only up to the last
  one that it needs (torch/utils/checkpoint.py); reentrantly: from the start, whole, with its output kept.

Sizes are polynomials `(constant, per token, per token x sequence, per sequence x sequence)` in bytes, so one tape
answers every batch and length: `Peaks.at(tokens, seq_len)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from planner.backward import Backward
from planner.operations import Operation, Product, Tensor
from planner.sizes import (
    ACTIVATIONS,
    CATEGORIES,
    FULL_WIDTH,
    GRADIENTS,
    LOGITS,
    NOTHING,
    WORKSPACE,
    ZERO,
    Size,
    Snapshot,
    add,
    constant,
    evaluate,
    per_pair,
    per_square,
    per_token,
    plus_beside,
    pruned,
    scale,
    sum_of,
    with_at,
)
from planner.work import Passes, passes

__all__ = [
    "ACTIVATIONS",
    "CATEGORIES",
    "FULL_WIDTH",
    "GRADIENTS",
    "LOGITS",
    "NOTHING",
    "WORKSPACE",
    "ZERO",
    "BlockMemory",
    "Operation",
    "Peaks",
    "Size",
    "Snapshot",
    "Tape",
    "Tensor",
    "add",
    "constant",
    "evaluate",
    "per_pair",
    "per_square",
    "per_token",
    "scale",
]


@dataclass(frozen=True, slots=True)
class Peaks:
    """Candidates for a peak, each split by category; the largest depends on tokens and seq_len.

    `totals`: all categories of each candidate together, which decide between them.
    """

    snapshots: tuple[Snapshot, ...]
    totals: tuple[Size, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "totals", tuple(sum_of(snapshot) for snapshot in self.snapshots))

    def at(self, tokens: int, seq_len: int) -> dict[str, float]:
        """The largest candidate's bytes by category, for that many tokens in rows of `seq_len`."""
        pairs, squares = tokens * seq_len, seq_len * seq_len
        best, most = NOTHING, -1.0
        for snapshot, (w, x, y, z) in zip(self.snapshots, self.totals, strict=True):
            total = w + x * tokens + y * pairs + z * squares
            if total > most:
                best, most = snapshot, total
        return {
            name: s[0] + s[1] * tokens + s[2] * pairs + s[3] * squares
            for name, s in zip(CATEGORIES, best, strict=True)
        }


@dataclass(frozen=True, slots=True)
class BlockMemory:
    """What one block keeps for its backward, and the peaks above what was alive before it.

    `input` is the size of what it is given, `output_width` the bytes per element of what it gives. `saved` is split by category; the block's input is not in it (`saves_input` says whether an operation keeps
    it, `saves_outer` the same of what several blocks read; `handed_on` is read by later blocks). `forward` includes what the block has saved so far; `no_grad` is the forward with nothing saved
    (evaluation, and the first pass under checkpointing); `backward` includes what is still saved and all
    gradients made so far; `recompute` is the backward under checkpointing; `made` is what is alive in either after each
    weight's gradient, beside the size of all so far. `weight_gradients` are those that its
    backward leaves behind, `kept` what stays of the first pass under checkpointing until the whole backward is
    done, `cached` what autocast keeps of it until the whole forward is.
    """

    input: Size
    output_width: int
    saved: Snapshot
    saves_input: bool
    saves_outer: bool
    handed_on: Size
    kept: Snapshot
    cached: Size
    weight_gradients: Size
    forward: Peaks
    no_grad: Peaks
    backward: Peaks
    recompute: Peaks
    made: tuple[tuple[Size, Snapshot], ...]


@dataclass(slots=True)
class Tape:
    """Records operations; `play()` answers. `variables`: what the attention's forward itself holds until it is done."""

    operations: list[Operation] = field(default_factory=list)
    returned: list[Tensor] = field(default_factory=list)
    given: list[Tensor] = field(default_factory=list)
    outers: list[Tensor] = field(default_factory=list)
    begun: list[Tensor] = field(default_factory=list)
    handed: list[Tensor] = field(default_factory=list)
    variables: list[Tensor] = field(default_factory=list)

    def input(
        self, size: Size, width: int, *, needs_grad: bool = True, category: int = ACTIVATIONS
    ) -> Tensor:
        """A tensor that exists before the block; it isn't counted, its gradient is."""
        self.given.append(Tensor(size, width, category, needs_grad, saved_until=-2))
        return self.given[-1]

    def outer(self, size: Size, width: int, *, needs_grad: bool = True, has_gradient: bool = False) -> Tensor:
        """A tensor that several blocks read; with `has_gradient` one that has some of its gradient by now."""
        tensor = Tensor(size, width, ACTIVATIONS, needs_grad, saved_until=-2)
        self.outers.append(tensor)
        if has_gradient:
            self.given_gradient(tensor)
        return tensor

    def given_gradient(self, *tensors: Tensor) -> None:
        """Later blocks have made some of these tensors' gradients."""
        self.begun += tensors

    def hand_on(self, tensor: Tensor) -> None:
        """Later blocks read a tensor of this one, beside its output."""
        self.handed.append(tensor)

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
        views_grad: bool = False,
        is_cached: bool = False,
        product: Product | None = None,
        num_dequantised: float = 0.0,
        traffic: Size = ZERO,
    ) -> Tensor:
        """Append one operation and return its output.

        `saves_weight` says that the backward needs a weight, which is there anyway and takes no room. The last three
        are Operation's: what takes time beyond moving its tensors.
        """
        needs_grad = weight_grad != ZERO or any(t.needs_grad for t in inputs)
        output = Tensor(size, width, category, needs_grad, is_cached=is_cached)
        saved = tuple(t.base or t for t in ((*saves, output) if saves_output else saves))
        output.last_use = index = len(self.operations)
        for tensor in inputs:
            tensor.last_use = index
            if tensor.base is not None:
                tensor.base.last_use = index
        if needs_grad:
            for tensor in saved:
                tensor.saved_until = max(tensor.saved_until, index) if tensor.saved_until != -2 else -2
        kept = saved if needs_grad else ()
        needs_saved = needs_grad and (saves_weight or bool(saved))
        self.operations.append(
            Operation(
                tuple(inputs),
                output,
                kept,
                temp,
                grad_temp,
                weight_grad,
                needs_saved,
                shares_grad,
                views_grad,
                product=product,
                num_dequantised=num_dequantised,
                traffic=traffic,
            )
        )
        return output

    def also(self, sizes: Sequence[Size]) -> list[Tensor]:
        """What the last operation gives beside its output."""
        op = self.operations[-1]
        index, first = len(self.operations) - 1, op.output
        op.more = tuple(
            Tensor(size, first.width, first.category, first.needs_grad, last_use=index) for size in sizes
        )
        return [*op.more]

    def part(self, base: Tensor, size: Size) -> Tensor:
        """A part of `base` (a split's output): no memory of its own, but a gradient of its own `size`."""
        output = self.run([base], ZERO, base.width, category=base.category)
        output.grad_size, output.base = size, base.base or base
        return output

    def split(self, base: Tensor, size: Size) -> Tensor:
        """One of the parts of torch.split: the gradients of all of them are joined in one tensor."""
        output = self.part(base, size)
        self.operations[-1].splits = True
        return output

    def join(self, parts: Sequence[Tensor], size: Size, width: int) -> Tensor:
        """torch.cat: the parts' gradients are views of its own, or copies in the part's dtype."""
        output = self.run(parts, size, width)
        self.operations[-1].joins = True
        return output

    def hold(self, *tensors: Tensor) -> None:
        """Keep tensors alive through the last operation so far: a variable of a running module holds them."""
        for tensor in tensors:
            (tensor.base or tensor).last_use = len(self.operations) - 1

    def hold_in_graph(self, *tensors: Tensor) -> None:
        """The same where a graph is recorded: a variable holds what has saved them, and nobody asks for its gradient."""
        for tensor in tensors:
            tensor.graph_use = len(self.operations) - 1

    def hold_to_end(self, *tensors: Tensor) -> None:
        """Keep tensors alive through the last operation that will be recorded: the block's caller holds them."""
        self.returned += tensors

    def keep(self, *tensors: Tensor) -> None:
        """The last operation holds tensors behind a checkpoint's back, until the whole backward is done."""
        if self.operations[-1].output.needs_grad:
            for tensor in tensors:
                (tensor.base or tensor).is_kept = True

    def play(
        self,
        *,
        is_checkpointed: bool = False,
        is_reentrant: bool = False,
        step_factor: float | None = None,
    ) -> BlockMemory:
        """Run forward and backward; `is_reentrant` chooses how a checkpoint is recomputed.

        `step_factor`: each weight's gradient is used at once and freed; meanwhile as many times its bytes are needed.
        """
        self.hold(*self.returned, *self.handed)
        snapshots, saved = self._forward(keep_saved=True)
        if not is_checkpointed:
            # What is kept outlives the backward of what saves it.
            saved = [add(a, scale(b, -1)) for a, b in zip(saved, self._kept(saved_too=True), strict=True)]
        backward = Backward(self.operations, saved, step_factor, frees_kept=is_checkpointed)
        backward.begin(self.begun)
        backward.run()
        forward, backward_peaks = pruned(snapshots), pruned(backward.snapshots)
        if is_reentrant:
            output = self.operations[-1].output
            gradient = with_at(NOTHING, output.category, output.gradient)
            kept = with_at(NOTHING, output.category, output.size)
            recompute = [*plus_beside(forward, gradient), *plus_beside(backward_peaks, kept)]
        else:
            again = pruned(snapshots[: self._recompute_end()])
            recompute = [*plus_beside(again, backward.waiting), *backward_peaks]
        return BlockMemory(
            input=sum_of(tensor.size for tensor in self.given),
            output_width=self.operations[-1].output.width,
            saved=(saved[0], saved[1], saved[2], saved[3]),
            saves_input=self._saves(self.given),
            saves_outer=self._saves(self.outers) or any(t.is_kept for t in self.outers),
            handed_on=sum_of(tensor.size for tensor in self.handed),
            kept=NOTHING if is_reentrant else self._kept(),
            cached=sum_of(op.output.size for op in self.operations if op.output.is_cached),
            weight_gradients=sum_of(op.weight_grad for op in self.operations),
            forward=Peaks(forward),
            no_grad=Peaks(pruned(self._forward(keep_saved=False)[0])),
            backward=Peaks(backward_peaks),
            recompute=Peaks(pruned(recompute)),
            made=tuple(backward.made),
        )

    def passes(self, *, is_checkpointed: bool = False, is_reentrant: bool = False) -> Passes:
        """What the operations do; `is_reentrant` chooses how a checkpoint is recomputed."""
        again = len(self.operations) if is_reentrant else self._recompute_end()
        return passes(self.operations, again if is_checkpointed else 0)

    def _saves(self, tensors: Iterable[Tensor]) -> bool:
        saved = {id(tensor) for op in self.operations for tensor in op.saves}
        return any(id(tensor) in saved for tensor in tensors)

    def _kept(self, *, saved_too: bool = False) -> Snapshot:
        """What is kept; with `saved_too` what of it an operation saves as well."""
        kept = NOTHING
        for tensor in (op.output for op in self.operations):
            if tensor.is_kept and (tensor.saved_until >= 0 or not saved_too):
                kept = with_at(kept, tensor.category, tensor.size)
        return kept

    def _recompute_end(self) -> int:
        """Operations that a recomputation runs: inputs are saved before an operation runs, its output after."""
        for index in range(len(self.operations) - 1, -1, -1):
            op = self.operations[index]
            if op.needs_saved:
                return index + 1 if op.output in op.saves else index
        return 0

    def _end_of(self, out: Tensor, keep_saved: bool) -> int:
        """The last operation of the forward that a tensor lives through."""
        end = len(self.operations) - 1 if out.is_kept else out.last_use
        return max(end, out.graph_use) if keep_saved else end

    def _forward(self, *, keep_saved: bool) -> tuple[list[Snapshot], list[Size]]:
        live = [ZERO] * 4
        dying: dict[int, list[Tensor]] = {}
        snapshots: list[Snapshot] = []
        for index, op in enumerate(self.operations):
            for out in op.outputs:
                live[out.category] = add(live[out.category], out.size)
            moment = (live[0], live[1], live[2], live[3])
            snapshots.append(moment if op.temp is ZERO else with_at(moment, WORKSPACE, op.temp))
            for out in op.outputs:
                stays = out.is_cached or (keep_saved and out.saved_until >= 0)
                if not stays and index < len(self.operations) - 1:
                    dying.setdefault(self._end_of(out, keep_saved), []).append(out)
            for tensor in dying.pop(index, ()):
                live[tensor.category] = add(live[tensor.category], scale(tensor.size, -1))
        last = self.operations[-1].output
        if last.saved_until < 0:
            live[last.category] = add(live[last.category], scale(last.size, -1))
        return snapshots, live
