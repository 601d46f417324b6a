"""An open configuration -> the plan: candidates in the order of preference, the first that fits wins.

Order, from what a run gains to what it loses: LoRA before QLoRA (16-bit weights train more exactly and are
faster) unless the user names a method; without activation checkpointing before with it (checkpointing
computes each layer's forward twice); where a chunked loss isn't a gain by itself, all logits at once before it. What is
faster and smaller and gives nothing up is taken wherever it applies (planner.gains). A full fine-tune then gives up
float32 weights, then AdamW's 16-bit states, then accumulation (each gradient is used and freed in the
backward). Then the micro-batch grows by doubling up to the global batch, and accumulation fills the rest.
Rows that fill less than half of a sequence are packed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from planner.errors import DoesNotFitError, NotModelledError, SetupError
from planner.estimate import Estimator, resolve
from planner.gains import describe_gains, gains
from planner.lengths import DataLengths
from planner.methods import can_run, find_method
from planner.quality import filling_rank
from planner.recipes import attention_for, describe_rates, precise_recipe, rates_for, recipe, shared_by
from planner.results import Estimate, Plan, Rejected
from planner.setup import TrainSetup
from planner.specs import Machine, ModelSpec
from planner.units import format_bytes

DEFAULT_GLOBAL_BATCH = 16
"""Sequences per optimizer step where the user asks for none (QLoRA paper, table 9)."""
DEFAULT_SEQ_LEN = 2048
LENGTH_STEP = 64
"""Lengths are rounded up to a multiple of this."""
FRUGAL_OPTIMIZERS: tuple[dict[str, Any], ...] = (
    {"optimizer": "adamw-8bit"},
    {
        "optimizer": "paged-adamw-8bit",
        "optimizer_in_backward": True,
        "grad_accum_steps": 1,
        "max_grad_norm": None,
    },
)
"""What a full fine-tune gives up next where its states don't fit on one GPU."""
PACKED_BELOW = 0.5
"""Share of a sequence that the mean row fills, below which rows are packed."""
METHODS = ("lora", "qlora")
"""Tried in this order; full fine-tuning only where it is asked for."""
ENOUGH_TOKENS = 16_384
"""Tokens per micro-batch beyond which a larger one no longer fills a GPU better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The batch: sequences per optimizer step over all GPUs, their length, and the reasons in words."""

    seq_len: int
    global_batch: int
    is_packed: bool
    reasons: tuple[str, ...]
    is_packing_open: bool = False


Gains = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""What is better for a candidate's fields."""


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
    model: ModelSpec | None = None,
) -> Plan:
    """The best configuration for `machine`; `wishes` are TrainSetup fields that the user fixed.

    `model` saves resolving `wishes["model"]`, or comes from the hub.
    Raises DoesNotFitError with the smallest shortfall when nothing fits, SetupError for contradictory wishes.
    """
    TrainSetup(**{name: wishes[name] for name in _READ_HERE if name in wishes})
    model = model or open_model(wishes)
    wishes = {**attention_for(model, machine.gpu), **wishes}
    shape = _shape(wishes, model, lengths, _global_batch(wishes, machine, global_batch))
    rejected: list[Rejected] = []
    errors: list[SetupError | NotModelledError] = []
    fixed = {"seq_len": shape.seq_len, "micro_batch_size": 1, "packing": shape.is_packed}
    for candidate in _candidates(
        wishes, machine, lambda fields: gains({**fields, **fixed}, model, machine.gpu, lengths)
    ):
        try:
            estimator = Estimator(TrainSetup(**{**candidate.fields, **fixed}), machine, model)
            estimate = _largest(estimator, wishes, shape)
        except (SetupError, NotModelledError) as error:
            errors.append(error)
            rejected.append(Rejected(label=candidate.label, reason=str(error), short_by_bytes=0))
            continue
        if estimate.fit.verdict == "fits":
            setup = estimate.setup.with_(**rates_for(estimate.setup, model))
            wanted_rank = filling_rank(model, setup.method, setup.targets, lengths, setup.epochs)
            reasons = (
                *_reasons(candidate, estimate, rejected, shape),
                *describe_gains(setup, wishes),
                *describe_rates(setup, model, wanted_rank),
            )
            return Plan(estimate=replace(estimate, setup=setup), reasons=reasons, rejected=tuple(rejected))
        rejected.append(_rejection(candidate, estimate))
    if len(errors) == len(rejected):
        raise errors[0]
    raise _nothing_fits(machine, rejected)


