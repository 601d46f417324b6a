"""plan.yaml: a TrainSetup's fields as flat keys, and beside them `gpu`, `schema_version` and `predicted`.

People edit these files, so every complaint names the file and the line. Anchors and aliases are refused:
a plan needs none, and a short file of nested aliases can unfold to gigabytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.errors import FinefitError, SetupError, UsageError
from planner.fields import FIELDS, SECTIONS, find_field, parse_settings
from planner.files import write_atomically
from planner.setup import TrainSetup

if TYPE_CHECKING:
    import yaml

PLAN_SCHEMA_VERSION = 1
MAX_PLAN_BYTES = 2**20
_MAX_DEPTH = 20
_RESERVED = ("schema_version", "gpu", "predicted")
_SUFFIXES = (".yaml", ".yml")
_FIRST_LINE = "# finefit plan"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanFile:
    """What a plan.yaml says. `gpu` is NAME, NAME:COUNT or `local`; None where the file names none.

    `predicted` is the summary that was computed when the file was written; nothing is run from it.
    """

    setup: TrainSetup
    gpu: str | None = None
    predicted: Mapping[str, Any] = field(default_factory=dict)


def looks_like_plan(name: str) -> bool:
    """Whether a command's argument names a plan file rather than a model."""
    return name.lower().endswith(_SUFFIXES)


def read_plan(path: Path, settings: tuple[str, ...] = ()) -> PlanFile:
    """The plan in a file, with `--set key=value` settings applied on top.

    Raises UsageError or SetupError (exit 2) with file and line, FinefitError when the file can't be read.
    """
    return parse_plan(_read_text(path), str(path), settings)


def parse_plan(text: str, name: str, settings: tuple[str, ...] = ()) -> PlanFile:
    """The plan in a text; `name` is what error lines call it."""
    values, lines = _load_mapping(text, name)
    version = values.pop("schema_version", PLAN_SCHEMA_VERSION)
    if version != PLAN_SCHEMA_VERSION:
        raise UsageError(
            f"{name}:{lines['schema_version']}: schema_version {version!r} is not {PLAN_SCHEMA_VERSION}, "
            "the only one that this finefit reads"
        )
    gpu, settings = _pick_gpu(values.pop("gpu", None), settings)
    predicted = values.pop("predicted", None) or {}
    if not (gpu is None or isinstance(gpu, str)) or not isinstance(predicted, Mapping):
        key = "predicted" if isinstance(gpu, str | None) else "gpu"
        raise UsageError(f"{name}:{lines[key]}: {key} is not what a plan holds there")
    changes = parse_settings(settings)
    setup = _build_setup(_checked_fields(values, lines, name), changes, lines, name)
    return PlanFile(setup=setup, gpu=gpu, predicted=predicted)


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
    path: Path, setup: TrainSetup, gpu: str, predicted: Mapping[str, Any], *, force: bool = False
) -> None:
    """Write a plan atomically; refuses to replace a file that is not a finefit plan unless `force`."""
    if path.exists() and not force and not _is_plan(path):
        raise FinefitError(f"{path} exists and is not a finefit plan; give another --out, or --force")
    write_atomically(path, format_plan(setup, gpu, predicted, name=str(path)))


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


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PLAN_BYTES + 1)
    except OSError as error:
        raise FinefitError(f"can't read {path}: {error.strerror or error}") from error
    if len(data) > MAX_PLAN_BYTES:
        raise UsageError(f"{path}: larger than 1 MiB, so it is not a plan")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}:{line}: not UTF-8 text") from error


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


def _load_mapping(text: str, name: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The top-level mapping and the line of each of its keys."""
    import yaml

    try:
        _check_events(text, name)
        loader = _plain_loader()(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(f"{name}: not a plan: expected lines of `key: value`")
        lines = _key_lines(node, name)
        values = {key.value: loader.construct_object(value, deep=True) for key, value in node.value}
    except yaml.YAMLError as error:
        raise UsageError(_describe_yaml_error(error, name)) from error
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{name}: a value can't be read: {error}") from error
    return values, lines


def _plain_loader() -> type[yaml.SafeLoader]:
    """YAML's safe loader without dates: a file called 2026-11-22 stays a text."""
    import yaml

    class PlainLoader(yaml.SafeLoader):
        yaml_implicit_resolvers = {  # noqa: RUF012 - the name and type are PyYAML's
            first: [(tag, pattern) for tag, pattern in rules if not tag.endswith(":timestamp")]
            for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    return PlainLoader


def _check_events(text: str, name: str) -> None:
    """Refuse what a plan never needs, before anything is built from it."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise UsageError(f"{name}:{line}: a plan may hold no anchors (&), aliases (*) and tags (!)")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise UsageError(f"{name}:{line}: nested more than {_MAX_DEPTH} deep")


def _key_lines(node: yaml.MappingNode, name: str) -> dict[str, int]:
    """The line of each key; refuses keys that occur twice (also in nested mappings) or are no text."""
    import yaml

    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise UsageError(f"{name}:{line}: a key must be a word")
        if key_node.value in lines:
            raise UsageError(
                f"{name}:{line}: {key_node.value} is given twice (first in line {lines[key_node.value]})"
            )
        lines[key_node.value] = line
        for nested in _mappings_in(value_node):
            _key_lines(nested, name)
    return lines


def _mappings_in(node: yaml.Node) -> list[yaml.MappingNode]:
    import yaml

    if isinstance(node, yaml.MappingNode):
        return [node]
    if isinstance(node, yaml.SequenceNode):
        return [mapping for item in node.value for mapping in _mappings_in(item)]
    return []


def _describe_yaml_error(error: Exception, name: str) -> str:
    mark = getattr(error, "problem_mark", None)
    where = name if mark is None else f"{name}:{mark.line + 1}"
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{where}: not valid YAML: {problem}"
