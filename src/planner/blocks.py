"""Transformer blocks as the operations that torch runs for them (see planner.tape).

Each function mirrors the module of transformers or peft that it is named after: which casts it makes and
which tensors each operation saves. Widths are bytes per element. Known simplifications: tensors below one
element per head and token (rotary tables, positions, routing indices) are left out; experts are taken as
evenly loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from planner import kernels
from planner.pointwise import Norm, activation, cast
from planner.specs import LayerSpec, Matrix
from planner.tape import (
    ACTIVATIONS,
    WORKSPACE,
    ZERO,
    BlockMemory,
    Size,
    Snapshot,
    Tape,
    Tensor,
    add,
    constant,
    per_token,
    scale,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What of a TrainSetup decides which tensors a block makes; widths in bytes per element.

    `weight` of the 16/32-bit matrices, `norm` of norm weights (4 under kbit_upcast), `compute` of matrix
    products, `adapter` of adapters, `stream` of what passes from layer to layer. `adapted` pairs the matrices' paths
    that get an adapter with its rank. `quantised_bits`: linears are bitsandbytes' 4-bit or 8-bit ones (0: neither).
    `fused`: norms and rotary embeddings in one kernel each that saves its input only (Triton, or torch.compile,
    whose partitioner recomputes pointwise operations in the backward); `fused_mlp`: gated activations too; `fused_adapters`: a
    quantised linear and its adapter are one autograd function (Unsloth's LoRA_QKV and LoRA_W). `on_gpu`: CUDA's
    kernels instead of the CPU's; `has_flash`: FlashAttention runs on the card; `is_masked`: torch's attention is given a
    mask; `repeats_groups`: the kernel is given grouped keys and values copied out to all heads. `reentrant`: checkpoints recompute a layer whole and keep
    its output meanwhile, the default of transformers before 5.
    """

    weight: int
    norm: int
    compute: int
    stream: int
    adapter: int = 0
    adapted: tuple[tuple[str, int], ...] = ()
    trains_base: bool = False
    autocast: bool = False
    quantised_bits: int = 0
    dropout: bool = False
    attention: str = "sdpa"
    fused: bool = False
    fused_mlp: bool = False
    fused_adapters: bool = False
    on_gpu: bool = True
    has_flash: bool = True
    is_masked: bool = False
    repeats_groups: bool = False
    reentrant: bool = False


def layer_memory(layer: LayerSpec, hidden_size: int, recipe: Recipe) -> BlockMemory:
    """One decoder or encoder layer: what it saves, and its peaks."""
    block = Block(recipe)
    stream = block.tape.input(per_token(recipe.stream * hidden_size), recipe.stream)
    block.layer(stream, layer, hidden_size)
    return block.tape.play(is_reentrant=recipe.reentrant)


