"""The layers of an encoder-decoder, and what lies before and between its two stacks (see planner.tape).

Both stacks begin with embeddings of their own, from one matrix. The encoder's output lives until the decoder's last backward:
each of the decoder's layers attends to it, and adds to its gradient. T5's position biases are made by the first layer
of a stack and handed on. Mirrors transformers' T5Stack, T5Attention, BartEncoder, BartDecoder and BartAttention.
Widths are bytes per element.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from planner import kernels
from planner.blocks import Block, Part
from planner.layering import Layering, lay
from planner.linears import Linears, Recipe
from planner.specs import LayerSpec, ModelSpec
from planner.tape import (
    ZERO,
    BlockMemory,
    Size,
    Tape,
    Tensor,
    constant,
    per_pair,
    per_square,
    per_token,
)
from planner.work import Passes

INDEX_WIDTH = 8
"""Bytes of an int64."""
NUM_BUCKETS = 32
BUCKET_TENSORS = 4
"""T5's buckets of relative positions are computed with so many int64 for each pair of positions at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where in its stack a layer is; `source_width` is that of the encoder's output, 0 in the encoder itself."""

    is_first: bool
    is_last: bool
    source_width: int


@functools.lru_cache(maxsize=8192)
def two_stack_layering(model: ModelSpec, recipe: Recipe, masked: tuple[bool, ...]) -> Layering:
    """Entry, encoder, bridge and decoder in order; the layers that begin or end a stack are built by themselves."""
    builder = _Builder(model, recipe, masked)
    return builder.layering()


class _Builder:
    def __init__(self, model: ModelSpec, recipe: Recipe, masked: tuple[bool, ...]) -> None:
        self.model, self.recipe, self.masked = model, recipe, masked
        self.memories: list[BlockMemory] = []
        self.order: list[int] = []

    def layering(self) -> Layering:
        sequence = self.model.sequence
        sides = [self.model.layers[kind].side for kind in sequence]
        num_encoder = sides.count("encoder")
        self._add(entry_memory(self.model, self.recipe))
        entry = self.order[-1]
        self._stack(sequence[:num_encoder])
        encoded = self.memories[self.order[-1]].output_width
        bridge = bridge_memory(self.model, self.recipe, encoded, keeps_source=self._keeps_source(encoded))
        self._add(bridge)
        plain = frozenset({entry, self.order[-1]})
        self._stack(sequence[num_encoder:], source_width=_source_width(self.model, self.recipe, encoded))
        found = lay(self.memories, self.order, stores_inputs=self.recipe.checkpointed, plain=plain)
        return replace(found, keeps_source=self._keeps_source(encoded))

    def _stack(self, kinds: tuple[int, ...], source_width: int = 0) -> None:
        for position, kind in enumerate(kinds):
            place = Place(
                is_first=position == 0, is_last=position == len(kinds) - 1, source_width=source_width
            )
            self._add(self._layer(kind, place))

    def _layer(self, kind: int, place: Place) -> BlockMemory:
        width = self.recipe.stream if place.is_first else self.memories[self.order[-1]].output_width
        alike = replace(self.model.layers[kind], count=1)
        recipe = replace(self.recipe, is_masked=self.masked[kind])
        return stack_layer_memory(alike, self.model.hidden_size, recipe, place, width)

    def _keeps_source(self, width: int) -> bool:
        """Whether the encoder's output waits for the decoder's backward."""
        if self.recipe.checkpointed:
            return True
        last = self.model.layers[self.model.sequence[-1]]
        place = Place(is_first=True, is_last=True, source_width=_source_width(self.model, self.recipe, width))
        memory = stack_layer_memory(
            replace(last, count=1), self.model.hidden_size, self.recipe, place, self.recipe.stream
        )
        return memory.saves_outer

    def _add(self, memory: BlockMemory) -> None:
        if memory not in self.memories:
            self.memories.append(memory)
        self.order.append(self.memories.index(memory))


def _source_width(model: ModelSpec, recipe: Recipe, width: int) -> int:
    return max(width, recipe.norm) if model.final_norm else width


@functools.lru_cache(maxsize=4096)
def stack_layer_memory(
    layer: LayerSpec, hidden_size: int, recipe: Recipe, place: Place, width: int
) -> BlockMemory:
    """One layer of either stack: what it saves, and its peaks."""
    return _recorded(layer, hidden_size, recipe, place, width).play(
        is_checkpointed=recipe.checkpointed, is_reentrant=recipe.reentrant, step_factor=recipe.step_factor
    )


@functools.lru_cache(maxsize=4096)
def stack_layer_work(layer: LayerSpec, hidden_size: int, recipe: Recipe, place: Place, width: int) -> Passes:
    """What the same layer computes and moves."""
    tape = _recorded(layer, hidden_size, recipe, place, width)
    return tape.passes(is_checkpointed=recipe.checkpointed, is_reentrant=recipe.reentrant)


def two_stack_work(
    model: ModelSpec, recipe: Recipe, masked: tuple[bool, ...]
) -> tuple[list[tuple[int, Passes]], int]:
    """Each layer's kind and work in order, encoder first, and the width of what the last one gives."""
    found: list[tuple[int, Passes]] = []
    kinds, width, source = model.sequence, recipe.stream, 0
    sides = [model.layers[kind].side for kind in kinds]
    for position, kind in enumerate(kinds):
        is_first = position == 0 or sides[position] != sides[position - 1]
        if is_first:
            source = _source_width(model, recipe, width) if position else 0
            width = recipe.stream
        is_last = position + 1 == len(kinds) or sides[position] != sides[position + 1]
        place = Place(is_first=is_first, is_last=is_last, source_width=source)
        alike = replace(model.layers[kind], count=1)
        own = replace(recipe, is_masked=masked[kind])
        work = stack_layer_work(alike, model.hidden_size, own, place, width)
        found.append((kind, work))
        width = work.output_width
    return found, width


