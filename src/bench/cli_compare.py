"""The commands that judge and show predictions and measurements: `compare`, `verify`, `report` and `submit`."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.extras import require_train_extra
from planner.cli_options import SectionedCommand, Session, gpu_option, json_option
from planner.errors import FinefitError, UsageError
from planner.render import format_json, terminal_width
from planner.results import SCHEMA_VERSION

if TYPE_CHECKING:
    from bench.gates import Gate
    from bench.store import Measurement
    from bench.verify import Verification


@click.command(
    "compare",
    cls=SectionedCommand,
    epilog="Example: finefit compare before.jsonl after.jsonl --gate 'step_s<=1.05'",
)
@click.argument(
    "files", metavar="RESULTS [RESULTS]", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option("--predicted", is_flag=True, help="Compare one file's runs with what was predicted for them.")
@click.option(
    "--gate", "gates", multiple=True, metavar="QUANTITY<=RATIO", help="Exit 3 where B / A leaves this bound."
)
@click.option("--any-machine", is_flag=True, help="Judge gates also on runs of different machines.")
@json_option
def compare_command(
    files: tuple[Path, ...], predicted: bool, gates: tuple[str, ...], any_machine: bool, as_json: bool
) -> None:
    """Compare measurements with predictions, or two files of them.

    RESULTS --predicted: each run with what was predicted for it, and the error by term. A B: the runs of B against
    those of A, setup by setup; ratios are B / A. Exit code 3: a gate doesn't hold.
    """
    from bench.gates import read_gate

    if len(files) != (1 if predicted else 2) or (predicted and gates):
        raise UsageError("compare takes one file with --predicted, or two files without (and --gate)")
    bounds = [read_gate(gate) for gate in gates]
    if predicted:
        _compare_predicted(files[0], as_json)
    else:
        _compare_two(files[0], files[1], bounds, any_machine, as_json)


def read_with_warnings(path: Path) -> list[Measurement]:
    """A results file's records; what is wrong with others goes to stderr."""
    from bench.store import read_results

    runs, warnings = read_results(path)
    for warning in warnings:
        click.echo(warning, err=True)
    return runs


def _compare_predicted(path: Path, as_json: bool) -> None:
    from bench.cli_text import MAX_SHOWN_RUNS, format_predictions, format_term_errors
    from bench.compare import predicted_vs_measured
    from bench.terms import errors_by_term, term_rows

    runs = read_with_warnings(path)
    rows = predicted_vs_measured(runs)
    terms = errors_by_term(runs)
    if as_json:
        plain = [{**asdict(row), "relative_error": row.relative_error} for row in rows]
        parts = [
            {**asdict(row), "relative_error": row.relative_error, "share": row.share}
            for run in runs
            for row in term_rows(run)
        ]
        click.echo(
            format_json(
                {
                    "schema_version": SCHEMA_VERSION,
                    "rows": plain,
                    "term_rows": parts,
                    "terms": [asdict(term) for term in terms],
                }
            )
        )
        return
    if not rows:
        raise FinefitError(f"{path} has no successful run with a prediction")
    shown = {row.id for row in rows}
    if len(shown) <= MAX_SHOWN_RUNS:
        click.echo(format_predictions(rows, terminal_width()))
    else:
        click.echo(f"{len(shown)} runs; --json lists them")
    click.echo()
    click.echo(format_term_errors(terms, terminal_width()))


def _compare_two(a: Path, b: Path, gates: list[Gate], any_machine: bool, as_json: bool) -> None:
    from bench.compare import compare_files
    from bench.compare_text import format_comparisons
    from bench.gates import check_gates

    found, lonely = compare_files(read_with_warnings(a), read_with_warnings(b))
    if as_json:
        plain = [{**asdict(one), "is_significant": one.is_significant} for one in found]
        answer = plain[0] if len(plain) == 1 else {"comparisons": plain}
        click.echo(format_json({"schema_version": SCHEMA_VERSION, **answer, "unmatched": lonely}))
    else:
        click.echo(format_comparisons(found, terminal_width()))
    for line in (*([] if as_json else lonely), *check_gates(gates, found, any_machine=any_machine)):
        click.echo(line, err=True)


