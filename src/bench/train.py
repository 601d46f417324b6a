"""The fine-tune: plan and data -> a trained adapter or model, with crash-safe checkpoints on the way.

The same call again resumes: weights, optimizer, random generators and position come back, and the result is that
of a run that was never stopped.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.artifact import verify_artifact, verify_weights, write_artifact
from bench.attention import check_isolation
from bench.build import AUTO_CLASSES, build_model, check_runnable, inner_model
from bench.checkpoint import saved_steps
from bench.data import check_vocabulary
from bench.host_memory import keep_freed_memory
from bench.init_adapter import start_from
from bench.launch import LostPeerError, PassedOnStop, is_rank, run_ranks
from bench.loss import check_head
from bench.metrics import memory_peaks
from bench.quiet import quiet_libraries
from bench.rank_laws import check_ranks
from bench.remote_code import trust_code
from bench.run import Run, UnsavedRunError
from bench.rundata import RunData, load_run_data
from bench.runfolder import RunFolder
from bench.signals import StopFlag, StopRequestedError
from bench.weights import load_tokenizer, local_model
from bench.world import SharedStop, World, joined, own_device
from planner.errors import FinefitError, InterruptedRunError
from planner.planfile import PlanFile
from planner.setup import TrainSetup

STACK = ("finefit", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors")
"""The packages whose versions a summary names."""

_WARMUP_STEPS = 2
"""Steps that `measured` leaves out: memory is allocated and kernels are chosen in them."""
_PROBE_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """summary.json: what a finished run was, gave and took.

    `predicted` is what the plan said. `measured`: `step_s` (median) and `tokens_per_s` (real tokens over the same
    steps), peaks in bytes of the last session. Evaluations are {loss, perplexity, num_trained_tokens,
    num_examples} or None without held-out data; samples are [{prompt, expected, answer}].
    """

    setup: Mapping[str, Any]
    artifact: str
    device: str
    num_steps: int
    num_tokens: int
    num_trained_tokens: int
    train_s: float
    final_loss: float | None
    eval_before: Mapping[str, Any] | None
    eval_after: Mapping[str, Any] | None
    sample_before: list[dict[str, str]]
    sample_after: list[dict[str, str]]
    predicted: Mapping[str, Any]
    measured: Mapping[str, Any]
    data: Mapping[str, Any]
    versions: Mapping[str, str]
    resumed_from: int | None = None
    notes: list[str] = field(default_factory=list)
    schema_version: int = 1

    def to_json(self) -> dict[str, Any]:
        """The object that summary.json holds."""
        return asdict(self)


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
    trust_remote_code: bool = False,
) -> RunSummary:
    """Run a plan to its end in `out_dir`, or on from its newest checkpoint; a finished run's summary as it is.

    `resume=False` insists on a new folder; `allow_changes` goes on under a plan that differs from the folder's.
    `device` defaults to CUDA where torch sees it, else the CPU. `save_every_steps` defaults to a tenth of the
    run; `eval_every_steps` adds evaluations to those before and after. `trust_remote_code` runs the code that the
    model brings along. Progress goes to stderr.

    Raises UsageError and SetupError (exit 2), DataError and FinefitError (1), and InterruptedRunError (33) when
    SIGTERM or SIGINT stopped it after a checkpoint; UnsavedRunError (143) when none could be written.
    """
    plan = PlanFile(setup=plan) if isinstance(plan, TrainSetup) else plan
    quiet_libraries()
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_ranks(plan.setup, place, is_rank=is_rank())
    check_runnable(plan.setup, place)
    keep_freed_memory()
    options = _Options(place, progress, save_every_steps, eval_every_steps, trust_remote_code)
    folder = RunFolder(out_dir, plan, resume=resume, allow_changes=allow_changes)
    if plan.setup.num_gpus > 1 and not is_rank():
        return _start_ranks(plan, folder, options)
    with StopFlag() as stop, joined(plan.setup) as world, entered(folder, world):
        finished = _finished(folder) if world.is_first else None
        if world.any(finished is not None):
            return finished or RunSummary(**folder.read_summary() or {})
        return _run(plan, folder, options, world, stop)


class _Options(NamedTuple):
    """What of train's arguments every rank needs."""

    device: str
    progress: bool
    save_every_steps: int | None
    eval_every_steps: int | None
    trust_remote_code: bool


def _start_ranks(plan: PlanFile, folder: RunFolder, options: _Options) -> RunSummary:
    """Run all ranks from here, where the folder stays locked."""
    with PassedOnStop() as stop, folder:
        finished = _finished(folder)
        if finished is not None:
            return finished
        values = {"setup": plan.setup.to_dict(), "gpu": plan.gpu, "predicted": dict(plan.predicted)}
        place = (folder.root, folder.allow_changes, list(folder.notes))
        try:
            run_ranks(stop, plan.setup.num_gpus, _run_rank, values, place, options)
        except StopRequestedError:
            raise _stopped(folder, stop) from None
        return RunSummary(**folder.read_summary() or {})


