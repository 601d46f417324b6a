"""The commands that answer with a table over many setups: `fits` and `needs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from planner.cli_options import (
    SectionedCommand,
    Session,
    complete,
    complete_gpus,
    given_fields,
    json_option,
    resolve_machine,
    setup_options,
)
from planner.render import format_json, terminal_width

if TYPE_CHECKING:
    from planner.specs import ModelSpec

_BY_TABLE = ("model", "method", "num_gpus", "num_nodes", "data", "from_scratch")
"""Fields that the tables vary themselves, or that don't matter to them."""
LICENSE_CHOICES = ("commercial",)


def _complete_gpu(ctx: Any, param: Any, incomplete: str) -> list[Any]:
    return complete_gpus(incomplete)


def complete_model(ctx: Any, param: Any, incomplete: str) -> list[Any]:
    """Model names for the shell."""
    from planner.resolve import model_names

    return complete(model_names(), incomplete)


def _complete_method(ctx: Any, param: Any, incomplete: str) -> list[Any]:
    from planner.methods import methods

    return complete(methods(), incomplete)


_method_option = click.option(
    "--method",
    "methods",
    multiple=True,
    shell_complete=_complete_method,
    help="Method to compare; may be repeated (default: full, lora and qlora).",
)
online_option = click.option("--online", is_flag=True, help="Look up unknown hub ids on the hub.")


@click.command("fits", cls=SectionedCommand, epilog="Example: finefit fits rtx-4090:2 --model llama-3.1-8b")
@click.argument("gpu", metavar="GPU[:COUNT]", shell_complete=_complete_gpu)
@click.option(
    "--model",
    "models",
    multiple=True,
    shell_complete=complete_model,
    help="Model to judge; may be repeated (default: well-known ones of each size).",
)
@click.option("--all", "show_all", is_flag=True, help="All models that finefit knows.")
@_method_option
@click.option(
    "--license", "license_name", type=click.Choice(LICENSE_CHOICES), help="Only models licensed for it."
)
@online_option
@setup_options(without=_BY_TABLE)
@json_option
@click.pass_obj
def fits_command(
    session: Session,
    /,
    gpu: str,
    models: tuple[str, ...],
    show_all: bool,
    methods: tuple[str, ...],
    license_name: str | None,
    online: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Say what fits on a GPU: models, methods, lengths, batches.

    GPU is a name as people write it (4090, "rtx 4090", a100-80gb-sxm), or local for this machine.
    """
    from planner.fits import LICENSES, METHODS, MODELS, fits, table_models
    from planner.render_tables import format_fits
    from planner.resolve import model_names

    fields = given_fields(options)
    machine = resolve_machine(session, gpu, fields)
    names = models or (model_names() if show_all else MODELS)
    chosen = table_models(names, fields.get("stack"), offline=not online)
    if license_name is not None:
        chosen = {name: model for name, model in chosen.items() if LICENSES[license_name](model)}
        _name_conditions(chosen)
    table = fits(machine, models=chosen, methods=methods or METHODS, fields=fields, with_times=as_json)
    click.echo(format_json(table.to_json()) if as_json else format_fits(table, terminal_width()))


def _name_conditions(models: Mapping[str, ModelSpec]) -> None:
    conditional = [model.name for model in models.values() if model.commercial != "yes"]
    if conditional:
        names = ", ".join(conditional)
        click.echo(f"commercial use under conditions (`finefit show MODEL`): {names}", err=True)


@click.command("needs", cls=SectionedCommand, epilog="Example: finefit needs llama-3.1-8b --method lora")
@click.argument("model", shell_complete=complete_model)
@_method_option
@click.option("--all", "show_all", is_flag=True, help="All machines that can do it, not only the cheapest.")
@click.option(
    "--currency",
    type=click.Choice(("USD", "CNY"), case_sensitive=False),
    default="USD",
    help="Of the prices.",
)
@online_option
@setup_options(without=_BY_TABLE)
@json_option
def needs_command(
    model: str,
    methods: tuple[str, ...],
    show_all: bool,
    currency: str,
    online: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Say which GPUs can train a model, from the cheapest up.

    For each method and card, the fewest of 1, 2, 4 and 8 cards in one machine that fit it.
    """
    from planner.fits import METHODS, table_models
    from planner.needs import needs
    from planner.render_tables import format_needs

    fields = given_fields(options)
    spec = table_models([model], fields.get("stack"), offline=not online)[model]
    table = needs(model, spec, methods=methods or METHODS, fields=fields, currency=currency)
    text = (
        format_json(table.to_json()) if as_json else format_needs(table, terminal_width(), show_all=show_all)
    )
    click.echo(text)
