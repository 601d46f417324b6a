"""What DeepSpeed's ZeRO gathers ahead, keeps gathered and reduces at once: its own bookkeeping, replayed by sizes.

Stage 3 (deepspeed 0.19, runtime/zero/partitioned_param_coordinator.py) decides by the order of the modules' calls in
a whole step. Before a module runs, its parameters are gathered, and then what comes next in the step, `prefetch`
elements at a time, until `reuse` elements are gathered. After it has run, a parameter is split again unless it is
used again within `reuse` elements of the calls that follow, or a gathering ahead has passed over that use because the
parameter was there. Parameters that are gathered together arrive in one flat tensor, are copied out of it when the
first of them is needed, and the flat one lives until the last of them is (AllGatherCoalescedHandle).
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

MOMENTS = ("head_backward", "last_layer_backward", "first_layer_backward", "embedding_backward")
"""The moments of a backward in order, as planner.sharding.Buffers names them."""


@dataclass(frozen=True, slots=True)
class Call:
    """One module's forward or backward: `moment` of the step, numbers of its own parameters that are split, and the
    `elements` of all its own."""

    moment: str
    parameters: tuple[int, ...] = ()
    elements: int = 0


@dataclass(frozen=True, slots=True)
class Gradient:
    """`elements` of a gradient, and the share of its layer's that are made with it."""

    moment: str
    elements: int
    made: float = 1.0


