"""LoRA (Hu et al. 2021, arXiv:2106.09685): W + (alpha / rank) B A with A, B trained and W frozen."""

from __future__ import annotations

from typing import Any

from planner.linears import Base, Linears
from planner.methods import FindMatrices, Method, Part, PeftCall
from planner.setup import TrainSetup
from planner.specs import Matrix
from planner.tape import Tensor, per_token


def parts(matrix: Matrix, rank: int) -> tuple[Part, ...]:
    """A (rank x in) and B (out x rank); all experts of one parameter share a pair that is as many times as large."""
    rank *= matrix.copies if matrix.kind == "parameter" else 1
    return Part(rank, matrix.in_features), Part(matrix.out_features, rank)


def adapt(
    linears: Linears, base: Base, x: Tensor, matrix: Matrix, share: float, is_quantised: bool
) -> Tensor:
    """out + B(A(x))."""
    return added(linears, base, x, matrix, share, is_quantised=is_quantised, trains_first=True)


def added(
    linears: Linears,
    base: Base,
    x: Tensor,
    matrix: Matrix,
    share: float,
    *,
    is_quantised: bool,
    trains_first: bool,
) -> Tensor:
    """The same as peft's Linear does it, A frozen unless `trains_first`; its 4-bit linear leaves the casts to autocast."""
    recipe, tape = linears.recipe, linears.tape
    out = base(x)
    given, asked = x, out.width
    # torch.is_autocast_enabled(), which peft's quantised linears ask, means CUDA's autocast only.
    leaves_casts = is_quantised and recipe.autocast and recipe.on_gpu
    if is_quantised and recipe.quantised_bits == 4:
        out = tape.run([out], out.size, out.width)
    if not leaves_casts:
        x = linears.cast(x, recipe.adapter, matrix.in_features * share)
    held = x
    if recipe.dropout:
        x = linears.adapter_dropped(x)
    high = linears.low_rank(x, matrix, share, trains_first=trains_first)
    high = tape.run([high], high.size, high.width)
    if is_quantised and not leaves_casts:
        high = linears.cast(high, asked, matrix.out_features * share)
    width = max(out.width, high.width)
    total = tape.run([out, high], per_token(width * matrix.out_features * share), width, shares_grad=True)
    tape.hold(held, given)
    return total if is_quantised else linears.cast(total, asked, matrix.out_features * share)


def peft_config(setup: TrainSetup, find_matrices: FindMatrices) -> PeftCall:
    """PEFT's LoraConfig."""
    return "LoraConfig", options(setup)


def options(setup: TrainSetup) -> dict[str, Any]:
    """What every kind of low-rank adapter says."""
    targets = setup.targets if isinstance(setup.targets, str) else list(setup.targets)
    return {
        "r": setup.rank,
        "lora_alpha": setup.alpha,
        "lora_dropout": setup.dropout,
        "target_modules": targets,
        "bias": "none",
    }


ZERO_AT_FIRST = (".lora_A.",)
"""A's gradient passes through B, which begins as zero."""

METHOD = Method(
    name="lora",
    summary="low-rank adapters beside frozen 16-bit weights",
    parts=parts,
    adapt=adapt,
    has_rank=True,
    folds=True,
    splits=True,
    is_low_rank_sum=True,
    peft_config=peft_config,
    zero_at_first=ZERO_AT_FIRST,
    learning_rate=2e-4,
    large_learning_rate=1e-4,
    proven_rank=64,
    learning_rate_source="QLoRA paper, table 9 (arXiv:2305.14314): 2e-4 up to 13B, 1e-4 above",
)
