"""Sharding strategies: one entry each; what a rank holds of weights, gradients and optimizer states, and which buffers it adds.

Sources: torch.distributed.fsdp (_fully_shard), torch.nn.parallel.DistributedDataParallel, DeepSpeed's ZeRO
configuration defaults (reduce and all-gather buckets of 5e8 elements, parameters below 1e5 elements kept whole).
"""

from __future__ import annotations

from dataclasses import dataclass

ZERO_BUCKET_ELEMENTS = 500_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """Which of the training state is split over the ranks.

    `gathered_groups`: copies of one layer's whole parameters alive at once (the layer at work, the next one's
    prefetched buffer, and the flat buffer that is being copied out); the root group, which holds everything
    outside the layers, stays gathered beside them.
    `gradient_copies`: whole copies of the gradients beside them (DDP's reduce buckets).
    `bucket_elements`: size of a communication bucket, bounded by what there is to communicate.
    `splits_layers`: layers are divided over the cards, one after the other (naive pipeline).
    """

    name: str
    summary: str
    shards_weights: bool = False
    shards_gradients: bool = False
    shards_optimizer: bool = False
    gathered_groups: float = 0.0
    gradient_copies: float = 0.0
    bucket_elements: int = 0
    splits_layers: bool = False
    uses_nccl: bool = True


STRATEGIES: dict[str, Strategy] = {
    s.name: s
    for s in (
        Strategy(name="none", summary="one GPU", uses_nccl=False),
        Strategy(name="ddp", summary="every GPU holds everything", gradient_copies=1.0),
        Strategy(
            name="zero1",
            summary="optimizer states split (DeepSpeed)",
            shards_optimizer=True,
            bucket_elements=ZERO_BUCKET_ELEMENTS,
        ),
        Strategy(
            name="zero2",
            summary="optimizer states and gradients split (DeepSpeed)",
            shards_gradients=True,
            shards_optimizer=True,
            bucket_elements=ZERO_BUCKET_ELEMENTS,
        ),
        Strategy(
            name="zero3",
            summary="everything split (DeepSpeed)",
            shards_weights=True,
            shards_gradients=True,
            shards_optimizer=True,
            gathered_groups=2.0,
            bucket_elements=ZERO_BUCKET_ELEMENTS,
        ),
        Strategy(
            name="fsdp",
            summary="everything split (torch FSDP2)",
            shards_weights=True,
            shards_gradients=True,
            shards_optimizer=True,
            gathered_groups=3.0,
        ),
        Strategy(
            name="fsdp1",
            summary="everything split (torch FSDP1, flat parameters)",
            shards_weights=True,
            shards_gradients=True,
            shards_optimizer=True,
            gathered_groups=3.0,
        ),
        Strategy(
            name="device_map",
            summary="layers divided over the GPUs, one works at a time",
            splits_layers=True,
            uses_nccl=False,
        ),
    )
}
