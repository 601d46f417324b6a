"""The `finefit` command: planner's commands and bench's in one group, and the one place where errors end.

Light at import: whatever needs a deep-learning stack is imported inside the commands.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

import click

from bench.cli_calibrate import COMMANDS as CALIBRATE_COMMANDS
from bench.cli_commands import COMMANDS as RUN_COMMANDS
from bench.cli_compare import COMMANDS as COMPARE_COMMANDS
from bench.cli_data import COMMANDS as DATA_COMMANDS
from bench.cli_machine import COMMANDS as MACHINE_COMMANDS
from bench.cli_trace import COMMANDS as TRACE_COMMANDS
from bench.cli_trace import trace_with_bar
from bench.cli_train import COMMANDS as TRAIN_COMMANDS
from bench.extras import missing_extra
from bench.waiting import WAITING
from planner import __version__
from planner.cli import COMMANDS as PLANNER_COMMANDS
from planner.cli_options import Session
from planner.errors import FinefitError
from planner.render import printable

if TYPE_CHECKING:
    from planner.lengths import DataLengths
    from planner.results import Estimate
    from planner.setup import TrainSetup
    from planner.specs import Machine

INTERRUPTED_EXIT = 130
"""Stopped from the keyboard (128 + SIGINT), the shells' convention."""
CLOSED_PIPE_EXIT = 141
"""The reader of the output went away (128 + SIGPIPE), as after `| head`."""


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        # click would turn a closed pipe into exit code 1, the code of an error
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            _forget_stdout()
            return CLOSED_PIPE_EXIT
        return result


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    invoke_without_command=True,
    epilog="Example: finefit fits rtx-4090",
)
@click.version_option(__version__, message="finefit %(version)s")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """What can I fine-tune on the hardware I have, what will it cost, and then do it."""
    ctx.ensure_object(Session).debug |= debug
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for _command in (
    *PLANNER_COMMANDS,
    *RUN_COMMANDS,
    *TRAIN_COMMANDS,
    *COMPARE_COMMANDS,
    *CALIBRATE_COMMANDS,
    *DATA_COMMANDS,
    *TRACE_COMMANDS,
    *MACHINE_COMMANDS,
):
    cli.add_command(_command)


def main() -> int:
    """The console script: runs the command line and returns its exit code."""
    for name, value in WAITING.items():
        os.environ.setdefault(name, value)
    return run(sys.argv[1:])


def run(arguments: Sequence[str], session: Session | None = None) -> int:
    """Run one command line; errors become one line on stderr and the exit code of the contract.

    `session` replaces what bench lends to planner's commands.
    """
    session = session or _session()
    for stream in (sys.stdout, sys.stderr):
        # a console that can't show a bar or a Chinese name shows a question mark instead of failing
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    try:
        result = cli.main(list(arguments), prog_name="finefit", standalone_mode=False, obj=session)
    except Exception as error:
        return _report(error, session, arguments)
    return result if isinstance(result, int) else 0


def _report(error: Exception, session: Session, arguments: Sequence[str]) -> int:
    """One line on stderr for any error (after the traceback, under --debug); returns the exit code."""
    if session.debug and not isinstance(error, click.exceptions.Abort | click.ClickException):
        import traceback

        traceback.print_exception(error)
    message, exit_code = _describe(error, arguments)
    print(f"finefit: {printable(message)}", file=sys.stderr)
    return exit_code


def _describe(error: Exception, arguments: Sequence[str]) -> tuple[str, int]:
    if isinstance(error, FinefitError):
        return str(error), error.exit_code
    if isinstance(error, click.exceptions.Abort):
        return "interrupted", INTERRUPTED_EXIT
    if isinstance(error, click.ClickException):
        return _describe_usage(error), error.exit_code
    if isinstance(error, ModuleNotFoundError):
        missing = missing_extra(next((word for word in arguments if word in cli.commands), ""), error)
        if missing is not None:
            return str(missing), missing.exit_code
    detail = f"{type(error).__name__}: {error}"
    return f"unexpected error ({detail:.200}); the same command with --debug shows where", 1


def _describe_usage(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "finefit"
    return f"{error.format_message().rstrip('.')} (see `{command} --help`)"


def _forget_stdout() -> None:
    """Send what is still buffered nowhere, so that the interpreter's last flush doesn't complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _session() -> Session:
    """What bench lends to planner's commands; nothing heavy is imported before it is used."""
    return Session(local_machine=_local_machine, token_lengths=_token_lengths, trace=_trace)


def _local_machine() -> Machine:
    from bench.machine import local_machine

    return local_machine()


def _token_lengths(wishes: Mapping[str, Any]) -> tuple[DataLengths | None, str | None]:
    from bench.lengths import row_lengths

    with redirect_stdout(sys.stderr):
        return row_lengths(wishes)


def _trace(setup: TrainSetup, machine: Machine, **how: Any) -> Estimate:
    return trace_with_bar(setup, machine, **how).estimate
