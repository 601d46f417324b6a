"""Results of this machine -> corrections of its rates, term by term, judged on setups that they were not learnt from.

A step's time is a sum over terms (planner.calibration.TERMS), each with a factor f. What is minimised over the
setups' medians is

    sum over setups (log measured - log predicted(f))^2 / NOISE^2  +  sum over terms (log f)^2 / PRIOR^2

by Gauss-Newton: the derivative of log predicted by log f is the term's share of the step. The second sum keeps a term
that the results say little of where the rates had it; a term that matters in fewer than MIN_RESULTS setups isn't
corrected at all. Each setup's own error is taken with corrections learnt from the others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from statistics import fmean, median, stdev

import numpy as np
import numpy.typing as npt

from bench.hardware import stack_versions
from bench.host_sampler import doubted_facts
from bench.protocol import MAX_SPREAD
from bench.store import Measurement
from planner.calibration import (
    TERMS,
    Calibration,
    Correction,
    calibration_file,
    corrected,
    origin_of,
    read_calibration,
)
from planner.errors import FinefitError, UsageError
from planner.files import write_atomically
from planner.memory import MemoryModel, machine_facts, memory_model
from planner.rates import Found, rates_of
from planner.resolve import resolve_model
from planner.specs import Machine
from planner.throughput import TimeModel

MIN_SETUPS = 8
"""Different setups that are needed: about one for each term that most machines use, so that each is held out once."""
MIN_RESULTS = 3
"""Setups in which a term must matter to be corrected: two can't tell a factor from a disturbance."""
MATTERS = 0.05
"""Share of a step from which on a term matters: below, the noise of a step hides it."""
NOISE = MAX_SPREAD
"""Relative error of a setup's median that the protocol lets pass."""
PRIOR = 0.5
"""How far measured rates are expected to be off, as a logarithm: within a factor of 1.6 for two terms of three. Rates
are measured apart, on operations that wait for nothing; in a step they share caches and memory."""
CERTAINTY = 1.64
"""Standard errors: one chance in twenty that corrections without any use pass."""
_ITERATIONS = 4
_STEP = 1e-3

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A setup that was measured: seconds of its median step, of how many results, and its time by rates."""

    label: str
    model: str
    measured_s: float
    num_results: int
    timer: TimeModel

    def predicted_s(self, factors: Mapping[str, float]) -> float:
        """The step's seconds with corrections by these factors."""
        setup = self.timer.setup
        timer = TimeModel(self.timer.run, corrected(self.timer.rates, factors))
        return timer.at(setup.micro_batch_size, setup.seq_len).seconds.total

    def log_error(self, factors: Mapping[str, float]) -> float:
        """The logarithm of measured over predicted time."""
        return math.log(self.measured_s / self.predicted_s(factors))

    def shares(self, factors: Mapping[str, float], names: Sequence[str]) -> list[float]:
        """Each term's share of the step: the derivative of its logarithm by that of the term's factor."""
        whole = self.predicted_s(factors)
        longer = ({**factors, name: factors.get(name, 1.0) * (1 + _STEP)} for name in names)
        return [(self.predicted_s(more) / whole - 1) / _STEP for more in longer]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """One setup: relative errors (predicted / measured - 1) without corrections, and with those of the other setups."""

    label: str
    measured_s: float
    before: float
    after: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Learnt:
    """A calibration with what it was judged on. `left_out`: results that were not used, by reason.

    `errors_by_model`: as `rows`, with corrections of the other models' setups only.
    """

    calibration: Calibration
    rows: tuple[HeldOut, ...]
    errors_by_model: tuple[HeldOut, ...]
    left_out: Mapping[str, int]

    @property
    def is_supported(self) -> bool:
        """Whether corrections help on setups that they were not learnt from, by more than chance explains: the errors
        fall by over CERTAINTY standard errors of their mean fall.
        """
        falls = [abs(row.before) - abs(row.after) for row in self.rows]
        return fmean(falls) > CERTAINTY * stdev(falls) / math.sqrt(len(falls))


