"""Results as evidence that can be shared: anonymised, checked, in the shape that `finefit accuracy` reads.

A shared line is a case (id, gpu, setup, stack, measured) that carries its whole record under `record`.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.anonymise import anonymise
from bench.store import Measurement
from planner.catalog import find_gpu
from planner.errors import FinefitError
from planner.files import write_atomically
from planner.stack import parse_stack
from planner.units import gib

SOURCE = "submitted"
OUTCOMES: Mapping[str, str] = {"ok": "measured", "oom": "oom"}
"""A run's outcome as evidence calls it; runs that ended otherwise say nothing about memory."""
STACK = ("transformers", "peft", "accelerate", "bitsandbytes", "liger-kernel", "torch")
SLACK = 1.02
"""Peaks may contradict each other by this much: they are sampled at different moments."""


def shared_case(run: Measurement) -> dict[str, Any]:
    """The case that a record makes. Raises ValueError, in words for its owner, where it can't or mustn't be shared."""
    problem = next((text for is_wrong, text in _RULES if is_wrong(run)), None)
    if problem is not None:
        raise ValueError(problem)
    clean = anonymise(run)
    record = json.loads(json.dumps(clean.to_json(), allow_nan=False))
    if Measurement.from_json(record).to_json() != record:
        raise ValueError("it can't be read back as it was written")
    measured = clean.measured
    peaks = {
        "peak_allocated_gib": measured.peak_allocated_bytes,
        "peak_reserved_gib": measured.peak_reserved_bytes,
        "device_used_gib": measured.device_used_bytes,
    }
    return {
        "id": f"{SOURCE}-{clean.id}",
        "source": f"{SOURCE}@{clean.time_utc}",
        "gpu": clean.gpu,
        "setup": {key: value for key, value in clean.setup.to_dict().items() if key != "stack"},
        "stack": _stack(clean),
        "lengths": "exact",
        "measured": {
            "outcome": OUTCOMES[clean.outcome],
            **({name: gib(value) for name, value in peaks.items() if value} if clean.outcome == "ok" else {}),
        },
        "record": record,
    }


def _stack(run: Measurement) -> str | None:
    """The versions that ran, without a build's suffix; None for those that finefit's own step is modelled with."""
    versions = run.environment["versions"]
    words = [f"{name} {str(versions[name]).partition('+')[0]}" for name in STACK if name in versions]
    text = ", ".join(words)
    return text if parse_stack(text).is_older else None


def _is_unknown_card(run: Measurement) -> bool:
    try:
        find_gpu(run.gpu)
    except FinefitError:
        return True
    return False


def _contradicts_itself(run: Measurement) -> bool:
    """Whether a part is larger than what holds it."""
    measured, total = run.measured, run.environment.get("gpu_total_bytes")
    largest_term = max(measured.terms.values(), default=None)
    chain = (
        largest_term,
        measured.peak_allocated_bytes,
        measured.peak_reserved_bytes,
        measured.device_used_bytes,
        total,
    )
    known = [value for value in chain if isinstance(value, int)]
    return any(smaller > SLACK * larger for smaller, larger in pairwise(known))


_RULES: Sequence[tuple[Callable[[Measurement], bool], str]] = (
    (lambda run: run.outcome not in OUTCOMES, "it ended neither well nor for want of memory"),
    (lambda run: run.device != "cuda", "it ran on no GPU, and evidence is about cards"),
    (_is_unknown_card, "its card is none that finefit knows (`finefit list gpus`)"),
    (
        lambda run: (
            not isinstance(run.environment.get("versions"), Mapping)
            or "torch" not in run.environment["versions"]
        ),
        "it doesn't say which versions ran",
    ),
    (
        lambda run: run.outcome == "ok" and not run.measured.peak_allocated_bytes,
        "it has no measured peak",
    ),
    (_contradicts_itself, "its peaks contradict each other"),
    (
        lambda run: run.outcome == "oom" and "memory" not in (run.error or "").lower(),
        "it doesn't say that memory ran out",
    ),
)
"""What makes a record no evidence, each in words."""


def shared_cases(runs: Iterable[Measurement]) -> tuple[list[dict[str, Any]], list[str]]:
    """The cases of all records that can be shared, each once, and why the others can't."""
    cases: dict[str, dict[str, Any]] = {}
    reasons = []
    for run in runs:
        try:
            case = shared_case(run)
            cases[case["id"]] = case
        except ValueError as error:
            reasons.append(f"run {run.id[:8]} is left out: {error}")
    return list(cases.values()), reasons


def write_cases(cases: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """One file of these cases in a folder, named by card, day and content; the same cases give the same file.

    Raises FinefitError where it can't be written.
    """
    text = "".join(json.dumps(case, allow_nan=False, ensure_ascii=False) + "\n" for case in cases)
    card = re.sub(r"[^a-z0-9]+", "-", str(cases[0]["gpu"]).lower()).strip("-")
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    path = folder / f"finefit-{card}-{time.strftime('%Y%m%d', time.gmtime())}-{digest}.jsonl"
    write_atomically(path, text)
    return path
