"""An Estimate or a Plan as people read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from planner.methods import find_method
from planner.render import format_bars, format_facts, paint, printable, wrap
from planner.results import ALLOCATED_TERMS, Estimate, Fit, Interval, Memory, Plan, Time
from planner.setup import PAIRED, TrainSetup
from planner.units import format_bytes, format_count, format_duration

VERDICT_TONES = {"fits": "good", "tight": "doubtful", "does-not-fit": "bad"}
MAX_REJECTED = 8
"""Alternatives shown to people; --json has all."""


def describe_fit(fit: Fit) -> str:
    """The verdict in a few words: "fits, 6.1 GiB free", "tight 81 %", "short by 3.2 GiB".

    The percentage of a tight verdict is the probability that the run does not run out of memory.
    """
    if fit.headroom_bytes is None:
        return fit.verdict
    if fit.verdict == "fits":
        return f"fits, {format_bytes(fit.headroom_bytes)} free"
    if fit.verdict == "tight" and fit.probability is not None:
        return f"tight {1 - fit.probability:.0%}".replace("%", " %")
    return f"short by {format_bytes(-fit.headroom_bytes)}" if fit.headroom_bytes < 0 else fit.verdict


def describe_method(setup: TrainSetup) -> str:
    """The method with what decides its size.

    >>> describe_method(TrainSetup(method="qlora", rank=8))
    'qlora (rank 8 on all-linear, nf4-double)'
    """
    method = find_method(setup.method)
    quant = f", {setup.quant}" if setup.quant else ""
    return method.name if method.trains_base else f"{method.name} ({method.words(setup)}{quant})"


def describe_precision(setup: TrainSetup) -> str:
    """The precision recipe in words."""
    parts = [f"{setup.weights_dtype} weights"]
    if setup.autocast:
        parts.append(f"{setup.autocast} autocast")
    if setup.master_weights != "none":
        parts.append(f"{setup.master_weights} master weights")
    return ", ".join(parts)


def describe_batch(setup: TrainSetup) -> str:
    """Batch and length in words."""
    accumulation = f" x {setup.grad_accum_steps} accumulated" if setup.grad_accum_steps > 1 else ""
    packing = ", packed" if setup.packing else ""
    packing += ", without padding" if setup.padding_free else ""
    pairs = " pairs" if setup.objective in PAIRED else ""
    return f"{setup.micro_batch_size}{pairs}{accumulation}, {setup.seq_len} tokens each{packing}"


def describe_step(setup: TrainSetup) -> str:
    """What else decides the memory of a step."""
    parts = [
        setup.optimizer + (" in the backward" if setup.optimizer_in_backward else ""),
        "no checkpointing" if setup.checkpointing == "none" else f"{setup.checkpointing} checkpointing",
        f"{setup.attention} attention",
        f"{setup.loss} loss",
    ]
    if setup.kernels != "plain":
        parts.append(f"{setup.kernels} kernels")
    if setup.num_gpus > 1:
        parts.append(f"{setup.sharding} over {setup.num_gpus} GPUs")
    if setup.offload != "none":
        parts.append(f"{setup.offload} offloaded")
    return ", ".join(parts)


def format_estimate(estimate: Estimate, width: int | None = None) -> str:
    """Setup, verdict, memory by phase and by term, time, and what stands behind them."""
    parts = [
        _format_head(estimate, width),
        _format_phases(estimate.memory, width),
        _format_terms(estimate, width),
        _format_rest(estimate, width),
        _format_notes(estimate, width),
    ]
    return "\n\n".join(part for part in parts if part)


def _format_head(estimate: Estimate, width: int | None) -> str:
    return f"{format_facts(_setup_facts(estimate), width)}\n\n{_format_verdict(estimate, width)}"


def _setup_facts(estimate: Estimate) -> list[tuple[str, str]]:
    setup = estimate.setup
    return [
        ("model", printable(setup.model_label)),
        ("method", f"{describe_method(setup)}; {describe_precision(setup)}"),
        ("batch", describe_batch(setup)),
        ("step", describe_step(setup)),
        ("GPU", printable(estimate.gpu)),
    ]


def _format_verdict(estimate: Estimate, width: int | None) -> str:
    fit = estimate.fit
    verdict = paint(describe_fit(fit), VERDICT_TONES.get(fit.verdict, "dim"))
    if fit.usable_bytes is None or fit.headroom_bytes is None:
        return verdict
    needed, given = format_bytes(fit.usable_bytes - fit.headroom_bytes), format_bytes(fit.usable_bytes)
    odds = "" if fit.probability is None else f"; {_percent(fit.probability)} chance of running out"
    return wrap(f"{verdict}  (needs {needed} of {given} that it can give{odds})", width, rest="  ")


def _percent(share: float) -> str:
    if share < 0.01:
        return "under 1 %"
    return "over 99 %" if share > 0.99 else f"{100 * share:.0f} %"


def _format_phases(memory: Memory, width: int | None) -> str:
    phases = {name: value for name, value in memory.phases.items() if value > 0}
    text = {name: format_bytes(value) for name, value in phases.items()}
    title = paint("Allocated at each phase's peak", "strong")
    return f"{title}\n{format_bars(phases, text, width)}"


def _format_terms(estimate: Estimate, width: int | None) -> str:
    """The terms at the highest moment, and the three sums that other tools show."""
    memory = estimate.memory
    terms = {name: memory.terms[name] for name in ALLOCATED_TERMS if memory.terms[name] > 0}
    text = {name: format_bytes(value) for name, value in terms.items()}
    title = paint(f"At the highest moment ({memory.peak_phase})", "strong")
    return f"{title}\n{format_bars(terms, text, width)}\n\n{format_facts(_sums(memory, estimate.interval), width)}"


def _sums(memory: Memory, interval: Interval | None) -> list[tuple[str, str]]:
    """The peak as torch counts it, as torch reserves it and as the device shows it, where these differ."""
    fragmentation, context = memory.terms["fragmentation"], memory.terms["context"]
    allocated = format_bytes(memory.peak_allocated_bytes)
    sums = [("allocated by torch", f"{allocated}{_describe_interval(interval)}")]
    if fragmentation:
        reserved = format_bytes(memory.peak_reserved_bytes)
        sums.append(("reserved by torch", f"{reserved}, with {format_bytes(fragmentation)} of fragmentation"))
    if context:
        used = format_bytes(memory.device_used_bytes)
        sums.append(("used on the device", f"{used}, with {format_bytes(context)} of libraries and context"))
    return sums


def _describe_interval(interval: Interval | None) -> str:
    """The interval behind a peak; an end that published runs don't bound is left open."""
    if interval is None:
        return ""
    ends = (interval.low_peak_allocated_bytes, interval.high_peak_allocated_bytes)
    low, high = ("unknown" if end is None else format_bytes(end) for end in ends)
    return f" ({100 * interval.level:.0f} % interval: {low} to {high})"


