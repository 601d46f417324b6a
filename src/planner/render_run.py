"""A whole run's hours as people read them."""

from __future__ import annotations

from planner.cost import Span
from planner.render import format_facts
from planner.run_time import RunTime
from planner.units import format_duration


def format_run(run: RunTime, width: int | None = None) -> str:
    """Rows, steps, hours and their parts; what is unknown is called so."""
    facts = [("steps", f"{_range(run.length.low_steps, run.length.high_steps)} ({run.length.source})")]
    if run.lengths_source is not None:
        facts.append(("rows", f"{_describe_filling(run)} ({run.lengths_source})"))
    facts.append(("whole run", _describe_total(run)))
    return format_facts(facts, width)


def describe_span(span: Span) -> str:
    """Seconds from low to high.

    >>> describe_span(Span(low=60, high=7325))
    '60 s to 2 h 02 min'
    """
    low, high = format_duration(span.low), format_duration(span.high)
    return low if low == high else f"{low} to {high}"


def _range(low: int, high: int) -> str:
    return f"{high:,}" if low == high else f"{low:,} to {high:,}"


def _describe_filling(run: RunTime) -> str:
    filling = run.filling
    cut = filling.truncated_share
    parts = ["none cut" if cut == 0 else "an unknown share cut" if cut is None else f"{_percent(cut)} cut"]
    if cut and filling.lost_share is not None:
        parts[0] += f", losing {_percent(filling.lost_share)} of the tokens"
    if filling.padding_share is not None:
        parts.append(f"{_percent(filling.padding_share)} of the positions are padding")
    if filling.packing_gain is not None:
        parts.append(f"packing takes {filling.packing_gain:.1f} times fewer positions than padding")
    return "; ".join(parts)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _describe_total(run: RunTime) -> str:
    total = run.total_s
    if total is None or run.train_s is None or run.save_s is None:
        return "unknown: no time is known for this card (finefit bench measures it)"
    parts = [f"{describe_span(run.train_s)} of steps"]
    if run.eval_s is not None:
        reference = " and the reference" if run.computes_reference else ""
        parts.append(f"{describe_span(run.eval_s)} of {run.num_evals} evaluations{reference}")
    parts.append(f"{describe_span(run.save_s)} of {run.num_saves} saves")
    return f"{describe_span(total)}: {', '.join(parts)}"
