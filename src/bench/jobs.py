"""One measurement as a job for another process, what that process reports, and the line between the two."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any, Protocol

from bench.store import Measured, Samples
from planner.setup import TrainSetup

PHASES = ("start", "load", "warmup", "steps", "memory", "eval", "save", "done")
"""What a worker does, in order; the last one that began is a failed run's `last_phase`."""

JOB_FILE, EVENTS_FILE, STDERR_FILE = "job.json", "events.jsonl", "stderr.txt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What to measure: `num_warmup` optimizer steps, then `num_steps` timed ones, one evaluation, one save.

    `device`: "cuda", "cpu", or None for what this machine has. `random_weights` measures without the model's
    weights (memory and time don't depend on their values); `parent_pid` lets an orphaned worker end itself; `trust_remote_code` runs
    the code that the model brings along.
    """

    setup: TrainSetup
    num_steps: int = 10
    num_warmup: int = 2
    device: str | None = None
    random_weights: bool = False
    timeout_s: float | None = None
    parent_pid: int | None = None
    trust_remote_code: bool = False

    def write(self, folder: Path) -> None:
        """Put the job where the worker reads it."""
        plain = {**{f.name: getattr(self, f.name) for f in fields(self)}, "setup": self.setup.to_dict()}
        (folder / JOB_FILE).write_text(json.dumps(plain), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Job:
        """The job that `write` put there."""
        values = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
        return cls(**{**values, "setup": TrainSetup.from_dict(values["setup"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """What became of a job: raw samples and peaks. `notes` are doubts that the run itself found."""

    outcome: str
    last_phase: str | None = None
    error: str | None = None
    stderr_tail: str = ""
    device: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    samples: Samples = field(default_factory=Samples)
    measured: Measured = field(default_factory=Measured)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a running job is: the phase and, within warm-up and steps, how many of how many are done."""

    phase: str
    num_done: int = 0
    num_all: int = 0


ProgressCallback = Callable[[Progress], None]


class Executor(Protocol):
    """Runs a job. A failing run is a report, never an exception."""

    def run(self, job: Job, progress: ProgressCallback) -> RunReport:
        """Run to the end and report."""


class EventWriter:
    """The worker's side of the line: one JSON object per line, there for the parent at once."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def __call__(self, kind: str, **values: Any) -> None:
        """Report an event; figures that aren't finite become NaN in the line and null in the record."""
        self.file.write(json.dumps({"event": kind, **values}) + "\n")
        self.file.flush()


@dataclass
class RunLog:
    """The parent's side: folds the events read so far into a report."""

    num_steps: int = 0
    num_warmup: int = 0
    phase: str | None = None
    steps: list[Mapping[str, Any]] = field(default_factory=list)
    warmup: list[Mapping[str, Any]] = field(default_factory=list)
    device: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    error: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def add(self, event: dict[str, Any]) -> Progress | None:
        """Take one event; the progress that it makes, if any. An unknown event raises KeyError."""
        kind = event.pop("event")
        _HANDLERS[kind](self, event)
        counts = {"warmup": (len(self.warmup), self.num_warmup), "steps": (len(self.steps), self.num_steps)}
        done, total = counts.get(self.phase or "", (0, 0))
        is_progress = kind in ("phase", "step") and self.phase is not None
        return Progress(phase=self.phase or "", num_done=done, num_all=total) if is_progress else None

    @property
    def is_done(self) -> bool:
        """Whether the worker came to its end."""
        return self.phase == "done"

    def samples(self) -> Samples:
        """The steps so far."""
        return Samples(
            warmup_wall_s=tuple(step["wall_s"] for step in self.warmup),
            step_wall_s=tuple(step["wall_s"] for step in self.steps),
            step_cpu_s=tuple(step["cpu_s"] for step in self.steps),
            step_tokens=tuple(step["num_tokens"] for step in self.steps),
            losses=tuple(step["loss"] for step in self.steps),
        )

    def measured(self) -> Measured:
        """The peaks so far; statistics of the steps are added by whoever makes the record."""
        known = {f.name for f in fields(Measured)}
        return Measured(**{key: value for key, value in self.memory.items() if key in known})


def _begin_phase(log: RunLog, event: Mapping[str, Any]) -> None:
    log.phase = event["name"]


def _add_step(log: RunLog, event: Mapping[str, Any]) -> None:
    (log.steps if log.phase == "steps" else log.warmup).append(event)


def _set_error(log: RunLog, event: Mapping[str, Any]) -> None:
    log.error = event


_HANDLERS: dict[str, Callable[[RunLog, dict[str, Any]], Any]] = {
    "phase": _begin_phase,
    "step": _add_step,
    "device": lambda log, event: log.device.update(event),
    "memory": lambda log, event: log.memory.update(event),
    "error": _set_error,
    "note": lambda log, event: log.notes.append(event["text"]),
}


@dataclass
class FakeExecutor:
    """Answers from the setup without running anything: what schedules, stores and compares is tested with it.

    A step takes `seconds_per_token` for each token; `outcomes` maps a setup's method to how its runs end.
    """

    seconds_per_token: float = 1e-4
    noise: float = 0.01
    outcomes: Mapping[str, str] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)

    def run(self, job: Job, progress: ProgressCallback) -> RunReport:
        """As `Executor` says; equal jobs get equal reports."""
        self.jobs.append(job)
        setup, outcome = job.setup, self.outcomes.get(job.setup.method, "ok")
        num_tokens = setup.tokens_per_micro_batch * setup.grad_accum_steps
        for number in range(job.num_steps):
            progress(Progress(phase="steps", num_done=number + 1, num_all=job.num_steps))
        report = RunReport(outcome=outcome, last_phase="done", device=job.device or "cpu")
        if outcome != "ok":
            return replace(report, last_phase="warmup", error=f"fake {outcome}", stderr_tail="fake")
        wall = tuple(
            num_tokens * self.seconds_per_token * (1 + self.noise * (i % 3)) for i in range(job.num_steps)
        )
        peak = num_tokens * 1000
        return replace(
            report,
            samples=Samples(step_wall_s=wall, step_cpu_s=wall, step_tokens=(num_tokens,) * job.num_steps),
            measured=Measured(
                peak_allocated_bytes=peak,
                device_used_bytes=2 * peak,
                host_bytes=3 * peak,
                phases={"backward": peak},
            ),
        )
