"""Sharding strategies: one entry each; what a rank holds of weights, gradients and optimizer states, and what the
exchange between ranks keeps beside them, moment by moment.

A strategy's `buffers` is a function from what is exchanged (`Exchanged`) to what of it is alive when (`Buffers`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

ZERO_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's reduce and all-gather buckets (runtime/zero/config.py), written into the exported files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchanged:
    """What ranks exchange, in bytes of whole tensors (all ranks' shares together).

    `layer_bytes`: the weights of the largest layer, as they are gathered; `root_bytes`: all weights outside the
    layers; `trained_root_bytes`: those of them that train (0 or all); `gradients_bytes`: all gradients, in the dtype of
    what trains; `weight_width`: bytes per element of the weights. `is_reentrant`: layers are recomputed by reentrant
    checkpoints, whose forward builds no graph.
    """

    ranks: int
    layer_bytes: int
    root_bytes: int
    trained_root_bytes: int
    gradients_bytes: int
    trained_params: int
    weight_width: int
    is_reentrant: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Buffers:
    """Bytes per rank that the exchange holds beside the step's own tensors, at each moment of a step.

    `always`: from before the first step to the end, in every phase. The others are held while it lasts: `forward` of
    a layer, `loss` (the head's forward too), `head_backward`, `layer_backward`; `embedding_backward`, after all
    layers; `optimizer` step; `eval`, a layer's or the head's forward without gradients.
    """

    always: float = 0.0
    forward: float = 0.0
    loss: float = 0.0
    head_backward: float = 0.0
    layer_backward: float = 0.0
    embedding_backward: float = 0.0
    optimizer: float = 0.0
    eval: float = 0.0


def _no_buffers(exchanged: Exchanged) -> Buffers:
    return Buffers()


@dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """Which of the training state is split over the ranks, and what their exchange holds.

    `splits_layers`: layers are divided over the cards, one after the other (naive pipeline). `reduces_root_last`: the
    gradients of weights outside the layers are whole until the end of the backward. `holds_frozen_inputs`: inputs of
    frozen layers, and their gradients, live as long under reentrant checkpoints. `casts_gathered`: weights are gathered
    in the dtype of autocast, which then has nothing to cast. `accumulates_whole`: micro-batches before the last run
    without exchange (no_sync, which Trainer and accelerate use unless told `sync_each_batch`), so gradients stay whole.
    """

    name: str
    summary: str
    reduces_root_last: bool = False
    holds_frozen_inputs: bool = False
    casts_gathered: bool = False
    accumulates_whole: bool = False
    shards_weights: bool = False
    shards_gradients: bool = False
    shards_optimizer: bool = False
    splits_layers: bool = False
    uses_nccl: bool = True
    buffers: Callable[[Exchanged], Buffers] = _no_buffers


def _through_the_step(num_bytes: float) -> Buffers:
    """The same bytes at every moment of forward and backward."""
    return Buffers(forward=num_bytes, loss=num_bytes, head_backward=num_bytes, layer_backward=num_bytes)


def _ddp(exchanged: Exchanged) -> Buffers:
    """torch.nn.parallel.DistributedDataParallel: the reducer's buckets are a second copy of the gradients."""
    return _through_the_step(exchanged.gradients_bytes)


def _bucket(exchanged: Exchanged) -> float:
    return min(ZERO_BUCKET_ELEMENTS, exchanged.trained_params) * exchanged.weight_width


def _zero(exchanged: Exchanged) -> Buffers:
    return _through_the_step(_bucket(exchanged))


def _zero3(exchanged: Exchanged) -> Buffers:
    return _through_the_step(2 * exchanged.layer_bytes + exchanged.root_bytes + _bucket(exchanged))


def _flat_groups(exchanged: Exchanged) -> Buffers:
    """Copies of one layer's whole parameters: the layer at work, the next one's prefetched buffer, and the flat
    buffer that is being copied out; the root group, everything outside the layers, stays gathered beside them.
    """
    return _through_the_step(3 * exchanged.layer_bytes + exchanged.root_bytes)


def _fsdp1(exchanged: Exchanged) -> Buffers:
    """torch's FullyShardedDataParallel: each layer's flat buffer is gathered in place, and freed after use.

    The root group stays gathered after the forward. In the backward the next layer's buffer is gathered ahead
    (BACKWARD_PRE) if its own forward has built a graph, which a reentrant checkpoint's hasn't (_runtime_utils.py,
    _get_handle_to_prefetch). At the end the gradients of the root group's views are joined into one flat tensor.
    """
    layers = 1 if exchanged.is_reentrant else 2
    root = exchanged.root_bytes
    return Buffers(
        forward=exchanged.layer_bytes + root,
        loss=root,
        head_backward=root,
        layer_backward=layers * exchanged.layer_bytes + root,
        embedding_backward=root + exchanged.trained_root_bytes,
        eval=exchanged.layer_bytes + root,
    )


STRATEGIES: dict[str, Strategy] = {
    s.name: s
    for s in (
        Strategy(name="none", summary="one GPU", uses_nccl=False),
        Strategy(name="ddp", summary="every GPU holds everything", buffers=_ddp),
        Strategy(
            name="zero1", summary="optimizer states split (DeepSpeed)", shards_optimizer=True, buffers=_zero
        ),
        Strategy(
            name="zero2",
            summary="optimizer states and gradients split (DeepSpeed)",
            shards_gradients=True,
            shards_optimizer=True,
            buffers=_zero,
        ),
        Strategy(
            name="zero3",
            summary="everything split (DeepSpeed)",
            shards_weights=True,
            shards_gradients=True,
            shards_optimizer=True,
            buffers=_zero3,
        ),
        Strategy(
            name="fsdp",
            summary="everything split (torch FSDP2)",
            shards_weights=True,
            shards_gradients=True,
            shards_optimizer=True,
            reduces_root_last=True,
            casts_gathered=True,
            accumulates_whole=True,
            buffers=_flat_groups,
        ),
        Strategy(
            name="fsdp1",
            summary="everything split (torch FSDP1, flat parameters)",
            shards_weights=True,
            shards_gradients=True,
            shards_optimizer=True,
            reduces_root_last=True,
            holds_frozen_inputs=True,
            casts_gathered=True,
            accumulates_whole=True,
            buffers=_fsdp1,
        ),
        Strategy(
            name="device_map",
            summary="layers divided over the GPUs, one works at a time",
            splits_layers=True,
            uses_nccl=False,
        ),
    )
}
