"""The report of a run's folder: did training work, how fast, and was the prediction right?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report.content import Block, Code, Facts, Notes, Report, Section, Table, section
from bench.report.drawing import spread
from bench.report.memory_figures import bars_figure, steps_figure
from bench.report.money import money_blocks
from bench.report.shared import (
    clip,
    environment_facts,
    label,
    machine_of,
    percent,
    reproduce,
    setup_facts,
    size,
    unique,
)
from bench.store import check_plain
from bench.terms import is_number, table_of
from planner.errors import FinefitError
from planner.estimate import estimate
from planner.planfile import PlanFile, read_plan
from planner.specs import Machine
from planner.units import format_duration, gib

MAX_FILE_BYTES = 2**28
MAX_SAMPLES = 3
MAX_MOMENTS = 6
"""Evaluations whose answers are shown: the first, the last, and some between them."""


def is_run_folder(path: Path) -> bool:
    """Whether `finefit train` made this folder."""
    return path.is_dir() and (path / "plan.yaml").is_file()


def run_report(folder: Path, made: str) -> Report:
    """The report of a run, finished or not. Raises FinefitError where its files can't be read."""
    plan = read_plan(folder / "plan.yaml")
    entries, num_broken = _read_metrics(folder / "metrics.jsonl")
    steps, evaluations = entries.get("step", []), entries.get("eval", [])
    summary = _read_summary(folder / "summary.json")
    said = [*entries.get("retry", []), *entries.get("warning", [])]
    notes = [*_texts(summary.get("notes")), *_texts([entry.get("note") for entry in said])]
    if num_broken:
        notes.append(f"{num_broken} lines of metrics.jsonl can't be read and were left out")
    if not summary:
        notes.append("the run isn't finished: there is no summary.json yet")
    return Report(
        question=f"Did fine-tuning work: {label(plan.setup)}?",
        answer=_answer(summary, steps, evaluations),
        tone="good" if _has_improved(summary) else "doubtful",
        doubts=unique(notes),
        sections=(
            *section(
                "The run",
                [
                    setup_facts(plan.setup, str(summary.get("device") or plan.gpu or "unknown")),
                    _facts(summary, steps),
                ],
            ),
            *section(
                "Learning",
                [
                    _losses(steps, evaluations),
                    _series(evaluations, "token_accuracy", "Token accuracy on held-out rows"),
                    _series(steps, "grad_norm", "Norm of the gradients"),
                    _series(steps, "learning_rate", "Learning rate"),
                ],
            ),
            *section(
                "Speed and memory",
                [
                    _series(steps, "tokens_per_s", "Tokens per second", from_zero=True),
                    _memory(steps, table_of(summary, "predicted") or plan.predicted),
                ],
            ),
            *section("Predicted beside measured", [_predictions(plan, summary), *_expected(plan, summary)]),
            *_money(plan, summary),
            *section("Answers along the run", _answers(summary, entries.get("sample", []))),
            *section(
                "Environment",
                [
                    environment_facts(
                        {
                            **table_of(summary, "environment"),
                            "versions": summary.get("versions"),
                            "gpu_name": summary.get("device"),
                        }
                    )
                ],
            ),
            *section("Reproduce", _reproduce(plan, summary)),
        ),
        made=made,
    )


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise FinefitError(f"{path} is larger than any run's; it is not read")
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise FinefitError(f"can't read {path}: {error.strerror or error}") from error


def _parse(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text, parse_constant=lambda name: None)
        check_plain(value)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _read_metrics(path: Path) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """The entries of each kind, and how many lines are none."""
    entries = [_parse(line) for line in _read_text(path).splitlines() if line.strip()]
    good = [entry for entry in entries if entry is not None and is_number(entry.get("step"))]
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for entry in good:
        by_kind.setdefault(str(entry.get("kind")), []).append(entry)
    return by_kind, len(entries) - len(good)


