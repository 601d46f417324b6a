"""Pictures of what was seen of a run from outside, over its seconds: memory, power, clocks, heat, other programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.report.content import Figure
from bench.report.drawing import SERIES, draw, legend_below, short
from bench.terms import is_number
from planner.units import format_bytes, gib

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def watched_figure(watched: Mapping[str, Sequence[Any]]) -> Figure | None:
    """The process' memory over the seconds of the run, phase by phase; None where it wasn't watched."""
    at, phases = watched.get("at_s", ()), watched.get("phase", ())
    columns = {"resident set": watched.get("rss_bytes", ()), "on the card": watched.get("device_bytes", ())}
    known = {
        name: values
        for name, values in columns.items()
        if any(map(is_number, values)) and len(values) == len(at) == len(phases)
    }
    if not known or not all(map(is_number, at)):
        return None
    tops = {name: max(value for value in values if is_number(value)) for name, values in known.items()}

    def fill(axes: Axes) -> None:
        for colour, (name, values) in zip(SERIES, known.items(), strict=False):
            pairs = [(t, gib(v)) for t, v in zip(at, values, strict=True) if is_number(v)]
            axes.plot([t for t, _ in pairs], [v for _, v in pairs], color=colour, label=name, linewidth=1.4)
        above = axes.get_xaxis_transform()
        for number, (start, name) in enumerate(_phase_starts(at, phases)):
            axes.axvline(start, color="black", linewidth=0.5, alpha=0.4)
            axes.text(
                start, 0.98 - 0.07 * (number % 3), f" {short(name)}", transform=above, va="top", fontsize=7
            )
        axes.set_ylim(0, 1.25 * gib(max(tops.values())))
        axes.set_xlabel("seconds since the start")
        axes.set_ylabel("GiB")
        legend_below(axes)

    words = [f"{name} at most {format_bytes(top)}" for name, top in tops.items()]
    return draw(
        "Memory over the run",
        f"Memory of the process over {max(at, default=0):.0f} seconds: {'; '.join(words)}.",
        fill,
    )


def _phase_starts(at: Sequence[float], phases: Sequence[Any]) -> list[tuple[float, str]]:
    """Where each phase begins that is long enough for its name."""
    names = [str(phase or "starting") for phase in phases]
    starts = [i for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
    ends = [*starts[1:], len(names) - 1]
    total = max(at, default=0.0)
    return [
        (at[i], names[i]) for i, end in zip(starts, ends, strict=True) if at[end] - at[i] >= 0.05 * total
    ][:12]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Column:
    """A column of `watched` with the unit that it is shown in: so many of the record's own make one."""

    name: str
    title: str
    unit: str
    scale: float


_COLUMNS = (
    _Column(name="power_w", title="Power of the card", unit="W", scale=1.0),
    _Column(name="clock_hz", title="Clock of the card", unit="GHz", scale=1e9),
    _Column(name="temperature_c", title="Temperature of the card", unit="°C", scale=1.0),
    _Column(name="cpu_clock_hz", title="Clock of the processors", unit="GHz", scale=1e9),
    _Column(name="cpu_busy_share", title="Processors in use, by whomever", unit="%", scale=0.01),
)


def surroundings(watched: Mapping[str, Sequence[Any]]) -> list[Figure]:
    """One small picture for each thing that was seen around the run."""
    return [figure for column in _COLUMNS if (figure := _column_figure(watched, column)) is not None]


def _column_figure(watched: Mapping[str, Sequence[Any]], column: _Column) -> Figure | None:
    at, values = watched.get("at_s", ()), watched.get(column.name, ())
    points = [
        (t, v / column.scale) for t, v in zip(at, values, strict=False) if is_number(t) and is_number(v)
    ]
    if len(points) < 2:
        return None
    phases = watched.get("phase", ())
    has_phases = len(phases) == len(at) and all(map(is_number, at))

    def fill(axes: Axes) -> None:
        axes.plot([t for t, _ in points], [v for _, v in points], color=SERIES[0], linewidth=1.2)
        for number, (start, name) in enumerate(_phase_starts(at, phases) if has_phases else []):
            axes.axvline(start, color="black", linewidth=0.5, alpha=0.4)
            place = 0.98 - 0.13 * (number % 3)
            axes.text(
                start, place, f" {short(name)}", transform=axes.get_xaxis_transform(), va="top", fontsize=7
            )
        axes.set_ylim(0, 1.25 * max(v for _, v in points) or 1)
        axes.set_xlabel("seconds since the start")
        axes.set_ylabel(column.unit)

    low, high = min(v for _, v in points), max(v for _, v in points)
    alt = f"{column.title} over {points[-1][0]:.0f} seconds: {low:.3g} to {high:.3g} {column.unit}."
    return draw(column.title, alt, fill, height_inches=2.0)
