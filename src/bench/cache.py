"""finefit's own cache: things that are slow to make and can always be made again."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from planner.errors import FinefitError
from planner.files import write_atomically

MANIFEST = "finefit-manifest.json"


def build_folder(target: Path, build: Callable[[Path], Mapping[str, Any]]) -> Path:
    """`target`, made once: `build` fills a folder aside and returns the manifest's facts, then it is renamed.

    Several processes may call this at once: one builds, the others wait for it. A folder whose files are not
    those of its manifest is built again. Raises FinefitError when the cache can't be written.
    """
    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not is_whole(target):
                _remove_remains(target)
                _build_aside(target, build)
    except OSError as error:
        raise FinefitError(f"can't write the cache {target}: {error.strerror or error}") from error
    return target


def is_whole(folder: Path) -> bool:
    """Whether the folder has a manifest, and all files that it lists at their sizes."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _build_aside(target: Path, build: Callable[[Path], Mapping[str, Any]]) -> None:
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        facts = build(aside)
        sizes = {path.name: path.stat().st_size for path in sorted(aside.iterdir())}
        for name in sizes:
            _sync(aside / name)
        write_atomically(aside / MANIFEST, json.dumps({**facts, "files": sizes}, indent=2) + "\n")
        aside.chmod(0o755)
        aside.rename(target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _remove_remains(target: Path) -> None:
    """What a killed builder, or a damaged cache, left; nobody else builds while the lock is held."""
    for path in (target, *target.parent.glob(f".{target.name}.*")):
        if path.is_dir():
            shutil.rmtree(path)
