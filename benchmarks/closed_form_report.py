"""The closed form beside the traced grid: makes reports/closed-form-vs-trace.md from the raw file and today's code.

    python benchmarks/closed_form_report.py [--rows evidence/closed-form-vs-trace.jsonl] [--worst 20]

Nothing is traced again: each row's setup goes through the closed form, and its figures are set beside the traced ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from closed_form_causes import CAUSES

from planner.estimate import resolve
from planner.memory import MemoryModel
from planner.setup import TrainSetup

ROWS = Path(__file__).parents[1] / "evidence" / "closed-form-vs-trace.jsonl"
PHASES = ("load", "forward", "loss", "backward", "optimizer", "eval", "save")
CLOSE = 0.01
"""What counts as agreement."""
SHAPES = {1024: "up to 1k", 8192: "up to 8k", 16384: "up to 16k", 65536: "up to 64k"}


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One row: relative errors (closed form over trace, minus 1) of the peak and of each phase; `terms` in shares of it."""

    id: str
    setup: Mapping[str, Any]
    peak: float
    phases: Mapping[str, float]
    terms: Mapping[str, float]

    @property
    def architecture(self) -> str:
        """The grid's name of the model."""
        return self.id.partition("/")[0]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The raw file's lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def compare(row: Mapping[str, Any]) -> Compared:
    """The closed form for a row's setup, without what the rows leave out: libraries' workspaces and blocks' remainders."""
    setup = TrainSetup.from_dict(row["setup"])
    model = MemoryModel(setup, resolve(setup))
    found = model.at(setup.micro_batch_size, setup.seq_len)
    left_out = {"workspace": model.run.static()["workspace"], "weights": model.run.unsplit_bytes}
    unseen, traced = sum(left_out.values()), row["traced"]
    phases = {
        name: (found.phases[name] - unseen) / traced["phases"][name] - 1
        for name in PHASES
        if name in traced["phases"]
    }
    peak = (found.peak_allocated_bytes - unseen) / traced["peak_bytes"] - 1
    return Compared(
        id=row["id"],
        setup=row["setup"],
        peak=peak,
        phases=phases,
        terms=_term_errors(found.terms, left_out, traced),
    )


TERMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "weights": (("weights", "adapters"), ("weights", "adapters")),
    "gradients and optimizer": (("gradients", "optimizer"), ("gradients", "optimizer")),
    "activations, logits and temporaries": (
        ("activations", "logits", "workspace"),
        ("activations", "logits", "temporary"),
    ),
}
"""Terms as both sides can be set side by side: the closed form's names and the trace's."""


def _term_errors(
    closed: Mapping[str, int], left_out: Mapping[str, float], traced: Mapping[str, Any]
) -> dict[str, float]:
    errors = {}
    for name, (ours, theirs) in TERMS.items():
        mine = sum(closed.get(term, 0) - left_out.get(term, 0) for term in ours)
        errors[name] = (mine - sum(traced["terms"][term] for term in theirs)) / traced["peak_bytes"]
    return errors


def recipe_of(setup: Mapping[str, Any]) -> str:
    """Method, quantisation and precision in words."""
    weights, autocast = setup.get("weights_dtype", "bfloat16"), setup.get("autocast")
    words = [setup["method"], setup.get("quant"), weights, f"autocast {autocast}" if autocast else None]
    for flag in ("kbit_upcast", "optimizer_in_backward"):
        words.append(flag if setup.get(flag) else None)
    words.append("bf16 adapters" if setup.get("adapter_dtype") == "bfloat16" else None)
    words.append("float32 master" if setup.get("master_weights") == "float32" else None)
    return ", ".join(word for word in words if word)


def _tokens(setup: Mapping[str, Any]) -> str:
    tokens = setup["micro_batch_size"] * setup["seq_len"]
    return next(name for most, name in SHAPES.items() if tokens <= most)