def _format_rest(estimate: Estimate, width: int | None) -> str:
    memory = estimate.memory
    facts = [
        ("host memory", format_bytes(memory.host_bytes)),
        ("disk", format_bytes(memory.disk_bytes)),
    ]
    if estimate.time is not None:
        facts += [("time per optimizer step", describe_time(estimate.time))]
    return format_facts(facts, width)


def describe_time(time: Time) -> str:
    """Step time with its interval, and the rate."""
    interval = f"{format_duration(time.low_step_s)} to {format_duration(time.high_step_s)}"
    rate = f"{format_count(time.tokens_per_s)} tokens/s"
    return f"{format_duration(time.step_s)} ({interval}), {rate}"


def _format_notes(estimate: Estimate, width: int | None) -> str:
    """Warnings, what is assumed and what is left out."""
    groups = (
        ("warning", "doubtful", estimate.warnings),
        ("assumed", "dim", estimate.assumptions),
        ("not modelled", "dim", estimate.not_modelled),
    )
    lines = [
        paint(wrap("; ".join(notes), width, first=f"{title}: ", rest="  "), tone)
        for title, tone, notes in groups
        if notes
    ]
    return "\n".join(lines)


def format_case_line(case: Mapping[str, Any]) -> str:
    """One line of `estimate --cases` for people: id, peak and verdict, or the error."""
    name = printable(str(case["id"]))
    if "error" in case:
        return f"{name}  error: {printable(case['error'])}"
    peak = format_bytes(case["memory"]["peak_allocated_bytes"])
    return f"{name}  {peak}  {describe_fit(Fit(**case['fit']))}"


def format_plan_answer(plan: Plan, width: int | None = None, more: str = "") -> str:
    """The chosen configuration, what fills the card, why, and what was rejected; `more` follows the times."""
    shown = [f"{r.label}: {r.reason}" for r in plan.rejected[:MAX_REJECTED]]
    return format_answer(plan, width, more, shown)


def format_answer(plan: Plan, width: int | None, more: str, rejected: Sequence[str]) -> str:
    """The same with the rejected ones as they are given."""
    estimate = plan.estimate
    parts = [
        _format_head(estimate, width),
        _format_terms(estimate, width),
        _format_rest(estimate, width),
        more,
    ]
    if plan.reasons:
        parts.append(f"{paint('Why', 'strong')}\n{_bullets(plan.reasons, width)}")
    if rejected:
        parts.append(f"{paint('Rejected', 'strong')}\n{_bullets(rejected, width)}")
    parts.append(_format_notes(estimate, width))
    return "\n\n".join(part for part in parts if part)


def _bullets(lines: Iterable[str], width: int | None) -> str:
    return "\n".join(wrap(line, width, first="  - ", rest="    ") for line in lines)
