"""Measurements against their predictions, and against each other. Pure functions of records; nothing is printed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.labels import describe, describe_rest, differing
from bench.stats import Ratio, median_ratio
from bench.store import Measurement
from bench.terms import is_number, table_of
from planner.errors import UsageError

QUANTITIES = (
    ("peak_allocated_bytes", "memory"),
    ("peak_reserved_bytes", "memory"),
    ("device_used_bytes", "memory"),
    ("step_s", "time"),
    ("tokens_per_s", "time"),
)
"""What is predicted and measured under one name, and the part of the estimate that holds it."""

MIN_RUNS = 3
"""Runs per side from which on their medians are compared; below, single steps are, which understates the noise
between runs."""
SIGNIFICANCE = 0.05
HARDWARE_KEYS = ("cpu_model", "num_cpus", "gpu_name")
PEAKS = ("peak_allocated_bytes", "peak_reserved_bytes", "device_used_bytes", "host_bytes")
GATED = ("step_s", "cpu_step_s", "tokens_per_s", "energy_per_step_j", "eval_s", "save_s", *PEAKS)
"""Quantities whose ratio B / A a gate can bound."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionRow:
    """One quantity of one run; `relative_error` is predicted / measured - 1. `batch`: with what else tells setups apart."""

    id: str
    model: str
    method: str
    batch: str
    gpu: str
    device: str
    quantity: str
    predicted: float
    measured: float
    source: str

    @property
    def relative_error(self) -> float:
        """Above 0 where the prediction was too high."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """B against A. Ratios are B / A, so above 1 means that B takes longer or needs more.

    `unit` says what the samples of `step` and `cpu_step` are: "run" (medians of runs) or "step".
    `is_same_machine` and `is_same_versions` are None where a record doesn't say. `setup_differences` and
    `version_differences` map a name to A's and B's value. `label` says which setup it is where there are several;
    `ratios` has every quantity of GATED that both sides measured.
    """

    label: str = ""
    num_runs_a: int
    num_runs_b: int
    unit: str
    step: Ratio
    cpu_step: Ratio | None
    ratios: Mapping[str, float]
    is_same_machine: bool | None
    is_same_versions: bool | None
    setup_differences: Mapping[str, tuple[Any, Any]]
    version_differences: Mapping[str, tuple[Any, Any]]
    warnings: tuple[str, ...]

    @property
    def peak_allocated_ratio(self) -> float | None:
        """Of the highest peak of live tensors of each side; None where one side measured none."""
        return self.ratios.get("peak_allocated_bytes")

    @property
    def is_significant(self) -> bool:
        """Whether the step times differ by more than chance explains, by interval and by ranks."""
        outside = self.step.low_ratio > 1 or self.step.high_ratio < 1
        return outside and self.step.p_value < SIGNIFICANCE


def predicted_vs_measured(results: Iterable[Measurement]) -> list[PredictionRow]:
    """One row for each quantity that a successful run predicted and measured, in the results' order."""
    kept = [result for result in results if result.outcome == "ok"]
    differences = differing(result.setup for result in kept)
    return [row for result in kept for row in _rows(result, differences)]


def _rows(result: Measurement, differences: Sequence[str]) -> list[PredictionRow]:
    rows = []
    for quantity, part in QUANTITIES:
        measured = getattr(result.measured, quantity)
        value = table_of(result.predicted, part).get(quantity)
        if not measured or not is_number(value):
            continue
        rows.append(
            PredictionRow(
                id=result.id,
                model=result.setup.model_label,
                method=result.setup.method,
                batch=", ".join(
                    [
                        f"{result.setup.micro_batch_size} x {result.setup.seq_len}",
                        *describe_rest(result.setup, differences),
                    ]
                ),
                gpu=result.gpu,
                device=result.device,
                quantity=quantity,
                predicted=float(value),
                measured=float(measured),
                source=str((result.predicted or {}).get("source", "unknown")),
            )
        )
    return rows


def traced_quantities(run: Measurement) -> dict[str, float]:
    """What the trace that a record carries said of QUANTITIES; empty where there is none."""
    traced = table_of(run.predicted, "traced")
    found = {name: table_of(traced, part).get(name) for name, part in QUANTITIES}
    return {name: value for name, value in found.items() if is_number(value)}


def compare_files(a: Sequence[Measurement], b: Sequence[Measurement]) -> tuple[list[Comparison], list[str]]:
    """Sweeps setup by setup, and what only one side has; single setups directly, also where they differ.

    Raises UsageError when a side has no successful run, mixes machines, or shares no setup with the other.
    """
    by_setup = [_by_setup(_successful(runs, side)) for runs, side in ((a, "A"), (b, "B"))]
    if all(len(setups) == 1 for setups in by_setup):
        return [compare(a, b)], []
    shared = [key for key in by_setup[0] if key in by_setup[1]]
    if not shared:
        raise UsageError("A and B share no setup, and one of them holds several: nothing to compare")
    differences = differing(runs[0].setup for setups in by_setup for runs in setups.values())
    lonely = [
        f"only {side} has {describe(runs[0].setup, differences)}"
        for side, setups in zip("AB", by_setup, strict=True)
        for key, runs in setups.items()
        if key not in shared
    ]
    return [
        compare(by_setup[0][key], by_setup[1][key], label=describe(by_setup[0][key][0].setup, differences))
        for key in shared
    ], lonely