GROUPS: dict[str, Callable[[Compared], str]] = {
    "architecture": lambda row: row.architecture,
    "recipe": lambda row: recipe_of(row.setup),
    "attention": lambda row: str(row.setup["attention"]),
    "checkpointing": lambda row: str(row.setup["checkpointing"]),
    "loss": lambda row: str(row.setup["loss"]),
    "optimizer": lambda row: str(row.setup["optimizer"]),
    "gradient accumulation": lambda row: str(row.setup["grad_accum_steps"]),
    "adapter dropout": lambda row: str(row.setup.get("dropout", "-")),
    "packing": lambda row: str(row.setup["packing"]),
    "tokens": lambda row: _tokens(row.setup),
}


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """A Markdown table's lines."""
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(str(cell) for cell in row) + " |"


def percent(value: float) -> str:
    """A share to two places."""
    return f"{value:.2%}"


def summary(errors: Sequence[float]) -> tuple[object, ...]:
    """Rows, median, mean and worst absolute error, share within `CLOSE`."""
    sizes = [abs(e) for e in errors]
    within = sum(size <= CLOSE for size in sizes) / len(sizes)
    return (
        len(sizes),
        percent(statistics.median(sizes)),
        percent(statistics.fmean(sizes)),
        percent(max(sizes)),
        f"{within:.1%}",
    )


STATISTICS = ("rows", "median", "mean", "worst", "within 1 %")


def report(rows: Sequence[Mapping[str, Any]], worst: int) -> str:
    """The whole report."""
    compared = [compare(row) for row in rows]
    return "\n".join(_lines(compared, rows, worst)) + "\n"


def _lines(compared: list[Compared], rows: Sequence[Mapping[str, Any]], worst: int) -> Iterator[str]:
    stacks = sorted({row["versions"] for row in rows})
    num_models = len({row.architecture for row in compared})
    yield "# The closed form beside the trace"
    yield ""
    yield (
        f"{len(compared)} configurations of {num_models} architectures, each traced on fake tensors as CUDA would run it "
        f"({'; '.join(stacks)}) and put through the closed form. Errors are the closed form's peak allocated bytes over the "
        "trace's, minus 1. Libraries' workspaces, and what blocks keep beyond a tensor, are in neither."
    )
    yield ""
    yield "Made by `python benchmarks/closed_form_report.py` from `evidence/closed-form-vs-trace.jsonl`."
    yield ""
    yield from table(("", *STATISTICS), [("peak allocated", *summary([c.peak for c in compared]))])
    yield ""
    yield "## By phase"
    yield ""
    phases = [(name, *summary([c.phases[name] for c in compared if name in c.phases])) for name in PHASES]
    yield from table(("phase", *STATISTICS), phases)
    yield ""
    yield "## Terms at the peak, in shares of the traced peak"
    yield ""
    terms = [(name, *summary([c.terms[name] for c in compared])) for name in TERMS]
    yield from table(("term", *STATISTICS), terms)
    for name, key in GROUPS.items():
        yield ""
        yield f"## By {name}"
        yield ""
        groups: dict[str, list[float]] = {}
        for row in compared:
            groups.setdefault(key(row), []).append(row.peak)
        yield from table((name, *STATISTICS), [(value, *summary(errors)) for value, errors in groups.items()])
    yield ""
    yield f"## The worst {worst}"
    yield ""
    yield from table(("row", "error", "attention", "recipe", "cause"), _worst(compared, worst))


def _worst(compared: list[Compared], worst: int) -> Iterator[tuple[str, ...]]:
    for row in sorted(compared, key=lambda c: -abs(c.peak))[:worst]:
        cause = next((text for matches, text in CAUSES if matches(row.architecture, row.setup)), "not known")
        yield row.id, f"{row.peak:+.2%}", row.setup["attention"], recipe_of(row.setup), cause


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--worst", type=int, default=20)
    options = parser.parse_args(arguments)
    print(report(read_rows(options.rows), options.worst), end="")


if __name__ == "__main__":
    main()
