"""What one traced run allocated and freed, and when: peaks, categories, what was alive. No torch in here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

CUDA_ROUNDING_BYTES = 512
"""CUDA's caching allocator hands out multiples of this, and counts them as allocated (kMinBlockSize in
c10/cuda/CUDACachingAllocator.cpp)."""

HOST = "host"
"""Category of what lives in host memory, or in managed memory that the allocator doesn't see."""

CATEGORIES = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "temporary")


@dataclass(slots=True, eq=False)
class Storage:
    """One allocation. `layer` is the layer (counted from 0) whose operator made it, None outside the layers.

    `owner` is `layer` where that is known, else the layer whose parameter, gradient or state it was made from.

    `allocated_at` and `freed_at` are positions in the recording's events; `recompute` numbers the stretch of
    recomputed forward that made it; `category` is set where it is known when it is made.
    """

    number: int
    num_bytes: int
    shape: tuple[int, ...]
    dtype: str
    op: str
    module: str
    layer: int | None
    phase: str
    step: int
    allocated_at: int
    freed_at: int | None = None
    category: str | None = None
    recompute: int | None = None
    owner: int | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """From event `at` on, the run is in this phase of this optimizer step (0: before the first)."""

    at: int
    step: int
    phase: str


Place = tuple[str, str, int]
"""(phase, "before" | "layer" | "after", layer): where in the step something was alive."""


