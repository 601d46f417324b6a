"""Runs, measurements and comparisons as people read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bench.compare import PredictionRow, predicted_vs_measured, traced_quantities
from bench.labels import describe, differing
from bench.store import Measurement
from bench.terms import TermError
from bench.verify import Verification, VerifyRow
from planner.render import Column, blank_repeats, format_facts, format_table, paint, printable, wrap
from planner.render_plot import format_area
from planner.units import format_bytes_finely, format_duration

MAX_SAMPLE_CHARS = 300
"""Of an answer that is shown after a run; summary.json has all of it."""
MAX_SHOWN_RUNS = 20
"""Above this many, a table of all runs is left to --json."""
GOOD_ERROR, FAIR_ERROR = 0.05, 0.15
"""Up to which relative error a prediction is shown as good, and as fair."""


_QUANTITIES: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "peak_allocated_bytes": ("peak of live tensors", format_bytes_finely),
    "peak_reserved_bytes": ("peak reserved by torch", format_bytes_finely),
    "device_used_bytes": ("used on the device", format_bytes_finely),
    "step_s": ("optimizer step", format_duration),
    "tokens_per_s": ("tokens per second", lambda value: f"{value:.0f}"),
}


def format_measurement(run: Measurement, width: int | None = None) -> str:
    """One run: what it was, predicted beside measured, how steady it was, and the doubts."""
    heading = paint(f"{describe(run.setup)} on {printable(run.gpu)}", "strong")
    notes = [wrap(f"note: {printable(note)}", width, rest="  ") for note in run.warnings]
    if run.outcome != "ok":
        return "\n".join([wrap(f"{heading}: {_failure(run)}", width), *notes])
    plot = format_area(run.timeline, None, width)
    along = ["", paint("Memory along one step", "strong"), plot] if plot else []
    facts = format_facts(_step_facts(run), width)
    return "\n".join([heading, "", _beside(run, width), "", *([facts] if facts else []), *along, "", *notes])


def _failure(run: Measurement) -> str:
    """How a run ended that didn't get through, and how far it came."""
    num_steps = len(run.samples.warmup_wall_s) + len(run.samples.step_wall_s)
    return f"{run.outcome} in phase {run.last_phase}, after {num_steps} steps: {printable(str(run.error))}"


def _beside(run: Measurement, width: int | None) -> str:
    """Each quantity as predicted, as traced where it was, and as measured."""
    errors = {row.quantity: row for row in predicted_vs_measured([run])}
    traced = traced_quantities(run)
    shown = [name for name in _QUANTITIES if getattr(run.measured, name) is not None]

    def column(title: str, show: Callable[[str], str]) -> Column:
        return Column(title=title, cells=tuple(map(show, shown)), is_number=True)

    return format_table(
        [
            Column(title="", cells=tuple(_QUANTITIES[name][0] for name in shown)),
            column("predicted", lambda name: _predicted(name, errors)),
            column("error", lambda name: _error(errors.get(name))),
            *([column("traced", lambda name: _shown(name, traced.get(name)))] if traced else []),
            column("measured", lambda name: _shown(name, getattr(run.measured, name))),
        ],
        width,
    )


def _shown(quantity: str, value: float | None) -> str:
    return "-" if value is None else _QUANTITIES[quantity][1](value)


def _step_facts(run: Measurement) -> list[tuple[str, str]]:
    """How many steps were measured, how far they spread, and what else was timed."""
    found, samples = run.measured, run.samples
    low, high = found.low_step_s, found.high_step_s
    facts = [
        (
            "median step",
            None
            if low is None or high is None
            else f"{format_duration(low)} to {format_duration(high)} (95 % interval)",
        ),
        (
            "measured",
            None
            if found.step_spread is None
            else f"{len(samples.step_wall_s)} steps after {len(samples.warmup_wall_s)} of warm-up, "
            f"spread {100 * found.step_spread:.1f} % (interquartile range / median)",
        ),
        *(
            (title, None if value is None else show(value))
            for title, value, show in (
                ("CPU time per step", found.cpu_step_s, format_duration),
                (
                    "tokens that give a loss",
                    found.trained_tokens_per_s,
                    lambda rate: f"{rate:.0f} per second",
                ),
                ("first step", found.first_step_s, format_duration),
                ("one evaluation batch", found.eval_s, format_duration),
                ("one checkpoint", found.save_s, format_duration),
                ("freed, but kept by malloc", found.freed_bytes, format_bytes_finely),
                ("energy per step", found.energy_per_step_j, lambda joules: f"{joules:.3g} J"),
            )
        ),
    ]
    return [(title, text) for title, text in facts if text is not None]