@dataclass(frozen=True, slots=True)
class Passes:
    """A model's calls in a training step and in an evaluation.

    `sizes`: (elements, bytes) of each parameter. `gradients`: in the order in which the backward makes them.
    """

    sizes: tuple[tuple[int, int], ...]
    training: tuple[Call, ...]
    evaluation: tuple[Call, ...]
    gradients: tuple[Gradient, ...]
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Hash once: thousands of calls, by which what follows from them is remembered."""
        object.__setattr__(self, "_hash", hash((self.sizes, self.training, self.evaluation, self.gradients)))

    def __hash__(self) -> int:
        """Equal passes have equal hashes."""
        return self._hash


@functools.lru_cache(maxsize=256)
def gathered(passes: Passes, *, reuse: int, prefetch: int) -> Mapping[str, int]:
    """The most bytes of split parameters that are whole at each moment of a step, and at those of an evaluation.

    An evaluation leaves behind what the backward would have used, so its second batch finds more than its first.
    """
    highest = _Coordinator(passes, reuse, prefetch).run(passes.training)
    evaluation = _Coordinator(passes, reuse, prefetch)
    for _ in range(2):
        highest |= evaluation.run(passes.evaluation)
    return highest


@dataclass(frozen=True, slots=True)
class Reductions:
    """What a backward reduces: (elements, the gradient that makes them too many) of each in order, and the elements
    that are left for the end."""

    each: tuple[tuple[int, Gradient], ...]
    final: int

    def largest(self, moment: str) -> int:
        """Elements of the largest reduction in that moment, 0 without one."""
        return max((elements for elements, cause in self.each if cause.moment == moment), default=0)


@functools.lru_cache(maxsize=256)
def backward_reductions(passes: Passes, bucket: int) -> Reductions:
    """What the backward of those passes reduces."""
    return reduced(passes.gradients, bucket)


def reduced(gradients: tuple[Gradient, ...], bucket: int) -> Reductions:
    """The reductions of a backward that makes `gradients` in order.

    They collect until the next one would not fit in `bucket` elements; one that is larger is reduced by itself.
    """
    each = []
    collected = 0
    for gradient in gradients:
        if collected and collected + gradient.elements > bucket:
            each.append((collected, gradient))
            collected = 0
        collected += gradient.elements
    return Reductions(tuple(each), collected)


class _Flat:
    """The tensor that several parameters arrive in, while `waiting` of them are still to be used."""

    def __init__(self, parameters: list[int]) -> None:
        self.parameters, self.waiting, self.is_copied = parameters, set(parameters), False


class _Coordinator:
    """One PartitionedParameterCoordinator whose trace is complete."""

    def __init__(self, passes: Passes, reuse: int, prefetch: int) -> None:
        self.sizes, self.trace = passes.sizes, passes.training
        self.reuse, self.prefetch = reuse, prefetch
        self.passed = [0, *accumulate(call.elements for call in self.trace)]
        self.uses: dict[int, list[int]] = {}
        for step, call in enumerate(self.trace):
            for number in call.parameters:
                self.uses.setdefault(number, []).append(step)
        self.arriving: dict[int, _Flat] = {}
        self.whole: set[int] = set()
        self.live_bytes = 0

    def run(self, calls: tuple[Call, ...]) -> dict[str, int]:
        """Make the calls, which are the trace's or its start; the most live bytes in each moment."""
        self.queue = deque((step, n) for step, call in enumerate(self.trace) for n in call.parameters)
        self.fetched_for = dict.fromkeys(self.uses, -1)
        self.num_gathered = 0
        highest: dict[str, int] = {}
        for step, call in enumerate(calls):
            self._fetch(step, call)
            highest[call.moment] = max(highest.get(call.moment, 0), self.live_bytes)
            self._release(step, call)
        # A batch ends with all that was underway arrived; what was not used goes with the next one's use.
        self.arriving.clear()
        return highest

    def _fetch(self, step: int, call: Call) -> None:
        self._gather([n for n in call.parameters if n not in self.whole and n not in self.arriving])
        for number in call.parameters:
            self._wait(number)
        new = {n for n in call.parameters if self.fetched_for[n] < step}
        while new and self.queue:
            used_at, number = self.queue.popleft()
            self.fetched_for[number] = used_at
            new.discard(number)
        self._gather(self._ahead())

    def _ahead(self) -> list[int]:
        """What is gathered now for later: uses of what is there are passed over."""
        wanted: dict[int, None] = {}
        room, elements = min(self.reuse - self.num_gathered, self.prefetch), 0
        while self.queue and elements < room:
            used_at, number = self.queue.popleft()
            self.fetched_for[number] = max(self.fetched_for[number], used_at)
            if number in self.whole or number in self.arriving or number in wanted:
                continue
            wanted[number] = None
            elements += self.sizes[number][0]
        return list(wanted)

    def _gather(self, parameters: list[int]) -> None:
        if not parameters:
            return
        flat = _Flat(parameters)
        # A single parameter needs no copying out.
        flat.is_copied = len(parameters) == 1
        for number in parameters:
            self.arriving[number] = flat
            self.num_gathered += self.sizes[number][0]
            self.live_bytes += self.sizes[number][1]

    def _wait(self, number: int) -> None:
        flat = self.arriving.pop(number, None)
        if flat is None:
            return
        if not flat.is_copied:
            flat.is_copied = True
            self.live_bytes += self._bytes(flat.parameters)
        flat.waiting.discard(number)
        self.whole.add(number)
        if not flat.waiting and len(flat.parameters) > 1:
            self.live_bytes -= self._bytes(flat.parameters)

    def _bytes(self, parameters: list[int]) -> int:
        return sum(self.sizes[number][1] for number in parameters)

    def _release(self, step: int, call: Call) -> None:
        for number in call.parameters:
            if number in self.whole and not self._is_kept(number, step + 1):
                self.whole.discard(number)
                self.num_gathered -= self.sizes[number][0]
                self.live_bytes -= self.sizes[number][1]

    def _is_kept(self, number: int, following: int) -> bool:
        """Whether a parameter that has been used stays whole from call `following` on."""
        if self.fetched_for[number] > following:
            return True
        uses = self.uses[number]
        at = bisect_left(uses, following)
        return at < len(uses) and self.passed[uses[at]] - self.passed[following] < self.reuse
