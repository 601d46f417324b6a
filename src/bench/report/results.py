"""The report of a results file: which setup ran how fast, whether the prediction was right, and what makes it doubtful."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bench import timeline
from bench.compare import machine_key
from bench.labels import describe, describe_series, differing
from bench.report.chosen import by_setup, headline, key_of, middle, places
from bench.report.content import Block, Code, Notes, Report, Section, Table, section
from bench.report.memory_figures import (
    Point,
    against_length,
    bars_figure,
    steps_figure,
    timeline_figure,
)
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
from bench.report.watched_figures import surroundings, watched_figure
from bench.store import Measurement
from bench.terms import TermRow, errors_by_term, is_number, table_of, term_rows
from planner.errors import FinefitError
from planner.units import format_duration, gib

MAX_ROWS = 60
MAX_DOUBTS = 12
GOOD_ERROR = 0.05


def results_report(runs: Sequence[Measurement], warnings: Sequence[str], name: str, made: str) -> Report:
    """The report of at least one run; `warnings` are lines of the file that were left out.

    Raises FinefitError where there is no run.
    """
    if not runs:
        raise FinefitError(f"{name} holds no result")
    best = headline(runs)
    doubts = unique([*best.warnings, *machine_doubts(runs)])
    return Report(
        question=_question(runs, best),
        answer=_answer(runs, best),
        tone="bad" if best.outcome != "ok" else "doubtful" if doubts else "good",
        doubts=doubts[:MAX_DOUBTS],
        sections=(
            *section("What was measured", [setup_facts(best.setup, best.gpu), _figures(best)]),
            *section("Memory", _memory_blocks(best)),
            *section("Predicted beside measured", _prediction_blocks(runs)),
            *section("Speed", _speed_blocks(runs, best)),
            *_money(best),
            *section("All runs", [_runs_table(runs), _left_out(warnings)]),
            *section("Environment", [environment_facts(best.environment), *surroundings(best.watched)]),
            *section("Reproduce", _reproduce(best)),
        ),
        made=made,
    )


def _repeats(runs: Sequence[Measurement], best: Measurement) -> str:
    """How often the setup was measured and how far its runs are apart; nothing for a single run."""
    steps = [run.measured.step_s for run in by_setup(runs).get(key_of(best), []) if run.measured.step_s]
    if len(steps) < 2:
        return ""
    return f" It was measured {len(steps)} times; the slowest took {percent(max(steps) / min(steps) - 1)} longer than the fastest."


def machine_doubts(runs: Sequence[Measurement]) -> list[str]:
    """That a file mixes machines or versions, which no average may hide."""
    machines = {str(machine_key(run)) for run in runs}
    versions = {str(run.environment.get("versions")) for run in runs}
    found = []
    if len(machines) > 1:
        found.append(f"the file mixes runs of {len(machines)} machines: compare figures of one machine only")
    if len(versions) > 1:
        found.append(f"the runs used {len(versions)} different sets of versions")
    return found


def _question(runs: Sequence[Measurement], best: Measurement) -> str:
    if _is_single(runs):
        return f"Does {label(best.setup)} run on {clip(best.gpu)}, how fast, and was the prediction right?"
    return f"Which of {len(runs)} runs is the fastest on {clip(best.gpu)}, and were the predictions right?"


def _answer(runs: Sequence[Measurement], best: Measurement) -> str:
    outcomes = Counter(run.outcome for run in runs)
    others = "".join(f", {count} ended with {name}" for name, count in outcomes.items() if name != "ok")
    count = f" {outcomes['ok']} of {len(runs)} runs ended well{others}." if len(runs) > 1 else ""
    if best.outcome != "ok":
        return f"No: {best.outcome} in phase {clip(best.last_phase)}: {clip(best.error)}.{count}"
    name = clip(describe(best.setup, differing(run.setup for run in runs)))
    lead = "Yes" if _is_single(runs) else f"{name} is the fastest"
    measured = best.measured
    parts = (
        None if measured.step_s is None else f"{format_duration(measured.step_s)} a step",
        None if measured.tokens_per_s is None else f"{measured.tokens_per_s:,.0f} tokens/s",
        None
        if measured.peak_allocated_bytes is None
        else f"{size(measured.peak_allocated_bytes)} of live tensors{_was_right(best)}",
    )
    return f"{lead}: {', '.join(part for part in parts if part)}.{_repeats(runs, best)}{count}"


def _is_single(runs: Sequence[Measurement]) -> bool:
    return len({run.setup_id for run in runs}) == 1


def _was_right(best: Measurement) -> str:
    predicted = table_of(best.predicted, "memory").get("peak_allocated_bytes")
    measured = best.measured.peak_allocated_bytes
    if not is_number(predicted) or not measured:
        return ""
    error = predicted / measured - 1
    words = "the prediction was right" if abs(error) <= GOOD_ERROR else "the prediction was off"
    return f" ({words}: {size(predicted)}, {percent(error)})"


def _figures(best: Measurement) -> Table | None:
    measured = best.measured
    rows = (
        ("optimizer step, median", measured.step_s, format_duration),
        (
            "95 % interval of the median",
            measured.low_step_s,
            lambda low: f"{format_duration(low)} to {format_duration(measured.high_step_s or low)}",
        ),
        (
            "10th to 90th percentile",
            measured.p10_step_s,
            lambda low: f"{format_duration(low)} to {format_duration(measured.p90_step_s or low)}",
        ),
        ("spread (interquartile range / median)", measured.step_spread, lambda value: f"{100 * value:.1f} %"),
        ("measured steps", len(best.samples.step_wall_s) or None, str),
        ("CPU seconds per step", measured.cpu_step_s, format_duration),
        ("tokens per second, without padding", measured.tokens_per_s, lambda value: f"{value:,.0f}"),
        ("tokens that give a loss, per second", measured.trained_tokens_per_s, lambda value: f"{value:,.0f}"),
        ("first step, with compiling", measured.first_step_s, format_duration),
        ("one evaluation batch", measured.eval_s, format_duration),
        ("one checkpoint", measured.save_s, format_duration),
        ("energy per step", measured.energy_per_step_j, lambda value: f"{value:.0f} J"),
        ("peak of live tensors", measured.peak_allocated_bytes, size),
        ("peak reserved by torch", measured.peak_reserved_bytes, size),
        ("used on the device", measured.device_used_bytes, size),
        ("of it freed, kept by the C library for later steps", measured.freed_bytes, size),
        ("highest resident set", measured.host_bytes, size),
    )
    shown = tuple((name, show(value)) for name, value, show in rows if value is not None)
    return Table(title="", columns=("quantity", "measured"), rows=shown) if shown else None


def usable_bytes(run: Measurement) -> float | None:
    """What the card could give, by the prediction; None where there is none."""
    value = table_of(run.predicted, "fit").get("usable_bytes")
    return float(value) if is_number(value) else None


def traced_timeline(run: Measurement) -> tuple[timeline.Stretch, ...]:
    """The trace's memory along the step; nothing where the record has none, or a broken one."""
    try:
        return timeline.from_json(table_of(run.predicted, "traced").get("timeline", []))
    except ValueError:
        return ()