def format_sweep(runs: Sequence[Measurement], width: int | None = None) -> str:
    """All runs of a sweep under each other."""
    differences = differing(run.setup for run in runs)
    peaks = {row.id: row for row in predicted_vs_measured(runs) if row.quantity == "peak_allocated_bytes"}

    def column(
        title: str, show: Callable[[Measurement], str], drop: int = 0, *, number: bool = True
    ) -> Column:
        return Column(title=title, cells=tuple(map(show, runs)), drop=drop, is_number=number)

    def figure(name: str) -> Callable[[Measurement], str]:
        return lambda run: _shown(name, getattr(run.measured, name)) if run.outcome == "ok" else "-"

    columns = [
        column("setup", lambda run: describe(run.setup, differences), number=False),
        column("outcome", lambda run: run.outcome + (", doubtful" if run.warnings else ""), number=False),
        column("step", figure("step_s"), 2),
        column("tokens/s", figure("tokens_per_s")),
        column("peak", figure("peak_allocated_bytes")),
        column("error", lambda run: _error(peaks.get(run.id)), 1),
    ]
    return format_table(columns, width)


def _predicted(quantity: str, rows: Mapping[str, PredictionRow]) -> str:
    row = rows.get(quantity)
    return _shown(quantity, None if row is None else row.predicted)


def _error(row: PredictionRow | None) -> str:
    return "" if row is None else _paint_error(row.relative_error)


def _paint_error(error: float | None) -> str:
    if error is None:
        return ""
    tone = "good" if abs(error) <= GOOD_ERROR else "doubtful" if abs(error) <= FAIR_ERROR else "bad"
    return paint(_percent(error), tone)


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-0.0", "0.0").replace("+0.0", "0.0")


def format_predictions(rows: Sequence[PredictionRow], width: int | None = None) -> str:
    """Every quantity of every run, predicted beside measured."""

    def column(
        title: str, show: Callable[[PredictionRow], str], drop: int = 0, *, number: bool = False
    ) -> Column:
        return Column(title=title, cells=tuple(map(show, rows)), drop=drop, is_number=number)

    columns = [
        blank_repeats(column("run", lambda r: printable(r.id[:8]), 4)),
        column("model", lambda r: printable(r.model.rpartition("/")[2]), 1),
        column("method", lambda r: r.method, 2),
        column("GPU", lambda r: printable(r.gpu), 4),
        column("batch", lambda r: printable(r.batch), 3),
        column("quantity", lambda r: _QUANTITIES[r.quantity][0]),
        column("predicted", lambda r: _QUANTITIES[r.quantity][1](r.predicted), number=True),
        column("measured", lambda r: _QUANTITIES[r.quantity][1](r.measured), number=True),
        column("error", _error, number=True),
    ]
    return format_table(columns, width)


def format_term_errors(terms: Sequence[TermError], width: int | None = None) -> str:
    """Error by term and phase over all runs."""

    def column(title: str, show: Callable[[TermError], str], drop: int = 0) -> Column:
        return Column(title=title, cells=tuple(map(show, terms)), drop=drop, is_number=True)

    def percent(value: float | None) -> str:
        return "-" if value is None else _percent(value)

    columns = [
        Column(title="part", cells=tuple(term.part for term in terms)),
        column("runs", lambda t: str(t.num_runs), 2),
        column("mean error", lambda t: percent(t.bias)),
        column("by size", lambda t: percent(t.mean_error).lstrip("+"), 1),
        column("worst", lambda t: percent(t.worst_error)),
        column("of the whole", lambda t: percent(t.mean_share)),
    ]
    heading = paint("Error by term and phase (predicted over measured)", "strong")
    return f"{heading}\n{format_table(columns, width)}"


