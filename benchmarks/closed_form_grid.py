"""The grid on which the closed form is compared with the trace: its configurations, and their traces.

    python benchmarks/closed_form_grid.py [--out evidence/closed-form-vs-trace.jsonl] [--only ARCHITECTURE …]

Each architecture meets every precision recipe once; the values of every other field are dealt out over these rows
like a shuffled pack of cards, by a generator seeded with architecture and field, so each value occurs with each
architecture. The rarer methods have rows of their own on some of them. A row is traced in about a second; rows that the file has already, with the same setup, are
kept, so that a run that was stopped goes on where it was. Rows are written in the grid's order.
`reports/closed-form-vs-trace.md` is made from the file by `benchmarks/closed_form_report.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from closed_form_architectures import ARCHITECTURES, Architecture

OUT = Path(__file__).parents[1] / "evidence" / "closed-form-vs-trace.jsonl"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")

LORA = {"method": "lora"}
FULL = {"method": "full"}
QLORA = {"method": "qlora"}
MIXED = {"weights_dtype": "float32", "autocast": "bfloat16"}
HALF = {"weights_dtype": "float16", "autocast": "float16"}
RECIPES: tuple[dict[str, Any], ...] = (
    LORA,
    {**LORA, "autocast": "bfloat16"},
    {**LORA, "adapter_dtype": "bfloat16"},
    {**LORA, **MIXED},
    {**LORA, **HALF},
    {**LORA, "weights_dtype": "float32"},
    FULL,
    {**FULL, "optimizer_in_backward": True},
    {**FULL, "weights_dtype": "float32"},
    {**FULL, **MIXED},
    {**FULL, **MIXED, "autocast": "float16"},
    {**FULL, **MIXED, "optimizer_in_backward": True},
    {**FULL, "master_weights": "float32"},
    {**QLORA, "quant": "nf4"},
    {**QLORA, "quant": "nf4-double", "autocast": "bfloat16"},
    {**QLORA, "quant": "nf4-double", "autocast": "bfloat16", "kbit_upcast": True},
    {**QLORA, "quant": "fp4", **HALF},
    {**QLORA, "quant": "fp4", "kbit_upcast": True},
    {**QLORA, "quant": "int8"},
    {**QLORA, "quant": "int8", "autocast": "bfloat16"},
)
"""Method, quantisation, precision and step in the backward: what belongs together."""

METHODS = ("rslora", "dora", "lora-fa", "ia3", "bitfit", "prompt", "prefix")
"""Those that have rows of their own beside RECIPES, on METHOD_ARCHITECTURES."""
METHOD_RECIPES: tuple[dict[str, Any], ...] = ({}, MIXED)
METHOD_ARCHITECTURES = ("llama", "llama-tied-biased", "qwen2", "gemma-mqa", "phi", "gpt2", "mixtral")
NUM_VIRTUAL_TOKENS = (20, 100)

SHAPES = (
    (1, 512),
    (2, 1024),
    (8, 512),
    (1, 4096),
    (4, 2048),
    (16, 1024),
    (2, 8192),
    (1, 32768),
    (32, 2048),
    (1, 65536),
)
"""(micro_batch_size, seq_len), up to 65,536 tokens."""

FIELDS: dict[str, tuple[Any, ...]] = {
    "shape": SHAPES,
    "optimizer": (
        "adamw",
        "adamw-fused",
        "adamw-8bit",
        "paged-adamw-8bit",
        "paged-adamw",
        "adafactor",
        "sgd",
        "lion",
        "lion-8bit",
    ),
    "grad_accum_steps": (1, 4),
    "checkpointing": ("full", "none"),
    "loss": ("full", "chunked"),
    "dropout": (0.0, 0.1),
    "packing": (False, False, True),
    "eval_batch_size": (None, 1, 4),
    "attention": ("sdpa", "flash", "eager"),
    "targets": ("all-linear", "all-linear", "attention"),
    "rank": (8, 64),
    "max_grad_norm": (1.0, None),
}
ADAPTER_FIELDS = ("dropout", "targets", "rank")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration: its name and TrainSetup's fields."""

    id: str
    setup: dict[str, Any]


def cases() -> Iterator[Case]:
    """The whole grid, in order."""
    for name, architecture in ARCHITECTURES.items():
        dealt = {field: _deal(name, field, architecture) for field in FIELDS}
        for number, recipe in enumerate(RECIPES):
            values = {field: column[number] for field, column in dealt.items()}
            yield Case(id=f"{name}/{number:02}", setup=_setup(architecture, recipe, values))
    for name in METHOD_ARCHITECTURES:
        for method in METHODS:
            yield from _method_cases(name, method)


