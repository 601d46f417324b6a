"""The planner's commands: each parses, calls and prints."""

from __future__ import annotations

from typing import Any

import click

from planner.cli_accuracy import accuracy_command
from planner.cli_claims import claims_command
from planner.cli_costs import costs_command
from planner.cli_options import SectionedCommand, complete, json_option
from planner.cli_plan import estimate_command, export_command
from planner.cli_prices import prices_command
from planner.cli_search import plan_command
from planner.cli_tables import fits_command, needs_command
from planner.facts import KIND_NAMES, Fact, Record, find_anything, find_kind
from planner.render import format_facts, format_json, format_table, paint, terminal_width
from planner.results import SCHEMA_VERSION


@click.command("list", cls=SectionedCommand, epilog="Example: finefit list gpus")
@click.argument("kind", metavar="|".join(KIND_NAMES), type=click.Choice(KIND_NAMES))
@json_option
def list_command(kind: str, as_json: bool) -> None:
    """List gpus, models, methods, optimizers or formats."""
    found = find_kind(kind)
    records = found.records()
    if as_json:
        click.echo(format_json({"schema_version": SCHEMA_VERSION, kind: records}))
        return
    click.echo(format_table(found.columns(records), terminal_width()))


def _complete_anything(ctx: Any, param: Any, incomplete: str) -> list[Any]:
    names = [str(record["name"]) for kind in KIND_NAMES for record in find_kind(kind).records()]
    return complete((name.replace(" ", "-") for name in names), incomplete)


@click.command("show", cls=SectionedCommand, epilog="Example: finefit show rtx-4090")
@click.argument("name", shell_complete=_complete_anything)
@json_option
def show_command(name: str, as_json: bool) -> None:
    """Show a GPU, model, method, optimizer or format with sources."""
    found = find_anything(name)
    if as_json:
        click.echo(format_json({"schema_version": SCHEMA_VERSION, **found}))
        return
    click.echo("\n\n".join(_format_record(kind, record) for kind, record in found.items()))


def _format_record(kind: str, record: Record) -> str:
    """The facts, each with the number of its source, and the sources below."""
    facts = [fact for fact in find_kind(kind).describe(record) if fact.value]
    sources = list(dict.fromkeys(fact.source for fact in facts if fact.source))
    width = terminal_width()
    lines = [format_facts([(fact.name, _with_mark(fact, sources)) for fact in facts], width)]
    if sources:
        lines += ["", paint("Sources", "strong")]
        lines.append(format_facts([(f"[{i}]", source) for i, source in enumerate(sources, 1)], width))
    return "\n".join(lines)


def _with_mark(fact: Fact, sources: list[str]) -> str:
    return f"{fact.value}  [{sources.index(fact.source) + 1}]" if fact.source else fact.value


@click.command("completion", cls=SectionedCommand, epilog='Example: eval "$(finefit completion bash)"')
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print the shell code for completion."""
    from click.shell_completion import get_completion_class

    completion_class = get_completion_class(shell)
    assert completion_class is not None
    root = ctx.find_root()
    click.echo(completion_class(root.command, {}, "finefit", "_FINEFIT_COMPLETE").source())


COMMANDS: tuple[click.Command, ...] = (
    fits_command,
    needs_command,
    estimate_command,
    plan_command,
    costs_command,
    claims_command,
    prices_command,
    export_command,
    list_command,
    show_command,
    accuracy_command,
    completion_command,
)