def _read_summary(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    found = _parse(text)
    if text.strip() and found is None:
        raise FinefitError(f"{path} is no summary of a run")
    return found or {}


def _texts(values: Any) -> list[str]:
    return [clip(value) for value in values] if isinstance(values, list) else []


def _figure(values: Mapping[str, Any], name: str) -> float | None:
    value = values.get(name)
    return float(value) if is_number(value) else None


def _has_improved(summary: Mapping[str, Any]) -> bool:
    before, after = (_figure(table_of(summary, f"eval_{when}"), "loss") for when in ("before", "after"))
    return before is not None and after is not None and after < before


def _answer(
    summary: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> str:
    before, after = (_figure(table_of(summary, f"eval_{when}"), "loss") for when in ("before", "after"))
    num_steps = len(steps)
    if before is not None and after is not None:
        verdict = "Yes" if after < before else "No"
        took = _figure(summary, "train_s")
        time = "" if took is None else f" in {format_duration(took)}"
        return (
            f"{verdict}: the held-out loss went from {before:.3f} to {after:.3f} in {num_steps} steps{time}."
        )
    losses = [loss for step in steps if (loss := _figure(step, "loss")) is not None]
    if not losses:
        return "Not known yet: no step has been taken."
    return f"Not judged on held-out data: the training loss went from {losses[0]:.3f} to {losses[-1]:.3f} in {num_steps} steps."


def _facts(summary: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> Facts:
    pairs = [("optimizer steps", str(len(steps)))]
    for name, key in (("tokens", "num_tokens"), ("tokens that gave a loss", "num_trained_tokens")):
        value = _figure(summary, key)
        if value is not None:
            pairs.append((name, f"{value:,.0f}"))
    if is_number(summary.get("resumed_from")):
        pairs.append(("resumed from step", str(summary["resumed_from"])))
    return Facts(title="", pairs=tuple(pairs))


def _curve(entries: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(float(e["step"]), value) for e in entries if (value := _figure(e, name)) is not None]


def _losses(steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> Block | None:
    return steps_figure(
        "Loss", "loss", {"training": _curve(steps, "loss"), "held out": _curve(evaluations, "loss")}
    )


def _series(
    steps: Sequence[Mapping[str, Any]], name: str, title: str, *, from_zero: bool = False
) -> Block | None:
    return steps_figure(title, title.lower(), {title.lower(): _curve(steps, name)}, from_zero=from_zero)


def _memory(steps: Sequence[Mapping[str, Any]], predicted: Mapping[str, Any]) -> Block | None:
    """What was held after each step, with what was predicted for it as a level line."""
    names = {
        "resident set": "rss_bytes",
        "allocated after the step": "allocated_bytes",
        "highest allocated": "peak_allocated_bytes",
    }
    curves = {name: [(at, gib(value)) for at, value in _curve(steps, key)] for name, key in names.items()}
    is_on_card = bool(curves["highest allocated"])
    expected = _figure(
        table_of(predicted, "memory"), "peak_allocated_bytes" if is_on_card else "device_used_bytes"
    )
    if expected is not None and steps:
        ends = (float(steps[0]["step"]), float(steps[-1]["step"]))
        name = "predicted, allocated" if is_on_card else "predicted, resident"
        curves[name] = [(at, gib(expected)) for at in ends]
    return steps_figure("Memory after each step", "GiB", curves, from_zero=True)


_QUANTITIES = (
    ("peak of live tensors", "memory", "peak_allocated_bytes", size),
    ("peak reserved by torch", "memory", "peak_reserved_bytes", size),
    ("used on the device", "memory", "device_used_bytes", size),
    ("optimizer step", "time", "step_s", format_duration),
    ("tokens per second", "time", "tokens_per_s", lambda value: f"{value:,.0f}"),
)


def _predictions(plan: PlanFile, summary: Mapping[str, Any]) -> Block | None:
    predicted, measured = table_of(summary, "predicted") or plan.predicted, table_of(summary, "measured")
    rows = []
    for name, part, key, show in _QUANTITIES:
        expected, found = _figure(table_of(predicted, part), key), _figure(measured, key)
        if found is None and expected is None:
            continue
        error = percent(expected / found - 1) if expected is not None and found else ""
        rows.append((name, *("" if value is None else show(value) for value in (expected, found)), error))
    return (
        Table(title="", columns=("quantity", "predicted", "measured", "error"), rows=tuple(rows))
        if rows
        else None
    )


def _expected(plan: PlanFile, summary: Mapping[str, Any]) -> list[Block | None]:
    """Where the memory was expected to go, against what the machine could give; nothing where it isn't modelled."""
    try:
        found = estimate(plan.setup, _machine(plan, summary))
    except FinefitError:
        return []
    tables = (("phase", found.memory.phases), ("term", found.memory.terms))
    return [
        bars_figure(
            f"Expected peak by {name}",
            [(part, float(value), None) for part, value in table.items()],
            found.fit.usable_bytes,
        )
        for name, table in tables
    ]


def _machine(plan: PlanFile, summary: Mapping[str, Any]) -> Machine:
    """Where it ran; what a processor could give when the plan was made stands for its memory. Raises FinefitError."""
    predicted = table_of(summary, "predicted") or plan.predicted
    gpu = str(predicted.get("gpu") or plan.gpu or "local")
    return machine_of(gpu, {"ram_bytes": table_of(predicted, "fit").get("usable_bytes")}, plan.setup.num_gpus)


def _money(plan: PlanFile, summary: Mapping[str, Any]) -> list[Section]:
    speed = _figure(table_of(summary, "measured"), "tokens_per_s")
    try:
        machine = _machine(plan, summary)
    except FinefitError as error:
        return section("Time and money", [Notes(title="", lines=(f"No costs: {error}",))])
    return section("Time and money", money_blocks(plan.setup, machine, speed))


def _answers(summary: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> list[Block | None]:
    """Each prompt with its answers over the run."""
    moments = spread(
        [(_moment(entry["step"]), _samples(entry.get("samples"))) for entry in entries], MAX_MOMENTS
    )
    if not moments:
        moments = [(when, _samples(summary.get(f"sample_{when}"))) for when in ("before", "after")]
    prompts = zip(*(samples for _, samples in moments), strict=False)
    return [
        Facts(
            title=f"Prompt {number}",
            pairs=(
                ("asked", clip(answers[-1].get("prompt"))),
                *(
                    (when, clip(sample.get("answer")))
                    for (when, _), sample in zip(moments, answers, strict=True)
                ),
                ("expected", clip(answers[-1].get("expected") or "(nothing known)")),
            ),
        )
        for number, answers in enumerate(list(prompts)[:MAX_SAMPLES], start=1)
    ]


def _moment(step: float) -> str:
    return "before" if step == 0 else f"after step {step:.0f}"


def _samples(values: Any) -> list[Mapping[str, Any]]:
    return [v for v in values if isinstance(v, Mapping)] if isinstance(values, list) else []


def _reproduce(plan: PlanFile, summary: Mapping[str, Any]) -> list[Block | None]:
    blocks: list[Code] = reproduce(
        plan.setup, plan.gpu or "local", "finefit train plan.yaml", summary.get("versions")
    )
    return list(blocks)
