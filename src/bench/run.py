"""The loop of one run: steps, evaluations, checkpoints, stops. `bench.train` prepares it and sums it up."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from bench.build import drawn_parameters, trained_parameters
from bench.chat import sample_answers
from bench.checkpoint import (
    KEEP,
    Checkpoint,
    check_disk,
    load_weights,
    newest_checkpoint,
    random_state,
    remove_leftovers,
    save_checkpoint,
    set_random_state,
    tensor_bytes,
)
from bench.evaluate import evaluate
from bench.metrics import MetricsLog, Progress, memory_now
from bench.optim import build_schedule
from bench.rundata import RunData, StepBatch
from bench.runfolder import RunFolder
from bench.signals import StopFlag, StopRequestedError
from bench.step import StepResult
from bench.world import ALONE, World
from planner.errors import FinefitError, InterruptedRunError
from planner.methods import find_method
from planner.optimizers import find_optimizer
from planner.setup import TrainSetup

SAVES_PER_RUN = 10
"""Checkpoints of a run whose caller names no interval."""


class UnsavedRunError(FinefitError):
    """Stopped by a signal before a checkpoint could be written."""

    exit_code = 143


@dataclass(kw_only=True, slots=True)
class RunState:
    """Where a run is; what a checkpoint carries beside tensors. Times in seconds, tokens without padding."""

    step: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    train_s: float = 0.0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[str, list[dict[str, str]]] = field(default_factory=dict)


class Run:
    """A model being trained in a folder.

    `save_every_steps` and `eval_every_steps` count optimizer steps; the second None evaluates before and after
    only.
    """

    def __init__(
        self,
        folder: RunFolder,
        data: RunData,
        model: nn.Module,
        tokenizer: Any,
        *,
        stop: StopFlag,
        progress: bool = True,
        save_every_steps: int | None = None,
        eval_every_steps: int | None = None,
        world: World = ALONE,
    ) -> None:
        self.setup, self.folder, self.data = data.setup, folder, data
        self.model, self.tokenizer, self.stop = model, tokenizer, stop
        self.num_steps = data.num_steps
        self.save_every_steps = save_every_steps or math.ceil(self.num_steps / SAVES_PER_RUN)
        self.eval_every_steps = eval_every_steps
        self.world = world
        self.is_shown = progress and world.is_first
        self.train_step = world.build_step(
            self.setup,
            model,
            schedule=build_schedule(self.setup, self.num_steps),
            should_stop=stop,
            on_gradients=self._check_gradients,
        )
        self.optimizer = self.train_step.optimizer
        self.device = self.train_step.device
        self.log = MetricsLog(folder.metrics)
        self.state = RunState()
        self.random = random_state()
        self.saved_step: int | None = None
        self.resumed_from: int | None = None

    def execute(self) -> None:
        """Train to the end. Raises InterruptedRunError after a stop, FinefitError when the loss is no number."""
        self._restore()
        if self.world.is_first:
            check_disk(self.folder.root, self._needed_bytes())
        self.progress = Progress(self.num_steps, self.state.step, self.is_shown)
        if self.resumed_from is not None:
            self.progress.say(f"going on after step {self.resumed_from} of {self.num_steps}")
        try:
            self._loop()
        except StopRequestedError:
            self._leave()
        finally:
            self.progress.close()

    def _loop(self) -> None:
        self._evaluate_if_due()
        while self.state.step < self.num_steps:
            self._take_step()
            is_last = self.state.step == self.num_steps
            if is_last or self.state.step % self.save_every_steps == 0:
                self._save()
            if self.stop():
                raise StopRequestedError
            self._evaluate_if_due()

    def _take_step(self) -> None:
        batch = self.data.step_batch(self.state.step, self.device, self.world)
        started = time.perf_counter()
        result = self.train_step(batch.micro_batches, num_trained_tokens=batch.num_trained_tokens)
        loss = float(result.loss)
        step_s = time.perf_counter() - started
        self.state.step += 1
        self.state.num_tokens += batch.num_tokens
        self.state.num_trained_tokens += batch.num_trained_tokens
        self.state.train_s += step_s
        self.train_step.on_gradients = None
        self._record(batch, result, loss, step_s)
        self.random = random_state()

    def _record(self, batch: StepBatch, result: StepResult, loss: float, step_s: float) -> None:
        grad_norm = None if result.grad_norm is None else float(result.grad_norm)
        tokens_per_s = batch.num_tokens / step_s
        self._log(
            "step",
            {
                "step": self.state.step,
                "loss": loss,
                "grad_norm": grad_norm,
                "learning_rate": result.learning_rate,
                "tokens": batch.num_tokens,
                "trained_tokens": batch.num_trained_tokens,
                "step_s": step_s,
                "tokens_per_s": tokens_per_s,
                **memory_now(self.device),
            },
        )
        # float16's loss scaling skips steps whose gradients overflow; that is no fault
        has_bad_norm = grad_norm is not None and not math.isfinite(grad_norm) and not self.train_step.scaler
        if has_bad_norm or not math.isfinite(loss):
            raise FinefitError(self._divergence(loss, grad_norm, result.learning_rate))
        self.progress.step(self.state.step, loss, tokens_per_s, step_s)

    def _log(self, kind: str, values: Mapping[str, Any]) -> None:
        if self.world.is_first:
            self.log.write(kind, values)

    def _divergence(self, loss: float, grad_norm: float | None, learning_rate: float) -> str:
        saved = "no checkpoint was written" if self.saved_step is None else f"step {self.saved_step} is saved"
        return (
            f"training diverged at step {self.state.step}: loss {loss}, gradient norm {grad_norm} at learning rate "
            f"{learning_rate:.3g}; lower learning_rate in a new run ({saved})"
        )

    def _evaluate_if_due(self) -> None:
        """Before, after, and every `eval_every_steps`; not again after a resume."""
        step, every = self.state.step, self.eval_every_steps
        edge = "before" if step == 0 else "after" if step == self.num_steps else None
        if not (edge or (every and step % every == 0)):
            return
        if self.data.held_out and all(e["step"] != step for e in self.state.evaluations):
            self.progress.say(f"evaluating {len(self.data.held_out)} held-out examples")
            evaluation = evaluate(
                self.train_step, self.data.held_out, pad_id=self.data.pad_id, world=self.world
            )
            entry = {"step": step, **evaluation.to_dict()}
            self.state.evaluations.append(entry)
            self._log("eval", entry)
            self.progress.say(
                f"held out after step {step}: loss {evaluation.loss:.3f}, perplexity {evaluation.perplexity:.2f}"
            )
        # Ranks that hold parts of a model would have to answer in step.
        if edge and edge not in self.state.samples and self.world.size == 1:
            prompts = self.data.held_out or self.data.train
            samples = sample_answers(self.model, self.tokenizer, prompts, should_stop=self.stop)
            self.state.samples[edge] = [sample.to_dict() for sample in samples]

    def _check_gradients(self, model: nn.Module) -> None:
        """After the first backward: every tensor that a method adds has a gradient, and none is zero that needn't be.

        A routed expert may have seen no token.
        """
        method = find_method(self.setup.method)
        if method.trains_base:
            return
        may_be_zero = (*method.zero_at_first, ".experts.")
        for name, parameter in trained_parameters(model).items():
            is_free = any(part in name for part in may_be_zero)
            gradient = None if parameter.grad is None else self.world.whole(parameter.grad)
            is_dead = gradient is None or not (is_free or bool(gradient.any()))
            if is_dead:
                raise FinefitError(f"the adapter tensor {name} gets no gradient: it would stay untrained")

    def _save(self) -> None:
        weights, state = self.world.own(self._drawn()), self.world.pack(self._state_tree())
        if self.world.is_replica:
            weights, state = {}, {"random": self.random}
        own_bytes = float(tensor_bytes(weights) + tensor_bytes(state))
        check_disk(self.folder.root, round(self.world.total(own_bytes)[0]))
        if self.world.is_first:
            self.log.sync()
        save_checkpoint(self.folder.checkpoints, self.state.step, weights, state, world=self.world)
        self.saved_step = self.state.step

    def _state_tree(self) -> dict[str, Any]:
        scaler = self.train_step.scaler
        return {
            "run": asdict(self.state),
            "random": self.random,
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "data_sha256": self.data.sha256,
        }

    def _restore(self) -> None:
        """Take over the newest whole checkpoint, and drop the metrics of steps that are taken again."""
        if self.world.is_first:
            remove_leftovers(self.folder.checkpoints)
        checkpoint, notes = newest_checkpoint(self.folder.checkpoints, self.world)
        if notes and checkpoint is None:
            notes.append("no checkpoint is whole: the run starts again")
        self.folder.note(*notes)
        if checkpoint is not None:
            self._take_over(checkpoint)
        kept = {e["step"] for e in self.state.evaluations}
        if not self.world.is_first:
            return
        num_torn = self.log.keep(
            lambda e: e["step"] <= self.state.step if e["kind"] == "step" else e["step"] in kept
        )
        if num_torn:
            self.folder.note(f"{self.log.path.name}: {num_torn} torn lines are left out")

    def _take_over(self, checkpoint: Checkpoint) -> None:
        state = self.world.unpack(checkpoint.state)
        if state["data_sha256"] != self.data.sha256 and not self.folder.allow_changes:
            raise FinefitError(
                f"{self.setup.data} is not what it was when {checkpoint.path} was written; put the old data back, "
                "choose another --out, or allow the changes"
            )
        load_weights(self.world.own(self._drawn()), checkpoint.weights)
        try:
            self.optimizer.load_state_dict(_mutable(state["optimizer"]))
            if self.train_step.scaler is not None and state["scaler"]:
                self.train_step.scaler.load_state_dict(state["scaler"])
            self.state = RunState(**state["run"])
        except (KeyError, TypeError, ValueError) as error:
            raise FinefitError(
                f"{checkpoint.path} is of another finefit or another optimizer ({error}); choose another --out"
            ) from error
        self.random = state["random"]
        set_random_state(self.random)
        self.train_step.num_steps_done = self.state.step
        self.saved_step = self.resumed_from = checkpoint.step

    def _leave(self) -> None:
        """Save where the run is and say that it can go on."""
        assert self.stop.received is not None
        name = self.stop.received.name
        try:
            if self.saved_step != self.state.step:
                self._save()
        except FinefitError as error:
            raise UnsavedRunError(f"stopped by {name}, and {error}") from error
        raise InterruptedRunError(
            f"stopped by {name} after step {self.state.step} of {self.num_steps}; the same command resumes"
        )

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """What the run has made, gathered on the host; every rank must ask."""
        return {name: self.world.whole(p) for name, p in self._drawn().items()}

    def _drawn(self) -> dict[str, torch.nn.Parameter]:
        self.world.split_again()
        return drawn_parameters(self.setup, self.model)

    def _needed_bytes(self) -> int:
        """Disk: the checkpoints that stay, the one being written, and the final adapter or model."""
        weights = drawn_parameters(self.setup, self.model)
        return (KEEP + 1) * checkpoint_bytes(self.setup, weights) + tensor_bytes(weights)


def checkpoint_bytes(setup: TrainSetup, weights: Mapping[str, torch.Tensor]) -> int:
    """What one checkpoint takes on disk, before there is an optimizer state to look at."""
    entry = find_optimizer(setup.optimizer)
    has_masters = setup.master_weights == "float32"
    total = 0
    for tensor in weights.values():
        element_bytes = 4 if has_masters else tensor.element_size()
        dims = (tensor.shape[0], tensor.numel() // tensor.shape[0]) if tensor.ndim > 1 else None
        total += tensor.numel() * (tensor.element_size() + 4 * has_masters)
        total += entry.state_bytes(tensor.numel(), element_bytes, dims)
    return total


def _mutable(state: Any) -> dict[str, Any]:
    """Optimizers take their state over by changing it."""
    return dict(state)