_READ_HERE = ("method", "objective", "attention", "seq_len", "micro_batch_size", "grad_accum_steps")
"""Wishes that the search itself computes with: what isn't a value of theirs is an error at once."""


def open_model(wishes: Mapping[str, Any], *, offline: bool = True) -> ModelSpec:
    """The model that the wishes name. Raises as planner.resolve does."""
    named = {k: wishes[k] for k in ("model", "revision", "stack", "objective") if wishes.get(k) is not None}
    return resolve(TrainSetup(**named), offline=offline)


def batch_shape(
    wishes: Mapping[str, Any],
    model: ModelSpec,
    lengths: DataLengths | None,
    machine: Machine,
    global_batch: int | None,
) -> Shape:
    """Length, batch and packing that the data and the wishes ask for."""
    return _shape(wishes, model, lengths, _global_batch(wishes, machine, global_batch))


def _shape(
    wishes: Mapping[str, Any], model: ModelSpec, lengths: DataLengths | None, global_batch: int
) -> Shape:
    """Length and batch from the rows' lengths; a packed sequence takes the place of the rows that it holds."""
    seq_len, why_length = _length(wishes, model, lengths)
    if lengths is None or not _packs(wishes, lengths, seq_len):
        return Shape(
            seq_len=seq_len,
            global_batch=global_batch,
            is_packed=bool(wishes.get("packing")),
            reasons=(why_length,),
            is_packing_open=lengths is not None and "packing" not in wishes,
        )
    rows = seq_len / lengths.mean
    sequences = max(1, round(global_batch / rows))
    why_packed = (
        f"packing: rows have {lengths.mean:.0f} tokens on average, so one sequence holds about {rows:.0f} of them "
        f"and {sequences} per step stand for the {global_batch} rows per step"
    )
    return Shape(
        seq_len=seq_len,
        global_batch=sequences,
        is_packed=True,
        reasons=(why_length, why_packed),
        is_packing_open=True,
    )


def _packs(wishes: Mapping[str, Any], lengths: DataLengths, seq_len: int) -> bool:
    """Whether to choose packing: rows are short, and the batch, the objective and the attention leave it open."""
    open_fields = not any(name in wishes for name in ("packing", "micro_batch_size", "grad_accum_steps"))
    can_pack = wishes.get("objective", "sft") in ("sft", "pretrain") and wishes.get("attention") != "eager"
    can_pack = can_pack and can_run(wishes.get("method", "lora"), packing=True)
    return open_fields and can_pack and lengths.mean <= PACKED_BELOW * seq_len


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


def _global_batch(wishes: Mapping[str, Any], machine: Machine, asked: int | None) -> int:
    if asked is not None:
        return asked
    if "micro_batch_size" in wishes:
        return int(wishes["micro_batch_size"] * wishes.get("grad_accum_steps", 1) * machine.num_gpus)
    return DEFAULT_GLOBAL_BATCH


def _candidates(wishes: Mapping[str, Any], machine: Machine, gain: Gains) -> Iterator[_Candidate]:
    """The choices that come closest, with the user's wishes and what is gained on top; equal ones come once."""
    seen: list[dict[str, Any]] = []
    methods = (wishes["method"],) if "method" in wishes else METHODS
    for method in methods:
        for own in _closest(wishes, list(_choices(method, machine))):
            fields = {**own, **wishes, "method": method}
            open_fields = {name: value for name, value in fields.items() if name != "loss" or name in wishes}
            fields |= gain(open_fields)
            if fields not in seen:
                seen.append(fields)
                yield _Candidate(_label(fields), fields)


def _choices(method: str, machine: Machine) -> Iterator[dict[str, Any]]:
    """What the search would choose by itself, in the order of preference."""
    choices = itertools.product(_recipes(method, machine), ("none", "full"), ("full", "chunked"))
    for recipe_fields, checkpointing, loss in choices:
        yield {**recipe_fields, "checkpointing": checkpointing, "loss": loss, **shared_by(machine.num_gpus)}


_VARIED = ("weights_dtype", "autocast", "optimizer", "checkpointing", "loss")
"""Fields that the choices differ in."""
_TIED = ("grad_accum_steps", "max_grad_norm")
"""Fields that a choice names because it can't do otherwise: with another wish it is none."""


