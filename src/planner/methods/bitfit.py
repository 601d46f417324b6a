"""BitFit (Ben Zaken et al. 2022, arXiv:2106.10199): only biases train; here those of linear modules, norms stay frozen.

What trains is what PEFT's BEFT adds to each bias, in the adapter's dtype: exact beside 16-bit weights, saved apart, and
merged by adding it to the bias.
"""

from __future__ import annotations

from planner.linears import Base, Linears
from planner.methods import NO_DROPOUT, FindMatrices, Method, Part, PeftCall, exactly
from planner.setup import TrainSetup
from planner.specs import Matrix
from planner.tape import Tensor, per_token


def takes(matrix: Matrix) -> bool:
    """PEFT adds to the biases of nn.Linear, not of GPT-2's Conv1D."""
    return matrix.bias and matrix.kind not in ("parameter", "conv1d")


def parts(matrix: Matrix, rank: int) -> tuple[Part, ...]:
    """One vector."""
    return (Part(1, matrix.out_features),)


def adapt(
    linears: Linears, base: Base, x: Tensor, matrix: Matrix, share: float, is_quantised: bool
) -> Tensor:
    """peft's beft Linear: the sum in the wider dtype of both, narrowed again."""
    out, vector = base(x), linears.vector(matrix.out_features * matrix.copies)
    num_elements = matrix.out_features * share
    width = max(out.width, vector.width)
    total = linears.tape.run([vector, out], per_token(width * num_elements), width, shares_grad=True)
    return linears.cast(total, out.width, num_elements)


def peft_config(setup: TrainSetup, find_matrices: FindMatrices) -> PeftCall:
    """PEFT's BeftConfig."""
    return "BeftConfig", {"target_modules": exactly(find_matrices())}


def words(setup: TrainSetup) -> str:
    """Which biases."""
    if setup.targets == "all-linear":
        return "all linear modules' biases"
    return f"biases of {setup.targets if isinstance(setup.targets, str) else ', '.join(setup.targets)}"


METHOD = Method(
    name="bitfit",
    summary="the biases of linear modules train; for models that have any",
    takes=takes,
    takes_what="biases of nn.Linear (use ia3, or lora with a small rank, for models without)",
    parts=parts,
    adapt=adapt,
    peft_config=peft_config,
    words=words,
    refusals=(NO_DROPOUT,),
    learning_rate=1e-3,
    learning_rate_source="the authors' example (benzakenelad/BitFit): 1e-3",
)
