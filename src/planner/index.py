"""The generated index of profiles/: what people write in TOML, read back from one JSON file per folder.

`python -m planner.index` rewrites profiles/index/*.json; `--check` only says which file is stale (exit 1).
At run time nothing but the index is read, because parsing the TOML alone would take most of the start-up
budget; a test keeps the two equal.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.errors import ProfileError, UsageError

INDEX_FOLDER = "index"


@functools.cache
def profiles_dir() -> Path:
    """The folder with the profiles: beside this module in a wheel, at the repository's root in a source tree."""
    here = Path(__file__).resolve()
    for folder in (here.parent / "profiles", here.parents[2] / "profiles"):
        if (folder / "gpus").is_dir():
            return folder
    raise ProfileError(f"no profiles beside {here.parent}: reinstall finefit")


@functools.cache
def raw_profiles(folder: str) -> Mapping[str, Mapping[str, Any]]:
    """All files of profiles/FOLDER as {file stem: parsed TOML}. Shared between callers: never change it.

    Raises ProfileError when the index is missing or broken.
    """
    path = profiles_dir() / INDEX_FOLDER / f"{folder}.json"
    try:
        content: Mapping[str, Mapping[str, Any]] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ProfileError(f"can't read {path} ({error}): reinstall finefit") from error
    return content


def indexed_folders(root: Path) -> list[str]:
    """The folders under `root` that hold TOML files, sorted."""
    return sorted({path.parent.name for path in root.glob("*/*.toml")})


def index_text(root: Path, folder: str) -> str:
    """The index of one folder as JSON, one file to a line so that changes stay readable.

    Raises ProfileError on TOML that is broken or has no JSON form.
    """
    lines = [
        f"{json.dumps(path.stem)}: {json.dumps(_parsed(path), ensure_ascii=False, separators=(',', ':'))}"
        for path in sorted((root / folder).glob("*.toml"))
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def stale_indexes(root: Path) -> list[Path]:
    """The index files that differ from what the TOML files say, or that no longer belong to a folder."""
    wanted = {root / INDEX_FOLDER / f"{name}.json": index_text(root, name) for name in indexed_folders(root)}
    orphans = set((root / INDEX_FOLDER).glob("*.json")) - set(wanted)
    stale = {path for path, text in wanted.items() if not path.is_file() or path.read_text("utf-8") != text}
    return sorted(stale | orphans)


def write_indexes(root: Path) -> list[Path]:
    """Bring the index up to date; returns the files that changed."""
    from planner.files import write_atomically

    changed = stale_indexes(root)
    for path in changed:
        if path.stem in indexed_folders(root):
            write_atomically(path, index_text(root, path.stem))
        else:
            path.unlink()
    return changed


def _parsed(path: Path) -> Mapping[str, Any]:
    import tomllib

    try:
        parsed = tomllib.loads(path.read_text("utf-8"))
        json.dumps(parsed)
    except (ValueError, TypeError) as error:
        raise ProfileError(f"{path}: {error}") from error
    return parsed


def main(arguments: list[str]) -> int:
    """The command line: no argument to write, `--check` to look only."""
    if arguments not in ([], ["--check"]):
        raise UsageError("usage: python -m planner.index [--check]")
    root = profiles_dir()
    changed = stale_indexes(root) if arguments else write_indexes(root)
    for path in changed:
        print(f"{'stale' if arguments else 'written'}: {path.relative_to(root)}")
    return 1 if arguments and changed else 0


if __name__ == "__main__":
    import sys

    from planner.errors import FinefitError

    try:
        sys.exit(main(sys.argv[1:]))
    except FinefitError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)
