"""The commands about one configuration: `estimate`, `plan` and `export`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner import __version__
from planner.cases import Answer, answer_cases
from planner.cli_options import (
    SectionedCommand,
    Session,
    given_fields,
    gpu_option,
    json_option,
    resolve_machine,
    setup_options,
    trust_option,
)
from planner.cli_tables import complete_model, online_option
from planner.errors import FinefitError, UsageError
from planner.planfile import looks_like_plan, read_plan
from planner.render import format_json, terminal_width

if TYPE_CHECKING:
    from planner.by_length import LengthRow
    from planner.lengths import DataLengths
    from planner.results import Estimate
    from planner.setup import TrainSetup
    from planner.specs import Machine

DOES_NOT_FIT_EXIT = 3


def set_option(function: Any) -> Any:
    """`--set key=value`, for the commands that read a plan."""
    return click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="Change a key of the plan; may be repeated.",
    )(function)


@click.command(
    "estimate",
    cls=SectionedCommand,
    epilog="Example: finefit estimate llama-3.1-8b --gpu rtx-4090 --method qlora --seq-len 4096",
)
@click.argument("model", required=False, metavar="[MODEL|PLAN.YAML]", shell_complete=complete_model)
@gpu_option(required=False)
@click.option("--cases", metavar="FILE", help="Answer every line of a JSON Lines file; - is stdin.")
@click.option(
    "--trace", is_flag=True, help="Trace the model's real step on fake tensors instead of the formulas."
)
@click.option("--by-length", is_flag=True, help="Also show what fits by length of the sequence.")
@trust_option
@online_option
@setup_options(without=("model",))
@json_option
@click.pass_obj
def estimate_command(
    session: Session,
    /,
    model: str | None,
    gpu: str | None,
    cases: str | None,
    trace: bool,
    by_length: bool,
    trust_remote_code: bool,
    online: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Say what one configuration needs and whether it fits.

    MODEL is a name, a hub id, a folder or a config.json; PLAN.YAML is estimated as it stands, with the options
    changed that are given. Exit code 3 means that it does not fit.
    """
    from planner.render_estimate import format_estimate

    fields = given_fields(options)
    answer = _answer(session, trace, trust_remote_code, online)
    if cases is not None:
        if model is not None or fields or by_length:
            raise UsageError(
                "--cases takes only --gpu, --trace, --trust-remote-code, --online and --json beside it"
            )
        _print_cases(session, cases, answer, gpu, as_json)
        return 0
    if model is None:
        raise UsageError("which model? `finefit estimate MODEL --gpu GPU`, or --cases FILE")
    setup, machine = setup_and_machine(session, model, gpu, fields)
    found = answer(setup, machine)
    rows = _lengths(setup, machine) if by_length else None
    if as_json:
        more = {} if rows is None else {"by_length": [row.to_json() for row in rows]}
        click.echo(format_json({**found.to_json(), **more}))
        return exit_code(found)
    click.echo(format_estimate(found, terminal_width()))
    if rows is not None:
        click.echo(_format_lengths(found, rows))
    return exit_code(found)


def _lengths(setup: TrainSetup, machine: Machine) -> list[LengthRow]:
    from planner.by_length import by_length

    return by_length(setup, machine)


def _format_lengths(found: Estimate, rows: list[LengthRow]) -> str:
    """One bar per length against what the card can give."""
    from planner.render import paint, wrap
    from planner.render_estimate import describe_fit
    from planner.render_plot import Bar, format_limit_bars
    from planner.units import format_bytes

    usable_bytes = found.fit.usable_bytes
    given = "" if usable_bytes is None else f"; it can give {format_bytes(usable_bytes)}"
    title = f"What fits by length (tokens, micro-batch {found.setup.micro_batch_size}{given})"
    bars = [
        Bar(label=str(row.seq_len), num_bytes=row.needed_bytes, note=describe_fit(row.fit)) for row in rows
    ]
    width = terminal_width()
    return f"\n{paint(wrap(title, width), 'strong')}\n{format_limit_bars(bars, usable_bytes, width)}"


def exit_code(estimate: Estimate) -> int:
    """3 where a single setup does not fit, else 0."""
    return DOES_NOT_FIT_EXIT if estimate.fit.verdict == "does-not-fit" else 0


def _answer(session: Session, trace: bool, trust_remote_code: bool, online: bool) -> Answer:
    if trust_remote_code and not trace:
        raise UsageError("--trust-remote-code needs --trace: the formulas run no code")
    if trace and session.trace is None:
        raise FinefitError("tracing needs the training extra: pip install 'finefit[train]'")
    if session.trace is not None and trace:
        return partial(session.trace, trust_remote_code=trust_remote_code)
    return _estimate_online if online else _estimate


