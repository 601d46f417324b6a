"""An open configuration -> the plan: candidates in the order of preference, the first that fits wins.

Order, from what a run gains to what it loses: LoRA before QLoRA (16-bit weights train more exactly and are
faster) unless the user names a method; without activation checkpointing before with it (checkpointing
computes each layer's forward twice); all logits at once before a chunked loss. Then the micro-batch grows by
doubling up to the global batch, and accumulation fills the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from planner.errors import DoesNotFitError, SetupError
from planner.estimate import Estimator, resolve
from planner.recipes import precise_recipe, recipe
from planner.results import Estimate, Plan, Rejected
from planner.setup import TrainSetup
from planner.specs import Machine, ModelSpec
from planner.units import format_bytes

DEFAULT_GLOBAL_BATCH = 16
"""Sequences per optimizer step where the user asks for none (QLoRA paper, table 9)."""
DEFAULT_SEQ_LEN = 2048
LENGTH_STEP = 64
"""Lengths are rounded up to a multiple of this."""
METHODS = ("lora", "qlora")
"""Tried in this order; full fine-tuning only where it is asked for."""
ENOUGH_TOKENS = 16_384
"""Tokens per micro-batch beyond which a larger one no longer fills a GPU better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataLengths:
    """Token lengths of the training rows; `source` says how they are known."""

    num_rows: int
    mean: float
    p50: int
    p99: int
    longest: int
    source: str


@dataclass(frozen=True, slots=True)
class _Candidate:
    label: str
    fields: Mapping[str, Any]


def plan(
    wishes: Mapping[str, Any],
    machine: Machine,
    *,
    global_batch: int | None = None,
    lengths: DataLengths | None = None,
) -> Plan:
    """The best configuration for `machine`; `wishes` are TrainSetup fields that the user fixed.

    Raises DoesNotFitError with the smallest shortfall when nothing fits, SetupError for contradictory wishes.
    """
    model = resolve(TrainSetup(**_only(wishes, "model", "revision", "stack")))
    seq_len, why_length = _length(wishes, model, lengths)
    batch = _global_batch(wishes, global_batch)
    rejected: list[Rejected] = []
    for candidate in _candidates(wishes, machine):
        setup = TrainSetup(**{**candidate.fields, "seq_len": seq_len, "micro_batch_size": 1})
        try:
            estimator = Estimator(setup, machine, model)
        except SetupError as error:
            rejected.append(Rejected(label=candidate.label, reason=str(error), short_by_bytes=0))
            continue
        estimate = _largest(estimator, wishes, batch, seq_len)
        if estimate.fit.verdict == "fits":
            reasons = _reasons(candidate, estimate, rejected, why_length, batch)
            return Plan(estimate=estimate, reasons=reasons, rejected=tuple(rejected))
        rejected.append(_rejection(candidate, estimate))
    raise _nothing_fits(machine, rejected)


def _only(wishes: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: wishes[name] for name in names if wishes.get(name) is not None}


