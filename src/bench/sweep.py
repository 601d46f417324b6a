"""Several plans, swept over fields and repeated: which runs that makes, which are done already, one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from bench.store import Measurement, read_results, setup_id
from planner.errors import SetupError, UsageError
from planner.fields import find_field
from planner.setup import TrainSetup

FINAL_OUTCOMES = ("ok", "oom", "crash")
"""A run that ended so would end so again; one that was killed or took too long is worth another try."""
MAX_RUNS = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One setup to measure: the plan that it comes from, and what the sweep changed in it."""

    plan: str
    setup: TrainSetup
    changes: Mapping[str, Any]

    @property
    def label(self) -> str:
        """The plan's name with the changes: `plan.yaml seq_len=512`."""
        return " ".join([self.plan, *(f"{name}={value}" for name, value in self.changes.items())])


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """What to measure, in order; `skipped` are combinations that no setup can have, each with the reason."""

    cells: tuple[Cell, ...]
    skipped: tuple[str, ...] = ()


def read_axes(words: Iterable[str]) -> dict[str, tuple[Any, ...]]:
    """`seq_len=512,1024` and more as field values. Raises UsageError or SetupError for what isn't that.

    >>> read_axes(["micro-batch-size=1,2", "method=lora"])
    {'micro_batch_size': (1, 2), 'method': ('lora',)}
    """
    axes: dict[str, tuple[Any, ...]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        values = [part for part in text.split(",") if part.strip()]
        if not equals or not values:
            raise UsageError(f"--sweep {word}: give FIELD=VALUE,VALUE,…")
        field = find_field(name)
        if field.name in axes:
            raise UsageError(f"--sweep: {field.name} is given twice")
        axes[field.name] = tuple(dict.fromkeys(field.parse(part) for part in values))
    return axes


def sweep(plans: Mapping[str, TrainSetup], axes: Mapping[str, Sequence[Any]]) -> Sweep:
    """Every plan with every combination of the axes' values, the last axis fastest; equal setups once.

    Raises SetupError where no combination is a setup, UsageError where there are absurdly many.
    """
    cells: dict[str, Cell] = {}
    skipped: list[str] = []
    refusals: list[SetupError] = []
    for plan, setup in plans.items():
        for values in _combinations(len(plans), axes):
            changes = dict(zip(axes, values, strict=True))
            try:
                cell = Cell(plan=plan, setup=setup.with_(**changes), changes=changes)
                cells.setdefault(setup_id(cell.setup), cell)
            except SetupError as error:
                refusals.append(error)
                skipped.append(f"{plan} {_describe(changes)}: {error}")
    if not cells:
        raise refusals[0]
    return Sweep(cells=tuple(cells.values()), skipped=tuple(skipped))


def _combinations(num_plans: int, axes: Mapping[str, Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    num_runs = num_plans
    for values in axes.values():
        num_runs *= len(values)
    if num_runs > MAX_RUNS:
        raise UsageError(f"--sweep makes {num_runs} runs; {MAX_RUNS} is the most")
    return product(*axes.values())


def _describe(changes: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in changes.items())


def rounds(cells: Sequence[Cell], num_repeats: int, done: Mapping[str, int]) -> Iterator[Cell]:
    """The cells `num_repeats` times, round by round, so that a disturbance hits all alike.

    `done` counts by setup id what needn't be run again.
    """
    for number in range(num_repeats):
        for cell in cells:
            if done.get(setup_id(cell.setup), 0) <= number:
                yield cell


def count_done(
    path: Path, *, machine_id: str | None, device: str | None, random_weights: bool = False
) -> tuple[Counter[str], list[str]]:
    """How many final results of each setup this machine has in a file, and what is wrong with its lines.

    `device`: only runs on it count, where it is given; likewise only runs with weights of the same kind, where a record
    says. Nothing is done where there is no file.
    """
    if not path.exists():
        return Counter(), []
    runs, warnings = read_results(path)
    final = (run for run in runs if _is_final(run, machine_id, device))
    return Counter(
        run.setup_id for run in final if run.protocol.get("random_weights", random_weights) == random_weights
    ), warnings


def _is_final(run: Measurement, machine_id: str | None, device: str | None) -> bool:
    is_here = machine_id is None or run.environment.get("machine_id") in (None, machine_id)
    return run.outcome in FINAL_OUTCOMES and is_here and device in (None, run.device)
