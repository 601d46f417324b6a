"""The loop of one run: steps, evaluations, checkpoints, stops. `bench.train` prepares it and sums it up."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from bench.build import switch_checkpointing, trained_parameters
from bench.checkpoint import check_disk, random_state
from bench.data import Example
from bench.evaluate import Evaluation, evaluate
from bench.exam import Exam
from bench.host_memory import KeptMemory
from bench.ladder import (
    PhaseNow,
    Shortage,
    ShortOfMemoryError,
    attempt,
    is_repeatable,
    retry_entry,
    rung_after,
)
from bench.metrics import MetricsLog, memory_now
from bench.optim import build_schedule
from bench.position import Position, RunState
from bench.progress import Pace, Progress
from bench.reference import with_reference
from bench.run_options import RunOptions
from bench.rundata import RunData
from bench.runfolder import RunFolder
from bench.signals import StopFlag, StopRequestedError
from bench.stopped import FILE, DivergedError, describe_batch, has_bad_numbers, write_stopped_batch
from bench.tensorboard import TensorBoard
from bench.watch import expected_figures, watch_for
from bench.world import ALONE, World
from planner.errors import FinefitError, InterruptedRunError
from planner.methods import find_method

T = TypeVar("T")

SAVES_PER_RUN = 10
"""Checkpoints of a run whose caller names no interval."""


class UnsavedRunError(FinefitError):
    """Stopped by a signal before a checkpoint could be written."""

    exit_code = 143


class Run:
    """A model being trained in a folder. `prompts` None asks the first held-out rows."""

    def __init__(
        self,
        folder: RunFolder,
        data: RunData,
        model: nn.Module,
        tokenizer: Any,
        *,
        stop: StopFlag,
        options: RunOptions,
        prompts: Sequence[Example] | None = None,
        world: World = ALONE,
    ) -> None:
        self.setup, self.folder, self.data = data.setup, folder, data
        self.model, self.tokenizer, self.stop, self.options = model, tokenizer, stop, options
        self.num_steps = data.num_steps
        self.save_every_steps = options.save_every_steps or math.ceil(self.num_steps / SAVES_PER_RUN)
        self.exam = Exam(num_steps=self.num_steps, rule=options.held_out, prompts=prompts)
        self.pace = Pace(
            num_steps=self.num_steps,
            save_every_steps=self.save_every_steps,
            eval_every_steps=options.held_out.every_steps,
            is_evaluated=bool(data.held_out),
        )
        self.world, self.phase = world, PhaseNow()
        self.train_step = world.build_step(
            self.setup,
            model,
            schedule=build_schedule(self.setup, self.num_steps),
            phase=self.phase,
            should_stop=stop,
            on_gradients=self._check_gradients,
            # a rank by itself has only its share of the loss
            before_update=self._check_numbers if world.size == 1 else None,
        )
        self.optimizer = self.train_step.optimizer
        self.device = self.train_step.device
        self.log = MetricsLog(folder.metrics)
        self.position = Position(
            folder,
            self.train_step,
            model,
            self.log,
            data_sha256=data.sha256,
            rule=options.held_out,
            world=world,
        )

    @property
    def state(self) -> RunState:
        """Where the run is."""
        return self.position.state

    def execute(self) -> None:
        """Train to the end. Raises InterruptedRunError after a stop, DivergedError when the loss is no number or has
        blown up, ShortOfMemoryError when no smaller step is left.
        """
        # The model is what it begins with: nothing is taken over yet.
        self.data = with_reference(self.train_step, self.data)
        self.position.restore()
        if self.world.is_first:
            check_disk(self.folder.root, self.position.needed_bytes())
        self._listen()
        if self.position.resumed_from is not None:
            self.progress.say(f"going on after step {self.position.resumed_from} of {self.num_steps}")
        try:
            self._loop()
        except StopRequestedError:
            self._leave()
        finally:
            self.log.close()

    def _listen(self) -> None:
        """Who is told of each line of metrics.jsonl."""
        plan, kind = self.folder.plan, self.device.type
        # a plan that was changed on the way is not the one that was predicted
        predicted = {} if plan.before_retries else plan.predicted
        expected = expected_figures(predicted, kind)
        is_shown = self.options.progress and self.world.is_first
        self.progress = Progress(self.pace, self.state.step, is_shown, expected)
        if not self.world.is_first:
            return
        self.log.listeners = [
            self.progress,
            KeptMemory(),
            watch_for(predicted, self.setup, self.device, self._write),
        ]
        if self.options.tensorboard:
            self.log.listeners.append(TensorBoard(self.folder.root, self.state.step))

    def _write(self, kind: str, values: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl; what it has to note is said at once."""
        if self.world.is_first:
            self.log.write(kind, values)
            self.folder.note(*[values["note"]] if "note" in values else [])

    def _loop(self) -> None:
        self._examine_if_due()
        while self.state.step < self.num_steps and not self.exam.is_over(self.state.evaluations):
            self._take_step()
            is_last = self.state.step == self.num_steps
            if is_last or self.state.step % self.save_every_steps == 0:
                self._save()
            if self.stop():
                raise StopRequestedError
            self._examine_if_due()
        self._end()

    def _end(self) -> None:
        """After the last step, or before it where more wouldn't help."""
        if self.state.step < self.num_steps and self.world.is_first:
            patience = self.options.held_out.patience
            self.folder.note(
                f"ended after step {self.state.step}: {patience} evaluations without a lower loss"
            )
        if not self.position.is_saved:
            self._save()

    def _take_step(self) -> None:
        values = self._until_it_fits(self._try_step, lambda: self.phase.name)
        self.train_step.on_gradients = None
        self.state.step += 1
        self.state.num_tokens += values["tokens"]
        self.state.num_trained_tokens += values["trained_tokens"]
        self.state.train_s += values["step_s"]
        self._record(values)
        self.position.random = random_state()

    def _try_step(self) -> dict[str, Any]:
        """What metrics.jsonl says of the step; its tensors end here."""
        self.phase.name = "batch"
        batch = self.data.step_batch(self.state.step, self.device, self.world)
        started = time.perf_counter()
        result = self.train_step(batch.micro_batches, num_items=batch.num_items)
        loss = float(result.loss)
        step_s = time.perf_counter() - started
        return {
            "step": self.state.step + 1,
            "loss": loss,
            "grad_norm": None if result.grad_norm is None else float(result.grad_norm),
            "learning_rate": result.learning_rate,
            "tokens": batch.num_tokens,
            "trained_tokens": batch.num_trained_tokens,
            **{name: float(value) for name, value in result.metrics.items()},
            "positions": batch.num_positions,
            "step_s": step_s,
            "tokens_per_s": batch.num_tokens / step_s,
            **memory_now(self.device),
        }

    def _until_it_fits(self, call: Callable[[], T], phase: Callable[[], str]) -> T:
        """What the call returns, after as many rungs of the ladder as it takes."""
        while True:
            found = attempt(call, phase)
            if not isinstance(found, Shortage):
                return found
            self._step_down(found)

    def _step_down(self, shortage: Shortage) -> None:
        """Go on with the next rung; where there is none, a step was half taken or other ranks are in the midst of it,
        whoever started the run must.
        """
        setup = rung_after(self.setup, shortage)
        if self.world.size > 1 or not is_repeatable(self.setup, shortage.phase):
            raise ShortOfMemoryError(shortage)
        self.position.go_back()
        if setup is None:
            if self.state.step and not self.position.is_saved:
                self._save()
            raise ShortOfMemoryError(shortage)
        entry = retry_entry(self.setup, setup, shortage, self.state.step)
        self.folder.record_retry(setup)
        self._write("retry", entry)
        if setup.checkpointing != self.setup.checkpointing:
            switch_checkpointing(setup, self.model)
        self.setup = self.train_step.setup = setup
        self.data = self.data.cut_as(setup)

    def _record(self, values: Mapping[str, Any]) -> None:
        self._write("step", values)
        if self.world.size > 1:
            self._check_numbers(values["loss"], values["grad_norm"], self.state.step)
        reason = self.state.divergence.see(values["loss"])
        if reason is not None:
            self._give_up(self.state.step, reason, values["loss"], values["grad_norm"])

    def _check_numbers(
        self, loss: torch.Tensor | float, grad_norm: torch.Tensor | float | None, step: int | None = None
    ) -> None:
        """Before the update, so that no weight becomes nan; `step` where it is taken already."""
        norm = None if grad_norm is None else float(grad_norm)
        if has_bad_numbers(float(loss), norm, is_scaled=self.train_step.scaler is not None):
            reason = "a loss or gradient that is no number"
            self._give_up(step or self.state.step + 1, reason, float(loss), norm)

    def _give_up(self, step: int, reason: str, loss: float, grad_norm: float | None) -> None:
        """Write down the batch of the step, and raise DivergedError."""
        rate = float(self.optimizer.param_groups[0]["lr"])
        rows = describe_batch(self.train_step, self.data, step - 1, self.tokenizer)
        facts = {"step": step, "reason": reason, "loss": loss, "grad_norm": grad_norm, "learning_rate": rate}
        path = self.folder.root / FILE
        if self.world.is_first:
            write_stopped_batch(path, facts, rows)
        self._write("stopped", facts)
        saved_step = self.position.saved_step
        saved = "no checkpoint was written" if saved_step is None else f"step {saved_step} is saved"
        raise DivergedError(
            f"training diverged at step {step}: {reason} (loss {loss}, gradient norm {grad_norm} at learning rate "
            f"{rate:.3g}); {path} holds its rows; lower learning_rate in a new run ({saved})"
        )

    def _examine_if_due(self) -> None:
        """Not again after a resume."""
        step, state = self.state.step, self.state
        if not self.exam.is_due(step):
            return
        if self.data.held_out and all(e["step"] != step for e in state.evaluations):
            self._evaluate()
        # Ranks that hold parts of a model would have to answer in step.
        if str(step) not in state.samples and self.world.size == 1:
            state.samples[str(step)] = self._answers()
            self._write("sample", {"step": step, "samples": state.samples[str(step)]})
        if self.exam.rule.best_step(state.evaluations) == step != self.position.saved_step:
            self._save()

    def _evaluate(self) -> None:
        self.progress.say(f"evaluating {len(self.data.held_out)} held-out examples")
        with self.pace.timing("eval"):
            evaluation = self._until_it_fits(self._held_out_loss, lambda: "eval")
        entry = {"step": self.state.step, **evaluation.to_dict()}
        self.state.evaluations.append(entry)
        self._write("eval", entry)
        self.progress.say(f"held out after step {self.state.step}: {evaluation.text}")

    def _held_out_loss(self) -> Evaluation:
        data = self.data
        return evaluate(self.train_step, data.held_out, pad_id=data.pad_id, world=self.world)

    def _answers(self) -> list[dict[str, str]]:
        """Prompts that the memory is too short for leave a note; no run should end for them."""
        found = attempt(
            lambda: self.exam.answers(self.train_step, self.model, self.tokenizer, self.data),
            lambda: "answers",
        )
        if isinstance(found, Shortage):
            self.folder.note(f"{found} after step {self.state.step}: the prompts were not answered")
            return []
        return found

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
            gradient = self.train_step.gradient(parameter)
            is_dead = gradient is None or not (is_free or bool(gradient.any()))
            if is_dead:
                raise FinefitError(f"the adapter tensor {name} gets no gradient: it would stay untrained")

    def _save(self) -> None:
        with self.pace.timing("save"):
            self.position.save()

    def _leave(self) -> None:
        """Save where the run is and say that it can go on."""
        assert self.stop.received is not None
        name = self.stop.received.name
        try:
            if not self.position.is_saved:
                self._save()
        except FinefitError as error:
            raise UnsavedRunError(f"stopped by {name}, and {error}") from error
        raise InterruptedRunError(
            f"stopped by {name} after step {self.state.step} of {self.num_steps}; the same command resumes"
        )
