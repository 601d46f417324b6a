"""A traced step on a machine: the Estimate that `finefit estimate --trace` prints, and what `finefit trace` adds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.build import AUTO_CLASSES
from bench.objectives import OBJECTIVES
from bench.remote_code import trust_code
from bench.trace.allocator_rules import AllocatorRules
from bench.trace.blocks import block_excess
from bench.trace.coefficients import learn
from bench.trace.recording import Recording
from bench.trace.replay import Replay, replay
from bench.trace.run import NUM_STEPS, Progress, TraceResult, trace
from planner.coefficients import load
from planner.errors import NotModelledError
from planner.estimate import estimate, resolve
from planner.memory import CUBLAS_HANDLES, memory_model
from planner.resolve import read_config
from planner.results import PHASES, TERMS, Estimate, Memory
from planner.setup import PAIRED, TrainSetup
from planner.specs import Machine
from planner.stack import parse_stack
from planner.uncertainty import Uncertainty

NOT_REPLAYED = "side streams, and segments that others' libraries hold"

TRACED_SHARDINGS = ("ddp", "fsdp")

_UNTRACED: tuple[tuple[str, Callable[[TrainSetup], bool], str], ...] = (
    (
        "objective",
        lambda s: s.objective not in OBJECTIVES,
        f"it has no step that could be traced; {', '.join(OBJECTIVES)} have one",
    ),
    (
        "stack",
        lambda s: s.stack is not None and s.objective in PAIRED,
        "what other versions' trainers do with pairs of answers isn't traced; leave it out",
    ),
    (
        "sharding",
        lambda s: s.num_gpus > 1 and s.sharding not in TRACED_SHARDINGS,
        f"of several GPUs' steps only {', '.join(TRACED_SHARDINGS)} can be traced",
    ),
    ("offload", lambda s: s.offload != "none", "host memory can't be traced yet"),
    (
        "stack",
        lambda s: (
            parse_stack(s.stack).splits_experts and any(layer.num_experts for layer in resolve(s).layers)
        ),
        "before transformers 5 each expert was a linear of its own, which today's model can't show",
    ),
    ("compile", lambda s: s.compile, "a compiled model can't be traced; leave compile out"),
)


def check_traceable(setup: TrainSetup) -> None:
    """Raise NotModelledError for what the trace would get wrong: the closed form may know it."""
    for field, is_untraced, message in _UNTRACED:
        if is_untraced(setup):
            raise NotModelledError(f"{field}: {message} (or estimate without --trace)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Traced:
    """One setup's traced step on one machine.

    `workspace_bytes` is what cuBLAS holds for itself. `usable_bytes` is what torch can have of one card, None where
    that is unknown.
    """

    estimate: Estimate
    result: TraceResult
    workspace_bytes: int
    usable_bytes: int | None

    def requests(self) -> Iterator[tuple[int, int]]:
        """What the allocator is asked for: the step's storages by number, cuBLAS' workspaces below 0."""
        return _requests(self.result.timeline, self.workspace_bytes)

    def replayed(self, *, expandable: bool = False, capacity_bytes: int | None = None) -> Replay:
        """The step through the caching allocator, with `expandable_segments` or without."""
        return replay(
            self.requests(), rules=AllocatorRules(expandable=expandable), capacity_bytes=capacity_bytes
        )

    def failure(self, replayed: Replay) -> dict[str, str] | None:
        """What the request was for that wasn't served; None where all were."""
        if replayed.failed_key is None:
            return None
        if replayed.failed_key < 0:
            return {"phase": "forward", "operator": "cuBLAS workspace", "module": ""}
        storage = self.result.timeline.storages[replayed.failed_key]
        return {"phase": storage.phase, "operator": storage.op, "module": storage.module}

    def to_json(self) -> dict[str, Any]:
        """The estimate of the JSON contract with what was traced under `trace`; sizes in bytes."""
        result = self.result
        found = {
            "peak": {"phase": result.peak_phase, "operator": result.operator, "module": result.module},
            "num_layers": result.depths.num_layers,
            "traced_layers": list(result.depths.shallow or (result.depths.num_layers,)),
            "num_allocations": len(result.timeline.storages),
            "largest": [asdict(tensor) for tensor in result.largest],
            "replay": None,
        }
        if self.workspace_bytes:
            names = {"default": False, "expandable_segments": True}
            found["replay"] = {name: self._replay_json(expandable) for name, expandable in names.items()}
        return {**self.estimate.to_json(), "trace": found}

    def _replay_json(self, expandable: bool) -> dict[str, Any]:
        free = self.replayed(expandable=expandable)
        found: dict[str, Any] = {
            "peak_reserved_bytes": free.peak_reserved_bytes,
            "fragmentation_bytes": free.fragmentation_bytes,
            "on_this_gpu": None,
        }
        if self.usable_bytes is not None:
            limited = self.replayed(expandable=expandable, capacity_bytes=self.usable_bytes)
            failed = self.failure(limited)
            found["on_this_gpu"] = {
                "is_served": failed is None,
                "peak_reserved_bytes": limited.peak_reserved_bytes,
                "num_retries": limited.num_retries,
                "failed_at": failed,
            }
        return found


