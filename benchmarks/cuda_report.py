"""What benchmarks/cuda_speed.py found, as a summary and as reports/speed-cuda.md."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "trl", "liger-kernel")
TITLES = {
    "natural": "Instruction rows of their own lengths, answers trained: 128 rows a step",
    "blocks": "Full rows of 1,024 tokens, all trained: 8 rows a step",
}

Results = Mapping[str, Sequence[Mapping[str, Any]]]


def summarise(results: Results, about: Mapping[str, Any]) -> dict[str, Any]:
    """By case and program: real tokens per second over all children, memory, losses, and the raw figures."""
    cases = {}
    for case, children in results.items():
        names = list(dict.fromkeys(child["arm"] for child in children))
        cases[case] = {name: _arm([c for c in children if c["arm"] == name]) for name in names}
    return {"cases": cases, "environment": _environment(), "about": dict(about), "raw": dict(results)}


def _arm(children: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    done = [child for child in children if "tokens" in child]
    if not done:
        return {"what": children[0]["what"], "failure": children[0]["failure"]}
    steps = sorted(s for child in done for s in child["step_wall_s"])
    return {
        "what": done[0]["what"],
        "tokens_per_s": sum(c["tokens"] for c in done) / sum(c["wall_s"] for c in done),
        "step_s": statistics.median(steps),
        "low_step_s": steps[len(steps) // 4],
        "high_step_s": steps[(3 * len(steps)) // 4],
        "num_steps": len(steps),
        "num_children": len(done),
        "first_step_wall_s": min(c["first_step_wall_s"] for c in done),
        "first_loss": done[0]["first_loss"],
        "held_out_loss": done[0]["held_out_loss"],
        "peak_allocated_bytes": max(c.get("peak_allocated_bytes", 0) for c in done),
        "peak_reserved_bytes": max(c.get("peak_reserved_bytes", 0) for c in done),
    }


def _environment() -> dict[str, Any]:
    return {
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        **_card(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _card() -> dict[str, str]:
    """The first card's name and driver, as the driver's own tool says them."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {"gpu": "none", "driver": "none"}
    name, _, driver = done.stdout.splitlines()[0].partition(", ")
    return {"gpu": name, "driver": driver}


def format_report(summary: Mapping[str, Any]) -> str:
    """The report's Markdown."""
    about = summary["environment"]
    parts = [f"# Speed of training on one {about['gpu']}", _HEAD]
    if summary["about"]["tiny"]:
        parts.append("**A rehearsal with a tiny model: these figures say nothing.**")
    for case, arms in summary["cases"].items():
        parts.append(f"## {TITLES[case]}\n\n{_ratios(arms)}\n\n{_table(arms)}")
    return "\n\n".join([*parts, _method(summary["about"]), _surroundings(about)]) + "\n"


_HEAD = (
    "LoRA of rank 16 on all linears of a Llama with the shape of Llama 3.2 1B (16 layers of 2,048, 32 heads on 8, "
    "49,152 tokens) and random weights: speed and memory don't depend on what they are."
)


def _ratios(arms: Mapping[str, Mapping[str, Any]]) -> str:
    rates = {name: arm["tokens_per_s"] for name, arm in arms.items() if "tokens_per_s" in arm}
    rivals = {name: rate for name, rate in rates.items() if not name.startswith("finefit")}
    if "finefit" not in rates or not rivals:
        return "finefit or all rivals didn't run."
    lines = [
        "| finefit against | real tokens per second, ratio | peak reserved memory, ratio |",
        "|---|---|---|",
    ]
    own = arms["finefit"]["peak_reserved_bytes"]
    for name in sorted(rivals, key=lambda name: -rivals[name]):
        held = arms[name]["peak_reserved_bytes"]
        share = f"{own / held:.2f}" if held else "unknown"
        lines.append(f"| {name} | **{rates['finefit'] / rivals[name]:.2f}** | {share} |")
    return "\n".join(lines)


def _table(arms: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "| program | real tokens/s | ms a step (middle half) | steps | peak allocated, reserved, GB | first step after, s "
        "| first step's loss | held-out loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in arms.items():
        if "failure" in arm:
            lines.append(
                f"| {name}: {arm['what']} | failed: {arm['failure'][:120].replace('|', '/')} | | | | | | |"
            )
            continue
        allocated, reserved = (arm[f"peak_{kind}_bytes"] / 1e9 for kind in ("allocated", "reserved"))
        lines.append(
            f"| {name}: {arm['what']} | {arm['tokens_per_s']:.0f} | {arm['step_s'] * 1e3:.0f} "
            f"({arm['low_step_s'] * 1e3:.0f} – {arm['high_step_s'] * 1e3:.0f}) | {arm['num_steps']} "
            f"| {allocated:.2f}, {reserved:.2f} | {arm['first_step_wall_s']:.1f} "
            f"| {_number(arm['first_loss'])} | {_number(arm['held_out_loss'])} |"
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def _method(about: Mapping[str, Any]) -> str:
    return f"""## How it was measured

* The same rows, labels and adapters for all (fused AdamW, constant rate of 2e-4, gradients clipped at 1, the loss read at
  each step), {about["steps"]} steps of which the first {about["discarded"]} don't count; nothing is evaluated or saved while the clock runs.
  A program that takes longer than 8 s is stopped early: its held-out loss is of fewer steps.
* Real tokens: padding doesn't count. Wall seconds from step to step, each after torch.cuda.synchronize().
* Each child is a process of its own, one after the other. Peaks are those of torch's allocator in the whole process.
* The first step's loss tells that all begin with the same weights: of random ones it is near ln(49,152) = 10.80 on any
  rows, and the programs draw their first rows in orders of their own. The held-out loss is taken after the last step, by the
  same plain code for all.
* Precision alike in the tuned comparison: bfloat16 weights, adapters and optimizer, no autocast."""


def _surroundings(about: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{about['gpu']}, driver {about['driver']}; {versions}; Python {about['python']}; {about['cpus']} CPUs, "
        f"{about['machine']}. Raw figures: speed-cuda.json."
    )
