"""`finefit claims`: what the guides say that finefit grew out of, against its own numbers."""

from __future__ import annotations

import click

from planner.cli_options import SectionedCommand, json_option
from planner.errors import UnknownNameError
from planner.render import format_json, terminal_width


@click.command("claims", cls=SectionedCommand, epilog="Example: finefit claims M6")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option(
    "--lang",
    type=click.Choice(["en", "zh"]),
    default="en",
    show_default=True,
    help="The words around the quotes.",
)
@click.option("--markdown", is_flag=True, help="Print a report in Markdown.")
@json_option
def claims_command(ids: tuple[str, ...], lang: str, markdown: bool, as_json: bool) -> None:
    """Judge the claims of four guides to training one's own model.

    Each verdict follows from the memory, time and money of the configurations that a claim must mean. Name claims to
    see their figures.
    """
    from planner.claim_rules import judge_claims
    from planner.claims import read_claims
    from planner.render_claims import format_claims, format_claims_markdown

    known = [claim.id for claim in read_claims()]
    wanted = [name.upper() for name in ids]
    for name in wanted:
        if name not in known:
            raise UnknownNameError("claim", name, known, "finefit claims")
    judgement = judge_claims(wanted)
    if as_json:
        click.echo(format_json(judgement.to_json()))
    elif markdown:
        click.echo(format_claims_markdown(judgement, lang))
    else:
        click.echo(format_claims(judgement, lang, terminal_width()))