def _closest(wishes: Mapping[str, Any], choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices with the most fields as wished: what the others were composed for would be torn apart."""

    def agreements(own: Mapping[str, Any]) -> int:
        return sum(name in wishes and own[name] == wishes[name] for name in _VARIED)

    possible = [own for own in choices if all(wishes.get(k, own[k]) == own[k] for k in _TIED if k in own)]
    most = max(agreements(own) for own in possible)
    return [own for own in possible if agreements(own) == most]


def _recipes(method: str, machine: Machine) -> list[dict[str, Any]]:
    """Precision and optimizer, from the most exact to the smallest."""
    precise, small = precise_recipe(method, machine.gpu), recipe(method, machine.gpu)
    if not find_method(method).trains_base:
        return [small]
    recipes = [precise] if precise == small else [precise, small]
    if machine.gpu.bitsandbytes and machine.gpu.backend != "cpu" and machine.num_gpus == 1:
        recipes += [{**small, **fields} for fields in FRUGAL_OPTIMIZERS]
    return recipes


def _label(fields: Mapping[str, Any]) -> str:
    parts = [str(fields["method"])]
    if fields.get("autocast"):
        parts.append(f"{fields['weights_dtype']} weights")
    parts.append("checkpointing" if fields["checkpointing"] == "full" else "no checkpointing")
    if fields.get("optimizer") != "adamw-fused":
        parts.append(
            str(fields["optimizer"]) + (" in the backward" if fields.get("optimizer_in_backward") else "")
        )
    if fields["loss"] != "full":
        parts.append(f"{fields['loss']} loss")
    return ", ".join(parts)


def _largest(estimator: Estimator, wishes: Mapping[str, Any], shape: Shape) -> Estimate:
    """The largest micro-batch that fits, by doubling, with the accumulation that keeps the global batch."""
    ranks = estimator.setup.num_gpus
    per_rank, seq_len = max(1, shape.global_batch // ranks), shape.seq_len
    if "micro_batch_size" in wishes:
        return _accumulated(estimator, wishes, per_rank, wishes["micro_batch_size"])
    size, most = 1, max(1, per_rank // wishes.get("grad_accum_steps", 1))
    while _may_double(size, most, seq_len) and estimator.verdict(2 * size, seq_len) == "fits":
        size *= 2
    found = _accumulated(estimator, wishes, per_rank, size)
    # Gradients that wait for other micro-batches need room that the doubling didn't count.
    while size > 1 and found.fit.verdict != "fits":
        size //= 2
        found = _accumulated(estimator, wishes, per_rank, size)
    return found


def _accumulated(estimator: Estimator, wishes: Mapping[str, Any], per_rank: int, size: int) -> Estimate:
    """The estimate at that micro-batch with the accumulation that fills the rank's share of the batch."""
    in_backward = estimator.setup.optimizer_in_backward
    accumulation = wishes.get("grad_accum_steps", 1 if in_backward else max(1, per_rank // size))
    setup = estimator.setup.with_(micro_batch_size=size, grad_accum_steps=accumulation)
    return Estimator(setup, estimator.machine, estimator.model).at(size, setup.seq_len)


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
    candidate: _Candidate, estimate: Estimate, rejected: list[Rejected], shape: Shape
) -> tuple[str, ...]:
    setup = estimate.setup
    batch = f"micro-batch {setup.micro_batch_size} x {setup.grad_accum_steps} accumulation"
    if setup.num_gpus > 1:
        batch += f" x {setup.num_gpus} GPUs"
    first = "the first choice, and it fits" if not rejected else "the first that fits, in order of preference"
    wanted = shape.global_batch
    asked = "" if setup.global_batch_size == wanted else f" (asked: {wanted})"
    return (
        f"{candidate.label}: {first}",
        f"{batch} = {setup.global_batch_text} per step{asked}",
        *shape.reasons,
    )


def _nothing_fits(machine: Machine, rejected: list[Rejected]) -> DoesNotFitError:
    tried = [r for r in rejected if r.estimate is not None]
    best = min(tried, key=lambda r: r.short_by_bytes)
    return DoesNotFitError(
        f"nothing fits on {machine.label}; nearest is {best.label}: {best.reason}. "
        "Try a smaller --seq-len, --method qlora, or more GPUs (see `finefit needs`)",
        best.short_by_bytes,
    )
