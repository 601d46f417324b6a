"""Is the chosen plan the fastest? Every candidate of a small grid is really run beside the one that `finefit plan` chose.

    finefit machine && python benchmarks/regret.py [--report reports/regret.md]

Five pairs of a model and data, from random weights on this machine's processor. `finefit plan --gpu local --goal fastest` chooses
micro-batch, accumulation, checkpointing, loss and packing for a LoRA run of four sequences per step; the grid has
these. Each is measured in a child process: tokens of the data (padding left out) per second over two steps after one to
warm up. Regret is what the choice loses against the fastest measured one. Let nothing else run beside it. The last
line is one JSON object; exit code 3 when a choice reaches less than 0.95 of the best.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.host import read_cpu
from bench.measure import measure
from bench.protocol import StepProtocol
from planner.planfile import read_plan
from planner.setup import TrainSetup

MUST_REACH = 0.95
GLOBAL_BATCH = 4
PROTOCOL = StepProtocol.of(warmup=1, steps=2)
TIMEOUT_S = 240.0
NUM_ROWS = 400
SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A model and rows of `low` to `high` words."""

    name: str
    model: str
    low: int
    high: int


PAIRS = (
    Pair(name="135M, short rows", model="smollm2-135m-instruct", low=5, high=40),
    Pair(name="135M, mixed rows", model="smollm2-135m-instruct", low=5, high=150),
    Pair(name="135M, long rows", model="smollm2-135m-instruct", low=150, high=250),
    Pair(name="360M, short rows", model="smollm2-360m-instruct", low=5, high=40),
    Pair(name="360M, mixed rows", model="smollm2-360m-instruct", low=5, high=100),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One candidate as it really ran: tokens of the data per second, or why it didn't."""

    setup: TrainSetup
    is_chosen: bool
    tokens_per_s: float | None
    outcome: str


def main() -> None:
    options = parse_arguments()
    wanted = [pair for i, pair in enumerate(PAIRS) if options.only is None or i in options.only]
    with tempfile.TemporaryDirectory() as folder:
        results = {pair.name: list(run_pair(pair, Path(folder))) for pair in wanted}
    reached = {name: share_of_best(runs) for name, runs in results.items()}
    page = format_page(results, reached)
    print(page)
    if options.report:
        options.report.write_text(page, encoding="utf-8")
    print(json.dumps({"reached": reached, "must_reach": MUST_REACH}))
    sys.exit(3 if min(reached.values()) < MUST_REACH else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--report", type=Path)
    parser.add_argument("--only", type=int, nargs="*", help="Numbers of pairs, from 0.")
    return parser.parse_args()


def run_pair(pair: Pair, folder: Path) -> Iterator[Run]:
    """The choice first, then the rest of the grid."""
    data = folder / f"{pair.low}-{pair.high}.jsonl"
    write_rows(data, pair)
    chosen = choose(pair, data, folder / "plan.yaml")
    yield run(chosen, is_chosen=True)
    for setup in grid(chosen):
        if setup != chosen:
            yield run(setup, is_chosen=False)


def write_rows(path: Path, pair: Pair) -> None:
    """Questions and answers of random words, the same for the same pair."""
    chance = random.Random(SEED)
    words = [
        "the",
        "a",
        "model",
        "learns",
        "from",
        "data",
        "and",
        "answers",
        "questions",
        "about",
        "many",
        "things",
        "in",
        "few",
        "words",
    ]

    def text(least: int, most: int) -> str:
        return " ".join(chance.choices(words, k=chance.randint(least, most)))

    rows = ({"instruction": text(3, 12), "output": text(pair.low, pair.high)} for _ in range(NUM_ROWS))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def choose(pair: Pair, data: Path, out: Path) -> TrainSetup:
    """What `finefit plan` says is fastest."""
    command = [
        "finefit",
        "plan",
        pair.model,
        "--gpu",
        "local",
        "--goal",
        "fastest",
        "--method",
        "lora",
        "--rank",
        "16",
    ]
    command += ["--data", str(data), "--global-batch-size", str(GLOBAL_BATCH), "--weights-dtype", "bfloat16"]
    command += [
        "--tokenizer",
        PAIRS[0].model,
        "--optimizer",
        "adamw-fused",
        "--from-scratch",
        "--out",
        str(out),
        "--force",
    ]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return read_plan(out).setup


def grid(chosen: TrainSetup) -> Iterator[TrainSetup]:
    """Ways to the same global batch and length: micro-batch and accumulation, or one packed row; checkpointing; and the
    choice with the other loss."""
    batches = [
        {"micro_batch_size": n, "grad_accum_steps": GLOBAL_BATCH // n, "packing": False} for n in (1, 2, 4)
    ]
    packed = {"micro_batch_size": 1, "grad_accum_steps": chosen.grad_accum_steps, "packing": True}
    for batch, checkpointing in itertools.product([*batches, packed], ("none", "full")):
        yield chosen.with_(**batch, checkpointing=checkpointing)
    yield chosen.with_(loss="full" if chosen.loss == "chunked" else "chunked")


def run(setup: TrainSetup, *, is_chosen: bool) -> Run:
    """Measure one candidate."""
    found = measure(setup, protocol=PROTOCOL, gpu="cpu", timeout_s=TIMEOUT_S)
    rate = found.measured.tokens_per_s if found.outcome == "ok" else None
    print(f"{'chosen ' if is_chosen else ''}{describe(setup)}: {found.outcome}, {rate}", file=sys.stderr)
    return Run(setup=setup, is_chosen=is_chosen, tokens_per_s=rate, outcome=found.outcome)


def share_of_best(runs: Sequence[Run]) -> float:
    """The choice's measured throughput over the best one's."""
    best = max(run.tokens_per_s or 0.0 for run in runs)
    chosen = next(run for run in runs if run.is_chosen)
    return (chosen.tokens_per_s or 0.0) / best


def describe(setup: TrainSetup) -> str:
    """What differs between candidates."""
    packed = ", packed" if setup.packing else ""
    return (
        f"{setup.micro_batch_size} x {setup.seq_len}, {setup.grad_accum_steps} accumulated, "
        f"checkpointing {setup.checkpointing}, {setup.loss} loss{packed}"
    )


def format_page(results: dict[str, list[Run]], reached: dict[str, float]) -> str:
    """Markdown."""
    cpu = read_cpu()
    lines = ["# Regret: the chosen plan beside every other that was really run", ""]
    lines += ["Made by `python benchmarks/regret.py --report …` after `finefit machine`.", ""]
    lines += ["| pair | chosen | tokens/s | best of all | tokens/s | reached |", "|---|---|---|---|---|---|"]
    for name, runs in results.items():
        chosen = next(run for run in runs if run.is_chosen)
        best = max(runs, key=lambda run: run.tokens_per_s or 0.0)
        lines.append(
            f"| {name} | {describe(chosen.setup)} | {_rate(chosen)} | {describe(best.setup)} | {_rate(best)} | "
            f"{reached[name]:.3f} |"
        )
    lines += [
        "",
        f"Must reach: {MUST_REACH} of the best. ",
        "",
        (__doc__ or "").split("\n\n", 2)[2].strip(),
        "",
    ]
    for name, runs in results.items():
        lines += [f"## {name}", "", "| candidate | tokens/s |", "|---|---|"]
        ordered = sorted(runs, key=lambda run: -(run.tokens_per_s or 0.0))
        lines += [
            f"| {describe(r.setup)}{' (chosen)' if r.is_chosen else ''} | {_rate(r)} |" for r in ordered
        ]
        lines.append("")
    return "\n".join([*lines, f"{cpu.model}, {cpu.num_cpus} processors.", ""])


def _rate(run: Run) -> str:
    return run.outcome if run.tokens_per_s is None else f"{run.tokens_per_s:.0f}"


if __name__ == "__main__":
    main()
