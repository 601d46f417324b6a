"""Real tokens per CPU-second: finefit's run loop beside Hugging Face's Trainer and TRL's SFTTrainer, the same LoRA fine-tune.

    python benchmarks/train_speed.py [--case natural blocks] [--steps 4] [--repetitions 2] [--report reports/speed.md]
    python benchmarks/train_speed.py --case variants --repetitions 1 --report reports/speed.md     what else was tried
    python benchmarks/train_speed.py --quick       one repetition of 3 steps of three programs, to develop with

Every measurement is a child process of its own and the programs take turns. CPU-seconds (user + system, getrusage, with
children) are compared because wall time on a shared machine measures its neighbours, and one thread computes because
several that wait for each other count their waiting as work. The first step of each child is left out, and its time is
shown. Raw figures go to the report's .json; a case that isn't run again keeps its figures there. The last line is one
JSON object; exit code 3 when finefit doesn't reach what must be reached.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from speed_arms import CASES, run_arm
from speed_children import run_child, turns
from speed_data import Clock, load_of
from speed_report import check, format_report, summarise

QUICK = ("finefit", "trainer-tuned", "trl-tuned")


def main() -> None:
    options = parse_arguments()
    if options.child:
        case, name = options.child
        load = load_of("blocks" if case == "blocks" else "natural", options.steps)
        clock = Clock(started=float(os.environ["SPEED_STARTED"]))
        print(json.dumps(run_arm(CASES[case][name], load, clock)))
        return
    results = {case: run_case(case, options) for case in options.case}
    summary = summarise(results, options.report)
    print(format_report(summary))
    if options.report:
        options.report.write_text(format_report(summary), encoding="utf-8")
        options.report.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    verdict = check(summary)
    print(json.dumps(verdict))
    sys.exit(0 if all(entry["reached"] for entry in verdict) else 3)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=["natural", "blocks"])
    parser.add_argument("--only", nargs="+", help="programs to run (default: all of the case)")
    parser.add_argument(
        "--steps", type=int, default=4, help="optimizer steps per child, the first among them"
    )
    parser.add_argument("--repetitions", type=int, default=2, help="children per program")
    parser.add_argument(
        "--quick", action="store_true", help=f"--repetitions 1 --steps 3 --only {' '.join(QUICK)}"
    )
    parser.add_argument(
        "--report", type=Path, help="write the report as Markdown, and the raw figures as .json"
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.repetitions, options.steps, options.only = 1, 3, QUICK
    return options


def run_case(case: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Its programs' figures, in turns."""
    names = [name for name in CASES[case] if not options.only or name in options.only]
    return [
        run_child(
            __file__,
            case,
            name,
            ["--steps", str(options.steps)],
            about={"arm": name, "what": CASES[case][name].what},
            environment={
                "OMP_NUM_THREADS": "1",
                "OMP_WAIT_POLICY": "passive",
                **CASES[case][name].environment,
            },
            say=lambda found: f"{found['tokens'] / found['cpu_s']:.0f} tokens per CPU-second",
        )
        for name in turns(names, options.repetitions)
    ]


if __name__ == "__main__":
    main()
