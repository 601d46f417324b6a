"""Where a run is: what its checkpoints carry, and how it comes back there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from bench.build import drawn_parameters
from bench.checkpoint import (
    KEEP,
    Checkpoint,
    check_disk,
    load_weights,
    newest_checkpoint,
    random_state,
    read_checkpoint,
    remove_leftovers,
    save_checkpoint,
    set_random_state,
    tensor_bytes,
)
from bench.divergence import Divergence
from bench.early_stop import HeldOut
from bench.metrics import MetricsLog
from bench.runfolder import RunFolder
from bench.step import TrainStep
from bench.world import World
from planner.errors import FinefitError
from planner.optimizers import find_optimizer
from planner.setup import TrainSetup


@dataclass(kw_only=True, slots=True)
class RunState:
    """Where a run is; what a checkpoint carries beside tensors. Times in seconds, tokens without padding.

    `samples`: the answers to the prompts, by the step (as text) after which they were given.
    """

    step: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    train_s: float = 0.0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    divergence: Divergence = field(default_factory=Divergence)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> RunState:
        """From a checkpoint. Raises TypeError for what isn't this state."""
        return cls(**{**values, "divergence": Divergence(**values.get("divergence", {}))})


class Position:
    """The state of a run in its folder, and the tensors of its training step.

    `random` are the generators' states after the last step; `saved_step` is None before the first checkpoint.
    """

    def __init__(
        self,
        folder: RunFolder,
        train_step: TrainStep,
        model: nn.Module,
        log: MetricsLog,
        *,
        data_sha256: str,
        rule: HeldOut,
        world: World,
    ) -> None:
        self.folder, self.train_step, self.model, self.log = folder, train_step, model, log
        self.data_sha256, self.rule, self.world = data_sha256, rule, world
        self.state = RunState()
        self.random = random_state()
        self.saved_step: int | None = None
        self.resumed_from: int | None = None

    @property
    def is_saved(self) -> bool:
        """Whether a checkpoint of this very step is there."""
        return self.saved_step == self.state.step

    def go_back(self) -> None:
        """The generators as they were after the last step, and no gradients: a step can be taken again."""
        self.train_step.optimizer.zero_grad(set_to_none=True)
        set_random_state(self.random)

    def save(self) -> None:
        """Write a checkpoint of this step. Raises FinefitError, also where the disk is too full for it."""
        weights, state = self.world.own(self.drawn()), self.world.pack(self._state_tree())
        if self.world.is_replica:
            weights, state = {}, {"random": self.random}
        own_bytes = float(tensor_bytes(weights) + tensor_bytes(state))
        check_disk(self.folder.root, round(self.world.total(own_bytes)[0]))
        if self.world.is_first:
            self.log.sync()
        best_step = self.rule.best_step(self.state.evaluations)
        save_checkpoint(
            self.folder.checkpoints,
            self.state.step,
            weights,
            state,
            spared_step=best_step,
            world=self.world,
        )
        self.saved_step = self.state.step

    def take_best(self) -> int:
        """Put the weights of the best evaluation back where they are kept, the last ones else; their step."""
        best_step = self.rule.best_step(self.state.evaluations)
        if best_step is None or best_step == self.state.step:
            return self.state.step
        best = read_checkpoint(self.folder.checkpoints, best_step, self.world)
        if best is None:
            self.folder.note(
                f"the best checkpoint, step {best_step}, is torn: the result is of the last step"
            )
            return self.state.step
        load_weights(self.world.own(self.drawn()), best.weights)
        if self.world.draws_on_optimizer:
            self.train_step.optimizer.load_state_dict(_mutable(best.state["optimizer"]))
        return best_step

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """What the run has made, gathered on the first rank's host, one weight at a time; every rank must ask."""
        found = {}
        for name, parameter in self.drawn().items():
            whole = self.world.whole(parameter)
            if self.world.is_first:
                found[name] = whole
        return found

    def drawn(self) -> dict[str, nn.Parameter]:
        """What the run has made, as this rank's model holds it."""
        self.world.split_again()
        return drawn_parameters(self.train_step.setup, self.model)

    def _state_tree(self) -> dict[str, Any]:
        scaler = self.train_step.scaler
        return {
            "run": asdict(self.state),
            "random": self.random,
            "optimizer": self.train_step.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "data_sha256": self.data_sha256,
        }

    def restore(self) -> None:
        """Take over the newest whole checkpoint, and drop the metrics of steps that are taken again."""
        if self.world.is_first:
            remove_leftovers(self.folder.checkpoints)
        checkpoint, notes = newest_checkpoint(self.folder.checkpoints, self.world)
        if notes and checkpoint is None:
            notes.append("no checkpoint is whole: the run starts again")
        self.folder.note(*notes)
        if checkpoint is not None:
            self._take_over(checkpoint)
        if not self.world.is_first:
            return
        num_torn = self.log.keep(self._is_kept)
        if num_torn:
            self.folder.note(f"{self.log.path.name}: {num_torn} torn lines are left out")

    def _is_kept(self, entry: Mapping[str, Any]) -> bool:
        """Whether a line of metrics.jsonl still holds; a rung that was taken does."""
        kind, step = entry["kind"], entry["step"]
        if kind == "eval":
            return any(e["step"] == step for e in self.state.evaluations)
        if kind == "sample":
            return str(step) in self.state.samples
        return kind == "retry" or bool(step <= self.state.step)

    def _take_over(self, checkpoint: Checkpoint) -> None:
        state = self.world.unpack(checkpoint.state)
        if state["data_sha256"] != self.data_sha256 and not self.folder.allow_changes:
            raise FinefitError(
                f"{self.folder.plan.setup.data} is not what it was when {checkpoint.path} was written; put the old data back, "
                "choose another --out, or allow the changes"
            )
        load_weights(self.world.own(self.drawn()), checkpoint.weights)
        try:
            self.train_step.optimizer.load_state_dict(_mutable(state["optimizer"]))
            if self.train_step.scaler is not None and state["scaler"]:
                self.train_step.scaler.load_state_dict(state["scaler"])
            self.state = RunState.read(state["run"])
        except (KeyError, TypeError, ValueError) as error:
            raise FinefitError(
                f"{checkpoint.path} is of another finefit or another optimizer ({error}); choose another --out"
            ) from error
        self.random = state["random"]
        set_random_state(self.random)
        self.train_step.num_steps_done = self.state.step
        self.saved_step = self.resumed_from = checkpoint.step

    def needed_bytes(self) -> int:
        """Disk: the checkpoints that stay, the one being written, and the final adapter or model."""
        weights = self.drawn()
        num_kept = KEEP + 1 + self.rule.keep_best
        return num_kept * checkpoint_bytes(self.train_step.setup, weights) + tensor_bytes(weights)


def checkpoint_bytes(setup: TrainSetup, weights: Mapping[str, torch.Tensor]) -> int:
    """What one checkpoint takes on disk, before there is an optimizer state to look at."""
    entry = find_optimizer(setup.optimizer)
    has_masters = setup.master_weights == "float32"
    total = 0
    for tensor in weights.values():
        element_bytes = 4 if has_masters else tensor.element_size()
        # DeepSpeed's name for the shape of a weight that is elsewhere
        shape = getattr(tensor, "ds_shape", tensor.shape)
        dims = (shape[0], shape.numel() // shape[0]) if len(shape) > 1 else None
        total += shape.numel() * (tensor.element_size() + 4 * has_masters)
        total += entry.state_bytes(shape.numel(), element_bytes, dims)
    return total


def _mutable(state: Any) -> dict[str, Any]:
    """Optimizers take their state over by changing it."""
    return dict(state)
