"""How far a run is, beside what was predicted, and how long it still takes with its evaluations and checkpoints."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from planner.units import format_bytes, format_duration

_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}"
"""Without tqdm's own estimate, which would count steps only."""


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


class Progress:
    """A bar on a terminal; elsewhere a line on stderr every tenth of the run. A listener of MetricsLog.

    `expected`: the memory (bytes) and speed (tokens per second) that the plan predicts, where it does.
    """

    def __init__(self, pace: Pace, first_step: int, is_shown: bool, expected: Mapping[str, float]) -> None:
        self.pace, self.is_shown, self.expected = pace, is_shown, expected
        self._bar: Any = None
        if is_shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=pace.num_steps, initial=first_step, bar_format=_BAR, dynamic_ncols=True)

    def __call__(self, kind: str, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        if kind != "step":
            return
        self.pace.add_step(values["step_s"])
        step, num_steps = values["step"], self.pace.num_steps
        text = f"{self._figures(values)}, {self.pace.left(step)}"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif step == num_steps or step % max(1, num_steps // 10) == 0:
            self.say(f"step {step}/{num_steps}: {text}")

    def _figures(self, values: Mapping[str, Any]) -> str:
        memory = values.get("peak_allocated_bytes", values["rss_bytes"])
        speed = f"{values['tokens_per_s']:,.0f} tokens/s"
        if "tokens_per_s" in self.expected:
            speed += f" (predicted {self.expected['tokens_per_s']:,.0f})"
        room = format_bytes(memory)
        if "memory" in self.expected:
            room += f" (predicted {format_bytes(self.expected['memory'])})"
        return f"loss {values['loss']:.3f}, {speed}, {room}"

    def say(self, line: str) -> None:
        """One line on stderr, above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif self.is_shown:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()
