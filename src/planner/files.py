"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from planner.errors import FinefitError, UsageError


def user_cache() -> Path:
    """finefit's own cache: FINEFIT_CACHE, else XDG_CACHE_HOME/finefit, else ~/.cache/finefit; needn't exist yet."""
    own = os.environ.get("FINEFIT_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "finefit"


def user_data_folder() -> Path:
    """finefit's own folder for what can't be made again: XDG_DATA_HOME/finefit, else ~/.local/share/finefit.

    It needn't exist yet.
    """
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "finefit"


def check_target(target: Path, *kept: Path) -> None:
    """Raise UsageError where writing `target` would destroy one of the files that must stay as they are."""
    own = target.resolve()
    for path in kept:
        if path.resolve() == own:
            raise UsageError(f"{target} would be overwritten: name another file")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write aside in the same folder, fsync, rename. Raises FinefitError when the folder can't be written."""
    with atomic_files(path) as (file,):
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_files(*paths: Path) -> Iterator[tuple[BinaryIO, ...]]:
    """Files to write piece by piece: aside until the block ends without an exception, then fsynced and renamed in
    order; else nothing is left of them. Raises FinefitError when a folder can't be written.
    """
    asides: list[str] = []
    try:
        with ExitStack() as stack:
            stack.callback(_remove, asides)
            files = tuple(_open_aside(path, asides, stack) for path in paths)
            yield files
            for file, aside in zip(files, asides, strict=True):
                file.flush()
                os.fsync(file.fileno())
                file.close()
                Path(aside).chmod(0o644)
            for path, aside in zip(paths, asides, strict=True):
                Path(aside).replace(path)
        for folder in {path.parent for path in paths}:
            _sync_folder(folder)
    except OSError as error:
        names = ", ".join(map(str, paths))
        raise FinefitError(f"can't write {names}: {error.strerror or error}") from error


def _open_aside(path: Path, asides: list[str], stack: ExitStack) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    asides.append(aside)
    return stack.enter_context(os.fdopen(handle, "wb"))


def _remove(asides: list[str]) -> None:
    for aside in asides:
        Path(aside).unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Append one line and fsync, so that a later crash can't lose it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(line.rstrip("\n").encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise FinefitError(f"can't write {path}: {error.strerror or error}") from error


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; folders can't be opened for this on Windows, where rename suffices."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
