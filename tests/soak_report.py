"""What a soak found, as Markdown and JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.anonymise import system_name

BROKEN = ("plan ", "file ")
"""How the failures of broken input begin."""
VERSIONS = ("torch", "transformers", "peft", "safetensors")


def write_report(soak: Any, options: argparse.Namespace, seconds: float) -> str:
    """The report's text; written with its figures where `--report` says."""
    found = figures(soak, options, seconds)
    text = report_text(found)
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        options.report.with_suffix(".md").write_text(text)
    return text


def figures(soak: Any, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    asked = {name: value for name, value in vars(options).items() if name != "report"}
    words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in asked.items())
    return {
        "command": f"python tests/soak.py {words}",
        "asked": asked,
        "seconds": round(seconds, 1),
        "environment": {
            "system": system_name(f"{platform.system()} {platform.release()}"),
            "machine": platform.machine(),
            "processors": os.cpu_count(),
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in VERSIONS},
        },
        "failures": soak.failures,
        "runs": soak.num_stories,
        "resumes": soak.num_resumes,
        "too_late": soak.num_too_late,
        "kills": dict(soak.kills.most_common()),
        "kills_in_saves": sum(n for phase, n in soak.kills.items() if phase.startswith("save")),
        "stops": {name: dict(counts.most_common()) for name, counts in soak.stops.items()},
        "exit_codes": dict(sorted(soak.codes.items())),
        "obeyed_s": spread(soak.obeyed_s),
        "recipes": dict(soak.recipes),
        "fresh": dict(soak.fresh),
        "broken_input": dict(soak.broken.most_common()),
    }


def spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {"median": round(statistics.median(values), 3), "worst": round(max(values), 3)}


def report_text(found: dict[str, Any]) -> str:
    num_kills, num_stops = (
        sum(found["kills"].values()),
        {n: sum(c.values()) for n, c in found["stops"].items()},
    )
    failures = found["failures"]
    lines = [
        "# Soak: kills and stops of real runs",
        "",
        f"Made by `{found['command']}` (`make soak`).",
        "",
        "A run of eight steps of a tiny Llama, in four recipes, is killed or stopped again and again in the same folder until",
        "it ends; then its losses, gradient norms, rates, evaluations, answers, the last checkpoint (weights, optimizer, random",
        "generators) and the saved adapter or model are compared, bit for bit, with those of a run that nothing stopped. A",
        "resumed life must also begin at or behind the last step that was reported as saved, and nothing may be left lying",
        "about in the folder.",
        "",
        f"**{num_kills} SIGKILL, {found['kills_in_saves']} of them in saves; {num_stops['SIGTERM']} SIGTERM, "
        f"{num_stops['SIGINT']} SIGINT; {found['resumes']} resumes in {found['runs']} runs: "
        f"{len(failures) or 'no'} failure{'s' * (len(failures) != 1)}.**",
        "",
        "| where it hit | SIGKILL | SIGTERM | SIGINT |",
        "|---|---|---|---|",
    ]
    columns = [found["kills"], found["stops"]["SIGTERM"], found["stops"]["SIGINT"]]
    totals: Counter[str] = Counter()
    for column in columns:
        totals.update(column)
    for phase, _ in totals.most_common():
        lines.append(f"| {phase} | " + " | ".join(str(c.get(phase, "")) for c in columns) + " |")
    lines += ["", *stop_lines(found), *fresh_lines(found), *broken_lines(found)]
    lines += [f"* FAILURE {line}" for line in failures]
    environment = ", ".join(f"{name} {value}" for name, value in found["environment"].items())
    lines += [f"{found['seconds']:.0f} s; {environment}.", ""]
    return "\n".join(lines)


def stop_lines(found: dict[str, Any]) -> list[str]:
    lines = ["Hits by recipe: " + counted(found["recipes"]) + ".", ""]
    if found["exit_codes"]:
        obeyed = found["obeyed_s"]
        lines += [
            "Stops end with exit code 33 where a checkpoint was there or could be written, with 143 before anything was trained:",
            f"{counted(found['exit_codes'])}. From the signal to the end: median {obeyed['median']} s, at most {obeyed['worst']} s",
            f"({found['too_late']} more signals came when the run was over).",
            "",
        ]
    return lines


def fresh_lines(found: dict[str, Any]) -> list[str]:
    if not found["fresh"]:
        return []
    heading = (
        "Fresh `finefit train` processes, each resumed by the same command and compared in the same way:"
    )
    return [heading, "", *(f"* {name}: {number}" for name, number in found["fresh"].items()), ""]


def broken_lines(found: dict[str, Any]) -> list[str]:
    """How commands ended on broken input: `command: exit code`, counted."""
    if not found["broken_input"]:
        return []
    asked = found["asked"]
    num_wrong = sum(line.startswith(BROKEN) for line in found["failures"])
    lines = [
        f"{asked['plans']:,} broken plans went through `train`, `estimate` and `export`, and {asked['files']:,} broken training files through",
        "`train` up to where it builds the model (`tests/broken_input.py` makes them). Each must give an answer or one line of error,",
        f"with an exit code of the contract, and leave an output folder whole or absent: {num_wrong or 'none'} did otherwise.",
        "",
        "| ended with | plans and files |",
        "|---|---|",
    ]
    for name, number in found["broken_input"].items():
        command, _, code = name.partition(": ")
        shown = f"`{command}`, exit code {code}" if code else "`train`, at the model"
        lines.append(f"| {shown} | {number} |")
    return [*lines, ""]


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a soak, with its broken input from a later one that looked at nothing else."""
    first, *later = parts
    for part in later:
        kept = [line for line in first["failures"] if not line.startswith(BROKEN)]
        first["failures"] = kept + part["failures"]
        first["broken_input"] = part["broken_input"]
        first["command"] += f"`, the broken input by `{part['command']}"
        first["seconds"] += part["seconds"]
    return first


def counted(counts: dict[str, int]) -> str:
    return "; ".join(f"{name}, {number} times" for name, number in counts.items())


if __name__ == "__main__":
    print(report_text(joined([json.loads(Path(name).read_text()) for name in sys.argv[1:]])), end="")
