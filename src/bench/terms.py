"""Where a prediction was wrong: a run's memory term by term and phase by phase, and its step time. Pure functions of records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeGuard

from bench.store import Measurement

KEPT = ("weights", "adapters", "optimizer")
"""Terms that stay from step to step: their bytes are counted tensor by tensor."""
REST = ("gradients", "activations", "logits", "workspace")
"""Terms that come and go; measured as what the peak holds beyond the kept ones."""

LEAST_SHARE = 0.001
"""Of the whole peak or step, from which on a part's error is given in relation to the part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TermRow:
    """One part of one run. Memory in bytes, times in seconds; `share` is the error as a share of the whole."""

    id: str
    part: str
    predicted: float
    measured: float
    whole: float

    @property
    def relative_error(self) -> float | None:
        """predicted / measured - 1; None for a part that is hardly there: next to itself its error says nothing."""
        return self.predicted / self.measured - 1 if self.measured >= LEAST_SHARE * self.whole else None

    @property
    def share(self) -> float:
        """(predicted - measured) / the whole peak or step: what this part adds to the error."""
        return (self.predicted - self.measured) / self.whole


@dataclass(frozen=True, kw_only=True, slots=True)
class TermError:
    """One part over several runs; `mean_error` and `worst_error` by size, None where it never was there."""

    part: str
    num_runs: int
    bias: float | None
    mean_error: float | None
    worst_error: float | None
    mean_share: float


def table_of(values: Any, *keys: str) -> Mapping[str, Any]:
    """The object below `keys` of a prediction; empty where there is none, whatever is there instead."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values if isinstance(values, Mapping) else {}


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a prediction's value is a figure."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def term_rows(run: Measurement) -> list[TermRow]:
    """A successful run's parts that are both predicted and measured; nothing for others."""
    if run.outcome != "ok":
        return []
    step_s = run.measured.step_s
    rows = [*_memory_parts(run), ("step_s", table_of(run.predicted, "time").get("step_s"), step_s, step_s)]
    return [
        TermRow(id=run.id, part=part, predicted=predicted, measured=measured, whole=whole)
        for part, predicted, measured, whole in rows
        if is_number(predicted) and is_number(measured) and whole
    ]


def _memory_parts(run: Measurement) -> list[tuple[str, Any, Any, Any]]:
    terms, phases = (table_of(run.predicted, "memory", key) for key in ("terms", "phases"))
    measured, peak = run.measured, run.measured.peak_allocated_bytes
    found = [(name, terms.get(name), measured.terms.get(name), peak) for name in KEPT]
    if peak is not None and all(name in measured.terms for name in KEPT):
        rest = peak - sum(measured.terms[name] for name in KEPT)
        found.append((" + ".join(REST), _sum(terms, REST), rest, peak))
    found += [
        ("fragmentation", terms.get("fragmentation"), fragmentation_bytes(run), peak),
        ("context", terms.get("context"), context_bytes(run), peak),
    ]
    return found + [
        (f"phase {name}", phases.get(name), value, peak) for name, value in measured.phases.items()
    ]


def _sum(terms: Mapping[str, Any], names: Sequence[str]) -> float | None:
    values = [terms[name] for name in names if is_number(terms.get(name))]
    return sum(values) if len(values) == len(names) else None


def context_bytes(run: Measurement) -> int | None:
    """What a process takes beside its tensors: on a card, device use less reserved; on the CPU, the imports."""
    measured = run.measured
    if run.device == "cpu":
        return measured.baseline_host_bytes
    if measured.device_used_bytes is None or measured.peak_reserved_bytes is None:
        return None
    return measured.device_used_bytes - measured.peak_reserved_bytes


def fragmentation_bytes(run: Measurement) -> int | None:
    """What the allocator holds beyond the live tensors; on the CPU, what the resident set holds beyond them and the imports."""
    measured = run.measured
    held, context = measured.peak_reserved_bytes, 0
    if run.device == "cpu":
        held, context = measured.device_used_bytes, measured.baseline_host_bytes or 0
    if held is None or measured.peak_allocated_bytes is None:
        return None
    return held - context - measured.peak_allocated_bytes


def errors_by_term(runs: Iterable[Measurement]) -> list[TermError]:
    """Each part's errors over all runs, in the order in which parts first appear."""
    parts: dict[str, list[TermRow]] = {}
    for run in runs:
        for row in term_rows(run):
            parts.setdefault(row.part, []).append(row)
    return [
        _error(part, rows) for part, rows in parts.items() if any(r.predicted or r.measured for r in rows)
    ]


def _error(part: str, rows: Sequence[TermRow]) -> TermError:
    errors = [row.relative_error for row in rows if row.relative_error is not None]
    return TermError(
        part=part,
        num_runs=len(rows),
        bias=fmean(errors) if errors else None,
        mean_error=fmean(map(abs, errors)) if errors else None,
        worst_error=max(errors, key=abs) if errors else None,
        mean_share=fmean(row.share for row in rows),
    )