def calibrate(
    results: Sequence[Measurement], machine: Machine, *, progress: Progress = lambda text, done, total: None
) -> Learnt:
    """Learn corrections of `machine`'s rates from its results; nothing is written.

    Raises UsageError where the results are of another machine or of several, FinefitError where too few can be used
    or the machine's rates are unknown.
    """
    usable, left_out = _usable(results, machine)
    cases, origin, unknown = _cases(usable, machine)
    if unknown:
        left_out["finefit has no time for their setup"] = unknown
    if len(cases) < MIN_SETUPS:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in left_out.items())
        more = f" ({reasons})" if reasons else ""
        raise FinefitError(
            f"{len(cases)} setups can be used and {MIN_SETUPS} are needed{more}; "
            "`finefit bench --sweep` measures more"
        )
    rows = _held_out(cases, [case.label for case in cases], progress)
    by_model = _held_out(cases, [case.model for case in cases])
    calibration = Calibration(
        machine=_name(machine),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        origin=origin,
        num_results=sum(case.num_results for case in cases),
        corrections=fit(cases),
        log_errors=tuple(-math.log1p(row.after) for row in rows),
        error_before=fmean(abs(row.before) for row in rows),
        error_after=fmean(abs(row.after) for row in rows),
        versions=stack_versions(),
    )
    return Learnt(calibration=calibration, rows=rows, errors_by_model=by_model, left_out=left_out)


def keep(learnt: Learnt, machine: Machine) -> str:
    """Write the calibration where plans for this machine read it; the path.

    Raises FinefitError where corrections make held-out setups no better, or the file can't be written.
    """
    found = learnt.calibration
    if not learnt.is_supported:
        raise FinefitError(
            f"nothing is kept: with corrections from the other setups the mean error is {found.error_after:.1%}, without "
            f"{found.error_before:.1%}, which may be chance; more and longer runs of different kinds would tell the terms apart"
        )
    path = calibration_file(machine)
    write_atomically(path, json.dumps(found.to_json(), indent=1) + "\n")
    read_calibration.cache_clear()
    return str(path)


def _name(machine: Machine) -> str:
    return machine.gpu.architecture if machine.gpu.backend == "cpu" else machine.gpu.name


def _usable(results: Sequence[Measurement], machine: Machine) -> tuple[list[Measurement], dict[str, int]]:
    """Undisturbed successful runs of full rows on this machine; how many others there are, by reason."""
    usable, left_out = [], dict[str, int]()
    for run in results:
        reason = next((words for is_wrong, words in _REASONS if is_wrong(run)), None)
        if reason is None:
            usable.append(run)
        else:
            left_out[reason] = left_out.get(reason, 0) + 1
    others = sorted({_hardware(run) for run in usable} - {_name(machine)})
    if others:
        raise UsageError(
            f"results of {', '.join(others)}: a calibration is one machine's own, and this is {_name(machine)}"
        )
    return usable, left_out


def _hardware(run: Measurement) -> str:
    facts = run.environment
    return str(facts.get("cpu_model") if run.device == "cpu" else facts.get("gpu_name"))


def _has_short_rows(run: Measurement) -> bool:
    setup = run.setup
    full = setup.seq_len * setup.micro_batch_size * setup.grad_accum_steps
    return any(tokens != full for tokens in run.samples.step_tokens)


_REASONS: tuple[tuple[Callable[[Measurement], bool], str], ...] = (
    (lambda run: run.outcome != "ok" or not run.measured.step_s, "didn't get through"),
    (lambda run: bool(doubted_facts(run.environment)), "were disturbed by other programs"),
    (lambda run: (run.measured.step_spread or 0.0) > 2 * MAX_SPREAD, "have steps that spread too much"),
    (_has_short_rows, "had rows shorter than planned"),
)


