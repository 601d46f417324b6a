"""The commands about money: `costs`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from planner.cli_options import (
    SectionedCommand,
    Session,
    given_fields,
    gpu_option,
    json_option,
    setup_options,
)
from planner.cli_plan import row_lengths, setup_and_machine
from planner.cli_tables import complete_model, online_option
from planner.render import format_json, terminal_width

if TYPE_CHECKING:
    from planner.run_length import RunLength
    from planner.setup import TrainSetup

YEARS_OF_USE = 3.0
MOST_FAULTS_SHOWN = 10
"""Of the user's own price rows; --json has them all."""


def _money_options(function: Any) -> Any:
    """The options about the own machine and its surroundings."""
    options = (
        click.option(
            "--currency", metavar="USD|CNY|EUR", default="USD", show_default=True, help="Of all amounts."
        ),
        click.option("--country", metavar="CC", help="Where the own machine stands, as DE, CN or US-CA."),
        click.option("--business", is_flag=True, help="Take the country's tariff for businesses."),
        click.option("--tariff", metavar="AMOUNT", help="Price of a kWh, as in 0.30EUR."),
        click.option("--box-watts", metavar="W", help="Power of the whole box at the wall, as in 450-500."),
        click.option("--card-price", metavar="AMOUNT", help="Price of one card, as in 1600USD; or owned."),
        click.option("--resale", metavar="AMOUNT", help="What one card brings at the end."),
        click.option(
            "--hours-per-year", type=click.FloatRange(0, 8784, min_open=True), metavar="H", help="Use."
        ),
        click.option(
            "--years",
            type=click.FloatRange(0, min_open=True),
            default=YEARS_OF_USE,
            show_default=True,
            help="Until the card is sold.",
        ),
        click.option(
            "--prices",
            multiple=True,
            metavar="FILE",
            help="YAML with your own offers; may be repeated (always read: prices.yaml in finefit's data folder).",
        ),
        click.option(
            "--rate", "rates", multiple=True, metavar="FROM/TO=X", help="Exchange rate, as in USD/CNY=7.1."
        ),
    )
    return _with_options(function, options)


def _run_options(function: Any) -> Any:
    """The options about the run and about renting."""
    options = (
        click.option(
            "--tokens", type=click.FloatRange(1), metavar="N", help="Tokens to train on, all epochs."
        ),
        click.option(
            "--hours", multiple=True, metavar="[GPU=]H", help="Hours that the run takes; any=H for all cards."
        ),
        click.option(
            "--tokens-per-second", multiple=True, metavar="[GPU=]X", help="Measured speed, padding included."
        ),
        click.option("--on-demand", is_flag=True, help="Leave spot offers out."),
        click.option("--setup-minutes", metavar="M", help="Until a rented machine can download, as in 5-20."),
        click.option(
            "--download-mb-s", metavar="X", help="Megabytes a second that it downloads, as in 50-500."
        ),
        click.option("--interruptions-per-day", metavar="X", help="Of a spot machine, as in 0-2."),
        click.option(
            "--checkpoint-minutes", type=click.FloatRange(0), metavar="M", help="Between two checkpoints."
        ),
        click.option("--all", "show_all", is_flag=True, help="All offers, not only the cheapest."),
    )
    return _with_options(function, options)


def _with_options(function: Any, options: tuple[Any, ...]) -> Any:
    for option in reversed(options):
        function = option(function)
    return function


@click.command(
    "costs", cls=SectionedCommand, epilog="Example: finefit costs plan.yaml --country DE --currency EUR"
)
@click.argument("model", metavar="PLAN.YAML|MODEL", shell_complete=complete_model)
@gpu_option(required=False)
@_run_options
@_money_options
@online_option
@setup_options(without=("model",), shows_default=False)
@json_option
@click.pass_obj
def costs_command(
    session: Session, /, model: str, gpu: str | None, online: bool, as_json: bool, **options: Any
) -> None:
    """Say what a run costs on your own card and in every cloud.

    Ranges, each price with its date and source; what is unknown is called unknown and never counted as 0.
    """
    import datetime

    from planner.cost_options import parse_rates, read_wishes
    from planner.costs import costs
    from planner.estimate import resolve
    from planner.prices import known_prices
    from planner.render_costs import format_costs

    setup, machine = setup_and_machine(session, model, gpu, given_fields(options))
    today = datetime.date.today()
    known = known_prices(options["prices"], today)
    rates = parse_rates(known.rates, options["rates"])
    table = costs(
        setup,
        machine,
        resolve(setup, offline=not online),
        book=known.book,
        rates=rates,
        wishes=read_wishes(options, rates, machine.gpu.name),
        length=_length(session, setup, options["tokens"]),
        today=today,
    )
    for fault in known.new_faults[:MOST_FAULTS_SHOWN]:
        click.echo(f"left out: {fault}", err=True)
    if as_json:
        click.echo(format_json(table.to_json()))
        return
    click.echo(format_costs(table, terminal_width(), show_all=options["show_all"]))


def _length(session: Session, setup: TrainSetup, num_tokens: float | None) -> RunLength | None:
    """The run's steps: from --tokens, the plan's steps, or its data; None where nothing says it."""
    from planner.run_length import length_by_lengths, length_by_plan, length_by_rows, length_by_tokens

    if num_tokens is not None:
        return length_by_tokens(setup, num_tokens)
    planned = length_by_plan(setup)
    if planned is not None or setup.data is None:
        return planned
    if setup.packing:
        lengths, _ = row_lengths(session, setup.to_dict())
        if lengths is not None:
            return length_by_lengths(setup, lengths)
    from pathlib import Path

    from planner.dataset_files import count_records

    return length_by_rows(setup, count_records(Path(setup.data)))
