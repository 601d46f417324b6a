"""Sharding strategies: one entry each; what a rank holds of weights, gradients and optimizer states, and what the
exchange between ranks keeps beside them, moment by moment.

A strategy's `buffers` is a function from what is exchanged (`Exchanged`) to what of it is alive when (`Buffers`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

ZERO_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's reduce and all-gather buckets (runtime/zero/config.py), written into the exported files."""


@dataclass(frozen=True, slots=True)
class Group:
    """Weights that are gathered together: their bytes when whole, and those of their gradients when reduced."""

    gathered: int
    reduced: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchanged:
    """What ranks exchange, in bytes of whole tensors (all ranks' shares together).

    `layer_bytes`: the weights of the largest layer, as they are gathered; `root_bytes`: all weights outside the
    layers; `trained_root_bytes`: those of them that train (0 or all); `gradients_bytes`: all gradients, in the dtype of
    what trains; `weight_width`: bytes per element of the weights. `is_reentrant`: layers are recomputed by reentrant
    checkpoints, whose forward builds no graph.
    `layer` (the largest), `embedding`, `tail` (final norm and head; the embedding too where it `is_tied`) and
    `rest` are the groups of FSDP2. `is_cast`: shards are cast before they are gathered.
    """

    ranks: int
    layer_bytes: int
    root_bytes: int
    trained_root_bytes: int
    gradients_bytes: int
    trained_params: int
    weight_width: int
    is_reentrant: bool
    layer: Group
    embedding: Group
    tail: Group
    rest: Group
    is_tied: bool
    is_cast: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Buffers:
    """Bytes per rank that the exchange holds beside the step's own tensors, at each moment of a step.

    `always`: from before the first step to the end, in every phase. The others are held while it lasts: `forward` of
    a layer; `loss`, the head's forward too; `head_backward` of the loss; `last_layer_backward`, the first that runs;
    `first_layer_backward`; `embedding_backward`, after all layers; `optimizer` step; `eval` of a layer and `eval_loss`
    without gradients. `first_gather`, `layer_gather`, `tail_gather`, `eval_gather`: while the weights of the first
    layer, any layer, the model's end arrive, before they run; `prefetch`: in the backward, before a layer's begins. Where a group's gradients are whole until its own backward is done, three more moments count
    them in: `head_product`, the head's; `layer_reduce`, a layer's beside their copy that is being reduced; and
    `embedding_reduce`.
    """

    always: float = 0.0
    first_gather: float = 0.0
    layer_gather: float = 0.0
    forward: float = 0.0
    tail_gather: float = 0.0
    loss: float = 0.0
    head_backward: float = 0.0
    head_product: float = 0.0
    prefetch: float = 0.0
    last_layer_backward: float = 0.0
    first_layer_backward: float = 0.0
    layer_reduce: float = 0.0
    embedding_backward: float = 0.0
    embedding_reduce: float = 0.0
    optimizer: float = 0.0
    eval_gather: float = 0.0
    eval: float = 0.0
    eval_loss: float = 0.0


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
    `reduces_by_group`: a group's gradients are whole until its backward is done; then a rank keeps its share.
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
    reduces_by_group: bool = False
    splits_layers: bool = False
    uses_nccl: bool = True
    buffers: Callable[[Exchanged], Buffers] = _no_buffers


def _through_the_step(num_bytes: float) -> Buffers:
    """The same bytes at every moment of forward and backward."""
    return Buffers(
        forward=num_bytes,
        loss=num_bytes,
        head_backward=num_bytes,
        last_layer_backward=num_bytes,
        first_layer_backward=num_bytes,
    )


def _ddp(exchanged: Exchanged) -> Buffers:
    """torch.nn.parallel.DistributedDataParallel: the reducer's buckets are a second copy of the gradients.

    They are made with the wrapper and stay (reducer.cpp; accelerate leaves gradient_as_bucket_view at False).
    """
    return Buffers(always=exchanged.gradients_bytes)


def _bucket(exchanged: Exchanged) -> float:
    return min(ZERO_BUCKET_ELEMENTS, exchanged.trained_params) * exchanged.weight_width


def _zero(exchanged: Exchanged) -> Buffers:
    return _through_the_step(_bucket(exchanged))


def _zero3(exchanged: Exchanged) -> Buffers:
    return _through_the_step(2 * exchanged.layer_bytes + exchanged.root_bytes + _bucket(exchanged))


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
        last_layer_backward=layers * exchanged.layer_bytes + root,
        first_layer_backward=layers * exchanged.layer_bytes + root,
        embedding_backward=root + exchanged.trained_root_bytes,
        eval=exchanged.layer_bytes + root,
        eval_loss=exchanged.layer_bytes + root,
    )


def _fsdp2(exchanged: Exchanged) -> Buffers:
    """torch 2.13's FSDP2 (torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py, _fsdp_collectives.py).

    A group at work is there twice in the forward: its weights, and the flat buffer that they were copied out of,
    which is freed only when the next group's weights have been copied out too (wait_for_unshard holds it in a
    variable), at last when the root's forward ends.
    The last group stays gathered until its backward. In the backward the flat buffer goes at once, but the next
    group's is allocated before the backward of this one begins (_backward_prefetch; beside a rank's share in the
    gathered dtype, where it has to be cast: foreach_all_gather), and the input of the last
    reduce-scatter is held until this group's gradients are whole (reduce_scatter_states).
    A tied embedding makes the last group whole from the first forward to the end of the backward, its gradient too:
    its inputs need none, so nothing says that its backward is done before all is (_register_post_backward_hook).
    """
    layer, embedding, tail, rest = exchanged.layer, exchanged.embedding, exchanged.tail, exchanged.rest
    is_tied = exchanged.is_tied
    held = rest.gathered + (tail.gathered if is_tied else 0)
    behind = held + (tail.reduced if is_tied else 0)
    table = tail if is_tied else embedding
    ahead = max(layer.gathered, embedding.gathered)
    cast = ahead / exchanged.ranks if exchanged.is_cast else 0.0
    # From the second batch of an evaluation on, the last group is there from the start.
    rested = rest.gathered + tail.gathered
    first = held + table.gathered + 2 * layer.gathered
    loss = held + (layer.gathered if is_tied else 2 * tail.gathered)
    return Buffers(
        first_gather=first,
        layer_gather=held + 3 * layer.gathered,
        tail_gather=0 if is_tied else held + layer.gathered + 2 * tail.gathered,
        forward=held + 2 * layer.gathered,
        loss=loss,
        head_backward=rested,
        head_product=rested + layer.gathered + tail.reduced,
        prefetch=behind + layer.gathered + ahead + cast + layer.reduced,
        last_layer_backward=behind + 2 * layer.gathered + (0 if is_tied else tail.reduced),
        first_layer_backward=behind + layer.gathered + ahead + layer.reduced,
        layer_reduce=behind + layer.gathered + 2 * layer.reduced,
        embedding_backward=behind + embedding.gathered + layer.reduced,
        embedding_reduce=rest.gathered + 2 * table.reduced,
        eval_gather=max(rested + 3 * layer.gathered, first, rested + embedding.gathered + 2 * layer.gathered),
        eval=rested + 2 * layer.gathered,
        eval_loss=loss,
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
            casts_gathered=True,
            accumulates_whole=True,
            reduces_by_group=True,
            buffers=_fsdp2,
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
