"""What `finefit report` does: find out what a source is, build its report, write the files."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path

from bench import timeline
from bench.report.content import Report
from bench.report.page import to_html, to_markdown
from bench.report.plan import plan_report
from bench.report.results import results_report
from bench.report.run import is_run_folder, run_report
from bench.report.shared import clip
from bench.store import Measurement, read_results
from bench.terms import table_of
from planner import __version__
from planner.cli_options import Session
from planner.cli_plan import setup_and_machine
from planner.errors import FinefitError, MissingExtraError
from planner.estimate import estimate
from planner.files import check_target, write_atomically
from planner.planfile import looks_like_plan, read_plan

NEEDED = ("matplotlib", "jinja2")
MAX_FILES = 1000


def build(session: Session, source: Path, gpu: str | None, *, trace: bool) -> Report:
    """The report of a results file (or a folder of them), a plan or a run. Raises FinefitError."""
    for module in NEEDED:
        if find_spec(module) is None:
            raise MissingExtraError("report", "plot", module)
    made = f"Made by finefit {__version__} on {time.strftime('%Y-%m-%d', time.gmtime())} from {clip(source.name)}."
    if looks_like_plan(source.name) and not source.is_dir():
        return _of_plan(session, source, gpu, trace, made)
    if is_run_folder(source):
        return run_report(source, made)
    runs, warnings = read_sources(source)
    if not runs and warnings:
        raise FinefitError(
            f"{source} holds no result that can be read: {len(warnings)} lines were left out, the first: {clip(warnings[0])}"
        )
    return results_report(runs, warnings, clip(source.name), made)


def read_sources(source: Path) -> tuple[list[Measurement], list[str]]:
    """The records of a file, or of all .jsonl files in a folder. Raises FinefitError where there is none."""
    if not source.is_dir():
        return read_results(source)
    files = sorted(source.glob("*.jsonl"))
    if not files or len(files) > MAX_FILES:
        found = "no .jsonl file" if not files else f"more than {MAX_FILES} .jsonl files"
        raise FinefitError(f"{source} holds {found}, and no plan.yaml of a run")
    read = [read_results(file) for file in files]
    return [run for runs, _ in read for run in runs], [line for _, lines in read for line in lines]


def _of_plan(session: Session, source: Path, gpu: str | None, trace: bool, made: str) -> Report:
    plan = read_plan(source)
    setup, machine = setup_and_machine(session, str(source), gpu, {})
    found = estimate(setup, machine)
    stretches: tuple[timeline.Stretch, ...] = ()
    notes = []
    if trace:
        from bench.trace_record import traced_record

        record = traced_record(setup, machine)
        stretches = timeline.from_json(table_of(record, "traced").get("timeline", []))
        if record["trace_error"]:
            notes.append(f"The step could not be traced: {record['trace_error']}")
    return plan_report(plan, machine, found, name=clip(source.name), made=made, traced=stretches, notes=notes)


def check_targets(source: Path, html: Path | None, markdown: Path | None) -> None:
    """Raise UsageError before the work where a file would overwrite the source, or one report the other."""
    kept = [source]
    for target in (html, markdown):
        if target is not None:
            check_target(target, *kept)
            kept.append(target)


def write(report: Report, html: Path | None, markdown: Path | None) -> list[Path]:
    """Write the files that are asked for, whole or not at all. Raises FinefitError."""
    for path, content in ((html, to_html), (markdown, to_markdown)):
        if path is not None:
            write_atomically(path, content(report))
    return [path for path in (html, markdown) if path is not None]