def _cases(results: Sequence[Measurement], machine: Machine) -> tuple[list[Case], str, int]:
    """One case per setup, of which rates, and how many results have no prediction. Raises FinefitError for a machine without rates."""
    by_setup: dict[str, list[Measurement]] = {}
    for run in results:
        by_setup.setdefault(run.setup_id, []).append(run)
    cases, origins, unknown = [], set[str](), 0
    for runs in by_setup.values():
        found, timer = _timer(runs[0], machine)
        if timer is None or found is None:
            unknown += len(runs)
            continue
        origins.add(origin_of(found))
        cases.append(_case(runs, timer))
    if len(origins) > 1:
        raise FinefitError("the setups' rates come from different stacks: calibrate one stack at a time")
    return cases, next(iter(origins), ""), unknown


def _timer(run: Measurement, machine: Machine) -> tuple[Found | None, TimeModel | None]:
    own = replace(machine, num_gpus=run.setup.num_gpus)
    model = resolve_model(run.setup.model, revision=run.setup.revision)
    memory = memory_model(run.setup, model, **machine_facts(own))
    found = rates_of(own, run.setup)
    if not isinstance(memory, MemoryModel) or getattr(memory, "run", None) is None or found is None:
        return found, None
    timer = TimeModel(memory.run, found.rates)
    return found, None if timer.unknown else timer


def _case(runs: Sequence[Measurement], timer: TimeModel) -> Case:
    setup = runs[0].setup
    words = [
        setup.model_label,
        setup.method,
        f"{setup.micro_batch_size} x {setup.seq_len}",
        setup.weights_dtype,
        setup.loss + " loss",
        *(["checkpointed"] if setup.checkpointing == "full" else []),
        *([f"{setup.grad_accum_steps} accumulated"] if setup.grad_accum_steps > 1 else []),
    ]
    return Case(
        label=", ".join(words),
        model=setup.model_label,
        measured_s=median(run.measured.step_s or 0.0 for run in runs),
        num_results=len(runs),
        timer=timer,
    )


def fit(cases: Sequence[Case]) -> dict[str, Correction]:
    """The corrections of all terms that enough cases speak of."""
    shares = np.array([case.shares({}, list(TERMS)) for case in cases])
    counts = dict(zip(TERMS, (shares >= MATTERS).sum(axis=0), strict=True))
    names = [name for name, count in counts.items() if count >= MIN_RESULTS]
    logs = np.zeros(len(names))
    covariance = np.zeros((len(names), len(names)))
    for _ in range(_ITERATIONS if names else 0):
        factors = _factors(names, logs)
        jacobian = np.array([case.shares(factors, names) for case in cases])
        errors = np.array([case.log_error(factors) for case in cases])
        noise = max(NOISE, float(np.sqrt(np.mean(errors**2))))
        precision = jacobian.T @ jacobian / NOISE**2 + np.eye(len(names)) / PRIOR**2
        logs = logs + np.linalg.solve(precision, jacobian.T @ errors / NOISE**2 - logs / PRIOR**2)
        covariance = np.linalg.inv(jacobian.T @ jacobian / noise**2 + np.eye(len(names)) / PRIOR**2)
    return {
        name: Correction(
            factor=math.exp(logs[i]), num_results=int(counts[name]), spread=math.sqrt(covariance[i, i])
        )
        for i, name in enumerate(names)
    }


def _factors(names: Sequence[str], logs: npt.NDArray[np.float64]) -> dict[str, float]:
    return {name: math.exp(value) for name, value in zip(names, logs, strict=True)}


def _held_out(
    cases: Sequence[Case], groups: Sequence[str], progress: Progress = lambda text, done, total: None
) -> tuple[HeldOut, ...]:
    """Each case's errors before, and after corrections from the cases of all other groups."""
    names = list(dict.fromkeys(groups))
    factors: dict[str, dict[str, float]] = {}
    for done, name in enumerate(names):
        progress(name, done, len(names))
        others = [case for case, group in zip(cases, groups, strict=True) if group != name]
        factors[name] = {term: one.factor for term, one in fit(others).items()} if others else {}
    return tuple(
        HeldOut(
            label=case.label,
            measured_s=case.measured_s,
            before=math.expm1(-case.log_error({})),
            after=math.expm1(-case.log_error(factors[group])),
        )
        for case, group in zip(cases, groups, strict=True)
    )
