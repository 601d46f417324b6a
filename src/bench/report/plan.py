"""The report of a plan: whether it fits, how fast and for how much, before anything has run."""

from __future__ import annotations

from collections.abc import Iterable

from bench.report.content import Block, Code, Notes, Report, section
from bench.report.memory_figures import Point, against_length, bars_figure, timeline_figure
from bench.report.money import money_blocks
from bench.report.shared import label, setup_facts, size, unique
from bench.timeline import Stretch
from planner.by_length import by_length, needed_bytes
from planner.errors import FinefitError
from planner.planfile import PlanFile, format_plan
from planner.render_estimate import describe_fit, describe_time
from planner.results import Estimate
from planner.setup import TrainSetup
from planner.specs import Machine
from planner.units import gib

TONES = {"fits": "good", "tight": "doubtful", "does-not-fit": "bad"}
BATCHES = (1, 2, 4, 8)


def plan_report(
    plan: PlanFile,
    machine: Machine,
    found: Estimate,
    *,
    name: str,
    made: str,
    traced: tuple[Stretch, ...] = (),
    notes: Iterable[str] = (),
) -> Report:
    """The report of `found`, the estimate of the plan on `machine`; `traced` is its trace's memory along a step."""
    setup, memory, fit = plan.setup, found.memory, found.fit
    limit = fit.usable_bytes
    phases = [(phase, float(value), None) for phase, value in memory.phases.items()]
    terms = [(term, float(value), None) for term, value in memory.terms.items()]
    return Report(
        question=f"Does {label(setup)} fit on {found.gpu}, how long does it take, and what does it cost?",
        answer=_answer(found),
        tone=TONES.get(fit.verdict, "plain"),
        doubts=unique(found.warnings),
        sections=(
            *section("The plan", [setup_facts(setup, found.gpu)]),
            *section(
                "Memory",
                [
                    timeline_figure(traced, (), limit),
                    bars_figure("Peak by phase", phases, limit),
                    bars_figure("Peak by term", terms, limit),
                    against_length(
                        "What fits, by length",
                        "GiB needed",
                        length_points(setup, machine),
                        usable_bytes=limit,
                        scale=gib,
                        show=size,
                    ),
                ],
            ),
            *section("Time and money", money_blocks(setup, machine)),
            *section("What stands behind it", _behind(found, notes)),
            *section("Reproduce", _reproduce(plan, name)),
        ),
        made=made,
    )


def _answer(found: Estimate) -> str:
    time = "not known" if found.time is None else describe_time(found.time)
    given = "" if found.fit.usable_bytes is None else f" of {size(found.fit.usable_bytes)} that it can give"
    odds = (
        "" if found.fit.probability is None else f"; chance of running out: {_percent(found.fit.probability)}"
    )
    verdict = describe_fit(found.fit)
    return f"{verdict[0].upper()}{verdict[1:]}: it needs {size(needed_bytes(found))}{given}{odds}. One optimizer step: {time}."


def _percent(share: float) -> str:
    return "under 1 %" if share < 0.01 else "over 99 %" if share > 0.99 else f"{100 * share:.0f} %"


def length_points(setup: TrainSetup, machine: Machine) -> list[Point]:
    """Memory by length for a few micro-batches; nothing where it isn't modelled."""
    sizes = sorted({*BATCHES, setup.micro_batch_size})
    try:
        return [
            Point(series=f"batch {size}", seq_len=row.seq_len, value=float(row.needed_bytes))
            for size in sizes
            for row in by_length(setup, machine, micro_batch_size=size)
        ]
    except FinefitError:
        return []


def _behind(found: Estimate, notes: Iterable[str]) -> list[Block | None]:
    groups = (("", tuple(notes)), ("Assumed", found.assumptions), ("Not modelled", found.not_modelled))
    return [Notes(title=title, lines=unique(lines)) for title, lines in groups if lines]


def _reproduce(plan: PlanFile, name: str) -> list[Block | None]:
    text = format_plan(plan.setup, plan.gpu or "local", {})
    return [
        Code(title=f"The plan ({name})", text=text, is_folded=True),
        Code(title="Measure it", text="finefit bench plan.yaml"),
        Code(title="Run it", text="finefit train plan.yaml"),
    ]
