"""`finefit verify`: is finefit right on this machine? A ladder of small plans is predicted, traced and measured.

Everything starts from random weights, so nothing is downloaded. The record is a results file that names nobody:
`finefit compare RECORD --predicted` reads it on any machine.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.anonymise import anonymise
from bench.jobs import Executor, Progress
from bench.measure import measure
from bench.protocol import StepProtocol
from bench.store import Measurement, append_result
from bench.terms import context_bytes
from planner.errors import FinefitError
from planner.estimate import estimate
from planner.results import Estimate
from planner.setup import TrainSetup
from planner.specs import Machine

BUDGET_S = 300.0
MIN_CASE_S = 30.0
"""Starting a process, importing the stack and building a small model take up to about this long."""
WARMUP_AND_STEPS = {True: (2, 10), False: (1, 3)}
"""Steps of each case, by whether there is a GPU: on a CPU one step of the larger model takes seconds."""

TINY = {
    "_name_or_path": "tiny-llama-30m",
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 16_384,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
SMALL = "smollm2-135m"

Tracer = Callable[[TrainSetup, Machine], Estimate]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """A plan of the ladder."""

    name: str
    setup: TrainSetup


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What became of a rung. `measurement` is None where it was not run; `note` says why, or what went wrong."""

    rung: Rung
    predicted: Mapping[str, Any] | None = None
    traced: Mapping[str, Any] | None = None
    measurement: Measurement | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyRow:
    """One quantity of one case: closed form, trace and measurement side by side; None where there is none."""

    name: str
    quantity: str
    predicted: float | None
    traced: float | None
    measured: float

    @property
    def predicted_error(self) -> float | None:
        """The closed form's relative error, above 0 where it was too high."""
        return None if self.predicted is None else self.predicted / self.measured - 1

    @property
    def traced_error(self) -> float | None:
        """The trace's relative error."""
        return None if self.traced is None else self.traced / self.measured - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """The whole ladder on one machine. `record_path` is the file to share."""

    gpu: str
    is_gpu: bool
    cases: tuple[Case, ...]
    duration_s: float
    record_path: Path | None

    @property
    def rows(self) -> list[VerifyRow]:
        """All quantities that were measured, case by case."""
        return [row for case in self.cases for row in _rows(case)]

    @property
    def context_bytes(self) -> int | None:
        """What a process takes beside its tensors: on a card, device use less reserved; on the CPU, the imports."""
        found = [context_bytes(case.measurement) for case in self.cases if case.measurement]
        known = [value for value in found if value is not None]
        return round(median(known)) if known else None


def ladder() -> tuple[Rung, ...]:
    """Full, LoRA and QLoRA, with and without checkpointing, short and long; the smallest model first."""
    tiny = TrainSetup(model=TINY, from_scratch=True, micro_batch_size=1, optimizer="adamw-fused")
    small = tiny.with_(model=SMALL)
    return tuple(
        _rung(label, base, method, checkpointing, seq_len)
        for label, base, method, checkpointing, seq_len in (
            ("30M", tiny, "full", "none", 512),
            ("30M", tiny, "lora", "none", 2048),
            ("30M", tiny, "qlora", "full", 512),
            ("30M", tiny, "full", "full", 2048),
            ("135M", small, "lora", "full", 512),
            ("135M", small, "qlora", "none", 512),
            ("135M", small, "full", "none", 512),
            ("135M", small, "lora", "none", 2048),
            ("135M", small, "qlora", "full", 2048),
            ("135M", small, "full", "full", 2048),
        )
    )


def _rung(label: str, base: TrainSetup, method: str, checkpointing: str, seq_len: int) -> Rung:
    suffix = ", checkpointed" if checkpointing == "full" else ""
    return Rung(
        name=f"{label} {method}, {seq_len} tokens{suffix}",
        setup=base.with_(method=method, checkpointing=checkpointing, seq_len=seq_len),
    )


