"""How much memory and time `finefit data inspect` takes for a file of several GB, and whether it finds what was planted.

    python benchmarks/data_inspect.py --gigabytes 5 --report reports/data-inspect.md

Writes a file of that size into the temporary folder, inspects it in a process of its own (its peak resident set is what
the kernel counts), compares what was found with what was put in, and removes the file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

NUM_WORDS, NUM_SENTENCES, SENTENCES_PER_ROW = 30_000, 50_000, 12
EVERY = {"exact": 101, "near": 103, "email": 211, "phone": 223, "broken": 10_007, "encoding": 10_009}
"""One row in so many of each kind (primes, so that they meet evenly)."""
LIMIT_BYTES = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="'' inspects without a tokenizer")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="finefit-inspect-") as folder:
        path = Path(folder) / "rows.jsonl"
        planted = write_rows(path, int(options.gigabytes * 1e9))
        size_bytes = path.stat().st_size
        result = inspect(path, options.model)
    rows = compare(planted, result["found"])
    text = report(options, size_bytes, planted, result, rows)
    print(text)
    if options.report:
        options.report.write_text(text)
    return 0 if result["peak_rss_bytes"] <= LIMIT_BYTES else 1


def write_rows(path: Path, size_bytes: int) -> Counter[str]:
    """Chat rows of random sentences with planted faults; the same bytes at every call."""
    draw = random.Random(20)
    words = ["".join(draw.choices("abcdefghiklmnoprstuvw", k=draw.randint(2, 10))) for _ in range(NUM_WORDS)]
    sentences = [" ".join(draw.choices(words, k=draw.randint(6, 18))) + "." for _ in range(NUM_SENTENCES)]
    planted: Counter[str] = Counter()
    before = ("", "")
    with path.open("wb") as file:
        number = 0
        while file.tell() < size_bytes:
            number += 1
            kind = next((name for name, every in EVERY.items() if number % every == 0), "row")
            planted[kind] += 1
            question, answer = (
                " ".join(draw.choices(sentences, k=2)),
                " ".join(draw.choices(sentences, k=SENTENCES_PER_ROW)),
            )
            if kind == "exact" and before[0]:
                question, answer = before
            if kind == "near" and before[0]:
                question, answer = before[0], before[1] + " " + draw.choice(words)
            if kind == "email":
                answer += f" Write to user{number}@example.org."
            if kind == "phone":
                answer += f" Call +4930{number % 10**7:07d}."
            line = json.dumps({"prompt": question, "completion": answer}).encode()
            if kind == "broken":
                line = line[:-5]
            if kind == "encoding":
                line = line.replace(b" ", b" \xff", 1)
            file.write(line + b"\n")
            if kind == "row":
                before = (question, answer)
    return planted


def inspect(path: Path, model: str) -> dict[str, Any]:
    """The command in a child process."""
    words = ["--model", model] if model else []
    program = "import sys; from bench.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "data", "inspect", str(path), *words, "--json"]
    started = time.monotonic()
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "found": json.loads(run.stdout),
        "wall_s": time.monotonic() - started,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "load": os.getloadavg()[1],
    }


def compare(planted: Counter[str], found: dict[str, Any]) -> list[tuple[str, int, int]]:
    """(what, planted, found)."""

    def rows(group: str, name: str) -> int:
        return int(found[group].get(name, {"num_rows": 0})["num_rows"])

    return [
        (
            "rows that can be read",
            planted.total() - planted["broken"] - planted["encoding"],
            found["num_rows"],
        ),
        ("broken JSON", planted["broken"], rows("faults", "json")),
        ("not UTF-8", planted["encoding"], rows("faults", "encoding")),
        ("exact duplicates", planted["exact"], found["exact_duplicates"]["num_rows"]),
        ("near-duplicates", planted["near"], found["near_duplicates"]["num_rows"]),
        ("rows with an e-mail address", planted["email"], rows("personal", "email")),
        ("rows with a phone number", planted["phone"], rows("personal", "phone")),
    ]


def report(
    options: argparse.Namespace,
    size_bytes: int,
    planted: Counter[str],
    result: dict[str, Any],
    rows: list[tuple[str, int, int]],
) -> str:
    found = result["found"]
    tokens = found["tokens"]
    sample = "" if tokens is None else f"; tokens and language of {tokens['lengths']['num_rows']:,} rows"
    table = "\n".join(f"| {name} | {put:,} | {got:,} |" for name, put, got in rows)
    return f"""# Inspecting a large file

Made by `python benchmarks/data_inspect.py --gigabytes {options.gigabytes:g} --model "{options.model}"`, which writes the file, inspects
it in a process of its own and removes it.

| | |
|---|---|
| file | {size_bytes / 1e9:.2f} GB of JSON Lines, {planted.total():,} rows{sample} |
| peak resident set | {result["peak_rss_bytes"] / 2**20:,.0f} MiB (limit {LIMIT_BYTES / 2**20:,.0f}) |
| time | {result["cpu_s"]:,.0f} CPU-seconds, {result["wall_s"]:,.0f} s of wall clock (load average {result["load"]:.1f} on {os.cpu_count()} cores) |
| signatures in the temporary folder | {512 * found["num_rows"] / 1e9:.2f} GB |
| system | {platform.system()}, Python {platform.python_version()} |

| planted | rows | found |
|---|---|---|
{table}

Near-duplicates differ from an earlier row in one word at the end. Exact counts must agree; near-duplicates are an estimate
by MinHash (128 hashes, 16 bands), and repetitions of one row count once each.
"""


if __name__ == "__main__":
    sys.exit(main())
