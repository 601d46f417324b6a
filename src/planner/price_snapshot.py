"""Refreshed prices as they lie in the user's data folder: one JSON Lines file for each source, a row a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from planner.errors import FinefitError
from planner.files import user_data_folder


def snapshot_folder() -> Path:
    """Where refreshed snapshots lie; needn't exist."""
    return user_data_folder() / "prices"


def snapshot_rows(folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All rows of all snapshots, each with its place. Raises FinefitError when a file can't be read."""
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(_lines(path), 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = {}
            yield f"{path}:{number}", row if isinstance(row, dict) else {}


def parsed_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of one file that can be read; a broken line is not worth keeping. Raises FinefitError."""
    rows = []
    for line in _lines(path):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows += [row] if isinstance(row, dict) else []
    return rows


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", errors="replace").splitlines()
    except OSError as error:
        raise FinefitError(f"can't read {path}: {error.strerror or error}") from error
