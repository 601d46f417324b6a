"""Measure one setup on this machine: a child process runs it, and the record is kept whatever happens to it."""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from bench.environment import describe_environment
from bench.host import count_cpus
from bench.jobs import Executor, Job, Progress, ProgressCallback, RunReport
from bench.process import ProcessExecutor
from bench.protocol import MAX_SPREAD, StepProtocol, relative_spread
from bench.stats import drift, summarise
from bench.store import Measured, Measurement, append_result, check_appendable
from planner.setup import TrainSetup

MIN_STEPS = 5
"""Fewer timed steps say little about their spread."""
MAX_DRIFT = 0.10
MAX_LOAD = 0.5
"""Load average per processor, before the run, from which wall times are in doubt."""


def measure(
    setup: TrainSetup,
    *,
    protocol: StepProtocol | None = None,
    results_path: Path | None = None,
    predicted: Mapping[str, Any] | None = None,
    gpu: str = "local",
    device: str | None = None,
    random_weights: bool = False,
    timeout_s: float | None = None,
    trust_remote_code: bool = False,
    progress: ProgressCallback = lambda step: None,
    executor: Executor | None = None,
) -> Measurement:
    """Run optimizer steps of `setup` by `protocol` in a child process, one evaluation and one save.

    `predicted` is the estimate's JSON and `gpu` the machine that it is for; both go into the record, which is
    appended to `results_path` at once. `device`, `random_weights`, `timeout_s` and `trust_remote_code`: see Job. A run that fails is
    a record too: look at its `outcome`. Raises FinefitError only when the record can't be written, before the run.
    """
    if results_path is not None:
        check_appendable(results_path)
    job = Job(
        setup=setup,
        protocol=protocol or StepProtocol(),
        device=device,
        random_weights=random_weights,
        timeout_s=timeout_s,
        trust_remote_code=trust_remote_code,
    )
    load = load_per_cpu()
    started = time.gmtime()
    report = (executor or ProcessExecutor()).run(job, progress)
    measurement = Measurement(
        id=uuid.uuid4().hex[:16],
        time_utc=time.strftime("%Y-%m-%dT%H:%M:%SZ", started),
        setup=setup,
        gpu=gpu,
        device=report.device,
        environment={**describe_environment(), **report.environment},
        outcome=report.outcome,
        last_phase=report.last_phase,
        error=report.error,
        stderr_tail=report.stderr_tail,
        samples=report.samples,
        measured=_with_times(report),
        predicted=predicted,
        protocol={
            **asdict(job.protocol),
            "random_weights": random_weights,
            "ended_by": _ended_by(job.protocol, report),
        },
        timeline=report.timeline,
        watched=report.watched,
        warnings=tuple(find_doubts(report, gpu, load)),
    )
    if results_path is not None:
        append_result(results_path, measurement)
    return measurement


def load_per_cpu() -> float | None:
    """The load average of the last minute per usable processor; None where the system has none."""
    try:
        return os.getloadavg()[0] / count_cpus()
    except (OSError, AttributeError):
        return None


def _ended_by(protocol: StepProtocol, report: RunReport) -> str | None:
    """Why no more steps were measured: spread, steps or seconds; None for a run that didn't get so far."""
    wall = report.samples.step_wall_s
    if report.outcome != "ok" or not wall:
        return None
    if protocol.min_steps == protocol.max_steps:
        return "steps"
    if relative_spread(wall) <= protocol.max_spread:
        return "spread"
    return "steps" if len(wall) >= protocol.max_steps else "seconds"


def _with_times(report: RunReport) -> Measured:
    """The peaks with the statistics of the steps."""
    samples, measured = report.samples, report.measured
    if not samples.step_wall_s:
        return measured
    wall, cpu = summarise(samples.step_wall_s), summarise(samples.step_cpu_s)
    total_s = sum(samples.step_wall_s)
    return replace(
        measured,
        step_s=wall.median_s,
        low_step_s=wall.low_s,
        high_step_s=wall.high_s,
        p10_step_s=wall.p10_s,
        p90_step_s=wall.p90_s,
        step_spread=wall.relative_spread,
        cpu_step_s=cpu.median_s,
        tokens_per_s=sum(samples.step_tokens) / total_s if total_s > 0 else None,
        trained_tokens_per_s=sum(samples.step_trained_tokens) / total_s
        if total_s > 0 and samples.step_trained_tokens
        else None,
        energy_per_step_j=_energy_per_step(report, wall.median_s),
    )


def _energy_per_step(report: RunReport, step_s: float) -> float | None:
    """Of the card by its mean power, else of the processors by their counters over the time that was watched."""
    facts = report.environment
    if report.device != "cpu":
        power_w = facts.get("mean_power_w")
        return None if power_w is None else power_w * step_s
    energy_j, watched_s = facts.get("cpu_energy_j"), facts.get("watched_s")
    return None if energy_j is None or not watched_s else energy_j / watched_s * step_s


def find_doubts(report: RunReport, gpu: str, load: float | None = None) -> list[str]:
    """What makes a run's figures doubtful, one line each: few or unsteady steps, other programs, heat."""
    found = list(report.notes)
    # Who used the processors during the steps says more than the load before them.
    is_watched = report.environment.get("others_cpu_share") is not None
    if load is not None and load > MAX_LOAD and not is_watched:
        found.append(
            f"other programs were running (load {load:.1f} per processor): trust CPU seconds, not wall time"
        )
    if report.device == "cpu" and gpu not in ("local", "cpu"):
        found.append(f"ran on the CPU, the prediction is for {gpu}")
    return [*found, *_unsteady(report.samples.step_wall_s)] if report.outcome == "ok" else found


def _unsteady(step_wall_s: Sequence[float]) -> list[str]:
    if not step_wall_s:
        return []
    found = []
    if len(step_wall_s) < MIN_STEPS:
        found.append(
            f"only {len(step_wall_s)} timed step{'s' if len(step_wall_s) > 1 else ''}: {MIN_STEPS} or more show their spread"
        )
    spread = summarise(step_wall_s).relative_spread
    if spread > MAX_SPREAD:
        found.append(
            f"step times spread by {100 * spread:.1f} % (interquartile range / median; up to {MAX_SPREAD:.0%} is steady)"
        )
    slower = drift(step_wall_s)
    if len(step_wall_s) >= MIN_STEPS and slower > MAX_DRIFT:
        found.append(f"steps got {slower:.0%} slower during the run: throttling, or memory that runs out")
    return found


@dataclass
class ProgressLine:
    """A `progress` that writes to a terminal: one line that is rewritten, or one line per phase elsewhere."""

    label: str = ""
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    clock: Callable[[], float] = time.monotonic
    _start_s: float | None = None
    _last_phase: str | None = None

    def __call__(self, step: Progress) -> None:
        """Show where the job is."""
        if self._start_s is None:
            self._start_s = self.clock()
        is_new = step.phase != self._last_phase
        self._last_phase = step.phase
        if not self.stream.isatty():
            if is_new:
                print(f"{self.label}{step.phase}", file=self.stream, flush=True)
            return
        count = f" {step.num_done}/{step.num_all}" if step.num_all else ""
        text = f"{self.label}{step.phase}{count} ({self.clock() - self._start_s:.0f} s)"
        finish = "\n" if step.phase == "done" else ""
        print(f"\r\x1b[K{text}", end=finish, file=self.stream, flush=True)
