"""`finefit machine`: what this machine reaches, measured, for the times of plans with `--gpu local`."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

import click

from bench.cli_commands import device_option
from bench.cli_trace import progress_bar
from bench.extras import require_train_extra
from planner.cli_options import SectionedCommand, json_option
from planner.render import Column, format_json, format_table, terminal_width

if TYPE_CHECKING:
    from bench.rates import Reading


@click.command("machine", cls=SectionedCommand, epilog="Example: finefit machine")
@device_option
@click.option("--dry-run", is_flag=True, help="Measure and print, keep nothing.")
@json_option
def machine_command(device: str | None, dry_run: bool, as_json: bool) -> None:
    """Measure this machine's rates: matrix products, memory, attention, optimizer, 4-bit weights, links.

    Takes one to three minutes; let nothing else run meanwhile. The figures are kept in your data folder, and
    times for `--gpu local` come from them.
    """
    require_train_extra("machine")
    from bench.machine_rates import measure_and_keep

    # libraries that print while they are imported or run would spoil the JSON
    with redirect_stdout(sys.stderr), progress_bar("machine") as progress:
        found = measure_and_keep(device, keep=not dry_run, progress=progress)
    if as_json:
        click.echo(format_json(found.to_json()))
        return
    click.echo(_format(found.readings))
    for warning in found.warnings:
        click.echo(f"warning: {warning}", err=True)
    if found.path is not None:
        click.echo(f"kept in {found.path}", err=True)


_SCALES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def _scaled(rate: float, unit: str) -> str:
    """A rate in decimal thousands, as rates are given."""
    prefix, factor = next(((p, f) for p, f in _SCALES if rate >= f), ("", 1.0))
    return f"{rate / factor:.3g} {prefix}{unit}"


def _format(readings: tuple[Reading, ...]) -> str:
    def column(title: str, cells: Any, *, is_number: bool = False) -> Column:
        return Column(title=title, cells=tuple(cells), is_number=is_number)

    columns = [
        column("measured", (r.name for r in readings)),
        column("rate", (_scaled(r.rate, r.unit) for r in readings), is_number=True),
        column("spread", (f"{r.spread:.0%}" for r in readings), is_number=True),
        column("calls", (str(r.num_calls) for r in readings), is_number=True),
    ]
    return format_table(columns, terminal_width())


COMMANDS = (machine_command,)
