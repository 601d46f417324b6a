"""One rank of several: the step whose model and optimizer are shared as the setup's sharding says.

A process group must be there, one process per rank. The wrappers are those that accelerate would use: torch's DDP
and FSDP2, DeepSpeed's ZeRO stages with the configuration that finefit exports. What is wrapped is a module that
computes the loss, so that whatever reads the weights runs inside the wrapper's forward.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import _disable_current_modes

from bench.build import inner_model, torch_dtype, trained_parameters
from bench.loss import Batch, Loss, Phase
from bench.objectives import OBJECTIVES
from bench.optim import build_optimizer
from bench.step import StepResult, TrainStep
from bench.zero import ZeroOptimizer, whole_gradient
from planner.errors import MissingExtraError, NotModelledError
from planner.export import deepspeed as deepspeed_config
from planner.setup import TrainSetup


class LossModule(nn.Module):  # type: ignore[misc]
    """A model and its loss as one module."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Batch, num_trained: float, phase: Phase) -> torch.Tensor:
        """The loss of one micro-batch: see bench.loss."""
        return self.loss(self.model, batch, num_trained, phase)


def wrapped_loss(model: nn.Module, batch: Batch, num_trained: float, phase: Phase) -> torch.Tensor:
    """The loss of a wrapped LossModule."""
    loss: torch.Tensor = model(batch, num_trained, phase)
    return loss


def rank_step(setup: TrainSetup, model: nn.Module, *, loss: Loss | None = None, **options: Any) -> TrainStep:
    """This rank's training step. The model's weights must be on the rank's device; they are sharded in place.

    `loss` replaces that of the setup; `options` are TrainStep's. Raises NotModelledError for a sharding that has no wrapper here, AssertionError
    where the process group has another size than the setup asks for.
    """
    assert dist.get_world_size() == setup.num_gpus, f"{dist.get_world_size()} processes for {setup.num_gpus}"
    wrap = _WRAPPERS.get(setup.sharding)
    if wrap is None:
        raise NotModelledError(
            f"sharding: {setup.sharding} can't be run here; {', '.join(sorted(_WRAPPERS))} can"
        )
    return wrap(setup, LossModule(model, loss or OBJECTIVES[setup.objective](setup).loss), options)


class _RankStep(TrainStep):
    """A step whose model averages gradients over the ranks itself, in the last backward of a global batch only.

    That is what accelerate does unless it is told `sync_each_batch` (Accelerator.no_sync).
    """

    def __call__(self, micro_batches: Sequence[Batch], *, num_items: float) -> StepResult:
        """Train on this rank's micro-batches; `num_items` counts all ranks'. The loss is all ranks', too."""
        size = dist.get_world_size()
        result = super().__call__(micro_batches, num_items=num_items / size)
        dist.all_reduce(result.loss)
        norm = result.grad_norm
        if norm is not None and hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        return replace(result, loss=result.loss / size, grad_norm=norm)

    def gradient(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """See TrainStep."""
        gradient = parameter.grad
        return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient

    def exchange(self, is_last: bool) -> AbstractContextManager[Any]:
        """Around each micro-batch: gradients of all but the last stay this rank's, and whole."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(is_last)
            return nullcontext()
        silence: AbstractContextManager[Any] = nullcontext() if is_last else self.model.no_sync()
        return silence


def _step(setup: TrainSetup, wrapped: nn.Module, options: Mapping[str, Any]) -> TrainStep:
    step = _RankStep(setup, wrapped, build_optimizer(setup, wrapped), **options)
    step.loss = wrapped_loss
    return step


def _ddp_step(setup: TrainSetup, module: LossModule, options: Mapping[str, Any]) -> TrainStep:
    """DDP with its defaults, which are accelerate's (DistributedDataParallelKwargs): buckets beside the gradients."""
    return _step(setup, DistributedDataParallel(module), options)


# --- FSDP2, in the groups of accelerate.utils.fsdp_utils.fsdp2_prepare_model (accelerate 1.15)


def _fsdp_step(setup: TrainSetup, module: LossModule, options: Mapping[str, Any]) -> TrainStep:
    if setup.autocast is not None:
        _upcast_trained(module)
    shard_groups(setup, module)
    assert isinstance(module, FSDPModule)
    return _step(setup, module, options)


def _upcast_trained(module: nn.Module) -> None:
    """Under mixed precision accelerate shards what trains in float32; it is gathered in 16 bits."""
    for parameter in trained_parameters(module).values():
        parameter.data = parameter.data.float()


def shard_groups(setup: TrainSetup, module: LossModule, *, reshard_after_forward: bool = True) -> None:
    """Make each layer, the embedding, and final norm with head a group of their own; the rest is the root's.

    The last group stays gathered from its forward to its backward. A tied embedding belongs to it.
    """
    inner = inner_model(module.model)
    device = next(module.parameters()).device
    # A table of ranks, which has values even where the weights are fake.
    with _disable_current_modes():
        mesh = init_device_mesh(device.type, (setup.num_gpus,))
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": _mixed_precision(setup),
        "offload_policy": _offload(setup),
    }
    for layer in _layers(inner):
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    if not is_tied:
        fully_shard(embedding, reshard_after_forward=reshard_after_forward, **options)
    tail = [_final_norm(inner), embedding if is_tied else None, head]
    fully_shard([m for m in tail if m is not None], reshard_after_forward=False, **options)
    fully_shard(module, **options)


