"""An Estimate whose memory comes from a trace: what `finefit estimate --trace` prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from bench.trace.recording import Recording
from bench.trace.replay import replay
from bench.trace.run import TraceResult, trace
from planner.errors import NotModelledError
from planner.estimate import estimate, resolve
from planner.memory import MemoryModel
from planner.results import PHASES, TERMS, Estimate, Memory
from planner.setup import TrainSetup
from planner.specs import Machine
from planner.uncertainty import judge

NOT_REPLAYED = "side streams, and segments that others' libraries hold"

_UNTRACED: tuple[tuple[str, Callable[[TrainSetup], bool], str], ...] = (
    (
        "objective",
        lambda s: s.objective not in ("sft", "pretrain", "mlm"),
        "only sft, pretrain and mlm can be traced yet",
    ),
    ("num_gpus", lambda s: s.num_gpus > 1, "only one GPU's step can be traced yet"),
    ("compile", lambda s: s.compile, "a compiled model can't be traced; leave compile out"),
)


def check_traceable(setup: TrainSetup) -> None:
    """Raise NotModelledError for what the trace would get wrong: the closed form may know it."""
    for field, is_untraced, message in _UNTRACED:
        if is_untraced(setup):
            raise NotModelledError(f"{field}: {message} (or estimate without --trace)")


def trace_estimate(setup: TrainSetup, machine: Machine, *, all_layers: bool = False) -> Estimate:
    """The estimate of `setup` on `machine` with the memory of its traced step; the rest is the closed form's.

    Raises NotModelledError for what can't be traced, and what planner.estimate.estimate and
    bench.trace.run.trace raise.
    """
    check_traceable(setup)
    answer = estimate(setup, machine)
    on_gpu = machine.gpu.backend != "cpu"
    traced = trace(setup, on_gpu=on_gpu, all_layers=all_layers)
    workspace = _workspace_bytes(setup, machine, on_gpu)
    memory = _memory(traced, answer.memory, workspace, on_gpu)
    usable_bytes = (answer.fit.usable_bytes or 0) + answer.memory.terms["context"]
    return replace(
        answer,
        memory=memory,
        fit=judge(memory, usable_bytes, setup.num_gpus),
        assumptions=(*answer.assumptions, _how(traced)),
        not_modelled=(NOT_REPLAYED,) if on_gpu else (),
        source="trace",
    )


def _how(traced: TraceResult) -> str:
    shallow = traced.depths.shallow
    depth = f"{shallow[0]} and {shallow[1]}" if shallow else "all"
    return f"traced with {depth} of {traced.depths.num_layers} layers, rows of full length"


def _workspace_bytes(setup: TrainSetup, machine: Machine, on_gpu: bool) -> int:
    """cuBLAS' workspaces, which go through torch's allocator."""
    model = MemoryModel(setup, resolve(setup), on_gpu=on_gpu, capability=machine.gpu.compute_capability)
    return round(model.run.static()["workspace"])


def _memory(traced: TraceResult, closed: Memory, workspace: int, on_gpu: bool) -> Memory:
    """The traced peaks in the contract's words; temporaries count as workspace."""
    phases = {name: peak.num_bytes + workspace for name, peak in traced.phases.items()}
    # Loading the states back fills tensors that a running step has anyway.
    phases["resume"] = phases["save"]
    terms = {**traced.terms, "workspace": traced.terms["temporary"] + workspace}
    terms["context"] = closed.terms["context"]
    terms["fragmentation"] = _fragmentation(traced, workspace) if on_gpu else 0
    return Memory(
        phases={name: phases[name] for name in PHASES},
        terms={name: terms[name] for name in TERMS},
        peak_phase=traced.peak_phase,
        host_bytes=closed.host_bytes,
        disk_bytes=closed.disk_bytes,
    )


def _fragmentation(traced: TraceResult, workspace: int) -> int:
    """Reserved minus allocated, by the allocator's rules."""
    replayed = replay(_requests(traced.timeline, workspace))
    return max(0, replayed.peak_reserved_bytes - traced.peak_bytes - workspace)


def _requests(recording: Recording, workspace: int) -> Iterator[tuple[int, int]]:
    yield -1, workspace
    yield from recording.requests()
