"""Tracing one rank of several: a process group without processes, and what sharding does to storages.

Collectives of torch's fake process group move nothing. FSDP2 keeps Python references to its buffers as long as the
device needs them (torch/distributed/fsdp/_fully_shard: no record_stream), so which storages are alive when is the
same for the CPU and for CUDA's streams; only reserved memory differs, since each stream has its own pool.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import distributed
from torch.utils._pytree import tree_flatten

from bench import ranks
from bench.trace.recording import HOST
from bench.trace.tracker import Tracker

BUFFER = "temporary"
"""The category of gathered weights and of what is being sent."""


@contextmanager
def fake_ranks(num_ranks: int) -> Iterator[None]:
    """Inside, this process is rank 0 of `num_ranks` whose collectives do nothing."""
    from torch.distributed._tools import fake_collectives  # noqa: F401 (collectives of fake tensors)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    try:
        with ExitStack() as stack:
            # It compares shapes between ranks by their values.
            stack.enter_context(
                mock.patch.object(distributed, "_verify_param_shape_across_processes", _agree)
            )
            stack.enter_context(mock.patch.object(ranks, "DistributedDataParallel", _fixed_buckets))
            yield
    finally:
        dist.destroy_process_group()


def _fixed_buckets(module: nn.Module) -> distributed.DistributedDataParallel:
    """DDP that doesn't sort its buckets anew after the first step, which needs values; their sum stays the same."""
    return distributed.DistributedDataParallel(module, find_unused_parameters=True)


def let_buckets_pass(model: Any) -> None:
    """Give DDP an all-reduce whose result is the bucket itself; the fake process group's has none."""
    if isinstance(model, distributed.DistributedDataParallel):
        # torch wants a hook with its own annotations or with none.
        model.register_comm_hook(None, lambda _, bucket: _reduced(bucket.buffer()))


def _reduced(result: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    dist.all_reduce(result)
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(result)
    return future


def _agree(*_: Any) -> None:
    """All ranks have the same parameters."""


class RankTracker(Tracker):
    """A tracker that sees into sharded tensors and follows storages that are emptied and filled again."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let a DTensor take itself apart first: its local tensors come back here."""
        if any(t.__name__ == "DTensor" for t in types):
            return NotImplemented
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if _is_collective(func):
            for tensor in tree_flatten(args)[0]:
                if isinstance(tensor, torch.Tensor):
                    self._mark_buffer(tensor)
        return result

    def _mark_buffer(self, tensor: torch.Tensor) -> None:
        """What takes part in a collective, and isn't known to be something else, is a buffer."""
        record = self._live.get(tensor.untyped_storage()._cdata)
        if record is not None and record.category is None:
            record.category = BUFFER

    def mark(self, tensor: torch.Tensor, category: str) -> None:
        """Say what a tensor's storage is for; of a sharded one, what this rank's share is for."""
        super().mark(getattr(tensor, "_local_tensor", tensor), category)

    @contextmanager
    def resizes(self) -> Iterator[None]:
        """Inside, a storage that is resized to nothing counts as freed, and as a new one when it grows again."""
        resize = torch.UntypedStorage.resize_

        def resize_(storage: Any, num_bytes: int) -> Any:
            self.forget(storage)
            result = resize(storage, num_bytes)
            if num_bytes:
                self.register_storage(storage, "resize_")
                self._live[storage._cdata].category = BUFFER
            return result

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resize_))
            yield


class LiveTracker(RankTracker):
    """The same for tensors that have values, and collectives that run.

    gloo's own thread lets go of a collective's tensors a moment after it is done: the next operator waits for that,
    so that the peak doesn't depend on the scheduler.
    """

    has_values = True
    _is_settling = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator, some milliseconds after a collective."""
        if self._is_settling and not _is_collective(func):
            self._is_settling = False
            time.sleep(SETTLING_S)
        self._is_settling = self._is_settling or _is_collective(func)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def register_storage(self, storage: torch.UntypedStorage, op: str, *details: Any) -> None:
        """A view of something that no operator has made is gloo's own copy of what it reduces; NCCL makes none.

        What lies on the meta device has no memory.
        """
        super().register_storage(storage, op, *details)
        if op == "split" or storage.device.type == "meta":
            self.storages[-1].category = HOST


SETTLING_S = 0.005


def _is_collective(func: Any) -> bool:
    name: str = func._schema.name
    return name.startswith("c10d::")


@contextmanager
def unseen_propagation(tracker: Tracker) -> Iterator[None]:
    """Hide what DTensor runs to learn an operator's result shapes: on whole tensors, without memory, and only the
    first time in a process (torch/distributed/tensor/_sharding_prop.py).
    """
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    original = ShardingPropagator._propagate_tensor_meta_non_cached

    def propagate(self: Any, *args: Any) -> Any:
        was_paused, tracker.is_paused = tracker.is_paused, True
        try:
            return original(self, *args)
        finally:
            tracker.is_paused = was_paused

    with mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", propagate):
        yield
