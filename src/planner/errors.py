"""Every error that a user can meet, each with its exit code.

FinefitError                 1   anything that is wrong outside the command line
├── UsageError               2   words or values that the user can correct at once
│   ├── UnknownNameError     2   a GPU, model, method … that no profile knows; carries the nearest names
│   └── SetupError           2   a TrainSetup field that is out of range or contradicts another
├── ConfigError              1   a config.json that is missing, broken or absurd
├── ProfileError             1   one of finefit's own profile files breaks its rules
├── DataError                1   a training file: broken, empty, wrong columns (with its line)
├── NotModelledError         1   finefit has no rule for this back end or architecture, and doesn't guess
├── MissingExtraError        1   the command needs an optional extra
├── DoesNotFitError          3   a single setup needs more than the machine can give; carries short_by_bytes
├── LimitError               3   nothing is within a budget, a deadline or a licence; names the nearest
├── GateError                3   a comparison left its bounds
└── InterruptedRunError     33   stopped by a signal after a checkpoint; the same command resumes
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class FinefitError(Exception):
    """Root of all errors shown to a user as one line: what is wrong, where, what to do."""

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors travel between the processes of a run; most are made of other words than those they show."""
        return _restored, (type(self), self.args, vars(self))


def _restored(kind: type[FinefitError], words: tuple[Any, ...], values: Mapping[str, Any]) -> FinefitError:
    error = kind.__new__(kind)
    error.args = words
    vars(error).update(values)
    return error


class UsageError(FinefitError):
    """The command line or a plan says something that can't be right."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name that no profile or registry knows.

    >>> print(UnknownNameError("GPU", "rtx-4091", ["RTX 4090", "RTX 4080"]))
    unknown GPU 'rtx-4091'; nearest: RTX 4090, RTX 4080 (see `finefit list gpus`)
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], list_command: str | None = None) -> None:
        self.kind, self.name = kind, name
        self.nearest = nearest_names(name, known)
        hint = f"; nearest: {', '.join(self.nearest)}" if self.nearest else ""
        command = list_command or f"finefit list {kind.lower()}s"
        super().__init__(f"unknown {kind} {name!r}{hint} (see `{command}`)")


class SetupError(UsageError):
    """A TrainSetup field that is out of range or contradicts another field or the machine."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(f"{field}: {message}")


class ConfigError(FinefitError):
    """A model's config.json that can't be used."""


class ProfileError(FinefitError):
    """A file under profiles/ that breaks its own rules."""


class DataError(FinefitError):
    """A training file that can't be used, with the line where that shows."""

    def __init__(self, path: str, message: str, line: int | None = None) -> None:
        self.path, self.line = path, line
        where = path if line is None else f"{path}:{line}"
        super().__init__(f"{where}: {message}")


class NotModelledError(FinefitError):
    """finefit has no rule for this, and an invented number would be worse than none."""


class MissingExtraError(FinefitError):
    """A command needs packages that `pip install finefit` alone doesn't bring."""

    def __init__(self, command: str, extra: str, module: str) -> None:
        super().__init__(f"`finefit {command}` needs {module}: pip install 'finefit[{extra}]'")


class DoesNotFitError(FinefitError):
    """A setup needs `short_by_bytes` more than the machine can give."""

    exit_code = 3

    def __init__(self, message: str, short_by_bytes: int) -> None:
        self.short_by_bytes = short_by_bytes
        super().__init__(message)


class LimitError(FinefitError):
    """No plan is within the limits that were set."""

    exit_code = 3


class GateError(FinefitError):
    """A measured ratio left the bounds that were asked for."""

    exit_code = 3


class InterruptedRunError(FinefitError):
    """The run was stopped, its checkpoint is whole, and the same command resumes it."""

    exit_code = 33


def nearest_names(name: str, known: Iterable[str], most: int = 4) -> list[str]:
    """The known names that look most like `name`, best first; compared without case, blanks and hyphens."""
    folded = {fold_name(k): k for k in known}
    wanted = fold_name(name)
    close = difflib.get_close_matches(wanted, folded, n=most, cutoff=0.5)
    close += [f for f in folded if wanted and wanted in f and f not in close]
    return [folded[f] for f in close[:most]]


def fold_name(name: str) -> str:
    """A name as people mean it: lower case, letters and digits only.

    >>> fold_name("NVIDIA GeForce RTX 4090") == fold_name("nvidia-geforce-rtx-4090")
    True
    """
    return "".join(c for c in name.lower() if c.isalnum() or c in ".+")
