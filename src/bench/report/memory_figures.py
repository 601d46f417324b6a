"""Pictures of memory: along a step, by phase, by term, over the seconds of a run, against length and batch."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.report.content import Figure
from bench.report.drawing import (
    LIMIT,
    MARKERS,
    MEASURED,
    PREDICTED,
    SERIES,
    draw,
    legend_below,
    listed,
    short,
    spread,
    thinned,
)
from bench.timeline import Stretch
from planner.units import format_bytes, format_bytes_finely, gib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEAR = 2.0
"""The card's line is drawn where it is at most so many times the highest value; else it is only said."""


def timeline_figure(
    predicted: Sequence[Stretch], measured: Sequence[Stretch], usable_bytes: float | None
) -> Figure | None:
    """Live memory along one step, the trace beside the measurement; None where neither is known."""
    if not predicted and not measured:
        return None
    sides = (("predicted (trace)", predicted, PREDICTED), ("measured", measured, MEASURED))
    shown = [(name, stretches, colour) for name, stretches, colour in sides if stretches]
    words = [
        f"{name}: highest {format_bytes(_peak(stretches))}, in the {_peak_phase(stretches)}"
        for name, stretches, _ in shown
    ]

    def fill(axes: Axes) -> None:
        # both have the same phases in the same order: each gets the width of its share of points
        for name, stretches, colour in shown:
            places, values = _along(stretches, shown[-1][1])
            if name == "measured":
                axes.plot(places, values, color=colour, label=name, linewidth=1.4)
            else:
                axes.fill_between(places, values, color=colour, alpha=0.35, linewidth=0, label=name)
        _mark_phases(axes, shown[-1][1])
        top = gib(max(_peak(stretches) for _, stretches, _ in shown))
        _limit(axes, usable_bytes, top, is_vertical=False)
        axes.set_ylim(0, None)
        axes.set_xticks([])
        axes.set_ylabel("GiB alive")
        legend_below(axes)

    alt = f"Live memory after each operator of one optimizer step. {'; '.join(words)}."
    return draw("Memory along one step", alt, fill)


def _peak(stretches: Sequence[Stretch]) -> int:
    return max(max(values) for _, values in stretches)


def _peak_phase(stretches: Sequence[Stretch]) -> str:
    return max(stretches, key=lambda stretch: max(stretch[1]))[0]


def _along(stretches: Sequence[Stretch], scale: Sequence[Stretch]) -> tuple[list[float], list[float]]:
    """Places from 0 on and GiB; where phases are those of `scale`, each lies where it lies there."""
    same = [name for name, _ in stretches] == [name for name, _ in scale]
    widths = [len(values) for _, values in (scale if same else stretches)]
    places, heights, start = [], [], 0.0
    for (_, values), width in zip(stretches, widths, strict=True):
        places += [start + width * (i + 0.5) / len(values) for i in range(len(values))]
        heights += [gib(value) for value in values]
        start += width
    return places, heights


def _mark_phases(axes: Axes, stretches: Sequence[Stretch]) -> None:
    above = axes.get_xaxis_transform()
    total = sum(len(values) for _, values in stretches)
    start = 0
    for name, values in stretches:
        axes.axvline(start, color="black", linewidth=0.5, alpha=0.5)
        is_narrow = len(values) < 0.12 * total
        axes.text(
            start + len(values) / 2,
            1.01,
            short(name),
            transform=above,
            ha="center",
            va="bottom",
            fontsize=8,
            rotation=35 if is_narrow else 0,
        )
        start += len(values)


def _limit(axes: Axes, usable_bytes: float | None, top: float, *, is_vertical: bool) -> None:
    """What the card can give, where that is near enough to be drawn."""
    if usable_bytes is None or not 0 < gib(usable_bytes) <= NEAR * top:
        return
    line = axes.axvline if is_vertical else axes.axhline
    line(gib(usable_bytes), color=LIMIT, linewidth=1.2, linestyle=":", label="it can give")


def bars_figure(
    title: str, rows: Sequence[tuple[str, float | None, float | None]], usable_bytes: float | None
) -> Figure | None:
    """Predicted beside measured bytes by name, as horizontal bars; None where there is nothing to show."""
    kept = [row for row in rows if (row[1] or 0) > 0 or (row[2] or 0) > 0]
    if not kept:
        return None
    has_measured = any(measured is not None for _, _, measured in kept)
    top = gib(max(value or 0 for _, *pair in kept for value in pair))

    def fill(axes: Axes) -> None:
        height = 0.38 if has_measured else 0.7
        places = [i - (height / 2 if has_measured else 0) for i in range(len(kept))]
        axes.barh(places, [gib(row[1] or 0) for row in kept], height, color=PREDICTED, label="predicted")
        if has_measured:
            places = [i + height / 2 for i in range(len(kept))]
            measured = [gib(row[2] or 0) for row in kept]
            axes.barh(
                places,
                measured,
                height,
                color=MEASURED,
                hatch="///",
                edgecolor="white",
                linewidth=0,
                label="measured",
            )
        axes.set_yticks(range(len(kept)), [textwrap.fill(short(name), 22) for name, *_ in kept])
        axes.invert_yaxis()
        _limit(axes, usable_bytes, top, is_vertical=True)
        axes.set_xlabel(_gib_label(usable_bytes))
        axes.grid(axis="y", visible=False)
        legend_below(axes)

    words = [
        f"{name} {_size(predicted)} predicted" + (f", {_size(measured)} measured" if has_measured else "")
        for name, predicted, measured in kept
    ]
    limit = "" if usable_bytes is None else f" It can give {format_bytes(usable_bytes)}."
    return draw(title, f"{title}: {'; '.join(words)}.{limit}", fill, height_inches=1.1 + 0.34 * len(kept))


