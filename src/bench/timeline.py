"""Memory over one optimizer step: the live bytes after each operator, in stretches of one phase each. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.trace.recording import Recording

MAX_POINTS = 240
"""Kept of a step: more than a picture of one screen's width shows."""
MIN_POINTS = 8
"""Kept of each stretch, so that a loss of few operators stays visible."""
MAX_STRETCHES = 24
"""A step of many micro-batches repeats itself: the first and the last stretches are kept."""

Stretch = tuple[str, tuple[int, ...]]
"""A phase and the live bytes along it."""


@dataclass
class StepLog:
    """Collects live bytes by phase while a step runs."""

    stretches: list[tuple[str, list[int]]] = field(default_factory=list)
    is_open: bool = False

    def add(self, num_bytes: int) -> None:
        """The live bytes after one operator; what runs outside of phases is left out."""
        if self.is_open:
            self.stretches[-1][1].append(num_bytes)

    def within(
        self, phase: Callable[[str], AbstractContextManager[Any]]
    ) -> Callable[[str], AbstractContextManager[Any]]:
        """The phase callback `phase`, with a stretch of this log for each phase that is entered."""

        @contextmanager
        def enter(name: str) -> Iterator[None]:
            self.stretches.append((name, []))
            self.is_open = True
            try:
                with phase(name):
                    yield
            finally:
                self.is_open = False

        return enter


def thin(stretches: Iterable[tuple[str, Sequence[int]]], max_points: int = MAX_POINTS) -> tuple[Stretch, ...]:
    """The stretches with at most about `max_points` values: the highest of each bucket, so that no peak is lost."""
    kept = [(name, values) for name, values in stretches if values]
    if len(kept) > MAX_STRETCHES:
        kept = kept[: 2 * MAX_STRETCHES // 3] + kept[-(MAX_STRETCHES // 3) :]
    total = sum(len(values) for _, values in kept)
    return tuple((name, _highest(values, max_points * len(values) // max(1, total))) for name, values in kept)


def _highest(values: Sequence[int], num_points: int) -> tuple[int, ...]:
    count = min(len(values), max(MIN_POINTS, num_points))
    edges = [i * len(values) // count for i in range(count + 1)]
    return tuple(max(values[a:b]) for a, b in pairwise(edges))


def of_recording(recording: Recording, extra_bytes: int = 0) -> tuple[Stretch, ...]:
    """The last traced step's stretches; `extra_bytes` (libraries' workspaces) are alive all along."""
    live = [value + extra_bytes for value in recording.live_bytes()]
    last = max(mark.step for mark in recording.marks)
    ends = [*(mark.at for mark in recording.marks[1:]), len(live)]
    return thin(
        (mark.phase, live[mark.at : end])
        for mark, end in zip(recording.marks, ends, strict=True)
        if mark.step == last and mark.phase in STEP_PHASES
    )


STEP_PHASES = ("forward", "loss", "backward", "optimizer")


def to_json(stretches: Sequence[Stretch]) -> list[dict[str, Any]]:
    """Plain JSON values."""
    return [{"phase": name, "live_bytes": list(values)} for name, values in stretches]


def from_json(values: Any) -> tuple[Stretch, ...]:
    """What `to_json` wrote. Raises ValueError for anything else."""
    if not isinstance(values, list) or not all(map(_is_stretch, values)):
        raise ValueError("timeline is not a list of phases with live_bytes")
    return tuple((str(value["phase"]), tuple(value["live_bytes"])) for value in values)


def _is_stretch(value: Any) -> bool:
    if not isinstance(value, Mapping) or set(value) != {"phase", "live_bytes"}:
        return False
    sizes = value["live_bytes"]
    return isinstance(sizes, list) and bool(sizes) and set(map(type, sizes)) == {int} and min(sizes) >= 0