@dataclass(frozen=True, slots=True)
class Peak:
    """The most bytes that were alive at once somewhere, just after event `at`."""

    num_bytes: int
    at: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """One run. Each event is a storage's number when it is allocated, its complement (~number) when it is freed.

    `recompute_ends` gives the event at which each stretch of recomputed forward ended.
    `rounding_bytes`: what the device's allocator rounds requests up to (1: nothing).
    """

    storages: Sequence[Storage]
    events: Sequence[int]
    marks: Sequence[Mark]
    recompute_ends: Sequence[int]
    vocab_size: int
    num_layers: int
    num_ops: int
    rounding_bytes: int = 1
    _sizes: list[int] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        """Sizes as the device's allocator counts them; what lives on the host counts nothing."""
        unit = self.rounding_bytes
        self._sizes.extend(0 if s.category == HOST else -(-s.num_bytes // unit) * unit for s in self.storages)

    def before(self, step: int) -> Recording:
        """The recording up to where optimizer step `step` begins."""
        at = self._first_mark(lambda mark: mark.step >= step)
        num_storages = sum(event >= 0 for event in self.events[:at])
        return replace(
            self,
            storages=self.storages[:num_storages],
            events=self.events[:at],
            marks=[mark for mark in self.marks if mark.step < step],
        )

    def size(self, storage: Storage) -> int:
        """Bytes that a storage takes from the device's allocator."""
        return self._sizes[storage.number]

    def live_bytes(self) -> Iterator[int]:
        """Bytes alive after each event."""
        total = 0
        for event in self.events:
            total += self._sizes[event] if event >= 0 else -self._sizes[~event]
            yield total

    def requests(self, extra: Mapping[int, tuple[int, int]] | None = None) -> Iterator[tuple[int, int]]:
        """The run as the device's allocator sees it: (number, bytes) allocates, (number, -1) frees.

        `extra` gives requests that come before the event at a position.
        """
        for at, event in enumerate(self.events):
            if extra and at in extra:
                yield extra[at]
            storage = self.storages[event if event >= 0 else ~event]
            if self._sizes[storage.number]:
                yield storage.number, storage.num_bytes if event >= 0 else -1

    def peaks(self, step: int) -> dict[Place, Peak]:
        """The peak at each place of optimizer step `step` (0: building and loading).

        What is alive when a phase begins counts before its layers.
        """
        found: dict[Place, Peak] = {}
        marks = iter([*self.marks, Mark(len(self.events), -1, "")])
        mark, following = Mark(0, -1, ""), next(marks)
        seen_layer, before = False, 0
        for at, (event, total) in enumerate(zip(self.events, self.live_bytes(), strict=True)):
            while following.at <= at:
                mark, following, seen_layer = following, next(marks), False
                if mark.step == step and at:
                    found.setdefault((mark.phase, "before", 0), Peak(before, at - 1))
            before = total
            if mark.step != step or event < 0:
                continue
            layer = self.storages[event].layer
            seen_layer = seen_layer or layer is not None
            side = "layer" if layer is not None else "after" if seen_layer else "before"
            place = (mark.phase, side, layer or 0)
            if place not in found or total > found[place].num_bytes:
                found[place] = Peak(total, at)
        return found

    def highest(self, step: int) -> int:
        """The event of optimizer step `step` after which the most bytes are alive."""
        starts = [mark.at for mark in self.marks if mark.step == step]
        following = (mark.at for mark in self.marks if mark.step > step)
        end = next(following, len(self.events))
        totals = list(self.live_bytes())
        return max(range(starts[0], end), key=totals.__getitem__)

    def live_at(self, at: int) -> list[Storage]:
        """What is alive just after event `at`, largest first."""
        alive = [s for s in self.storages if s.allocated_at <= at and (s.freed_at is None or s.freed_at > at)]
        return sorted(alive, key=self.size, reverse=True)

    def terms_at(self, at: int) -> dict[str, int]:
        """Bytes alive just after event `at`, by category."""
        terms: Counter[str] = Counter()
        for storage in self.live_at(at):
            terms[self.category(storage)] += self.size(storage)
        return {name: terms[name] for name in CATEGORIES}

    def category(self, storage: Storage) -> str:
        """What a storage is for.

        Activations are what a forward (or its recomputation) made and kept beyond its own end: for the backward.
        Optimizer states are what an optimizer's step made and kept.
        """
        if storage.category is not None:
            return storage.category
        if storage.phase in _MODEL_PHASES and self._is_logits(storage):
            return "logits"
        end = self._end_of(storage)
        outlives = end is not None and (storage.freed_at is None or storage.freed_at >= end)
        if not outlives:
            return "temporary"
        is_recomputed = storage.recompute is not None
        is_state = storage.phase in ("optimizer", "build", "backward", "resume") and not is_recomputed
        return "optimizer" if is_state else "activations"

    def _is_logits(self, storage: Storage) -> bool:
        return len(storage.shape) > 1 and storage.shape[-1] == self.vocab_size

    def _end_of(self, storage: Storage) -> int | None:
        """The event by which a temporary of this place must be gone; None where all are temporary."""
        if storage.recompute is not None:
            return self.recompute_ends[storage.recompute]
        if storage.phase == "backward":
            # What outlives the whole step was made by an optimizer that steps in the backward.
            return self._first_mark(lambda mark: mark.step > storage.step)
        if storage.phase in ("batch", "build", "forward", "loss", "optimizer", "resume"):
            return self._first_mark(
                lambda mark: mark.at > storage.allocated_at and mark.phase != storage.phase
            )
        return None

    def _first_mark(self, matches: Callable[[Mark], bool]) -> int:
        return next((mark.at for mark in self.marks if matches(mark)), len(self.events))

    def live_by_category(self) -> Mapping[str, list[int]]:
        """For each category the bytes alive after each event: a timeline to plot."""
        categories = [self.category(s) for s in self.storages]
        totals = dict.fromkeys(CATEGORIES, 0)
        lines: dict[str, list[int]] = {name: [] for name in CATEGORIES}
        for event in self.events:
            number = event if event >= 0 else ~event
            category = categories[number]
            if category in totals:
                totals[category] += self._sizes[number] if event >= 0 else -self._sizes[number]
            for name, line in lines.items():
                line.append(totals[name])
        return lines


_MODEL_PHASES = ("forward", "loss", "backward", "eval")
