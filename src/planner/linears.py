"""Norms, residual sums and linear modules with their adapters, as the operations that torch runs (planner.tape).

Each function mirrors the module of torch, peft or bitsandbytes that it is named after: which casts it makes and
which tensors each operation saves. Widths are bytes per element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from planner.operations import Product
from planner.own_kernels import SIBLINGS, adapted
from planner.pointwise import Norm, cast
from planner.specs import Matrix
from planner.tape import (
    ACTIVATIONS,
    FULL_WIDTH,
    WORKSPACE,
    ZERO,
    Size,
    Tape,
    Tensor,
    add,
    constant,
    per_token,
    scale,
)

Base = Callable[[Tensor], Tensor]
"""A module without its adapter."""
Adapt = Callable[["Linears", Base, Tensor, Matrix, float, bool], Tensor]
"""What a module with an adapter gives: its tape, itself without the adapter, its input, its matrix, the share of all
tokens that it sees (above 1 for routed ones), and whether its weights are packed (planner.methods)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What of a TrainSetup decides which tensors a block makes; widths in bytes per element.

    `weight` of the 16/32-bit matrices, `norm` of norm weights (4 under kbit_upcast), `compute` of matrix
    products under `autocast` and of those with packed weights (others compute in their operands' dtype), `adapter` of
    adapters, `stream` of the embedding's output. `adapted` pairs the matrices' paths
    that get an adapter with its rank; `adapt` is what those modules run. `quantised_bits`: linears are bitsandbytes' 4-bit or 8-bit ones (0: neither).
    `is_float16`: 16 bits mean float16, which some kernels widen inside.
    `fused`: norms and rotary embeddings in one kernel each that saves its input only (Triton, or torch.compile,
    whose partitioner recomputes pointwise operations in the backward); `fused_mlp`: gated activations too; `fused_adapters`: a
    quantised linear and its adapter are one autograd function (Unsloth's LoRA_QKV and LoRA_W). `own`: finefit's kernels
    (planner.own_kernels); `own_adapters`: a linear and its adapter too, `trains_first` whether that one's A trains. `on_gpu`: CUDA's
    kernels instead of the CPU's; `has_flash`: FlashAttention runs on the card; `is_masked`: torch's attention is given a
    mask; `repeats_groups`: the kernel is given grouped keys and values copied out to all heads; `checkpointed`: layers are recomputed; `reentrant`: checkpoints recompute a layer whole and keep
    its output meanwhile, the default of transformers before 5. `has_first_grad`: the gradient of the first layer's
    input is computed though nothing before it trains. `step_factor`: each weight's gradient is used as soon as it is
    there, which takes that many times its bytes (Tape.play). `training`: dropouts drop; `copies_weights`: autocast narrows weights that the ranks haven't gathered narrow.
    `accumulates`: gradients are added to those of the micro-batch before. `is_single`: the micro-batch is one row; `flattens`: flash attention is given its documents one after the other, in
    copies (modeling_flash_attention_utils.py, _prepare_from_posids); `spreads`: torch's attention is given each document in a
    row of its own, in copies (bench.attention). `reach`: keys and values over a row's tokens, more
    than 1 where learned ones stand ahead of them. `held_rows`: rows that flash's backward holds over those tokens.
    """

    weight: int
    norm: int
    compute: int
    stream: int
    mask: int = 2
    adapter: int = 0
    adapted: tuple[tuple[str, int], ...] = ()
    adapt: Adapt | None = None
    trains_base: bool = False
    autocast: bool = False
    quantised_bits: int = 0
    is_float16: bool = False
    dropout: bool = False
    attention: str = "sdpa"
    fused: bool = False
    fused_mlp: bool = False
    fused_adapters: bool = False
    own: bool = False
    own_adapters: bool = False
    own_attention: bool = False
    trains_first: bool = True
    on_gpu: bool = True
    has_flash: bool = True
    is_masked: bool = False
    repeats_groups: bool = False
    reentrant: bool = False
    has_first_grad: bool = False
    checkpointed: bool = False
    step_factor: float | None = None
    training: bool = True
    is_single: bool = False
    accumulates: bool = False
    copies_weights: bool = True
    flattens: bool = False
    spreads: bool = False
    reach: float = 1.0
    held_rows: float = 1.0


class Linears:
    """Builds a tape from modules; every method returns the module's output."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tape = Tape()
        self.ranks = dict(recipe.adapted)
        self.folded: list[Tensor] = []
        self.biases: list[Tensor] = []
        self.joint: tuple[Tensor, ...] = ()

    def norm(self, x: Tensor, num_elements: int, kind: str, groups: int = 1) -> Tensor:
        """A norm of `planner.pointwise` over `groups` groups (heads) that have `num_elements` elements together."""
        recipe = self.recipe
        norm = Norm(
            kind=kind,
            num_elements=num_elements,
            groups=groups,
            weight_width=recipe.norm,
            is_trained=recipe.trains_base,
            autocast=recipe.autocast,
            is_fused=recipe.fused or (recipe.own and self._has_cuda_norm(x, kind)),
            is_own=recipe.own,
        )
        return norm(self.tape, x)

    def _has_cuda_norm(self, x: Tensor, kind: str) -> bool:
        """Whether finefit's norm is torch's own, of CUDA."""
        recipe = self.recipe
        return kind == "rmsnorm" and recipe.on_gpu and x.width == recipe.norm

    def cast(self, x: Tensor, width: int, num_elements: float) -> Tensor:
        """x.to(dtype): nothing where it has that width already."""
        return cast(self.tape, x, width, num_elements)

    def operand(self, x: Tensor, num_elements: float) -> Tensor:
        """x as a matrix product takes it: autocast narrows it, nothing else does."""
        return self.cast(x, self.recipe.compute, num_elements) if self.recipe.autocast else x

    def residual(self, stream: Tensor, update: Tensor, hidden_size: int) -> Tensor:
        """stream + update, in the wider of both dtypes."""
        width = max(stream.width, update.width)
        return self.tape.run([stream, update], per_token(width * hidden_size), width, shares_grad=True)

    def linear(self, x: Tensor, matrix: Matrix, tokens_per_token: float = 1.0) -> Tensor:
        """nn.Linear or bitsandbytes' linear, with its adapter.

        `tokens_per_token` is above 1 for routed tokens. Under autocast the 16-bit copy of a float32 weight is
        saved for the backward of its product.
        """
        if matrix.kind == "parameter" and matrix.path in self.ranks:
            return self._folded_linear(x, matrix, tokens_per_token)
        if self._has_own_adapter(matrix):
            return self._adapted(x, [matrix], tokens_per_token)[0]
        can_be_packed = matrix.kind in ("linear", "conv1d") and matrix.role != "router"
        bits = self.recipe.quantised_bits if can_be_packed else 0
        run = {0: self._plain_linear, 4: self._linear_4bit, 8: self._linear_8bit}[bits]

        def base(given: Tensor) -> Tensor:
            return run(given, matrix, tokens_per_token)

        if matrix.path in self.ranks and self.recipe.adapt:
            out = self.recipe.adapt(self, base, x, matrix, tokens_per_token, bits > 0)
        else:
            out = base(x)
        self.tape.hold(x)
        return out

    def siblings(self, x: Tensor, matrices: Sequence[Matrix], share: float = 1.0) -> list[Tensor]:
        """Linears that read one input, in the order in which they are called."""
        together = tuple(matrix.module for matrix in matrices) in SIBLINGS
        if together and all(self._has_own_adapter(matrix) for matrix in matrices):
            return self._adapted(x, matrices, share)
        return [self.linear(x, matrix, share) for matrix in matrices]

    def _has_own_adapter(self, matrix: Matrix) -> bool:
        return self.recipe.own_adapters and matrix.kind == "linear" and matrix.path in self.ranks

    def _adapted(self, x: Tensor, matrices: Sequence[Matrix], share: float) -> list[Tensor]:
        recipe = self.recipe
        outputs = adapted(
            self.tape,
            x,
            matrices,
            [self.ranks[matrix.path] for matrix in matrices],
            share,
            adapter=recipe.adapter,
            trains_first=recipe.trains_first,
        )
        self.tape.hold(x)
        return outputs

    def _plain_linear(self, x: Tensor, matrix: Matrix, share: float) -> Tensor:
        if matrix.kind == "parameter" and matrix.role != "router":
            return self._grouped_product(x, matrix, share)
        return self.product(x, matrix, share, ACTIVATIONS)

    def _grouped_product(self, x: Tensor, matrix: Matrix, share: float) -> Tensor:
        """torch's grouped product, which autocast doesn't know: in the experts' dtype (integrations/moe.py)."""
        recipe = self.recipe
        x = self.cast(x, recipe.weight, matrix.in_features * share)
        if matrix.num_biases:
            self._gather_biases(matrix, share)
        out = self._multiply(x, None, matrix, share, ACTIVATIONS)
        # Beyond 16 bits a loop stands for it, whose gradient is laid out as the transposed view that it is given, and
        # AccumulateGrad copies that (integrations/moe.py; accumulate_grad.h).
        is_loop = recipe.weight == FULL_WIDTH
        self.tape.operations[-1].copies_grad = is_loop and recipe.trains_base and not recipe.accumulates
        return out

    def _gather_biases(self, matrix: Matrix, share: float) -> None:
        """A row per token and expert; a variable holds it until the next product's are there."""
        width = self.recipe.weight
        rows = self.tape.run([], per_token(width * matrix.out_features * share), width)
        rows.needs_grad = False
        self.tape.hold(*self.biases)
        self.biases = [rows]

    def product(self, x: Tensor, matrix: Matrix, share: float, category: int) -> Tensor:
        """x times a weight that isn't packed."""
        recipe = self.recipe
        x = self.operand(x, matrix.in_features * share)
        copy = None
        if recipe.copies_weights and recipe.autocast and recipe.weight != recipe.compute:
            copy = self._narrowed(matrix.num_weights, recipe.weight, is_trained=recipe.trains_base)
        return self._multiply(x, copy, matrix, share, category)

    def _multiply(
        self, x: Tensor, copy: Tensor | None, matrix: Matrix, share: float, category: int
    ) -> Tensor:
        recipe = self.recipe
        saved = [x] if recipe.trains_base else []
        num_trained = matrix.num_biases + (0 if copy else matrix.num_weights)
        grad = constant(num_trained * recipe.weight) if recipe.trains_base else ZERO
        copies = [copy] if copy else []
        return self.tape.run(
            [x, *copies],
            per_token(x.width * matrix.out_features * share),
            x.width,
            saves=[*saved, *copies],
            saves_weight=True,
            weight_grad=grad,
            category=category,
            views_grad=True,
            product=Product(
                flops=_flops(matrix, share),
                weight_bytes=0.0 if copy else _own_weights(matrix) * recipe.weight,
                trains_weight=recipe.trains_base and copy is None,
            ),
        )

    def _narrowed(self, num_elements: float, width: int, *, is_trained: bool) -> Tensor:
        """Autocast's copy of a weight of `width` bytes per element: kept until its context ends if it trains."""
        grad = constant(num_elements * width) if is_trained else ZERO
        compute = self.recipe.compute
        size = constant(num_elements * compute)
        return self.tape.run([], size, compute, weight_grad=grad, category=WORKSPACE, is_cached=is_trained)

    def _folded_linear(self, x: Tensor, matrix: Matrix, share: float) -> Tensor:
        """A parameter of all experts with peft's ParamWrapper: the product takes W + scale B A, made each time.

        The sum is as large as the experts, is saved for the backward, and gets a gradient of that size; the factors
        are copied where their dtype isn't the experts'.
        """
        recipe = self.recipe
        num_factors = self.ranks[matrix.path] * (matrix.in_features + matrix.out_features) * matrix.copies
        factors = self.tape.run(
            [],
            constant(num_factors * recipe.weight) if recipe.adapter != recipe.weight else ZERO,
            recipe.weight,
            weight_grad=constant(num_factors * recipe.adapter),
        )
        whole = constant(matrix.num_weights * recipe.weight)
        weight = self.tape.run([factors], whole, recipe.weight, saves=[factors])
        self.folded += [factors, weight]
        if matrix.role == "router":
            x = self.operand(x, matrix.in_features * share)
        else:
            x = self.cast(x, recipe.weight, matrix.in_features * share)
        out = per_token(x.width * matrix.out_features * share)
        product = Product(flops=_flops(matrix, share))
        return self.tape.run([x, weight], out, x.width, saves=[x, weight], product=product)

    def _linear_4bit(self, x: Tensor, matrix: Matrix, share: float) -> Tensor:
        """bitsandbytes' MatMul4Bit: saves nothing, since its context holds the packed weight; dequantises in
        forward and backward.
        """
        recipe = self.recipe
        asked = x.width
        x = self.cast(x, recipe.compute, matrix.in_features * share)
        whole = constant(recipe.compute * matrix.num_weights / matrix.copies)
        out = per_token(recipe.compute * matrix.out_features * share)
        result = self.tape.run(
            [x],
            out,
            recipe.compute,
            temp=whole,
            grad_temp=whole,
            product=Product(flops=_flops(matrix, share), weight_bytes=recipe.compute * _own_weights(matrix)),
            num_dequantised=_own_weights(matrix),
        )
        result = self.cast(result, asked, matrix.out_features * share)
        self.tape.hold(x)
        return result

    def _linear_8bit(self, x: Tensor, matrix: Matrix, share: float) -> Tensor:
        """bitsandbytes' MatMul8bitLt: rows in float16, then in 8 bits; an int32 product; dequantises in the backward.

        It keeps its input where a checkpoint doesn't find it, until the whole backward is done. Outliers are looked
        for in the magnitudes, 2 bytes each, with a mask of one byte; columns of them, whose number depends on the
        data, are left out.
        """
        recipe = self.recipe
        is_half = recipe.is_float16 and x.width == 2
        search = per_token((3 if is_half else 2 + 3) * matrix.in_features * share)
        rows = self.tape.run([x], per_token(matrix.in_features * share), 1, temp=search)
        rows.needs_grad = False
        out = per_token(x.width * matrix.out_features * share)
        # CUDA's kernel writes float16 only (bitsandbytes' backends/cuda/ops.py).
        product = per_token((4 if is_half else 6) * matrix.out_features * share)
        whole = constant(x.width * matrix.num_weights / matrix.copies)
        result = self.tape.run(
            [x, rows],
            out,
            x.width,
            temp=product,
            grad_temp=whole,
            views_grad=True,
            product=Product(flops=_flops(matrix, share), weight_bytes=_own_weights(matrix)),
        )
        if recipe.training:
            self.tape.keep(x)
        return result

    def low_rank(self, x: Tensor, matrix: Matrix, share: float, *, trains_first: bool = True) -> Tensor:
        """B(A(x)), the two linears of an adapter."""
        rank = self.ranks[matrix.path]
        low = self._factor(x, rank, matrix.in_features, matrix, share, trains=trains_first)
        return self._factor(low, matrix.out_features, rank, matrix, share)

    def _factor(
        self, x: Tensor, rows: float, columns: float, matrix: Matrix, share: float, *, trains: bool = True
    ) -> Tensor:
        """One of an adapter's two linears, rows x columns."""
        recipe = self.recipe
        num_weights = rows * columns * matrix.copies
        x = self.operand(x, columns * share)
        copies = []
        if recipe.copies_weights and recipe.autocast and recipe.adapter != recipe.compute:
            copies = [self._narrowed(num_weights, recipe.adapter, is_trained=trains)]
        return self.tape.run(
            [x, *copies],
            per_token(x.width * rows * share),
            x.width,
            saves=[*([x] if trains else []), *copies],
            saves_weight=True,
            weight_grad=constant(num_weights * recipe.adapter) if trains and not copies else ZERO,
            views_grad=True,
            product=Product(
                flops=per_token(2.0 * rows * columns * share),
                weight_bytes=0.0 if copies else num_weights * recipe.adapter,
                trains_weight=trains and not copies,
            ),
        )

    def weighted(self, x: Tensor, vector: Tensor, num_elements: float) -> Tensor:
        """x times a trained vector of `num_elements` per token, in the wider dtype of both.

        The backward makes the vector's gradient in full before it sums it up, and x's in the wider dtype before it narrows it.
        """
        width = max(x.width, vector.width)
        wide = per_token(width * num_elements)
        beside = wide if x.width == width else add(wide, wide)
        return self.tape.run([vector, x], wide, width, saves=[vector, x], grad_temp=beside)

    def vector(self, num_elements: float, num_copies: int = 1) -> Tensor:
        """A trained vector of the adapter's dtype, and copies of it with which it is computed."""
        size = constant(num_elements * self.recipe.adapter)
        made = self.tape.run([], scale(size, num_copies), self.recipe.adapter, weight_grad=size)
        made.grad_size = size
        return made

    def adapter_dropped(self, x: Tensor) -> Tensor:
        """A fused adapter's backward asks the copy which elements are zero, and keeps its input."""
        if self.recipe.fused_adapters and self.recipe.training:
            return self.tape.run([x], x.gradient, x.width, saves=[x])
        return self.dropped(x)

    def dropped(self, x: Tensor) -> Tensor:
        """Dropout: a copy, and a mask of one byte per element for the backward."""
        if not self.recipe.training:
            return x
        mask = self.tape.run([], scale(x.gradient, 1 / x.width), 1)
        mask.needs_grad = False
        return self.tape.run([x, mask], x.gradient, x.width, saves=[mask])


def _own_weights(matrix: Matrix) -> float:
    """Of one module: an expert's, or those of all experts that are one parameter."""
    return matrix.num_weights / (1 if matrix.kind == "parameter" else matrix.copies)


def _flops(matrix: Matrix, share: float) -> Size:
    """Of one product with each token's weights: a multiplication and an addition for each."""
    return per_token(2.0 * matrix.in_features * matrix.out_features * share)
