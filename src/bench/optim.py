"""TrainSetup -> optimizer and learning-rate schedule.

Whatever the setup asks for, the caller sees `param_groups`, `step`, `zero_grad`, `state_dict` and `load_state_dict`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from bench.build import trained_parameters
from planner.errors import FinefitError, MissingExtraError
from planner.methods import peak_learning_rate
from planner.optimizers import find_optimizer
from planner.recipes import WARMUP_SHARE
from planner.setup import TrainSetup


class Steppable(Protocol):
    """What a training step needs of an optimizer."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters with their rates."""

    def step(self) -> Any:
        """Change the parameters by their gradients."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free the gradients."""

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take such a state over."""


def build_optimizer(setup: TrainSetup, model: nn.Module) -> Steppable:
    """The setup's optimizer over the model's trained parameters. Raises FinefitError when nothing trains."""
    parameters = list(trained_parameters(model).values())
    if not parameters:
        raise FinefitError(f"{setup.model_label}: method {setup.method} trains no parameter of this model")
    if setup.optimizer_in_backward:
        return BackwardOptimizer(setup, parameters)
    if setup.master_weights == "float32":
        return MasterWeights(setup, parameters)
    optimizer: Steppable = plain_optimizer(setup, parameters)
    return optimizer


def plain_optimizer(setup: TrainSetup, parameters: Iterable[nn.Parameter]) -> Any:
    """The optimizer's own class; biases and norms (one dimension) don't decay."""
    entry = find_optimizer(setup.optimizer)
    module_name, _, class_name = entry.factory.rpartition(".")
    try:
        factory = getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        raise MissingExtraError("train", "train", module_name.partition(".")[0]) from error
    parameters = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": setup.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if not setup.weight_decay:
        groups = [{"params": parameters, "weight_decay": 0.0}]
    return factory([g for g in groups if g["params"]], lr=peak_learning_rate(setup), **entry.kwargs)


class MasterWeights:
    """Steps float32 copies of 16-bit parameters, as DeepSpeed and Megatron do, and rounds the result back.

    Without the copies, an update below half the spacing of bfloat16 (2**-9 of a weight) is lost.
    """

    def __init__(self, setup: TrainSetup, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.masters = [nn.Parameter(p.detach().float()) for p in parameters]
        self.inner = plain_optimizer(setup, self.masters)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups."""
        groups: list[dict[str, Any]] = self.inner.param_groups
        return groups

    def step(self) -> None:
        """Each 16-bit gradient is freed as soon as its float32 copy is there."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.data.copy_(master.data)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The inner state and the float32 weights."""
        return {"inner": self.inner.state_dict(), "masters": [m.detach() for m in self.masters]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take both over."""
        self.inner.load_state_dict(state_dict["inner"])
        for master, saved in zip(self.masters, state_dict["masters"], strict=True):
            master.data.copy_(saved)


class BackwardOptimizer:
    """One optimizer per parameter, stepped in the backward as soon as its gradient is whole, which is then freed.

    There is never more than one layer's gradients in memory, so there is no norm of all gradients to clip by.
    """

    def __init__(self, setup: TrainSetup, parameters: list[nn.Parameter]) -> None:
        self.optimizers = [plain_optimizer(setup, [p]) for p in parameters]
        for parameter, optimizer in zip(parameters, self.optimizers, strict=True):
            parameter.register_post_accumulate_grad_hook(_stepper(optimizer))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        """Nothing is left to do: the backward has stepped."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing is left to free."""

    def state_dict(self) -> dict[str, Any]:
        """One state for each parameter, in the model's order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        for optimizer, saved in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def _stepper(optimizer: Any) -> Any:
    def step(_: torch.Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Learning rate by optimizer step: linear warm-up to `peak`, then `shape` down to 0 at `num_steps`."""

    peak: float
    num_steps: int
    warmup_steps: int
    shape: str

    def __call__(self, step: int) -> float:
        """The rate of optimizer step `step`, counted from 0; never 0 within the run."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        done = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        return self.peak * _SHAPES[self.shape](min(1.0, done))


_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1.0 - done,
    "constant": lambda done: 1.0,
}


def build_schedule(setup: TrainSetup, num_steps: int) -> Schedule:
    """The setup's schedule for a run of `num_steps` optimizer steps."""
    warmup = setup.warmup_steps
    if warmup is None:
        warmup = math.ceil(WARMUP_SHARE * num_steps)
    return Schedule(
        peak=peak_learning_rate(setup), num_steps=num_steps, warmup_steps=warmup, shape=setup.schedule
    )


def set_learning_rate(optimizer: Steppable, learning_rate: float) -> None:
    """Give every group of the optimizer this rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
