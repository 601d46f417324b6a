"""What a run says of itself while it runs: metrics.jsonl, and this process's memory."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from planner.errors import FinefitError
from planner.files import write_atomically


class Listener(Protocol):
    """Is told of every line after it was written."""

    def __call__(self, kind: str, values: Mapping[str, Any]) -> None:
        """One line."""

    def close(self) -> None:
        """No line will follow."""


class MetricsLog:
    """metrics.jsonl: one line per optimizer step (`kind` step), evaluation (eval), answers to the prompts (sample), rung
    of the ladder after running out of memory (retry), figure that left its prediction (warning), and for the step at
    which a run gave up (stopped).

    Lines reach the kernel at once, so that a crash of the process loses none; the disk gets them when it likes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listeners: list[Listener] = []

    def write(self, kind: str, values: Mapping[str, Any]) -> None:
        """Append one line. Raises FinefitError when the file can't be written."""
        line = json.dumps({"kind": kind, **values}) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise FinefitError(f"can't write {self.path}: {error.strerror or error}") from error
        for listener in self.listeners:
            listener(kind, values)

    def close(self) -> None:
        """Tell the listeners that this was all."""
        for listener in self.listeners:
            listener.close()

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


def memory_now(device: torch.device) -> dict[str, int]:
    """Bytes: this process's resident set and, on CUDA, what torch has allocated now and had at most so far."""
    import psutil

    now = {"rss_bytes": int(psutil.Process().memory_info().rss)}
    if device.type == "cuda":
        now["allocated_bytes"] = torch.cuda.memory_allocated(device)
        now["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
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
