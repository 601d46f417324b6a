"""`finefit data`: what a data set holds, and new files from it. Each command parses, calls and prints."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.extras import require_train_extra
from planner.cli_options import FieldParam, SectionedCommand, complete, json_option
from planner.errors import GateError, UsageError
from planner.fields import FIELDS
from planner.render import format_json, terminal_width
from planner.setup import TrainSetup

if TYPE_CHECKING:
    from bench.data_edit import Edited

Progress = Callable[[str, int, int], None]
_BAR_DELAY_S = 2.0
"""Shorter work shows no bar."""

_file_argument = click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
_force_option = click.option("--force", is_flag=True, help="Replace what is there.")


def _out_option(text: str) -> Callable[[Any], Any]:
    return click.option("--out", required=True, type=click.Path(path_type=Path), help=text)


def _field_option(name: str, *words: str) -> Callable[[Any], Any]:
    """An option with the meaning of a TrainSetup field."""
    field = FIELDS[name]
    text = f"{field.help[0].upper()}{field.help[1:]}."
    return click.option(field.option, *words, name, type=FieldParam(field), help=text)


@contextmanager
def _bar() -> Iterator[Progress]:
    """A progress bar on a terminal's stderr for what takes longer than two seconds."""
    from tqdm import tqdm

    with tqdm(leave=False, disable=None, file=sys.stderr, unit=" rows", delay=_BAR_DELAY_S) as bar:

        def show(what: str, done: int, about: int) -> None:
            bar.total = about
            bar.set_description_str(what, refresh=False)
            bar.update(done - bar.n)

        yield show


@click.group("data", epilog="Example: finefit data inspect rows.jsonl --model smollm2-135m-instruct")
def data_command() -> None:
    """Inspect, clean, convert and split training data."""


@data_command.command(
    "inspect",
    cls=SectionedCommand,
    epilog="Example: finefit data inspect rows.jsonl --model smollm2-135m-instruct --seq-len 1024",
)
@_file_argument
@_field_option("model")
@_field_option("tokenizer")
@_field_option("seq_len")
@_field_option("objective")
@click.option(
    "--eval",
    "eval_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Also look for its rows here.",
)
@click.option(
    "--sample",
    "sample_rows",
    type=click.IntRange(min=0),
    metavar="ROWS",
    help="Rows whose tokens and language are looked at; 0 is all (default: 50,000, drawn evenly).",
)
@click.option(
    "--show-mask",
    "num_shown",
    type=click.IntRange(min=1),
    metavar="ROWS",
    help="Print the first rows with the trained tokens coloured.",
)
@click.option("--redact", "hide_personal", is_flag=True, help="Hide personal strings in what is shown.")
@json_option
def inspect_command(
    file: Path,
    eval_file: Path | None,
    sample_rows: int | None,
    num_shown: int | None,
    hide_personal: bool,
    as_json: bool,
    **fields: Any,
) -> int:
    """Check a file before a minute is spent on it.

    Format, rows, lengths, what is cut off, duplicates, near-duplicates, overlap with an evaluation file, languages,
    personal strings, encoding faults, and everything that would stop `finefit train`. Nothing is downloaded: without
    a tokenizer on this machine lengths are in characters. Rows with a chosen and a rejected answer are looked at as
    --objective dpo trains them.

    Exit code 3: a training run would stop.
    """
    require_train_extra("data")
    given = {name: value for name, value in fields.items() if value is not None}
    setup = TrainSetup(**given) if given.get("model") or given.get("tokenizer") else None
    if num_shown and setup is None:
        raise UsageError("--show-mask shows tokens: name the tokenizer's model with --model")
    if num_shown and as_json:
        raise UsageError("--show-mask prints rows for people; leave --json out")
    with _bar() as progress, redirect_stdout(sys.stderr):
        from bench.data_inspect import SAMPLE_ROWS, inspect
        from bench.data_text import format_inspection

        if num_shown and setup is not None:
            shown = _masks(file, setup, num_shown, hide_personal)
        sample = SAMPLE_ROWS if sample_rows is None else sample_rows or None
        found = inspect(file, setup, eval_path=eval_file, sample_rows=sample, progress=progress)
    if num_shown:
        click.echo("\n\n".join(shown) + "\n")
    click.echo(format_json(found.to_json()) if as_json else format_inspection(found, terminal_width()))
    return GateError.exit_code if found.findings else 0


