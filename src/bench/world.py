"""The processes of one run: one alone, or several ranks that share its batches and stop, save and end together.

A run asks its world only: which share of a batch is mine, is anyone asked to stop, what do I save.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import nn

from bench.build import one_line
from bench.launch import LostPeerError
from bench.optim import build_optimizer
from bench.rank_laws import ZERO_STAGES
from bench.signals import StopFlag
from bench.step import TrainStep
from planner.errors import UsageError
from planner.setup import TrainSetup
from planner.sharding import STRATEGIES

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another: the first loads and tokenises while the others do nothing."""

_SHARD, _WHOLE = "shard", "whole_shape"


class World:
    """One process alone, the first rank of one."""

    rank, size = 0, 1
    draws_on_optimizer = False
    """Whether weights are saved and restored with the optimizer's state only."""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what there is once."""
        return self.rank == 0

    @property
    def is_replica(self) -> bool:
        """Whether all that trains is the same on the first rank, which saves it."""
        return False

    def build_step(self, setup: TrainSetup, model: nn.Module, **options: Any) -> TrainStep:
        """The training step with its optimizer."""
        return TrainStep(setup, model, build_optimizer(setup, model), **options)

    def share(self, items: Sequence[T]) -> list[T | None]:
        """This rank's share; None where another has one more, since all take as many steps."""
        own: list[T | None] = list(items[self.rank :: self.size])
        return own + [None] * (-(-len(items) // self.size) - len(own))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag

    def total(self, *numbers: float) -> list[float]:
        """Each number's sum over the ranks."""
        return list(numbers)

    def first_word(self, word: str | None) -> str | None:
        """The word of the first rank that has one."""
        return word

    def wait(self) -> None:
        """Until all ranks are here."""

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first rank before the others, which then find what it has cached."""
        yield

    @property
    def splits_weights(self) -> bool:
        """Whether this rank holds a part of each weight only."""
        return False

    def split_again(self) -> None:
        """Give up weights that are gathered: an evaluation leaves some so."""

    def own(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights as this rank holds them."""
        return dict(weights)

    def pack(self, tree: Any) -> Any:
        """Tensors that are split over the ranks as this rank's share of them, in nested dicts, lists and tuples."""
        return tree

    def unpack(self, tree: Any) -> Any:
        """What `pack` was given."""
        return tree

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that is split over the ranks, gathered."""
        return tensor


ALONE = World()


class SharedStop(StopFlag):
    """A stop that was asked for on any rank, which all ranks see at the same call; `own` is this rank's flag."""

    def __init__(self, world: World, own: StopFlag) -> None:
        super().__init__()
        self.world, self.own = world, own

    def __call__(self) -> bool:
        """Whether a stop was asked for; every rank must ask."""
        if self.world.any(self.own()):
            self.received = self.own.received or self.elsewhere
        return self.received is not None


class Ranks(World):
    """One of several processes of a process group. Values are agreed on over gloo, so that no device is waited for."""

    def __init__(self, setup: TrainSetup) -> None:
        import torch.distributed as dist

        self._dist = dist
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        assert self.size == setup.num_gpus, f"{self.size} processes for {setup.num_gpus}"
        self._strategy = STRATEGIES[setup.sharding]
        self._mesh: Any = None
        self._reshards: list[Any] = []

    @property
    def is_replica(self) -> bool:
        """See World."""
        return not (self.is_first or self._strategy.shards_optimizer)

    def build_step(self, setup: TrainSetup, model: nn.Module, **options: Any) -> TrainStep:
        """See World; the model is wrapped in place."""
        from bench.ranks import rank_step

        # What is drawn from here on (dropout) differs between ranks.
        torch.manual_seed(setup.seed + self.rank)
        step = rank_step(setup, model, **options)
        self._reshards = [m.reshard for m in step.model.modules() if hasattr(m, "reshard")]
        meshes = (getattr(p, "device_mesh", None) for p in model.parameters())
        self._mesh = next((mesh for mesh in meshes if mesh is not None), None)
        return step

    def any(self, flag: bool) -> bool:
        """See World."""
        return bool(self.total(float(flag))[0])

    def total(self, *numbers: float) -> list[float]:
        """See World."""
        sums = torch.tensor(numbers, dtype=torch.float64)
        self._dist.all_reduce(sums)
        found: list[float] = sums.tolist()
        return found

    def first_word(self, word: str | None) -> str | None:
        """See World."""
        words: list[str | None] = [None] * self.size
        self._dist.all_gather_object(words, word)
        return next((word for word in words if word is not None), None)

    def wait(self) -> None:
        """See World."""
        self.total(0.0)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """See World."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    @property
    def splits_weights(self) -> bool:
        """See World."""
        return self._strategy.shards_weights

    def split_again(self) -> None:
        """See World."""
        for reshard in self._reshards:
            reshard()

    def own(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See World."""
        return {name: getattr(tensor, "_local_tensor", tensor) for name, tensor in weights.items()}

    def pack(self, tree: Any) -> Any:
        """See World."""
        if isinstance(tree, torch.Tensor):
            local = getattr(tree, "_local_tensor", None)
            return tree if local is None else {_SHARD: local.detach(), _WHOLE: list(tree.shape)}
        return _mapped(tree, self.pack)

    def unpack(self, tree: Any) -> Any:
        """See World."""
        if isinstance(tree, Mapping) and tree.keys() == {_SHARD, _WHOLE}:
            return self._placed(tree[_SHARD], torch.Size(tree[_WHOLE]))
        return _mapped(tree, self.unpack)

    def _placed(self, local: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """FSDP2 splits along the first dimension."""
        from torch.distributed.tensor import DTensor, Shard

        stride = torch.empty(shape, device="meta").stride()
        placed: torch.Tensor = DTensor.from_local(
            local.to(self._mesh.device_type),
            self._mesh,
            [Shard(0)],
            run_check=False,
            shape=shape,
            stride=stride,
        )
        return placed

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """See World; every rank must ask, and gets it on the host."""
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        return full.detach().cpu()


class ZeroRanks(Ranks):
    """A rank under DeepSpeed, whose share of weights and optimizer is the optimizer's state."""

    draws_on_optimizer = True

    def own(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See World: the model's follow from the optimizer's."""
        return {}

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """See World."""
        from bench.zero import whole_weight

        return whole_weight(tensor)


def _mapped(tree: Any, change: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: change(item) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(change(item) for item in tree)
    return tree


def own_device(device: str) -> torch.device:
    """This rank's device of a kind; `cuda` is the one with its number, and processors are shared out."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(min(torch.get_num_threads(), max(1, (os.cpu_count() or 1) // ranks_here)))
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        own = torch.device(device, int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
        return own
    return torch.device(device)


@contextmanager
def joined(setup: TrainSetup) -> Iterator[World]:
    """The world of this process: alone, or the rank that the environment says, among its peers.

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are those of torchrun; a process group that is there already is used
    and left. Raises UsageError where there are more or fewer
    processes than the setup has GPUs, LostPeerError where the others don't come or one is gone.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size != setup.num_gpus:
        raise UsageError(
            f"started as one of {size} processes (WORLD_SIZE), but num_gpus is {setup.num_gpus}; start as many as that, "
            "or unset WORLD_SIZE and RANK"
        )
    if size == 1:
        yield ALONE
        return
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    is_owner = not dist.is_initialized()
    with _lost_peers():
        if is_owner:
            dist.init_process_group(backend, timeout=TIMEOUT)
        yield ZeroRanks(setup) if setup.sharding in ZERO_STAGES else Ranks(setup)
        if is_owner:
            dist.destroy_process_group()


_TRANSPORTS = ("gloo/transport", "NCCL", "Connection closed by peer", "Connection reset by peer", "TCPStore")
"""Words in the errors of what ranks talk through, which are plain RuntimeErrors."""


@contextmanager
def _lost_peers() -> Iterator[None]:
    """A rank that ends leaves its peers with whatever their last exchange raises.

    The group is not taken down then: that would wait for the peer.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in _TRANSPORTS):
            raise
        raise LostPeerError(f"another rank is gone ({one_line(error):.100})") from error
