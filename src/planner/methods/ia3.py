"""(IA)^3 (Liu et al. 2022, arXiv:2205.05638): vectors that scale the keys, the values and what the last matrix of an MLP reads."""

from __future__ import annotations

from planner.linears import Base, Linears
from planner.methods import NO_DROPOUT, FindMatrices, Method, Part, PeftCall, exactly
from planner.setup import TrainSetup
from planner.specs import Matrix
from planner.tape import Tensor

_OUTPUTS = ("k", "v", "qkv", "kv_b", "cross_k", "cross_v")
"""Roles whose outputs are scaled; where queries come out of the same matrix, they are too, as PEFT has it."""
_INPUTS = ("down", "shared_down")
"""Roles whose inputs are scaled."""


def takes(matrix: Matrix) -> bool:
    """Keys, values and the last matrix of an MLP, where they are modules."""
    return matrix.kind != "parameter" and matrix.role in _OUTPUTS + _INPUTS


def parts(matrix: Matrix, rank: int) -> tuple[Part, ...]:
    """One vector; PEFT lays one for outputs out as a column."""
    return (Part(1, matrix.in_features) if matrix.role in _INPUTS else Part(matrix.out_features, 1),)


def adapt(
    linears: Linears, base: Base, x: Tensor, matrix: Matrix, share: float, is_quantised: bool
) -> Tensor:
    """peft's ia3 Linear: scaled in the vector's dtype, narrowed before or after the product."""
    vector = linears.vector(
        (matrix.in_features if matrix.role in _INPUTS else matrix.out_features) * matrix.copies
    )
    if matrix.role not in _INPUTS:
        out, num_elements = base(x), matrix.out_features * share
        return linears.cast(linears.weighted(out, vector, num_elements), out.width, num_elements)
    num_elements = matrix.in_features * share
    wide = linears.cast(x, linears.recipe.adapter, num_elements)
    scaled = linears.cast(linears.weighted(wide, vector, num_elements), x.width, num_elements)
    out = base(scaled)
    linears.tape.hold(wide, scaled)
    return out


def peft_config(setup: TrainSetup, find_matrices: FindMatrices) -> PeftCall:
    """PEFT's IA3Config."""
    matrices = find_matrices()
    inputs = [matrix for matrix in matrices if matrix.role in _INPUTS]
    return "IA3Config", {
        "target_modules": exactly(matrices),
        "feedforward_modules": exactly(inputs) if inputs else [],
    }


def words(setup: TrainSetup) -> str:
    """What is scaled."""
    if setup.targets == "all-linear":
        return "vectors for keys, values and MLPs"
    return f"vectors for {setup.targets if isinstance(setup.targets, str) else ', '.join(setup.targets)}"


METHOD = Method(
    name="ia3",
    summary="vectors that scale keys, values and the MLPs' inner activations: very few parameters",
    takes=takes,
    takes_what="keys, values and the last matrix of an MLP",
    parts=parts,
    adapt=adapt,
    peft_config=peft_config,
    words=words,
    refusals=(NO_DROPOUT,),
    learning_rate=5e-3,
    learning_rate_source="PEFT's comparison of methods on MetaMathQA (Llama-3.2-3B): 5e-3",
)
