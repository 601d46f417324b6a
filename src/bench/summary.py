"""summary.json: a finished run in figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.environment import describe_environment
from bench.metrics import memory_peaks
from bench.run import Run

STACK = ("finefit", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors")
"""The packages whose versions a summary names."""

_WARMUP_STEPS = 2
"""Steps that `measured` leaves out: memory is allocated and kernels are chosen in them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """summary.json: what a finished run was, gave and took.

    `artifact_step` is the step whose weights the artifact has. `predicted` is what the plan said. `measured`: `step_s`
    (median) and `tokens_per_s` (real tokens over the same steps), peaks in bytes of the last session. Evaluations are
    {step, loss, perplexity, token_accuracy, num_trained_tokens, num_examples} or None without held-out data; samples
    are [{prompt, expected, answer}]. `environment`: processor, memory, system and finefit's commit, of the last session.
    """

    setup: Mapping[str, Any]
    artifact: str
    artifact_step: int
    device: str
    num_steps: int
    num_tokens: int
    num_trained_tokens: int
    train_s: float
    final_loss: float | None
    eval_before: Mapping[str, Any] | None
    eval_after: Mapping[str, Any] | None
    sample_before: list[dict[str, str]]
    sample_after: list[dict[str, str]]
    predicted: Mapping[str, Any]
    measured: Mapping[str, Any]
    data: Mapping[str, Any]
    versions: Mapping[str, str]
    environment: Mapping[str, Any]
    resumed_from: int | None = None
    notes: list[str] = field(default_factory=list)
    schema_version: int = 1

    def to_json(self) -> dict[str, Any]:
        """The object that summary.json holds."""
        return asdict(self)


def summarise_run(run: Run, artifact: Path, artifact_step: int) -> RunSummary:
    """What a run that has ended was; the artifact has the weights of `artifact_step`."""
    state, plan = run.state, run.folder.plan
    at = {entry["step"]: entry for entry in state.evaluations}
    lines = list(run.log.read())
    steps = [entry for entry in lines if entry["kind"] == "step"]
    # those of earlier sessions too
    said = [entry["note"] for entry in lines if entry["kind"] in ("retry", "warning")]
    return RunSummary(
        setup=plan.setup.to_dict(),
        artifact=artifact.name,
        artifact_step=artifact_step,
        device=device_name(run.device),
        num_steps=state.step,
        num_tokens=state.num_tokens,
        num_trained_tokens=state.num_trained_tokens,
        train_s=state.train_s,
        final_loss=steps[-1]["loss"] if steps else None,
        eval_before=at.get(0),
        eval_after=at.get(state.step),
        sample_before=state.samples.get("0", []),
        sample_after=state.samples.get(str(state.step), []),
        predicted=dict(plan.predicted),
        measured={**_pace(steps), **_memory(run.device, steps)},
        data={"sha256": run.data.sha256, **run.data.facts},
        versions=stack_versions(),
        environment=describe_environment(),
        resumed_from=run.position.resumed_from,
        notes=list(dict.fromkeys([*said, *run.folder.notes])),
    )


def _memory(device: torch.device, steps: list[dict[str, Any]]) -> dict[str, int | None]:
    """Peaks in bytes; on the CPU the device's is the highest resident set that a step left behind.

    The process' own peak also holds loading, evaluation, answers and the check of the saved adapter.
    """
    peaks = memory_peaks(device)
    if device.type == "cpu" and steps:
        peaks["device_used_bytes"] = max(entry["rss_bytes"] for entry in steps)
    return peaks


def _pace(steps: list[dict[str, Any]]) -> dict[str, float | None]:
    """Median step and tokens per second after the warm-up."""
    warm = steps[_WARMUP_STEPS:] or steps
    if not warm:
        return {"step_s": None, "tokens_per_s": None}
    return {
        "step_s": statistics.median(entry["step_s"] for entry in warm),
        "tokens_per_s": sum(e["tokens"] for e in warm) / sum(e["step_s"] for e in warm),
    }


def device_name(device: torch.device) -> str:
    """The card's name, or `cpu`."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


def stack_versions() -> dict[str, str]:
    """Versions of the installed packages that decide what a run gives."""
    versions = {}
    for name in STACK:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
