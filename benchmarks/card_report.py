"""Closed form, trace and measurement of the runs that benchmarks/card_runs.py kept, side by side: a page in Markdown.

    python benchmarks/card_report.py evidence/h100-runs.jsonl --traced evidence/h100-runs-traced.jsonl >reports/h100.md

Predictions are today's, measurements are kept. The peak is that of the phases that were measured: a benchmark doesn't
resume a run, and it makes random weights in another way than a run loads real ones.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.store import Measurement
from planner.accuracy import read_all
from planner.catalog import find_gpu
from planner.errors import NotModelledError
from planner.estimate import estimate
from planner.kept_traces import kept_predictor, read_traces
from planner.results import Estimate
from planner.setup import TrainSetup
from planner.specs import Machine
from planner.units import GIB

NOT_COMPARED = ("load", "resume")
PLAIN = ("model", "method", "checkpointing", "micro_batch_size", "seq_len", "quant")
TIMED_STEPS = 5
"""Fewer timed steps, next to other programs, say nothing of time."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run with what was predicted for it; None where there is no prediction."""

    run: Measurement
    closed: Estimate
    traced: Estimate | None

    @property
    def name(self) -> str:
        """The setup in words: what isn't a default."""
        setup, default = self.run.setup, TrainSetup(model="")
        words = [f"{setup.model} {setup.method} {setup.micro_batch_size} x {setup.seq_len}"]
        words += ["checkpointed"] if setup.checkpointing == "full" else []
        words += [setup.quant] if setup.quant not in (None, "nf4-double") else []
        for field, value in setup.to_dict().items():
            if field not in PLAIN and value != getattr(default, field):
                words.append(f"{field} {value}".replace("_", " "))
        return ", ".join(words)

    def allocated(self, answer: Estimate | None) -> float | None:
        """Relative error of the allocated peak over the phases that were measured."""
        measured = {k: v for k, v in self.run.measured.phases.items() if k not in NOT_COMPARED}
        if answer is None or not measured:
            return None
        return max(answer.memory.phases[name] for name in measured) / max(measured.values()) - 1

    def worst_phase(self, answer: Estimate | None) -> float | None:
        """The largest relative error among the phases."""
        if answer is None:
            return None
        phases = self.run.measured.phases.items()
        errors = [answer.memory.phases[k] / v - 1 for k, v in phases if k not in NOT_COMPARED and v]
        return max(errors, key=abs, default=None)

    def reserved(self, answer: Estimate | None) -> float | None:
        """Relative error of what the allocator reserved: the peak and its fragmentation."""
        peak, measured = self.allocated(answer), self.run.measured
        if answer is None or peak is None or not measured.peak_reserved_bytes:
            return None
        names = [name for name in measured.phases if name not in NOT_COMPARED]
        predicted = max(answer.memory.phases[n] for n in names) + answer.memory.terms["fragmentation"]
        return predicted / measured.peak_reserved_bytes - 1


def read(path: Path, traced: Path) -> list[Row]:
    """The runs that ended well, in order."""
    with traced.open("rb") as lines:
        from_trace = kept_predictor(read_traces(str(traced), lines))
    rows = []
    for case in read_all(path):
        run = Measurement.from_json(case["record"])
        if run.outcome != "ok":
            continue
        machine, setup = Machine(gpu=find_gpu(run.gpu)), run.setup.with_(stack=case.get("stack"))
        try:
            trace = from_trace(setup, machine)
        except NotModelledError:
            trace = None
        rows.append(Row(run=run, closed=estimate(setup, machine), traced=trace))
    return rows


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2%}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """Median, mean and worst of each quantity, by who predicts it."""
    lines = []
    for what, error in (
        ("allocated peak", Row.allocated),
        ("worst single phase", Row.worst_phase),
        ("reserved peak", Row.reserved),
    ):
        for who, answers in (("closed form", [r.closed for r in rows]), ("trace", [r.traced for r in rows])):
            errors = [
                e for row, answer in zip(rows, answers, strict=True) if (e := error(row, answer)) is not None
            ]
            sizes = [abs(e) for e in errors]
            lines.append(
                (
                    what,
                    who,
                    str(len(errors)),
                    f"{statistics.median(sizes):.2%}",
                    f"{statistics.mean(sizes):.2%}",
                    percent(max(errors, key=abs)),
                    f"{sum(size <= 0.01 for size in sizes)}",
                )
            )
    return table(("", "by", "runs", "median", "mean", "worst", "within 1 %"), lines)