def _recorded(layer: LayerSpec, hidden_size: int, recipe: Recipe, place: Place, width: int) -> Tape:
    block = StackBlock(recipe, place, hidden_size)
    needs_grad = not place.is_first or recipe.trains_base or recipe.has_first_grad
    stream = block.tape.input(per_token(width * hidden_size), width, needs_grad=needs_grad)
    block.layer(stream, layer, hidden_size)
    return block.tape


def entry_memory(model: ModelSpec, recipe: Recipe) -> BlockMemory:
    """The encoder's embeddings; their matrix has a gradient by then, from the decoder's, and one in the same memory."""
    block = _Ends(recipe)
    factor = max(1.0, recipe.step_factor or 0.0)
    block.embeddings(model, ZERO, constant(factor * model.token_embedding_params * recipe.weight))
    return block.tape.play(step_factor=recipe.step_factor)


def bridge_memory(model: ModelSpec, recipe: Recipe, width: int, *, keeps_source: bool) -> BlockMemory:
    """The encoder's final norm, whose output lives on, and the decoder's embeddings."""
    block = _Ends(recipe)
    tape, hidden = block.tape, model.hidden_size
    source = tape.input(per_token(width * hidden), width)
    if model.final_norm:
        source = block.norm(source, hidden, model.layers[0].norm)
        if model.layers[0].dropout:
            source = block.dropped(source)
    tape.given_gradient(source)
    table = model.token_embedding_params * recipe.weight
    # A tied head's gradient is a view of a product: the sum with it is a third tensor.
    waits, beside = (ZERO, constant(2.0 * table)) if model.tied_head else (constant(table), ZERO)
    if keeps_source:
        tape.run([source], ZERO, source.width, saves=[source])
    block.embeddings(model, waits, beside)
    return tape.play(step_factor=recipe.step_factor)


