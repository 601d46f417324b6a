"""From what a step does to a time that one can plan with: its interval, what bounds it, and where the rates are from.

The interval is conformal (planner.conformal): from the errors of published runs, each predicted with the efficiencies
that were fitted without its own source (profiles/calibration/throughput-errors.json, made by
benchmarks/throughput_fit.py). A card without runs of its own class gets the errors that those runs have when the
nearest other class predicts them.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from planner.calibration import Calibration, calibration_of
from planner.conformal import Distribution, predict
from planner.errors import ProfileError
from planner.index import profiles_dir
from planner.memory import MemoryModel, TracedMemoryModel, machine_facts, memory_model
from planner.rank import Run
from planner.rates import Found, class_name, rates_of, stack_kind
from planner.results import Time
from planner.setup import TrainSetup
from planner.specs import GpuProfile, Machine, ModelSpec
from planner.throughput import RESOURCES, Seconds, TimeModel

TABLE = "throughput-errors.json"
LEVEL = 0.90
"""Of the interval."""
BOUND_SHARE = 0.25
"""A step that spends at least this share on launches or exchanges counts as bound by them: their errors differ."""
TRAINED_FLOPS, FROZEN_FLOPS = 6, 4
"""FLOPs per parameter and token that model FLOPs utilisation counts (Chowdhery et al., PaLM, appendix B): without the
gradients of weights that are frozen, and without what a checkpoint computes again."""


@dataclass(frozen=True, order=True, kw_only=True, slots=True)
class Kind:
    """What errors of a predicted time are expected to depend on; `bound`: device, launch or communication."""

    hardware: str
    stack: str
    method: str
    is_shared: bool
    bound: str


@dataclass(frozen=True, order=True, kw_only=True, slots=True)
class Errors:
    """Runs of one kind and model from one source: logarithms of measured over predicted time.

    `held_out`: with efficiencies that were fitted without the source; `elsewhere`: with those of the nearest other class.
    """

    kind: Kind
    source: str
    model: str
    held_out: tuple[float, ...]
    elsewhere: tuple[float, ...]

    @property
    def project(self) -> str:
        """Who published it: OWNER/NAME of the repository."""
        return project_of(self.source)


def project_of(source: str) -> str:
    """The project of a source.

    >>> project_of("pytorch/torchtitan/benchmarks/a.md@1"), project_of("https://github.com/karpathy/nanoGPT/issues/1")
    ('pytorch/torchtitan', 'karpathy/nanoGPT')
    """
    return "/".join(source.removeprefix("https://github.com/").split("/")[:2])


CIRCLES: tuple[Callable[[Kind], Any], ...] = (
    lambda k: (k.hardware, k.stack, k.method, k.is_shared, k.bound),
    lambda k: (k.hardware, k.stack, k.bound),
    lambda k: (k.stack, k.bound),
    lambda k: k.bound,
    lambda k: True,
)
"""Kinds that count as alike, from narrow to wide."""


@functools.cache
def published_errors() -> tuple[Errors, ...]:
    """The shipped table. Raises ProfileError for a broken file."""
    path = profiles_dir() / "calibration" / TABLE
    try:
        return tuple(_errors(row) for row in json.loads(path.read_bytes())["runs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ProfileError(f"can't read {path} ({error}): reinstall finefit") from error


def _errors(row: Mapping[str, Any]) -> Errors:
    lists = {name: tuple(row[name]) for name in ("held_out", "elsewhere")}
    return Errors(**{**row, **lists, "kind": Kind(**row["kind"])})


def distribution(rows: Iterable[Errors], kind: Kind, *, is_own: bool) -> Distribution:
    """The conformal distribution of the log ratio of a new run; `is_own`: its hardware class has runs."""
    rings, left = [], list(rows)
    for circle in CIRCLES:
        wanted = circle(kind)
        ring = [row for row in left if circle(row.kind) == wanted]
        left = [row for row in left if circle(row.kind) != wanted]
        rings.append(_clusters(ring, is_own=is_own))
    return predict(rings)


def _clusters(ring: Sequence[Errors], *, is_own: bool) -> list[list[float]]:
    """The errors of each project on each hardware class: its way to measure, and the class' rates, are in all of them."""
    clusters: dict[Any, list[float]] = {}
    for row in ring:
        key = row.project, row.kind.hardware
        clusters.setdefault(key, []).extend(row.held_out if is_own else row.elsewhere)
    return [values for values in clusters.values() if values]


def interval(rows: Sequence[Errors], kind: Kind, *, is_own: bool) -> tuple[float, float]:
    """Of the log ratio of a new run; a card without a class of its own may have either kind of error."""
    sets = (True,) if is_own else (True, False)
    ends = [distribution(rows, kind, is_own=own).interval(LEVEL) for own in sets]
    return min(low for low, _ in ends), max(high for _, high in ends)


