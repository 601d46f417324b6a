"""A traced step as a picture: live bytes over its operators, stacked by category. Needs matplotlib."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from bench.trace.recording import CATEGORIES, Recording
from planner.errors import UsageError
from planner.files import write_atomically
from planner.units import format_bytes, gib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("svg", "png")
COLOURS: Mapping[str, str] = {
    "weights": "#4477AA",
    "adapters": "#66CCEE",
    "gradients": "#228833",
    "optimizer": "#CCBB44",
    "activations": "#EE6677",
    "logits": "#AA3377",
    "temporary": "#BBBBBB",
}
"""Paul Tol's bright scheme, which people with any kind of colour vision can tell apart."""
MAX_COLUMNS = 800
"""Points drawn along the axis: each is the highest moment of its stretch of operators."""
MIN_SHARES: Mapping[str, float] = {
    **dict.fromkeys(("load", "forward", "loss", "backward", "eval"), 0.05),
    "optimizer": 0.065,
}
"""The least share of the axis that these phases get: the loss has few operators and much memory. Only they are named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """What a plot shows: the run, its title, its highest event, and what the card can give.

    `reserved` has the storages whose allocation made reserved memory grow, and to how many bytes.
    """

    timeline: Recording
    title: str
    peak_at: int
    reserved: Sequence[tuple[int, int]] = ()
    usable_bytes: int | None = None


def check_format(path: Path) -> str:
    """The format that a file's name asks for. Raises UsageError for one that isn't drawn."""
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise UsageError(f"--plot {path}: the name must end in .svg or .png")
    return suffix


def describe(picture: Picture) -> str:
    """The picture in words, for who can't see it."""
    timeline, at = picture.timeline, picture.peak_at
    terms = {name: value for name, value in timeline.terms_at(at).items() if value}
    parts = ", ".join(f"{name} {format_bytes(value)}" for name, value in terms.items())
    phase = [mark for mark in timeline.marks if mark.at <= at][-1]
    total = format_bytes(sum(terms.values()))
    return (
        f"Live memory over the operators of {_describe_steps(timeline)}, stacked by category. "
        f"The highest moment is in the {phase.phase} of step {phase.step}: {total} ({parts})."
    )


def _describe_steps(timeline: Recording) -> str:
    return f"{max(mark.step for mark in timeline.marks)} training steps with all {timeline.num_layers} layers"


def draw(picture: Picture, path: Path) -> None:
    """Write the picture to `path`, whose name ends in .svg or .png.

    Raises UsageError for another name, FinefitError where it can't be written.
    """
    form = check_format(path)
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "finefit", "font.size": 9}):
        figure = Figure(figsize=(11, 5), dpi=120, layout="constrained")
        _fill(figure.subplots(), picture)
        content = io.BytesIO()
        metadata = {"Title": picture.title, "Description": describe(picture)}
        figure.savefig(content, format=form, metadata=metadata | ({"Date": None} if form == "svg" else {}))
    data = content.getvalue()
    write_atomically(path, _with_text(data.decode(), picture) if form == "svg" else data)


def _with_text(svg: str, picture: Picture) -> str:
    """The SVG with the description that screen readers announce; matplotlib writes the title."""
    svg = svg.replace("<svg ", '<svg role="img" ', 1)
    return svg.replace("</title>", f"</title>\n <desc>{escape(describe(picture))}</desc>", 1)


class _Axis:
    """Events along the axis: each phase at a scale of its own, so that short ones can be seen."""

    def __init__(self, timeline: Recording) -> None:
        end = len(timeline.events)
        stops = [*(mark.at for mark in timeline.marks[1:]), end]
        self.spans = [(mark, mark.at, stop) for mark, stop in zip(timeline.marks, stops, strict=True)]
        shares = [max((stop - start) / end, MIN_SHARES.get(m.phase, 0.0)) for m, start, stop in self.spans]
        self._edges = [0.0, *accumulate(shares)]

    def at(self, event: int) -> float:
        """Where an event lies, from 0 to 1."""
        found = bisect_right(self.spans, event, key=lambda span: span[1]) - 1
        _, start, stop = self.spans[found]
        left, right = self._edges[found], self._edges[found + 1]
        return (left + (right - left) * (event - start) / max(1, stop - start)) / self._edges[-1]


