"""Sharding strategies: one entry each; what a rank holds of weights, gradients and optimizer states, and what the
exchange between ranks keeps beside them, moment by moment.

A strategy's `buffers` is a function from what is exchanged (`Exchanged`) to what of it is alive when (`Buffers`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from planner.zero_replay import MOMENTS, Passes, Reductions, backward_reductions, gathered


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroSizes:
    """Elements of DeepSpeed's buffers: its defaults (runtime/zero/config.py), written into the exported files.

    `bucket`: the reduce and the all-gather bucket. Of stage 3: weights that are needed again within `reuse` stay
    gathered, and so many at most are gathered ahead (stage3_max_reuse_distance, stage3_max_live_parameters);
    `prefetch`: what one gathering ahead fetches; a parameter of at most `persistent` is never split again.
    """

    bucket: int = 500_000_000
    reuse: int = 1_000_000_000
    prefetch: int = 50_000_000
    persistent: int = 100_000


ZERO = ZeroSizes()
FLOAT64_WIDTH = 8


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
    `rest` are the groups of FSDP2. `largest_trained_params`: elements of the largest tensor that trains; `step_bytes`:
    what the optimizer's step makes for a moment. `is_cast`: shards are cast before they are gathered. `is_offloaded`: the optimizer
    steps on the host. `small_bytes`:
    parameters of at most ZeroSizes.persistent elements; `first_trained_params`: elements of the first that trains.
    `accumulates`: several micro-batches make a step. `passes` gives the modules' calls in order.
    """

    ranks: int
    layer_bytes: int
    root_bytes: int
    trained_root_bytes: int
    gradients_bytes: int
    weights_bytes: int
    trained_params: int
    largest_trained_params: int
    step_bytes: int
    weight_width: int
    is_reentrant: bool
    layer: Group
    embedding: Group
    tail: Group
    rest: Group
    is_tied: bool
    is_cast: bool
    is_offloaded: bool
    small_bytes: int
    first_trained_params: int
    accumulates: bool
    passes: Callable[[], Passes]

    @property
    def table(self) -> Group:
        """The group with the embedding."""
        return self.tail if self.is_tied else self.embedding


@dataclass(frozen=True, slots=True)
class Copy:
    """A flat copy of gradients, as a moment of the backward begins in which the share `made` of a layer's gradients is
    there: bytes `held` with it."""

    moment: str
    made: float
    held: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Buffers:
    """Bytes per rank that the exchange holds beside the step's own tensors, at each moment of a step.

    `always`: from before the first step to the end, in every phase; `kept`: from the first step on. The others are held while it lasts: `forward` of
    a layer; `loss`, the head's forward too; `head_backward` of the loss; `last_layer_backward`, the first that runs;
    `first_layer_backward`; `embedding_backward`, after all layers; `optimizer` step; `eval` of a layer and `eval_loss`
    without gradients. `first_gather`, `layer_gather`, `tail_gather`, `eval_gather`: while the weights of the first
    layer, any layer, the model's end arrive, before they run; `prefetch`: in the backward, before a layer's begins. Where a group's gradients are whole until its own backward is done, three more moments count
    them in: `head_product`, the head's; `layer_reduce`, a layer's beside their copy that is being reduced; and
    `embedding_reduce`. `copies` of gradients are there for a moment within a layer's backward.
    """

    always: float = 0.0
    kept: float = 0.0
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
    copies: tuple[Copy, ...] = ()


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
    `copies_share`: the optimizer steps on a copy of a rank's share of the weights even without master weights.
    `casts_adapters`: adapters get the dtype of 16-bit weights. `reduces_last`: gradients are whole until the backward is
    over. `moves_gradients`: each moves into the exchange's buffers as soon as it is made; a rank's share is one flat
    tensor, which with `keeps_gradients` is there from the start.
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
    copies_share: bool = False
    reduces_last: bool = False
    moves_gradients: bool = False
    keeps_gradients: bool = False
    casts_adapters: bool = False
    splits_layers: bool = False
    uses_nccl: bool = True
    buffers: Callable[[Exchanged], Buffers] = _no_buffers


