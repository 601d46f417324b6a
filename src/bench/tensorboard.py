"""metrics.jsonl's numbers as TensorBoard events, for who wants to look at them there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.errors import FinefitError, MissingExtraError

FOLDER = "tensorboard"


def require_tensorboard() -> Any:
    """torch's writer of events. Raises MissingExtraError without the package that it needs."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("train --tensorboard", "tensorboard", "tensorboard") from error
    return SummaryWriter


class TensorBoard:
    """Writes every number of every entry as `kind/name`; a listener of MetricsLog.

    Events of steps after `first_step` that an earlier session wrote are hidden, because they are taken again.
    Raises MissingExtraError without the package, FinefitError where the folder can't be written.
    """

    def __init__(self, run_folder: Path, first_step: int) -> None:
        writer = require_tensorboard()
        try:
            self._writer = writer(str(run_folder / FOLDER), purge_step=first_step + 1)
        except OSError as error:
            raise FinefitError(f"can't write {run_folder / FOLDER}: {error.strerror or error}") from error

    def __call__(self, kind: str, values: Mapping[str, Any]) -> None:
        """One entry of metrics.jsonl."""
        step = values["step"]
        for name, value in values.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()