class _Ends(Linears):
    """What is outside the layers."""

    def embeddings(self, model: ModelSpec, weight_grad: Size, grad_temp: Size) -> Tensor:
        """Rows of the table, multiplied, with those of positions, normed and dropped as the model does it."""
        tape, recipe, hidden = self.tape, self.recipe, model.hidden_size
        size = per_token(recipe.weight * hidden)
        x = tape.run(
            [],
            size,
            recipe.weight,
            weight_grad=weight_grad if recipe.trains_base else ZERO,
            grad_temp=grad_temp if recipe.trains_base else ZERO,
        )
        x.needs_grad = recipe.trains_base
        if model.scales_embeddings:
            x = tape.run([x], size, recipe.weight)
        rows = x
        if model.adds_positions:
            x = tape.run([x], size, recipe.weight, shares_grad=True)
        if model.norms_embeddings:
            x = self.norm(x, hidden, model.layers[0].norm)
        if model.layers[0].dropout:
            x = self.dropped(x)
        tape.hold(rows)
        return x


class StackBlock(Block):
    """A layer of either stack."""

    def __init__(self, recipe: Recipe, place: Place, hidden_size: int) -> None:
        super().__init__(recipe)
        self.place = place
        self.bias: Tensor | None = None
        if place.source_width:
            size = per_token(place.source_width * hidden_size)
            self.source = self.tape.outer(size, place.source_width, has_gradient=not place.is_last)

    def parts(self, layer: LayerSpec) -> tuple[Part, ...]:
        """With attention to the encoder's output in the decoder."""
        if not self.place.source_width:
            return super().parts(layer)
        return self.attention, self.cross_attention, self.feed_forward

    def cross_attention(self, x: Tensor, layer: LayerSpec, hidden_size: int) -> Tensor:
        """Queries from the decoder, keys and values from the encoder's output."""
        # The layer's variable for weights takes these in place of its own attention's.
        before, self.tape.returned = self.tape.returned, []
        roles = {m.role.removeprefix("cross_"): m for m in layer.matrices if m.role.startswith("cross_")}
        query = self.linear(x, roles["q"])
        key, value = self.linear(self.source, roles["k"]), self.linear(self.source, roles["v"])
        crossing = replace(layer, causal=False)
        if layer.position_bias:
            context = self._biased(query, key, value, crossing, self._empty_bias(layer, query.width))
        else:
            context = super()._kernel(query, key, value, crossing)
        context = self.linear(context, roles["o"])
        if layer.dropout:
            context = self.dropped(context)
        self.tape.hold(x, query, key, value, *before)
        return context

    def _kernel(self, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec) -> Tensor:
        if not layer.position_bias:
            return super()._kernel(query, key, value, layer)
        return self._biased(query, key, value, layer, self._position_bias(layer))

    def _position_bias(self, layer: LayerSpec) -> Tensor:
        """A bias for each head and pair of positions; the first layer makes it from a table of buckets."""
        recipe = self.recipe
        size, trains = per_square(recipe.weight * layer.num_heads), recipe.trains_base
        if not self.place.is_first:
            return self.tape.outer(
                size, recipe.weight, needs_grad=trains, has_gradient=not self.place.is_last
            )
        work = per_square(INDEX_WIDTH * BUCKET_TENSORS)
        buckets = self.tape.run([], per_square(INDEX_WIDTH), INDEX_WIDTH, temp=work)
        buckets.needs_grad = False
        table = constant(layer.num_heads * recipe.weight * NUM_BUCKETS) if trains else ZERO
        bias = self.tape.run([buckets], size, recipe.weight, saves=[buckets], weight_grad=table)
        self.tape.hand_on(bias)
        if trains and not self.place.is_last:
            self.tape.given_gradient(bias)
        return bias

    def _empty_bias(self, layer: LayerSpec, width: int) -> Tensor:
        """Cross-attention's zeros; under checkpointing T5 asks for their gradient, too."""
        size, needs_grad = per_square(width * layer.num_heads), self.recipe.checkpointed
        if not self.place.is_first:
            return self.tape.outer(
                size, width, needs_grad=needs_grad, has_gradient=not self.place.is_last and needs_grad
            )
        bias = self.tape.run([], size, width)
        bias.needs_grad = needs_grad
        self.tape.hand_on(bias)
        if needs_grad and not self.place.is_last:
            self.tape.given_gradient(bias)
        return bias

    def _biased(self, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, bias: Tensor) -> Tensor:
        recipe = self.recipe
        narrowed = recipe.compute if recipe.autocast else 0
        if recipe.attention == "eager":
            return self._eager(query, key, value, layer, bias, narrowed)
        held = query, key, value, bias
        width = narrowed or query.width
        is_cross = not layer.causal and bias.width == query.width and self.place.source_width > 0
        mask = bias if is_cross else self._contiguous(bias, layer)
        mask = self._square(mask, width, layer)
        query, key, value = (self.cast(t, width, t.gradient[1] / t.width) for t in (query, key, value))
        spread = mask
        if mask.needs_grad and not recipe.is_single:
            # Its gradient is one for each row before they are summed.
            spread = self.tape.part(mask, per_pair(width * layer.num_heads))
        context = kernels.saving_all(
            self.tape, (query, key, value, spread), layer, kernels.efficient_temp(layer, width)
        )
        self.tape.hold(*held)
        return context

    def _contiguous(self, bias: Tensor, layer: LayerSpec) -> Tensor:
        """A copy in the heads' order; a causal one is masked before (integrations/sdpa_attention.py)."""
        if layer.causal:
            earlier = self.tape.run([], per_square(1), 1)
            earlier.needs_grad = False
            bias = self.tape.run([bias], bias.size, bias.width, saves=[earlier])
        return self.tape.run([bias], bias.size, bias.width)

    def _square(self, bias: Tensor, width: int, layer: LayerSpec) -> Tensor:
        if bias.width == width:
            return bias
        return self.tape.run([bias], per_square(width * layer.num_heads), width)

    def _eager(
        self, query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, bias: Tensor, narrowed: int
    ) -> Tensor:
        recipe = self.recipe
        how = kernels.Precision(
            compute=narrowed,
            mask=recipe.mask,
            is_float16=recipe.is_float16 and recipe.on_gpu,
            drops=layer.attention_dropout and recipe.training,
            is_single=recipe.is_single,
        )
        return kernels.biased_eager(self.tape, query, key, value, layer, how, bias)