def _ddp(exchanged: Exchanged) -> Buffers:
    """torch.nn.parallel.DistributedDataParallel: the reducer's buckets are a second copy of the gradients.

    They are made with the wrapper and stay (reducer.cpp; accelerate leaves gradient_as_bucket_view at False).
    """
    return Buffers(always=exchanged.gradients_bytes)


def _zero_optimizer(exchanged: Exchanged, flat: float = 0.0) -> float:
    """What the step holds for a moment beyond the optimizer's own: the norm takes the largest gradient in float64."""
    norm = FLOAT64_WIDTH * min(exchanged.largest_trained_params, exchanged.trained_params / exchanged.ranks)
    return max(flat, norm - exchanged.step_bytes / exchanged.ranks)


def _zero1(exchanged: Exchanged) -> Buffers:
    """DeepSpeed 0.19's stage 1 (runtime/zero/stage_1_and_2.py).

    A bucket of the configured size, however few gradients there are, exists from the first gradient to the end of the
    step's last backward (setup_buckets, _release_ipg_buffers). Gradients stay whole until the backward is over (process_gradients);
    then they move into the bucket in the order of the parameters (reduce_gradients). When the first bucket full has
    been reduced, the flat tensor of this rank's share is made (copy_grads_in_partition).
    """
    bucket = ZERO.bucket * exchanged.weight_width
    is_first_small = exchanged.first_trained_params <= ZERO.bucket
    moved = min(bucket, exchanged.gradients_bytes) if is_first_small else 0
    share = exchanged.gradients_bytes / exchanged.ranks
    # Where gradients are there already, the embedding's is added before that, and freed.
    added = exchanged.table.reduced * (2 if exchanged.is_tied else 1) if exchanged.accumulates else 0
    held = bucket if exchanged.accumulates else 0.0
    return Buffers(
        forward=held,
        loss=held,
        head_backward=held,
        last_layer_backward=bucket,
        first_layer_backward=bucket,
        embedding_backward=bucket + max(0.0, share - moved - added),
        optimizer=_zero_optimizer(exchanged),
    )


def _zero2(exchanged: Exchanged) -> Buffers:
    """DeepSpeed 0.19's stage 2: the bucket is that of stage 1, but gradients move into it as soon as they are made.

    What the bucket holds is copied flat to be reduced (allreduce_bucket) when the next gradient would not fit. After
    the first reduction the tensors of this rank's share are made, for all of it.
    """
    bucket = ZERO.bucket * exchanged.weight_width
    reductions = backward_reductions(exchanged.passes(), ZERO.bucket)
    share = exchanged.gradients_bytes / exchanged.ranks
    moments = [cause.moment for _, cause in reductions.each]
    unmade = [share * all(MOMENTS.index(m) > number for m in moments) for number in (1, 2)]
    copies = _copies(exchanged, reductions, bucket)
    # While the first reduction lasts, the share isn't there yet.
    copies = tuple(replace(c, held=c.held - share * (number == 0)) for number, c in enumerate(copies))
    return Buffers(
        last_layer_backward=bucket - unmade[0],
        first_layer_backward=bucket - unmade[1],
        embedding_backward=bucket + _embedding_reduction(exchanged, reductions, share),
        optimizer=_zero_optimizer(exchanged),
        copies=_distinct(copies),
    )


def _copies(exchanged: Exchanged, reductions: Reductions, held: float) -> tuple[Copy, ...]:
    """The flat copies of a backward's reductions, beside what is `held`."""
    return tuple(
        Copy(cause.moment, cause.made, held + elements * exchanged.weight_width)
        for elements, cause in reductions.each
    )


def _distinct(copies: Iterable[Copy]) -> tuple[Copy, ...]:
    """Equal layers are reduced alike."""
    return tuple(dict.fromkeys(copies))


