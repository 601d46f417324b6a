"""Run a grid of setups on this machine's card and keep every record, with the prediction made before it ran.

    python benchmarks/card_runs.py timed  --results runs.jsonl       one at a time: step times and memory
    python benchmarks/card_runs.py memory --results runs.jsonl       several at a time: memory only

Weights are random, nothing is downloaded. Each run is `finefit bench`'s: a process of its own, whose failure is a record
too. Runs that are there already are left out, so that a grid can be cut off and gone on with; a run that isn't begun
after `--seconds` isn't begun any more.
`finefit submit runs.jsonl` makes evidence of them, `finefit compare runs.jsonl --predicted` shows the errors by term.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from card_setups import GROUPS, Case, setup_of

from bench.anonymise import anonymise
from bench.machine import local_machine
from bench.measure import measure
from bench.protocol import StepProtocol
from bench.store import append_result, read_results, setup_id
from planner.errors import FinefitError
from planner.estimate import estimate
from planner.results import Estimate
from planner.specs import Machine
from planner.units import GIB

PROTOCOLS = {
    "timed": StepProtocol(min_steps=8, max_steps=16, max_measure_s=8.0),
    "memory": StepProtocol.of(warmup=1, steps=2),
}
SHARE = 0.85
"""Of the card's free memory that predictions of runs side by side may add up to."""
UNKNOWN_BYTES = 20 * GIB
"""Taken for a run that the closed form refuses to predict."""


class Room:
    """What is left of the card for runs side by side."""

    def __init__(self, total_bytes: float) -> None:
        self.total_bytes = self.free_bytes = total_bytes
        self.changed = threading.Condition()

    def take(self, need_bytes: float) -> float:
        """Wait for so much, at most all of it; what was taken."""
        need_bytes = min(need_bytes, self.total_bytes)
        with self.changed:
            self.changed.wait_for(lambda: self.free_bytes >= need_bytes)
            self.free_bytes -= need_bytes
        return need_bytes

    def give(self, num_bytes: float) -> None:
        """Give it back."""
        with self.changed:
            self.free_bytes += num_bytes
            self.changed.notify_all()


class Grid:
    """One group of cases on one machine."""

    def __init__(self, options: argparse.Namespace, machine: Machine) -> None:
        self.options, self.machine = options, machine
        self.until_s = time.monotonic() + options.seconds
        free_bytes = machine.free_bytes or machine.gpu.usable_bytes or machine.gpu.memory_bytes
        self.room = Room(SHARE * (free_bytes or 0))
        self.writing = threading.Lock()

    def run(self) -> None:
        """All cases that aren't there yet."""
        done = self.done_ids()
        cases = [case for case in GROUPS[self.options.group] if setup_id(setup_of(case)) not in done]
        num_workers = 1 if self.options.group == "timed" else self.options.workers
        with ThreadPoolExecutor(num_workers) as pool:
            list(pool.map(self.run_case, cases))

    def done_ids(self) -> set[str]:
        """Setups that ended well in the results so far."""
        if not self.options.results.exists():
            return set()
        runs, _ = read_results(self.options.results)
        return {run.setup_id for run in runs if run.outcome == "ok"}

    def predict(self, case: Case) -> Estimate | None:
        """The closed form's answer; None, said, where it has none."""
        try:
            return estimate(setup_of(case), self.machine)
        except FinefitError as error:
            self.say(case, f"not predicted: {error}")
            return None

    def run_case(self, case: Case) -> None:
        """Measure one case and append its record."""
        if time.monotonic() > self.until_s:
            self.say(case, "not begun")
            return
        predicted = self.predict(case)
        need_bytes = predicted.memory.device_used_bytes if predicted else None
        taken = self.room.take(need_bytes or UNKNOWN_BYTES)
        started = time.monotonic()
        try:
            run = measure(
                setup_of(case),
                protocol=PROTOCOLS[self.options.group],
                predicted=predicted.to_json() if predicted else None,
                gpu=self.machine.gpu.name,
                random_weights=True,
                timeout_s=self.options.timeout,
            )
        finally:
            self.room.give(taken)
        with self.writing:
            append_result(self.options.results, anonymise(run))
        peak = run.measured.peak_allocated_bytes
        error = ""
        if predicted and peak and predicted.memory.peak_allocated_bytes:
            error = f"{predicted.memory.peak_allocated_bytes / peak - 1:+.2%} of {peak / GIB:.2f} GiB, "
        seconds = f"{run.measured.step_s:.3f} s/step, " if run.measured.step_s else ""
        tail = run.stderr_tail.strip().splitlines()[-1:] if run.outcome != "ok" else []
        self.say(
            case,
            f"{run.outcome} {error}{seconds}{time.monotonic() - started:.0f} s {run.error or ''} {' '.join(tail)}",
        )

    def say(self, case: Case, text: str) -> None:
        """A line on stderr."""
        print(*(str(word) for word in case), text, sep=" | ", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("group", choices=list(GROUPS))
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=3600.0, help="no run begins after this")
    parser.add_argument("--timeout", type=float, default=300.0, help="of one run, in seconds")
    parser.add_argument("--workers", type=int, default=6, help="runs side by side (memory)")
    Grid(parser.parse_args(), local_machine()).run()


if __name__ == "__main__":
    main()
