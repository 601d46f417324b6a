"""CPU-microseconds per configuration of the closed form: a batch of setups beside the same setups one by one.

    python benchmarks/closed_form_speed.py [--repetitions 3] [--beside SRC] [--report reports/closed-form-speed.md]

Two batches. `grid`: what a search over one model visits, the product of methods with their precision recipes, ranks,
optimizers, checkpointing, micro-batches and lengths. `mixed`: random setups over 20 models, where few agree in
anything. Arms: `one by one` answers each setup as a lone question (planner.memory.MemoryModel), `batch` all of them by
planner.estimate.memory_many, `estimates` with verdict, time and checks besides (estimate_many); `--beside SRC` adds
`one by one` of another checkout's src folder. Each measurement is a process of its own that starts with nothing
remembered, and the arms take turns. CPU time (time.process_time) is compared because wall time on a shared machine
measures its neighbours; making the setups and resolving the models' names is left out of `one by one` and in the others.
The last line is one JSON object; exit code 3 when the grid takes more than 100 microseconds in a batch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MUST_REACH_US = 100.0
GPU = "a100-80gb-sxm4"
GRID_MODEL = "llama-3.1-8b"
NUM_MIXED, NUM_MODELS, SEED = 10_000, 20, 0
EAGER_ONLY = ("gemma2", "gptj", "gpt_oss", "bloom")
"""Families without sdpa, named here so that `--beside` asks an older checkout the same."""

RECIPES: tuple[dict[str, Any], ...] = (
    {"method": "lora"},
    {"method": "lora", "adapter_dtype": "bfloat16"},
    {"method": "lora", "autocast": "bfloat16"},
    {"method": "qlora"},
    {"method": "qlora", "quant": "nf4"},
    {"method": "qlora", "kbit_upcast": True, "autocast": "bfloat16"},
    {"method": "full"},
    {"method": "full", "weights_dtype": "float32", "autocast": "bfloat16"},
    {"method": "full", "master_weights": "float32"},
)
CHOICES: dict[str, tuple[Any, ...]] = {
    "rank": (8, 16, 32, 64),
    "optimizer": ("adamw-fused", "adamw-8bit"),
    "checkpointing": ("full", "none"),
    "micro_batch_size": (1, 2, 4, 8, 16, 32),
    "seq_len": (512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12_288, 16_384, 32_768, 65_536),
}
MORE_CHOICES: dict[str, tuple[Any, ...]] = {
    **CHOICES,
    "optimizer": ("adamw", "adamw-fused", "adamw-8bit", "paged-adamw-8bit", "adafactor"),
    "attention": ("sdpa", "flash", "eager"),
    "loss": ("full", "chunked"),
    "seq_len": tuple(range(64, 32_769, 64)),
}


def grid() -> Iterator[Any]:
    """The setups of a search over one model."""
    from planner.setup import TrainSetup

    for recipe, *values in itertools.product(RECIPES, *CHOICES.values()):
        yield TrainSetup(model=GRID_MODEL, **recipe, **dict(zip(CHOICES, values, strict=True)))


def mixed() -> Iterator[Any]:
    """Random setups over random decoders."""
    from planner.resolve import model_names, resolve_model
    from planner.setup import TrainSetup

    chance = random.Random(SEED)
    decoders = [n for n in model_names(featured=True) if resolve_model(n).architecture == "decoder"]
    models = chance.sample(decoders, NUM_MODELS)
    for _ in range(NUM_MIXED):
        fields = {name: chance.choice(values) for name, values in MORE_CHOICES.items()}
        model = chance.choice(models)
        if resolve_model(model).family in EAGER_ONLY:
            fields["attention"] = "eager"
        yield TrainSetup(model=model, **chance.choice(RECIPES), **fields)


BATCHES: dict[str, Callable[[], Iterator[Any]]] = {"grid": grid, "mixed": mixed}


def one_by_one(setups: list[Any]) -> float:
    """CPU seconds of the setups as lone questions."""
    from planner.estimate import resolve
    from planner.memory import MemoryModel

    models = [resolve(setup) for setup in setups]
    start = time.process_time()
    for setup, model in zip(setups, models, strict=True):
        MemoryModel(setup, model).at(setup.micro_batch_size, setup.seq_len)
    return time.process_time() - start


def batch(setups: list[Any]) -> float:
    """CPU seconds of memory_many."""
    from planner.estimate import memory_many

    return _consume(memory_many, setups)


def estimates(setups: list[Any]) -> float:
    """CPU seconds of estimate_many."""
    from planner.estimate import estimate_many

    return _consume(estimate_many, setups)


def _consume(many: Callable[..., Iterator[Any]], setups: list[Any]) -> float:
    from planner.catalog import find_gpu
    from planner.specs import Machine

    machine = Machine(gpu=find_gpu(GPU))
    start = time.process_time()
    for _ in many(setups, machine):
        pass
    return time.process_time() - start


ARMS: dict[str, Callable[[list[Any]], float]] = {
    "one by one": one_by_one,
    "batch": batch,
    "estimates": estimates,
}


def main() -> None:
    options = parse_arguments()
    if options.child:
        arm, name = options.child
        setups = list(BATCHES[name]())
        print(json.dumps({"cpu_s": ARMS[arm](setups), "num_setups": len(setups)}))
        return
    summary = measure(options.repetitions, options.beside)
    table = format_table(summary)
    print(table)
    if options.report:
        options.report.write_text(format_report(table, options), encoding="utf-8")
    print(json.dumps(summary))
    sys.exit(3 if summary["grid"]["batch"]["median_us"] > MUST_REACH_US else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--beside", type=Path, metavar="SRC")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("ARM", "BATCH"), help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(repetitions: int, beside: Path | None) -> dict[str, Any]:
    """Median, least and most microseconds per setup, by batch and arm."""
    arms = [(arm, None) for arm in ARMS]
    if beside is not None:
        arms.insert(0, ("one by one", beside))
    found: dict[str, dict[str, list[float]]] = {name: {} for name in BATCHES}
    sizes: dict[str, int] = {}
    for _, name, (arm, source) in itertools.product(range(repetitions), BATCHES, arms):
        answer = run_child(arm, name, source)
        sizes[name] = answer["num_setups"]
        label = arm if source is None else f"{arm}, beside"
        found[name].setdefault(label, []).append(1e6 * answer["cpu_s"] / answer["num_setups"])
    return {
        name: {"num_setups": sizes[name], **{arm: _spread(times) for arm, times in by_arm.items()}}
        for name, by_arm in found.items()
    }


def run_child(arm: str, name: str, source: Path | None) -> dict[str, Any]:
    """One measurement in a process of its own."""
    environment = dict(os.environ)
    if source is not None:
        environment["PYTHONPATH"] = str(source.resolve())
    command = [sys.executable, __file__, "--child", arm, name]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _spread(times: list[float]) -> dict[str, float]:
    return {"median_us": statistics.median(times), "least_us": min(times), "most_us": max(times)}


def format_table(summary: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| batch | setups | arm | µs per setup | least and most |", "|---|---|---|---|---|"]
    for name, arms in summary.items():
        for arm, times in arms.items():
            if arm != "num_setups":
                spread = f"{times['least_us']:.0f} – {times['most_us']:.0f}"
                lines.append(
                    f"| {name} | {arms['num_setups']} | {arm} | {times['median_us']:.0f} | {spread} |"
                )
    return "\n".join(lines)


def format_report(table: str, options: argparse.Namespace) -> str:
    """The committed report."""
    text = (__doc__ or "").split("\n\n", 2)[2].partition("The last line")[0].strip()
    besides = " --beside SRC" if options.beside else ""
    return (
        "# Speed of the closed form\n\n"
        f"Made by `python benchmarks/closed_form_speed.py --repetitions {options.repetitions}{besides} --report …`.\n\n"
        f"{table}\n\nMust reach: at most {MUST_REACH_US:.0f} µs per configuration in a batch.\n\n{text}\n\n"
        f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} CPUs.\n"
    )


if __name__ == "__main__":
    main()
