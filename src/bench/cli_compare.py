"""The commands that judge predictions: `compare` reads measurements, `verify` makes them."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.extras import require_train_extra
from planner.cli_options import SectionedCommand, Session, json_option
from planner.errors import FinefitError, UsageError
from planner.render import format_json, terminal_width
from planner.results import SCHEMA_VERSION

if TYPE_CHECKING:
    from bench.store import Measurement
    from bench.verify import Verification


@click.command("compare", cls=SectionedCommand, epilog="Example: finefit compare results.jsonl --predicted")
@click.argument(
    "files", metavar="RESULTS [RESULTS]", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option("--predicted", is_flag=True, help="Compare one file's runs with what was predicted for them.")
@json_option
def compare_command(files: tuple[Path, ...], predicted: bool, as_json: bool) -> None:
    """Compare measurements with predictions, or two files of them.

    RESULTS --predicted: each run with what was predicted for it. A B: the runs of B against those of A.
    """
    if len(files) != (1 if predicted else 2):
        raise UsageError("compare takes one file with --predicted, or two files without")
    if predicted:
        _compare_predicted(files[0], as_json)
    else:
        _compare_two(files[0], files[1], as_json)


def _read(path: Path) -> list[Measurement]:
    from bench.store import read_results

    runs, warnings = read_results(path)
    for warning in warnings:
        click.echo(warning, err=True)
    return runs


def _compare_predicted(path: Path, as_json: bool) -> None:
    from bench.cli_text import format_predictions
    from bench.compare import predicted_vs_measured

    rows = predicted_vs_measured(_read(path))
    if as_json:
        plain = [{**asdict(row), "relative_error": row.relative_error} for row in rows]
        click.echo(format_json({"schema_version": SCHEMA_VERSION, "rows": plain}))
        return
    if not rows:
        raise FinefitError(f"{path} has no successful run with a prediction")
    click.echo(format_predictions(rows, terminal_width()))


def _compare_two(a: Path, b: Path, as_json: bool) -> None:
    from bench.cli_text import format_comparison
    from bench.compare import compare

    found = compare(_read(a), _read(b))
    if as_json:
        plain = {**asdict(found), "is_significant": found.is_significant}
        click.echo(format_json({"schema_version": SCHEMA_VERSION, **plain}))
        return
    click.echo(format_comparison(found, terminal_width()))


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


COMMANDS: tuple[click.Command, ...] = (compare_command, verify_command)
