"""Exports: one file per target format. A format turns a TrainSetup into the files that another trainer reads.

The folder is the registry: a file `NAME.py` with SUMMARY, `export` and `left_out` adds the format NAME.
Names, paths and module names come from users: they reach a file only through `repr`, `json.dumps` or
`yaml.safe_dump`, never as text of a program or a comment.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from planner.errors import UnknownNameError
from planner.setup import TrainSetup

LeftOut = Mapping[str, str]
"""Field of TrainSetup -> why the exported files don't say what the setup says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A target format.

    `export(setup, gpu)` gives file name -> text and raises SetupError for a setup that the target can't run
    at all; `left_out(setup)` names the fields that the target can't express or does in its own way.
    """

    name: str
    summary: str
    export: Callable[[TrainSetup, str], dict[str, str]]
    left_out: Callable[[TrainSetup], LeftOut]

    def warnings(self, setup: TrainSetup) -> list[str]:
        """What the user must know of the fields that are left out, one line per reason."""
        return [f"{', '.join(names)}: {why}" for why, names in by_reason(self.left_out(setup)).items()]


def by_reason(left_out: LeftOut) -> dict[str, list[str]]:
    """Reason -> the fields that it holds for, both in the order in which they first appear."""
    reasons: dict[str, list[str]] = {}
    for name, why in left_out.items():
        reasons.setdefault(why, []).append(name)
    return reasons


def formats() -> list[Format]:
    """All formats in alphabetical order."""
    return [_load(path.stem) for path in sorted(Path(__file__).parent.glob("[a-z]*.py"))]


def find_format(name: str) -> Format:
    """The format of that name, whatever its case; UnknownNameError with the nearest names otherwise."""
    known = {form.name: form for form in formats()}
    if name.lower() not in known:
        raise UnknownNameError("format", name, known)
    return known[name.lower()]


@cache
def _load(name: str) -> Format:
    module = importlib.import_module(f"planner.export.{name}")
    return Format(name=name, summary=module.SUMMARY, export=module.export, left_out=module.left_out)