def stack_variables(model: ModelSpec, recipe: Recipe, *, is_decoder: bool, drops: bool) -> Size:
    """The embeddings that a stack's forward holds beside its first layer's input.

    They are that input where nothing is done to them. The decoder's positions are one row.
    """
    has_own_input = model.norms_embeddings or (drops and model.layers[0].dropout)
    num_tensors = int(has_own_input) + int(model.adds_positions and not is_decoder)
    return per_token(num_tensors * recipe.weight * model.hidden_size)


def handed_on(model: ModelSpec, recipe: Recipe, *, is_decoder: bool) -> Size:
    """T5's biases, that a stack's forward hands from layer to layer."""
    layer = model.layers[-1]
    if not layer.position_bias:
        return ZERO
    crossed = recipe.compute if recipe.autocast else recipe.weight
    return per_square(layer.num_heads * (recipe.weight + (crossed if is_decoder else 0)))


def leaf_bias(model: ModelSpec, recipe: Recipe) -> Size:
    """T5's bias of the attention to the encoder, which is a leaf of the graph: it lives as long as that does."""
    layer = model.layers[-1]
    if not (layer.position_bias and recipe.checkpointed):
        return ZERO
    return per_square(layer.num_heads * (recipe.compute if recipe.autocast else recipe.weight))