def _method_cases(name: str, method: str) -> Iterator[Case]:
    """A method's rows on one architecture, unless it can't adapt it at all."""
    from planner.errors import SetupError
    from planner.estimate import resolve
    from planner.inventory import take_inventory
    from planner.setup import TrainSetup

    architecture = ARCHITECTURES[name]
    for number, recipe in enumerate(METHOD_RECIPES):
        draw = random.Random(f"{name}/{method}/{number}")
        values = {field: draw.choice(architecture.only.get(field, given)) for field, given in FIELDS.items()}
        values |= {"num_virtual_tokens": draw.choice(NUM_VIRTUAL_TOKENS)}
        values = _allowed(architecture, method, values)
        setup = _setup(architecture, {"method": method, **recipe}, values)
        try:
            take_inventory(TrainSetup.from_dict(setup), resolve(TrainSetup.from_dict(setup)))
        except SetupError:
            return
        yield Case(id=f"{name}/{method}-{number}", setup=setup)


def _allowed(architecture: Architecture, method: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values with those that the method refuses replaced by what it takes."""
    from planner.methods import can_run, find_method

    values = dict(values)
    own = find_method(method)
    if not own.has_rank:
        values |= {"targets": "all-linear", "dropout": 0.0}
    elif architecture.folds_experts and not own.folds:
        values["targets"] = "attention"
    if not (own.lengthens or own.prefixes):
        del values["num_virtual_tokens"]
    for field, taken in (("packing", False), ("checkpointing", "none"), ("attention", "sdpa")):
        if not can_run(method, **{"checkpointing": "none", field: values[field]}):
            values[field] = taken
    return values


def _deal(name: str, field: str, architecture: Architecture) -> list[Any]:
    """A value for each recipe: all values equally often, in an order that only names decide."""
    allowed = architecture.only.get(field, FIELDS[field])
    column = [allowed[i % len(allowed)] for i in range(len(RECIPES))]
    random.Random(f"{name}/{field}").shuffle(column)
    return column


def _setup(architecture: Architecture, recipe: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """TrainSetup's fields; what a recipe makes meaningless or contradicts is left out."""
    values = dict(values)
    rows, length = values.pop("shape")
    shorter = min(length, architecture.max_length)
    fields = {"model": architecture.config, "objective": architecture.objective, **recipe, **values}
    fields |= {"micro_batch_size": rows * (length // shorter), "seq_len": shorter}
    if fields["targets"] == "attention":
        fields["targets"] = list(architecture.attention_modules)
    if architecture.folds_experts and fields["targets"] == "all-linear":
        fields["dropout"] = 0.0
    if recipe["method"] == "full":
        fields = {k: v for k, v in fields.items() if k not in ADAPTER_FIELDS}
    if recipe.get("optimizer_in_backward"):
        fields["grad_accum_steps"] = 1
    if fields["attention"] == "flash" and _computes_in_float32(recipe):
        fields["attention"] = next(k for k in architecture.only.get("attention", ("sdpa",)) if k != "flash")
    return fields


def _computes_in_float32(recipe: dict[str, Any]) -> bool:
    """FlashAttention takes 16 bits only."""
    return recipe.get("weights_dtype") == "float32" and "autocast" not in recipe


def trace_case(case: Case) -> dict[str, Any]:
    """One line of the file: the setup and what its trace says, in bytes of torch's allocator."""
    from bench.trace.run import trace
    from planner.setup import TrainSetup

    result = trace(TrainSetup.from_dict(case.setup))
    peak = result.phases[result.peak_phase]
    return {
        "id": case.id,
        "setup": case.setup,
        "traced": {
            "peak_bytes": result.peak_bytes,
            "peak_phase": result.peak_phase,
            "operator": result.operator,
            "terms": dict(peak.terms),
            "phases": {name: found.num_bytes for name, found in result.phases.items()},
        },
        "versions": versions(),
    }


def versions() -> str:
    """The libraries that were traced, as TrainSetup's `stack` writes them."""
    return ", ".join(f"{name} {metadata.version(name).partition('+')[0]}" for name in LIBRARIES)


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The file's rows by id; none where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = (json.loads(line) for line in lines)
    return {row["id"]: row for row in rows}


def write_rows(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """All rows that the grid has, in its order; whole or not at all."""
    from planner.files import write_atomically

    ordered = (rows[case.id] for case in cases() if case.id in rows)
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in ordered)
    write_atomically(path, text)


def is_done(case: Case, row: dict[str, Any] | None) -> bool:
    """Whether the file has this very setup."""
    return row is not None and "traced" in row and row["setup"] == json.loads(json.dumps(case.setup))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", nargs="*", default=[], help="architectures; all if none is named")
    parser.add_argument("--again", action="store_true", help="trace rows that the file has already, too")
    options = parser.parse_args(arguments)
    rows = read_rows(options.out)
    wanted = [c for c in cases() if not options.only or c.id.partition("/")[0] in options.only]
    todo = [c for c in wanted if options.again or not is_done(c, rows.get(c.id))]
    failures = 0
    for number, case in enumerate(todo, 1):
        try:
            rows[case.id] = trace_case(case)
        except Exception as error:  # the other rows are wanted all the same
            failures += 1
            rows.pop(case.id, None)
            print(f"{case.id}: {type(error).__name__}: {error}"[:300], file=sys.stderr, flush=True)
        if number % 20 == 0 or number == len(todo):
            write_rows(options.out, rows)
            print(f"{number} of {len(todo)} traced", file=sys.stderr, flush=True)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
