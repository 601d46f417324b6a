"""Peaks of traced steps, kept in a file: one JSON line for each setup on a card, so that a report needs no tracing.

A line holds `key`, `gpu`, `phases`, `terms` (bytes), `peak_phase` and `versions`. `key` is a digest of the setup's fields and the card: a line counts for exactly what was traced.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path

from planner.errors import DataError, NotModelledError
from planner.estimate import estimate
from planner.files import append_line
from planner.results import PHASES, TERMS, Estimate, Memory
from planner.setup import TrainSetup
from planner.specs import Machine
from planner.uncertainty import Uncertainty


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """One traced peak: bytes by phase, and by term at the highest one; the context isn't traced."""

    phases: Mapping[str, int]
    terms: Mapping[str, int]
    peak_phase: str


def key_of(setup: TrainSetup, gpu: str) -> str:
    """A digest of the fields that aren't their defaults, and of the card."""
    defaults = {field.name: field.default for field in fields(setup)}
    chosen = {name: value for name, value in setup.to_dict().items() if value != defaults[name]}
    return hashlib.sha256(json.dumps([gpu, chosen], sort_keys=True).encode()).hexdigest()[:16]


def read_traces(path: str, lines: Iterable[bytes]) -> dict[str, Kept]:
    """The kept peaks by key. Raises DataError naming the line of a broken one."""
    found: dict[str, Kept] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            kept = {name: row[name] for name in Kept.__slots__}
            terms, phases = kept["terms"], kept["phases"]
            if not {*TERMS} - {"context"} <= {*terms} or not {*PHASES} <= {*phases}:
                raise KeyError("a phase or a term")
            found[row["key"]] = Kept(**kept)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(path, f"not a kept trace ({error} is missing or broken)", number) from error
    return found


def kept_predictor(traces: Mapping[str, Kept]) -> Callable[[TrainSetup, Machine], Estimate]:
    """Predicts from kept traces; NotModelledError where there is none of exactly this setup and card."""

    def predict(setup: TrainSetup, machine: Machine) -> Estimate:
        kept = traces.get(key_of(setup, machine.gpu.name))
        if kept is None:
            raise NotModelledError(
                "no trace of this setup is kept (finefit accuracy CASES --trace makes one)"
            )
        answer = estimate(setup, machine)
        memory = Memory(
            phases=kept.phases,
            terms={**kept.terms, "context": answer.memory.terms["context"]},
            peak_phase=kept.peak_phase,
            host_bytes=answer.memory.host_bytes,
            disk_bytes=answer.memory.disk_bytes,
        )
        uncertainty = Uncertainty(setup, source="trace")
        usable_bytes = (answer.fit.usable_bytes or 0) + answer.memory.terms["context"]
        fit = uncertainty.judge(memory, usable_bytes)
        interval = uncertainty.interval(memory)
        return replace(answer, memory=memory, fit=fit, interval=interval, source="trace")

    return predict


def keeping(predict: Callable[[TrainSetup, Machine], Estimate], path: Path) -> Callable[..., Estimate]:
    """`predict`, a trace, with each answer added to a file at once; what the file has is taken from there.

    Raises DataError for a broken file, FinefitError where it can't be written.
    """
    known: dict[str, Kept] = {}
    if path.exists():
        with path.open("rb") as lines:
            known = read_traces(str(path), lines)
    kept = kept_predictor(known)

    def answer(setup: TrainSetup, machine: Machine) -> Estimate:
        key = key_of(setup, machine.gpu.name)
        if key in known:
            return kept(setup, machine)
        found = predict(setup, machine)
        terms = {name: size for name, size in found.memory.terms.items() if name != "context"}
        row = {
            "key": key,
            "gpu": machine.gpu.name,
            "peak_phase": found.memory.peak_phase,
            "phases": dict(found.memory.phases),
            "terms": terms,
            "versions": _versions(),
        }
        append_line(path, json.dumps(row))
        known[key] = Kept(phases=found.memory.phases, terms=terms, peak_phase=found.memory.peak_phase)
        return found

    return answer


def _versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("torch", "transformers", "peft", "bitsandbytes"):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name).partition('+')[0]}")
    return ", ".join(found)