@click.command("verify", cls=SectionedCommand, epilog="Example: finefit verify --out records")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Folder for the record (default: this one).",
)
@click.option(
    "--budget",
    "budget_s",
    type=click.FloatRange(min=30),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="About how long it may take.",
)
@click.option("--trace/--no-trace", default=True, show_default=True, help="Trace each plan as well.")
@json_option
@click.pass_obj
def verify_command(session: Session, /, out: Path, budget_s: float, trace: bool, as_json: bool) -> int:
    """Check finefit against this machine, in about five minutes.

    Small plans are predicted, traced and measured. Nothing is downloaded. The record names no person and no path, and is meant to be shared.
    """
    require_train_extra("verify")
    from bench.cli_text import format_verification
    from bench.measure import ProgressLine
    from bench.verify import verify

    lines: dict[str, ProgressLine] = {}

    def show(rung: Any, step: Any) -> None:
        lines.setdefault(rung.name, ProgressLine(f"{rung.name}: "))(step)

    assert session.local_machine is not None
    with redirect_stdout(sys.stderr):
        found = verify(
            session.local_machine(),
            out_dir=out,
            budget_s=budget_s,
            trace=session.trace if trace else None,
            progress=show,
        )
    click.echo(format_json(_plain(found)) if as_json else format_verification(found, terminal_width()))
    return 0 if found.rows else FinefitError.exit_code


def _plain(found: Verification) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "gpu": found.gpu,
        "duration_s": found.duration_s,
        "context_bytes": found.context_bytes,
        "record": None if found.record_path is None else str(found.record_path),
        "rows": [
            {**asdict(row), "predicted_error": row.predicted_error, "traced_error": row.traced_error}
            for row in found.rows
        ],
        "notes": {case.rung.name: case.note for case in found.cases if case.note},
    }


@click.command(
    "report", cls=SectionedCommand, epilog="Example: finefit report results.jsonl --html report.html"
)
@click.argument("source", metavar="RESULTS|PLAN.YAML|RUN", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--html", type=click.Path(path_type=Path), metavar="FILE", help="One file that needs no network."
)
@click.option("--md", type=click.Path(path_type=Path), metavar="FILE", help="The same as Markdown.")
@gpu_option(required=False)
@click.option(
    "--trace/--no-trace", default=False, show_default=True, help="Trace a plan's step, to show its memory."
)
@click.pass_obj
def report_command(
    session: Session, /, source: Path, html: Path | None, md: Path | None, gpu: str | None, trace: bool
) -> None:
    """Draw what was measured, planned or trained: the question and its answer first.

    RESULTS is a file of `finefit bench` or a folder of such files, RUN a folder of `finefit train`.
    """
    if html is None and md is None:
        raise UsageError("where to? --html FILE, --md FILE, or both")
    if trace:
        require_train_extra("report --trace")
    from bench.report.command import build, check_targets, write

    check_targets(source, html, md)
    report = build(session, source, gpu, trace=trace)
    click.echo(f"{report.question}\n{report.answer}")
    for path in write(report, html, md):
        click.echo(f"wrote {path}", err=True)


@click.command("submit", cls=SectionedCommand, epilog="Example: finefit submit results.jsonl --out shared")
@click.argument("results", metavar="RESULTS", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Folder for the file (default: this one).",
)
@json_option
def submit_command(results: Path, out: Path, as_json: bool) -> None:
    """Make results of a GPU a file that can be shared.

    It names no person, no path, no machine and no time of day; look at it, then send it. A folder of such files is
    evidence for `finefit accuracy FOLDER`. Nothing is sent by this command.
    """
    from bench.submit import shared_cases, write_cases

    cases, reasons = shared_cases(read_with_warnings(results))
    for reason in reasons:
        click.echo(reason, err=True)
    if not cases:
        raise FinefitError(f"{results} has no result that can be shared")
    path = write_cases(cases, out)
    if as_json:
        answer = {
            "schema_version": SCHEMA_VERSION,
            "file": str(path),
            "cases": len(cases),
            "left_out": reasons,
        }
        click.echo(format_json(answer))
        return
    click.echo(f"{len(cases)} results in {path}")


COMMANDS: tuple[click.Command, ...] = (compare_command, verify_command, report_command, submit_command)
