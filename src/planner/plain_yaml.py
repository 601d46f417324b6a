"""YAML that people write, read with care: every complaint names the file and the line.

Anchors, aliases and tags are refused: finefit's files need none, and a short file of nested aliases can unfold to
gigabytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.errors import FinefitError, UsageError

if TYPE_CHECKING:
    import yaml

MAX_YAML_BYTES = 2**20
_MAX_DEPTH = 20


def read_text(path: Path, noun: str) -> str:
    """The file's text. Raises UsageError where it is too large or no text, FinefitError when it can't be read."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise FinefitError(f"can't read {path}: {error.strerror or error}") from error
    if len(data) > MAX_YAML_BYTES:
        raise UsageError(f"{path}: larger than 1 MiB, so it is not a {noun}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}:{line}: not UTF-8 text") from error


def load_mapping(text: str, name: str, noun: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The top-level mapping, and the line of each key by its path: `model`, `offers.0.price`.

    `name` is what error lines call the file, `noun` what it should be. Raises UsageError with file and line.
    """
    import yaml

    try:
        _check_events(text, name, noun)
        loader = _plain_loader()(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(f"{name}: not a {noun}: expected lines of `key: value`")
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


def _check_events(text: str, name: str, noun: str) -> None:
    """Refuse what such a file never needs, before anything is built from it."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise UsageError(f"{name}:{line}: a {noun} may hold no anchors (&), aliases (*) and tags (!)")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise UsageError(f"{name}:{line}: nested more than {_MAX_DEPTH} deep")


def _key_lines(node: yaml.MappingNode, name: str, above: str = "") -> dict[str, int]:
    """The line of each key by its path; refuses keys that occur twice in one mapping or are no text."""
    import yaml

    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise UsageError(f"{name}:{line}: a key must be a word")
        path = f"{above}{key_node.value}"
        if path in lines:
            raise UsageError(f"{name}:{line}: {key_node.value} is given twice (first in line {lines[path]})")
        lines[path] = line
        for place, nested in _mappings_in(value_node, path):
            lines.update(_key_lines(nested, name, f"{place}."))
    return lines


def _mappings_in(node: yaml.Node, path: str) -> list[tuple[str, yaml.MappingNode]]:
    import yaml

    if isinstance(node, yaml.MappingNode):
        return [(path, node)]
    if isinstance(node, yaml.SequenceNode):
        items = enumerate(node.value)
        return [found for number, item in items for found in _mappings_in(item, f"{path}.{number}")]
    return []


def _describe_yaml_error(error: Exception, name: str) -> str:
    mark = getattr(error, "problem_mark", None)
    where = name if mark is None else f"{name}:{mark.line + 1}"
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{where}: not valid YAML: {problem}"
