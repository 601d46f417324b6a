"""A run's folder: plan.yaml, metrics.jsonl, checkpoints/, adapter/ or model/, summary.json; one run, one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from planner.errors import FinefitError, UsageError
from planner.files import write_atomically
from planner.planfile import PlanFile, read_plan, write_plan

_LOCK = ".lock"
_LEFTOVERS = (".plan.yaml.*", ".metrics.jsonl.*", ".summary.json.*")
"""What a process that was killed while it wrote one of these left beside it."""


class RunFolder:
    """The folder of one run; while it is entered, no other process may enter it.

    Entering raises UsageError when the folder belongs to something else, to another plan (with the differences)
    or to a running process, and FinefitError when it can't be written.
    """

    def __init__(
        self, root: Path, plan: PlanFile, *, resume: bool = True, allow_changes: bool = False
    ) -> None:
        self.root, self.given_plan = root, plan
        self.resume, self.allow_changes = resume, allow_changes
        self.plan_file = root / "plan.yaml"
        self.metrics = root / "metrics.jsonl"
        self.checkpoints = root / "checkpoints"
        self.summary = root / "summary.json"
        self.notes: list[str] = []
        self._lock: IO[str] | None = None

    def __enter__(self) -> RunFolder:
        """Make or check the folder and lock it."""
        if self.root.exists() and not self.root.is_dir():
            raise UsageError(f"{self.root} is a file; choose another --out")
        self._refuse_foreign()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = (self.root / _LOCK).open("a", encoding="utf-8")
        except OSError as error:
            raise FinefitError(f"can't write in {self.root}: {error.strerror or error}") from error
        try:
            self._take_lock(self._lock)
            for leftover in self._leftovers():
                leftover.unlink()
            self._settle_plan()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.close()

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a run that is finished, None while it isn't or where the file holds none (with a note)."""
        if not self.summary.is_file():
            return None
        try:
            summary = json.loads(self.summary.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            summary = error
        if isinstance(summary, dict):
            return summary
        self.note("summary.json is torn: the run's end is done again from its last checkpoint")
        return None

    def note(self, *lines: str) -> None:
        """Say something at once that the summary will say as well."""
        for line in lines:
            print(f"note: {line}", file=sys.stderr, flush=True)
        self.notes += lines

    def _leftovers(self) -> list[Path]:
        return [path for pattern in _LEFTOVERS for path in self.root.glob(pattern)]

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json: the run is finished."""
        write_atomically(self.summary, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")

    def _refuse_foreign(self) -> None:
        if not self.root.is_dir():
            return
        try:
            own = {_LOCK, *(path.name for path in self._leftovers())}
            others = [p.name for p in self.root.iterdir() if p.name not in own]
        except OSError as error:
            raise FinefitError(f"can't read {self.root}: {error.strerror or error}") from error
        if others and not self.plan_file.is_file():
            raise UsageError(
                f"{self.root} exists and is no run of finefit (it holds {others[0]}); choose another --out"
            )
        if others and not self.resume:
            raise UsageError(f"{self.root} holds a run already; choose another --out, or resume it")

    def _take_lock(self, lock: IO[str]) -> None:
        try:
            import fcntl
        except ImportError:
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"{self.root}: another finefit process is running there") from error

    def _settle_plan(self) -> None:
        """Write the plan of a new run; compare that of an old one."""
        if self.plan_file.is_file():
            changes = self._changes()
            if not changes:
                return
            if not self.allow_changes:
                raise UsageError(
                    f"{self.root} belongs to another plan ({'; '.join(changes)}); choose another --out, "
                    "or allow the changes"
                )
            self.note(f"the plan changed on the way: {'; '.join(changes)}")
        plan = self.given_plan
        write_plan(self.plan_file, plan.setup, plan.gpu or "local", plan.predicted, force=True)

    def _changes(self) -> list[str]:
        """What the given plan changes in the folder's, which may be torn."""
        try:
            return plan_changes(read_plan(self.plan_file), self.given_plan)
        except FinefitError as error:
            return [f"its own can't be read: {error}"]


def plan_changes(before: PlanFile, now: PlanFile) -> list[str]:
    """`field: before -> now` for each field of the setup that differs."""
    old, new = before.setup.to_dict(), now.setup.to_dict()
    return [f"{name}: {old[name]} -> {new[name]}" for name in new if old[name] != new[name]]
