"""The comparison of predicted with published memory as people read it, in a terminal or as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from planner.accuracy import (
    Compared,
    Errors,
    Group,
    Outcomes,
    group_errors,
    peak_errors,
)
from planner.coverage import Coverage, LeftOut, left_out
from planner.render import Column, format_table, markdown_table, printable, wrap
from planner.uncertainty import FAILS_FROM, FITS_BELOW, LEVEL

HEAD = """# Predicted against published memory ({predictor})

Peak memory of published runs, predicted from their setups alone. `error` is predicted over measured, minus one, of
the setup as its source labels it; `corrected` replaces labels that the source's own code contradicts
(evidence/README.md). Groups are never averaged together: most rows come from one project, so an average over all of
them would say little about any other.

Made by `finefit accuracy {path} --markdown`."""

VERDICT_RULE = (
    f"Verdict rule: *fits* if the chance that the run needs more than the card can give is at most {FITS_BELOW:.0%}, "
    f"*does-not-fit* if it is at least {FAILS_FROM:.0%}, *tight* in between."
)


@dataclass(slots=True)
class Report:
    """The parts of the report on some compared cases; `width` is the terminal's, None for as wide as needed."""

    compared: Sequence[Compared]
    width: int | None = None
    markdown: bool = False
    predictor: str = "closed form"
    _sources: dict[str, str] = field(init=False, default_factory=dict)
    _variants: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        sources = sorted({case.group.source for case in self.compared})
        variants = sorted({case.group.variant for case in self.compared} - {"-"})
        self._sources = {source: f"S{number}" for number, source in enumerate(sources, 1)}
        self._variants = {variant: f"v{number}" for number, variant in enumerate(variants, 1)}

    def head(self, path: str) -> str:
        """The title of a Markdown report, and what stands in it."""
        return HEAD.format(path=path, predictor=self.predictor)

    def parts(self, worst: int = 0) -> Iterator[str]:
        """Legend, errors by group and by kind of peak, verdicts, intervals, what wasn't predicted, worst cases."""
        yield self._section("Errors of the allocated peak, group by group", self._legend(), self._groups())
        yield self._section(
            "Errors by kind of peak (corrected setups)",
            self._prose(
                "A reserved or device peak holds cached blocks that would be given back under pressure: how many "
                "is no property of the setup alone."
            ),
            self._peaks(),
        )
        found = left_out(self.compared)
        yield self._section("Verdicts", self._prose(VERDICT_RULE), self._verdicts(found), self._false_ones())
        yield self._section(
            f"Intervals ({LEVEL:.0%}) of the allocated peak, rows of exact length",
            self._prose(
                "Each case's interval is set again without the published runs that share the named thing with "
                "it. Cells: share covered (cases). Published runs count as their sources label them, because what "
                "a label leaves out is part of the error of whoever relies on it."
            ),
            self._intervals(found),
        )
        problems = self._problems()
        if problems:
            yield problems
        if worst:
            yield self._section(f"The {worst} worst cases", self._worst(worst))

    def _problems(self) -> str:
        """What wasn't predicted, by reason."""
        found: dict[str, list[str]] = {}
        for case in self.compared:
            if case.problem:
                found.setdefault(printable(case.problem), []).append(case.id)
        lines = [f"not predicted, {len(ids)}: {reason}: {', '.join(ids)}" for reason, ids in found.items()]
        return "\n".join(lines if self.markdown else (wrap(line, self.width, rest="  ") for line in lines))

    def _section(self, title: str, *parts: str) -> str:
        heading = f"## {title}" if self.markdown else title
        return "\n\n".join([heading, *(part for part in parts if part)])

    def _prose(self, text: str) -> str:
        return text if self.markdown else wrap(text.replace("*", ""), self.width)

    def _legend(self) -> str:
        lines = [f"{short}: {printable(name)}" for name, short in (self._sources | self._variants).items()]
        lines.append("*: rows of natural length, of which only the cap is known")
        return "\n".join(f"* {line}" for line in lines) if self.markdown else "\n".join(lines)

    def _groups(self) -> str:
        header = [
            "source",
            "method",
            "kernels",
            "GPUs",
            "var",
            "n",
            "mean",
            "median",
            "worst",
            "bias",
            "spread",
        ]
        header += ["corrected mean", "worst"] if self.markdown else ["corr.", "worst"]
        rows = (
            [
                *self._group_cells(one.group),
                str(one.labelled.num_cases),
                *_error_cells(one.labelled),
                _percent(one.corrected.mean),
                _percent(one.corrected.worst),
            ]
            for one in group_errors(self.compared)
        )
        return self._table(header, rows, num_words=5, drops={"spread": 3, "bias": 2, "median": 1})

    def _group_cells(self, group: Group) -> list[str]:
        sharding, _, count = group.sharding.partition(" x ")
        star = "" if group.lengths == "exact" else "*"
        return [
            self._sources[group.source] + star,
            group.method if group.shape == "dense" else f"{group.method} {group.shape}",
            group.kernels,
            count if sharding == "none" else f"{count} {sharding}",
            self._variants.get(group.variant, ""),
        ]

    def _peaks(self) -> str:
        header = ["peak", "source", "group", "n", "mean", "median", "worst", "bias", "spread"]
        rows = (
            [kind, self._sources[source], group, str(errors.num_cases), *_error_cells(errors)]
            for (kind, source, group), errors in peak_errors(self.compared).items()
        )
        return self._table(header, rows, num_words=3)

    def _verdicts(self, found: Sequence[LeftOut]) -> str:
        header = ["left out", "fitted", "OOM", "OOM called fits", "fitted called does-not-fit", "tight"]
        if not self.markdown:
            header = ["left out", "fitted", "OOM", "false fits", "false refusals", "tight"]
        rows = ([one.what, *_outcome_cells(one.outcomes)] for one in found)
        return self._table(header, rows, num_words=1)

    def _false_ones(self) -> str:
        """The runs whose verdict is wrong or tight, by name."""
        lines = []
        for title, outcome_is, word in (
            ("OOM called fits", "oom", "fits"),
            ("fitted called does-not-fit", "fitted", "does-not-fit"),
            ("tight", None, "tight"),
        ):
            names = [
                case.id
                for case in self.compared
                if case.verdict == word and outcome_is in (None, "oom" if case.outcome == "oom" else "fitted")
            ]
            lines.append(wrap(f"{title}: {', '.join(names) or 'none'}", self.width, rest="  "))
        return "\n\n".join(lines) if self.markdown else "\n".join(lines)

    def _intervals(self, found: Sequence[LeftOut]) -> str:
        parts = sorted({name for one in found for name in one.parts if name not in self._sources})
        sources = sorted({name for one in found for name in one.parts if name in self._sources})
        header = ["left out", "all", "median width", *parts, *(self._sources[name] for name in sources)]
        rows = (
            [one.what, _coverage_cell(one.total), _width_cell(one.total)]
            + [_coverage_cell(one.parts.get(name)) for name in (*parts, *sources)]
            for one in found
        )
        drops = {title: number for number, title in enumerate(header) if number > 2}
        return self._table(header, rows, num_words=1, drops=drops)

    def _worst(self, worst: int) -> str:
        known = [case for case in self.compared if case.error is not None]
        ranked = sorted(known, key=lambda case: -abs(case.error or 0.0))[:worst]
        header = ["case", "method", "kernels", "GPUs", "measured GiB", "predicted GiB", "error", "corrected"]
        rows = (
            [
                printable(case.id),
                *self._group_cells(case.group)[1:4],
                f"{case.measured_gib:.2f}",
                f"{case.predicted_gib:.2f}",
                _percent(case.error or 0.0, signed=True),
                _percent(case.corrected_error or 0.0, signed=True),
            ]
            for case in ranked
        )
        return self._table(header, rows, num_words=4)

    def _table(
        self,
        header: Sequence[str],
        rows: Iterable[Sequence[str]],
        *,
        num_words: int,
        drops: dict[str, int] | None = None,
    ) -> str:
        """A table whose first `num_words` columns are words; `drops` names those that a narrow terminal loses."""
        cells = list(rows)
        if self.markdown:
            return markdown_table(header, cells, num_words)
        columns = [
            Column(
                title=title,
                cells=tuple(row[i] for row in cells),
                is_number=i >= num_words,
                drop=(drops or {}).get(title, 0),
            )
            for i, title in enumerate(header)
        ]
        return format_table(columns, self.width)


def _error_cells(errors: Errors) -> list[str]:
    sizes = [_percent(share) for share in (errors.mean, errors.median, errors.worst)]
    return [*sizes, _percent(errors.bias, signed=True), _percent(errors.deviation)]


def _percent(share: float, *, signed: bool = False) -> str:
    """Three digits at most: two decimals below 10 %."""
    digits = 2 if abs(share) < 0.0995 else 1
    return f"{share:{'+' if signed else ''}.{digits}%}"


def _outcome_cells(found: Outcomes) -> list[str]:
    total = found.num_fitted + found.num_oom
    return [
        str(found.num_fitted),
        str(found.num_oom),
        str(found.false_fits),
        str(found.false_refusals),
        f"{found.tight} of {total}",
    ]


def _coverage_cell(coverage: Coverage | None) -> str:
    return "" if coverage is None else f"{coverage.share:.0%} ({coverage.num_cases})"


def _width_cell(coverage: Coverage | None) -> str:
    if coverage is None:
        return ""
    return f"{coverage.median_width:.1%}" if math.isfinite(coverage.median_width) else "open"
