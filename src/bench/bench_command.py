"""What `finefit bench` does: the sweep that its words mean, and its runs one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bench import sweep
from bench.cli_commands import machine_here, predict
from bench.cli_text import format_measurement, format_sweep
from bench.environment import machine_id
from bench.measure import ProgressLine, measure
from bench.process import ProcessExecutor
from bench.protocol import StepProtocol
from bench.store import Measurement
from bench.sweep import Cell, Sweep
from planner.cli_options import Session
from planner.errors import DoesNotFitError, FinefitError, UsageError
from planner.files import check_target
from planner.planfile import PlanFile, read_plan
from planner.render import format_json, terminal_width


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """How the runs of one command are measured; None: what finefit chooses."""

    warmup: int | None
    steps: int | None
    device: str | None
    random_weights: bool
    timeout_s: float | None
    is_sampling: bool
    force: bool
    trace: bool
    trust_remote_code: bool = False


def read_sweep(words: Sequence[str], axes: Sequence[str], settings: tuple[str, ...], results: Path) -> Sweep:
    """The runs that plans and axes among `words` mean; combinations that no setup can have are told on stderr.

    Raises UsageError where no plan is among them, or axes without --sweep before them, or where a plan is where the
    results would go.
    """
    paths = [word for word in words if "=" not in word or Path(word).is_file()]
    more_axes = [word for word in words if word not in paths]
    if not paths or (more_axes and not axes):
        raise UsageError("give at least one plan; FIELD=VALUES come after --sweep")
    for path in paths:
        check_target(results, Path(path))
    plans = {path: read_plan(Path(path), settings).setup for path in paths}
    found = sweep.sweep(plans, sweep.read_axes((*axes, *more_axes)))
    for line in found.skipped:
        click.echo(f"left out: {line}", err=True)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """One command's runs."""

    session: Session
    wishes: Wishes
    results: Path
    as_json: bool
    is_single: bool

    def count_done(self) -> Mapping[str, int]:
        """What the results have already; what is wrong with them goes to stderr."""
        done, warnings = sweep.count_done(
            self.results,
            machine_id=machine_id(),
            device=self.wishes.device,
            random_weights=self.wishes.random_weights,
        )
        for warning in warnings:
            click.echo(warning, err=True)
        click.echo(f"{self.results} has {sum(done.values())} finished runs of this machine", err=True)
        return done

    def run(self, cell: Cell, prefix: str = "") -> Measurement | None:
        """Predict, measure, keep and show one cell, `prefix` before its name; None where it is predicted not to fit, or its model isn't known.

        Raises the reason where it is the only one.
        """
        wishes = self.wishes
        machine = machine_here(self.session, PlanFile(setup=cell.setup), wishes.device)
        try:
            predicted = predict(PlanFile(setup=cell.setup), machine, force=wishes.force)
        except FinefitError as error:
            if self.is_single:
                raise
            click.echo(f"left out: {cell.label}: {error}", err=True)
            return None
        run = measure(
            cell.setup,
            protocol=StepProtocol.of(warmup=wishes.warmup, steps=wishes.steps),
            results_path=self.results,
            predicted=self._with_trace(cell, machine, predicted),
            gpu=machine.label,
            device=wishes.device,
            random_weights=wishes.random_weights,
            timeout_s=wishes.timeout_s,
            trust_remote_code=wishes.trust_remote_code,
            progress=ProgressLine(f"{prefix}{cell.label}: "),
            executor=ProcessExecutor(is_sampling=wishes.is_sampling),
        )
        text = format_json(run.to_json()) if self.as_json else format_measurement(run, terminal_width())
        click.echo(text)
        return run

    def _with_trace(self, cell: Cell, machine: Any, predicted: Any) -> dict[str, Any] | None:
        """The estimate's JSON, with the trace's beside it where one was asked for; why there is none, where it failed."""
        plain = None if predicted is None else predicted.to_json()
        if not self.wishes.trace:
            return plain
        from bench.trace_record import traced_record

        return {
            **(plain or {}),
            **traced_record(cell.setup, machine, trust_remote_code=self.wishes.trust_remote_code),
        }

    def run_all(self, cells: Sequence[Cell], num_repeats: int, *, resume: bool) -> int:
        """Run what isn't done; say where the results are; the exit code."""
        done = self.count_done() if resume else {}
        planned = list(sweep.rounds(cells, num_repeats, done))
        runs: list[Measurement] = []
        for number, cell in enumerate(planned, start=1):
            prefix = f"{number}/{len(planned)} " if len(planned) > 1 else ""
            try:
                run = self.run(cell, prefix)
            except KeyboardInterrupt:
                click.echo(f"\n{len(runs)} results are in {self.results}; --resume goes on there", err=True)
                raise
            runs += [] if run is None else [run]
        if len(runs) > 1 and not self.as_json:
            click.echo(f"\n{format_sweep(runs, terminal_width())}")
        click.echo(f"{len(runs)} results appended to {self.results}", err=True)
        outcomes = [run.outcome for run in runs]
        if self.is_single:
            return worst_exit(set(outcomes))
        return 0 if "ok" in outcomes or not outcomes else FinefitError.exit_code


def worst_exit(outcomes: set[str]) -> int:
    """0 if all ran, 3 if one ran out of memory, else 1."""
    if outcomes <= {"ok"}:
        return 0
    return DoesNotFitError.exit_code if "oom" in outcomes else FinefitError.exit_code