@functools.cache
def ratios(kind: Kind, is_own: bool) -> tuple[float, float]:
    """The interval of measured over predicted time."""
    low, high = interval(published_errors(), kind, is_own=is_own)
    return math.exp(low), math.exp(high)


def calibrated_ratios(calibration: Calibration) -> tuple[float, float]:
    """The interval of measured over predicted time where a machine's own results say it."""
    low, high = predict([[(error,) for error in calibration.log_errors]]).interval(LEVEL)
    return math.exp(low), math.exp(high)


class Clock:
    """The times of one setup on one machine at any batch and length."""

    def __init__(self, setup: TrainSetup, model: ModelSpec, machine: Machine, memory: MemoryModel) -> None:
        """`memory` is that of the same setup on the same kind of machine, whatever its batch."""
        self.setup, self.model, self.machine = setup, model, machine
        run = None if isinstance(memory, TracedMemoryModel) else memory.run
        self._found = None if run is None else rates_of(machine, setup)
        self._calibration = calibration_of(machine, self._found)
        self._timer = None
        if run is not None and self._found is not None:
            rates = self._found.rates
            self._timer = TimeModel(run, self._calibration.apply(rates) if self._calibration else rates)
        self._missing = _missing(run, self._found, self._timer, machine)

    def at(self, micro_batch_size: int, seq_len: int) -> Time | None:
        """One optimizer step with micro-batches of that shape; None where the time is unknown."""
        if self._timer is None or self._found is None or self._missing:
            return None
        step = self._timer.at(micro_batch_size, seq_len)
        total = step.seconds
        low, high = self._ratios(total)
        num_rows = micro_batch_size * self.setup.global_batch_size // self.setup.micro_batch_size
        tokens = num_rows * self.setup.sequences_per_row * seq_len
        return Time(
            step_s=total.total,
            low_step_s=total.total * low,
            high_step_s=total.total * high,
            tokens_per_s=tokens / total.total,
            mfu=self._mfu(tokens / total.total),
            bound={name: getattr(total, name) for name in RESOURCES},
        )

    @property
    def note(self) -> str:
        """Where the rates are from, or why there is no time."""
        if self._missing:
            return f"time unknown: {self._missing}"
        assert self._found is not None
        own = f", {self._calibration.words}" if self._calibration else ""
        if self._found.reached is None:
            return f"time from this machine's measured rates ({self._found.rates.source}){own}"
        words = f"time from rates of {self._found.rates.source}{own}"
        if self._found.is_own or self._calibration:
            return words
        return f"{words}: none of {self.machine.gpu.name}'s class ({class_name(self.machine.gpu)}) is known"

    def _ratios(self, total: Seconds) -> tuple[float, float]:
        assert self._found is not None
        if self._calibration is not None:
            return calibrated_ratios(self._calibration)
        kind = kind_of(self.setup, self.machine.gpu, total)
        return ratios(kind, self._found.is_own)

    def _mfu(self, tokens_per_s: float) -> float | None:
        peak = self.machine.gpu.flops.get(self.setup.autocast or self.setup.weights_dtype)
        if not peak:
            return None
        per_param = FROZEN_FLOPS if self.setup.uses_adapters else TRAINED_FLOPS
        flops = per_param * self.model.num_active_params * tokens_per_s
        return flops / (peak * self.setup.num_gpus)


def step_time(setup: TrainSetup, machine: Machine, model: ModelSpec) -> Time | None:
    """The time of one optimizer step; None where it is unknown. Raises as planner.memory.memory_model does."""
    memory = memory_model(setup, model, **machine_facts(machine))
    return Clock(setup, model, machine, memory).at(setup.micro_batch_size, setup.seq_len)


def _missing(run: Run | None, found: Found | None, timer: TimeModel | None, machine: Machine) -> str | None:
    """Why there is no time; None where there is one."""
    if run is None:
        return "only traces know this architecture, and they say nothing of time"
    if found is None or timer is None:
        return (
            "no rates of this machine are known; `finefit machine` measures them"
            if machine.is_local
            else "the card's peaks are unknown"
        )
    return f"nobody has published its {timer.unknown} rate" if timer.unknown else None


def kind_of(setup: TrainSetup, gpu: GpuProfile, total: Seconds) -> Kind:
    """The kind of a prediction."""
    return Kind(
        hardware=class_name(gpu),
        stack=stack_kind(setup.stack),
        method=setup.method,
        is_shared=setup.num_gpus > 1,
        bound=bound_of(total),
    )


def bound_of(total: Seconds) -> str:
    """What errors are expected to depend on: launches or exchanges where they are much of the time."""
    for name in ("launch", "communication"):
        if getattr(total, name) >= BOUND_SHARE * total.total:
            return name
    return "device"


def table_text(rows: Sequence[Errors]) -> str:
    """The table as JSON, one row to a line so that changes stay readable."""
    lines = ",\n".join(f"  {json.dumps(asdict(row))}" for row in sorted(rows))
    return f'{{"schema_version": 1, "runs": [\n{lines}\n]}}\n'
