"""`finefit accuracy`: predicted beside published memory, group by group."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from planner.cli_options import SectionedCommand, json_option

if TYPE_CHECKING:
    from planner.accuracy import Compared, GroupError, Outcomes

REPORT_HEAD = """# Predicted against published memory (closed form)

Peak allocated memory of published runs, predicted from their setups alone. `error` is of the setup as its source
labels it; `corrected` replaces labels that the source's own code contradicts (evidence/README.md). Groups are
never averaged together: most rows come from one project.

Made by `finefit accuracy {path} --markdown`.
"""


@click.command(
    "accuracy", cls=SectionedCommand, epilog="Example: finefit accuracy evidence/memory-runs.jsonl --worst 10"
)
@click.argument("cases", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--worst", type=click.IntRange(min=0), default=0, help="Also show the N worst cases.")
@click.option("--markdown", is_flag=True, help="Print a report in Markdown.")
@json_option
def accuracy_command(cases: Path, worst: int, markdown: bool, as_json: bool) -> None:
    """Predict every case of a file and show the errors by source, method, sharding and variant."""
    from planner.accuracy import compare, group_errors, outcomes, to_json
    from planner.cases import read_case
    from planner.render import format_json, terminal_width

    lines = cases.read_bytes().splitlines()
    compared = compare(read_case(line, number) for number, line in enumerate(lines, 1) if line.strip())
    if as_json:
        click.echo(format_json(to_json(compared)))
        return
    width = None if markdown else terminal_width()
    parts = [REPORT_HEAD.format(path=cases)] if markdown else []
    parts.append(_group_table(group_errors(compared), width, markdown))
    parts.append(_outcome_lines(outcomes(compared)))
    parts.extend(_problems(compared))
    if worst:
        parts.append(_worst_table(compared, worst, width, markdown))
    click.echo("\n".join(parts))


def _table(header: list[str], rows: Iterable[Iterable[object]], width: int | None, markdown: bool) -> str:
    from planner.render import Column, format_table

    cells = [[str(cell) for cell in row] for row in rows]
    if markdown:
        from tabulate import tabulate

        return tabulate(cells, header, tablefmt="github", disable_numparse=True) + "\n"
    columns = [Column(title=name, cells=tuple(row[i] for row in cells)) for i, name in enumerate(header)]
    return format_table(columns, width)


def _group_table(groups: list[GroupError], width: int | None, markdown: bool) -> str:
    header = ["source", "method", "model", "kernels", "GPUs", "variant", "lengths", "n"]
    header += ["mean error", "median", "worst", "bias", "corrected mean", "corrected worst"]
    rows = (
        [g.source, g.method, g.shape, g.kernels, g.sharding, g.variant, g.lengths, e.num_cases]
        + [f"{share:.2%}" for share in (e.mean, e.median, e.worst)]
        + [f"{e.bias:+.2%}", f"{e.corrected_mean:.2%}", f"{e.corrected_worst:.2%}"]
        for e in groups
        for g in (e.group,)
    )
    return _table(header, rows, width, markdown)


def _outcome_lines(found: Outcomes) -> str:
    total = found.num_fitted + found.num_oom
    return (
        f"Verdicts on {found.num_fitted} runs that fitted and {found.num_oom} that ran out of memory: "
        f"{found.false_fits} of the latter called fits, {found.false_refusals} of the former called does-not-fit, "
        f"{found.tight} of {total} called tight.\n"
    )


def _problems(compared: list[Compared]) -> list[str]:
    return [f"not predicted: {case.id}: {case.problem}" for case in compared if case.problem]


def _worst_table(compared: list[Compared], worst: int, width: int | None, markdown: bool) -> str:
    known = [case for case in compared if case.error is not None]
    ranked = sorted(known, key=lambda case: -abs(case.error or 0.0))[:worst]
    rows = (
        [
            c.id,
            c.group.method,
            c.group.kernels,
            c.group.sharding,
            f"{c.measured_gib:.2f}",
            f"{c.predicted_gib:.2f}",
            f"{c.error:+.2%}",
            f"{c.corrected_error:+.2%}",
        ]
        for c in ranked
    )
    header = ["case", "method", "kernels", "GPUs", "measured GiB", "predicted GiB", "error", "corrected"]
    return _table(header, rows, width, markdown)
