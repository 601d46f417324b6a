"""DoRA (Liu et al. 2024, arXiv:2402.09353): a trained magnitude for each output beside LoRA's direction."""

from __future__ import annotations

from dataclasses import replace

from planner.linears import Base, Linears
from planner.methods import FindMatrices, Part, PeftCall, lora
from planner.operations import Product
from planner.setup import TrainSetup
from planner.specs import Matrix
from planner.tape import WORKSPACE, Tensor, constant, per_token


def parts(matrix: Matrix, rank: int) -> tuple[Part, ...]:
    """LoRA's pair and the magnitudes (out)."""
    return *lora.parts(matrix, rank), Part(1, matrix.out_features)


def peft_config(setup: TrainSetup, find_matrices: FindMatrices) -> PeftCall:
    """PEFT's LoraConfig with DoRA."""
    return "LoraConfig", {**lora.options(setup), "use_dora": True}


def adapt(
    linears: Linears, base: Base, x: Tensor, matrix: Matrix, share: float, is_quantised: bool
) -> Tensor:
    """peft's DoraLinearVariant: the norm of W + scale B A is made anew in each forward, from copies of both.

    out + (m - 1) out + m scale B(A(x)) with m = magnitude / norm; the norm gets no gradient. With dropout the first
    out of the product is made again, of the dropped input and W in the adapter's dtype.
    """
    recipe, tape = linears.recipe, linears.tape
    given, out = x, base(x)
    num_outputs = matrix.out_features * share
    x = linears.cast(x, recipe.adapter, matrix.in_features * share)
    drops = recipe.dropout and recipe.training
    source = linears.adapter_dropped(x) if recipe.dropout else x
    weight, held, saved = _norm(linears, matrix, x.width)
    # magnitude / norm, that minus 1, and the norm
    factor = linears.vector(matrix.out_features * matrix.copies, num_copies=3)
    high = linears.low_rank(source, matrix, share)
    if drops:
        direct = _product(linears, source, weight, matrix, share)
    else:
        direct = _without_bias(linears, out, num_outputs) if matrix.bias else out
    wide = per_token(recipe.adapter * num_outputs)
    first, second = (linears.weighted(out, factor, num_outputs) for out in (direct, high))
    scaled = tape.run([second], wide, recipe.adapter)
    update = tape.run([first, scaled], wide, recipe.adapter, shares_grad=True)
    tape.hold(*held, high, direct)
    tape.hold_in_graph(*saved)
    total = tape.run([out, update], wide, recipe.adapter, shares_grad=True)
    tape.hold(x, source, given)
    return linears.cast(total, out.width, num_outputs)


def _norm(
    linears: Linears, matrix: Matrix, width: int
) -> tuple[Tensor | None, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """W's copy in the adapter's dtype, if it has another one; what lives as long as the module runs; what its graph holds.

    B A is made by sending an identity through both. Nothing asks for its gradient, but it has a graph while it lives.
    """
    recipe, tape = linears.recipe, linears.tape
    rank, num_in, num_out = linears.ranks[matrix.path], matrix.in_features, matrix.out_features
    modules = matrix.copies
    compute = recipe.compute if recipe.autocast else width

    def made(elements: float, element_width: int, *inputs: Tensor, flops: float = 0.0) -> Tensor:
        product = Product(flops=constant(flops * modules)) if flops else None
        out = tape.run(
            inputs, constant(elements * element_width), element_width, category=WORKSPACE, product=product
        )
        out.needs_grad = False
        return out

    eye = made(num_in * num_in, width)
    given = made(num_in * num_in, compute, eye) if compute != width else eye
    low = made(num_in * rank, compute, given, flops=2.0 * num_in * num_in * rank)
    high = made(num_in * num_out, compute, low, flops=2.0 * num_in * rank * num_out)
    tape.hold(eye, given)
    wide = made(num_in * num_out, width, high) if compute != width else high
    copy = made(num_in * num_out, width) if recipe.weight != width else None
    scaled = made(num_in * num_out, width, wide)
    made(num_in * num_out, width, scaled)
    return copy, (wide, *([copy] if copy else [])), (given, low, high)


def _without_bias(linears: Linears, out: Tensor, num_outputs: float) -> Tensor:
    """In the wider dtype of both."""
    width = max(out.width, linears.recipe.weight)
    return linears.tape.run([out], per_token(width * num_outputs), width, shares_grad=True)


def _product(linears: Linears, x: Tensor, weight: Tensor | None, matrix: Matrix, share: float) -> Tensor:
    """The frozen layer's product, made again with its copied weight, which is saved for the input's gradient."""
    recipe, tape = linears.recipe, linears.tape
    x = linears.operand(x, matrix.in_features * share)
    if recipe.autocast and (weight.width if weight else recipe.weight) != recipe.compute:
        size = constant(recipe.compute * matrix.num_weights / matrix.copies)
        weight = tape.run([weight] if weight else [], size, recipe.compute, category=WORKSPACE)
        weight.needs_grad = False
    product = Product(flops=per_token(2.0 * matrix.in_features * matrix.out_features * share))
    out = per_token(x.width * matrix.out_features * share)
    saves = [weight] if weight else []
    return tape.run([x], out, x.width, saves=saves, saves_weight=True, views_grad=True, product=product)


METHOD = replace(
    lora.METHOD,
    name="dora",
    summary="LoRA with a trained magnitude for each output; slower, nearer to full fine-tuning",
    parts=parts,
    is_low_rank_sum=False,
    adapt=adapt,
    folds=False,
    splits=False,
    peft_config=peft_config,
    learning_rate=1e-4,
    large_learning_rate=None,
    proven_rank=None,
    learning_rate_source="the authors' scripts (NVlabs/DoRA): 1e-4 on Llama-3-8B, 2e-4 on LLaMA-7B",
)