def trace_on(
    setup: TrainSetup,
    machine: Machine,
    *,
    all_layers: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Traced:
    """Trace the step of `setup` on `machine`; what isn't memory is the closed form's.

    `trust_remote_code` runs the code that the model brings along, where transformers has none for it.
    Raises NotModelledError for what can't be traced, and what planner.estimate.estimate and
    bench.trace.run.trace raise.
    """
    check_traceable(setup)
    if trust_remote_code:
        trust_code(setup, AUTO_CLASSES[setup.objective])
    on_gpu = machine.gpu.backend != "cpu"
    buildable = _learnt(setup, on_gpu, progress)
    answer = estimate(setup, machine)
    traced = trace(buildable, on_gpu=on_gpu, all_layers=all_layers, progress=progress)
    workspace = _workspace_bytes(setup, machine, on_gpu)
    memory = _memory(traced, answer.memory, workspace, answer.fit.usable_bytes if on_gpu else 0)
    usable_bytes = (answer.fit.usable_bytes or 0) + answer.memory.terms["context"]
    uncertainty = Uncertainty(setup, on_gpu=on_gpu, source="trace")
    found = replace(
        answer,
        memory=memory,
        fit=uncertainty.judge(memory, usable_bytes),
        interval=uncertainty.interval(memory),
        assumptions=(
            *_without(answer.assumptions, Uncertainty(setup, on_gpu=on_gpu).note),
            uncertainty.note,
            _how(traced),
        ),
        not_modelled=(NOT_REPLAYED,) if on_gpu else (),
        source="trace",
    )
    return Traced(
        estimate=found, result=traced, workspace_bytes=workspace, usable_bytes=answer.fit.usable_bytes
    )


def trace_estimate(setup: TrainSetup, machine: Machine, *, all_layers: bool = False) -> Estimate:
    """The estimate of `setup` on `machine` with the memory of its traced step; see trace_on."""
    return trace_on(setup, machine, all_layers=all_layers).estimate


def _without(texts: tuple[str, ...], left_out: str) -> tuple[str, ...]:
    return tuple(text for text in texts if text != left_out)


def _learnt(setup: TrainSetup, on_gpu: bool, progress: Progress | None) -> TrainSetup:
    """The setup as the trace takes it; an architecture without formulas is learnt where it isn't yet.

    From then on the planner answers for it at any batch and length.
    """
    try:
        model = resolve(setup)
        if not model.is_traced:
            return setup
        load(model, setup, on_gpu=on_gpu)
    except NotModelledError:
        learn(setup, on_gpu=on_gpu, progress=progress)
    return setup.with_(model=dict(read_config(setup.model, revision=setup.revision)))


def _how(traced: TraceResult) -> str:
    shallow = traced.depths.shallow
    depth = f"{shallow[0]} and {shallow[1]}" if shallow else "all"
    return f"traced with {depth} of {traced.depths.num_layers} layers, rows of full length"


def _workspace_bytes(setup: TrainSetup, machine: Machine, on_gpu: bool) -> int:
    """cuBLAS' workspaces, which go through torch's allocator."""
    capability = machine.gpu.compute_capability
    return memory_model(setup, resolve(setup), on_gpu=on_gpu, capability=capability).workspace_bytes


def _memory(traced: TraceResult, closed: Memory, workspace: int, usable_bytes: int | None) -> Memory:
    """The traced peaks in the contract's words; temporaries count as workspace.

    `usable_bytes` is what torch can have of the card (0: no card, None: unknown).
    """
    on_card = usable_bytes != 0
    excess = (
        block_excess(traced.timeline, _library_requests(traced.timeline, workspace), NUM_STEPS)
        if on_card
        else {}
    )
    phases = {
        name: peak.num_bytes + workspace + sum(excess.get(name, {}).values())
        for name, peak in traced.phases.items()
    }
    # No command of finefit's resumes several ranks; each would fill tensors that a running step has.
    phases.setdefault("resume", phases["save"])
    at_peak: Mapping[str, int] = excess.get(traced.peak_phase, {})
    terms = {name: size + at_peak.get(name, 0) for name, size in traced.terms.items()}
    terms["workspace"] = terms["temporary"] + workspace
    terms["context"] = closed.terms["context"]
    terms["fragmentation"] = _fragmentation(traced, workspace, usable_bytes, phases) if on_card else 0
    return Memory(
        phases={name: phases[name] for name in PHASES},
        terms={name: terms[name] for name in TERMS},
        peak_phase=traced.peak_phase,
        host_bytes=closed.host_bytes,
        disk_bytes=closed.disk_bytes,
    )


def _fragmentation(
    traced: TraceResult, workspace: int, usable_bytes: int | None, phases: Mapping[str, int]
) -> int:
    """Reserved minus allocated by the allocator's rules: on this card, or without end where it doesn't suffice."""
    requests = list(_requests(traced.timeline, workspace))
    replayed = replay(requests, capacity_bytes=usable_bytes)
    if replayed.failed_key is not None:
        replayed = replay(requests)
    return max(0, replayed.peak_reserved_bytes - phases[traced.peak_phase])


def _requests(timeline: Recording, workspace: int) -> Iterator[tuple[int, int]]:
    return timeline.requests(_library_requests(timeline, workspace))


def _library_requests(timeline: Recording, workspace: int) -> dict[int, tuple[int, int]]:
    """cuBLAS makes a workspace at a thread's first product: the forward's, then autograd's."""
    starts = [
        next((mark.at for mark in timeline.marks if mark.phase == phase), 0)
        for phase in ("forward", "backward")
    ]
    extra = {at: (-1 - i, workspace // CUBLAS_HANDLES) for i, at in enumerate(starts)}
    return extra if workspace else {}
