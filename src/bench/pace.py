"""How long a run still takes: its steps, and the evaluations and checkpoints that lie ahead."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from planner.units import format_duration


@dataclass(slots=True, kw_only=True)
class Pace:
    """Seconds that this session's steps, evaluations and saves took; intervals count optimizer steps.

    None: evaluated before and after only; `is_evaluated` False: never.
    """

    num_steps: int
    save_every_steps: int
    eval_every_steps: int | None = None
    is_evaluated: bool = True
    _steps_s: list[float] = field(default_factory=list)
    _others_s: dict[str, list[float]] = field(default_factory=dict)

    def add_step(self, seconds: float) -> None:
        """One more step is done."""
        self._steps_s.append(seconds)

    @contextmanager
    def timing(self, kind: str) -> Iterator[None]:
        """Around an evaluation ("eval") or a save ("save") that ends well."""
        started = time.perf_counter()
        yield
        self._others_s.setdefault(kind, []).append(time.perf_counter() - started)

    def left(self, step: int) -> str:
        """`3 min left` after that many steps; what was never timed yet is counted, not guessed."""
        ahead = {
            "eval": self.num_evals_ahead(step),
            "save": _num_ahead(step, self.num_steps, self.save_every_steps),
        }
        seconds = self._step_s() * (self.num_steps - step)
        untimed = []
        for kind, count in ahead.items():
            timed = self._others_s.get(kind)
            if timed:
                seconds += count * sum(timed) / len(timed)
            elif count:
                untimed.append(f"{count} {kind}{'s' if count > 1 else ''}")
        return " and ".join([format_duration(seconds), *untimed]) + " left"

    def num_evals_ahead(self, step: int) -> int:
        """Evaluations after that many steps, the one at the end included."""
        if not self.is_evaluated:
            return 0
        return _num_ahead(step, self.num_steps, self.eval_every_steps or self.num_steps)

    def _step_s(self) -> float:
        """The first step of a session also pays for what is set up once."""
        steady = self._steps_s[1:] or self._steps_s
        return sum(steady) / len(steady) if steady else 0.0


def _num_ahead(step: int, last: int, every: int) -> int:
    """Multiples of `every` in (step, last], and `last` itself."""
    multiples = last // every - step // every
    return multiples + (last % every != 0 and step < last)
