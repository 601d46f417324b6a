"""What a step needs beyond its allocated peak on a card with no room to spare: profiles/calibration/pressure.json.

When the card is full, PyTorch's allocator gives all cached blocks back and tries again; what remains lost are holes
inside segments that are still in use (c10/cuda/CUDACachingAllocator.cpp). How much that is follows from the sequence
of requests: each row of the table is a traced step whose requests were replayed by the allocator's rules on ever
smaller cards. `phase` is the one that fails first, and `lost_share` the least capacity that sufficed less that phase's
allocated peak, in shares of what the phase adds to the steady memory. Made by `python scripts/pressure.py`.

Steps of several GPUs are not replayed. Where the whole model trains, its gradients there are a few flat tensors or
buckets, which leave fewer holes than a tensor for each weight: anything between nothing and what one GPU loses counts
as equally likely.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass

from planner.errors import ProfileError
from planner.index import profiles_dir
from planner.methods import find_method
from planner.results import Memory
from planner.setup import TrainSetup

FILE = "pressure.json"
FEWEST = 4
"""Replays that a group needs to stand for itself."""
NUM_NODES = 20
"""Equally likely points of a group's shares."""
_UNIFORM = tuple((node + 0.5) / NUM_NODES for node in range(NUM_NODES))
STEP_PHASES = ("forward", "loss", "backward")
"""Share their holes; the highest of them decides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """One traced step under pressure."""

    trains_base: bool
    keeps_logits: bool
    phase: str
    lost_share: float


@functools.cache
def replayed() -> tuple[Replayed, ...]:
    """The table. Raises ProfileError when it is missing or broken."""
    path = profiles_dir() / "calibration" / FILE
    try:
        rows = json.loads(path.read_bytes())["steps"]
        return tuple(Replayed(**{key: row[key] for key in Replayed.__slots__}) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ProfileError(f"can't read {path} ({error}): reinstall finefit") from error


def keeps_logits(setup: TrainSetup) -> bool:
    """Whether the logits of all tokens exist at once."""
    return setup.loss == "full"


@functools.cache
def lost_shares(
    in_optimizer: bool, trains_base: bool, with_logits: bool, is_shared: bool
) -> tuple[float, ...]:
    """Equally likely shares of such a phase, ascending.

    Told apart while there are enough replays of each: the optimizer's phase, whether the base trains, and whether
    all logits are there at once, which leave holes that nothing else fills.
    """
    same_phase = [row for row in replayed() if (row.phase == "optimizer") == in_optimizer]
    same_base = [row for row in same_phase if row.trains_base == trains_base]
    same = [row for row in same_base if row.keeps_logits == with_logits]
    chosen = next((rows for rows in (same, same_base, same_phase) if len(rows) >= FEWEST), replayed())
    parts = _UNIFORM if is_shared and trains_base else (1.0,)
    return _at_nodes(part * row.lost_share for row in chosen for part in parts)


def overheads(setup: TrainSetup, memory: Memory, *, on_gpu: bool) -> tuple[float, ...]:
    """Equally likely bytes that the step needs beyond its allocated peak, ascending.

    The phase that needs most decides. On a CPU nothing is given back under pressure, and any share of the
    fragmentation is equally likely.
    """
    if not on_gpu:
        fragmentation = memory.terms["fragmentation"]
        return tuple(part * fragmentation for part in _UNIFORM)
    steady, peak = memory.phases["save"], memory.peak_allocated_bytes
    step = max(memory.phases[phase] for phase in STEP_PHASES)
    optimizer = memory.phases["optimizer"]
    trains_base, is_shared = find_method(setup.method).trains_base, setup.num_gpus > 1
    step_shares = lost_shares(False, trains_base, keeps_logits(setup), is_shared)
    optimizer_shares = lost_shares(True, trains_base, keeps_logits(setup), is_shared)
    step_added, optimizer_added = max(0, step - steady), max(0, optimizer - steady)
    return tuple(
        max(0.0, step - peak + of_step * step_added, optimizer - peak + of_optimizer * optimizer_added)
        for of_step, of_optimizer in zip(step_shares, optimizer_shares, strict=True)
    )


def _at_nodes(values: Iterable[float]) -> tuple[float, ...]:
    """Equally likely points of the values, ascending."""
    ranked = sorted(values)
    return tuple(ranked[int((node + 0.5) / NUM_NODES * len(ranked))] for node in range(NUM_NODES))
