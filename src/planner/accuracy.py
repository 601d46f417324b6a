"""Predicted against published memory: every case of a file, grouped so that no average hides another.

A case is a JSON line with `id`, `gpu`, `setup`, `stack`, `measured` (peaks in GiB and `outcome`), and optionally
`source`, `model_name`, `variant`, `lengths` and `corrected` (fields of `setup` that the source's own code contradicts).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planner.cases import Answer, case_fields, case_gpu, read_case
from planner.catalog import find_gpu
from planner.errors import DataError, FinefitError, ProfileError
from planner.estimate import estimate
from planner.residuals import DECIMALS, Runs, kind_of
from planner.results import Estimate
from planner.setup import TrainSetup
from planner.specs import Machine
from planner.units import gib

PEAKS: Mapping[str, tuple[str, Callable[[Estimate], int]]] = {
    "peak_allocated_gib": ("allocated", lambda e: e.memory.peak_allocated_bytes),
    "peak_unknown_kind_gib": ("unknown kind", lambda e: e.memory.peak_allocated_bytes),
    "peak_reserved_gib": ("reserved", lambda e: e.memory.peak_reserved_bytes),
    "device_used_gib": ("device used", lambda e: e.memory.device_used_bytes),
}
"""Keys of `measured`: the kind of peak, and what it is compared with. A peak of unknown kind is taken as allocated."""
ALLOCATED_KINDS = ("allocated", "unknown kind")
FITTED = ("measured", "fits")
OUT_OF_MEMORY = "oom"
OUTCOMES = (*FITTED, OUT_OF_MEMORY)


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
    """One case: `measured` peaks in GiB by kind beside the estimates of the setup as labelled and as corrected.

    `model` names the model for telling shapes apart; `problem` says why there is no estimate.
    """

    id: str
    group: Group
    outcome: str
    model: str
    measured: Mapping[str, float]
    labelled: Estimate | None = field(default=None, repr=False)
    corrected: Estimate | None = field(default=None, repr=False)
    problem: str | None = None

    @property
    def measured_gib(self) -> float | None:
        """The peak that the allocated one is compared with."""
        return next((self.measured[kind] for kind in ALLOCATED_KINDS if kind in self.measured), None)

    @property
    def predicted_gib(self) -> float | None:
        """Allocated peak of the setup as labelled."""
        return _allocated_gib(self.labelled)

    @property
    def corrected_gib(self) -> float | None:
        """Allocated peak of the setup with its corrections."""
        return _allocated_gib(self.corrected)

    @property
    def error(self) -> float | None:
        """Predicted over measured allocated peak, minus one; of the setup as labelled."""
        return _relative(self.predicted_gib, self.measured_gib)

    @property
    def corrected_error(self) -> float | None:
        """The same for the setup with its corrections."""
        return _relative(self.corrected_gib, self.measured_gib)

    @property
    def verdict(self) -> str | None:
        """Of the setup as labelled: what somebody who reads the source would ask."""
        return None if self.labelled is None else self.labelled.fit.verdict

    @property
    def runs(self) -> Runs | None:
        """The case as a row of the residuals' table; None where it has no peak, or rows of unknown length.

        Of the setup as labelled: what a description leaves out is part of the error of whoever relies on it.
        """
        if self.labelled is None or self.measured_gib is None or self.group.lengths != "exact":
            return None
        ratio = self.measured_gib / gib(self.labelled.memory.peak_allocated_bytes)
        return Runs(
            kind=kind_of(self.labelled.setup),
            source=self.group.source,
            model=self.model,
            num_gpus=self.labelled.setup.num_gpus,
            log_ratios=(round(math.log(ratio), DECIMALS),),
        )

    def to_json(self) -> dict[str, Any]:
        """The case as plain values; errors are predicted over measured, minus one."""
        memory = None if self.labelled is None else self.labelled.to_json()["memory"]
        return {
            "id": self.id,
            "source": self.group.source,
            "outcome": self.outcome,
            "measured_gib": self.measured_gib,
            "predicted_gib": self.predicted_gib,
            "corrected_gib": self.corrected_gib,
            "error": self.error,
            "corrected_error": self.corrected_error,
            "low_gib": _gib_or_none(memory, "low_peak_allocated_bytes"),
            "high_gib": _gib_or_none(memory, "high_peak_allocated_bytes"),
            "verdict": self.verdict,
            "probability": None if self.labelled is None else self.labelled.fit.probability,
            "problem": self.problem,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """Relative errors of several cases: mean, median and worst by size, the mean with its sign, and its spread."""

    num_cases: int
    mean: float
    median: float
    worst: float
    bias: float
    deviation: float


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupError:
    """Errors of one group's allocated peaks, of the setups as labelled and with their corrections."""

    group: Group
    labelled: Errors
    corrected: Errors


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcomes:
    """Verdicts on runs that fitted or ran out of memory."""

    num_fitted: int
    num_oom: int
    false_fits: int
    false_refusals: int
    tight: int


