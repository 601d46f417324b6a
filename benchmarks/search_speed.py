"""CPU-seconds of the search, and of `finefit plan` with a large data file.

    python benchmarks/search_speed.py [--repetitions 3] [--report reports/search-speed.md]

Searches: each question is asked in a process of its own that starts with nothing remembered; time is
time.process_time around `planner.optimise.optimise`, with the shipped prices in memory. A *setup* is one combination of
rung, rank, optimizer, checkpointing, loss, micro-batch with accumulation, packing where the data leaves it open, sharding,
offload, card and number (for the longest context each length too); *with offers* counts it once for each offer that could
run it. All of them are decided; *peaks* and *times* were computed for that, the others follow from the laws in
docs/search.md, which tests hold against plain enumeration. CPU time is compared because wall time on a shared machine
measures its neighbours; the search runs on one core.

Data: `finefit plan` from the shell on 50,000 generated rows, start of Python, reading, tokenising a sample, search and
writing the plan included.

The last line is one JSON object; exit code 3 when a million candidates (setups with their offers) would take more than 5
seconds at the rate of `clouds`, or the data more than 3.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST_SEARCH_S, MOST_DATA_S, MILLION = 5.0, 3.0, 1_000_000
MODEL, DATA_MODEL, NUM_ROWS, SEED = "llama-3.1-8b", "smollm2-135m-instruct", 50_000, 0

QUESTIONS: dict[str, dict[str, Any]] = {
    "clouds": {"goal": "cheapest", "global_batch": 128},
    "clouds, large model": {"goal": "cheapest", "global_batch": 128, "model": "llama-3.3-70b"},
    "clouds, longest context": {"goal": "longest-context", "global_batch": 16},
    "one card": {"goal": "fastest", "global_batch": 128, "gpu": "rtx-4090"},
}


def ask(name: str) -> dict[str, Any]:
    """One search: its CPU seconds and what it counted."""
    import datetime

    from planner.lengths import DataLengths
    from planner.money import shipped_rates
    from planner.optimise import Question, optimise
    from planner.places import owned, rented
    from planner.price_book import shipped_book
    from planner.resolve import resolve_model

    fields = QUESTIONS[name]
    chance = random.Random(SEED)
    sample = [min(2000, 20 + int(chance.expovariate(1 / 400))) for _ in range(1000)]
    book, today, model = shipped_book(), datetime.date.today(), fields.get("model", MODEL)
    places = owned([_machine(fields["gpu"])]) if "gpu" in fields else rented(book, today)
    question = Question(
        wishes={"model": model, "packing": False},
        model=resolve_model(model),
        places=places,
        goal=fields["goal"],
        book=book,
        rates=shipped_rates(),
        today=today,
        lengths=DataLengths.of(sample, num_rows=NUM_ROWS, source="generated"),
        global_batch=fields["global_batch"],
    )
    start = time.process_time()
    found = optimise(question)
    seconds, tally = time.process_time() - start, found.tally
    return {
        "cpu_s": seconds,
        "machines": len(places),
        "setups": tally.setups,
        "with_offers": tally.ways,
        "peaks": tally.sized,
        "times": tally.timed,
        "front": len(found.front),
    }


def _machine(name: str) -> Any:
    from planner.catalog import find_gpu
    from planner.specs import Machine

    return Machine(gpu=find_gpu(name))


def plan_with_data() -> dict[str, Any]:
    """`finefit plan` on a generated file: CPU and wall seconds of the whole process."""
    chance = random.Random(SEED)
    words = (
        "time",
        "memory",
        "a",
        "model",
        "learns",
        "the",
        "answer",
        "from",
        "examples",
        "of",
        "its",
        "data",
    )
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        with data.open("w", encoding="utf-8") as file:
            for _ in range(NUM_ROWS):
                text = " ".join(chance.choices(words, k=1 + int(chance.expovariate(1 / 80))))
                file.write(json.dumps({"instruction": "Answer.", "input": "", "output": text}) + "\n")
        program = "import sys; from bench.cli import run; sys.exit(run(sys.argv[1:]))"
        words_of_command = ["plan", DATA_MODEL, "--gpu", "rtx-4090", "--data", str(data)]
        command = [sys.executable, "-c", program, *words_of_command, "--out", f"{folder}/plan.yaml"]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        after, wall_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"cpu_s": used, "wall_s": wall_s, "rows": NUM_ROWS}


TASKS: dict[str, Callable[[], dict[str, Any]]] = {
    **{name: lambda name=name: ask(name) for name in QUESTIONS},  # type: ignore[misc]
    "data": plan_with_data,
}


def main() -> None:
    options = parse_arguments()
    if options.child:
        print(json.dumps(TASKS[options.child]()))
        return
    found = {name: measure(name, options.repetitions) for name in TASKS}
    text = format_report(found, options.repetitions)
    print(text)
    if options.report:
        options.report.write_text(text, encoding="utf-8")
    print(json.dumps(found))
    clouds = found["clouds"]
    is_slow = (
        clouds["cpu_s"] / clouds["with_offers"] * MILLION > MOST_SEARCH_S
        or found["data"]["cpu_s"] > MOST_DATA_S
    )
    sys.exit(3 if is_slow else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--child", choices=list(TASKS), help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(name: str, repetitions: int) -> dict[str, Any]:
    """The counts, with median, least and most CPU seconds."""
    answers = [run_child(name) for _ in range(repetitions)]
    times = [answer["cpu_s"] for answer in answers]
    spread = {"cpu_s": statistics.median(times), "least_s": min(times), "most_s": max(times)}
    return {**answers[0], **spread}


def run_child(name: str) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--child", name]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def format_report(found: dict[str, dict[str, Any]], repetitions: int) -> str:
    """The committed report."""
    lines = [
        "| question | machines | setups decided | with offers | peaks computed | times computed | CPU s (least to most) | "
        "s per million with offers (setups alone) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in QUESTIONS:
        row = found[name]
        spread = f"{row['cpu_s']:.2f} ({row['least_s']:.2f} to {row['most_s']:.2f})"
        each, alone = (row["cpu_s"] * MILLION / row[count] for count in ("with_offers", "setups"))
        lines.append(
            f"| {name} | {row['machines']} | {row['setups']:,} | {row['with_offers']:,} | {row['peaks']:,} | "
            f"{row['times']:,} | {spread} | {each:.1f} ({alone:.1f}) |"
        )
    data = found["data"]
    body = (__doc__ or "").split("\n\n", 2)[2].partition("The last line")[0].strip()
    return (
        "# Speed of the search\n\n"
        f"Made by `python benchmarks/search_speed.py --repetitions {repetitions} --report …`.\n\n"
        + "\n".join(lines)
        + f"\n\nMust reach: a million candidates (setups with their offers) in at most {MOST_SEARCH_S:g} s on one core.\n\n"
        f"`finefit plan {DATA_MODEL} --gpu rtx-4090 --data FILE` with {data['rows']:,} rows: {data['cpu_s']:.2f} CPU-seconds "
        f"({data['least_s']:.2f} to {data['most_s']:.2f}). Must reach: at most {MOST_DATA_S:g} s.\n\n{body}\n\n"
        f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} CPUs.\n"
    )


if __name__ == "__main__":
    main()
