"""Transformer blocks as the operations that torch runs for them (see planner.tape).

Each function mirrors the module of transformers that it is named after: which casts it makes and
which tensors each operation saves. Widths are bytes per element. Known simplifications: experts are taken as
evenly loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from planner import kernels
from planner.linears import Linears, Recipe
from planner.own_kernels import by_document, cpu_kernel, gated_silu, knows_gate
from planner.pointwise import CLAMPED_SILU, activation
from planner.sizes import sum_of
from planner.specs import LayerSpec, Matrix
from planner.tape import FULL_WIDTH, ZERO, BlockMemory, Tape, Tensor, add, per_token, scale
from planner.work import Passes

Part = Callable[[Tensor, LayerSpec, int], Tensor]
INDEX_WIDTH = 8
"""Bytes of an int64."""


def layer_memory(
    layer: LayerSpec, hidden_size: int, recipe: Recipe, *, width: int | None = None, is_first: bool = False
) -> BlockMemory:
    """One decoder or encoder layer: what it saves, and its peaks. The first one's input may need no gradient.

    `width`: bytes per element of its input, the embeddings' output where none is given.
    """
    return _recorded(layer, hidden_size, recipe, width, is_first).play(
        is_checkpointed=recipe.checkpointed,
        is_reentrant=recipe.reentrant,
        step_factor=recipe.step_factor,
    )


def layer_work(
    layer: LayerSpec, hidden_size: int, recipe: Recipe, *, width: int | None = None, is_first: bool = False
) -> Passes:
    """What the same layer computes and moves."""
    tape = _recorded(layer, hidden_size, recipe, width, is_first)
    return tape.passes(is_checkpointed=recipe.checkpointed, is_reentrant=recipe.reentrant)


def _recorded(layer: LayerSpec, hidden_size: int, recipe: Recipe, width: int | None, is_first: bool) -> Tape:
    block, width = Block(recipe), width or recipe.stream
    needs_grad = not is_first or recipe.trains_base or recipe.has_first_grad
    stream = block.tape.input(per_token(width * hidden_size), width, needs_grad=needs_grad)
    block.layer(stream, layer, hidden_size)
    return block.tape


class Block(Linears):
    """A layer's modules."""

    def layer(self, stream: Tensor, layer: LayerSpec, hidden_size: int) -> Tensor:
        """Attention and feed-forward part, each added to the residual stream, wired as the layer says."""
        if layer.wiring == "parallel":
            return self._parallel(stream, layer, hidden_size)
        if layer.wiring == "post":
            return self._post(stream, layer, hidden_size)
        for part in self.parts(layer):
            given = hidden = stream
            if layer.wiring != "reordered":
                hidden = self.norm(hidden, hidden_size, layer.norm)
            hidden = part(hidden, layer, hidden_size)
            if layer.wiring != "pre":
                hidden = self.norm(hidden, hidden_size, layer.norm)
            stream = self._updated(given, hidden, layer, hidden_size)
            if layer.holds_attention and part == self.attention:
                self.tape.hold_to_end(hidden)
        return stream

    def parts(self, layer: LayerSpec) -> tuple[Part, ...]:
        """What is added to the stream, one after the other."""
        return self.attention, self.feed_forward

    def _updated(self, stream: Tensor, update: Tensor, layer: LayerSpec, hidden_size: int) -> Tensor:
        """The residual stream with what a part gives, or its multiple."""
        if layer.scales_updates:
            update = self.tape.run([update], update.size, update.width)
        return self.residual(stream, update, hidden_size)

    def _post(self, stream: Tensor, layer: LayerSpec, hidden_size: int) -> Tensor:
        """Each part's sum with the stream is normed."""
        for part in self.parts(layer):
            summed = self.residual(stream, part(stream, layer, hidden_size), hidden_size)
            stream = self.norm(summed, hidden_size, layer.norm)
        return stream

    def _parallel(self, stream: Tensor, layer: LayerSpec, hidden_size: int) -> Tensor:
        """Attention and feed-forward part of the same stream, behind one norm or one each."""
        first = second = self.norm(stream, hidden_size, layer.norm)
        if layer.num_norms > 1 and layer.norms_ahead:
            second = self.norm(stream, hidden_size, layer.norm)
        context = self.attention(first, layer, hidden_size)
        if layer.num_norms > 1 and not layer.norms_ahead:
            first = second = self.norm(stream, hidden_size, layer.norm)
        hidden = self.feed_forward(second, layer, hidden_size)
        self.tape.hold(first, second, context)
        return self.residual(stream, self.residual(context, hidden, hidden_size), hidden_size)

    def attention(self, x: Tensor, layer: LayerSpec, hidden_size: int) -> Tensor:
        """Projections, rotary embedding, attention kernel, output projection."""
        roles = {m.role: m for m in layer.matrices}
        project = self._latent if "kv_a" in roles else self._projections
        query, key, value, *others = project(x, roles, layer)
        context = self._kernel(query, key, value, layer)
        if "o" in roles:
            context = self.linear(context, roles["o"])
        if layer.dropout:
            context = self.dropped(context)
        self.tape.hold(x, query, key, value, *others, *self.joint, *self.tape.variables)
        return context

    def _latent(self, x: Tensor, roles: dict[str, Matrix], layer: LayerSpec) -> tuple[Tensor, ...]:
        # Most models have none, and the start-up counts modules.
        from planner import latent

        return latent.projections(self, x, roles, layer)

    def _projections(self, x: Tensor, roles: dict[str, Matrix], layer: LayerSpec) -> tuple[Tensor, ...]:
        width_q, width_k = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        if "qkv" in roles:
            joint = self.linear(x, roles["qkv"])
            self.joint = (joint,)
            widths = (width_q, width_k, layer.num_kv_heads * layer.value_head_dim)
            query, key, value = (self.tape.part(joint, per_token(joint.width * w)) for w in widths)
            if not layer.hands_over_groups and layer.num_kv_heads < layer.num_heads:
                # Falcon picks grouped heads by a list of positions, which copies them.
                key, value = self._copied(key), self._copied(value)
        else:
            own = [part for part in "qkv" if part in roles]
            made = dict(zip(own, self.siblings(x, [roles[part] for part in own]), strict=True))
            query, key, value = (made.get(part, x) for part in "qkv")
        if layer.qk_norm != "none":
            heads = (layer.num_heads, layer.num_kv_heads) if layer.qk_norm == "head" else (1, 1)
            query = self.norm(query, width_q, layer.norm, heads[0])
            key = self.norm(key, width_k, layer.norm, heads[1])
        if layer.rotary == "none":
            return query, key, value
        is_fused = self.recipe.fused or (self.recipe.own and layer.rotary == "full")
        rotated = self._rotary(query, width_q, is_fused), self._rotary(key, width_k, is_fused)
        if layer.rotary == "narrowed":
            rotated = self.cast(rotated[0], query.width, width_q), self.cast(rotated[1], key.width, width_k)
        self.tape.hold(query, key)
        if layer.scores == "wide":
            # GPT-J rotates in its attention's own forward, where views of both stay.
            self.tape.variables += (query, key)
        return *rotated, value

    def _rotary(self, x: Tensor, width: int, is_fused: bool) -> Tensor:
        """x cos + rotate_half(x) sin; the tables have the width of the stream."""
        wide = max(x.width, self.recipe.stream)
        size = per_token(wide * width)
        temp = ZERO if is_fused else add(size, size)
        return self.tape.run([x], size, wide, temp=temp, grad_temp=temp)

    def _kernel(self, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec) -> Tensor:
        recipe = self.recipe
        if recipe.reach > 1:
            key, value = self._after_prefix(key), self._after_prefix(value)
        if recipe.repeats_groups or (not layer.hands_over_groups and layer.num_kv_heads > 1):
            key, value = kernels.repeated(self.tape, key, value, layer)
            layer = replace(layer, num_kv_heads=layer.num_heads)
        if recipe.attention == "flash" and layer.value_head_dim != layer.head_dim:
            return self._padded_flash(query, key, value, layer)
        kernel, width = self._chosen_kernel(layer)
        if kernel in kernels.UNGROUPED:
            key, value = kernels.repeated(self.tape, key, value, layer)
            layer = replace(layer, num_kv_heads=layer.num_heads)
        given = key, value
        if recipe.attention != "eager":
            query, key, value = (
                self.cast(t, width or t.width, t.gradient[1] / t.width) for t in (query, key, value)
            )
        if recipe.attention == "flash" and recipe.flattens:
            query, key = self._copied(query), self._copied(key)
            value = value if value.base is None else self._copied(value)
        how = kernels.Precision(
            compute=width,
            mask=recipe.mask,
            is_float16=recipe.is_float16 and recipe.on_gpu,
            drops=layer.attention_dropout and recipe.training,
            is_single=recipe.is_single,
            reach=recipe.reach,
        )
        kernel = by_document(kernel, layer, recipe.held_rows) if recipe.spreads else kernel
        context = kernel(self.tape, query, key, value, layer, how)
        self.tape.hold(*given)
        return context

    def _after_prefix(self, x: Tensor) -> Tensor:
        """Learned keys or values, in the weights' dtype, and the layer's own in one tensor."""
        width, reach = max(x.width, self.recipe.weight), self.recipe.reach
        ahead = self.tape.outer(
            scale(x.gradient, (reach - 1) * self.recipe.weight / x.width), self.recipe.weight
        )
        joined = self.tape.join([ahead, x], scale(x.gradient, reach * width / x.width), width)
        # The cache holds it.
        self.tape.hold_to_end(joined)
        return joined

    def _padded_flash(self, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec) -> Tensor:
        """Flash with values padded to the queries' heads; the context is cut in a copy (integrations/flash_attention.py)."""
        wide, heads = replace(layer, value_head_dim=layer.head_dim), layer.num_heads
        padded = self.tape.run([value], per_token(value.width * heads * layer.head_dim), value.width)
        context = self._kernel(query, key, padded, wide)
        size = per_token(context.width * heads * layer.value_head_dim)
        return self.tape.run([context], size, context.width)

    def _copied(self, x: Tensor) -> Tensor:
        return self.tape.run([x], x.gradient, x.width)

    def _chosen_kernel(self, layer: LayerSpec) -> tuple[kernels.Kernel, int]:
        """The kernel and the width in which it computes (0: its inputs')."""
        recipe = self.recipe
        narrowed = recipe.compute if recipe.autocast else 0
        if recipe.attention == "eager":
            return kernels.EAGER[layer.scores], narrowed
        if not recipe.on_gpu:
            return cpu_kernel(is_own=recipe.own_attention and not recipe.is_masked and layer.causal), narrowed
        if recipe.attention == "flash":
            # transformers narrows float32 queries of a quantised model (integrations/flash_attention.py).
            return kernels.flash, recipe.compute
        width = narrowed or max(recipe.stream, recipe.norm)
        chosen = kernels.sdpa_kernel(layer, width, is_masked=recipe.is_masked, has_flash=recipe.has_flash)
        return chosen, narrowed

    def feed_forward(self, x: Tensor, layer: LayerSpec, hidden_size: int) -> Tensor:
        """The MLP, or the experts and those that are shared."""
        dense = {m.role: m for m in layer.matrices if m.token_share == 1.0}
        routed = {m.role: m for m in layer.matrices if m.token_share < 1.0}
        shared = {role.removeprefix("shared_"): m for role, m in dense.items() if role.startswith("shared_")}
        # A shared expert with a router of its own comes before the routed ones, others after them.
        first = shared if "router" in shared else {}
        parts = [self._mlp(x, roles, layer, 1.0) for roles in (dense, first) if "down" in roles]
        if "down" in routed:
            parts.append(self._experts(x, routed, layer, hidden_size))
        if first:
            parts[0] = self._gated(x, parts[0], first["router"])
        elif "down" in shared:
            parts.append(self._mlp(x, shared, layer, 1.0))
        if not parts:
            return x
        if any("." in m.path for m in layer.matrices if m.role == "up" or m.role == "gate_up"):
            # A module of its own, whose caller holds what it is given.
            self.tape.hold(x)
        total = parts[0]
        for part in parts[1:]:
            total = self.residual(total, part, hidden_size)
        return self.dropped(total) if layer.dropout else total

    def _gated(self, x: Tensor, out: Tensor, router: Matrix) -> Tensor:
        """What a shared expert gives, weighted by a router of its own; the module's variable keeps the former."""
        gate = self.linear(x, router)
        gated = self.tape.run([out, gate], out.size, out.width, saves=[out, gate])
        self.tape.hold(out)
        return gated

    def _experts(self, x: Tensor, routed: dict[str, Matrix], layer: LayerSpec, hidden_size: int) -> Tensor:
        """All experts at once (grouped products), or one after the other where they are separate linears.

        One after the other, what the first ones save waits while the last one is at work.
        """
        scores = [self.linear(self._routed(x, layer), m) for m in layer.matrices if m.role == "router"]
        if routed["down"].kind == "parameter":
            return self._grouped_experts(x, scores, routed, layer, hidden_size)
        share = layer.experts_per_token / layer.num_experts
        waiting = Block(self.recipe)
        waiting._expert(waiting.tape.input(x.size, x.width), [], routed, layer, share)
        saved = scale(sum_of(waiting.tape.play().saved), layer.num_experts - 1)
        stash = self.tape.run([x], saved, x.width, saves_output=True)
        stash.needs_grad = False
        stands_for = self.tape.operations[-1]
        stands_for.others, stands_for.num_others = tuple(waiting.tape.operations), layer.num_experts - 1
        out = self._expert(x, scores, routed, layer, share)
        return self.tape.run([out, stash], per_token(x.width * hidden_size), x.width)

    def _routed(self, x: Tensor, layer: LayerSpec) -> Tensor:
        """What the router reads: a float32 copy where the model routes in float32."""
        is_wide = layer.routing in ("wide", "sigmoid")
        return self.cast(x, FULL_WIDTH, x.gradient[1] / x.width) if is_wide else x

    def _grouped_experts(
        self, x: Tensor, scores: list[Tensor], routed: dict[str, Matrix], layer: LayerSpec, hidden_size: int
    ) -> Tensor:
        """transformers' grouped_mm_experts_forward: sorted by expert, multiplied, weighted, sorted back, summed."""
        tape, chosen = self.tape, float(layer.experts_per_token)
        sorted_experts, order, source = (self._indices(chosen) for _ in range(3))
        gathered = tape.run([x], scale(x.size, chosen), x.width, saves=[source])
        width = self._weight_width(scores, layer)
        weights = tape.run(scores, per_token(width * chosen), width, saves=[order])
        out = self._mlp(gathered, routed, layer, chosen)
        ordered = self._weighted(out, weights, chosen * hidden_size, chosen)
        # Autocast sums in float32.
        summed = max(ordered.width, FULL_WIDTH if self.recipe.autocast else 0)
        total = tape.run([ordered], per_token(summed * hidden_size), summed)
        total = self.cast(total, x.width, hidden_size)
        # peft keeps what it folded until the experts are done.
        tape.hold(sorted_experts, order, gathered, weights, out, ordered, *self.folded, *self.biases)
        return total

    def _indices(self, chosen: float, num_temporary: int = 0) -> Tensor:
        """An int64 for each expert of each token, and others beside it for a moment."""
        size = per_token(INDEX_WIDTH * chosen)
        return self.tape.run([], size, INDEX_WIDTH, temp=scale(size, num_temporary))

    def _weight_width(self, scores: list[Tensor], layer: LayerSpec) -> int:
        """Of the weights that experts get: sigmoids stay in the product's dtype, softmaxes are float32."""
        if layer.routing == "narrow":
            return min(score.width for score in scores)
        if layer.routing == "sigmoid":
            return max(score.width for score in scores)
        return FULL_WIDTH

    def _weighted(self, out: Tensor, weights: Tensor, num_elements: float, chosen: float) -> Tensor:
        """Times the weights, in the wider dtype of both, and back in the tokens' order."""
        tape, width = self.tape, max(out.width, weights.width)
        full = per_token(width * num_elements)
        grad_temp = full
        # Its gradient is in the wider dtype before it is narrowed.
        factor = out if out.width == width else tape.part(out, full)
        if factor is not out and (self.recipe.reentrant or not self.recipe.checkpointed):
            # Meanwhile autograd holds what the product saved; a checkpoint has given it away.
            grad_temp = add(full, out.size)
        weighted = tape.run([factor, weights], full, width, saves=[out, weights], grad_temp=grad_temp)
        inverse = self._indices(chosen, num_temporary=1)
        ordered = tape.run([weighted], full, width, saves=[inverse])
        tape.hold(inverse)
        return ordered

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
            return self._down(self._activation(hidden, inner, layer), down, layer, share)
        joint = roles.get("gate_up")
        if self.recipe.own and not joint and knows_gate(roles, layer):
            gate, up = self.siblings(x, [roles["gate"], roles["up"]], share)
            return self._down(gated_silu(self.tape, gate, up), down, layer, share)
        gate = self.linear(x, joint or roles["gate"], share)
        if joint:
            half = per_token(gate.width * inner)
            gate, up = self.tape.part(gate, half), self.tape.part(gate, half)
        active = gate if self.recipe.fused_mlp else self._activation(gate, inner, layer)
        up = self._raised(up, inner, layer) if joint else self.linear(x, roles["up"], share)
        width = max(active.width, up.width)
        product = self.tape.run([active, up], per_token(width * inner), width, saves=[active, up])
        return self._down(product, down, layer, share)

    def _down(self, x: Tensor, down: Matrix, layer: LayerSpec, share: float) -> Tensor:
        return self.linear(self.dropped(x) if layer.inner_dropout else x, down, share)

    def _raised(self, up: Tensor, num_elements: float, layer: LayerSpec) -> Tensor:
        """gpt-oss clamps the other half, too, and adds one to it."""
        if layer.activation != CLAMPED_SILU:
            return up
        size = per_token(up.width * num_elements)
        clamped = self.tape.run([up], size, up.width, saves=[up])
        raised = self.tape.run([clamped], size, up.width, shares_grad=True)
        self.tape.hold(clamped)
        return raised

    def _activation(self, x: Tensor, num_elements: float, layer: LayerSpec) -> Tensor:
        recipe = self.recipe
        return activation(
            self.tape,
            x,
            num_elements,
            layer.activation,
            autocast=recipe.autocast,
            is_recomputed=recipe.checkpointed and not recipe.reentrant,
        )
