"""How well `finefit bench` repeats itself, what looking costs, and whether it names the runs that were disturbed.

    python benchmarks/bench_repeatability.py            a quarter of an hour on two quiet cores
    python benchmarks/bench_repeatability.py --quick    a few minutes, to see that it works

Writes reports/bench-repeatability.md and the records beside it (.jsonl). A machine that others use too disturbs
all runs alike, and the report says so.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.anonymise import anonymise
from bench.environment import describe_environment
from bench.host import count_cpus
from bench.measure import measure
from bench.process import ProcessExecutor
from bench.protocol import StepProtocol
from bench.stats import median_ratio
from bench.store import Measurement, append_result
from bench.verify import TINY
from planner.files import write_atomically
from planner.setup import TrainSetup

REPORT = Path("reports/bench-repeatability.md")
SETUP = TrainSetup(
    model=TINY, from_scratch=True, method="lora", seq_len=256, micro_batch_size=1, optimizer="adamw-fused"
)
MAX_DIFFERENCE, MAX_OVERHEAD = 0.03, 0.01
DISTURBED_WORDS = ("other programs", "no processor", "hypervisor")
SPIN = "while True: pass"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One bench: its record, and the share of a processor that the watching process took."""

    name: str
    record: Measurement
    watcher_share: float

    @property
    def is_named(self) -> bool:
        return any(word in line for line in self.record.warnings for word in DISTURBED_WORDS)


def bench(name: str, protocol: StepProtocol, *, is_sampling: bool = True) -> Run:
    started, cpu = time.perf_counter(), time.process_time()
    record = measure(
        SETUP, protocol=protocol, device="cpu", gpu="cpu", executor=ProcessExecutor(is_sampling=is_sampling)
    )
    share = (time.process_time() - cpu) / (time.perf_counter() - started)
    if record.outcome != "ok":
        sys.exit(f"{name}: {record.outcome}: {record.error}\n{record.stderr_tail}")
    print(f"{name}: {record.measured.cpu_step_s:.4f} CPU s, {record.measured.step_s:.4f} s", file=sys.stderr)
    return Run(name=name, record=record, watcher_share=share)


@contextmanager
def load_beside() -> Iterator[None]:
    """As many busy processes as there are processors."""
    spinners = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count_cpus())]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def difference(runs: Sequence[Run], figure: Callable[[Run], float | None]) -> float:
    """Largest over smallest median, less one."""
    values = [value for run in runs if (value := figure(run))]
    return max(values) / min(values) - 1


def table(runs: Sequence[Run]) -> Iterator[str]:
    yield "| run | CPU s a step | wall s a step | spread | steps | others on the processors | waited | warnings of a disturbance |"
    yield "|---|--:|--:|--:|--:|--:|--:|---|"
    for run in runs:
        measured, facts = run.record.measured, run.record.environment
        figures = (
            f"{measured.cpu_step_s:.4f}",
            f"{measured.step_s:.4f}",
            f"{measured.step_spread:.1%}",
            str(len(run.record.samples.step_wall_s)),
            _percent(facts.get("others_cpu_share")),
            _percent(facts.get("cpu_wait_share")),
            "yes" if run.is_named else "no",
        )
        yield f"| {run.name} | {' | '.join(figures)} |"


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"


def verdict(is_met: bool) -> str:
    return "met" if is_met else "NOT met"


