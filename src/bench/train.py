"""The fine-tune: plan and data -> a trained adapter or model, with crash-safe checkpoints on the way.

The same call again resumes: weights, optimizer, random generators and position come back, and the result is that
of a run that was never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench.artifact import verify_artifact, verify_weights, write_artifact
from bench.attention import check_isolation
from bench.build import AUTO_CLASSES, build_model, check_runnable, inner_model
from bench.checkpoint import saved_steps
from bench.data import check_vocabulary
from bench.early_stop import HeldOut
from bench.host import read_cpu, read_memory
from bench.host_memory import keep_freed_memory
from bench.init_adapter import start_from
from bench.ladder import Shortage, ShortOfMemoryError, attempt, release, retry_entry, rung_after
from bench.launch import LostPeerError, PassedOnStop, is_rank, run_ranks
from bench.loss import check_head
from bench.machine import cpu_machine, local_machine
from bench.metrics import MetricsLog
from bench.prompts import read_prompts
from bench.quiet import quiet_libraries
from bench.rank_laws import check_ranks
from bench.remedy import nothing_left
from bench.remote_code import trust_code
from bench.run import Run, UnsavedRunError
from bench.run_options import RunOptions
from bench.rundata import RunData, load_run_data
from bench.runfolder import RunFolder
from bench.signals import StopFlag, StopRequestedError
from bench.summary import RunSummary, summarise_run
from bench.tensorboard import require_tensorboard
from bench.weights import load_tokenizer, local_model
from bench.world import SharedStop, World, joined, own_device
from planner.errors import FinefitError, InterruptedRunError
from planner.planfile import PlanFile
from planner.setup import TrainSetup
from planner.specs import Machine

T = TypeVar("T")

_PROBE_TOKENS = 64


def train(
    plan: PlanFile | TrainSetup,
    out_dir: Path,
    *,
    resume: bool = True,
    progress: bool = True,
    allow_changes: bool = False,
    device: str | None = None,
    save_every_steps: int | None = None,
    eval_every_steps: int | None = None,
    patience: int | None = None,
    keep_best: bool = False,
    prompts: Path | None = None,
    tensorboard: bool = False,
    trust_remote_code: bool = False,
) -> RunSummary:
    """Run a plan to its end in `out_dir`, or on from its newest checkpoint; a finished run's summary as it is.

    `resume=False` insists on a new folder; `allow_changes` goes on under a plan that differs from the folder's.
    `device` defaults to CUDA where torch sees it, else the CPU. `save_every_steps` defaults to a tenth of the
    run; `eval_every_steps` adds evaluations to those before and after, of which `patience` without a lower loss end
    the run, and whose best `keep_best` makes the result. At each the model answers `prompts`, a file, or two held-out
    rows. `tensorboard` writes events beside metrics.jsonl. `trust_remote_code` runs the code that the model brings
    along. Progress goes to stderr.

    A run that lacks memory goes on with smaller micro-batches and more accumulation, then with checkpointing, and
    writes to its plan.yaml what it runs with.

    Raises UsageError and SetupError (exit 2), DataError and FinefitError (1), DivergedError (1), DoesNotFitError (3)
    where no smaller step is left, and InterruptedRunError (33) when SIGTERM or SIGINT stopped it after a checkpoint;
    UnsavedRunError (143) when none could be written.
    """
    plan = PlanFile(setup=plan) if isinstance(plan, TrainSetup) else plan
    quiet_libraries()
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_ranks(plan.setup, place, is_rank=is_rank())
    check_runnable(plan.setup, place)
    keep_freed_memory()
    options = RunOptions(
        device=place,
        progress=progress,
        save_every_steps=save_every_steps,
        held_out=HeldOut(every_steps=eval_every_steps, patience=patience, keep_best=keep_best),
        prompts=prompts,
        tensorboard=tensorboard,
        trust_remote_code=trust_remote_code,
    )
    options.held_out.check(has_data=plan.setup.eval_fraction > 0)
    if tensorboard:
        require_tensorboard()
    folder = RunFolder(out_dir, plan, resume=resume, allow_changes=allow_changes)
    if plan.setup.num_gpus > 1 and not is_rank():
        return _start_ranks(folder, options)
    with StopFlag() as stop, joined(plan.setup) as world, entered(folder, world):
        finished = _finished(folder) if world.is_first else None
        if world.any(finished is not None):
            return finished or RunSummary(**folder.read_summary() or {})
        if world.size > 1:
            return _run(folder, options, world, stop)
        return _until_it_fits(folder, options, lambda: _run(folder, options, world, stop))


def _until_it_fits(folder: RunFolder, options: RunOptions, call: Callable[[], T]) -> T:
    """What the run gives, begun again from its newest checkpoint with the next rung as often as it lacks memory.

    Raises DoesNotFitError where the ladder ends.
    """
    while True:
        try:
            return call()
        except ShortOfMemoryError as error:
            shortage = error.shortage
        # what the run held went with the frames of its error
        release()
        _step_down(folder, shortage, options.device)


def _step_down(folder: RunFolder, shortage: Shortage, device: str) -> None:
    before = folder.plan.setup
    setup = rung_after(before, shortage)
    if setup is None:
        raise nothing_left(before, shortage, lambda: _machine(device, before.num_gpus))
    entry = retry_entry(before, setup, shortage, next(iter(saved_steps(folder.checkpoints)), 0))
    folder.record_retry(setup)
    MetricsLog(folder.metrics).write("retry", entry)
    folder.note(entry["note"])


def _machine(device: str, num_gpus: int) -> Machine:
    """This machine as the run uses it."""
    found = local_machine() if device == "cuda" else cpu_machine(read_cpu(), read_memory())
    return replace(found, num_gpus=num_gpus)


def _start_ranks(folder: RunFolder, options: RunOptions) -> RunSummary:
    """Run all ranks from here, where the folder stays locked."""
    with PassedOnStop() as stop, folder:
        finished = _finished(folder)
        if finished is not None:
            return finished

        def start() -> None:
            values = {**_values(folder.plan), "setup": folder.plan.setup.to_dict()}
            place = (folder.root, folder.allow_changes, list(folder.notes))
            run_ranks(stop, folder.plan.setup.num_gpus, _run_rank, values, place, options)

        try:
            _until_it_fits(folder, options, start)
        except StopRequestedError:
            raise _stopped(folder, stop) from None
        return RunSummary(**folder.read_summary() or {})


def _run_rank(values: dict[str, Any], place: tuple[Path, bool, list[str]], options: RunOptions) -> None:
    """One of several ranks; the process that started them has locked the folder and settled its plan."""
    with StopFlag() as stop:
        quiet_libraries()
        plan = PlanFile(**{**values, "setup": TrainSetup(**values["setup"])})
        root, allow_changes, notes = place
        folder = RunFolder(root, plan, allow_changes=allow_changes)
        folder.notes += notes
        with joined(plan.setup) as world:
            _run(folder, options, world, stop)


def _values(plan: PlanFile) -> dict[str, Any]:
    """The fields of a plan as plain values."""
    return {f.name: getattr(plan, f.name) for f in fields(plan)}


@contextmanager
def entered(folder: RunFolder, world: World) -> Iterator[None]:
    """The first rank locks the folder and settles its plan for all, which end with it if it can't."""
    with ExitStack() as stack:
        refusal = None
        try:
            if world.is_first:
                stack.enter_context(folder)
        except FinefitError as error:
            refusal = error
        if world.any(refusal is not None):
            raise refusal or LostPeerError("the first rank can't use the folder; see its message")
        if not world.is_first:
            folder.follow()
        yield