def _fill(axes: Axes, picture: Picture) -> None:
    timeline = picture.timeline
    axis = _Axis(timeline)
    lines = timeline.live_by_category()
    columns = _columns(timeline, picture.peak_at)
    shown = [name for name in CATEGORIES if any(lines[name])]
    layers: list[list[float]] = [[gib(lines[name][at]) for at in columns] for name in shown]
    places = [axis.at(event) for event in columns]
    axes.stackplot(places, layers, labels=shown, colors=[COLOURS[name] for name in shown], linewidth=0)
    peak = sum(gib(lines[name][picture.peak_at]) for name in shown)
    top = _draw_levels(axes, axis, picture, peak)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, top * 1.2)
    _mark_phases(axes, axis)
    _mark_peak(axes, axis.at(picture.peak_at), picture, peak, top)
    axes.set_xticks([])
    axes.set_xlabel("operators in their order; short phases are drawn wider", labelpad=16)
    axes.set_ylabel("GiB alive")
    axes.set_title(picture.title, fontsize=10, loc="left")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _columns(timeline: Recording, peak_at: int) -> list[int]:
    """The events that are drawn: the highest one of each stretch."""
    totals = list(timeline.live_bytes())
    width = max(1, -(-len(totals) // MAX_COLUMNS))
    stretches = (range(start, min(start + width, len(totals))) for start in range(0, len(totals), width))
    return sorted({peak_at, *(max(stretch, key=totals.__getitem__) for stretch in stretches)})


def _draw_levels(axes: Axes, axis: _Axis, picture: Picture, top: float) -> float:
    """Reserved memory, and what the card can give where that is near; returns the highest level."""
    if picture.reserved:
        storages = picture.timeline.storages
        places = [axis.at(storages[number].allocated_at) for number, _ in picture.reserved]
        levels = [gib(level) for _, level in picture.reserved]
        axes.step(
            [*places, 1.0], [*levels, levels[-1]], where="post", color="black", linewidth=1, label="reserved"
        )
        top = max(top, *levels)
    if picture.usable_bytes is not None and gib(picture.usable_bytes) < 1.5 * top:
        level = gib(picture.usable_bytes)
        axes.axhline(level, color="#CC3311", linewidth=1, linestyle="--", label="the card can give")
        top = max(top, level)
    return top


def _mark_phases(axes: Axes, axis: _Axis) -> None:
    """A line where each phase begins, and its name above; the steps' numbers below the axis."""
    above = axes.get_xaxis_transform()
    steps: dict[int, list[float]] = {}
    for mark, start, stop in axis.spans:
        left, right = axis.at(start), axis.at(stop)
        axes.axvline(left, color="black", linewidth=0.4, alpha=0.4)
        if mark.phase in MIN_SHARES:
            axes.text(
                (left + right) / 2, 0.985, mark.phase, transform=above, ha="center", va="top", fontsize=8
            )
        if mark.step and mark.phase not in ("save", "eval"):
            steps.setdefault(mark.step, []).extend((left, right))
    for step, places in steps.items():
        axes.axvline(min(places), color="black", linewidth=1)
        axes.text(
            (min(places) + max(places)) / 2, -0.012, f"step {step}", transform=above, ha="center", va="top"
        )


def _mark_peak(axes: Axes, place: float, picture: Picture, level: float, top: float) -> None:
    storage = picture.timeline.storages[picture.timeline.events[picture.peak_at]]
    where = f" in {storage.module}" if storage.module else ""
    axes.annotate(
        f"{level:.2f} GiB: {storage.op}{where}",
        (place, level),
        xytext=(place, top * 1.07),
        ha="right" if place > 0.5 else "left",
        fontsize=8,
        arrowprops={"arrowstyle": "-", "linewidth": 0.6},
    )