def verify(
    machine: Machine,
    *,
    out_dir: Path | None = None,
    budget_s: float = BUDGET_S,
    rungs: Sequence[Rung] | None = None,
    trace: Tracer | None = None,
    executor: Executor | None = None,
    progress: Callable[[Rung, Progress], None] = lambda rung, step: None,
    clock: Callable[[], float] = time.monotonic,
) -> Verification:
    """Predict, trace (if `trace` is given) and measure each rung on this machine within about `budget_s`.

    `machine` is `local_machine()`'s. A rung that is predicted not to fit, or for which no time is left, is not
    run and says so. Each case is appended to a record in `out_dir` at once, without anything that names a person
    or a path. Raises FinefitError only when the record can't be written.
    """
    start = clock()
    path = None if out_dir is None else out_dir / record_name(machine)
    cases = []
    for rung in ladder() if rungs is None else rungs:
        case = _predict(rung, machine, trace)
        left_s = budget_s - (clock() - start)
        if case.note is None and left_s < MIN_CASE_S:
            case = replace(case, note="no time was left for it")
        if case.note is None:
            case = _measure(case, machine, left_s, executor, progress)
            if path is not None and case.measurement is not None:
                append_result(path, anonymise(case.measurement))
        cases.append(case)
    return Verification(
        gpu=machine.label,
        is_gpu=machine.gpu.backend != "cpu",
        cases=tuple(cases),
        duration_s=clock() - start,
        record_path=path if path is not None and path.exists() else None,
    )


def record_name(machine: Machine) -> str:
    """A file name that says which card and which day it is from."""
    card = re.sub(r"[^a-z0-9]+", "-", machine.gpu.name.lower()).strip("-")
    return f"finefit-verify-{card}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"


def _predict(rung: Rung, machine: Machine, trace: Tracer | None) -> Case:
    """Closed form and trace; a note where there is no prediction, or one that says it doesn't fit."""
    one_card = replace(machine, num_gpus=1)
    try:
        found = estimate(rung.setup, one_card)
    except FinefitError as error:
        return Case(rung=rung, note=f"no prediction: {error}")
    traced, doubt = _trace(rung.setup, one_card, trace)
    predicted: dict[str, Any] = {**found.to_json(), "traced": traced, "trace_error": doubt}
    too_large = found.fit.verdict == "does-not-fit"
    note = "predicted not to fit: not run" if too_large else None
    return Case(rung=rung, predicted=predicted, traced=traced, note=note)


def _trace(
    setup: TrainSetup, machine: Machine, trace: Tracer | None
) -> tuple[Mapping[str, Any] | None, str | None]:
    """The trace's JSON; whatever goes wrong in it is a finding of the verification, not its end."""
    if trace is None:
        return None, None
    try:
        return trace(setup, machine).to_json(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _measure(
    case: Case,
    machine: Machine,
    left_s: float,
    executor: Executor | None,
    progress: Callable[[Rung, Progress], None],
) -> Case:
    warmup, steps = WARMUP_AND_STEPS[machine.gpu.backend != "cpu"]
    measurement = measure(
        case.rung.setup,
        protocol=StepProtocol.of(warmup=warmup, steps=steps),
        predicted=case.predicted,
        gpu=machine.gpu.name,
        timeout_s=left_s,
        progress=lambda step: progress(case.rung, step),
        executor=executor,
    )
    failed = measurement.outcome != "ok"
    note = f"{measurement.outcome}: {measurement.error}" if failed else None
    return replace(case, measurement=measurement, note=note)


_SOURCES = {
    "peak_allocated_bytes": "memory",
    "peak_reserved_bytes": "memory",
    "device_used_bytes": "memory",
    "step_s": "time",
}


def _rows(case: Case) -> list[VerifyRow]:
    if case.measurement is None or case.measurement.outcome != "ok":
        return []
    measured = {name: getattr(case.measurement.measured, name) for name in _SOURCES}
    return [
        VerifyRow(
            name=case.rung.name,
            quantity=name,
            predicted=_value(case.predicted, name),
            traced=_value(case.traced, name),
            measured=value,
        )
        for name, value in measured.items()
        if value
    ]


def _value(answer: Mapping[str, Any] | None, quantity: str) -> float | None:
    value = ((answer or {}).get(_SOURCES[quantity]) or {}).get(quantity)
    return None if value is None else float(value)