class Block:
    """Builds a tape from modules; every method returns the module's output."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tape = Tape()
        self._ranks = dict(recipe.adapted)
        self._folded: list[Tensor] = []

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
            is_fused=recipe.fused,
        )
        return norm(self.tape, x)

    def layer(self, stream: Tensor, layer: LayerSpec, hidden_size: int) -> Tensor:
        """Attention and feed-forward part, each added to the residual stream, wired as the layer says."""
        if layer.wiring == "parallel":
            return self._parallel(stream, layer, hidden_size)
        for part in (self.attention, self.feed_forward):
            hidden = stream
            if layer.wiring != "reordered":
                hidden = self.norm(hidden, hidden_size, layer.norm)
            hidden = part(hidden, layer, hidden_size)
            if layer.wiring != "pre":
                hidden = self.norm(hidden, hidden_size, layer.norm)
            stream = self.residual(stream, hidden, hidden_size)
        return stream

    def _parallel(self, stream: Tensor, layer: LayerSpec, hidden_size: int) -> Tensor:
        """Attention and feed-forward part of the same stream, behind one norm or one each."""
        first = self.norm(stream, hidden_size, layer.norm)
        context = self.attention(first, layer, hidden_size)
        second = first if layer.num_norms == 1 else self.norm(stream, hidden_size, layer.norm)
        hidden = self.feed_forward(second, layer, hidden_size)
        self.tape.hold(first, context)
        return self.residual(stream, self.residual(context, hidden, hidden_size), hidden_size)

    def _weight_grad(self, num_elements: int, width: int) -> Size:
        return constant(num_elements * width) if self.recipe.trains_base else ZERO

    def cast(self, x: Tensor, width: int, num_elements: float) -> Tensor:
        """x.to(dtype): nothing where it has that width already."""
        return cast(self.tape, x, width, num_elements)

    def residual(self, stream: Tensor, update: Tensor, hidden_size: int) -> Tensor:
        """stream + update, in the wider of both dtypes."""
        width = max(stream.width, update.width)
        return self.tape.run([stream, update], per_token(width * hidden_size), width, shares_grad=True)

    def linear(self, x: Tensor, matrix: Matrix, tokens_per_token: float = 1.0) -> Tensor:
        """nn.Linear or bitsandbytes' linear, with its adapter.

        `tokens_per_token` is above 1 for routed tokens. Under autocast the 16-bit copy of a float32 weight is
        saved for the backward of its product.
        """
        if matrix.kind == "parameter" and matrix.path in self._ranks:
            return self._folded_linear(x, matrix, tokens_per_token)
        can_be_packed = matrix.kind in ("linear", "conv1d") and matrix.role != "router"
        bits = self.recipe.quantised_bits if can_be_packed else 0
        base = {0: self._plain_linear, 4: self._linear_4bit, 8: self._linear_8bit}[bits]
        out = base(x, matrix, tokens_per_token)
        if matrix.path in self._ranks:
            out = self._adapter(x, out, matrix, tokens_per_token, is_quantised=bits > 0)
        self.tape.hold(x)
        return out

    def _plain_linear(self, x: Tensor, matrix: Matrix, share: float) -> Tensor:
        return self._product(x, matrix, share, ACTIVATIONS)

    def _product(self, x: Tensor, matrix: Matrix, share: float, category: int) -> Tensor:
        recipe = self.recipe
        x = self.cast(x, recipe.compute, matrix.in_features * share)
        saved = [x] if recipe.trains_base else []
        inputs = [x]
        if recipe.weight != recipe.compute:
            copy = self.tape.run(
                [], constant(matrix.num_weights * recipe.compute), recipe.compute, category=WORKSPACE
            )
            inputs.append(copy)
            saved.append(copy)
        grad = self._weight_grad(matrix.num_weights + matrix.num_biases, recipe.weight)
        out = per_token(recipe.compute * matrix.out_features * share)
        return self.tape.run(
            inputs, out, recipe.compute, saves=saved, saves_weight=True, weight_grad=grad, category=category
        )

    def _folded_linear(self, x: Tensor, matrix: Matrix, share: float) -> Tensor:
        """A parameter of all experts with peft's ParamWrapper: the product takes W + scale B A, made each time.

        The sum is as large as the experts, is saved for the backward, and gets a gradient of that size.
        """
        recipe = self.recipe
        num_factors = self._ranks[matrix.path] * (matrix.in_features + matrix.out_features) * matrix.copies
        factors = self.tape.run(
            [],
            constant(num_factors * recipe.weight),
            recipe.weight,
            weight_grad=constant(num_factors * recipe.adapter),
        )
        whole = constant(matrix.num_weights * recipe.weight)
        weight = self.tape.run([factors], whole, recipe.weight, saves=[factors])
        self._folded += [factors, weight]
        x = self.cast(x, recipe.compute, matrix.in_features * share)
        out = per_token(recipe.compute * matrix.out_features * share)
        return self.tape.run([x, weight], out, recipe.compute, saves=[x, weight])

    def _linear_4bit(self, x: Tensor, matrix: Matrix, share: float) -> Tensor:
        """bitsandbytes' MatMul4Bit: saves the packed weight only, dequantises in forward and backward."""
        recipe = self.recipe
        asked = x.width
        x = self.cast(x, recipe.compute, matrix.in_features * share)
        whole = constant(recipe.compute * matrix.num_weights / matrix.copies)
        out = per_token(recipe.compute * matrix.out_features * share)
        result = self.tape.run([x], out, recipe.compute, temp=whole, grad_temp=whole)
        return self.cast(result, asked, matrix.out_features * share)

    def _linear_8bit(self, x: Tensor, matrix: Matrix, share: float) -> Tensor:
        """bitsandbytes' MatMul8bitLt: rows in float16, then in 8 bits; an int32 product; dequantises in the backward.

        It keeps its input where a checkpoint doesn't find it, until the whole backward is done. Columns of
        outliers, whose number depends on the data, are left out.
        """
        half = per_token(2 * matrix.in_features * share)
        rows = self.tape.run([x], per_token(matrix.in_features * share), 1, temp=half)
        rows.needs_grad = False
        out = per_token(x.width * matrix.out_features * share)
        product = per_token(4 * matrix.out_features * share)
        whole = constant(x.width * matrix.num_weights / matrix.copies)
        result = self.tape.run([x, rows], out, x.width, temp=product, grad_temp=whole)
        self.tape.keep(x)
        return result

    def _adapter(self, x: Tensor, out: Tensor, matrix: Matrix, share: float, *, is_quantised: bool) -> Tensor:
        """out + B(A(x)) as peft's Linear does it; its 4-bit linear leaves the casts to autocast."""
        recipe = self.recipe
        # torch.is_autocast_enabled(), which peft's 4-bit linear asks, means CUDA's autocast only.
        leaves_casts = is_quantised and recipe.autocast and recipe.on_gpu
        if not leaves_casts:
            x = self.cast(x, recipe.adapter, matrix.in_features * share)
        held = x
        inner = recipe.compute if recipe.autocast else recipe.adapter
        x = self._dropped(self.cast(x, inner, matrix.in_features * share), matrix.in_features * share)
        rank = self._ranks[matrix.path]
        weights_a = rank * matrix.in_features * matrix.copies * recipe.adapter
        weights_b = rank * matrix.out_features * matrix.copies * recipe.adapter
        low = self.tape.run(
            [x], per_token(inner * rank * share), inner, saves=[x], weight_grad=constant(weights_a)
        )
        wide = per_token(inner * matrix.out_features * share)
        high = self.tape.run([low], wide, inner, saves=[low], weight_grad=constant(weights_b))
        high = self.tape.run([high], wide, inner)
        if is_quantised and not leaves_casts:
            high = self.cast(high, out.width, matrix.out_features * share)
        width = max(out.width, high.width)
        total = self.tape.run(
            [out, high], per_token(width * matrix.out_features * share), width, shares_grad=True
        )
        self.tape.hold(held)
        return self.cast(total, out.width, matrix.out_features * share)

    def _dropped(self, x: Tensor, num_elements: float) -> Tensor:
        """Dropout before an adapter: a copy, and a mask of one byte per element for the backward.

        A fused adapter's backward asks the copy which elements are zero, and keeps its input.
        """
        if not self.recipe.dropout:
            return x
        if self.recipe.fused_adapters:
            return self.tape.run([x], per_token(x.width * num_elements), x.width, saves=[x])
        mask = self.tape.run([], per_token(num_elements), 1)
        return self.tape.run([x, mask], per_token(x.width * num_elements), x.width, saves=[mask])

    def attention(self, x: Tensor, layer: LayerSpec, hidden_size: int) -> Tensor:
        """Projections, rotary embedding, attention kernel, output projection."""
        roles = {m.role: m for m in layer.matrices}
        query, key, value = self._projections(x, roles, layer)
        context = self._kernel(query, key, value, layer)
        if "o" in roles:
            context = self.linear(context, roles["o"])
        self.tape.hold(x, query, key, value)
        return context

    def _projections(
        self, x: Tensor, roles: dict[str, Matrix], layer: LayerSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        if "qkv" in roles:
            joint = self.linear(x, roles["qkv"])
            query = key = value = joint
        else:
            query, key, value = (self._projection(x, roles, part) for part in ("q", "k", "v"))
        width_q, width_k = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        if layer.qk_norm != "none":
            heads = (layer.num_heads, layer.num_kv_heads) if layer.qk_norm == "head" else (1, 1)
            query = self.norm(query, width_q, layer.norm, heads[0])
            key = self.norm(key, width_k, layer.norm, heads[1])
        return self._rotary(query, width_q), self._rotary(key, width_k), value

    def _projection(self, x: Tensor, roles: dict[str, Matrix], part: str) -> Tensor:
        """q, k or v; multi-head latent attention goes through a narrow matrix, a norm, and a wide one."""
        if part in roles:
            return self.linear(x, roles[part])
        narrow, wide = roles.get(f"{part}_a", roles.get("kv_a")), roles.get(f"{part}_b", roles.get("kv_b"))
        if narrow is None or wide is None:
            return x
        return self.linear(self.norm(self.linear(x, narrow), narrow.out_features, "rmsnorm"), wide)

    def _rotary(self, x: Tensor, width: int) -> Tensor:
        size = per_token(x.width * width)
        temp = ZERO if self.recipe.fused else add(size, size)
        return self.tape.run([x], size, x.width, temp=temp, grad_temp=temp)

    def _kernel(self, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec) -> Tensor:
        width = self.recipe.compute
        query, key, value = (self.cast(t, width, t.size[1] / t.width) for t in (query, key, value))
        if self.recipe.repeats_groups or (not layer.hands_over_groups and layer.num_kv_heads > 1):
            key, value = kernels.repeated(self.tape, key, value, layer, width)
            layer = replace(layer, num_kv_heads=layer.num_heads)
        return self._chosen_kernel(layer)(self.tape, query, key, value, layer, width)

    def _chosen_kernel(self, layer: LayerSpec) -> kernels.Kernel:
        recipe = self.recipe
        if recipe.attention == "eager":
            return kernels.eager
        if not recipe.on_gpu:
            return kernels.on_cpu
        if recipe.attention == "flash":
            return kernels.flash
        return kernels.sdpa_kernel(
            layer, recipe.compute, is_masked=recipe.is_masked, has_flash=recipe.has_flash
        )

    def feed_forward(self, x: Tensor, layer: LayerSpec, hidden_size: int) -> Tensor:
        """The MLP, or the experts and those that are shared."""
        dense = {m.role: m for m in layer.matrices if m.token_share == 1.0}
        routed = {m.role: m for m in layer.matrices if m.token_share < 1.0}
        shared = {role.removeprefix("shared_"): m for role, m in dense.items() if role.startswith("shared_")}
        parts = []
        if "down" in dense:
            parts.append(self._mlp(x, dense, layer, 1.0))
        if "down" in shared:
            parts.append(self._shared_expert(x, shared, layer))
        if "down" in routed:
            parts.append(self._experts(x, routed, layer, hidden_size))
        if not parts:
            return x
        self.tape.hold(x)
        total = parts[0]
        for part in parts[1:]:
            total = self.residual(total, part, hidden_size)
        return total

    def _shared_expert(self, x: Tensor, roles: dict[str, Matrix], layer: LayerSpec) -> Tensor:
        """An expert that sees every token, weighted by a router of its own where it has one."""
        out = self._mlp(x, roles, layer, 1.0)
        if "router" not in roles:
            return out
        gate = self.linear(x, roles["router"])
        return self.tape.run([out, gate], out.size, out.width, saves=[out, gate])

    def _experts(self, x: Tensor, routed: dict[str, Matrix], layer: LayerSpec, hidden_size: int) -> Tensor:
        """All experts at once (grouped products), or one after the other where they are separate linears.

        One after the other, what the first ones save waits while the last one is at work.
        """
        chosen = float(layer.experts_per_token)
        scores = [self.linear(x, m) for m in layer.matrices if m.role == "router"]
        if routed["down"].kind == "parameter":
            weighted = self._expert(x, scores, routed, layer, chosen)
            # Back in the tokens' order; the backward scatters into zeros.
            ordered = self.tape.run([weighted], weighted.size, weighted.width, grad_temp=weighted.size)
            # peft keeps what it folded until the experts are done.
            self.tape.hold(*self._folded)
            return self.tape.run([ordered], per_token(x.width * hidden_size), x.width)
        share = chosen / layer.num_experts
        waiting = Block(self.recipe)
        waiting._expert(waiting.tape.input(x.size, x.width), [], routed, layer, share)
        saved = scale(_total(waiting.tape.play().saved), layer.num_experts - 1)
        stash = self.tape.run([x], saved, x.width, saves_output=True)
        stash.needs_grad = False
        out = self._expert(x, scores, routed, layer, share)
        return self.tape.run([out, stash], per_token(x.width * hidden_size), x.width)

    def _expert(
        self, x: Tensor, scores: list[Tensor], routed: dict[str, Matrix], layer: LayerSpec, share: float
    ) -> Tensor:
        """Tokens gathered for their experts, transformed, weighted by the router's scores."""
        gathered = self.tape.run([x], scale(x.size, share), x.width)
        out = self._mlp(gathered, routed, layer, share)
        return self.tape.run([out, *scores], out.size, out.width, saves=[out])

    def _mlp(self, x: Tensor, roles: dict[str, Matrix], layer: LayerSpec, share: float) -> Tensor:
        down = roles["down"]
        inner = down.in_features * share
        if "gate" not in roles and "gate_up" not in roles:
            hidden = self.linear(x, roles["up"], share)
            return self.linear(self._activation(hidden, inner, layer), down, share)
        joint = roles.get("gate_up")
        gate = self.linear(x, joint or roles["gate"], share)
        active = gate if self.recipe.fused_mlp else self._activation(gate, inner, layer)
        up = gate if joint else self.linear(x, roles["up"], share)
        product = self.tape.run([active, up], per_token(gate.width * inner), gate.width, saves=[active, up])
        return self.linear(product, down, share)

    def _activation(self, x: Tensor, num_elements: float, layer: LayerSpec) -> Tensor:
        return activation(self.tape, x, num_elements, layer.activation, autocast=self.recipe.autocast)


def _total(snapshot: Snapshot) -> Size:
    total = ZERO
    for size in snapshot:
        total = add(total, size)
    return total