def memory_table(rows: Sequence[Row]) -> Iterator[str]:
    cells = []
    for row in rows:
        measured = row.run.measured
        cells.append(
            (
                row.name,
                f"{(measured.peak_allocated_bytes or 0) / GIB:.2f}",
                percent(row.allocated(row.closed)),
                percent(row.allocated(row.traced)),
                percent(row.worst_phase(row.traced)),
                f"{(measured.peak_reserved_bytes or 0) / GIB:.2f}",
                percent(row.reserved(row.closed)),
                percent(row.reserved(row.traced)),
            )
        )
    header = (
        "setup",
        "allocated GiB",
        "closed form",
        "trace",
        "trace, worst phase",
        "reserved GiB",
        "closed form",
        "trace",
    )
    return table(header, cells)


def time_table(rows: Sequence[Row]) -> Iterator[str]:
    cells = []
    for row in rows:
        measured, predicted = row.run.measured, row.closed.time.step_s if row.closed.time else None
        error = predicted / measured.step_s - 1 if predicted and measured.step_s else None
        cells.append(
            (
                row.name,
                f"{measured.step_s:.3f}",
                f"{measured.step_spread or 0:.0%}",
                f"{measured.cpu_step_s:.3f}",
                "unknown" if predicted is None else f"{predicted:.3f}",
                percent(error),
                f"{measured.tokens_per_s:,.0f}",
                _number(measured.energy_per_step_j),
            )
        )
    header = ("setup", "s per step", "spread", "host CPU s", "predicted s", "error", "tokens/s", "J per step")
    return table(header, cells)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def environment(rows: Sequence[Row]) -> str:
    facts: Mapping[str, object] = rows[0].run.environment
    versions = facts["versions"]
    assert isinstance(versions, Mapping)
    names = ("torch", "transformers", "peft", "bitsandbytes", "liger-kernel", "triton")
    stack = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    return (
        f"{facts['gpu_name']}, driver {facts['driver']}, CUDA {facts['cuda']}; {facts['num_cpus']} processors "
        f"({facts['cpu_model']}); Python {facts['python']}; {stack}; finefit {facts['commit']}; {rows[0].run.time_utc}."
    )


def page(rows: Sequence[Row]) -> str:
    timed = [row for row in rows if len(row.run.samples.step_wall_s) >= TIMED_STEPS]
    parts: list[str] = [
        "# Predicted and measured on an H100",
        "",
        "Made by `python benchmarks/card_report.py evidence/h100-runs.jsonl --traced evidence/h100-runs-traced.jsonl`; the runs",
        "are `benchmarks/card_runs.py`'s (each a process of its own, random weights, rows of full length), shared by `finefit submit`.",
        "No run was left out but one that crashed in its evaluation (method prompt: a defect of finefit's, mended since).",
        "",
        environment(rows),
        "",
        "## Memory",
        "",
        *summary(rows),
        "",
        *memory_table(rows),
        "",
        *NOTES,
        "",
        "## Time",
        "",
        "Nothing of these predictions was taken from this card: they are those of published runs of its class and of others.",
        "",
        *time_table(timed),
        "",
        *TIME_NOTES,
        "",
    ]
    return "\n".join(parts)


NOTES = (
    "What is off, and why:",
    "",
    "* `kernels: fused` with float32 adapters: such adapters were left to PEFT when the run was made, which kept float32 copies; one",
    "  function computes them with their linears now, and that is what is predicted.",
    "* `packing`: each random row held one document, for which torch needs no mask; rows of several documents do, and that is",
    "  what is predicted. `finefit bench` packs two documents into each random row since.",
    "* `compile`: what a compiled layer keeps is counted as fused kernels keep it; it can't be traced.",
    "* Reserved, closed form: a fixed share of what a step adds stands for fragmentation. The trace replays the allocator.",
    "* Paged optimizers, reserved: the replay is too low; cause not known.",
    "* QLoRA of Qwen2.5: random weights are made in 16 bits and packed into cached blocks, which keep remainders of up to 1 MiB each.",
    "  Weights read from a checkpoint weren't measured.",
)
TIME_NOTES = (
    "The card was at its power limit in most runs (the records' warnings say so). Two runs were bound by the host, not by the card:",
    "its CPU seconds equal the wall seconds and vary from step to step. QLoRA without checkpointing on 1,024 tokens",
    "launches kernels more slowly than the published runs that the launch time is from.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--traced", type=Path, required=True)
    options = parser.parse_args()
    print(page(read(options.results, options.traced)), end="")


if __name__ == "__main__":
    main()