def _gib_label(usable_bytes: float | None) -> str:
    return "GiB" if usable_bytes is None else f"GiB (it can give {gib(usable_bytes):.1f})"


def _size(value: float | None) -> str:
    return "unknown" if value is None else format_bytes_finely(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One setup of a picture against length: its series, its length, its value (None: it ran out of memory)."""

    series: str
    seq_len: int
    value: float | None


def against_length(
    title: str,
    unit: str,
    points: Sequence[Point],
    *,
    usable_bytes: float | None = None,
    scale: Callable[[float], float] = float,
    show: Callable[[float], str],
) -> Figure | None:
    """One line per series over the length; runs out of memory are crosses at the foot. None for fewer than two points."""
    series: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda p: p.seq_len):
        series.setdefault(point.series, []).append(point)
    if len({(p.series, p.seq_len) for p in points}) < 2:
        return None
    values = [scale(p.value) for p in points if p.value is not None]
    drawn = spread(list(series.items()), len(SERIES))

    def fill(axes: Axes) -> None:
        for number, (name, found) in enumerate(drawn):
            ran = [p for p in found if p.value is not None]
            axes.plot(
                [p.seq_len for p in ran],
                [scale(p.value or 0) for p in ran],
                color=SERIES[number],
                marker=MARKERS[number],
                markersize=4,
                label=short(name),
            )
        _mark_failed(axes, points)
        _limit(axes, usable_bytes, max(values, default=1.0), is_vertical=False)
        axes.set_ylim(0, None)
        lengths = sorted({p.seq_len for p in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths], rotation=45 if len(lengths) > 6 else 0)
        axes.minorticks_off()
        left_out = f" ({len(drawn)} of {len(series)} curves are drawn)" if len(drawn) < len(series) else ""
        axes.set_xlabel(f"tokens per sequence{left_out}")
        axes.set_ylabel(unit)
        legend_below(axes)

    words = [
        f"{name}: "
        + listed(
            [f"{show(p.value) if p.value is not None else 'out of memory'} at {p.seq_len}" for p in found]
        )
        for name, found in series.items()
    ]
    more = f"; and {len(words) - len(SERIES)} more curves" if len(words) > len(SERIES) else ""
    return draw(
        title, f"{title}, by length of the sequence. {'; '.join(spread(words, len(SERIES)))}{more}.", fill
    )


def _plain(value: float) -> str:
    """Three digits, large numbers in full.

    >>> _plain(15912.3), _plain(0.01234)
    ('15,912', '0.0123')
    """
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def _mark_failed(axes: Axes, points: Sequence[Point]) -> None:
    """Crosses at the foot where memory ran out."""
    failed = [p.seq_len for p in points if p.value is None]
    if failed:
        places = [0] * len(failed)
        axes.plot(failed, places, "x", color=LIMIT, label="out of memory", clip_on=False, markersize=7)


def steps_figure(
    title: str,
    unit: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    from_zero: bool = False,
) -> Figure | None:
    """Curves over optimizer steps, such as losses; None where there is no curve. `from_zero`: for times and sizes."""
    kept = {name: points for name, points in series.items() if len(points) > 1}
    if not kept:
        return None

    def fill(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        for number, (name, points) in enumerate(kept.items()):
            places, _ = thinned([y for _, y in points])
            is_sparse = 2 < len(points) <= 12
            axes.plot(
                [points[at][0] for at in places],
                [points[at][1] for at in places],
                color=SERIES[number],
                label=short(name),
                marker=MARKERS[number] if is_sparse else None,
                linewidth=1.2,
            )
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(unit)
        if from_zero:
            axes.set_ylim(0, 1.1 * max(y for points in kept.values() for _, y in points) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend_below(axes)

    words = [
        f"{name} from {_plain(points[0][1])} to {_plain(points[-1][1])}"
        + ("" if unit in (name, title.lower()) else f" ({unit})")
        for name, points in kept.items()
    ]
    return draw(title, f"{title} over optimizer steps: {'; '.join(words)}.", fill)
