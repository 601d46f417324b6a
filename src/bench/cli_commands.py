"""The commands that run something here: `bench` and `hw`. Each parses, calls and prints; heavy modules are imported inside."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.extras import require_train_extra
from planner.cli_options import SectionedCommand, Session, json_option, trust_option
from planner.cli_plan import set_option
from planner.errors import DoesNotFitError, NotModelledError
from planner.planfile import PlanFile
from planner.render import format_json
from planner.results import Estimate

if TYPE_CHECKING:
    from planner.specs import Machine

plan_argument = click.argument("plan", metavar="PLAN.YAML", type=click.Path(path_type=Path))
device_option = click.option("--device", type=click.Choice(("cuda", "cpu")), help="Default: what is there.")
force_option = click.option("--force", is_flag=True, help="Run even if it is predicted not to fit.")


def machine_of(session: Session, device: str | None) -> Machine:
    """This machine: its processor with `--device cpu`, else its cards where it has some."""
    if device == "cpu":
        from bench.host import read_cpu, read_memory
        from bench.machine import cpu_machine

        return cpu_machine(read_cpu(), read_memory())
    assert session.local_machine is not None
    return session.local_machine()


def machine_here(session: Session, plan: PlanFile, device: str | None) -> Machine:
    """This machine as the plan uses it, with as many cards as the setup says."""
    return replace(machine_of(session, device), num_gpus=plan.setup.num_gpus)


def predict(plan: PlanFile, machine: Machine, *, force: bool) -> Estimate | None:
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


def _protocol_options(function: Any) -> Any:
    """How each run is measured."""
    for option in (
        click.option(
            "--steps",
            type=click.IntRange(min=1),
            help="Exactly so many measured optimizer steps (default: 10 to 50, until their spread is below 5 %).",
        ),
        click.option(
            "--warmup",
            type=click.IntRange(min=0),
            help="Exactly so many steps before them (default: 2 to 10, until they stop getting faster).",
        ),
        click.option("--random-weights", is_flag=True, help="Measure without the model's weights."),
        click.option(
            "--trace", is_flag=True, help="Trace each setup first, to show it beside what is measured."
        ),
        click.option("--no-sampling", is_flag=True, help="Don't look from outside (for what looking costs)."),
        click.option(
            "--timeout",
            "timeout_s",
            type=click.FloatRange(min=1),
            metavar="SECONDS",
            help="End a run after this.",
        ),
    ):
        function = option(function)
    return function


@click.command(
    "bench",
    cls=SectionedCommand,
    epilog="Example: finefit bench plan.yaml --sweep micro_batch_size=1,2,4 seq_len=512,1024 --resume",
)
@click.argument("words", metavar="PLAN.YAML... [FIELD=VALUES...]", nargs=-1, required=True)
@click.option(
    "--sweep",
    "axes",
    multiple=True,
    metavar="FIELD=VALUE,VALUE",
    help="Run every combination; more FIELD=VALUES may follow.",
)
@click.option(
    "--repeat", type=click.IntRange(min=1), default=1, show_default=True, help="Runs of each setup."
)
@click.option("--resume", is_flag=True, help="Leave out what the results have from this machine.")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("results.jsonl"),
    show_default=True,
    help="File that each record is appended to.",
)
@_protocol_options
@device_option
@force_option
@trust_option
@set_option
@json_option
@click.pass_obj
def bench_command(
    session: Session,
    /,
    words: tuple[str, ...],
    axes: tuple[str, ...],
    repeat: int,
    resume: bool,
    results: Path,
    settings: tuple[str, ...],
    as_json: bool,
    no_sampling: bool,
    **options: Any,
) -> int:
    """Run a few real steps of a plan; compare with the prediction.

    Each run has a process of its own, and its record is appended to the results at once, also when the run fails.
    docs/protocol.md says what is measured and how.
    """
    require_train_extra("bench")
    from bench.bench_command import Bench, Wishes, read_sweep

    found = read_sweep(words, axes, settings, results)
    bench = Bench(
        session=session,
        wishes=Wishes(is_sampling=not no_sampling, **options),
        results=results,
        as_json=as_json,
        is_single=len(found.cells) == 1,
    )
    return bench.run_all(found.cells, repeat, resume=resume)


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


COMMANDS: tuple[click.Command, ...] = (bench_command, hw_command)
