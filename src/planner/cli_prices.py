"""The command about price lists: `prices`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from planner.cli_options import SectionedCommand, json_option
from planner.errors import FinefitError, UnknownNameError, UsageError
from planner.render import Column, format_json, format_table, terminal_width
from planner.results import SCHEMA_VERSION

if TYPE_CHECKING:
    from planner.price_refresh import Refreshed
    from planner.price_sources import Source
    from planner.prices import Origin

ACTIONS = ("show", "refresh")


@click.command(
    "prices", cls=SectionedCommand, epilog="Example: finefit prices refresh --source gpuhunt --provider aws"
)
@click.argument("action", type=click.Choice(ACTIONS))
@click.option("--source", "source_name", metavar="NAME", help="gpuhunt or skypilot (default: both).")
@click.option(
    "--from", "address", metavar="URL|FOLDER", help="A mirror of the source: http(s)://, file:// or a folder."
)
@click.option(
    "--provider", "providers", multiple=True, metavar="NAME", help="As the source calls it; may be repeated."
)
@json_option
def prices_command(
    action: str, source_name: str | None, address: str | None, providers: tuple[str, ...], as_json: bool
) -> int:
    """Show how old the prices are, or refresh them from public catalogues.

    A refresh that fails, as a whole or for one provider, leaves the old prices where they are. Your own offers, in any
    currency, go into prices.yaml in finefit's data folder, or into a file for `finefit costs --prices`.
    """
    if action == "show":
        if source_name or address or providers:
            raise UsageError("prices show takes no --source, --from or --provider")
        _show(as_json)
        return 0
    return _refresh(_sources(source_name, address), address, providers, as_json)


def _sources(name: str | None, address: str | None) -> list[Source]:
    from planner.price_sources import SOURCES

    if name is None:
        if address is not None:
            raise UsageError(
                "--from needs --source gpuhunt or --source skypilot: they lay out their files differently"
            )
        return list(SOURCES)
    found = [source for source in SOURCES if source.name == name.strip().lower()]
    if not found:
        raise UnknownNameError("price source", name, (s.name for s in SOURCES), "finefit prices --help")
    return found


def _refresh(sources: list[Source], address: str | None, providers: tuple[str, ...], as_json: bool) -> int:
    """Exit code 1 where no source could be read."""
    import datetime

    from planner.price_refresh import refresh

    done: list[Refreshed] = []
    for source in sources:
        try:
            done.append(refresh(source, address or source.url, datetime.date.today(), providers=providers))
        except UsageError:
            raise
        except FinefitError as error:
            if len(sources) == 1:
                raise
            click.echo(f"finefit: {error}", err=True)
    if as_json:
        from dataclasses import asdict

        found = [{**asdict(item), "path": str(item.path)} for item in done]
        click.echo(format_json({"schema_version": SCHEMA_VERSION, "refreshed": found}))
    for item in done:
        _report(item, as_json)
    return 0 if done else 1


def _report(item: Refreshed, as_json: bool) -> None:
    counts = ", ".join(f"{provider} {count}" for provider, count in item.num_offers.items())
    click.echo(f"{item.source}: {counts} offers -> {item.path}", err=as_json)
    for provider, problem in item.problems.items():
        click.echo(f"{item.source}: {provider} stays as it was: {problem}", err=True)
    if item.left_out:
        click.echo(f"{item.source}: {item.num_left_out} rows left out, as {item.left_out[0]}", err=True)
    if item.kept:
        click.echo(f"{item.source}: {item.kept}", err=True)


def _show(as_json: bool) -> None:
    import datetime
    from dataclasses import asdict

    from planner.prices import known_prices

    known = known_prices((), datetime.date.today())
    if as_json:
        origins = [asdict(origin) for origin in known.origins]
        answer: dict[str, Any] = {"origins": origins, "left_out": list(known.book.faults)}
        answer["exchange_rates"] = {"as_of": known.rates.as_of, "source": known.rates.source}
        click.echo(format_json({"schema_version": SCHEMA_VERSION, **answer}))
        return
    click.echo(format_table(_columns(known.origins), terminal_width()))
    for fault in known.book.faults:
        click.echo(f"left out: {fault}", err=True)


def _columns(origins: tuple[Origin, ...]) -> list[Column]:
    def column(title: str, cells: list[str], *, number: bool = False, drop: int = 0) -> Column:
        return Column(title=title, cells=tuple(cells), is_number=number, drop=drop)

    return [
        column("prices from", [o.name for o in origins]),
        column("offers", [str(o.num_offers) for o in origins], number=True),
        column("newest", [o.newest or "-" for o in origins]),
        column(
            "days old",
            ["-" if o.newest_age_days is None else str(o.newest_age_days) for o in origins],
            number=True,
        ),
        column("oldest", [o.oldest or "-" for o in origins], drop=1),
        column("undated", [str(o.num_undated) for o in origins], number=True),
    ]
