"""Predicted against published speed: every run of a file, grouped so that no average hides another.

A run is a JSON line with `id`, `gpu`, `setup`, `stack`, `source`, `model_name` and `measured`: `tokens_per_s_per_gpu`,
and `covers`: the whole "step", or "forward+backward". `assumed` names what the source doesn't state. A run that TrainSetup can't express has `not_expressible`, the
reason, in place of `setup`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from planner.cases import case_fields, case_gpu
from planner.catalog import find_gpu
from planner.errors import FinefitError
from planner.estimate import resolve
from planner.memory import TracedMemoryModel, machine_facts, memory_model
from planner.rank import Run
from planner.rates import Rates, class_name, rates_of, stack_kind
from planner.setup import TrainSetup
from planner.specs import Machine
from planner.throughput import TimeModel
from planner.timing import Errors, Kind, interval, kind_of, published_errors

DECIMALS = 4
"""Of the log ratios."""
PASSES_ONLY = "forward+backward"


@dataclass(frozen=True, slots=True)
class Timed:
    """A published run that finefit can predict."""

    id: str
    source: str
    model_name: str
    setup: TrainSetup
    machine: Machine
    run: Run
    measured_s: float
    covers: str

    def seconds(self, rates: Rates) -> tuple[float, Kind]:
        """What the measurement covers, predicted with some rates, and the prediction's kind."""
        step = TimeModel(self.run, rates).at(self.setup.micro_batch_size, self.setup.seq_len)
        total = step.passes if self.covers == PASSES_ONLY else step.seconds
        return total.total, kind_of(self.setup, self.machine.gpu, total)

    def log_ratio(self, rates: Rates) -> tuple[float, Kind]:
        """The logarithm of measured over predicted time, and the prediction's kind."""
        predicted, kind = self.seconds(rates)
        return math.log(self.measured_s / predicted), kind


@dataclass(frozen=True, slots=True)
class Result:
    """One run beside its prediction by the shipped rates; `problem`: why there is none."""

    id: str
    source: str
    hardware: str
    stack: str
    method: str
    measured_s: float | None = None
    predicted_s: float | None = None
    problem: str | None = None

    @property
    def error(self) -> float | None:
        """Predicted over measured time, minus one."""
        if self.measured_s is None or self.predicted_s is None:
            return None
        return self.predicted_s / self.measured_s - 1


def timed(case: Mapping[str, Any]) -> Timed:
    """A run as finefit understands it. Raises FinefitError, saying why, where it can't be predicted."""
    if case.get("not_expressible"):
        raise FinefitError(str(case["not_expressible"]))
    corrected = case.get("corrected") or {}
    setup = TrainSetup.from_dict({**case_fields(case), **corrected})
    machine = Machine(gpu=find_gpu(case_gpu(case)), num_gpus=setup.num_gpus)
    owner = memory_model(setup, resolve(setup), **machine_facts(machine))
    if isinstance(owner, TracedMemoryModel):
        raise FinefitError("an architecture that only traces know")
    measured = case["measured"]
    tokens = setup.tokens_per_micro_batch * setup.grad_accum_steps
    return Timed(
        id=str(case["id"]),
        source=str(case.get("source", "unknown")),
        model_name=str(case.get("model_name", "unknown")),
        setup=setup,
        machine=machine,
        run=owner.run,
        measured_s=tokens / measured["tokens_per_s_per_gpu"],
        covers=measured.get("covers", "step"),
    )


def compare(cases: Iterable[Mapping[str, Any]]) -> list[Result]:
    """Every run in order beside its prediction; one that can't be predicted says why."""
    return [_compare(case) for case in cases]


def _compare(case: Mapping[str, Any]) -> Result:
    known: dict[str, Any] = {"id": str(case.get("id")), "source": str(case.get("source", "unknown"))}
    known |= {"hardware": str(case.get("gpu")), "stack": "", "method": ""}
    try:
        run = timed(case)
        gpu, setup = run.machine.gpu, run.setup
        known |= {"hardware": class_name(gpu), "stack": stack_kind(setup.stack), "method": setup.method}
        found = rates_of(run.machine, setup)
        if found is None:
            return Result(**known, problem="a peak of the card is unknown")
        return Result(**known, measured_s=run.measured_s, predicted_s=run.seconds(found.rates)[0])
    except FinefitError as error:
        return Result(**known, problem=str(error))


@dataclass(frozen=True, order=True, slots=True)
class Group:
    """What runs have in common that may be averaged: hardware class, kind of stack, method."""

    hardware: str
    stack: str
    method: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Sizes of the errors of one group's runs (shares of the measured time), in the sample and held out.

    `covered` of the `num_held` held-out runs are inside their interval, whose median width is `median_width`, as a
    share of the predicted time; both with the run's whole source left out of efficiencies and intervals.
    """

    num_runs: int
    num_sources: int
    median: float
    worst: float
    held_median: float | None
    num_held: int
    covered: int
    median_width: float | None


@dataclass(frozen=True, slots=True)
class _Held:
    error: float
    is_covered: bool
    width: float


def summaries(results: Iterable[Result]) -> dict[Group, Summary]:
    """Errors by group, groups in order."""
    held = _held_out(published_errors())
    groups: dict[Group, list[Result]] = {}
    for result in results:
        if result.error is not None:
            groups.setdefault(Group(result.hardware, result.stack, result.method), []).append(result)
    return {group: _summary(groups[group], held.get(group, [])) for group in sorted(groups)}


def _summary(results: Sequence[Result], held: Sequence[_Held]) -> Summary:
    sizes = [abs(result.error) for result in results if result.error is not None]
    return Summary(
        num_runs=len(sizes),
        num_sources=len({result.source for result in results}),
        median=statistics.median(sizes),
        worst=max(sizes),
        held_median=statistics.median(one.error for one in held) if held else None,
        num_held=len(held),
        covered=sum(one.is_covered for one in held),
        median_width=statistics.median(one.width for one in held) if held else None,
    )


def _held_out(rows: Sequence[Errors]) -> dict[Group, list[_Held]]:
    """Each published run by group, with its source left out of what predicts it and of what sets its interval."""
    found: dict[Group, list[_Held]] = {}
    for row in rows:
        others = [other for other in rows if other.project != row.project]
        is_own = any(other.kind.hardware == row.kind.hardware for other in others)
        low, high = interval(others, row.kind, is_own=is_own)
        group = Group(row.kind.hardware, row.kind.stack, row.kind.method)
        found.setdefault(group, []).extend(
            _Held(abs(math.expm1(-ratio)), low <= ratio <= high, math.exp(high) - math.exp(low))
            for ratio in row.held_out
        )
    return found
