"""A run's folder: plan.yaml, metrics.jsonl, checkpoints/, adapter/ or model/, summary.json; one run, one process."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from planner.errors import FinefitError, UsageError
from planner.files import write_atomically
from planner.planfile import PlanFile, read_plan, write_plan
from planner.setup import TrainSetup

_LOCK = ".lock"
_LEFTOVERS = (".plan.yaml.*", ".metrics.jsonl.*", ".summary.json.*")
"""What a process that was killed while it wrote one of these left beside it."""


class RunFolder:
    """The folder of one run; while it is entered, no other process may enter it.

    `plan` is what is run: the given one, or what an earlier session made of it when it ran out of memory.

    Entering raises UsageError when the folder belongs to something else, to another plan (with the differences)
    or to a running process, and FinefitError when it can't be written.
    """

    def __init__(
        self, root: Path, plan: PlanFile, *, resume: bool = True, allow_changes: bool = False
    ) -> None:
        self.root, self.given_plan, self.plan = root, plan, plan
        self.resume, self.allow_changes = resume, allow_changes
        self.plan_file = root / "plan.yaml"
        self.metrics = root / "metrics.jsonl"
        self.checkpoints = root / "checkpoints"
        self.summary = root / "summary.json"
        self.notes: list[str] = []
        self._is_new = False
        self._lock: IO[str] | None = None

    def __enter__(self) -> RunFolder:
        """Make or check the folder and lock it."""
        if self.root.exists() and not self.root.is_dir():
            raise UsageError(f"{self.root} is a file; choose another --out")
        self._refuse_foreign()
        self._is_new = not self.root.exists()
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
        """Let others in. A folder in which an error came before anything was trained goes as it came."""
        if self._lock is None:
            return
        if error is not None and self._is_new:
            self._remove_if_bare()
        self._lock.close()

    def _remove_if_bare(self) -> None:
        """Another process may be at the door: the folder goes only while it holds nothing else."""
        if {path.name for path in self.root.iterdir()} <= {_LOCK, self.plan_file.name}:
            self.plan_file.unlink(missing_ok=True)
            (self.root / _LOCK).unlink()
            self.root.rmdir()

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
        self._write_plan()

    def follow(self) -> None:
        """Take over the plan that another rank has settled."""
        self._changes()

    def record_retry(self, setup: TrainSetup) -> None:
        """The run goes on with this setup, and a resumed one will; plan.yaml says what the plan was before."""
        old, new = self.plan.setup.to_dict(), setup.to_dict()
        changed = {name: value for name, value in old.items() if new[name] != value}
        before = {**changed, **self.plan.before_retries}
        self.plan = replace(self.plan, setup=setup, before_retries=before)
        self._write_plan()

    def _write_plan(self) -> None:
        plan = self.plan
        write_plan(
            self.plan_file,
            plan.setup,
            plan.gpu or "local",
            plan.predicted,
            before_retries=plan.before_retries,
            force=True,
        )

    def _changes(self) -> list[str]:
        """What the given plan changes in the folder's, which may be torn; takes over what retries made of it."""
        try:
            there = read_plan(self.plan_file)
            changes = plan_changes(there.planned, self.given_plan.setup)
        except FinefitError as error:
            return [f"its own can't be read: {error}"]
        if changes and plan_changes(there.setup, self.given_plan.setup):
            return changes
        self.plan = replace(self.given_plan, setup=there.setup, before_retries=there.before_retries)
        return []


def plan_changes(before: TrainSetup, now: TrainSetup) -> list[str]:
    """`field: before -> now` for each field that differs."""
    old, new = before.to_dict(), now.to_dict()
    return [f"{name}: {old[name]} -> {new[name]}" for name in new if old[name] != new[name]]