def _masks(file: Path, setup: TrainSetup, num_rows: int, hide_personal: bool) -> list[str]:
    """The first rows as trained. Raises FinefitError where there is no tokenizer."""
    from bench.data_masks import first_masks

    return first_masks(file, setup, num_rows=num_rows, hide_personal=hide_personal)


@data_command.command(
    "clean", cls=SectionedCommand, epilog="Example: finefit data clean rows.jsonl --out clean.jsonl"
)
@_file_argument
@_out_option("JSON Lines file to write.")
@click.option("--near", is_flag=True, help="Leave near-duplicates out too.")
@click.option(
    "--without",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Leave out what this evaluation file holds.",
)
@click.option(
    "--redact",
    "hide_personal",
    is_flag=True,
    help="Replace e-mail addresses, phone and identity numbers, keys.",
)
@_force_option
@json_option
def clean_command(
    file: Path, out: Path, near: bool, without: Path | None, hide_personal: bool, force: bool, as_json: bool
) -> None:
    """Write the rows that can be trained on, each once."""
    _check_free(force, out)
    from bench.data_edit import clean

    with _bar() as progress:
        done = clean(file, out, near=near, without=without, hide_personal=hide_personal, progress=progress)
    _print(done, as_json)


def _complete_formats(ctx: Any, param: Any, incomplete: str) -> list[Any]:
    from planner.dataset_formats import FORMATS

    return complete((f.name for f in FORMATS), incomplete)


@data_command.command(
    "convert",
    cls=SectionedCommand,
    epilog="Example: finefit data convert rows.csv --to messages --out rows.jsonl",
)
@_file_argument
@_out_option("File to write: .jsonl, .json, .csv or .tsv.")
@click.option(
    "--to",
    required=True,
    metavar="FORMAT",
    shell_complete=_complete_formats,
    help="messages, sharegpt, alpaca, dolly, prompt-completion, prompt-response, question-answer or text; "
    "of pairs of answers preference, prompt-preference, alpaca-preference, sharegpt-preference and others.",
)
@_force_option
@json_option
def convert_command(file: Path, out: Path, to: str, force: bool, as_json: bool) -> None:
    """Write the rows in another format. What a format can't hold is an error."""
    _check_free(force, out)
    from bench.data_edit import convert

    with _bar() as progress:
        done = convert(file, out, to=to, progress=progress)
    _print(done, as_json)


@data_command.command(
    "split",
    cls=SectionedCommand,
    epilog="Example: finefit data split rows.jsonl --out parts --eval-fraction 0.1",
)
@_file_argument
@_out_option("Folder for train.jsonl and eval.jsonl.")
@_field_option("eval_fraction")
@_field_option("seed")
@_force_option
@json_option
def split_command(
    file: Path, out: Path, eval_fraction: float | None, seed: int | None, force: bool, as_json: bool
) -> None:
    """Write a training and an evaluation file; rows that repeat each other stay together."""
    setup = TrainSetup(eval_fraction=0.1 if eval_fraction is None else eval_fraction, seed=seed or 0)
    _check_free(force, out / "train.jsonl", out / "eval.jsonl")
    from bench.data_edit import split

    with _bar() as progress:
        done = split(file, out, eval_fraction=setup.eval_fraction, seed=setup.seed, progress=progress)
    _print(done, as_json)


def _check_free(force: bool, *paths: Path) -> None:
    require_train_extra("data")
    taken = next((path for path in paths if path.exists()), None)
    if taken is not None and not force:
        raise UsageError(f"{taken} exists; choose another --out, or replace it with --force")


def _print(done: Edited, as_json: bool) -> None:
    from bench.data_text import format_edited

    click.echo(format_json(done.to_json()) if as_json else format_edited(done, terminal_width()))


COMMANDS: tuple[click.Command, ...] = (data_command,)
