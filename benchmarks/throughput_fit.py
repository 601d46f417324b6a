"""Fits the efficiencies of each hardware class to published speeds, and writes what intervals are made of.

    python benchmarks/throughput_fit.py          (a minute on one core)

reads evidence/throughput-runs.jsonl; writes profiles/calibration/throughput-classes.json (efficiencies) and
throughput-errors.json (the errors of every run with its source left out of the fit). Fitted is one set of
efficiencies for each hardware class and kind of stack, never anything for a model, a method or a run. What runs of a
class don't tell apart stays at PRIORS and is named in `assumed`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from planner.errors import FinefitError
from planner.files import write_atomically
from planner.rates import Efficiency, card_rates, class_name, flops_per_byte, nearest, stack_kind
from planner.speed_accuracy import DECIMALS, Timed, timed
from planner.timing import Errors, Kind, project_of, table_text

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "evidence" / "throughput-runs.jsonl"
CALIBRATION = ROOT / "profiles" / "calibration"

PRIORS = {
    "tensor": 0.75,
    "attention": 0.55,
    "memory": 0.6,
    "dequantise": 0.5,
    "link": 0.6,
    "overlap": 0.5,
    "network_bytes_per_s": 80e9,
    "launch_s": 25e-6,
}
"""Where the fit starts, and what stays where nothing was measured. Products at 75 % and streams at 60 % of the peak; a
fused attention kernel at 55 % (FlashAttention-2 on A100: 50 to 73 %, arXiv 2307.08691); 25 µs of Python, autograd and
CUDA for each operation; collectives at 60 % of the link, half of them hidden; 80 GB/s per device through 8 adapters of 400 Gbit/s."""
PCIE_PRIOR = 0.1
"""Of PCI Express where cards have nothing else: without peer-to-peer access every byte crosses the host's memory twice."""
ATTENTION_PRIORS = {"sm_90": 0.35}
"""FlashAttention-2 on H100 (arXiv 2407.08608: 35 %)."""
BOUNDS = {
    "tensor": (0.1, 0.95),
    "attention": (0.1, 0.8),
    "memory": (0.2, 1.1),
    "dequantise": (0.05, 1.1),
    "link": (0.02, 0.9),
    "overlap": (0.05, 1.0),
}
HALF_RATE_TENSOR = 1.05
"""The tensor cores' share may pass 1 on GeForce cards, which run above the clock that their datasheet counts with; the
memory's everywhere, since caches serve part of what a tape counts as moved."""
PULL = 0.004
"""Weight of the squared logarithm of a parameter over its prior, against the mean error."""
MOST = 0.7
"""Errors beyond this (a factor of 2) count a fifth: something else is wrong with such a run."""
FEWEST = 6
"""Runs below which a class borrows those of its other kinds of stack, and else fits its products' rate and its link alone."""


def main() -> None:
    """Fit, leave out, write."""
    runs = list(_read())
    classes = fit_all(runs)
    write_atomically(CALIBRATION / "throughput-classes.json", _classes_text(classes))
    write_atomically(CALIBRATION / "throughput-errors.json", table_text(_errors(runs, classes)))


def _read() -> Iterable[Timed]:
    for line in RUNS.read_text(encoding="utf-8").splitlines():
        try:
            yield timed(json.loads(line))
        except FinefitError:
            continue


def _key(run: Timed) -> tuple[str, str]:
    return class_name(run.machine.gpu), stack_kind(run.setup.stack)


def fit_all(runs: Sequence[Timed]) -> dict[tuple[str, str], Efficiency]:
    """One set of efficiencies for each hardware class and kind of stack that has runs."""
    return {key: fit(key, runs) for key in sorted({_key(run) for run in runs})}


def fit(key: tuple[str, str], runs: Sequence[Timed]) -> Efficiency:
    """The efficiencies of one class and kind of stack."""
    own = [run for run in runs if _key(run) == key]
    used = own
    if len(own) < FEWEST:
        # What a vendor has tuned is borrowed last.
        alike = [r for r in runs if _key(r)[0] == key[0]]
        untuned = [r for r in alike if _key(r)[1] != "vendor"]
        used = untuned if len(untuned) >= FEWEST else alike
    free = _free(used)
    start = _start(key, used, free)
    found = _descend(start, used, free)
    if used is not own and "attention" in free:
        # The kernel is the stack's own.
        found = replace(found, attention=start.attention, assumed=(*found.assumed, "attention"))
    ratios = [_log_ratio(run, found) for run in own]
    return replace(found, spread=round(statistics.median(map(abs, ratios)), DECIMALS))


def _start(key: tuple[str, str], runs: Sequence[Timed], free: Sequence[str]) -> Efficiency:
    gpu = runs[0].machine.gpu
    priors = PRIORS | {"attention": ATTENTION_PRIORS.get(key[0], PRIORS["attention"])}
    has_link = (gpu.link_bytes_per_s or 0) >= 2 * (gpu.pcie_bytes_per_s or math.inf)
    return Efficiency(
        name=key[0],
        stack=key[1],
        **(priors | {"link": PRIORS["link"] if has_link else PCIE_PRIOR}),
        flops_per_byte=round(flops_per_byte(gpu), 1),
        num_runs=len(runs),
        spread=0.0,
        sources=tuple(sorted({project_of(run.source) for run in runs})),
        assumed=tuple(name for name in PRIORS if name not in free),
    )