def _estimate(setup: TrainSetup, machine: Machine) -> Estimate:
    from planner.estimate import estimate

    return estimate(setup, machine)


def _estimate_online(setup: TrainSetup, machine: Machine) -> Estimate:
    from planner.estimate import estimate, resolve

    return estimate(setup, machine, resolve(setup, offline=False))


def setup_and_machine(
    session: Session, model: str, gpu: str | None, fields: dict[str, Any]
) -> tuple[TrainSetup, Machine]:
    """From a model's name and options, or from a plan file with the options on top."""
    from planner.estimate import open_attention
    from planner.setup import TrainSetup

    if looks_like_plan(model):
        plan = read_plan(Path(model))
        wanted = gpu or plan.gpu
        changed = {"num_gpus": plan.setup.num_gpus, **fields} if gpu is None else fields
        machine = resolve_machine(session, _required_gpu(wanted), changed)
        return plan.setup.with_(**changed), machine
    machine = resolve_machine(session, _required_gpu(gpu), fields)
    asked = {"model": model, **fields}
    return TrainSetup.from_dict({**asked, **open_attention(asked, machine)}), machine


def _required_gpu(gpu: str | None) -> str:
    if gpu is None:
        raise UsageError(
            "which GPU? --gpu GPU[:N], or --gpu local for this machine (see `finefit list gpus`)"
        )
    return gpu


def _print_cases(session: Session, name: str, answer: Answer, gpu: str | None, as_json: bool) -> None:
    from planner.render_estimate import format_case_line

    def find_machine(words: str, fields: dict[str, Any]) -> Machine:
        return resolve_machine(session, words, fields)

    for result in answer_cases(case_lines(name), answer, find_machine, gpu):
        click.echo(format_json(result) if as_json else format_case_line(result))


def case_lines(name: str) -> Iterator[bytes]:
    """The lines of a file of cases; - is stdin. Raises FinefitError where it can't be read."""
    if name == "-":
        yield from sys.stdin.buffer
        return
    try:
        with Path(name).open("rb") as file:
            yield from file
    except OSError as error:
        raise FinefitError(f"can't read {name}: {error.strerror or error}") from error


def row_lengths(session: Session, fields: Mapping[str, Any]) -> tuple[DataLengths | None, str | None]:
    """The data's token lengths, and why they are only estimated where they are; None and None without data.

    Raises DataError where the rows are broken.
    """
    if fields.get("data") is None:
        return None, None
    if session.token_lengths is not None:
        return session.token_lengths(fields)
    from planner.char_lengths import estimated_lengths
    from planner.dataset import read_rows

    reason = "counting tokens needs pip install 'finefit[train]'"
    return (
        estimated_lengths(read_rows(fields["data"])),
        f"the rows' lengths are estimated from their characters: {reason}",
    )


def summarise(estimate: Estimate) -> dict[str, Any]:
    """What a plan file keeps of its estimate, under the names of the JSON contract."""
    answer = estimate.to_json()
    memory = {key: value for key, value in answer["memory"].items() if not isinstance(value, dict)}
    return {
        "finefit": __version__,
        "gpu": estimate.gpu,
        "source": estimate.source,
        "memory": memory,
        "fit": answer["fit"],
        "time": answer["time"],
    }


@click.command(
    "export", cls=SectionedCommand, epilog="Example: finefit export plan.yaml --to trl --out trl-run"
)
@click.argument("plan", metavar="PLAN.YAML", type=click.Path(path_type=Path))
@click.option("--to", "target", required=True, metavar="FORMAT", help="See `finefit list formats`.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the files.")
@click.option("--force", is_flag=True, help="Overwrite files that are there.")
@set_option
@json_option
def export_command(
    plan: Path, target: str, out: Path, force: bool, settings: tuple[str, ...], as_json: bool
) -> None:
    """Write a plan as the files of another trainer.

    What the target can't express is named on stderr.
    """
    from planner.export import find_format
    from planner.files import write_atomically
    from planner.results import SCHEMA_VERSION

    form = find_format(target)
    found = read_plan(plan, settings)
    files = form.export(found.setup, found.gpu or "")
    there = [name for name in files if (out / name).exists()]
    if there and not force:
        raise FinefitError(f"{out / there[0]} exists; give another --out, or --force to overwrite it")
    for name, text in files.items():
        write_atomically(out / name, text)
    warnings = form.warnings(found.setup)
    if as_json:
        paths = [str(out / name) for name in files]
        click.echo(format_json({"schema_version": SCHEMA_VERSION, "files": paths, "warnings": warnings}))
        return
    for name in files:
        click.echo(str(out / name))
    for warning in warnings:
        click.echo(f"left out: {warning}", err=True)
