"""What ranks send each other and their hosts in a step, in bytes of one rank, by when it is sent.

Collectives move (n - 1) / n of a tensor through each rank's link for a gather or a scatter, twice that for an
all-reduce (a ring's cost, NVIDIA/nccl-tests doc/PERFORMANCE.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.inventory import Inventory
from planner.setup import TrainSetup
from planner.sharding import STRATEGIES
from planner.units import DTYPE_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Bytes that one rank sends: in each forward, in each backward, in the last backward of a step besides, and after it.

    `host_pass_bytes` come from host memory in each forward and each backward; `host_step_bytes` go there and come back
    around a step on the host, which works on `stepped_bytes`.
    """

    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    last_backward_bytes: float = 0.0
    step_bytes: float = 0.0
    host_pass_bytes: float = 0.0
    host_step_bytes: float = 0.0
    stepped_bytes: float = 0.0


def traffic(setup: TrainSetup, inventory: Inventory) -> Traffic:
    """Of one rank of `setup`; nothing on one GPU, and where layers are divided, whose stages send a stream only."""
    how, ranks = STRATEGIES[setup.sharding], setup.num_gpus
    if ranks == 1 or how.splits_layers:
        return _offloaded(setup, inventory, Traffic())
    share = (ranks - 1) / ranks
    narrow = DTYPE_BYTES[setup.autocast] / DTYPE_BYTES[setup.weights_dtype] if setup.autocast else 1.0
    cast = narrow if how.casts_gathered else 1.0
    gradients = share * inventory.gradients_bytes * cast
    if how.shards_weights:
        weights = share * (inventory.weights_bytes + inventory.adapters_bytes) * cast
        late = how.accumulates_whole
        sent = Traffic(
            forward_bytes=weights,
            backward_bytes=weights + (0.0 if late else gradients),
            last_backward_bytes=gradients if late else 0.0,
        )
    elif how.shards_optimizer:
        sent = Traffic(
            backward_bytes=0.0 if how.reduces_last else gradients,
            step_bytes=gradients + (gradients if how.reduces_last else 0.0),
        )
    else:
        sent = Traffic(last_backward_bytes=2 * gradients)
    return _offloaded(setup, inventory, sent)


def _offloaded(setup: TrainSetup, inventory: Inventory, sent: Traffic) -> Traffic:
    if setup.offload == "none":
        return sent
    ranks = setup.num_gpus
    weights = (inventory.weights_bytes + inventory.adapters_bytes) / ranks
    gradients = inventory.gradients_bytes / ranks
    return Traffic(
        forward_bytes=sent.forward_bytes,
        backward_bytes=sent.backward_bytes,
        last_backward_bytes=sent.last_backward_bytes,
        step_bytes=sent.step_bytes,
        host_pass_bytes=weights if setup.offload == "params+optimizer" else 0.0,
        host_step_bytes=gradients * (1 if setup.offload == "params+optimizer" else 2),
        stepped_bytes=3 * gradients + 2 * (inventory.states_bytes + inventory.master_bytes) / ranks,
    )
