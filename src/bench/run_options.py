"""What a run is told beside its plan: how often it saves and evaluates, and what it shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bench.early_stop import HeldOut


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """Plain values, so that every rank of a run can be given them. Intervals count optimizer steps.

    `device` is cuda or cpu; `save_every_steps` None saves ten times; `prompts` is a file for bench.prompts.
    """

    device: str = "cpu"
    progress: bool = True
    save_every_steps: int | None = None
    held_out: HeldOut = field(default_factory=HeldOut)
    prompts: Path | None = None
    tensorboard: bool = False
    trust_remote_code: bool = False
