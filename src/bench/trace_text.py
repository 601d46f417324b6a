"""A traced step as `finefit trace` prints it for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.timeline import of_recording
from planner.render import Column, format_facts, format_table, paint, printable
from planner.render_estimate import format_estimate
from planner.render_plot import format_area
from planner.units import format_bytes

if TYPE_CHECKING:
    from bench.trace.estimate import Traced
    from bench.trace.replay import Replay


def format_trace(traced: Traced, width: int | None = None) -> str:
    """The estimate, the operator at the peak, the allocator's part, and the largest tensors."""
    parts = [
        format_estimate(traced.estimate, width),
        _format_step(traced, width),
        _format_peak(traced, width),
        _format_largest(traced, width),
    ]
    return "\n\n".join(part for part in parts if part)


def _format_step(traced: Traced, width: int | None) -> str:
    """Memory along the last step, with what the card can give."""
    stretches = of_recording(traced.result.timeline, traced.workspace_bytes)
    plot = format_area(stretches, traced.usable_bytes, width)
    return f"{paint('Memory along one step', 'strong')}\n{plot}" if plot else ""


def _format_peak(traced: Traced, width: int | None) -> str:
    result = traced.result
    facts = [("highest at", f"{_made_by(result.operator, result.module)}, in the {result.peak_phase} phase")]
    if traced.workspace_bytes:
        facts += [
            ("reserved", _describe_replay(traced, expandable=False)),
            ("with expandable segments", _describe_replay(traced, expandable=True)),
        ]
    return f"{paint('Traced', 'strong')}\n{format_facts(facts, width)}"


def _describe_replay(traced: Traced, *, expandable: bool) -> str:
    free = traced.replayed(expandable=expandable)
    text = f"{format_bytes(free.peak_reserved_bytes)}, {format_bytes(free.fragmentation_bytes)} of it fragmentation"
    if traced.usable_bytes is None:
        return text
    limited = traced.replayed(expandable=expandable, capacity_bytes=traced.usable_bytes)
    return f"{text}; {_describe_limit(traced, limited)}"


def _describe_limit(traced: Traced, limited: Replay) -> str:
    failed = traced.failure(limited)
    if failed is not None:
        return f"on this GPU it fails at {_made_by(failed['operator'], failed['module'])} ({failed['phase']})"
    if limited.num_retries:
        times = "once" if limited.num_retries == 1 else f"{limited.num_retries} times"
        peak = format_bytes(limited.peak_reserved_bytes)
        return f"on this GPU at most {peak}, the cache is emptied {times}"
    return "this GPU gives it"


def _made_by(operator: str, module: str) -> str:
    return f"{operator} in {printable(module)}" if module else operator


def _format_largest(traced: Traced, width: int | None) -> str:
    tensors = traced.result.largest
    columns = [
        Column(title="size", cells=tuple(format_bytes(t.num_bytes) for t in tensors), is_number=True),
        Column(title="category", cells=tuple(t.category for t in tensors)),
        Column(title="shape", cells=tuple("x".join(map(str, t.shape)) or "scalar" for t in tensors), drop=2),
        Column(title="dtype", cells=tuple(t.dtype for t in tensors), drop=3),
        Column(title="operator", cells=tuple(t.op for t in tensors), drop=1),
        Column(title="module", cells=tuple(printable(t.module) for t in tensors), is_prose=True),
    ]
    return f"{paint('The largest tensors alive then', 'strong')}\n{format_table(columns, width)}"


def format_trace_line(case: dict[str, Any]) -> str:
    """One line of `trace --cases` for people."""
    name = printable(str(case["id"]))
    if "error" in case:
        return f"{name}  error: {printable(case['error'])}"
    memory, peak = case["memory"], case["trace"]["peak"]
    sizes = f"{format_bytes(memory['peak_allocated_bytes'])}, {format_bytes(memory['peak_reserved_bytes'])} reserved"
    return f"{name}  {sizes}  {peak['phase']}: {_made_by(peak['operator'], peak['module'])}"