def format_verification(found: Verification, width: int | None = None) -> str:
    """The ladder: closed form, trace and measurement of every case, then where the record lies."""
    rows = found.rows

    def column(title: str, show: Callable[[VerifyRow], str], drop: int = 0, *, number: bool = True) -> Column:
        return Column(title=title, cells=tuple(map(show, rows)), drop=drop, is_number=number)

    def sized(row: VerifyRow, value: float | None) -> str:
        return "-" if value is None else _QUANTITIES[row.quantity][1](value)

    columns = [
        blank_repeats(column("plan", lambda r: r.name, number=False)),
        column("quantity", lambda r: _QUANTITIES[r.quantity][0], number=False),
        column("predicted", lambda r: sized(r, r.predicted), 2),
        column("error", lambda r: _paint_error(r.predicted_error)),
        column("traced", lambda r: sized(r, r.traced), 2),
        column("error of trace", lambda r: _paint_error(r.traced_error), 1),
        column("measured", lambda r: sized(r, r.measured)),
    ]
    reasons: dict[str, list[str]] = {}
    for case in found.cases:
        reasons.setdefault(case.note or "", []).append(case.rung.name)
    notes = [f"{why}: {'; '.join(names)}" for why, names in reasons.items() if why]
    if found.record_path is not None:
        notes.append(f"The record, to share: {found.record_path}")
    body = [format_table(columns, width)] if rows else []
    return "\n".join([*body, *(wrap(note, width, rest="  ") for note in notes)])


def format_summary(summary: Mapping[str, Any], folder: str, width: int | None = None) -> str:
    """A finished run: what it gave, predicted beside measured, one answer before and after."""
    facts = [
        (
            "run",
            f"{summary['num_steps']} steps, {summary['num_tokens']:,} tokens in {format_duration(summary['train_s'])}",
        ),
        ("result", f"{folder}/{summary['artifact']}"),
        *_evaluation_facts(summary),
    ]
    parts = [format_facts(facts, width), _format_measured(summary, width), *_format_samples(summary, width)]
    return "\n\n".join(part for part in parts if part)


_JUDGED = (
    ("perplexity", "perplexity", 2),
    ("rewards_margin", "reward margin", 3),
    ("rewards_accuracy", "reward accuracy", 3),
)
"""What an objective may give beside its loss: key, title, digits."""


def _evaluation_facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    before, after = summary["eval_before"], summary["eval_after"]
    if not before or not after:
        return [("held out", "no rows were held out")]
    return [
        ("held-out loss", f"{before['loss']:.3f} before, {after['loss']:.3f} after"),
        *(
            (title, f"{before[name]:.{digits}f} before, {after[name]:.{digits}f} after")
            for name, title, digits in _JUDGED
            if name in before and name in after
        ),
        *_accuracy_facts(before, after),
        ("judged on", f"{after['num_trained_tokens']:,} tokens of {after['num_examples']} held-out rows"),
    ]


def _accuracy_facts(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Nothing where the loss doesn't show its logits."""
    shares = [entry.get("token_accuracy") for entry in (before, after)]
    if None in shares:
        return []
    return [("token accuracy", f"{shares[0]:.1%} before, {shares[1]:.1%} after")]


def _format_measured(summary: Mapping[str, Any], width: int | None) -> str:
    """Predicted beside measured; empty where the plan predicted nothing."""
    predicted = {**(summary["predicted"].get("memory") or {}), **(summary["predicted"].get("time") or {})}
    measured = summary["measured"]
    shown = [name for name in _QUANTITIES if measured.get(name) is not None]
    if not shown:
        return ""

    def text(values: Mapping[str, Any], name: str) -> str:
        return "-" if values.get(name) is None else _QUANTITIES[name][1](values[name])

    columns = [
        Column(title="", cells=tuple(_QUANTITIES[name][0] for name in shown)),
        Column(title="predicted", cells=tuple(text(predicted, name) for name in shown), is_number=True),
        Column(title="measured", cells=tuple(text(measured, name) for name in shown), is_number=True),
    ]
    return format_table(columns, width)


def _format_samples(summary: Mapping[str, Any], width: int | None) -> Iterable[str]:
    """The first held-out prompt with the model's answer before and after."""
    before, after = summary["sample_before"], summary["sample_after"]
    if before and after:
        yield format_facts(
            [
                ("asked", _shorten(after[0]["prompt"])),
                ("before", _shorten(before[0]["answer"])),
                ("after", _shorten(after[0]["answer"])),
                ("expected", _shorten(after[0]["expected"])),
            ],
            width,
        )


def _shorten(text: str) -> str:
    """On one line, without what could steer the terminal."""
    plain = printable(text)
    return plain if len(plain) <= MAX_SAMPLE_CHARS else plain[:MAX_SAMPLE_CHARS] + " ..."
