"""Out of memory: what counts as it, and what is tried next with the same global batch.

A rung changes how a step is computed and nothing of what is learned: the rows of a step and their order stay, and the
loss is the mean over its trained tokens however they are cut (dropout alone draws other masks).
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from bench.host_memory import give_back_freed_memory
from planner.errors import FinefitError
from planner.setup import TrainSetup
from planner.units import format_bytes

T = TypeVar("T")

_WORDS = (
    # c10/core/impl/alloc_cpu.cpp; the CUDA runtime; cuBLAS; bitsandbytes and others that pass CUDA's error on
    "can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_ASKED = re.compile(r"[Tt]ried to allocate (\d+(?:\.\d+)?) (bytes|[KMGT]iB)")
_FREE = re.compile(r"of which (\d+(?:\.\d+)?) (bytes|[KMGT]iB) is free")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shortage:
    """What an allocator refused, in which phase; `missing_bytes` is what it was asked for beyond what was free.

    None where the message has no figure.
    """

    phase: str
    missing_bytes: int | None

    @classmethod
    def of(cls, message: str, phase: str) -> Shortage:
        """Read from the message of torch's CPU or CUDA allocator."""
        asked, free = _ASKED.search(message), _FREE.search(message)
        if asked is None:
            return cls(phase=phase, missing_bytes=None)
        free_bytes = 0 if free is None else _num_bytes(free)
        # More may be free than was asked for, in pieces: then a little less is enough.
        return cls(phase=phase, missing_bytes=max(1, _num_bytes(asked) - free_bytes))

    def __str__(self) -> str:
        """As part of a line."""
        missing = "" if self.missing_bytes is None else f", {format_bytes(self.missing_bytes)} missing"
        return f"out of memory ({self.phase}{missing})"


class ShortOfMemoryError(FinefitError):
    """A run can't go on in memory as it is: what was lacking, for who starts it again with a smaller step."""

    exit_code = 3

    def __init__(self, shortage: Shortage) -> None:
        self.shortage = shortage
        super().__init__(shortage)


def _num_bytes(found: re.Match[str]) -> int:
    return int(float(found[1]) * _UNITS[found[2]])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused, on the CPU or on CUDA."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


class PhaseNow:
    """The phase callback of a step that remembers where it is."""

    name = "start"

    def __call__(self, name: str) -> AbstractContextManager[Any]:
        """Enter a phase."""
        self.name = name
        return nullcontext()


def attempt(call: Callable[[], T], phase: Callable[[], str]) -> T | Shortage:
    """What the call returns, or what it lacked; then nothing that it allocated is held any more.

    A failed call's tensors live in the frames of its traceback, which end with the handler.
    """
    try:
        return call()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = str(error)
    release()
    return Shortage.of(message, phase())


def release() -> None:
    """Give back what is no longer used: reference cycles, and what the allocators keep of freed memory."""
    gc.collect()
    give_back_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_repeatable(setup: TrainSetup, phase: str) -> bool:
    """Whether nothing was trained yet when a step failed in this phase, so that it can be taken again."""
    return phase != "optimizer" and not (setup.optimizer_in_backward and phase == "backward")


def rung_after(setup: TrainSetup, shortage: Shortage) -> TrainSetup | None:
    """The setup to try after this shortage; None where no smaller batch would help."""
    if shortage.phase == "eval":
        return next_eval_rung(setup)
    # weights, gradients and optimizer states are as large whatever the batch is
    return None if shortage.phase in ("load", "optimizer") else next_rung(setup)


def next_rung(setup: TrainSetup) -> TrainSetup | None:
    """The setup to try after running out of memory in a step: None where the ladder ends.

    The micro-batch is halved, or as near below as divides the global batch, and accumulated more often; at 1, each
    layer is recomputed in the backward.
    """
    size = setup.micro_batch_size
    total = size * setup.grad_accum_steps
    smaller = next((n for n in range(size // 2, 0, -1) if total % n == 0), None)
    if smaller is not None and not setup.optimizer_in_backward:
        return setup.with_(micro_batch_size=smaller, grad_accum_steps=total // smaller)
    return setup.with_(checkpointing="full") if setup.checkpointing != "full" else None


def next_eval_rung(setup: TrainSetup) -> TrainSetup | None:
    """The same after running out of memory in an evaluation, which changes nothing but its own batch."""
    size = setup.eval_batch_size or setup.micro_batch_size
    return None if size == 1 else setup.with_(eval_batch_size=size // 2)


def changed_fields(before: TrainSetup, after: TrainSetup) -> dict[str, Any]:
    """The fields of `after` that differ, with their values."""
    old, new = before.to_dict(), after.to_dict()
    return {name: value for name, value in new.items() if old[name] != value}


def retry_entry(before: TrainSetup, after: TrainSetup, shortage: Shortage, step: int) -> dict[str, Any]:
    """What metrics.jsonl keeps of a rung that was taken after `step` steps; `note` says it in a line."""
    old, changes = before.to_dict(), changed_fields(before, after)
    words = ", ".join(f"{name} {old[name]} -> {value}" for name, value in changes.items())
    return {
        "step": step,
        "phase": shortage.phase,
        "missing_bytes": shortage.missing_bytes,
        "changes": changes,
        "note": f"{shortage} after step {step}: going on with {words}",
    }
