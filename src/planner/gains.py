"""What makes a step faster and smaller and changes nothing that it learns: taken wherever it applies and can be run.

These are rules, not dimensions of the search: no setup is better without one. Whoever names the field decides. The rates of
a card say what of it they can, by the operations that are spared; that rows without a label make no logits they don't know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from planner.checks import scaled_logits, shortest_window
from planner.errors import SetupError
from planner.families import joins_rows
from planner.lengths import DataLengths
from planner.methods import can_run, find_method
from planner.own_kernels import knows_gate, takes_documents
from planner.setup import TrainSetup
from planner.specs import GpuProfile, ModelSpec

MEASURED = "measured on a CPU: reports/speed.md"
OBJECTIVES = ("sft", "pretrain")
"""One answer for each row: pairs have rows of their own, and a loss that needs whole log probabilities."""
SHARDINGS = ("none", "ddp", "fsdp", "zero1", "zero2", "zero3")
"""What finefit runs by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is asked for: a setup on a kind of card, and what is known of the rows."""

    setup: TrainSetup
    model: ModelSpec
    gpu: GpuProfile
    lengths: DataLengths | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """A value of a field; `applies` says where it can be run and has something to do."""

    field: str
    value: Any
    applies: Callable[[Case], bool]
    why: str


def _joins(case: Case) -> bool:
    setup, model = case.setup, case.model
    can_be_run = setup.attention == "sdpa" and not setup.compile and can_run(setup.method, padding_free=True)
    window = shortest_window(model)
    is_exact = joins_rows(model) and (window or setup.seq_len) >= setup.seq_len
    has_gaps = setup.packing or _has_padding(setup, case.lengths)
    return can_be_run and is_exact and has_gaps and _takes_documents(case)


def _takes_documents(case: Case) -> bool:
    """Whether attention takes documents fast: on processors, and as flash does; without it torch is left with products that
    hold all scores, or with copies.
    """
    if case.gpu.backend == "cpu":
        return True
    is_narrow = (case.setup.autocast or case.setup.weights_dtype) != "float32"
    heads = all(takes_documents(layer.head_dim, layer.value_head_dim) for layer in case.model.layers)
    return case.gpu.flash_attention and is_narrow and heads


def _has_padding(setup: TrainSetup, lengths: DataLengths | None) -> bool:
    """Whether rows are known to differ in length; full ones would only be copied to and fro."""
    return lengths is not None and lengths.kept_mean(setup.seq_len) < min(setup.seq_len, lengths.longest)


def _fuses(case: Case) -> bool:
    return not case.setup.compile and case.setup.autocast is None and _knows_parts(case.setup, case.model)


def _knows_parts(setup: TrainSetup, model: ModelSpec) -> bool:
    """Whether any module of the model is one that the kernels replace."""
    if find_method(setup.method).is_low_rank_sum and not (setup.quant or setup.dropout):
        return any(matrix.kind == "linear" for layer in model.layers for matrix in layer.matrices)
    roles = ({m.role: m for m in layer.matrices} for layer in model.layers)
    gates = (
        {"gate", "up", "down"} <= found.keys() and knows_gate(found, layer)
        for found, layer in zip(roles, model.layers, strict=True)
    )
    return any(layer.norm == "rmsnorm" for layer in model.layers) or any(gates)


def _chunks(case: Case) -> bool:
    setup, model = case.setup, case.model
    is_plain = model.head is not None and not (model.scales_logits or model.shifts_logits)
    return (
        is_plain
        and scaled_logits(model) is None
        and not _adapts_head(setup, model)
        and can_run(setup.method, loss="chunked")
    )


def _adapts_head(setup: TrainSetup, model: ModelSpec) -> bool:
    assert model.head is not None
    return not isinstance(setup.targets, str) and model.head.module in setup.targets


GAINS: tuple[Gain, ...] = (
    Gain(
        field="padding_free",
        value=True,
        applies=_joins,
        why=f"rows are joined without padding or a mask, each attends to itself alone ({MEASURED})",
    ),
    Gain(
        field="kernels",
        value="fused",
        applies=_fuses,
        why=f"norms, gates, rotary embedding and adapters in fewer passes, which keep less ({MEASURED})",
    ),
    Gain(
        field="loss",
        value="chunked",
        applies=_chunks,
        why=f"logits of some hundred tokens at a time, and only of those that train ({MEASURED})",
    ),
)


def gains(
    fields: Mapping[str, Any], model: ModelSpec, gpu: GpuProfile, lengths: DataLengths | None = None
) -> dict[str, Any]:
    """Fields of a TrainSetup that are better so; none of those that `fields` names, and none where these contradict
    each other.
    """
    open_gains = [gain for gain in GAINS if gain.field not in fields]
    if model.is_traced or model.architecture != "decoder":
        return {}
    try:
        setup = TrainSetup(**fields)
    except SetupError:
        return {}
    is_run = setup.sharding in SHARDINGS and setup.offload == "none" and setup.stack is None
    if not is_run or setup.objective not in OBJECTIVES:
        return {}
    case = Case(setup=setup, model=model, gpu=gpu, lengths=lengths)
    found = (gain for gain in open_gains if gain.applies(case))
    return {gain.field: gain.value for gain in found}


def describe_gains(setup: TrainSetup, wishes: Mapping[str, Any]) -> Iterator[str]:
    """Why a setup has those of them that nobody asked for."""
    for gain in GAINS:
        if gain.field not in wishes and getattr(setup, gain.field) == gain.value:
            yield f"{gain.field} {str(gain.value).lower()}: {gain.why}"