def _length(wishes: Mapping[str, Any], model: ModelSpec, lengths: DataLengths | None) -> tuple[int, str]:
    """The sequence length and why."""
    if "seq_len" in wishes:
        return wishes["seq_len"], f"{wishes['seq_len']} tokens per sequence, as asked"
    limit = model.max_positions or DEFAULT_SEQ_LEN
    if lengths is None:
        chosen = min(DEFAULT_SEQ_LEN, limit)
        return chosen, f"{chosen} tokens per sequence: no row lengths are known, so the usual length"
    wanted = -(-lengths.longest // LENGTH_STEP) * LENGTH_STEP
    chosen = min(wanted, limit)
    if chosen < wanted:
        return (
            chosen,
            f"{chosen} tokens per sequence, all that the model knows; the longest row has {lengths.longest}",
        )
    return chosen, f"{chosen} tokens per sequence hold the longest row ({lengths.longest}; {lengths.source})"


def _global_batch(wishes: Mapping[str, Any], asked: int | None) -> int:
    if asked is not None:
        return asked
    if "micro_batch_size" in wishes or "grad_accum_steps" in wishes:
        sizes = wishes.get("micro_batch_size", 1) * wishes.get("grad_accum_steps", 1)
        return int(sizes * wishes.get("num_gpus", 1))
    return DEFAULT_GLOBAL_BATCH


def _candidates(wishes: Mapping[str, Any], machine: Machine) -> Iterator[_Candidate]:
    methods = (wishes["method"],) if "method" in wishes else METHODS
    for method in methods:
        for recipe_fields in _recipes(method, machine):
            for checkpointing in ("none", "full"):
                for loss in ("full", "chunked"):
                    own = {**recipe_fields, "checkpointing": checkpointing, "loss": loss}
                    own |= _sharding(machine)
                    if all(wishes.get(k, v) == v for k, v in own.items() if k in ("checkpointing", "loss")):
                        yield _Candidate(_label({**own, **wishes}), {**own, **wishes})


def _recipes(method: str, machine: Machine) -> list[dict[str, Any]]:
    precise, small = precise_recipe(method, machine.gpu), recipe(method, machine.gpu)
    return [precise] if precise == small else [precise, small]


def _sharding(machine: Machine) -> dict[str, Any]:
    if machine.num_gpus == 1:
        return {}
    return {"num_gpus": machine.num_gpus, "sharding": "fsdp"}


def _label(fields: Mapping[str, Any]) -> str:
    parts = [str(fields["method"])]
    if fields.get("autocast"):
        parts.append(f"{fields['weights_dtype']} weights")
    parts.append("checkpointing" if fields["checkpointing"] == "full" else "no checkpointing")
    if fields["loss"] != "full":
        parts.append(f"{fields['loss']} loss")
    return ", ".join(parts)


def _largest(estimator: Estimator, wishes: Mapping[str, Any], global_batch: int, seq_len: int) -> Estimate:
    """The largest micro-batch that fits, by doubling, with the accumulation that keeps the global batch."""
    ranks = estimator.setup.num_gpus
    per_rank = max(1, global_batch // ranks)
    size = wishes.get("micro_batch_size", 1)
    if "micro_batch_size" not in wishes:
        while _may_double(size, per_rank, seq_len) and estimator.verdict(2 * size, seq_len) == "fits":
            size *= 2
    accumulation = wishes.get("grad_accum_steps", max(1, per_rank // size))
    setup = estimator.setup.with_(micro_batch_size=size, grad_accum_steps=accumulation)
    return Estimator(setup, estimator.machine, estimator.model).at(size, seq_len)


def _may_double(size: int, per_rank: int, seq_len: int) -> bool:
    is_divisor = per_rank % (2 * size) == 0
    return is_divisor and 2 * size * seq_len <= ENOUGH_TOKENS


def _rejection(candidate: _Candidate, estimate: Estimate) -> Rejected:
    headroom = estimate.fit.headroom_bytes or 0
    seq_len = estimate.setup.seq_len
    if headroom < 0:
        reason = f"{format_bytes(-headroom)} short at {seq_len} tokens"
    else:
        reason = f"tight at {seq_len} tokens: {estimate.fit.probability:.0%} chance to run out of memory"
    return Rejected(label=candidate.label, reason=reason, short_by_bytes=max(0, -headroom), estimate=estimate)


def _reasons(
    candidate: _Candidate, estimate: Estimate, rejected: list[Rejected], why_length: str, global_batch: int
) -> tuple[str, ...]:
    setup = estimate.setup
    batch = f"micro-batch {setup.micro_batch_size} x {setup.grad_accum_steps} accumulation"
    if setup.num_gpus > 1:
        batch += f" x {setup.num_gpus} GPUs"
    first = "the first choice, and it fits" if not rejected else "the first that fits, in order of preference"
    asked = "" if setup.global_batch_size == global_batch else f" (asked: {global_batch})"
    return (
        f"{candidate.label}: {first}",
        f"{batch} = {setup.global_batch_size} sequences per step{asked}",
        why_length,
    )


def _nothing_fits(machine: Machine, rejected: list[Rejected]) -> DoesNotFitError:
    tried = [r for r in rejected if r.estimate is not None]
    if not tried:
        reason = rejected[0].reason if rejected else "no candidate is left"
        return DoesNotFitError(f"no configuration works on {machine.label}: {reason}", 0)
    best = min(tried, key=lambda r: r.short_by_bytes)
    return DoesNotFitError(
        f"nothing fits on {machine.label}; nearest is {best.label}: {best.reason}. "
        "Try a smaller --seq-len, --method qlora, or more GPUs (see `finefit needs`)",
        best.short_by_bytes,
    )