def read_cases(path: str, lines: Iterable[bytes]) -> list[Mapping[str, Any]]:
    """The cases of a file. Raises DataError naming the line of a broken or repeated one, or an empty file."""
    cases: dict[str, tuple[int, Mapping[str, Any]]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        case = _checked(path, line, number)
        if case["id"] in cases:
            raise DataError(path, f"id {case['id']!r} is already in line {cases[case['id']][0]}", number)
        cases[case["id"]] = (number, case)
    if not cases:
        raise DataError(path, "holds no cases")
    return [case for _, case in cases.values()]


def read_all(path: Path) -> list[Mapping[str, Any]]:
    """The cases of a file, or of all .jsonl files in a folder. Raises DataError as `read_cases` does, and for an id that
    two files have; FinefitError for a folder without files.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise FinefitError(f"{path} holds no .jsonl file")
    cases: list[Mapping[str, Any]] = []
    seen: dict[str, Path] = {}
    for file in files:
        with file.open("rb") as lines:
            found = read_cases(str(file), lines)
        for case in found:
            if case["id"] in seen:
                raise DataError(str(file), f"id {case['id']!r} is already in {seen[case['id']].name}")
            seen[case["id"]] = file
        cases += found
    return cases


def _checked(path: str, line: bytes, number: int) -> Mapping[str, Any]:
    try:
        case = read_case(line, number)
    except FinefitError as error:
        raise DataError(path, str(error).partition(": ")[2], number) from error
    measured = case.get("measured")
    if not isinstance(case.get("id"), str) or not case["id"]:
        raise DataError(path, "id: missing, or not a text", number)
    if not isinstance(measured, dict):
        raise DataError(path, "measured: missing, or not an object of peaks and outcome", number)
    if measured.get("outcome", "measured") not in OUTCOMES:
        raise DataError(path, f"measured.outcome: one of {', '.join(OUTCOMES)}", number)
    if not isinstance(case.get("corrected") or {}, dict):
        raise DataError(path, "corrected: not an object of TrainSetup's fields", number)
    for key in PEAKS:
        value = measured.get(key)
        if value is not None and (type(value) not in (int, float) or value <= 0):
            raise DataError(path, f"measured.{key}: must be a size above 0", number)
    return case


def compare(cases: Iterable[Mapping[str, Any]], predict: Answer = estimate) -> list[Compared]:
    """Every case in order, by the closed form or another predictor; one that can't be predicted says why.

    Raises ProfileError where finefit's own tables are broken.
    """
    return [_compare(case, predict) for case in cases]


def _compare(case: Mapping[str, Any], predict: Answer) -> Compared:
    measured = case.get("measured", {})
    found: dict[str, Any] = {}
    try:
        labelled = _estimate(case, {}, predict)
        corrections = case.get("corrected")
        found["corrected"] = _estimate(case, corrections, predict) if corrections else labelled
        found["labelled"] = labelled
    except ProfileError:
        raise
    except FinefitError as error:
        found["problem"] = str(error)
    return Compared(
        id=str(case.get("id")),
        group=_group(case),
        outcome=str(measured.get("outcome", "measured")),
        model=_model_name(case),
        measured={kind: measured[key] for key, (kind, _) in PEAKS.items() if measured.get(key) is not None},
        **found,
    )


def _estimate(case: Mapping[str, Any], corrections: Mapping[str, Any], predict: Answer) -> Estimate:
    setup = TrainSetup.from_dict({**case_fields(case), **corrections})
    return predict(setup, Machine(gpu=find_gpu(case_gpu(case)), num_gpus=setup.num_gpus))


def _model_name(case: Mapping[str, Any]) -> str:
    model = _setup_of(case).get("model")
    shown = case.get("model_name") or model
    return str(shown if isinstance(shown, str) else sorted(shown.items()) if shown else "unknown")


def _setup_of(case: Mapping[str, Any]) -> Mapping[str, Any]:
    setup = case.get("setup")
    return setup if isinstance(setup, dict) else {}


def _group(case: Mapping[str, Any]) -> Group:
    setup = _setup_of(case)
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
    return [
        GroupError(
            group=group,
            labelled=errors_of([c.error for c in groups[group] if c.error is not None]),
            corrected=errors_of([c.corrected_error for c in groups[group] if c.corrected_error is not None]),
        )
        for group in sorted(groups)
    ]


def peak_errors(compared: Iterable[Compared]) -> dict[tuple[str, str, str], Errors]:
    """Errors of the corrected setups by source, method with sharding, and kind of peak."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for case in compared:
        for kind, predicted in PEAKS.values():
            if case.corrected is not None and kind in case.measured:
                sharding = case.group.sharding.partition(" ")[0]
                error = gib(predicted(case.corrected)) / case.measured[kind] - 1
                found.setdefault((kind, case.group.source, f"{case.group.method} {sharding}"), []).append(
                    error
                )
    return {key: errors_of(found[key]) for key in sorted(found)}


def errors_of(errors: Sequence[float]) -> Errors:
    """The summary of at least one relative error."""
    sizes = [abs(error) for error in errors]
    return Errors(
        num_cases=len(errors),
        mean=statistics.fmean(sizes),
        median=statistics.median(sizes),
        worst=max(sizes),
        bias=statistics.fmean(errors),
        deviation=statistics.pstdev(errors),
    )


def outcomes(verdicts: Iterable[tuple[Compared, str | None]]) -> Outcomes:
    """How verdicts did on cases whose outcome is known."""
    known = [(case, verdict) for case, verdict in verdicts if verdict is not None]
    fitted = [verdict for case, verdict in known if case.outcome in FITTED]
    oom = [verdict for case, verdict in known if case.outcome == OUT_OF_MEMORY]
    return Outcomes(
        num_fitted=len(fitted),
        num_oom=len(oom),
        false_fits=oom.count("fits"),
        false_refusals=fitted.count("does-not-fit"),
        tight=(fitted + oom).count("tight"),
    )


def residuals(compared: Iterable[Compared]) -> list[Runs]:
    """The residuals' table that these cases make: rows of one kind, source, model and number of GPUs together."""
    rows: dict[tuple[Any, ...], list[float]] = {}
    for case in compared:
        if (runs := case.runs) is not None:
            rows.setdefault((runs.kind, runs.source, runs.model, runs.num_gpus), []).extend(runs.log_ratios)
    return [
        Runs(kind=kind, source=source, model=model, num_gpus=num_gpus, log_ratios=tuple(sorted(values)))
        for (kind, source, model, num_gpus), values in rows.items()
    ]


def _allocated_gib(answer: Estimate | None) -> float | None:
    return None if answer is None else gib(answer.memory.peak_allocated_bytes)


def _gib_or_none(memory: Mapping[str, Any] | None, key: str) -> float | None:
    value = None if memory is None else memory.get(key)
    return None if value is None else gib(value)


def _relative(predicted: float | None, measured: float | None) -> float | None:
    if predicted is None or measured is None:
        return None
    return predicted / measured - 1
