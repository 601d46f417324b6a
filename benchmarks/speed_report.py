"""What benchmarks/train_speed.py found, as a summary and as reports/speed.md."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl")
WANTED = (
    ("natural", ("trainer-tuned", "trl-tuned", "trl-packed"), 1.15),
    ("natural", ("trl-defaults",), 2.0),
    ("blocks", ("trainer-tuned", "trl-tuned", "trainer-eager"), 1.05),
)
"""Case, rivals of which the best counts, and the least ratio of finefit's real tokens per CPU-second to theirs. Whatever
else was tried of the tuned ones on the same rows counts with them."""

Arms = Mapping[str, Mapping[str, Any]]


def summarise(results: Mapping[str, list[dict[str, Any]]], report: Path | None) -> dict[str, Any]:
    """By case and program: total tokens over total CPU-seconds, the children's spread. What isn't run again keeps its figures in `report`."""
    old = report.with_suffix(".json") if report else None
    summary = json.loads(old.read_text()) if old and old.is_file() else {}
    cases = summary.get("cases", {})
    raw = summary.get("raw", {}) if cases else {}
    for case, found in results.items():
        newest = {child["arm"] for child in found}
        children = [child for child in raw.get(case, []) if child["arm"] not in newest] + found
        raw[case] = children
        cases[case] = {name: _arm([c for c in children if c["arm"] == name]) for name in _names(children)}
    return {"cases": cases, "environment": _environment(), "raw": raw}


def _names(children: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(child["arm"] for child in children))


def _arm(children: list[dict[str, Any]]) -> dict[str, Any]:
    failures = [child["failure"] for child in children if "failure" in child]
    if failures:
        return {"what": children[0]["what"], "failure": failures[0]}
    rates = [child["tokens"] / child["cpu_s"] for child in children]
    return {
        "what": children[0]["what"],
        "tokens_per_cpu_s": sum(c["tokens"] for c in children) / sum(c["cpu_s"] for c in children),
        "low": min(rates),
        "high": max(rates),
        "peak_rss_bytes": max(child["peak_rss_bytes"] for child in children),
        "first_step_cpu_s": statistics.median(child["first_step_cpu_s"] for child in children),
        "first_step_wall_s": statistics.median(child["first_step_wall_s"] for child in children),
        "held_out_loss": children[0]["held_out_loss"],
        "num_children": len(children),
        "num_steps": children[0]["steps"],
    }


def _environment() -> dict[str, Any]:
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[1],
    }


def check(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each wanted ratio with the one that was reached; those whose programs didn't run are left out."""
    found = []
    for case, rivals, least in WANTED:
        arms = summary["cases"].get(case, {})
        rates = _rates(arms, rivals)
        if case == "natural" and len(rivals) > 1:
            tried = summary["cases"].get("variants", {})
            rates |= _rates(tried, [name for name in tried if not name.startswith("finefit")])
        if not rates or "tokens_per_cpu_s" not in arms.get("finefit", {}):
            continue
        best = max(rates, key=lambda name: rates[name])
        ratio = arms["finefit"]["tokens_per_cpu_s"] / rates[best]
        found.append(
            {"case": case, "rival": best, "ratio": ratio, "wanted": least, "reached": ratio >= least}
        )
    return found


def _rates(arms: Arms, names: Iterable[str]) -> dict[str, float]:
    """Of those that ran to their end."""
    return {
        name: arms[name]["tokens_per_cpu_s"] for name in names if "tokens_per_cpu_s" in arms.get(name, {})
    }


def format_report(summary: Mapping[str, Any]) -> str:
    """The report's Markdown."""
    cases = summary["cases"]
    parts = ["# Speed of training on the CPU", _HEAD, _verdicts(summary)]
    for case, title in _TITLES.items():
        if case in cases:
            parts.append(f"## {title}\n\n{_table(cases[case])}")
    parts += [_METHOD, _limits(), _surroundings(summary["environment"])]
    return "\n\n".join(part for part in parts if part) + "\n"


_HEAD = (
    "Figures of a small model (SmolLM2-135M-Instruct) on a CPU, one thread: they say how little of a step is spent on "
    "anything but its arithmetic, not how fast a large model trains on a GPU."
)
_TITLES = {
    "natural": "Instruction rows of their own lengths, answers trained",
    "blocks": "Full rows, 4 x 512 tokens, all trained",
    "variants": "What else was tried on the rows of their own lengths",
}


def _verdicts(summary: Mapping[str, Any]) -> str:
    lines = ["| finefit against | real tokens per CPU-second, ratio | wanted |", "|---|---|---|"]
    for entry in check(summary):
        cases = summary["cases"]
        what = {**cases.get("variants", {}), **cases[entry["case"]]}[entry["rival"]]["what"]
        name = f"{entry['rival']} ({what}), {_TITLES[entry['case']].lower()}"
        lines.append(f"| {name} | **{entry['ratio']:.2f}** | {entry['wanted']} |")
    return "\n".join(lines)


def _table(arms: Arms) -> str:
    lines = [
        "| program | real tokens per CPU-s | children | peak RSS, MB | first step: CPU-s, wall s | held-out loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, arm in arms.items():
        if "failure" in arm:
            lines.append(
                f"| {name}: {arm['what']} | failed: {arm['failure'][:80].replace('|', '/')} | | | | |"
            )
            continue
        lines.append(
            f"| {name}: {arm['what']} | {arm['tokens_per_cpu_s']:.0f} | {arm['low']:.0f} – {arm['high']:.0f} "
            f"| {arm['peak_rss_bytes'] / 1e6:.0f} | {arm['first_step_cpu_s']:.1f}, {arm['first_step_wall_s']:.1f} "
            f"| {arm['held_out_loss']:.4f} |"
        )
    return "\n".join(lines)


_METHOD = """## How it was measured

* The same tokens, labels and adapters for all (LoRA of rank 16 on all linears, fused AdamW, constant rate of 2e-4, gradients
  clipped at 1, the loss read at each step); no evaluation and nothing saved while the clock runs. 32 rows or 4 blocks
  per optimizer step, one pass over the same rows, so that all have trained the same tokens when the held-out loss is taken.
* Each child is a process of its own; the programs take turns, forwards and then backwards. CPU-seconds are user and system time
  with children (getrusage), since wall time on a shared machine measures its neighbours. The first step is left out and
  shown by itself, from the start of the process.
* "malloc tuned": the rivals are given by glibc's environment variables what finefit asks of malloc by itself.
* Precision alike in the tuned comparison: bfloat16 weights, adapters and optimizer, no autocast.
* Peak RSS is the process' own, loading the weights included, before the held-out rows are judged."""


def _limits() -> str:
    path = Path(__file__).parents[1] / "reports" / "speed-limits.md"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _surroundings(about: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{versions}; Python {about['python']}; {about['cpus']} CPUs, {about['machine']}, one thread; load average at the "
        f"end {about['load_average']:.1f}. Raw figures: speed.json."
    )
