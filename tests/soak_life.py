"""One life of a run in a forked process that says, at each moment, what it is doing: so that a kill can be aimed.

Reports are lines on a pipe: nanoseconds, then `begin PHASE`, `end PHASE`, `saved STEP` or `resumed STEP`. What the
kernel has of them survives a kill.
"""

from __future__ import annotations

import os
import select
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.setup import TrainSetup

START, BETWEEN, AFTER = "starting", "between phases", "after the end"
CRASHED = 70


class Reporter:
    """The life's end of the pipe."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def say(self, words: str) -> None:
        os.write(self.pipe, f"{time.monotonic_ns()} {words}\n".encode())

    def watch(self, owner: Any, name: str, phase: str, after: Callable[..., str] | None = None) -> None:
        """Report each call of `owner.name`; what `after` makes of its arguments is said when it returned."""
        original = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            self.say(f"begin {phase}")
            try:
                result = original(*args, **options)
                if after is not None:
                    self.say(after(*args))
                return result
            finally:
                self.say(f"end {phase}")

        setattr(owner, name, watched)

    def watch_all(self) -> None:
        from bench import checkpoint, exam, position, run, runfolder, train

        self.watch(runfolder.RunFolder, "__enter__", "opening the folder")
        self.watch(train, "load_tokenizer", "loading the tokenizer")
        self.watch(train, "load_run_data", "reading data")
        self.watch(train, "build_model", "building the model")
        self.watch(position.Position, "restore", "resuming", lambda self: f"resumed {self.resumed_from or 0}")
        self.watch(run.Run, "_take_step", "step")
        self.watch(run, "evaluate", "evaluation")
        self.watch(exam, "sample_answers", "answers")
        self.watch(position, "save_checkpoint", "save", lambda root, step, *_: f"saved {step}")
        self.watch(checkpoint, "_write_files", "save: files")
        self.watch(checkpoint, "_remove", "save: deleting old ones")
        self.watch(train, "write_artifact", "writing the result")
        self.watch(train, "verify_artifact", "checking the result")
        self.watch(runfolder.RunFolder, "write_summary", "summing up")


def live(setup: TrainSetup, folder: Path, pipe: int, options: dict[str, Any]) -> None:
    """Train, and leave the process with the exit code of `finefit train`; its output goes beside the folder."""
    from bench.train import train
    from planner.errors import FinefitError

    words = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(words, 1)
    os.dup2(words, 2)
    code = CRASHED
    reporter = Reporter(pipe)
    try:
        reporter.watch_all()
        train(setup, folder, progress=False, **options)
        code = 0
    except FinefitError as error:
        print(f"finefit: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    reporter.say(f"begin {AFTER}")
    os._exit(code)


class Reports:
    """The parent's end of the pipe."""

    def __init__(self, pipe: int) -> None:
        self.pipe, self.is_over = pipe, False
        self.lines: list[tuple[float, str, str]] = []
        """(when in seconds, kind, of what)"""
        self._rest = b""

    def wait(self, seconds: float) -> bool:
        """Read what comes within the time; False when the life is over."""
        if self.is_over:
            return False
        ready, _, _ = select.select([self.pipe], [], [], max(0.0, seconds))
        if ready:
            data = os.read(self.pipe, 65536)
            self.is_over = not data
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                when, kind, what = line.decode().split(" ", 2)
                self.lines.append((int(when) / 1e9, kind, what))
        return not self.is_over

    def wait_for(self, phase: str, call: int, deadline: float) -> float | None:
        """When the phase began for the `call`-th time; None when the life ended before."""
        while True:
            begins = [when for when, kind, what in self.lines if (kind, what) == ("begin", phase)]
            if len(begins) >= call:
                return begins[call - 1]
            if time.monotonic() > deadline or not self.wait(deadline - time.monotonic()):
                return None

    def read_to_end(self, deadline: float) -> None:
        while time.monotonic() < deadline and self.wait(deadline - time.monotonic()):
            pass

    def phase_at(self, moment: float) -> str:
        """The innermost phase of that moment; the outer ones as well where one of them is a save."""
        open_phases: list[str] = []
        has_begun = False
        for when, kind, what in self.lines:
            if when > moment:
                break
            has_begun = True
            if kind == "begin":
                open_phases.append(what)
            elif kind == "end":
                open_phases.remove(what)
        if open_phases:
            return open_phases[-1]
        return BETWEEN if has_begun else START

    def last_number(self, kind: str) -> int | None:
        numbers = [int(what) for _, k, what in self.lines if k == kind]
        return numbers[-1] if numbers else None

    def seconds(self) -> dict[str, list[float]]:
        """How long each whole phase took."""
        found: dict[str, list[float]] = defaultdict(list)
        begun: dict[str, float] = {}
        for when, kind, what in self.lines:
            if kind == "begin":
                begun[what] = when
            elif kind == "end":
                found[what].append(when - begun.pop(what))
        return found
