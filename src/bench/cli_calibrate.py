"""`finefit calibrate`: what results of this machine teach about its step times."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import click

from bench.cli_commands import device_option, machine_of
from bench.cli_compare import read_with_warnings
from bench.cli_trace import progress_bar
from bench.extras import require_train_extra
from planner.cli_options import SectionedCommand, Session, json_option
from planner.render import Column, format_json, format_table, terminal_width
from planner.results import SCHEMA_VERSION
from planner.units import format_duration

if TYPE_CHECKING:
    from bench.calibrate import HeldOut, Learnt


@click.command("calibrate", cls=SectionedCommand, epilog="Example: finefit calibrate results.jsonl")
@click.argument(
    "results",
    metavar="RESULTS...",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option(
    "--md", type=click.Path(path_type=Path), metavar="FILE", help="Write what was learnt as a page."
)
@click.option("--dry-run", is_flag=True, help="Learn and print, keep nothing.")
@device_option
@json_option
@click.pass_obj
def calibrate_command(
    session: Session,
    /,
    results: tuple[Path, ...],
    md: Path | None,
    dry_run: bool,
    device: str | None,
    as_json: bool,
) -> None:
    """Correct this machine's step times, term by term, by results that were measured on it.

    RESULTS are files of `finefit bench`, with at least 8 different setups: models, lengths, methods, batches. Shows
    the error before and after on setups that the corrections were not learnt from, and keeps nothing where it
    doesn't fall. Times for `--gpu local` come with the corrections from then on.
    """
    require_train_extra("calibrate")
    from bench.calibrate import calibrate, keep
    from planner.files import check_target, write_atomically

    if md is not None:
        check_target(md, *results)
    runs = [run for path in results for run in read_with_warnings(path)]
    machine = machine_of(session, device)
    with redirect_stdout(sys.stderr), progress_bar("calibrate") as progress:
        found = calibrate(runs, machine, progress=progress)
    click.echo(format_json(_plain(found)) if as_json else _format(found))
    if md is not None:
        write_atomically(md, _page(found))
    if not dry_run:
        click.echo(f"kept in {keep(found, machine)}", err=True)


def _plain(found: Learnt) -> dict[str, Any]:
    return {
        **found.calibration.to_json(),
        "schema_version": SCHEMA_VERSION,
        "rows": [asdict(row) for row in found.rows],
        "rows_by_model": [asdict(row) for row in found.errors_by_model],
        "left_out": dict(found.left_out),
        "is_supported": found.is_supported,
    }


def _format(found: Learnt) -> str:
    width = terminal_width()
    parts = [
        format_table(_columns(_CORRECTION_TITLES, _correction_cells(found)), width),
        format_table(_columns(_ROW_TITLES, _row_cells(found.rows)), width),
        *_summary(found),
    ]
    return "\n\n".join(parts)


def _columns(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[Column]:
    cells = zip(*rows, strict=True)
    return [
        Column(title=title, cells=tuple(own), is_number=i > 0)
        for i, (title, own) in enumerate(zip(titles, cells, strict=True))
    ]


_CORRECTION_TITLES = ("term", "time times", "+-", "setups")
_ROW_TITLES = ("setup", "measured", "without", "held out")


def _correction_cells(found: Learnt) -> Sequence[tuple[str, ...]]:
    from planner.calibration import TERMS

    known = found.calibration.corrections
    rows = []
    for name in TERMS:
        one = known.get(name)
        if one is None:
            rows.append((name, "as measured", "", "too few"))
        else:
            rows.append((name, f"{one.factor:.2f}", f"{one.spread:.0%}", str(one.num_results)))
    return rows


def _row_cells(rows: Sequence[HeldOut]) -> Sequence[tuple[str, ...]]:
    return [
        (row.label, format_duration(row.measured_s), f"{row.before:+.1%}", f"{row.after:+.1%}")
        for row in rows
    ]


def _summary(found: Learnt) -> list[str]:
    """How far it helps, in sentences."""
    lines = [
        f"{found.calibration.num_results} results, {len(found.rows)} setups.",
        _errors("corrections from all other setups", found.rows),
    ]
    if any(row.after != row.before for row in found.errors_by_model):
        lines.append(_errors("corrections from all other models", found.errors_by_model))
    else:
        lines.append("All setups are of one model: how the corrections do on other models is not known.")
    lines += [f"Left out: {count} that {reason}." for reason, count in found.left_out.items()]
    if not found.is_supported:
        lines.append("The corrections don't help on setups that they were not learnt from.")
    return lines


def _errors(how: str, rows: Sequence[HeldOut]) -> str:
    before, after = ([abs(getattr(row, name)) for row in rows] for name in ("before", "after"))
    return (
        f"Step time with {how}: mean error {fmean(before):.1%} -> {fmean(after):.1%}, "
        f"median {median(before):.1%} -> {median(after):.1%}, worst {max(before):.1%} -> {max(after):.1%}."
    )


def _page(found: Learnt) -> str:
    """The same as Markdown."""
    own = found.calibration
    versions = ", ".join(f"{name} {version}" for name, version in own.versions.items())
    sections = [
        "# Calibration of this machine's step times",
        "Made by `finefit calibrate RESULTS --md …`: results of `finefit bench` on one machine correct the rates that its times "
        "are predicted from, each term by a factor of its own. Every setup below is predicted with corrections that "
        "were learnt from the other setups only.",
        *_summary(found),
        _markdown(_ROW_TITLES, _row_cells(found.rows)),
        "What all results together say of the terms (time times so much; one standard error; setups that spend 5 % "
        "of their step on it or more):",
        _markdown(_CORRECTION_TITLES, _correction_cells(found)),
        f"{own.machine}; {own.measured_at[:10]}; {versions}.",
    ]
    return "\n\n".join(sections) + "\n"


def _markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


COMMANDS = (calibrate_command,)
