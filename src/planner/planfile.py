"""plan.yaml: a TrainSetup's fields as flat keys, and beside them `gpu`, `schema_version`, `predicted` and `before_retries`.

People edit these files, so every complaint names the file and the line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.errors import FinefitError, SetupError, UsageError
from planner.fields import FIELDS, SECTIONS, find_field, parse_settings
from planner.files import write_atomically
from planner.plain_yaml import load_mapping, read_text
from planner.setup import TrainSetup

if TYPE_CHECKING:
    import yaml

PLAN_SCHEMA_VERSION = 1
_SUFFIXES = (".yaml", ".yml")
_FIRST_LINE = "# finefit plan"
_RETRIES = "# What the plan said before the run ran out of memory and took smaller steps"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanFile:
    """What a plan.yaml says. `gpu` is NAME, NAME:COUNT or `local`; None where the file names none.

    `predicted` is the summary that was computed when the file was written; nothing is run from it. In a run's folder
    `before_retries` holds what fields were that the run changed when it ran out of memory.
    """

    setup: TrainSetup
    gpu: str | None = None
    predicted: Mapping[str, Any] = field(default_factory=dict)
    before_retries: Mapping[str, Any] = field(default_factory=dict)

    @property
    def planned(self) -> TrainSetup:
        """The setup before a run changed it. Raises SetupError where `before_retries` holds no fields."""
        return TrainSetup.from_dict({**self.setup.to_dict(), **self.before_retries})


def looks_like_plan(name: str) -> bool:
    """Whether a command's argument names a plan file rather than a model."""
    return name.lower().endswith(_SUFFIXES)


def read_plan(path: Path, settings: tuple[str, ...] = ()) -> PlanFile:
    """The plan in a file, with `--set key=value` settings applied on top.

    Raises UsageError or SetupError (exit 2) with file and line, FinefitError when the file can't be read.
    """
    return parse_plan(read_text(path, "plan"), str(path), settings)


def parse_plan(text: str, name: str, settings: tuple[str, ...] = ()) -> PlanFile:
    """The plan in a text; `name` is what error lines call it."""
    values, lines = load_mapping(text, name, "plan")
    version = values.pop("schema_version", PLAN_SCHEMA_VERSION)
    if version != PLAN_SCHEMA_VERSION:
        raise UsageError(
            f"{name}:{lines['schema_version']}: schema_version {version!r} is not {PLAN_SCHEMA_VERSION}, "
            "the only one that this finefit reads"
        )
    gpu, settings = _pick_gpu(values.pop("gpu", None), settings)
    tables = {key: values.pop(key, None) or {} for key in ("predicted", "before_retries")}
    wrong = [key for key, table in tables.items() if not isinstance(table, Mapping)]
    wrong += [] if isinstance(gpu, str | None) else ["gpu"]
    if wrong:
        raise UsageError(f"{name}:{lines[wrong[0]]}: {wrong[0]} is not what a plan holds there")
    changes = parse_settings(settings)
    setup = _build_setup(_checked_fields(values, lines, name), changes, lines, name)
    return PlanFile(setup=setup, gpu=gpu, **tables)


def _pick_gpu(gpu: Any, settings: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
    """`--set gpu=…` changes the plan's GPU, which is no field of the setup."""
    chosen = [s for s in settings if s.partition("=")[0].strip() == "gpu"]
    if not chosen:
        return gpu, settings
    return chosen[-1].partition("=")[2].strip(), tuple(s for s in settings if s not in chosen)


def _checked_fields(values: Mapping[str, Any], lines: Mapping[str, int], name: str) -> dict[str, Any]:
    """Each key's field, with the values that YAML reads differently from what was meant put right."""
    checked = {}
    for key, value in values.items():
        try:
            wanted = find_field(key) if key not in FIELDS else FIELDS[key]
            if wanted.name in checked:
                raise SetupError(key, "is given twice")
            # YAML 1.1 reads 2e-4 (without a dot) and quoted numbers as text; null is often written none
            is_free_text = wanted.kind in ("str", "model") and not wanted.choices
            needs_parsing = isinstance(value, str) and not is_free_text
            checked[wanted.name] = wanted.parse(value) if needs_parsing else value
        except SetupError as error:
            raise _placed(error, name, lines.get(key)) from None
    return checked


def _build_setup(
    values: dict[str, Any], changes: Mapping[str, Any], lines: Mapping[str, int], name: str
) -> TrainSetup:
    merged = {**values, **changes}
    try:
        return TrainSetup.from_dict(merged)
    except SetupError as error:
        if error.field in changes:
            raise
        raise _placed(error, name, lines.get(error.field)) from None


def _placed(error: SetupError, name: str, line: int | None) -> SetupError:
    """The same error with the file and the line in front of the field."""
    message = str(error).partition(": ")[2]
    where = name if line is None else f"{name}:{line}"
    return SetupError(f"{where}: {error.field}", message)


def write_plan(
    path: Path,
    setup: TrainSetup,
    gpu: str,
    predicted: Mapping[str, Any],
    *,
    before_retries: Mapping[str, Any] | None = None,
    force: bool = False,
) -> None:
    """Write a plan atomically; refuses to replace a file that is not a finefit plan unless `force`."""
    if path.exists() and not force and not _is_plan(path):
        raise FinefitError(f"{path} exists and is not a finefit plan; give another --out, or --force")
    text = format_plan(setup, gpu, predicted, name=str(path))
    if before_retries:
        text += f"{_RETRIES}\n{_dump({'before_retries': dict(before_retries)})}"
    write_atomically(path, text)


def format_plan(setup: TrainSetup, gpu: str, predicted: Mapping[str, Any], name: str = "plan.yaml") -> str:
    """The text of a plan; `parse_plan` reads it back to an equal setup."""
    plain = setup.to_dict()
    name = _printable(name)
    heading = _printable(f"{_FIRST_LINE}: {setup.method} of {setup.model_label} on {gpu}")
    parts = [
        heading,
        f"#   finefit bench {name}     measures a few steps and compares them with what is predicted below",
        f"#   finefit train {name}     runs it; the same command again resumes",
        "# Every key is an option of `finefit plan` (with _ for -) and may be changed here, or by --set key=value.",
        _dump({"schema_version": PLAN_SCHEMA_VERSION, "gpu": gpu}),
    ]
    for title, names in SECTIONS.items():
        parts += [f"# {title}", _dump({key: plain[key] for key in names})]
    parts += ["# What finefit expected when it wrote this file; `finefit estimate` says it anew", ""]
    return "\n".join(parts).rstrip("\n") + "\n" + _dump({"predicted": dict(predicted)})


def _printable(text: str) -> str:
    """Text that can't end a comment early: YAML knows more line ends than \\n, and forbids control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def _is_plan(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_FIRST_LINE)) == _FIRST_LINE.encode()
    except OSError:
        return False


def _dump(values: Mapping[str, Any]) -> str:
    import yaml

    class PlainDumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        # PyYAML writes line separators such as U+0085 as they are and reads them back as a blank.
        style = None if text.isprintable() else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    PlainDumper.add_representer(str, represent_text)
    return yaml.dump(
        values, Dumper=PlainDumper, sort_keys=False, allow_unicode=True, width=2**20, default_flow_style=False
    )