def _mixed_precision(setup: TrainSetup) -> MixedPrecisionPolicy:
    dtype = None if setup.autocast is None else torch_dtype(setup.autocast)
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype)


def _offload(setup: TrainSetup) -> OffloadPolicy:
    # Pinned memory needs a GPU.
    return (
        OffloadPolicy() if setup.offload == "none" else CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    )


def _layers(inner: Any) -> Iterator[nn.Module]:
    """The modules that transformers says must not be split, innermost first."""
    names = set(inner._no_split_modules or ())
    return (m for m in reversed(list(inner.modules())) if type(m).__name__ in names)


def _final_norm(inner: Any) -> nn.Module | None:
    """The last norm among the direct children of the model without its head."""
    norms = [m for m in inner.base_model.children() if "Norm" in type(m).__name__]
    return norms[-1] if norms else None


# --- DeepSpeed's ZeRO stages, with the configuration that finefit exports


class _EngineStep(_RankStep):
    """A step whose backward, clipping and update are the engine's.

    As under accelerate (DeepSpeedEngineWrapper) the engine is told which micro-batch is the last one, and steps once.
    """

    def exchange(self, is_last: bool) -> AbstractContextManager[Any]:
        """Stage 1 exchanges in the last micro-batch; from stage 2 on each adds to this rank's share."""
        self.model.set_gradient_accumulation_boundary(is_boundary=is_last)
        return nullcontext()

    def micro_step(self, batch: Batch, num_items: float) -> torch.Tensor:
        """Forward, loss and backward of one micro-batch."""
        loss = self.forward(batch, num_items)
        with self.phase("backward"):
            # The loss is a share of the step's mean already.
            self.model.backward(loss, scale_wrt_gas=False)
        return loss.detach()

    def gradient(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """See TrainStep."""
        return whole_gradient(parameter)

    def update(self, losses: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Clip, step, free the gradients; the gradients' norm before clipping, None without clipping."""
        if self.on_gradients is not None:
            self.on_gradients(self.model)
        self.model.step()
        norm = self.model.get_global_grad_norm()
        return None if norm is None else torch.as_tensor(norm)


def _zero_step(setup: TrainSetup, module: LossModule, options: Mapping[str, Any]) -> TrainStep:
    """Raises MissingExtraError without DeepSpeed, NotModelledError for an optimizer that its config can't name."""
    if setup.optimizer not in deepspeed_config.ADAMW:
        raise NotModelledError(f"optimizer: {setup.optimizer} can't be run under DeepSpeed here; use adamw")
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise MissingExtraError("train", "export", "deepspeed") from error
    trained = list(trained_parameters(module).values())
    config = deepspeed_config.config(setup)
    engine, optimizer, *_ = deepspeed.initialize(model=module, model_parameters=trained, config=config)
    stage = deepspeed_config.STAGES[setup.sharding]
    assert engine.zero_optimization_stage() == stage, f"stage {engine.zero_optimization_stage()}"
    assert engine.world_size == setup.num_gpus, f"{engine.world_size} processes for {setup.num_gpus}"
    step = _EngineStep(setup, engine, ZeroOptimizer(optimizer), **options)
    step.loss = wrapped_loss
    return step


_WRAPPERS: dict[str, Callable[[TrainSetup, LossModule, Mapping[str, Any]], TrainStep]] = {
    "ddp": _ddp_step,
    "fsdp": _fsdp_step,
    "zero1": _zero_step,
    "zero2": _zero_step,
    "zero3": _zero_step,
}
