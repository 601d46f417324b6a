"""Comparisons of measurements as people read them: one in full, several as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.compare import SIGNIFICANCE, Comparison
from bench.stats import Ratio
from planner.render import Column, format_facts, format_table, paint, printable, wrap

MAX_IN_FULL = 3
"""Above this many setups, one line each says more than a block each."""
MAX_NOTES = 8
_MEMORY = (
    ("peak_allocated_bytes", "peak of live tensors"),
    ("peak_reserved_bytes", "peak reserved by torch"),
    ("device_used_bytes", "used on the device"),
    ("energy_per_step_j", "energy per step"),
)


def format_comparisons(found: Sequence[Comparison], width: int | None = None) -> str:
    """B against A, setup by setup."""
    if len(found) <= MAX_IN_FULL:
        return "\n\n".join(_format_one(one, width) for one in found)
    num_different = sum(one.is_significant for one in found)
    verdict = (
        f"{num_different} of {len(found)} setups differ in step time by more than chance explains at p < {SIGNIFICANCE:g}; "
        f"by chance alone it would be about {SIGNIFICANCE * len(found):.0f}"
    )
    shared = dict.fromkeys(note for one in found for note in one.warnings)
    notes = [wrap(f"note: {printable(note)}", width, rest="  ") for note in list(shared)[:MAX_NOTES]]
    more = [f"note: and {len(shared) - MAX_NOTES} more; --json has them"] if len(shared) > MAX_NOTES else []
    return "\n".join([wrap(paint(verdict, "strong"), width), "", _table(found, width), "", *notes, *more])


def _table(found: Sequence[Comparison], width: int | None) -> str:
    def column(title: str, show: Callable[[Comparison], str], drop: int = 0) -> Column:
        return Column(title=title, cells=tuple(map(show, found)), drop=drop, is_number=True)

    return format_table(
        [
            Column(title="setup", cells=tuple(printable(one.label) for one in found)),
            column("runs", lambda one: f"{one.num_runs_a}, {one.num_runs_b}", 4),
            column("step, B / A", lambda one: f"{one.step.ratio:.3f}"),
            column("95 % interval", lambda one: f"{one.step.low_ratio:.3f} to {one.step.high_ratio:.3f}", 2),
            column("p", lambda one: f"{one.step.p_value:.2g}", 3),
            column("peak, B / A", lambda one: _number(one.peak_allocated_ratio), 1),
            column("differs", lambda one: "yes" if one.is_significant else ""),
        ],
        width,
    )


def _number(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"


def _format_one(found: Comparison, width: int | None) -> str:
    facts = [("setup", printable(found.label))] if found.label else []
    facts.append(("step time, B / A", _ratio(found.step)))
    if found.cpu_step is not None:
        facts.append(("CPU seconds per step, B / A", _ratio(found.cpu_step)))
    facts += [
        (f"{title}, B / A", _number(found.ratios[name])) for name, title in _MEMORY if name in found.ratios
    ]
    facts.append(("runs", f"{found.num_runs_a} and {found.num_runs_b}; intervals over each {found.unit}"))
    facts.append(("same machine", _known(found.is_same_machine)))
    facts.append(("same versions", _known(found.is_same_versions)))
    differences = {**found.setup_differences, **found.version_differences}
    facts += [(f"differs: {name}", printable(f"{a} -> {b}")) for name, (a, b) in differences.items()]
    notes = [wrap(f"note: {printable(note)}", width, rest="  ") for note in found.warnings]
    return "\n".join([paint(_verdict(found), "strong"), format_facts(facts, width), *notes])


def _verdict(found: Comparison) -> str:
    """Which side is faster, if it isn't chance."""
    if not found.is_significant:
        return "no difference in step time beyond chance"
    change = found.step.ratio - 1
    return f"B's step takes {abs(change):.1%} {'longer' if change > 0 else 'less time'} than A's"


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.ratio:.3f} ({ratio.low_ratio:.3f} to {ratio.high_ratio:.3f}, p = {ratio.p_value:.2g})"


def _known(value: bool | None) -> str:
    return "unknown" if value is None else "yes" if value else "no"
