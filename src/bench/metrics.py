"""What a run says of itself while it runs: metrics.jsonl, the progress bar, this process's memory."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from planner.errors import FinefitError
from planner.files import write_atomically
from planner.units import format_duration


class MetricsLog:
    """metrics.jsonl: one line per optimizer step (`kind` step) and per evaluation (`kind` eval).

    Lines reach the kernel at once, so that a crash of the process loses none; the disk gets them when it likes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, kind: str, values: Mapping[str, Any]) -> None:
        """Append one line. Raises FinefitError when the file can't be written."""
        line = json.dumps({"kind": kind, **values}) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise FinefitError(f"can't write {self.path}: {error.strerror or error}") from error

    def read(self) -> Iterator[dict[str, Any]]:
        """The lines that are whole; a crash can leave a torn last one."""
        if not self.path.exists():
            return
        for line in self.path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int) and "kind" in entry:
                yield entry

    def keep(self, is_kept: Callable[[dict[str, Any]], bool]) -> int:
        """Drop the lines of steps that a resumed run takes again; how many lines couldn't be read."""
        if not self.path.exists():
            return 0
        num_lines = len(self.path.read_bytes().splitlines())
        whole = list(self.read())
        write_atomically(self.path, "".join(json.dumps(entry) + "\n" for entry in whole if is_kept(entry)))
        return num_lines - len(whole)

    def sync(self) -> None:
        """Make the lines so far durable."""
        if not self.path.exists():
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise FinefitError(f"can't write {self.path}: {error.strerror or error}") from error


class Progress:
    """A bar on a terminal; elsewhere a line on stderr every tenth of the run."""

    def __init__(self, num_steps: int, first_step: int, is_shown: bool) -> None:
        self.num_steps, self.first_step, self.is_shown = num_steps, first_step, is_shown
        self._steps_s = 0.0
        self._bar: Any = None
        if is_shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=num_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def step(self, step: int, loss: float, tokens_per_s: float, step_s: float) -> None:
        """Show that `step` steps are done, the last one in `step_s` seconds."""
        self._steps_s += step_s
        figures = f"loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update()
        elif step == self.num_steps or step % max(1, self.num_steps // 10) == 0:
            self.say(f"step {step}/{self.num_steps}: {figures}, {self._time_left(step)}")

    def _time_left(self, step: int) -> str:
        """At the pace of this session's steps."""
        mean_step_s = self._steps_s / (step - self.first_step)
        return f"{format_duration(mean_step_s * (self.num_steps - step))} left"

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


def memory_now(device: torch.device) -> dict[str, int]:
    """Bytes: this process's resident set and, on CUDA, what torch has allocated now."""
    import psutil

    now = {"rss_bytes": int(psutil.Process().memory_info().rss)}
    if device.type == "cuda":
        now["allocated_bytes"] = torch.cuda.memory_allocated(device)
    return now


def memory_peaks(device: torch.device) -> dict[str, int | None]:
    """The highest of this process so far, in bytes; None where this system can't say."""
    peaks: dict[str, int | None] = {"peak_rss_bytes": _peak_rss_bytes()}
    if device.type == "cuda":
        peaks["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
        peaks["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    return peaks


def _peak_rss_bytes() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    # getrusage counts kibibytes on Linux and bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