def _memory_blocks(best: Measurement) -> list[Block | None]:
    rows = {row.part: row for row in term_rows(best)}
    phases = [(name.removeprefix("phase "), row) for name, row in rows.items() if name.startswith("phase ")]
    terms = [(name, row) for name, row in rows.items() if not name.startswith("phase ") and name != "step_s"]
    limit = usable_bytes(best)
    return [
        timeline_figure(traced_timeline(best), best.timeline, limit),
        bars_figure("Peak by phase", _pairs(phases) or _measured_phases(best), limit),
        bars_figure("Peak by term", _pairs(terms), limit),
        watched_figure(best.watched),
    ]


def _pairs(rows: Sequence[tuple[str, TermRow]]) -> list[tuple[str, float | None, float | None]]:
    return [(name, row.predicted, row.measured) for name, row in rows]


def _measured_phases(best: Measurement) -> list[tuple[str, float | None, float | None]]:
    return [(name, None, float(value)) for name, value in best.measured.phases.items()]


def _prediction_blocks(runs: Sequence[Measurement]) -> list[Block | None]:
    errors = errors_by_term(runs)
    if not errors:
        return []
    rows = tuple(
        (
            e.part,
            str(e.num_runs),
            percent(e.bias),
            percent(e.mean_error).lstrip("+"),
            percent(e.worst_error),
            percent(e.mean_share),
        )
        for e in errors
    )
    return [
        Table(
            title="Error by term and phase, over all runs",
            columns=("part", "runs", "mean error", "by size", "worst", "of the whole"),
            rows=rows,
            note="Errors are predicted over measured, less one; the last column is the error as a share of the whole peak (or step).",
        )
    ]


