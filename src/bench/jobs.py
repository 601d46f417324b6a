"""One measurement as a job for another process, what that process reports, and the line between the two."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any, Protocol

from bench import timeline
from bench.protocol import StepProtocol
from bench.store import Measured, Samples
from bench.timeline import Stretch
from planner.setup import TrainSetup

PHASES = ("start", "load", "warmup", "steps", "memory", "eval", "save", "done")
"""What a worker does, in order; the last one that began is a failed run's `last_phase`."""

JOB_FILE, EVENTS_FILE, STDERR_FILE = "job.json", "events.jsonl", "stderr.txt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What to measure: optimizer steps by `protocol`, one with the longest rows, one evaluation, one save.

    `device`: "cuda", "cpu", or None for what this machine has. `random_weights` measures without the model's
    weights (memory and time don't depend on their values); `parent_pid` lets an orphaned worker end itself; `trust_remote_code` runs
    the code that the model brings along.
    """

    setup: TrainSetup
    protocol: StepProtocol = field(default_factory=StepProtocol)
    device: str | None = None
    random_weights: bool = False
    timeout_s: float | None = None
    parent_pid: int | None = None
    trust_remote_code: bool = False

    @property
    def has_stand_ins(self) -> bool:
        """Whether random weights stand for a checkpoint's: they take more while they are made (in 16 bits before they
        are packed, a tied head of its own) than those while they are read.
        """
        is_random = self.random_weights or not isinstance(self.setup.model, str)
        return bool(self.setup.quant) if self.setup.from_scratch else is_random

    def write(self, folder: Path) -> None:
        """Put the job where the worker reads it."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {**own, "setup": self.setup.to_dict(), "protocol": asdict(self.protocol)}
        (folder / JOB_FILE).write_text(json.dumps(plain), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Job:
        """The job that `write` put there."""
        values = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
        setup, protocol = TrainSetup.from_dict(values["setup"]), StepProtocol(**values["protocol"])
        return cls(**{**values, "setup": setup, "protocol": protocol})


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """What became of a job: raw samples and peaks. `notes` are doubts that the run itself found.

    `timeline` is memory over one step, `watched` what was seen from outside over the seconds of the run.
    """

    outcome: str
    last_phase: str | None = None
    error: str | None = None
    stderr_tail: str = ""
    device: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    samples: Samples = field(default_factory=Samples)
    measured: Measured = field(default_factory=Measured)
    timeline: tuple[Stretch, ...] = ()
    watched: Mapping[str, Sequence[Any]] = field(default_factory=dict)
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

    protocol: StepProtocol = field(default_factory=StepProtocol)
    phase: str | None = None
    steps: list[Mapping[str, Any]] = field(default_factory=list)
    warmup: list[Mapping[str, Any]] = field(default_factory=list)
    device: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    error: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    timeline: tuple[Stretch, ...] = ()

    def add(self, event: dict[str, Any]) -> Progress | None:
        """Take one event; the progress that it makes, if any. An unknown event raises KeyError."""
        kind = event.pop("event")
        _HANDLERS[kind](self, event)
        done, total = self._counts()
        is_progress = kind in ("phase", "step") and self.phase is not None
        return Progress(phase=self.phase or "", num_done=done, num_all=total) if is_progress else None

    def _counts(self) -> tuple[int, int]:
        """Steps done of how many: the least number, then, where that didn't suffice, the cap."""
        protocol = self.protocol
        caps = {
            "warmup": (len(self.warmup), protocol.min_warmup, protocol.max_warmup),
            "steps": (len(self.steps), protocol.min_steps, protocol.max_steps),
        }
        done, least, most = caps.get(self.phase or "", (0, 0, 0))
        return done, least if done <= least else most

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
            step_trained_tokens=tuple(
                step["num_trained_tokens"] for step in self.steps if "num_trained_tokens" in step
            ),
            losses=tuple(step["loss"] for step in self.steps),
        )

    def measured(self) -> Measured:
        """The peaks so far; statistics of the steps are added by whoever makes the record."""
        known = {f.name for f in fields(Measured)}
        found = {key: value for key, value in self.memory.items() if key in known}
        first = self.warmup[:1] or self.steps[:1]
        return Measured(**found, first_step_s=first[0]["wall_s"] if first else None)


def _begin_phase(log: RunLog, event: Mapping[str, Any]) -> None:
    log.phase = event["name"]


def _add_step(log: RunLog, event: Mapping[str, Any]) -> None:
    (log.steps if log.phase == "steps" else log.warmup).append(event)


def _set_error(log: RunLog, event: Mapping[str, Any]) -> None:
    log.error = event


def _set_timeline(log: RunLog, event: Mapping[str, Any]) -> None:
    log.timeline = timeline.from_json(event["stretches"])


_HANDLERS: dict[str, Callable[[RunLog, dict[str, Any]], Any]] = {
    "phase": _begin_phase,
    "step": _add_step,
    "device": lambda log, event: log.device.update(event),
    "memory": lambda log, event: log.memory.update(event),
    "timeline": _set_timeline,
    "error": _set_error,
    "note": lambda log, event: log.notes.append(event["text"]),
}


@dataclass
class FakeExecutor:
    """Answers from the setup without running anything: what schedules, stores and compares is tested with it.

    A step takes `seconds_per_token` for each token; `outcomes` maps a setup's method to how its runs end, and a
    micro-batch of more than `max_tokens` runs out of memory.
    """

    seconds_per_token: float = 1e-4
    noise: float = 0.01
    outcomes: Mapping[str, str] = field(default_factory=dict)
    max_tokens: int | None = None
    jobs: list[Job] = field(default_factory=list)

    def run(self, job: Job, progress: ProgressCallback) -> RunReport:
        """As `Executor` says; equal jobs get equal reports."""
        self.jobs.append(job)
        setup, outcome, num_steps = job.setup, self.outcome_of(job.setup), job.protocol.min_steps
        num_tokens = setup.tokens_per_micro_batch * setup.grad_accum_steps
        for number in range(num_steps):
            progress(Progress(phase="steps", num_done=number + 1, num_all=num_steps))
        report = RunReport(outcome=outcome, last_phase="done", device=job.device or "cpu")
        if outcome != "ok":
            return replace(report, last_phase="warmup", error=f"fake {outcome}", stderr_tail="fake")
        wall = tuple(
            num_tokens * self.seconds_per_token * (1 + self.noise * (i % 3)) for i in range(num_steps)
        )
        peak = num_tokens * 1000
        return replace(
            report,
            samples=Samples(step_wall_s=wall, step_cpu_s=wall, step_tokens=(num_tokens,) * num_steps),
            measured=Measured(
                peak_allocated_bytes=peak,
                device_used_bytes=2 * peak,
                host_bytes=3 * peak,
                phases={"backward": peak},
            ),
            timeline=(("forward", (peak // 2, peak)), ("backward", (peak, peak // 4))),
        )

    def outcome_of(self, setup: TrainSetup) -> str:
        """How the runs of a setup end."""
        num_tokens = setup.tokens_per_micro_batch
        if self.max_tokens is not None and num_tokens > self.max_tokens:
            return "oom"
        return self.outcomes.get(setup.method, "ok")