def _run(folder: RunFolder, options: RunOptions, world: World, stop: StopFlag) -> RunSummary:
    """Train and leave the artifact and the summary, which every rank returns."""
    setup = folder.plan.setup
    if world.is_first:
        folder.note(*setup_notes(setup))
    if options.trust_remote_code:
        trust_code(setup, AUTO_CLASSES[setup.objective])
    try:
        with stop.at_once():
            run = attempt(lambda: _prepare(folder, options, world, stop), lambda: "load")
        if isinstance(run, Shortage):
            raise ShortOfMemoryError(run)
        run.execute()
        with stop.at_once():
            return _finish(run)
    except StopRequestedError:
        raise _stopped(folder, stop) from None


def _finished(folder: RunFolder) -> RunSummary | None:
    """The summary of a run that ended, and under this plan."""
    found = folder.read_summary()
    if found is None or folder.notes:
        return None
    try:
        return RunSummary(**found)
    except TypeError:
        folder.note(
            "summary.json is of another finefit: the run's end is done again from its last checkpoint"
        )
        return None


def _finish(run: Run) -> RunSummary:
    """What the run leaves for use, written and read back by the first rank. The last step is saved, so a stop loses
    nothing here.
    """
    setup, step = run.setup, run.position.take_best()
    weights = run.position.whole_weights() if run.world.splits_weights else None
    if run.world.is_first:
        artifact = write_artifact(setup, run.model, run.tokenizer, run.folder.root, weights)
        if weights is None:
            verify_artifact(setup, run.model, artifact, _probe(run.data, run.device))
        else:
            verify_weights(setup, run.model, artifact, weights)
        run.folder.write_summary(summarise_run(run, artifact, step).to_json())
    run.world.wait()
    return RunSummary(**run.folder.read_summary() or {})


