"""What makes a run fit without changing what it learns: recomputing, chunking, smaller states, sharing, offloading.

Each gives something up for memory: time, exactness of the optimizer's states, or another library. They are tried in
this order, and what is given up is never taken where a run fits at its largest micro-batch without. What gives nothing
up is not among them (planner.gains).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from planner.methods import can_run, find_method
from planner.optimizers import find_optimizer
from planner.specs import Machine

CHECKPOINTING = ("none", "full")
LOSSES = ("full", "chunked", "fused")
OPTIMIZERS = ("adamw-fused", "adamw-8bit", "paged-adamw-8bit")
IN_BACKWARD: Mapping[str, Any] = {
    "optimizer": "paged-adamw-8bit",
    "optimizer_in_backward": True,
    "grad_accum_steps": 1,
    "max_grad_norm": None,
}
"""The last thing that a full fine-tune gives up on one GPU: gradients that wait for each other."""

Spot = Mapping[str, Any]
"""How the GPUs share the work, and what is kept on the host."""

_ALONE: tuple[Spot, ...] = (
    {},
    {"sharding": "zero2", "offload": "optimizer"},
    {"sharding": "zero3", "offload": "params+optimizer"},
)
_TOGETHER: tuple[Spot, ...] = (
    {"sharding": "ddp"},
    {"sharding": "zero1"},
    {"sharding": "zero2"},
    {"sharding": "fsdp"},
    {"sharding": "zero3"},
    {"sharding": "zero2", "offload": "optimizer"},
    {"sharding": "fsdp", "offload": "params+optimizer"},
    {"sharding": "zero3", "offload": "params+optimizer"},
)


@dataclass(frozen=True, slots=True)
class Block:
    """Tactics of one optimizer in one spot, from the one that gives up least to the leanest."""

    spot: Spot
    tactics: tuple[Mapping[str, Any], ...]

    @property
    def is_offloaded(self) -> bool:
        """Whether something is kept on the host."""
        return bool(self.spot.get("offload", "none") != "none")


def spots(method: str, machine: Machine, wishes: Mapping[str, Any]) -> list[Spot]:
    """Ways to share, what offloads last; only what the wishes leave open."""
    known = _ALONE if machine.num_gpus == 1 else _TOGETHER
    possible = [spot for spot in known if can_run(method, num_gpus=machine.num_gpus, **spot)]
    wished = {name: wishes[name] for name in ("sharding", "offload") if name in wishes}
    agreeing = [
        spot for spot in possible if all(spot.get(name, "none") == value for name, value in wished.items())
    ]
    return agreeing or [wished]


def blocks(
    method: str,
    machine: Machine,
    spot: Spot,
    wishes: Mapping[str, Any],
    gained: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[Block]:
    """By optimizer, the exact one first; each block holds every way to recompute and to make the loss.

    `gained`: fields that are better so in this spot (planner.gains); a loss among them takes the place of all logits.
    """
    choices = [
        {"checkpointing": checkpointing, "loss": loss}
        for checkpointing in _open("checkpointing", CHECKPOINTING, wishes)
        for loss in _open("loss", _losses(machine, gained), wishes)
    ]
    # Where the wishes leave nothing that the method runs, its refusal says why.
    possible = [choice for choice in choices if can_run(method, **choice)] or choices
    for states in _states(method, machine, spot, wishes):
        yield Block(spot, tuple({**spot, **states, **gained, **choice} for choice in possible))


def _open(name: str, values: Sequence[str], wishes: Mapping[str, Any]) -> tuple[Any, ...]:
    return (wishes[name],) if name in wishes else tuple(values)


def _losses(machine: Machine, gained: Mapping[str, Any]) -> tuple[str, ...]:
    """Liger's kernel needs a GPU."""
    possible = LOSSES if machine.gpu.backend != "cpu" else LOSSES[:2]
    return possible[possible.index(gained["loss"]) :] if "loss" in gained else possible


def _states(
    method: str, machine: Machine, spot: Spot, wishes: Mapping[str, Any]
) -> Iterator[Mapping[str, Any]]:
    names = _open("optimizer", OPTIMIZERS, wishes)
    has_bitsandbytes = machine.gpu.bitsandbytes and machine.gpu.backend != "cpu"
    is_offloaded = spot.get("offload", "none") != "none"
    for name in names:
        is_8bit = "bitsandbytes" in find_optimizer(name).factory
        # An optimizer that steps on the host has no use for states in managed memory or 8 bits.
        if "optimizer" in wishes or not is_8bit or (has_bitsandbytes and not is_offloaded):
            yield {"optimizer": name}
    if _may_free_early(method, machine, spot, wishes) and has_bitsandbytes:
        yield IN_BACKWARD


def _may_free_early(method: str, machine: Machine, spot: Spot, wishes: Mapping[str, Any]) -> bool:
    is_alone = machine.num_gpus == 1 and not spot
    is_open = all(wishes.get(name, value) == value for name, value in IN_BACKWARD.items())
    return is_alone and is_open and find_method(method).trains_base
