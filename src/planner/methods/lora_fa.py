"""LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): LoRA with A frozen as it was drawn, so no input is kept for A's gradient."""

from __future__ import annotations

from dataclasses import replace

from planner.linears import Base, Linears
from planner.methods import Part, lora
from planner.specs import Matrix
from planner.tape import Tensor


def parts(matrix: Matrix, rank: int) -> tuple[Part, ...]:
    """LoRA's pair, of which B trains."""
    first, second = lora.parts(matrix, rank)
    return replace(first, trains=False), second


def adapt(
    linears: Linears, base: Base, x: Tensor, matrix: Matrix, share: float, is_quantised: bool
) -> Tensor:
    """LoRA's operations; the only input that is saved is B's, of the rank's size."""
    return lora.added(linears, base, x, matrix, share, is_quantised=is_quantised, trains_first=False)


METHOD = replace(
    lora.METHOD,
    name="lora-fa",
    summary="LoRA whose first factor stays as it was drawn: fewer activations are kept",
    parts=parts,
    adapt=adapt,
    folds=False,
    splits=False,
    frozen=(".lora_A.",),
    zero_at_first=(),
    learning_rate=1e-4,
    large_learning_rate=None,
    proven_rank=None,
    learning_rate_source="PEFT's comparison of methods on MetaMathQA (Llama-3.2-3B, rank 32): 1e-4",
)