def _by_setup(runs: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    found: dict[str, list[Measurement]] = {}
    for run in runs:
        found.setdefault(run.setup_id, []).append(run)
    return found


def compare(a: Sequence[Measurement], b: Sequence[Measurement], *, label: str = "") -> Comparison:
    """How B's runs differ from A's.

    Raises UsageError when a side has no successful run with steps, or mixes machines.
    """
    runs_a, runs_b = _successful(a, "A"), _successful(b, "B")
    is_by_run = min(len(runs_a), len(runs_b)) >= MIN_RUNS
    wall = [_pool(runs, "step_wall_s", is_by_run) for runs in (runs_a, runs_b)]
    cpu = [_pool(runs, "step_cpu_s", is_by_run) for runs in (runs_a, runs_b)]
    versions = _differences(_versions(runs_a[0]), _versions(runs_b[0]))
    step = median_ratio(*wall)
    cpu_step = median_ratio(*cpu) if all(cpu) and min(map(min, cpu)) > 0 else None
    return Comparison(
        label=label,
        num_runs_a=len(runs_a),
        num_runs_b=len(runs_b),
        unit="run" if is_by_run else "step",
        step=step,
        cpu_step=cpu_step,
        ratios=_ratios(runs_a, runs_b, step, cpu_step),
        is_same_machine=_is_same_machine(runs_a + runs_b),
        is_same_versions=not versions if _versions(runs_a[0]) and _versions(runs_b[0]) else None,
        setup_differences=_differences(runs_a[0].setup.to_dict(), runs_b[0].setup.to_dict()),
        version_differences=versions,
        warnings=_warnings(runs_a, runs_b, is_by_run),
    )


def _successful(runs: Sequence[Measurement], side: str) -> list[Measurement]:
    good = [run for run in runs if run.outcome == "ok" and run.samples.step_wall_s]
    if not good:
        raise UsageError(f"{side} has no successful run with measured steps: nothing to compare")
    machines = {str(machine_key(run)): machine_name(run) for run in good}
    if len(machines) > 1:
        names = ", ".join(sorted(machines.values()))
        raise UsageError(
            f"{side} mixes runs of {len(machines)} machines ({names}): give files of one machine each"
        )
    return good


def machine_key(run: Measurement) -> tuple[Any, ...]:
    """What tells machines apart in one file: the id where there is one, the hardware, the device that was used."""
    keys = ("machine_id", *HARDWARE_KEYS)
    return (run.device, *(run.environment.get(key) for key in keys))


def machine_name(run: Measurement) -> str:
    """The hardware in words, with the machine's id where there is one."""
    hardware = run.environment.get("gpu_name") if run.device != "cpu" else run.environment.get("cpu_model")
    return f"{hardware or 'unknown hardware'} {run.environment.get('machine_id') or ''}".strip()


def _pool(runs: Sequence[Measurement], name: str, is_by_run: bool) -> list[float]:
    series = [getattr(run.samples, name) for run in runs]
    if is_by_run:
        return [median(values) for values in series if values]
    return [value for values in series for value in values]


def _ratios(
    a: Sequence[Measurement], b: Sequence[Measurement], step: Ratio, cpu_step: Ratio | None
) -> dict[str, float]:
    """B / A of every quantity that both sides have: the highest of peaks, the median of the rest."""
    found = {"step_s": step.ratio}
    if cpu_step is not None:
        found["cpu_step_s"] = cpu_step.ratio
    for name in GATED:
        sides = [[getattr(run.measured, name) for run in side] for side in (a, b)]
        known = [[value for value in side if value] for side in sides]
        if name not in found and all(known):
            summary = max if name in PEAKS else median
            found[name] = summary(known[1]) / summary(known[0])
    return found


def _is_same_machine(runs: Sequence[Measurement]) -> bool | None:
    """By the machine's id where every record has one, else by its processor and cards; None if unknown."""
    for keys in (("machine_id",), HARDWARE_KEYS):
        facts = [tuple(run.environment.get(key) for key in keys) for run in runs]
        if all(fact[0] is not None for fact in facts):
            return len(set(map(str, facts))) == 1
    return None


def _versions(run: Measurement) -> Mapping[str, Any]:
    versions = run.environment.get("versions")
    return versions if isinstance(versions, Mapping) else {}


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (a.get(key), b.get(key)) for key in sorted({*a, *b}) if a.get(key) != b.get(key)}


def _warnings(a: Sequence[Measurement], b: Sequence[Measurement], is_by_run: bool) -> tuple[str, ...]:
    found = []
    if not is_by_run:
        found.append(
            f"{len(a)} and {len(b)} runs: the interval covers the noise within a run only; "
            f"{MIN_RUNS} runs each, interleaved, would cover the noise between runs"
        )
    if {run.device for run in a} != {run.device for run in b}:
        found.append("the runs used different devices")
    if _is_same_machine([*a, *b]) is False:
        found.append(
            f"A ran on {machine_name(a[0])}, B on {machine_name(b[0])}: ratios compare machines as well as what was changed"
        )
    for side, runs in (("A", a), ("B", b)):
        if len({str(run.setup) for run in runs}) > 1:
            found.append(f"{side} mixes different setups")
    noted = {warning for run in (*a, *b) for warning in run.warnings}
    return (*found, *sorted(noted))
