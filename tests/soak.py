"""Kill a short real run again and again: each time it must resume, and end as if nothing had happened, bit for bit.

    python tests/soak.py --report reports/soak

SIGKILL comes at random moments of a run's life; some are aimed at its saves: the child says that one begins, and the
kill follows after a random part of the time that a save takes. SIGTERM and SIGINT are aimed at each phase in turn.
Lives are forked from one parent that has imported everything but computed nothing, because importing torch takes
longer than the run; a few more are fresh `finefit train` processes. A seed draws the same moments again; where they
hit depends on the machine, and is counted by what the child said last.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from soak_life import AFTER, Reports, live
from soak_report import write_report

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
"""One thread: a forked process doesn't get its parent's others, and would wait for them."""
os.environ.update(ENVIRONMENT)

NUM_STEPS = 8
HITS_PER_STORY = {signal.SIGKILL: 8, signal.SIGTERM: 3, signal.SIGINT: 3}
SAVE_SHARE = 0.4
"""Of the kills, those that are aimed at a save."""
LIFE_LIMIT_S = 240
FRESH_CODES = {signal.SIGKILL: (-9,), signal.SIGTERM: (33, 143, -15), signal.SIGINT: (33, 143, 130, -2)}
"""-15, -2 and 130 are the system's and Python's own ends, before the run has begun."""

BASE = {
    "from_scratch": False,
    "seq_len": 64,
    "micro_batch_size": 4,
    "eval_fraction": 0.1,
    "max_steps": NUM_STEPS,
}
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LoRA, dropout, accumulation": (
        {"dropout": 0.2, "schedule": "cosine", "warmup_steps": 3, "grad_accum_steps": 2},
        {"save_every_steps": 2, "eval_every_steps": 3},
    ),
    "full, packed, a save at each step": (
        {"method": "full", "packing": True, "micro_batch_size": 1, "weight_decay": 0.1},
        {"save_every_steps": 1, "eval_every_steps": 4},
    ),
    "full, bf16 with float32 masters, accumulation": (
        {
            "method": "full",
            "weights_dtype": "bfloat16",
            "master_weights": "float32",
            "grad_accum_steps": 2,
        },
        {"save_every_steps": 3},
    ),
    "LoRA, packed, chunked loss, accumulation": (
        {"packing": True, "loss": "chunked", "micro_batch_size": 1, "grad_accum_steps": 2},
        {"save_every_steps": 2, "eval_every_steps": 2},
    ),
}
"""Changes of the setup, and options of the run."""

STOP_PHASES = (
    ("opening the folder", 1),
    ("loading the tokenizer", 1),
    ("reading data", 1),
    ("building the model", 1),
    ("resuming", 1),
    ("step", 1),
    ("step", 3),
    ("evaluation", 1),
    ("evaluation", 2),
    ("answers", 1),
    ("save", 1),
    ("save", 2),
    ("writing the result", 1),
    ("checking the result", 1),
)
"""Where stops are aimed: the phase and its how-manieth call in a life."""


@dataclass(frozen=True, kw_only=True)
class Aim:
    """A signal `share` of the phase's usual time after the beginning of its `call`-th; without a phase, of the life's."""

    number: signal.Signals
    share: float
    phase: str | None = None
    call: int = 1


@dataclass(frozen=True, kw_only=True)
class Life:
    """What became of one process: `code` is negative for a signal that killed it; `phase` is where a signal hit."""

    code: int
    phase: str | None
    saved: int
    resumed: int | None
    seconds: float
    obeyed_s: float | None


class Soak:
    """Lives, stories of lives in one folder, and the counts."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.draw = root, random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.stops: dict[str, Counter[str]] = {"SIGTERM": Counter(), "SIGINT": Counter()}
        self.codes: Counter[str] = Counter()
        self.recipes: Counter[str] = Counter()
        self.fresh: Counter[str] = Counter()
        self.broken: Counter[str] = Counter()
        self.obeyed_s: list[float] = []
        self.failures: list[str] = []
        self.num_stories = self.num_resumes = self.num_too_late = 0
        self.usual_s: dict[str, dict[str, float]] = {}
        self.far = ""

    def prepare(self) -> None:
        """The model, and of each recipe a run that nothing stops, with how long its phases take."""
        child = os.fork()
        if child == 0:
            from whole_runs import save_tiny_folder

            save_tiny_folder(self.root / "tiny")
            os._exit(0)
        os.waitpid(child, 0)
        warm_up(self)
        for recipe in RECIPES:
            self.usual_s[recipe] = {}
            whole = self.whole(recipe)
            life, reports = self._fork(recipe, whole, None)
            if life.code != 0:
                raise SystemExit(f"{recipe}: the run fails by itself\n{log_of(whole)}")
            self.usual_s[recipe] = {p: statistics.median(s) for p, s in reports.seconds().items()}
            self.usual_s[recipe]["life"] = life.seconds

    def whole(self, recipe: str) -> Path:
        """The folder of the run that nothing stopped."""
        return self.root / f"whole-{list(RECIPES).index(recipe)}"

    def setup(self, recipe: str) -> Any:
        from tiny_llama import tiny_setup

        tiny = self.root / "tiny"
        changes = {"model": str(tiny / "model"), "data": str(tiny / "rows.jsonl"), **RECIPES[recipe][0]}
        return tiny_setup(**{**BASE, **changes})

    # ------------------------------------------------------------- one life

    def _fork(self, recipe: str, folder: Path, aim: Aim | None) -> tuple[Life, Reports]:
        receiver, sender = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receiver)
            live(self.setup(recipe), folder, sender, RECIPES[recipe][1])
        os.close(sender)
        started = time.monotonic()
        reports = Reports(receiver)
        sent = None if aim is None else self._send(child, reports, aim, recipe, started)
        reports.read_to_end(started + LIFE_LIMIT_S)
        if not reports.is_over:
            os.kill(child, signal.SIGKILL)
            self.failures.append(f"{recipe}: still running after {LIFE_LIMIT_S} s in {reports.lines[-1:]}")
        os.close(receiver)
        _, status = os.waitpid(child, 0)
        ended = time.monotonic()
        life = Life(
            code=os.waitstatus_to_exitcode(status),
            phase=None if sent is None else reports.phase_at(sent),
            saved=reports.last_number("saved") or 0,
            resumed=reports.last_number("resumed"),
            seconds=ended - started,
            obeyed_s=None if sent is None else ended - sent,
        )
        return life, reports

    def _send(self, child: int, reports: Reports, aim: Aim, recipe: str, started: float) -> float | None:
        """Send the signal; when that was, or None where the life was over before."""
        usual_s = self.usual_s[recipe].get(aim.phase or "life", 0.0)
        deadline = started + LIFE_LIMIT_S
        begun = started if aim.phase is None else reports.wait_for(aim.phase, aim.call, deadline)
        if begun is None:
            return None
        moment = begun + aim.share * usual_s
        while (left := moment - time.monotonic()) > 0:
            if not reports.wait(left):
                return None
        if reports.is_over:
            return None
        sent = time.monotonic()
        os.kill(child, aim.number)
        return sent

    # ------------------------------------------------------------- stories

    def tell(self, recipe: str, aims: Iterator[Aim], num_hits: int) -> int:
        """Lives in one folder, until `num_hits` were hit or one ends by itself; then the run must be as if nothing
        had stopped it. How many were hit.
        """
        self.num_stories += 1
        folder = self.root / f"story-{self.num_stories}"
        hits, saved = 0, 0
        while True:
            aim = next(aims) if hits < num_hits else None
            life, _ = self._fork(recipe, folder, aim)
            if hits and life.resumed is not None:
                self.num_resumes += 1
                if life.resumed < saved:
                    self._fail(folder, f"resumed after step {life.resumed}, though {saved} had been saved")
            saved = max(saved, life.saved)
            fault = _fault(life, aim, folder)
            if fault:
                self._fail(folder, f"{recipe}: {fault}\n{log_of(folder)}")
                return hits
            if life.code == 0 or life.phase == AFTER:
                self.num_too_late += life.phase is not None
                break
            hits += 1
            self._count(life, aim, recipe)
        if life.code != 0:
            self._fork(recipe, folder, None)
        self._compare(recipe, folder)
        return hits

    def _compare(self, recipe: str, folder: Path) -> None:
        from whole_runs import differences

        if " is torn" in log_of(folder):
            self._fail(folder, "a kill left a torn checkpoint under the name of a whole one")
        if litter := [p.name for p in folder.rglob(".*") if p.name != ".lock"]:
            self._fail(folder, f"left lying about: {litter}")
        if unequal := differences(self.whole(recipe), folder):
            self._fail(folder, f"{recipe}: differs from the run that nothing stopped: {unequal[:3]}")
        else:
            shutil.rmtree(folder)

    def _count(self, life: Life, aim: Aim, recipe: str) -> None:
        self.recipes[recipe] += 1
        if aim.number == signal.SIGKILL:
            self.kills[life.phase] += 1
            return
        self.stops[aim.number.name][life.phase] += 1
        self.codes[f"{aim.number.name}: {life.code}"] += 1
        self.obeyed_s.append(life.obeyed_s)

    def _fail(self, folder: Path, words: str) -> None:
        self.failures.append(f"{folder.name}: {words}")
        print(f"FAILURE {self.failures[-1]}", file=sys.stderr, flush=True)

    # ------------------------------------------------------------- the whole

    def kill(self, num_kills: int, num_in_saves: int) -> None:
        """SIGKILLs until there are so many, and so many of them in saves."""
        recipes = cycle(RECIPES)
        while (left := num_kills - sum(self.kills.values())) > 0 or in_saves(self.kills) < num_in_saves:
            limit = HITS_PER_STORY[signal.SIGKILL]
            self.tell(next(recipes), self._kill_aims(), min(limit, left) if left > 0 else limit)
            self._say(f"{sum(self.kills.values())} kills, {in_saves(self.kills)} in saves")

    def stop(self, number: signal.Signals, num_stops: int) -> None:
        """Stops, aimed at each phase in turn."""
        recipes, aims = cycle(RECIPES), self._stop_aims(number)
        while (left := num_stops - sum(self.stops[number.name].values())) > 0:
            self.tell(next(recipes), aims, min(HITS_PER_STORY[number], left))
            self._say(f"{sum(self.stops[number.name].values())} times {number.name}")

    def _say(self, words: str) -> None:
        print(f"{words}; {len(self.failures)} failures", file=sys.stderr, flush=True)

    def _kill_aims(self) -> Iterator[Aim]:
        while True:
            phase = "save" if self.draw.random() < SAVE_SHARE else None
            call = self.draw.randint(1, 3) if phase else 1
            yield Aim(number=signal.SIGKILL, share=self.draw.random(), phase=phase, call=call)

    def _stop_aims(self, number: signal.Signals) -> Iterator[Aim]:
        for phase, call in cycle(STOP_PHASES):
            yield Aim(number=number, share=self.draw.random(), phase=phase, call=call)

    def fresh_processes(self, numbers: list[signal.Signals]) -> None:
        """The same with `finefit train` as a person starts it: one in three stopped while it starts, the others later."""
        if not numbers:
            return
        recipe = next(iter(RECIPES))
        code, start_s, run_s = self._fresh(recipe, self.root / "fresh", None, 0.0, 0.0)
        self._check_fresh(code == 0, self.root / "fresh", "fails by itself")
        for order, number in enumerate(numbers):
            self.num_stories += 1
            folder = self.root / f"story-{self.num_stories}"
            begun_s, more_s = (self.draw.uniform(0, start_s), 0.0) if order % 3 == 0 else (start_s, run_s)
            code, _, _ = self._fresh(recipe, folder, number, begun_s, self.draw.random() * more_s)
            where = AFTER if code == 0 else self.far
            is_fine = code in (0, *FRESH_CODES[number])
            self._check_fresh(is_fine, folder, f"exit code {code} after {number.name}, {where}")
            self.fresh[f"{number.name}, {where}: exit code {code}"] += 1
            self._say(f"finefit train, {number.name}, {where}: exit code {code}")
            self._check_fresh(self._fresh(recipe, folder, None, 0.0, 0.0)[0] == 0, folder, "doesn't resume")
            self._compare(recipe, folder)

    def broken_input(self, seed: int, num_plans: int, num_files: int) -> None:
        """Broken plans and training files, in a process of their own: the commands compute."""
        if not num_plans + num_files:
            return
        found = self.root / "ordeal.json"
        child = os.fork()
        if child == 0:
            from broken_input import Ordeal

            os.chdir(self.root)
            ordeal = Ordeal(self.root / "tiny", seed)
            ordeal.plans(0, num_plans)
            ordeal.files(0, num_files)
            found.write_text(json.dumps([ordeal.counts, ordeal.faults]))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            self._fail(found, f"broken input ended its process: {os.waitstatus_to_exitcode(status)}")
            return
        counts, faults = json.loads(found.read_text())
        self.broken = Counter(counts)
        self.failures += faults
        self._say(f"{num_plans} broken plans and {num_files} broken files")

    def _check_fresh(self, is_fine: bool, folder: Path, words: str) -> None:
        if not is_fine:
            self._fail(folder, f"finefit train {words}\n{log_of(folder)}")

    def _fresh(
        self, recipe: str, folder: Path, number: signal.Signals | None, start_s: float, more_s: float
    ) -> tuple[int, float, float]:
        """Exit code, seconds until the first line of metrics was there, and from then on.

        The signal comes `more_s` after that line, or `start_s` after the start where no more is wanted.
        """
        options = RECIPES[recipe][1]
        command = [sys.executable, "-c", "import sys; from bench.cli import main; sys.exit(main())", "train"]
        command += [str(self.whole(recipe) / "plan.yaml"), "--out", str(folder), "--device", "cpu", "--force"]
        command += ["--save-every", str(options["save_every_steps"])]
        command += ["--eval-every", str(options["eval_every_steps"])]
        started = time.monotonic()
        with folder.with_suffix(".log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        if number is not None and not more_s:
            _wait(process, start_s)
        while (
            (number is None or more_s) and not (folder / "metrics.jsonl").exists() and process.poll() is None
        ):
            time.sleep(0.01)
        begun = time.monotonic()
        if number is not None:
            _wait(process, more_s)
            self.far = _how_far(folder)
            process.send_signal(number)
        process.wait(LIFE_LIMIT_S)
        return process.returncode, begun - started, time.monotonic() - begun


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def _fault(life: Life, aim: Aim | None, folder: Path) -> str | None:
    """Why a life ended otherwise than it should, if it did."""
    if life.phase is None or aim is None:
        return None if life.code == 0 else f"exit code {life.code} without any signal"
    if life.phase == AFTER:
        return None
    if aim.number == signal.SIGKILL:
        return None if life.code in (-signal.SIGKILL, 0) else f"exit code {life.code} after SIGKILL"
    is_saved = any((folder / "checkpoints").glob("step-*"))
    wanted = 33 if is_saved else 143
    is_summed_up = (folder / "summary.json").exists()
    if life.code == wanted or (life.code == 0 and is_summed_up and life.phase == "summing up"):
        return None
    return f"exit code {life.code} after {aim.number.name} in {life.phase!r}, not {wanted}"


def in_saves(kills: Counter[str]) -> int:
    """How many hit while a checkpoint was being written."""
    return sum(number for phase, number in kills.items() if phase.startswith("save"))


def log_of(folder: Path) -> str:
    """What the lives of a run said."""
    path = folder.with_suffix(".log")
    return path.read_text(errors="replace")[-3000:] if path.exists() else ""


def _how_far(folder: Path) -> str:
    """By what lies in the folder."""
    metrics = folder / "metrics.jsonl"
    if not folder.exists() or not metrics.exists():
        return "while it starts or loads"
    if (folder / "summary.json").exists():
        return AFTER
    if any(folder.glob("checkpoints/.*")):
        return "while it saves"
    return "while it writes the result" if any(folder.glob("*adapter")) else "while it trains or evaluates"


def warm_up(soak: Soak) -> None:
    """Import, in this process, what a whole run imports: each life would need seconds for it."""
    listed = soak.root / "modules.txt"
    child = os.fork()
    if child == 0:
        from bench.train import train

        train(soak.setup(next(iter(RECIPES))), soak.root / "warm", progress=False)
        listed.write_text("\n".join(sys.modules))
        os._exit(0)
    os.waitpid(child, 0)
    names = listed.read_text().split("\n")
    for name in names:
        if name not in sys.modules and not name.startswith("_"):
            _import(name)


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:
        print(f"not imported ahead: {name} ({type(error).__name__})", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs (200)")
    parser.add_argument("--in-saves", type=int, default=60, help="how many of them at least in saves (60)")
    parser.add_argument("--stops", type=int, default=40, help="SIGTERMs (40)")
    parser.add_argument("--interrupts", type=int, default=14, help="SIGINTs (14)")
    parser.add_argument("--fresh", type=int, default=9, help="signals to fresh processes (9)")
    parser.add_argument("--plans", type=int, default=2000, help="broken plans (2000)")
    parser.add_argument("--files", type=int, default=2000, help="broken training files (2000)")
    parser.add_argument("--seed", type=int, default=1, help="draws the moments (1)")
    parser.add_argument("--report", type=Path, metavar="NAME", help="write NAME.md and NAME.json")
    options = parser.parse_args()
    started = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="finefit-soak-"))
    os.environ.update({name: str(root / "cache") for name in ("FINEFIT_CACHE", "XDG_CACHE_HOME", "HF_HOME")})
    soak = Soak(root, options.seed)
    soak.prepare()
    soak.kill(options.kills, options.in_saves)
    soak.stop(signal.SIGTERM, options.stops)
    soak.stop(signal.SIGINT, options.interrupts)
    order = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT]
    soak.fresh_processes([number for number, _ in zip(cycle(order), range(options.fresh), strict=False)])
    soak.broken_input(options.seed, options.plans, options.files)
    print(write_report(soak, options, time.monotonic() - started))
    if soak.failures:
        print(f"kept for a look: {root}", file=sys.stderr)
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
