"""Answers: what a setup needs, whether it fits, how long it takes. All sizes in bytes, times in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from planner.setup import TrainSetup

SCHEMA_VERSION = 1

PHASES = ("load", "forward", "loss", "backward", "optimizer", "eval", "save", "resume")
TERMS = (
    "weights",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "workspace",
    "context",
    "fragmentation",
)
ALLOCATED_TERMS = TERMS[:7]


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Peak memory per GPU.

    `phases` gives the allocated peak of each phase, `terms` the parts of the highest one. The terms except
    context and fragmentation add up to `peak_allocated_bytes`, with fragmentation to `peak_reserved_bytes`,
    with context to `device_used_bytes`. `host_bytes` and `disk_bytes` are for the whole machine.
    """

    phases: Mapping[str, int]
    terms: Mapping[str, int]
    peak_phase: str
    host_bytes: int
    disk_bytes: int

    @property
    def peak_allocated_bytes(self) -> int:
        """What torch.cuda.max_memory_allocated() would say."""
        return sum(self.terms[t] for t in ALLOCATED_TERMS)

    @property
    def peak_reserved_bytes(self) -> int:
        """What torch.cuda.max_memory_reserved() would say."""
        return self.peak_allocated_bytes + self.terms["fragmentation"]

    @property
    def device_used_bytes(self) -> int:
        """What nvidia-smi would show for the process."""
        return self.peak_reserved_bytes + self.terms["context"]

    def to_json(self) -> dict[str, Any]:
        """The `memory` object of the JSON contract."""
        return {
            "peak_allocated_bytes": self.peak_allocated_bytes,
            "peak_reserved_bytes": self.peak_reserved_bytes,
            "device_used_bytes": self.device_used_bytes,
            "peak_phase": self.peak_phase,
            "phases": dict(self.phases),
            "terms": dict(self.terms),
            "host_bytes": self.host_bytes,
            "disk_bytes": self.disk_bytes,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Whether a peak fits: `headroom_bytes` is usable minus needed (negative: short by that much)."""

    verdict: str
    usable_bytes: int | None
    headroom_bytes: int | None
    probability: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """Where the allocated peak lies with probability `level`; None where published runs give no bound."""

    level: float
    low_peak_allocated_bytes: int | None
    high_peak_allocated_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Time:
    """One optimizer step (all micro-batches of all GPUs); the low/high pair is the stated interval."""

    step_s: float
    low_step_s: float
    high_step_s: float
    tokens_per_s: float
    mfu: float | None
    bound: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """The answer to one setup on one machine."""

    setup: TrainSetup
    gpu: str
    memory: Memory
    fit: Fit
    time: Time | None
    interval: Interval | None = None
    assumptions: tuple[str, ...] = ()
    not_modelled: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    source: str = "analytic"
    id: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The object of the JSON contract (schema_version 1)."""
        return {
            "schema_version": SCHEMA_VERSION,
            "id": self.id,
            "setup": self.setup.to_dict(),
            "gpu": self.gpu,
            "memory": {**self.memory.to_json(), **self._interval_json()},
            "fit": asdict(self.fit),
            "time": None if self.time is None else {**asdict(self.time), "bound": dict(self.time.bound)},
            "cost": None,
            "assumptions": list(self.assumptions),
            "not_modelled": list(self.not_modelled),
            "warnings": list(self.warnings),
            "source": self.source,
        }

    def _interval_json(self) -> dict[str, Any]:
        if self.interval is None:
            return {}
        values = asdict(self.interval)
        return {"interval_level": values.pop("level"), **values}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """An alternative that the plan did not take: why, and by how many bytes it misses (0: it would fit)."""

    label: str
    reason: str
    short_by_bytes: int
    estimate: Estimate | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The chosen configuration, the reasons in words, and the best alternatives that were rejected."""

    estimate: Estimate
    reasons: tuple[str, ...]
    rejected: tuple[Rejected, ...]

    def to_json(self) -> dict[str, Any]:
        """The chosen estimate with `reasons` and `rejected` added."""
        rejected = [
            {"label": r.label, "reason": r.reason, "short_by_bytes": r.short_by_bytes} for r in self.rejected
        ]
        return {**self.estimate.to_json(), "reasons": list(self.reasons), "rejected": rejected}