def _embedding_reduction(exchanged: Exchanged, reductions: Reductions, share: float = 0.0) -> float:
    """What the embedding's gradient is alive with, beyond what the step counts of it (both that a tied one is added of).

    It is made, of a tied one as a third tensor; it waits whole while what came before is reduced; it has moved into
    the bucket, if that holds it, when the last reduction comes. `share`: this rank's of the gradients, which is there
    after the first reduction.
    """
    own, width = exchanged.table.reduced, exchanged.weight_width
    moments = [cause.moment for _, cause in reductions.each]
    made = own * (3 if exchanged.is_tied else 1) - share * (not set(moments) - {MOMENTS[3]})
    waiting = own + reductions.largest(MOMENTS[3]) * width - share * (moments[:1] == [MOMENTS[3]])
    stays = own if own > ZERO.bucket * width else 0
    last = reductions.final * width + stays - share * (not moments)
    return max(made, waiting, last) - own * (2 if exchanged.is_tied else 0)


def _zero3(exchanged: Exchanged) -> Buffers:
    """DeepSpeed 0.19's stage 3 (runtime/zero/stage3.py, partitioned_param_coordinator.py).

    The reduce bucket is there from the start, and from the first step on every small parameter whole; what is gathered
    of the others follows from the order of the modules' calls (planner.zero_replay). What the bucket holds is copied
    flat to be reduced (reduce_scatter_coalesced); before the step the share of the gradients is
    copied too (_prepare_fp32_grad_for_sub_group), while the small parameters are split for a moment.
    """
    width = exchanged.weight_width
    passes = exchanged.passes()
    live = gathered(passes, reuse=ZERO.reuse, prefetch=ZERO.prefetch)
    reductions = backward_reductions(passes, ZERO.bucket)
    copies = _copies(exchanged, reductions, 0.0)
    # Of one embedding's gradient the step counts itself.
    table = _embedding_reduction(exchanged, reductions) - exchanged.table.reduced
    return Buffers(
        always=ZERO.bucket * width,
        kept=exchanged.small_bytes,
        first_gather=live["first_gather"],
        forward=live["forward"],
        loss=live["loss"],
        head_backward=live["head_backward"],
        last_layer_backward=live["last_layer_backward"],
        first_layer_backward=live.get("first_layer_backward", 0),
        embedding_backward=live.get("embedding_backward", 0) + table,
        optimizer=_zero3_optimizer(exchanged),
        eval_gather=live["eval_gather"],
        eval=live["eval"],
        eval_loss=live["eval_loss"],
        copies=_distinct(replace(c, held=c.held + live[c.moment]) for c in copies if c.moment in live),
    )


def _zero3_optimizer(exchanged: Exchanged) -> float:
    if exchanged.is_offloaded:
        return 0.0
    flat = _zero_optimizer(exchanged, exchanged.gradients_bytes / exchanged.ranks)
    return max(flat - exchanged.small_bytes, -exchanged.step_bytes / exchanged.ranks)


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
    table = exchanged.table
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
            name="zero1",
            summary="optimizer states split (DeepSpeed)",
            shards_gradients=True,
            shards_optimizer=True,
            accumulates_whole=True,
            copies_share=True,
            casts_adapters=True,
            reduces_last=True,
            buffers=_zero1,
        ),
        Strategy(
            name="zero2",
            summary="optimizer states and gradients split (DeepSpeed)",
            shards_gradients=True,
            shards_optimizer=True,
            copies_share=True,
            casts_adapters=True,
            moves_gradients=True,
            buffers=_zero2,
        ),
        Strategy(
            name="zero3",
            summary="everything split (DeepSpeed)",
            shards_weights=True,
            shards_gradients=True,
            shards_optimizer=True,
            copies_share=True,
            casts_adapters=True,
            moves_gradients=True,
            keeps_gradients=True,
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
