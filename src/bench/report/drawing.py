"""One plot as inline SVG that a phone can show: small, text as text, no markup from names, described in words."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from bench.report.content import Figure
from planner.render import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_INCHES = 4.9
"""On a phone of 360 pixels this is shown at three quarters, where 9 points can still be read."""
PREDICTED, MEASURED, LIMIT = "#4477AA", "#EE6677", "#CC3311"
SERIES = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB")
"""Paul Tol's bright scheme, which people with any kind of colour vision can tell apart."""
MARKERS = "osD^vPX"
"""One for each of SERIES, so that a print without colour can be read."""
MAX_NAME = 48
MAX_POINTS = 400

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "font.family": ["sans-serif"],
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
_PROLOGUE = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_METADATA = re.compile(r"<metadata>.*?</metadata>\s*", re.DOTALL)
_SIZE = re.compile(r'(<svg[^>]*?) width="[^"]*"', re.DOTALL)
_HEIGHT = re.compile(r'(<svg[^>]*?) height="[^"]*"', re.DOTALL)


def draw(title: str, alt: str, fill: Callable[[Axes], None], *, height_inches: float = 3.0) -> Figure:
    """The plot that `fill` draws."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    # ids inside the SVG come from the salt; figures of one page must not share them
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):
        canvas = Canvas(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        fill(canvas.subplots())
        content = io.BytesIO()
        canvas.savefig(content, format="svg", metadata={"Date": None}, transparent=True)
    return Figure(title=title, alt=alt, svg=_inline(content.getvalue().decode(), title, alt))


def _inline(svg: str, title: str, alt: str) -> str:
    """The <svg> alone, as wide as the page gives it, with title and description for screen readers."""
    svg = _METADATA.sub("", _PROLOGUE.sub("", svg, count=1))
    svg = _HEIGHT.sub(r"\1", _SIZE.sub(r"\1", svg, count=1), count=1)
    svg = svg.replace("<svg ", '<svg role="img" ', 1)
    return svg.replace(
        ">", f"><title>{escape(printable(title))}</title><desc>{escape(printable(alt))}</desc>", 1
    )


def legend_below(axes: Axes) -> None:
    """The legend under the plot, where it hides no line; none for a single series, which the title names."""
    figure: Any = axes.figure
    if len(axes.get_legend_handles_labels()[1]) > 1:
        figure.legend(loc="outside lower center", ncols=3, columnspacing=1.2, handlelength=1.6)


def plain_numbers(axis: Any) -> None:
    """Tick labels of a logarithmic axis as numbers; matplotlib would write them in its own markup."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def short(name: str) -> str:
    """A name that fits beside an axis, on one line."""
    plain = printable(name)
    return plain if len(plain) <= MAX_NAME else f"{plain[: MAX_NAME - 1]}…"


def thinned(values: Sequence[float], most: int = MAX_POINTS) -> tuple[list[int], list[float]]:
    """Positions and values, at most about `most` of them, evenly spread, with the last one."""
    stride = max(1, -(-len(values) // most))
    places = [*range(0, len(values), stride)]
    if places and places[-1] != len(values) - 1:
        places.append(len(values) - 1)
    return places, [values[at] for at in places]


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly, with the first and the last.

    >>> spread("abcdefg", 3)
    ['a', 'd', 'g']
    """
    last = len(items) - 1
    return list(items) if last < most else [items[round(at * last / (most - 1))] for at in range(most)]


def listed(values: Sequence[str], most: int = 12) -> str:
    """Values in words, the first ones where there are many."""
    shown = ", ".join(values[:most])
    return shown if len(values) <= most else f"{shown} and {len(values) - most} more"
