"""The commands that run something here: `bench`, `train` and `hw`. Each parses, calls and prints; heavy modules are imported inside."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bench.extras import require_train_extra
from planner.cli_options import SectionedCommand, Session, json_option, trust_option
from planner.cli_plan import set_option, summarise
from planner.errors import DoesNotFitError, FinefitError, NotModelledError
from planner.planfile import PlanFile, read_plan
from planner.render import format_json, terminal_width
from planner.results import Estimate

if TYPE_CHECKING:
    from bench.store import Measurement
    from planner.specs import Machine

_plan_argument = click.argument("plan", metavar="PLAN.YAML", type=click.Path(path_type=Path))
_device_option = click.option("--device", type=click.Choice(("cuda", "cpu")), help="Default: what is there.")
_force_option = click.option("--force", is_flag=True, help="Run even if it is predicted not to fit.")


def _machine_here(session: Session, plan: PlanFile, device: str | None) -> Machine:
    """This machine as the plan uses it: its processor with `--device cpu`, else as many cards as the setup says."""
    if device == "cpu":
        from bench.host import read_cpu, read_memory
        from bench.machine import cpu_machine

        return replace(cpu_machine(read_cpu(), read_memory()), num_gpus=plan.setup.num_gpus)
    assert session.local_machine is not None
    return replace(session.local_machine(), num_gpus=plan.setup.num_gpus)


def _predict(plan: PlanFile, machine: Machine, *, force: bool) -> Estimate | None:
    """The estimate for this machine; None where finefit has no rules for it.

    Raises DoesNotFitError (exit 3) unless `force`.
    """
    from planner.estimate import estimate
    from planner.units import format_bytes

    try:
        found = estimate(plan.setup, machine)
    except NotModelledError as error:
        click.echo(f"no prediction: {error}", err=True)
        return None
    short = max(0, -(found.fit.headroom_bytes or 0))
    if found.fit.verdict == "does-not-fit" and not force:
        raise DoesNotFitError(
            f"predicted not to fit on {machine.label}: {format_bytes(short)} short. "
            "`finefit plan` finds a setup that fits; --force runs it anyway",
            short,
        )
    return found


@click.command("bench", cls=SectionedCommand, epilog="Example: finefit bench plan.yaml --steps 20")
@click.argument("plans", metavar="PLAN.YAML...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Measured optimizer steps."
)
@click.option("--warmup", type=click.IntRange(min=0), default=2, show_default=True, help="Steps before them.")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("results.jsonl"),
    show_default=True,
    help="File that each record is appended to.",
)
@click.option("--random-weights", is_flag=True, help="Measure without the model's weights.")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=1), metavar="SECONDS", help="End a run after this."
)
@_device_option
@_force_option
@trust_option
@set_option
@json_option
@click.pass_obj
def bench_command(
    session: Session,
    /,
    plans: tuple[Path, ...],
    steps: int,
    warmup: int,
    results: Path,
    random_weights: bool,
    timeout_s: float | None,
    device: str | None,
    force: bool,
    trust_remote_code: bool,
    settings: tuple[str, ...],
    as_json: bool,
) -> int:
    """Run a few real steps of a plan; compare with the prediction.

    Each plan runs in a process of its own, and its record is appended to the results at once.
    """
    require_train_extra("bench")
    from bench.cli_text import format_measurement
    from bench.measure import ProgressLine, measure

    runs = []
    for path in plans:
        plan = read_plan(path, settings)
        machine = _machine_here(session, plan, device)
        predicted = _predict(plan, machine, force=force)
        run = measure(
            plan.setup,
            steps=steps,
            warmup=warmup,
            results_path=results,
            predicted=None if predicted is None else predicted.to_json(),
            gpu=machine.label,
            device=device,
            random_weights=random_weights,
            timeout_s=timeout_s,
            trust_remote_code=trust_remote_code,
            progress=ProgressLine(f"{path.name}: "),
        )
        runs.append(run)
        text = format_json(run.to_json()) if as_json else format_measurement(run, terminal_width())
        click.echo(text)
    click.echo(f"appended to {results}", err=True)
    return _worst_exit(runs)


def _worst_exit(runs: list[Measurement]) -> int:
    """0 if all ran, 3 if one ran out of memory, else 1."""
    outcomes = {run.outcome for run in runs}
    if outcomes == {"ok"}:
        return 0
    return DoesNotFitError.exit_code if "oom" in outcomes else FinefitError.exit_code


@click.command("train", cls=SectionedCommand, epilog="Example: finefit train plan.yaml --out runs/first")
@_plan_argument
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of the run (default: runs/NAME of the plan)."
)
@click.option("--no-resume", is_flag=True, help="Insist on a new folder.")
@click.option("--allow-changes", is_flag=True, help="Go on under a plan that differs from the folder's.")
@click.option(
    "--save-every", type=click.IntRange(min=1), metavar="STEPS", help="Default: a tenth of the run."
)
@click.option(
    "--eval-every", type=click.IntRange(min=1), metavar="STEPS", help="Default: before and after only."
)
@_device_option
@_force_option
@trust_option
@set_option
@json_option
@click.pass_obj
def train_command(
    session: Session,
    /,
    plan: Path,
    out: Path | None,
    no_resume: bool,
    allow_changes: bool,
    save_every: int | None,
    eval_every: int | None,
    device: str | None,
    force: bool,
    trust_remote_code: bool,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Fine-tune as the plan says. The same command again resumes a run that was stopped.

    Exit code 33: interrupted after a checkpoint; 143: stopped before one could be written.
    """
    require_train_extra("train")
    found = read_plan(plan, settings)
    predicted = _predict(found, _machine_here(session, found, device), force=force)
    if predicted is not None:
        found = replace(found, predicted=summarise(predicted))
    from bench.cli_text import format_summary
    from bench.train import train

    folder = out or Path("runs") / plan.stem
    # libraries print where they please, and stdout is for the answer
    with redirect_stdout(sys.stderr):
        summary = train(
            found,
            folder,
            resume=not no_resume,
            allow_changes=allow_changes,
            device=device,
            save_every_steps=save_every,
            eval_every_steps=eval_every,
            trust_remote_code=trust_remote_code,
        ).to_json()
    click.echo(format_json(summary) if as_json else format_summary(summary, str(folder), terminal_width()))


@click.command("hw", cls=SectionedCommand, epilog="Example: finefit hw")
@json_option
def hw_command(as_json: bool) -> None:
    """Report this machine, to paste into an issue.

    GPUs with their free memory and who uses it, CPU features, RAM, disk, torch's build, versions.
    """
    from bench.hardware import hardware_report
    from bench.hardware_text import format_report

    report = hardware_report(progress=lambda line: click.echo(line, err=True))
    click.echo(format_json(report) if as_json else format_report(report))


COMMANDS: tuple[click.Command, ...] = (bench_command, train_command, hw_command)
