"""THE training step: the trace, the benchmark and the run all execute this one.

forward, loss and backward of each micro-batch; then clip, step and free the gradients. Nothing in here waits for
the device or looks at a value, so it runs on fake tensors too (float16's loss scaling excepted).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bench.build import torch_dtype, trained_parameters
from bench.loss import Batch, Loss, Phase
from bench.objectives import OBJECTIVES
from bench.optim import Schedule, Steppable, set_learning_rate
from bench.signals import StopRequestedError
from planner.setup import TrainSetup


def no_phase(name: str) -> AbstractContextManager[Any]:
    """The phase callback of a step that nobody watches."""
    return nullcontext()


def never() -> bool:
    """Nobody asks for a stop."""
    return False


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepResult:
    """Tensors still on the device: reading them is what waits for it.

    `loss` is the mean over the step's trained tokens, or pairs; `grad_norm` the norm before clipping, None without.
    `metrics`: what the objective says beside the loss.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor | None
    learning_rate: float
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)


class TrainStep:
    """One optimizer step over the micro-batches of a global batch.

    `phase(name)` is entered around "forward", "loss", "backward" and "optimizer". `should_stop` is asked after
    each micro-batch but the last. `on_gradients(model)` sees the gradients before they are clipped (never with
    optimizer_in_backward, which frees them at once); `before_update(loss, grad_norm)` may raise, and the model is as
    before the step (but for optimizer_in_backward, and under DeepSpeed, which updates by itself). `num_steps_done` picks the learning rate; a resumed run
    sets it.
    """

    def __init__(
        self,
        setup: TrainSetup,
        model: nn.Module,
        optimizer: Steppable,
        *,
        schedule: Schedule | None = None,
        phase: Phase = no_phase,
        should_stop: Callable[[], bool] = never,
        on_gradients: Callable[[nn.Module], None] | None = None,
        before_update: Callable[[torch.Tensor, torch.Tensor | None], None] | None = None,
    ) -> None:
        self.setup, self.model, self.optimizer = setup, model, optimizer
        self.schedule, self.phase, self.should_stop = schedule, phase, should_stop
        self.on_gradients, self.before_update = on_gradients, before_update
        self.num_steps_done = 0
        self.parameters = list(trained_parameters(model).values())
        self.device = self.parameters[0].device
        self.objective = OBJECTIVES[setup.objective](setup)
        self.loss: Loss = self.objective.loss
        self.scaler = torch.amp.GradScaler(self.device.type) if _needs_scaler(setup) else None

    def __call__(self, micro_batches: Sequence[Batch], *, num_items: float) -> StepResult:
        """Train on the micro-batches, already on the device; `num_items` counts all
        their trained tokens, or pairs.

        Raises StopRequestedError between micro-batches, with the partial gradients thrown away and the model
        as before the step.
        """
        learning_rate = self._set_learning_rate()
        # Of a step that was given up, or of an evaluation.
        self.objective.take_metrics()
        losses = []
        for number, batch in enumerate(micro_batches, start=1):
            with self.exchange(number == len(micro_batches)):
                losses.append(self.micro_step(batch, num_items))
            if number < len(micro_batches) and self.should_stop():
                self.optimizer.zero_grad(set_to_none=True)
                raise StopRequestedError
        with self.phase("optimizer"):
            grad_norm = self.update(losses)
        self.num_steps_done += 1
        return StepResult(
            loss=torch.stack(losses).sum(),
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            metrics=self.objective.take_metrics(),
        )

    def exchange(self, is_last: bool) -> AbstractContextManager[Any]:
        """Entered around each micro-batch; several ranks exchange gradients in the last one only."""
        return nullcontext()

    def micro_step(self, batch: Batch, num_items: float) -> torch.Tensor:
        """Forward, loss and backward of one micro-batch: its share of the step's loss, detached."""
        loss = self.forward(batch, num_items)
        with self.phase("backward"):
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss.detach()

    def forward(self, batch: Batch, num_items: float) -> torch.Tensor:
        """The loss of one micro-batch; evaluation uses it under no_grad."""
        with autocast(self.setup, self.device):
            return self.loss(self.model, batch, num_items, self.phase)

    def gradient(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """A parameter's whole gradient, before the update; every rank must ask."""
        return parameter.grad

    def update(self, losses: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Clip, step, free the gradients; the gradients' norm before clipping, None without clipping.

        `losses`: each micro-batch's share of the step's.
        """
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.on_gradients is not None and not self.setup.optimizer_in_backward:
            self.on_gradients(self.model)
        grad_norm = self._clip()
        if self.before_update is not None:
            self.before_update(torch.stack(losses).sum(), grad_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def _clip(self) -> torch.Tensor | None:
        if self.setup.max_grad_norm is None or self.setup.optimizer_in_backward:
            return None
        norm: torch.Tensor = nn.utils.clip_grad_norm_(self.parameters, self.setup.max_grad_norm)
        return norm

    def _set_learning_rate(self) -> float:
        if self.schedule is not None:
            set_learning_rate(self.optimizer, self.schedule(self.num_steps_done))
        return float(self.optimizer.param_groups[0]["lr"])


def autocast(setup: TrainSetup, device: torch.device) -> AbstractContextManager[Any]:
    """The forward's autocast, if the setup has one."""
    if setup.autocast is None:
        return nullcontext()
    context: AbstractContextManager[Any] = torch.autocast(device.type, torch_dtype(setup.autocast))
    return context


def _needs_scaler(setup: TrainSetup) -> bool:
    """float16 gradients underflow unless the loss is scaled up."""
    return "float16" in (setup.autocast, setup.weights_dtype)
