"""Predicted against published memory: every case of a file, grouped so that no average hides another.

A case is a JSON line with `id`, `gpu`, `setup`, `stack`, `measured` (peaks in GiB and `outcome`), and optionally
`source`, `variant`, `lengths` and `corrected` (fields of `setup` that the source's own code contradicts).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from planner.cases import Answer
from planner.catalog import find_gpu
from planner.errors import FinefitError
from planner.estimate import estimate
from planner.results import Estimate
from planner.setup import TrainSetup
from planner.specs import Machine
from planner.units import gib

PEAKS = ("peak_allocated_gib", "peak_unknown_kind_gib")
"""Keys of `measured`, in the order of preference; both are compared with the allocated peak."""


@dataclass(frozen=True, order=True, kw_only=True, slots=True)
class Group:
    """What cases have in common that may be averaged."""

    source: str
    method: str
    shape: str
    kernels: str
    sharding: str
    variant: str
    lengths: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One case: predicted and measured allocated peak in GiB, the verdict beside the outcome."""

    id: str
    group: Group
    outcome: str
    measured_gib: float | None
    verdict: str | None = None
    predicted_gib: float | None = None
    corrected_gib: float | None = None
    problem: str | None = None

    @property
    def error(self) -> float | None:
        """Predicted over measured, minus one; of the setup as labelled."""
        return _relative(self.predicted_gib, self.measured_gib)

    @property
    def corrected_error(self) -> float | None:
        """The same for the setup with its corrections."""
        return _relative(self.corrected_gib, self.measured_gib)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupError:
    """Relative errors of one group: mean, median and worst by size, and the mean with its sign."""

    group: Group
    num_cases: int
    mean: float
    median: float
    worst: float
    bias: float
    corrected_mean: float
    corrected_worst: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcomes:
    """Verdicts on runs that fitted or ran out of memory."""

    num_fitted: int
    num_oom: int
    false_fits: int
    false_refusals: int
    tight: int


def compare(cases: Iterable[Mapping[str, Any]], predict: Answer = estimate) -> list[Compared]:
    """Every case in order, by the closed form or another predictor; one that can't be predicted says why."""
    return [_compare(case, predict) for case in cases]


def _compare(case: Mapping[str, Any], predict: Answer) -> Compared:
    measured = case.get("measured", {})
    unknown = Compared(
        id=str(case.get("id")),
        group=_group(case),
        outcome=str(measured.get("outcome", "measured")),
        measured_gib=next((measured[key] for key in PEAKS if measured.get(key) is not None), None),
    )
    corrections = case.get("corrected") or {}
    try:
        labelled = _estimate(case, {}, predict)
        corrected = _estimate(case, corrections, predict) if corrections else labelled
    except FinefitError as error:
        return replace(unknown, problem=str(error))
    return replace(
        unknown,
        verdict=corrected.fit.verdict,
        predicted_gib=gib(labelled.memory.peak_allocated_bytes),
        corrected_gib=gib(corrected.memory.peak_allocated_bytes),
    )


def _estimate(case: Mapping[str, Any], corrections: Mapping[str, Any], predict: Answer) -> Estimate:
    setup = TrainSetup.from_dict({"stack": case.get("stack"), **case["setup"], **corrections})
    machine = Machine(gpu=find_gpu(case["gpu"]), num_gpus=setup.num_gpus)
    return predict(setup, machine)


def _group(case: Mapping[str, Any]) -> Group:
    setup = case.get("setup", {})
    model = setup.get("model")
    is_moe = isinstance(model, Mapping) and any("experts" in key for key in model)
    return Group(
        source=str(case.get("source", "unknown")).partition("@")[0],
        method=str(setup.get("method")),
        shape="moe" if is_moe else "dense",
        kernels=str(setup.get("kernels", "plain")),
        sharding=f"{setup.get('sharding', 'none')} x {setup.get('num_gpus', 1)}",
        variant=str(case.get("variant") or "-"),
        lengths=str(case.get("lengths", "exact")),
    )


def group_errors(compared: Iterable[Compared]) -> list[GroupError]:
    """Errors by group, groups in order; cases without a measured peak or a prediction are left out."""
    groups: dict[Group, list[Compared]] = {}
    for case in compared:
        if case.error is not None:
            groups.setdefault(case.group, []).append(case)
    return [_group_error(group, groups[group]) for group in sorted(groups)]


def _group_error(group: Group, cases: list[Compared]) -> GroupError:
    errors = [case.error or 0.0 for case in cases]
    sizes = [abs(error) for error in errors]
    corrected = [abs(case.corrected_error or 0.0) for case in cases]
    return GroupError(
        group=group,
        num_cases=len(cases),
        mean=statistics.fmean(sizes),
        median=statistics.median(sizes),
        worst=max(sizes),
        bias=statistics.fmean(errors),
        corrected_mean=statistics.fmean(corrected),
        corrected_worst=max(corrected),
    )


def outcomes(compared: Iterable[Compared]) -> Outcomes:
    """How the verdicts did on runs whose outcome is known."""
    known = [case for case in compared if case.verdict is not None]
    fitted = [case.verdict for case in known if case.outcome in ("measured", "fits")]
    oom = [case.verdict for case in known if case.outcome == "oom"]
    return Outcomes(
        num_fitted=len(fitted),
        num_oom=len(oom),
        false_fits=oom.count("fits"),
        false_refusals=fitted.count("does-not-fit"),
        tight=(fitted + oom).count("tight"),
    )


def to_json(compared: list[Compared]) -> dict[str, Any]:
    """The whole comparison as plain values."""
    return {
        "schema_version": 1,
        "groups": [asdict(group) for group in group_errors(compared)],
        "outcomes": asdict(outcomes(compared)),
        "cases": [asdict(case) | {"error": case.error} for case in compared],
    }


def _relative(predicted: float | None, measured: float | None) -> float | None:
    if predicted is None or measured is None:
        return None
    return predicted / measured - 1
