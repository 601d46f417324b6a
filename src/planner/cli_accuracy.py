"""`finefit accuracy`: predicted beside published memory, group by group."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.cli_options import SectionedCommand, Session, json_option
from planner.errors import FinefitError, NotModelledError, UsageError

if TYPE_CHECKING:
    from planner.accuracy import Compared
    from planner.cases import Answer
    from planner.results import Estimate
    from planner.setup import TrainSetup
    from planner.specs import Machine


@click.command(
    "accuracy", cls=SectionedCommand, epilog="Example: finefit accuracy evidence/memory-runs.jsonl --worst 10"
)
@click.argument("cases", metavar="CASES|FOLDER", type=click.Path(exists=True, path_type=Path))
@click.option("--worst", type=click.IntRange(min=0), default=0, help="Also show the N worst cases.")
@click.option("--markdown", is_flag=True, help="Print a report in Markdown.")
@click.option(
    "--residuals",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the errors as the table that intervals are set from, and print nothing else.",
)
@click.option("--trace", is_flag=True, help="Trace each case's real step: seconds per case.")
@click.option(
    "--traced",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Predict from traces kept in FILE (evidence/memory-runs-traced.jsonl) instead of tracing.",
)
@click.option(
    "--keep",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="With --trace: add each trace to FILE, and trace nothing that is there.",
)
@click.option("--speed", is_flag=True, help="Compare the time of a step instead of its memory.")
@json_option
@click.pass_context
def accuracy_command(
    context: click.Context,
    /,
    cases: Path,
    worst: int,
    markdown: bool,
    residuals: Path | None,
    trace: bool,
    traced: Path | None,
    keep: Path | None,
    speed: bool,
    as_json: bool,
) -> None:
    """Predict every case of a file or folder: errors, false verdicts, and how well the intervals hold.

    A case is a line with id, gpu, setup, stack and measured; evidence/README.md describes them.
    """
    from planner import accuracy
    from planner.estimate import estimate

    if keep is not None and not trace:
        raise UsageError("--keep keeps traces: add --trace")
    read = accuracy.read_all(cases)
    if speed:
        if trace or traced is not None or residuals is not None:
            raise UsageError(
                "--speed: a trace says nothing of time, and residuals are of memory; leave them out"
            )
        _print_speed(read, str(cases), worst, markdown, as_json)
        return
    predict: Answer = estimate
    if traced is not None:
        predict = _kept(traced)
    elif trace:
        predict = _keeping(_tracer(context.ensure_object(Session), len(read)), keep)
    is_hidden = trace or not sys.stderr.isatty()
    with click.progressbar(read, label="cases", file=sys.stderr, hidden=is_hidden) as bar:
        compared = accuracy.compare(bar, predict)
    if residuals is not None:
        from planner.files import write_atomically
        from planner.residuals import table_text

        write_atomically(residuals, table_text(accuracy.residuals(compared)))
    elif as_json:
        _print_json(compared)
    else:
        words = f"{cases} --trace" if trace else str(cases)
        words = words if traced is None else f"{cases} --traced {traced}"
        _print_text(compared, words, worst, markdown, "closed form" if predict is estimate else "traced")


def _kept(path: Path) -> Answer:
    from planner.kept_traces import kept_predictor, read_traces

    with path.open("rb") as lines:
        return kept_predictor(read_traces(str(path), lines))


def _keeping(predict: Answer, path: Path | None) -> Answer:
    if path is None:
        return predict
    from planner.kept_traces import keeping

    return keeping(predict, path)


def _print_speed(read: list[Mapping[str, Any]], path: str, worst: int, markdown: bool, as_json: bool) -> None:
    from dataclasses import asdict

    from planner import speed_accuracy
    from planner.render import format_json, terminal_width
    from planner.render_speed import SpeedReport
    from planner.results import SCHEMA_VERSION

    results = speed_accuracy.compare(read)
    if as_json:
        groups = speed_accuracy.summaries(results).items()
        answer = {
            "schema_version": SCHEMA_VERSION,
            "groups": [asdict(group) | asdict(summary) for group, summary in groups],
            "runs": [asdict(result) | {"error": result.error} for result in results],
        }
        click.echo(format_json(answer))
        return
    report = SpeedReport(results, width=None if markdown else terminal_width(), markdown=markdown)
    click.echo("\n\n".join(report.parts(path, worst)))


def _tracer(session: Session, num_cases: int) -> Answer:
    """The trace as a predictor; whatever it stumbles over is told beside the case and costs no other case.

    A case with corrections is traced twice, so the bar counts traces of at least so many cases.
    """
    trace = session.trace
    if trace is None:
        raise FinefitError("tracing needs the training extra: pip install 'finefit[train]'")

    numbers = count(1)

    def predict(setup: TrainSetup, machine: Machine) -> Estimate:
        try:
            return trace(setup, machine, label=f"trace {next(numbers)}, {num_cases} cases")
        except FinefitError:
            raise
        except Exception as error:
            reason = f"the trace failed: {type(error).__name__}: {error}"
            raise NotModelledError(f"{' '.join(reason.split()):.200}") from error

    return predict


def _print_json(compared: list[Compared]) -> None:
    from dataclasses import asdict

    from planner import accuracy, coverage
    from planner.render import format_json
    from planner.results import SCHEMA_VERSION

    found = coverage.left_out(compared)
    answer = {
        "schema_version": SCHEMA_VERSION,
        "groups": [asdict(group) for group in accuracy.group_errors(compared)],
        "peaks": [
            {"kind": kind, "source": source, "group": group, **asdict(errors)}
            for (kind, source, group), errors in accuracy.peak_errors(compared).items()
        ],
        "outcomes": asdict(accuracy.outcomes((case, case.verdict) for case in compared)),
        "left_out": coverage.to_json(found),
        "cases": [case.to_json() for case in compared],
    }
    click.echo(format_json(answer))


def _print_text(compared: list[Compared], words: str, worst: int, markdown: bool, predictor: str) -> None:
    from planner.render import terminal_width
    from planner.render_accuracy import Report

    width = None if markdown else terminal_width()
    report = Report(compared, width=width, markdown=markdown, predictor=predictor)
    click.echo("\n\n".join(_parts(report, words, worst, markdown)))


def _parts(report: object, path: str, worst: int, markdown: bool) -> Iterable[str]:
    from planner.render_accuracy import Report

    assert isinstance(report, Report)
    if markdown:
        yield report.head(path)
    yield from report.parts(worst)