def _stopped(folder: RunFolder, stop: StopFlag) -> FinefitError:
    """A stop while nothing was being trained: before the first step or after the last."""
    assert stop.received is not None
    steps = saved_steps(folder.checkpoints)
    if not steps:
        return UnsavedRunError(f"stopped by {stop.received.name} before anything was trained")
    return InterruptedRunError(
        f"stopped by {stop.received.name}; step {steps[0]} is saved, and the same command resumes"
    )


def setup_notes(setup: TrainSetup) -> list[str]:
    """Settings that the run can't follow."""
    notes = []
    if setup.optimizer_in_backward and setup.max_grad_norm is not None:
        notes.append("max_grad_norm is not applied: optimizer_in_backward never has all gradients at once")
    return notes


def _prepare(folder: RunFolder, options: RunOptions, world: World, stop: StopFlag) -> Run:
    """Data first, because its faults are found in seconds; then the model."""
    setup = folder.plan.setup
    tokenizer = load_tokenizer(setup)
    prompts = None if options.prompts is None else read_prompts(options.prompts, tokenizer, setup)
    with world.in_turn():
        data = load_run_data(setup, tokenizer)
    model = build_model(setup, weights=_weights(setup), device=own_device(options.device))
    check_vocabulary(tokenizer, inner_model(model).get_input_embeddings().num_embeddings)
    if setup.loss != "full":
        check_head(model)
    if setup.padding_free and setup.attention == "sdpa":
        check_isolation(model)
    if setup.init_adapter is not None:
        # A checkpoint, if there is one, takes its place.
        start_from(setup, model)
    return Run(
        folder,
        data,
        model,
        tokenizer,
        stop=stop if world.size == 1 else SharedStop(world, stop),
        options=options,
        prompts=prompts,
        world=world,
    )


def _weights(setup: TrainSetup) -> Path | None:
    """The folder with the model's config and weights; an inline config has neither, and starts from scratch."""
    if not isinstance(setup.model, str):
        return None
    return local_model(setup.model, revision=setup.revision, needs_weights=not setup.from_scratch)


def _probe(data: RunData, device: torch.device) -> torch.Tensor:
    """A few real tokens, to compare logits on."""
    example = (data.held_out or data.train)[0]
    return torch.tensor([example.input_ids[:_PROBE_TOKENS].tolist()], device=device)