def _free(runs: Sequence[Timed]) -> list[str]:
    """What these runs can tell."""
    is_shared = any(run.setup.num_gpus > 1 and run.setup.num_nodes == 1 for run in runs)
    if len(runs) < FEWEST:
        return ["tensor", "link"] if is_shared else ["tensor"]
    told = ["tensor", "memory", "launch_s"]
    if any(run.setup.attention != "eager" for run in runs):
        told.append("attention")
    if any(run.setup.quant for run in runs):
        told.append("dequantise")
    if is_shared:
        told += ["link", "overlap"]
    if any(run.setup.num_nodes > 1 for run in runs):
        told.append("network_bytes_per_s")
    return told


def _descend(start: Efficiency, runs: Sequence[Timed], free: Sequence[str]) -> Efficiency:
    """Coordinate descent with shrinking steps."""
    best, weights = start, _weights(runs)
    least, step = _loss(best, start, runs, weights, free), 0.35
    for _ in range(7):
        for name in free:
            for factor in (1 + step, 1 / (1 + step)):
                while (tried := _moved(best, name, factor)) is not None:
                    loss = _loss(tried, start, runs, weights, free)
                    if loss >= least - 1e-5:
                        break
                    best, least = tried, loss
        step *= 0.6
    return best


def _moved(reached: Efficiency, name: str, factor: float) -> Efficiency | None:
    value = float(f"{getattr(reached, name) * factor:.3g}")
    low, high = BOUNDS.get(name, (0.0, math.inf))
    if name == "tensor" and "half-rate" in reached.name:
        high = HALF_RATE_TENSOR
    return replace(reached, **{name: value}) if low <= value <= high else None


def _weights(runs: Sequence[Timed]) -> list[float]:
    """Runs of one model and method from one file count as the root of their number."""
    keys = [
        (r.source.partition("@")[0], r.model_name, r.setup.method, r.setup.sharding, r.setup.num_nodes > 1)
        for r in runs
    ]
    counts = Counter(keys)
    return [1 / math.sqrt(counts[key]) for key in keys]


def _loss(
    reached: Efficiency,
    start: Efficiency,
    runs: Sequence[Timed],
    weights: Sequence[float],
    free: Sequence[str],
) -> float:
    sizes = [abs(_log_ratio(run, reached)) for run in runs]
    clipped = [min(size, MOST) + 0.2 * max(0.0, size - MOST) for size in sizes]
    mean = sum(w * size for w, size in zip(weights, clipped, strict=True)) / sum(weights)
    return mean + PULL * sum(math.log(getattr(reached, n) / getattr(start, n)) ** 2 for n in free)


def _log_ratio(run: Timed, reached: Efficiency) -> float:
    rates = card_rates(run.machine.gpu, reached, run.setup.autocast or run.setup.weights_dtype)
    assert rates is not None
    return run.log_ratio(rates)[0]


def _errors(runs: Sequence[Timed], classes: dict[tuple[str, str], Efficiency]) -> list[Errors]:
    """Every run's error with its project left out of the fit, and by the nearest other class."""
    rows: dict[tuple[Kind, str, str], tuple[list[float], list[float]]] = {}
    for project in sorted({project_of(run.source) for run in runs}):
        kept = [run for run in runs if project_of(run.source) != project]
        touched = {_key(run) for run in runs if project_of(run.source) == project}
        table = {key: fit(key, kept) for key in sorted({_key(r) for r in kept} & _near(touched, runs))}
        table = {key: table.get(key, classes[key]) for key in {_key(r) for r in kept}}
        for run in (r for r in runs if project_of(r.source) == project):
            _note(rows, run, table, classes)
    return [
        Errors(
            kind=kind,
            source=source,
            model=model,
            held_out=tuple(sorted(held)),
            elsewhere=tuple(sorted(away)),
        )
        for (kind, source, model), (held, away) in rows.items()
    ]


def _near(touched: set[tuple[str, str]], runs: Sequence[Timed]) -> set[tuple[str, str]]:
    """Kinds of stack that share a hardware class with what is left out: they may have borrowed from it."""
    names = {name for name, _ in touched}
    return {_key(run) for run in runs if _key(run)[0] in names}


def _note(
    rows: dict[tuple[Kind, str, str], tuple[list[float], list[float]]],
    run: Timed,
    table: dict[tuple[str, str], Efficiency],
    classes: dict[tuple[str, str], Efficiency],
) -> None:
    gpu, kind = run.machine.gpu, stack_kind(run.setup.stack)
    own, ridge = class_name(gpu), flops_per_byte(gpu)
    held = nearest(own, ridge, kind, table.values())
    away = nearest(own, ridge, kind, [e for e in classes.values() if e.name != own])
    dtype = run.setup.autocast or run.setup.weights_dtype
    rates, others = card_rates(gpu, held, dtype), card_rates(gpu, away, dtype)
    assert rates is not None
    assert others is not None
    ratio, labels = run.log_ratio(rates)
    lists = rows.setdefault((labels, run.source, run.model_name), ([], []))
    lists[0].append(round(ratio, DECIMALS))
    lists[1].append(round(run.log_ratio(others)[0], DECIMALS))


def _classes_text(classes: dict[tuple[str, str], Efficiency]) -> str:
    lines = ",\n".join(f"  {json.dumps(asdict(classes[key]))}" for key in sorted(classes))
    return f'{{"schema_version": 1, "classes": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    main()
