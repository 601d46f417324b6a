"""What finefit's own ranks can train with, and what to do about the rest; torch is asked for its devices only."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

from planner.errors import MissingExtraError, NotModelledError, SetupError
from planner.export.deepspeed import ADAMW
from planner.setup import PAIRED, TrainSetup

ZERO_STAGES = ("zero1", "zero2", "zero3")
SHARDINGS = ("ddp", "fsdp", *ZERO_STAGES)
_SHARED_OPTIMIZERS = ("adamw", "adamw-fused", "sgd")
"""Each element of theirs is stepped by itself, so that a share steps as it would in the whole."""


class _Law(NamedTuple):
    field: str
    is_broken: Callable[[TrainSetup], bool]
    reason: str


_LAWS = (
    _Law(
        "objective",
        lambda s: s.objective in PAIRED,
        "pairs of answers train in one process: their reference and rewards are not shared by ranks",
    ),
    _Law(
        "sharding",
        lambda s: s.sharding == "device_map",
        "layers divided over cards that work in turn are not trained; use ddp, or fsdp where that is too large",
    ),
    _Law("sharding", lambda s: s.sharding not in SHARDINGS, f"ranks train with {' or '.join(SHARDINGS)}"),
    _Law("offload", lambda s: s.offload != "none", "ranks keep everything on their devices"),
    _Law(
        "optimizer_in_backward",
        lambda s: s.optimizer_in_backward,
        "gradients of several ranks must be averaged first",
    ),
    _Law(
        "weights_dtype",
        lambda s: "float16" in (s.autocast, s.weights_dtype),
        "float16's loss scaling is not shared by ranks; use bfloat16",
    ),
    _Law(
        "optimizer",
        lambda s: s.sharding in ZERO_STAGES and s.optimizer not in ADAMW,
        f"under DeepSpeed only {' and '.join(ADAMW)} are run",
    ),
    _Law(
        "optimizer",
        lambda s: s.sharding != "ddp" and s.optimizer not in _SHARED_OPTIMIZERS,
        f"of optimizers that step on shares only {', '.join(_SHARED_OPTIMIZERS)} are known to be right",
    ),
)


def check_one_process(setup: TrainSetup) -> None:
    """Raise NotModelledError for a setup that needs several processes."""
    if setup.num_gpus > 1 or setup.sharding not in ("none", "ddp") or setup.offload != "none":
        raise NotModelledError(
            "sharding: this runs one process on one device; `finefit train` runs several, and `finefit export` writes "
            "the plan for trainers that can do more"
        )


def check_ranks(setup: TrainSetup, device: str, *, is_rank: bool) -> None:
    """Raise NotModelledError or SetupError for what the ranks of a run can't do. `is_rank`: torchrun starts them."""
    if setup.num_gpus == 1:
        check_one_process(setup)
        return
    for field, is_broken, reason in _LAWS:
        if is_broken(setup):
            raise NotModelledError(
                f"{field}: {reason}; `finefit export` writes the plan for trainers that can do more"
            )
    if setup.sharding in ZERO_STAGES and find_spec("deepspeed") is None:
        raise MissingExtraError("train", "export", "deepspeed")
    per_node = setup.num_gpus // setup.num_nodes
    if setup.num_nodes > 1 and not is_rank:
        raise NotModelledError(
            f"num_nodes: processes are started on this machine only; on each of the {setup.num_nodes} machines, with a "
            f"folder that all of them share, run `torchrun --nnodes {setup.num_nodes} --nproc-per-node {per_node} "
            "--rdzv-backend c10d --rdzv-endpoint HOST:PORT --no-python finefit train plan.yaml --out FOLDER`"
        )
    if device == "cuda":
        import torch

        if torch.cuda.device_count() < per_node:
            raise SetupError(
                "num_gpus", f"{per_node} on this machine, but torch sees {torch.cuda.device_count()}"
            )