def report(
    repeats: Sequence[Run], looked: Sequence[Run], unlooked: Sequence[Run], loaded: Sequence[Run]
) -> str:
    by_cpu = difference(repeats, lambda run: run.record.measured.cpu_step_s)
    by_wall = difference(repeats, lambda run: run.record.measured.step_s)
    cpu = median_ratio(
        *([run.record.measured.cpu_step_s or 0 for run in runs] for runs in (unlooked, looked))
    )
    wall = median_ratio(*([run.record.measured.step_s or 0 for run in runs] for runs in (unlooked, looked)))
    watcher = median([run.watcher_share for run in looked])
    facts = describe_environment()
    quiet = not any(run.is_named for run in repeats)
    lines = [
        "# How well `finefit bench` repeats itself",
        "",
        f"`python benchmarks/bench_repeatability.py`, {time.strftime('%Y-%m-%d', time.gmtime())}, finefit {facts['commit']}, "
        f"{facts['cpu_model']}, {facts['num_cpus']} processors, torch {facts['versions'].get('torch')}. "
        f"Setup: {SETUP.method} of a 30M Llama from random weights, {SETUP.micro_batch_size} x {SETUP.seq_len} tokens. "
        + ("No run was disturbed." if quiet else "Others used this machine meanwhile; the runs' own warnings say which were disturbed."),
        "",
        "## The same plan again",
        "",
        *table(repeats),
        "",
        f"Medians differ by {by_cpu:.1%} in CPU seconds per step (wanted: {MAX_DIFFERENCE:.0%}; {verdict(by_cpu <= MAX_DIFFERENCE)}) "
        f"and by {by_wall:.1%} in wall seconds.",
        "",
        "## What looking costs",
        "",
        "With and without sampling, run by run in turn:",
        "",
        *table([run for pair in zip(looked, unlooked, strict=True) for run in pair]),
        "",
        f"With sampling a step takes {cpu.ratio:.4f} times the CPU seconds (95 % interval {cpu.low_ratio:.4f} to {cpu.high_ratio:.4f}) and "
        f"{wall.ratio:.4f} times the wall seconds ({wall.low_ratio:.4f} to {wall.high_ratio:.4f}) of one without; wanted: at most "
        f"{1 + MAX_OVERHEAD:.2f} ({verdict(cpu.ratio <= 1 + MAX_OVERHEAD)} by CPU seconds, {verdict(wall.ratio <= 1 + MAX_OVERHEAD)} by wall seconds). "
        f"The watching process itself takes {watcher:.2%} of one processor.",
        "",
        "## A load beside it",
        "",
        f"{count_cpus()} processes that never rest, during the whole run:",
        "",
        *table(loaded),
        "",
        f"{sum(run.is_named for run in loaded)} of {len(loaded)} disturbed runs say so ({verdict(all(run.is_named for run in loaded))}). "
        f"Their CPU seconds are {median_ratio([r.record.measured.cpu_step_s or 0 for r in repeats], [r.record.measured.cpu_step_s or 0 for r in loaded]).ratio:.3f} "
        "times those of the runs above, their wall seconds "
        f"{median_ratio([r.record.measured.step_s or 0 for r in repeats], [r.record.measured.step_s or 0 for r in loaded]).ratio:.3f} times.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--quick", action="store_true", help="Fewer runs and steps.")
    arguments.add_argument("--out", type=Path, default=REPORT)
    given = arguments.parse_args()
    protocol = StepProtocol.of(warmup=2, steps=5) if given.quick else StepProtocol(max_measure_s=40.0)
    num_repeats, num_pairs, num_loaded = (2, 1, 1) if given.quick else (5, 4, 2)
    repeats = [bench(f"{number + 1}", protocol) for number in range(num_repeats)]
    looked, unlooked = [], []
    for number in range(num_pairs):
        looked.append(bench(f"{number + 1}, with", protocol))
        unlooked.append(bench(f"{number + 1}, without", protocol, is_sampling=False))
    with load_beside():
        loaded = [bench(f"{number + 1}, loaded", protocol) for number in range(num_loaded)]
    write_atomically(given.out, report(repeats, looked, unlooked, loaded))
    records = given.out.with_suffix(".jsonl")
    records.unlink(missing_ok=True)
    for run in (*repeats, *looked, *unlooked, *loaded):
        append_result(records, anonymise(run.record))


if __name__ == "__main__":
    main()
