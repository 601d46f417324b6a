"""`finefit trace`: what the traced step needs, when and why; and the check of the replay against a snapshot."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.extras import require_train_extra
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
from planner.cli_plan import case_lines, setup_and_machine
from planner.cli_tables import complete_model
from planner.errors import UsageError
from planner.render import format_json, terminal_width

if TYPE_CHECKING:
    from bench.trace.estimate import Traced
    from bench.trace.run import Progress
    from planner.setup import TrainSetup
    from planner.specs import Machine


@click.command("trace", cls=SectionedCommand, epilog="Example: finefit trace plan.yaml --plot trace.svg")
@click.argument("model", required=False, metavar="[MODEL|PLAN.YAML]", shell_complete=complete_model)
@gpu_option(required=False)
@click.option("--all-layers", is_flag=True, help="Trace every layer; default: two shallow models.")
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw the memory over time (.svg, .png)."
)
@click.option("--cases", metavar="FILE", help="Trace every line of a JSON Lines file; - is stdin.")
@click.option(
    "--snapshot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Replay a recorded memory snapshot of torch (.pickle, .json).",
)
@trust_option
@setup_options(without=("model",))
@json_option
@click.pass_obj
def trace_command(
    session: Session,
    /,
    model: str | None,
    gpu: str | None,
    all_layers: bool,
    plot: Path | None,
    cases: str | None,
    snapshot: Path | None,
    trust_remote_code: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Run the step on fake tensors: its peak, when, and what is alive.

    MODEL and PLAN.YAML are as for `estimate`. No GPU and no weights are needed.

    --snapshot checks the allocator's replay against a run that you recorded:
    torch.cuda.memory._record_memory_history(), the run, torch.cuda.memory._dump_snapshot(FILE).
    """
    fields = given_fields(options)
    _check_sources(model, cases, snapshot, plot, bool(fields) or gpu is not None or all_layers)
    if snapshot is not None:
        _print_snapshot(snapshot, as_json)
        return
    require_train_extra("trace")
    how = {"all_layers": all_layers, "trust_remote_code": trust_remote_code}
    if cases is not None:
        _print_cases(session, cases, gpu, how, as_json)
        return
    assert model is not None
    _print_one(*setup_and_machine(session, model, gpu, fields), how, plot, as_json)


def _check_sources(
    model: str | None, cases: str | None, snapshot: Path | None, plot: Path | None, has_setup: bool
) -> None:
    """Exactly one thing to trace. Raises UsageError before anything slow begins."""
    if sum(source is not None for source in (model, cases, snapshot)) != 1:
        raise UsageError("trace takes one of MODEL, PLAN.YAML, --cases FILE and --snapshot FILE")
    if snapshot is not None and (has_setup or plot is not None):
        raise UsageError("--snapshot takes only --json beside it")
    if cases is not None and plot is not None:
        raise UsageError("--plot draws one setup, not --cases")
    if plot is not None:
        _check_plot(plot)


def _check_plot(path: Path) -> None:
    from importlib.util import find_spec

    from bench.trace.plot import check_format
    from planner.errors import MissingExtraError

    check_format(path)
    if find_spec("matplotlib") is None:
        raise MissingExtraError("trace --plot", "plot", "matplotlib")


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """A progress bar on a terminal's stderr."""
    from tqdm import tqdm

    with tqdm(
        desc=label, leave=False, disable=None, file=sys.stderr, bar_format="{desc} {bar} {elapsed}"
    ) as bar:

        def show(text: str, part: int, num_parts: int) -> None:
            bar.total, bar.n = num_parts, part
            bar.set_description_str(f"{label}: {text}")

        yield show


def trace_with_bar(setup: TrainSetup, machine: Machine, *, label: str = "trace", **how: bool) -> Traced:
    """Trace a setup; on a terminal a bar, named `label`, says how far it is. `how` and errors: bench.trace.estimate.trace_on."""
    with progress_bar(label) as progress, redirect_stdout(sys.stderr):
        progress("loading libraries", 0, 3)
        from bench.trace.estimate import trace_on

        return trace_on(setup, machine, progress=progress, **how)


def _print_one(
    setup: TrainSetup, machine: Machine, how: dict[str, Any], plot: Path | None, as_json: bool
) -> None:
    from bench.trace_text import format_trace

    traced = trace_with_bar(setup, machine, **how)
    if plot is not None:
        _draw(traced, plot)
    click.echo(format_json(traced.to_json()) if as_json else format_trace(traced, terminal_width()))


def _draw(traced: Traced, path: Path) -> None:
    from bench.trace.plot import Picture, draw
    from bench.trace.replay import reserved_levels
    from planner.render_estimate import describe_method

    setup, result = traced.estimate.setup, traced.result
    levels = reserved_levels(traced.requests()) if traced.workspace_bytes else []
    picture = Picture(
        timeline=result.timeline,
        title=f"{setup.model_label}, {describe_method(setup)}, "
        f"{setup.micro_batch_size} x {setup.seq_len} tokens, {traced.estimate.gpu}",
        peak_at=result.peak_at,
        reserved=[(number, level) for number, level in levels if number >= 0],
        usable_bytes=traced.usable_bytes,
    )
    draw(picture, path)
    click.echo(f"wrote {path}", err=True)


def _print_cases(session: Session, name: str, gpu: str | None, how: dict[str, Any], as_json: bool) -> None:
    from bench.trace_text import format_trace_line
    from planner.cases import answer_cases

    lines = [line for line in case_lines(name) if line.strip()]
    count = 0

    def answer(setup: TrainSetup, machine: Machine) -> Traced:
        label = f"case {count + 1} of {len(lines)}"
        return trace_with_bar(setup, machine, label=label, **how)

    def find_machine(words: str, fields: dict[str, Any]) -> Machine:
        return resolve_machine(session, words, fields)

    for result in answer_cases(lines, answer, find_machine, gpu):
        count += 1
        click.echo(format_json(result) if as_json else format_trace_line(result))


def _print_snapshot(path: Path, as_json: bool) -> None:
    from bench.trace.snapshot import read_snapshot
    from bench.trace.snapshot_replay import compare_snapshot, comparisons_json, format_comparisons

    found = compare_snapshot(read_snapshot(path))
    click.echo(
        format_json(comparisons_json(found)) if as_json else format_comparisons(found, terminal_width())
    )


COMMANDS: tuple[click.Command, ...] = (trace_command,)
