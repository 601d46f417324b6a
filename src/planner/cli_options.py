"""What all commands share: options made from TrainSetup's fields, the machine from `--gpu`, help by section."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from planner.errors import FinefitError, UsageError
from planner.fields import FIELDS, SECTIONS, FieldType

if TYPE_CHECKING:
    from planner.lengths import DataLengths
    from planner.results import Estimate
    from planner.specs import Machine

F = TypeVar("F", bound=Callable[..., Any])

LOCAL = "local"


@dataclass(kw_only=True, slots=True)
class Session:
    """What the commands of the planner borrow from outside it; click hands it to them as the context's object.

    The planner knows no driver, tokenizer or tensor library: whoever builds the command line fills these in.
    None means that this installation can't do it. `token_lengths` takes TrainSetup fields, among them `data`, and
    gives the rows' lengths or says why they are unknown. `trace` takes a setup, a machine and, by keyword, a `label`
    for its progress bar and `trust_remote_code`.
    """

    debug: bool = False
    local_machine: Callable[[], Machine] | None = None
    token_lengths: Callable[[Mapping[str, Any]], tuple[DataLengths | None, str | None]] | None = None
    trace: Callable[..., Estimate] | None = None


class _Nothing:
    """Stands for a `none` that was typed, since click's None means that an option wasn't given."""


NOTHING = _Nothing()


class FieldParam(click.ParamType[Any]):
    """A TrainSetup field as an option's value."""

    def __init__(self, field: FieldType) -> None:
        self.field = field
        self.name = {"int": "n", "float": "x", "list": "names"}.get(field.kind, "text")

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """The choices where they are few, else the kind of value."""
        if self.field.choices:
            return "|".join(self.field.choices)
        return self.name.upper()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The field's value; SetupError names what is wrong."""
        if not isinstance(value, str):
            return value
        parsed = self.field.parse(value)
        return NOTHING if parsed is None else parsed

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        """The values that begin with what was typed."""
        names = self.field.choices or _registry_names(self.field.name)
        return complete(names, incomplete)


def complete(names: Iterable[str], incomplete: str) -> list[click.shell_completion.CompletionItem]:
    """The names that begin with what was typed, in any case."""
    from click.shell_completion import CompletionItem

    wanted = incomplete.lower()
    return [CompletionItem(name) for name in names if name.lower().startswith(wanted)]


def _registry_names(field_name: str) -> tuple[str, ...]:
    if field_name == "method":
        from planner.methods import methods

        return tuple(methods())
    if field_name == "optimizer":
        from planner.optimizers import OPTIMIZERS

        return tuple(OPTIMIZERS)
    return ()


class SectionedCommand(click.Command):
    """A command whose help lists its own options first, then TrainSetup's by section; each takes `--debug`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option())

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections."""
        records: dict[str, list[tuple[str, str]]] = {title: [] for title in ("Options", *SECTIONS)}
        titles = {name: title for title, names in SECTIONS.items() for name in names}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                is_field = isinstance(param.type, FieldParam) or param.name in titles
                records[titles[str(param.name)] if is_field else "Options"].append(record)
        for title, lines in records.items():
            if lines:
                with formatter.section(title):
                    formatter.write_dl(lines)


def _debug_option() -> click.Option:
    return click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_set_debug,
        help="Show tracebacks.",
    )


def _set_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(Session).debug = True


def setup_options(*, without: Iterable[str] = (), shows_default: bool = True) -> Callable[[F], F]:
    """A decorator that adds one option per TrainSetup field; what wasn't given arrives as None."""
    left_out = set(without)

    def add(function: F) -> F:
        for field in reversed(list(FIELDS.values())):
            if field.name not in left_out:
                function = _field_option(field, shows_default)(function)
        return function

    return add


def _field_option(field: FieldType, shows_default: bool) -> Callable[[F], F]:
    default = _describe_default(field) if shows_default else ""
    text = f"{field.help[0].upper()}{field.help[1:]}{default}."
    if field.kind == "bool":
        declaration = f"{field.option}/--no-{field.option.removeprefix('--')}"
        return click.option(declaration, field.name, default=None, help=text)
    return click.option(field.option, field.name, type=FieldParam(field), default=None, help=text)


def _describe_default(field: FieldType) -> str:
    if "(default" in field.help or field.default == "":
        return ""
    shown = field.default
    if isinstance(shown, bool):
        shown = "on" if shown else "off"
    return " (default: none)" if shown is None else f" (default: {shown})"


def given_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """The TrainSetup fields that were given among a command's options."""
    return {
        name: None if value is NOTHING else value
        for name, value in options.items()
        if name in FIELDS and value is not None
    }


def resolve_machine(session: Session, gpu: str, fields: dict[str, Any]) -> Machine:
    """The machine that `--gpu NAME[:N]` (or `local`) means; puts its count into `fields["num_gpus"]`.

    Raises UsageError when a count and `--num-gpus` differ, UnknownNameError for an unknown card.
    """
    from dataclasses import replace

    name, colon, count = gpu.partition(":")
    wanted = fields.get("num_gpus")
    if colon and wanted is not None and count.strip() != str(wanted):
        raise UsageError(f"--gpu {gpu} says {count} GPUs and --num-gpus {wanted}; give one of them")
    is_local = name.strip().lower() == LOCAL
    machine = _local_machine(session, gpu, wanted) if is_local else _catalog_machine(gpu)
    if wanted is not None:
        machine = replace(machine, num_gpus=wanted)
    fields["num_gpus"] = machine.num_gpus
    return machine


def _catalog_machine(gpu: str) -> Machine:
    from planner.catalog import parse_gpu
    from planner.specs import Machine

    profile, count = parse_gpu(gpu)
    return Machine(gpu=profile, num_gpus=count)


def _local_machine(session: Session, gpu: str, wanted: int | None) -> Machine:
    """This machine with all its GPUs, or with as many as `local:N` or `--num-gpus N` asks for."""
    from dataclasses import replace

    if session.local_machine is None:
        raise FinefitError(
            "reading this machine's hardware needs the training extra: pip install 'finefit[train]'; "
            "or name the GPU (`finefit list gpus`)"
        )
    machine = session.local_machine()
    count = gpu.partition(":")[2] or str(wanted or machine.num_gpus)
    if not count.isdecimal() or not 1 <= int(count) <= machine.num_gpus:
        raise UsageError(
            f"--gpu {gpu}: this machine has {machine.num_gpus} x {machine.gpu.name}, not {count}"
        )
    return replace(machine, num_gpus=int(count))


def json_option(function: F) -> F:
    """`--json`: the answer as JSON on stdout, everything else on stderr."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON (schema_version 1).")(function)


def trust_option(function: F) -> F:
    """`--trust-remote-code`; a flag of commands alone, never of a plan."""
    return click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Run the Python code that the model brings along, where transformers has none for it. Read it first.",
    )(function)


def gpu_option(*, required: bool) -> Callable[[F], F]:
    """`--gpu NAME[:N]`."""
    return click.option(
        "--gpu",
        required=required,
        metavar="GPU[:N]",
        shell_complete=lambda ctx, param, incomplete: complete_gpus(incomplete),
        help="GPU and how many, as in rtx-4090:2; local is this machine.",
    )


def complete_gpus(incomplete: str) -> list[click.shell_completion.CompletionItem]:
    """GPU names for the shell, which splits at blanks: `rtx-4090` for RTX 4090."""
    from planner.catalog import gpus

    return complete((LOCAL, *(name.lower().replace(" ", "-") for name in gpus())), incomplete)
