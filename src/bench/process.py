"""A job in a child process: started, watched, ended, and whatever becomes of it is a report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from bench.host import ROOT, count_oom_kills, rss_bytes
from bench.host_sampler import HostSampler
from bench.jobs import EVENTS_FILE, STDERR_FILE, Job, ProgressCallback, RunLog, RunReport
from bench.nvml import Nvml, opened
from bench.nvml_driver import Pynvml
from bench.sampler import GpuSampler
from bench.store import Measured
from bench.waiting import WAITING
from bench.watched import Watched
from planner.units import format_bytes, format_duration

POLL_S = 0.1
STDERR_TAIL_CHARS = 4000
CRASH_SIGNALS = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE", "SIGTRAP", "SIGSYS")
"""Signals that a process brings upon itself; others come from outside."""


@dataclass
class ProcessExecutor:
    """`Executor` by a fresh `python -m bench.worker`; `command` stands in for it in tests.

    `is_sampling` False leaves out all looking from outside, to see what it costs.
    """

    nvml: Nvml = field(default_factory=Pynvml)
    is_sampling: bool = True
    command: tuple[str, ...] = (sys.executable, "-P", "-m", "bench.worker")

    def run(self, job: Job, progress: ProgressCallback) -> RunReport:
        """As `Executor` says. Ctrl-C ends the child and is raised again."""
        with tempfile.TemporaryDirectory(prefix="finefit-bench-") as name, opened(self.nvml) as nvml:
            folder = Path(name)
            # On Windows a virtual environment's python.exe stands between the two.
            replace(job, parent_pid=os.getpid() if os.name == "posix" else None).write(folder)
            with (folder / STDERR_FILE).open("wb") as stderr:
                child = _start([*self.command, name], stderr)
            watch = _Watch(job, child, folder, nvml if self.is_sampling else None, progress)
            watch.is_sampling = self.is_sampling
            try:
                watch.until_end()
            finally:
                end(child)
            return watch.report()


def _start(command: list[str], stderr: IO[bytes]) -> subprocess.Popen[bytes]:
    """The child in a session of its own, so that all that it starts can be ended with it."""
    own = {"PYTHONFAULTHANDLER": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**WAITING, **os.environ, **own}
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=stderr,
        stderr=stderr,
        env=environment,
        start_new_session=os.name == "posix",
    )


def end(child: subprocess.Popen[bytes]) -> None:
    """Kill the child with what it started, if it still runs, and wait for it."""
    if child.poll() is None:
        if os.name == "posix":
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
    child.wait()


class _Watch:
    """Follows a child until it ends: its events, its resident set, its card, the time."""

    def __init__(
        self,
        job: Job,
        child: subprocess.Popen[bytes],
        folder: Path,
        nvml: Nvml | None,
        progress: ProgressCallback,
    ) -> None:
        self.job, self.child, self.folder, self.progress = job, child, folder, progress
        self.log = RunLog(protocol=job.protocol)
        self.is_sampling = True
        self.sampler = GpuSampler(nvml, child.pid) if nvml else None
        self.host_sampler = HostSampler(child.pid)
        self.watched = Watched()
        self.host_bytes = 0
        self.has_timed_out = False
        self.oom_kills_before = count_oom_kills(ROOT)
        self._offset = 0

    def until_end(self) -> None:
        """Return when the child has ended or its time is over."""
        start = time.monotonic()
        while self.child.poll() is None:
            self.look()
            if self.job.timeout_s is not None and time.monotonic() - start > self.job.timeout_s:
                self.has_timed_out = True
                return
            time.sleep(POLL_S)

    def look(self) -> None:
        """One round of looking."""
        self.read_events()
        if not self.is_sampling:
            return
        is_working = self.log.phase == "steps"
        resident_bytes, peak_bytes = rss_bytes(self.child.pid)
        self.host_bytes = max(self.host_bytes, peak_bytes or 0)
        if self.sampler is not None:
            self.sampler.look(is_working=is_working)
        self.host_sampler.look(is_working=is_working)
        self.watched.look(self.log.phase, resident_bytes, self.host_sampler, self.sampler)

    def read_events(self) -> None:
        """Take the events that came since the last time; a line that isn't whole yet is left for the next."""
        try:
            with (self.folder / EVENTS_FILE).open("rb") as file:
                file.seek(self._offset)
                lines = file.read().splitlines(keepends=True)
        except FileNotFoundError:
            return
        for line in lines:
            if not line.endswith(b"\n"):
                break
            self._offset += len(line)
            self.take(json.loads(line))

    def take(self, event: dict[str, Any]) -> None:
        """Take one event."""
        step = self.log.add(event)
        if step is not None:
            self.progress(step)
        if self.sampler is None:
            return
        if "gpu_uuid" in event:
            self.sampler.watch(event["gpu_uuid"])
        if self.job.has_stand_ins and event.get("name") == "warmup":
            self.sampler.forget_memory()

    def report(self) -> RunReport:
        """The report of a child that has ended."""
        self.read_events()
        stderr = (self.folder / STDERR_FILE).read_bytes()[-STDERR_TAIL_CHARS:].decode(errors="replace")
        outcome, error = self.outcome()
        on_card = self._is_on_card()
        facts = {key: value for key, value in self.log.device.items() if key not in ("device", "gpu_uuid")}
        return RunReport(
            outcome=outcome,
            last_phase=self.log.phase,
            error=error,
            stderr_tail="" if outcome == "ok" else stderr,
            device=self.log.device.get("device", ""),
            environment={
                **facts,
                **self.host_sampler.facts(),
                **(self.sampler.facts() if self.sampler and on_card else {}),
            },
            samples=self.log.samples(),
            measured=self.measured(),
            timeline=self.log.timeline,
            watched=self.watched.columns(),
            notes=(
                *self.log.notes,
                *self.host_sampler.doubts(),
                *(self.sampler.doubts() if self.sampler and on_card else ()),
            ),
        )

    def outcome(self) -> tuple[str, str | None]:
        """How the child ended, and why in one line."""
        if self.has_timed_out:
            return "timeout", f"took longer than {format_duration(self.job.timeout_s or 0)}"
        if self.log.error is not None:
            return "oom" if self.log.error["is_oom"] else "crash", self.log.error["text"]
        code = self.child.returncode
        if code < 0:
            return self._by_signal(-code)
        if code == 0 and self.log.is_done:
            return "ok", None
        return "crash", f"the process ended with exit code {code} before it was done"

    def _by_signal(self, number: int) -> tuple[str, str]:
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        held = f"; it held {format_bytes(self.host_bytes)} of RAM at most"
        if name == "SIGKILL" and count_oom_kills(ROOT) > self.oom_kills_before:
            return "oom", f"the system ended it because memory ran out{held}"
        if name in CRASH_SIGNALS:
            return "crash", f"the process crashed with {name}"
        return "killed", f"something ended the process with {name}{held}"

    def measured(self) -> Measured:
        """The worker's peaks with what was seen from outside."""
        found = self.log.measured()
        host_bytes = max(self.host_bytes, found.host_bytes or 0) or None
        used = (
            self.sampler.device_used_bytes if self.sampler and self._is_on_card() else found.device_used_bytes
        )
        return replace(found, host_bytes=host_bytes, device_used_bytes=used)

    def _is_on_card(self) -> bool:
        return self.sampler is not None and self.log.device.get("device") == "cuda"