def _run_rank(values: dict[str, Any], place: tuple[Path, bool, list[str]], options: _Options) -> None:
    """One of several ranks; the process that started them has locked the folder and settled its plan."""
    with StopFlag() as stop:
        quiet_libraries()
        plan = PlanFile(**{**values, "setup": TrainSetup(**values["setup"])})
        root, allow_changes, notes = place
        folder = RunFolder(root, plan, allow_changes=allow_changes)
        folder.notes += notes
        with joined(plan.setup) as world:
            _run(plan, folder, options, world, stop)


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
        yield


def _run(plan: PlanFile, folder: RunFolder, options: _Options, world: World, stop: StopFlag) -> RunSummary:
    """Train and leave the artifact and the summary, which every rank returns."""
    setup = plan.setup
    if world.is_first:
        folder.note(*setup_notes(setup))
    if options.trust_remote_code:
        trust_code(setup, AUTO_CLASSES[setup.objective])
    try:
        with stop.at_once():
            run = _prepare(setup, folder, own_device(options.device), options, world, stop)
        run.execute()
        with stop.at_once():
            return _finish(run, plan)
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


def _finish(run: Run, plan: PlanFile) -> RunSummary:
    """What the run leaves for use, written and read back by the first rank. The last step is saved, so a stop loses
    nothing here.
    """
    weights = run.whole_weights() if run.world.splits_weights else None
    if run.world.is_first:
        artifact = write_artifact(plan.setup, run.model, run.tokenizer, run.folder.root, weights)
        if weights is None:
            verify_artifact(plan.setup, run.model, artifact, _probe(run.data, run.device))
        else:
            verify_weights(plan.setup, run.model, artifact, weights)
        run.folder.write_summary(_summarise(run, plan, artifact).to_json())
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


def _prepare(
    setup: TrainSetup,
    folder: RunFolder,
    device: torch.device,
    options: _Options,
    world: World,
    stop: StopFlag,
) -> Run:
    """Data first, because its faults are found in seconds; then the model."""
    tokenizer = load_tokenizer(setup)
    with world.in_turn():
        data = load_run_data(setup, tokenizer)
    model = build_model(setup, weights=_weights(setup), device=device)
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
        progress=options.progress,
        save_every_steps=options.save_every_steps,
        eval_every_steps=options.eval_every_steps,
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


def _summarise(run: Run, plan: PlanFile, artifact: Path) -> RunSummary:
    state = run.state
    at = {entry["step"]: entry for entry in state.evaluations}
    steps = [entry for entry in run.log.read() if entry["kind"] == "step"]
    return RunSummary(
        setup=plan.setup.to_dict(),
        artifact=artifact.name,
        device=device_name(run.device),
        num_steps=state.step,
        num_tokens=state.num_tokens,
        num_trained_tokens=state.num_trained_tokens,
        train_s=state.train_s,
        final_loss=steps[-1]["loss"] if steps else None,
        eval_before=at.get(0),
        eval_after=at.get(state.step),
        sample_before=state.samples.get("before", []),
        sample_after=state.samples.get("after", []),
        predicted=dict(plan.predicted),
        measured={**_pace(steps), **_memory(run.device, steps)},
        data={"sha256": run.data.sha256, **run.data.facts},
        versions=stack_versions(),
        resumed_from=run.resumed_from,
        notes=run.folder.notes,
    )


def _memory(device: torch.device, steps: list[dict[str, Any]]) -> dict[str, int | None]:
    """Peaks in bytes; on the CPU the device's is the highest resident set that a step left behind.

    The process' own peak also holds loading, evaluation, answers and the check of the saved adapter.
    """
    peaks = memory_peaks(device)
    if device.type == "cpu" and steps:
        peaks["device_used_bytes"] = max(entry["rss_bytes"] for entry in steps)
    return peaks


def _pace(steps: list[dict[str, Any]]) -> dict[str, float | None]:
    """Median step and tokens per second after the warm-up."""
    warm = steps[_WARMUP_STEPS:] or steps
    if not warm:
        return {"step_s": None, "tokens_per_s": None}
    return {
        "step_s": statistics.median(entry["step_s"] for entry in warm),
        "tokens_per_s": sum(e["tokens"] for e in warm) / sum(e["step_s"] for e in warm),
    }


def device_name(device: torch.device) -> str:
    """The card's name, or `cpu`."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


def stack_versions() -> dict[str, str]:
    """Versions of the installed packages that decide what a run gives."""
    versions = {}
    for name in STACK:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