def _speed_blocks(runs: Sequence[Measurement], best: Measurement) -> list[Block | None]:
    known = [run for run in runs if run.outcome in ("ok", "oom")]
    losses = [(i + 1.0, loss) for i, loss in enumerate(best.samples.losses) if loss is not None]
    walls = [(i + 1.0, wall) for i, wall in enumerate(best.samples.step_wall_s)]
    cpus = [(i + 1.0, cpu) for i, cpu in enumerate(best.samples.step_cpu_s)]
    return [
        against_length(
            "Tokens per second", "tokens/s", _points(known, "tokens_per_s"), show=lambda v: f"{v:,.0f}"
        ),
        against_length(
            "Peak of live tensors",
            "GiB",
            _points(known, "peak_allocated_bytes"),
            usable_bytes=usable_bytes(best),
            scale=gib,
            show=size,
        ),
        steps_figure("Seconds per measured step", "seconds", {"wall": walls, "CPU": cpus}, from_zero=True),
        steps_figure("Loss of the measured steps", "loss", {"loss": losses}),
    ]


def _points(runs: Sequence[Measurement], quantity: str) -> list[Point]:
    """One point per setup and machine, with the median run's value; the series is whatever differs beside the length."""
    differences = differing(run.setup for run in runs)
    place = places(runs)
    good = {key: middle(repeated) for key, repeated in by_setup(runs).items()}
    failed = {key_of(run): run for run in runs if key_of(run) not in good}
    points = []
    for run in (*good.values(), *failed.values()):
        value = getattr(run.measured, quantity)
        if run.outcome == "ok" and value is None:
            continue
        points.append(
            Point(
                series=f"{describe_series(run.setup, differences)}{place(run)}",
                seq_len=run.setup.seq_len,
                value=float(value) if run.outcome == "ok" else None,
            )
        )
    return points


def _money(best: Measurement) -> list[Section]:
    if best.outcome != "ok" or best.measured.tokens_per_s is None:
        return []
    try:
        machine = machine_of(best.gpu, best.environment, best.setup.num_gpus)
    except FinefitError as error:
        return section("Time and money", [Notes(title="", lines=(f"No costs: {error}",))])
    return section("Time and money", money_blocks(best.setup, machine, best.measured.tokens_per_s))


def _runs_table(runs: Sequence[Measurement]) -> Table:
    shown = runs[-MAX_ROWS:]
    differences, place = differing(run.setup for run in runs), places(runs)
    left = len(runs) - len(shown)
    return Table(
        title="",
        columns=("setup", "outcome", "predicted", "measured", "error", "step", "tokens/s", "run"),
        rows=tuple((clip(f"{describe(run.setup, differences)}{place(run)}"), *_row(run)) for run in shown),
        num_words=2,
        note=f"The last {len(shown)}; {left} earlier ones are in the results file." if left else "",
    )


def _row(run: Measurement) -> tuple[str, ...]:
    measured = run.measured
    predicted = table_of(run.predicted, "memory").get("peak_allocated_bytes")
    peak = measured.peak_allocated_bytes
    error = predicted / peak - 1 if is_number(predicted) and peak else None
    outcome = run.outcome if run.outcome == "ok" else f"{run.outcome} in {clip(run.last_phase)}"
    return (
        f"{outcome}{', doubtful' if run.warnings else ''}",
        size(predicted if is_number(predicted) else None),
        size(peak),
        percent(error),
        "" if measured.step_s is None else format_duration(measured.step_s),
        "" if measured.tokens_per_s is None else f"{measured.tokens_per_s:,.0f}",
        clip(run.id[:8]),
    )


def _left_out(warnings: Sequence[str]) -> Notes | None:
    if not warnings:
        return None
    more = f"and {len(warnings) - MAX_DOUBTS} more lines" if len(warnings) > MAX_DOUBTS else ""
    lines = (*unique(warnings[:MAX_DOUBTS]), *([more] if more else []))
    return Notes(title="Lines of the file that were left out", lines=lines, tone="doubtful")


def bench_command_of(run: Measurement, results: str = "results.jsonl") -> str:
    """The words that measure a record's setup as it was measured."""
    protocol: Mapping[str, Any] = run.protocol
    words = ["finefit", "bench", "plan.yaml", "--results", results]
    if protocol.get("random_weights") is True:
        words.append("--random-weights")
    if run.device in ("cpu", "cuda"):
        words += ["--device", run.device]
    if run.samples.step_wall_s:
        words += [
            "--warmup",
            str(len(run.samples.warmup_wall_s)),
            "--steps",
            str(len(run.samples.step_wall_s)),
        ]
    return " ".join(words)


def _reproduce(best: Measurement) -> list[Block | None]:
    blocks: list[Code] = reproduce(
        best.setup, best.gpu, bench_command_of(best), best.environment.get("versions")
    )
    return list(blocks)
