"""The comparison of predicted with published speed as people read it, in a terminal or as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from planner.rates import Efficiency, efficiencies
from planner.render import Column, format_table, markdown_table, printable, wrap
from planner.speed_accuracy import Group, Result, Summary, summaries
from planner.timing import LEVEL

HEAD = """# Predicted against published speed

Time of an optimizer step of published runs, predicted from their setups by the roofline of `planner/throughput.py` with
the efficiencies of each hardware class (`profiles/calibration/throughput-classes.json`). `error` is predicted over
measured time, minus one. *Held out*: the run's whole source was left out when efficiencies and intervals were set.
Stacks for fine-tuning, stacks made for pretraining, and what a card's vendor has tuned are never averaged together.

Made by `finefit accuracy {path} --speed --markdown`; the efficiencies by `python benchmarks/throughput_fit.py`."""

STACKS = (
    ("fine-tuning", "Fine-tuning stacks (transformers, peft, FSDP scripts)"),
    (
        "pretraining",
        "Stacks made for pretraining (llm-foundry with MPT, torchtitan, fms-fsdp, nanoGPT, languini)",
    ),
    ("vendor", "Tuned by the vendor (NeMo with Megatron, NVIDIA's DeepLearningExamples)"),
)
"""Kinds of stack and their titles, in the report's order."""
NUM_WORDS = 2


@dataclass(slots=True)
class SpeedReport:
    """The parts of the report; `width` is the terminal's, None for as wide as needed."""

    results: Sequence[Result]
    width: int | None = None
    markdown: bool = False

    def parts(self, path: str, worst: int = 0) -> Iterator[str]:
        """Head, errors by class and method for each kind of stack, efficiencies, what wasn't predicted, worst runs."""
        if self.markdown:
            yield HEAD.format(path=path)
        found = summaries(self.results)
        yield self._coverage(found)
        for stack, title in STACKS:
            groups = {group: summary for group, summary in found.items() if group.stack == stack}
            if groups:
                yield self._section(title, self._errors(groups))
        yield self._section("Efficiencies by hardware class", self._efficiencies())
        if problems := self._problems():
            yield self._section("Not predicted", problems)
        if worst:
            yield self._section(f"The {worst} worst runs", self._worst(worst))

    def _coverage(self, found: dict[Group, Summary]) -> str:
        held = sum(summary.num_held for summary in found.values())
        covered = sum(summary.covered for summary in found.values())
        runs = sum(summary.num_runs for summary in found.values())
        share = f"{covered / held:.1%} of {held}" if held else "none"
        text = f"{runs} of {len(self.results)} runs are predicted; {share} held-out runs are inside their {LEVEL:.0%} interval."
        return text if self.markdown else wrap(text, self.width)

    def _errors(self, groups: dict[Group, Summary]) -> str:
        header = ["class", "method", "runs", "sources", "median", "worst", "held out", "covered", "width"]
        rows = (
            [
                group.hardware,
                group.method,
                str(one.num_runs),
                str(one.num_sources),
                _percent(one.median),
                _percent(one.worst),
                _percent(one.held_median),
                f"{one.covered} of {one.num_held}",
                _percent(one.median_width),
            ]
            for group, one in groups.items()
        )
        return self._table(header, rows)

    def _efficiencies(self) -> str:
        header = [
            "class",
            "stack",
            "matmul",
            "attention",
            "memory",
            "dequant",
            "link",
            "network GB/s",
            "launch µs",
        ]
        header += ["runs", "spread", "assumed"]
        return self._table(header, (_efficiency_cells(one) for one in efficiencies()))

    def _problems(self) -> str:
        """What wasn't predicted, by reason."""
        found = Counter(printable(result.problem) for result in self.results if result.problem)
        lines = [f"{count} runs: {reason}" for reason, count in found.most_common()]
        return "\n".join(f"* {line}" if self.markdown else line for line in lines)

    def _worst(self, worst: int) -> str:
        known = [result for result in self.results if result.error is not None]
        ranked = sorted(known, key=lambda result: -abs(result.error or 0.0))[:worst]
        header = ["run", "class", "method", "measured s", "predicted s", "error"]
        rows = (
            [
                printable(one.id),
                one.hardware,
                one.method,
                f"{one.measured_s:.3g}",
                f"{one.predicted_s:.3g}",
                f"{one.error or 0.0:+.0%}",
            ]
            for one in ranked
        )
        return self._table(header, rows)

    def _section(self, title: str, text: str) -> str:
        return f"## {title}\n\n{text}" if self.markdown else f"{title}\n\n{text}"

    def _table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
        cells = list(rows)
        if self.markdown:
            return markdown_table(header, cells, NUM_WORDS)
        columns = [
            Column(
                title=title,
                cells=tuple(row[i] for row in cells),
                is_number=i >= NUM_WORDS,
                drop=i if i > NUM_WORDS else 0,
            )
            for i, title in enumerate(header)
        ]
        return format_table(columns, self.width)


def _efficiency_cells(one: Efficiency) -> list[str]:
    def cell(name: str, text: str) -> str:
        return f"({text})" if name in one.assumed else text

    network = one.network_bytes_per_s
    shares = ("tensor", "attention", "memory", "dequantise", "link", "overlap")
    return [
        one.name,
        one.stack,
        *(cell(name, f"{getattr(one, name):.0%}") for name in shares),
        cell("network_bytes_per_s", "" if network is None else f"{network / 1e9:.0f}"),
        cell("launch_s", f"{one.launch_s * 1e6:.0f}"),
        str(one.num_runs),
        _percent(one.spread),
        str(len(one.assumed)),
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
